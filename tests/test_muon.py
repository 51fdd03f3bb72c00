"""Laws of muon.py: what a step of Muon is, and that AdamW stays AdamW."""
import torch
from torch import nn

from muon import Muon, orthogonal


def test_every_direction_moves_equally_far():
    """Newton-Schulz brings singular values that differ a hundredfold to about one, and keeps the directions, for wide and for tall matrices."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 40), (40, 12)):
        U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        S = torch.logspace(0, -2, 12)
        X = orthogonal(U * S @ Vh)
        values = torch.linalg.svdvals(X)
        assert values.max() < 1.25 and values.min() > 0.5, values
        inner = U.T @ X @ Vh.T
        assert (inner - torch.diag(inner.diag())).abs().max() < 1e-4


def test_equals_an_independent_implementation():
    """torch.optim.Muon (bfloat16 inside, matrices only) goes the same way as ours on a matrix."""
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.zeros(24, 16))
    theirs.data.copy_(ours)
    start = ours.detach().clone()
    a, b = Muon({"w": ours}, 1e-2, weight_decay=0.1), torch.optim.Muon([theirs], lr=1e-1, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original")
    for _ in range(4):
        grad = torch.randn(24, 16)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step(), b.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved, (ours - theirs).norm() / moved


def test_biases_and_small_layers_are_left_to_adamw():
    """What is no hidden matrix takes exactly AdamW's steps; without a prefix everything does."""
    def net():
        torch.manual_seed(0)
        return nn.ModuleDict({"first": nn.Linear(8, 16), "blocks": nn.Linear(16, 16)})
    everything = {"first.weight", "first.bias", "blocks.bias", "blocks.weight"}
    for prefix, same in (("blocks.", everything - {"blocks.weight"}), (None, everything)):
        ours, theirs = net(), net()
        a = Muon(dict(ours.named_parameters()), 1e-2, prefix, weight_decay=0.1)
        b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        for _ in range(3):
            for model, optimizer in ((ours, a), (theirs, b)):
                optimizer.zero_grad()
                model["blocks"](model["first"](torch.ones(2, 8))).square().sum().backward()
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                optimizer.step()
        equal = {k for (k, p), q in zip(ours.named_parameters(), theirs.parameters()) if torch.equal(p, q)}
        assert equal == same


def test_a_convolution_is_a_matrix():
    """A kernel (out, in, t, h, w) moves as the matrix (out, in t h w) would."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(16, 8, 1, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    a, b = Muon({"w": kernel}, 1e-2), Muon({"w": matrix}, 1e-2)
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    a.step(), b.step()
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6)
