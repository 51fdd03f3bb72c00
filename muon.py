"""Muon: what AdamW does for single numbers, done for whole matrices. It makes training on two CPU cores several times shorter (LOG.md).

A step of gradient descent moves a weight matrix mostly along the few directions in which gradients are large. Muon replaces the averaged
gradient G = U S V^T by U V^T: every direction moves equally far. Five Newton-Schulz iterations approximate U V^T with nothing but products.
Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024); it gives the
coefficients. torch.optim.Muon takes matrices only; this one also takes convolutions, as matrices (out, in * kernel), and keeps AdamW for the rest.
"""
import torch


def orthogonal(G, steps=5):
    """G (m, n) -> about U V^T of its singular value decomposition: singular values between 0.7 and 1.2."""
    X = G / (G.norm() + 1e-7)
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X                                                      # the shorter side first: X X^T is the smaller square
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X                     # odd polynomial of the singular values: pulls them towards 1
    return X.T if tall else X


class Muon(torch.optim.AdamW):
    """Muon for the hidden matrices among `named` {name: parameter}, AdamW for biases, norms, first and last layers.

    Hidden is what begins with `prefix` and has at least 8 rows and 8 columns; prefix None makes this plain AdamW. Both kinds share one
    learning rate, that of AdamW; as every entry of U V^T is small, the matrices' steps are ten times as long."""

    def __init__(self, named, lr, prefix="", betas=(0.9, 0.99), weight_decay=0.0, momentum=0.95):
        super().__init__(named.values(), lr=lr, betas=betas, weight_decay=weight_decay)
        inside = [p for name, p in named.items() if prefix is not None and name.startswith(prefix)]
        self.hidden = [p for p in inside if p.ndim > 1 and min(p.shape[:2]) >= 8]      # in order: FSDP's processes must meet at the same one
        self.momentum = momentum
        ids = set(map(id, self.hidden))
        for p in named.values():                                                # made now, not in the first step: a checkpoint's
            zeros = torch.zeros_like(p.detach())                                # names are always all there
            self.state[p] = {"step": torch.tensor(0.0)} | ({"momentum": zeros} if id(p) in ids else
                                                           {"exp_avg": zeros, "exp_avg_sq": zeros.clone()})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in self.hidden:
            if p.grad is None:
                continue
            average = self.state[p]["momentum"]
            average.lerp_(p.grad, 1 - self.momentum)
            update = orthogonal(p.grad.lerp(average, self.momentum).flatten(1))  # Nesterov: a look ahead along the average
            long = max(1, update.shape[0] / update.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(p), alpha=10 * group["lr"] * long)
            p.grad = None                                                       # so that AdamW leaves it alone
        super().step()
