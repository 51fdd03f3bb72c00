"""Properties of Muon: what its step is, and that AdamW stays AdamW."""
import pytest
import torch
from torch import nn

from tiny.muon import Muon, orthogonalise


def test_every_direction_moves_equally_far():
    """Property: Newton-Schulz brings singular values that differ a hundredfold to about one and
    keeps the directions, for wide and for tall matrices."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 40), (40, 12)):
        G = torch.randn(shape, generator=generator)
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        S = torch.logspace(0, -2, 12)
        X = orthogonalise(U * S @ Vh)
        values = torch.linalg.svdvals(X)
        assert values.max() < 1.25 and values.min() > 0.5, values
        inner = U.T @ X @ Vh.T
        assert (inner - torch.diag(inner.diag())).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(24, 16), (16, 16), (16, 24)])
def test_equals_an_independent_implementation(shape):
    """Property: torch.optim.Muon takes the same steps on a matrix, up to its bfloat16. Its learning
    rate is ten times ours."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon({"w": ours}, 1e-2, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=1e-1, weight_decay=0.01, momentum=0.95,
                         adjust_lr_fn="original")
    for _ in range(4):
        grad = torch.randn(shape)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved, (ours - theirs).norm() / moved


def test_biases_and_small_layers_are_left_to_adamw():
    """Property: what is no hidden matrix takes exactly AdamW's steps; without a prefix everything
    does."""
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
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                optimizer.step()
        pairs = zip(ours.named_parameters(), theirs.parameters())
        assert {name for (name, p), q in pairs if torch.equal(p, q)} == same


def test_a_convolution_is_a_matrix():
    """Property: a kernel (out, in, t, h, w) moves as the matrix (out, in t h w) would."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(16, 8, 1, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    a, b = Muon({"w": kernel}, 1e-2), Muon({"w": matrix}, 1e-2)
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    a.step()
    b.step()
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6)


def test_the_state_is_complete_before_the_first_step():
    """Property: a step makes no new state, so that the names in a checkpoint do not depend on when
    it was written; a hidden matrix has one average, other parameters AdamW's two."""
    layer = nn.Linear(16, 16)
    optimizer = Muon(dict(layer.named_parameters()), 1e-2)

    def names():
        return [set(optimizer.state[p]) for p in (layer.weight, layer.bias)]

    before = names()
    layer(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    assert names() == before == [{"step", "momentum"}, {"step", "exp_avg", "exp_avg_sq"}]
