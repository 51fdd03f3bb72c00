"""Muon: AdamW's idea for whole matrices. Training on two CPU cores becomes several times shorter.

Gradient descent moves a weight matrix mostly along the few directions in which gradients are large.
Muon replaces the averaged gradient G = U S V^T by U V^T, so every direction moves equally far.
Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(kellerjordan.github.io/posts/muon), with their coefficients. Not in the paper.
"""
import torch


def orthogonalise(G, steps=5):
    """G (m, n) = U S V^T -> about U V^T: singular values between 0.7 and 1.2 (Newton-Schulz)."""
    X = G / (G.norm() + 1e-7)
    tall = X.shape[0] > X.shape[1]
    if tall:
        X = X.T                                                     # X X^T is the smaller square
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X         # moves singular values to 1
    return X.T if tall else X


class Muon(torch.optim.AdamW):
    """Muon for hidden matrices and convolutions, AdamW for biases, norms, first and last layers.

    named: {name: parameter}. Hidden is what begins with `prefix` and has at least 8 rows and 8
    columns; a convolution is the matrix (out, in * kernel). prefix None: plain AdamW. Both kinds
    share AdamW's learning rate; entries of U V^T are small, so a matrix steps ten times as far.

    Why not torch.optim.Muon: it refuses convolutions and multiplies in bfloat16. In float32 both
    agree to 1e-6, but on a CPU without bfloat16 units torch's step of the tiny DiT takes 22 s
    instead of 0.9 s and differs by 1 to 8 %.
    """

    def __init__(self, named, lr, prefix="", betas=(0.9, 0.99), weight_decay=0.0, momentum=0.95):
        super().__init__(named.values(), lr=lr, betas=betas, weight_decay=weight_decay)
        self.momentum = momentum
        self.hidden = []                # a list: with FSDP all processes need the same order
        for name, p in named.items():
            zeros = torch.zeros_like(p.detach())
            inside = prefix is not None and name.startswith(prefix)
            # The state is made now, so that the names in a checkpoint are always complete.
            if inside and p.ndim > 1 and min(p.shape[:2]) >= 8:
                self.hidden.append(p)
                self.state[p] = {"step": torch.tensor(0.0), "momentum": zeros}
            else:
                self.state[p] = {"step": torch.tensor(0.0), "exp_avg": zeros,
                                 "exp_avg_sq": zeros.clone()}

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in self.hidden:
            if p.grad is None:
                continue
            average = self.state[p]["momentum"]
            average.lerp_(p.grad, 1 - self.momentum)
            G = p.grad.lerp(average, self.momentum).flatten(1)      # Nesterov's look ahead
            update = orthogonalise(G)
            stretch = max(1, G.shape[0] / G.shape[1]) ** 0.5        # of tall matrices
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(update.view_as(p), alpha=10 * group["lr"] * stretch)
            p.grad = None                                           # AdamW leaves it alone
        super().step()
