"""AdamW and SGD against torch's, Muon against the SVD and torch's, and who owns which parameter."""
from functools import partial

import pytest
import torch

from model import ModelConfig, Transformer
from optim import (OPTIMIZERS, SGD, AdamW, Muon, Optimizer, adamw_update, build_optimizer, measure_sharpness,
                   muon_update, newton_schulz, sgd_update)

SHAPES = [(7,), (5, 3), (2, 4, 6)]


def tensors(seed=0, dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(seed)
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def drive(optimizer, params, steps, seed=5):
    """The same random gradients for whoever asks, of very different sizes."""
    torch.manual_seed(seed)
    for t in range(steps):
        for p in params:
            p.grad = torch.randn_like(p) * 10.0 ** (t % 4 - 2)
        optimizer.step()
        optimizer.zero_grad()
    return params


def agree(mine, theirs, settings, shapes=SHAPES, rtol=1e-5, atol=1e-6):
    """Both optimizers bring the same weights to the same place."""
    found = tensors(shapes=shapes)
    expected = tensors(shapes=shapes)
    drive(mine(found, **settings), found, 20)
    drive(theirs(expected, **settings), expected, 20)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    return found, expected


@pytest.mark.parametrize("settings", [
    dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    dict(lr=3e-4, betas=(0.9, 0.999), weight_decay=0.0),
    dict(lr=0.1, betas=(0.0, 0.5), weight_decay=1.0, eps=1e-3)])
def test_adamw_is_torchs_adamw(settings):
    agree(AdamW, torch.optim.AdamW, settings)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_sgd(momentum):
    agree(SGD, torch.optim.SGD, dict(lr=1e-3, momentum=momentum))


@pytest.mark.parametrize("make", [AdamW, Muon, SGD])
def test_a_scale_of_zero_changes_no_weight_whatever_the_gradient(make):
    params = tensors(shapes=[(4, 3), (2, 3, 4)])
    optimizer = make(params, lr=0.1, weight_decay=0.1)
    params[0].grad = torch.full((4, 3), torch.nan)
    params[1].grad = torch.full((2, 3, 4), torch.inf)
    optimizer.step(scale=0.0)
    before = tensors(shapes=[(4, 3), (2, 3, 4)])
    assert all(map(torch.equal, params, before))
    drive(optimizer, params, 2)
    for p, old in zip(params, before):
        assert p.isfinite().all()
        assert not torch.equal(p, old)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (3, 5, 24, 8)])
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_newton_schulz_is_nearly_the_polar_factor(shape, dtype, limit):
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    S += 0.2    # keeps away from singular matrices
    G = U @ torch.diag_embed(S) @ Vh
    X = newton_schulz(G.to(dtype))
    assert X.dtype == dtype
    assert X.shape == G.shape
    middle = U.mT @ X.float() @ Vh.mT       # the same directions: it is diagonal
    values = middle.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6
    assert values.max() < 1.25              # the band of these coefficients
    torch.testing.assert_close(middle, torch.diag_embed(values), rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 7, 7)])
def test_newton_schulz_is_the_formula(shape):
    torch.manual_seed(0)
    G = torch.randn(shape, dtype=torch.float64) * 30
    X = G / torch.linalg.matrix_norm(G, keepdim=True)
    for steps in range(1, 6):
        A = X @ X.mT
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
        torch.testing.assert_close(newton_schulz(G, steps), X, rtol=1e-5, atol=1e-8)


def test_newton_schulz_of_zero_and_of_a_stack():
    torch.manual_seed(0)
    stack = torch.randn(4, 6, 9)
    stack[2] = 0
    X = newton_schulz(stack)
    assert torch.equal(X[2], torch.zeros(6, 9))
    for G, x in zip(stack, X):
        torch.testing.assert_close(newton_schulz(G), x)
    torch.testing.assert_close(newton_schulz(stack.mT).mT, X)
    torch.testing.assert_close(newton_schulz(stack * 1e-3), X, rtol=1e-3, atol=1e-3)  # size is ignored


class PlainMuon(torch.optim.Optimizer):
    """One matrix at a time, as the method is described."""
    @torch.no_grad()
    def step(self):
        lr, momentum, weight_decay = self.defaults.values()
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("momentum", torch.zeros_like(p))
            m.copy_(momentum * m + (1 - momentum) * p.grad)
            update = (1 - momentum) * p.grad + momentum * m
            rows, cols = p.shape[-2:]
            for W, G in zip(p.view(-1, rows, cols), update.view(-1, rows, cols)):
                W *= 1 - lr * weight_decay
                W -= lr * max(1, rows / cols) ** 0.5 * newton_schulz(G)


def test_muon_equals_one_matrix_at_a_time():
    def plain(params, **settings):
        return PlainMuon(params, settings)
    shapes = [(6, 4), (4, 6), (3, 6, 4), (5, 5), (2, 3, 4, 6)]
    agree(Muon, plain, dict(lr=0.02, momentum=0.9, weight_decay=0.1), shapes, rtol=1e-4, atol=1e-5)


def test_muon_is_torchs_muon():
    def in_bfloat16(params, **settings):
        return Muon(params, dtype=torch.bfloat16, **settings)
    settings = dict(lr=0.02, momentum=0.95, weight_decay=0.1)   # theirs iterates in another order
    mine, theirs = agree(in_bfloat16, torch.optim.Muon, settings, [(6, 4), (4, 6), (5, 5)], rtol=0, atol=0.03)
    for a, b in zip(mine, theirs):
        error = torch.dist(a, b)
        assert error < 0.015 * b.norm()


SMALL = ModelConfig(vocab_size=50, context_length=16, n_layers=2, n_heads=2, d_model=16, d_ff=24)
MOE = ModelConfig(vocab_size=50, context_length=16, n_layers=2, n_heads=2, d_model=16, d_ff=24, n_experts=4,
                  tied=True)


class Edited(Transformer):
    """As a learner edits it: a table of positions, and gains inside the blocks."""
    def __init__(self, config):
        super().__init__(config)
        self.positions = torch.nn.Parameter(torch.zeros(config.context_length, config.d_model))
        for block in self.blocks:
            block.attention.q_gain = torch.nn.Parameter(torch.ones(8))


UPDATES = {"adamw": adamw_update, "muon": muon_update, "sgd": sgd_update}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("make,config", [(Transformer, SMALL), (Transformer, MOE), (Edited, SMALL)])
def test_each_parameter_has_one_owner(name, make, config):
    with torch.device("meta"):
        model = make(config)
        optimizers = build_optimizer(model, name, lr=0.02, weight_decay=0.3, adamw_lr_ratio=0.1)
    owners = {}
    for optimizer in optimizers:
        for p in optimizer.params:
            assert p not in owners
            owners[p] = (optimizer.update, optimizer.settings["weight_decay"], optimizer.peak_lr)
    assert owners.keys() == {*model.parameters()}
    for key, p in model.named_parameters():
        matrix = key.startswith("blocks") and "norm" not in key and "gain" not in key
        kind, lr = UPDATES[name], 0.02
        if name == "muon" and not matrix:
            kind, lr = adamw_update, 0.02 * 0.1
        decay = 0.3 if matrix or key == "head" else 0.0     # embed, positions and gains do not decay
        assert owners[p] == (kind, decay, lr), key


def lion_update(params, grads, ms, lr, betas, weight_decay):
    for p, g, m in zip(params, grads, ms):
        direction = m.lerp(g, 1 - betas[0]).sign()
        p.mul_(1 - lr * weight_decay).sub_(lr * direction)
        m.lerp_(g, 1 - betas[1])


def test_a_new_optimizer_is_one_function_and_one_entry(monkeypatch):
    lion = partial(Optimizer, lion_update, ("ms",), betas=(0.9, 0.99), weight_decay=0.0)
    monkeypatch.setitem(OPTIMIZERS, "lion", lion)
    torch.manual_seed(0)
    model = Transformer(SMALL)
    optimizers = build_optimizer(model, "lion", lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    assert {o.update for o in optimizers} == {lion_update}
    assert {o.settings["betas"] for o in optimizers} == {(0.8, 0.9)}
    before = {p: p.detach().clone() for p in model.parameters()}
    x, y = torch.randint(50, (2, 3, 16))
    model(x, y)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
        decay = optimizer.settings["weight_decay"]
        for p in optimizer.params:
            expected = before[p] * (1 - 0.01 * decay) - 0.01 * p.grad.sign()
            torch.testing.assert_close(p.detach(), expected)
            p.grad = None
    cells = measure_sharpness(model, optimizers, x, y, grad_clip=1.0, vectors={})
    assert cells["sharpness"] > 0 and cells["stability_threshold"] is None


@pytest.mark.parametrize("make", [AdamW, Muon, SGD])
def test_set_lr_scales_the_step(make):
    def moved(factor):
        one, two = tensors(shapes=[(4, 3), (2, 5)])
        optimizer = make([one, two], lr=0.1, weight_decay=0.0)
        before = torch.cat([one.flatten(), two.flatten()])
        optimizer.set_lr(factor)
        drive(optimizer, [one, two], 1)
        return torch.cat([one.flatten(), two.flatten()]) - before

    assert moved(1.0).all()
    assert not moved(0.0).any()
    torch.testing.assert_close(moved(0.5), moved(1.0) / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [AdamW, Muon, SGD])
def test_state_survives_saving(tmp_path, make):
    one, two = tensors(shapes=SHAPES[1:]), tensors(shapes=SHAPES[1:])
    straight = make(one, lr=0.01)
    drive(straight, one, 3)
    drive(straight, one, 3, seed=6)

    first = make(two, lr=0.01)
    drive(first, two, 3)
    torch.save(first.state_dict(), tmp_path / "o.pt")
    second = make(two, lr=0.01)
    second.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    drive(second, two, 3, seed=6)
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("make", [AdamW, Muon, SGD])
def test_scale_is_a_factor_on_the_gradients(make):
    clipped = tensors(shapes=[(8, 6), (3, 6, 8)])
    plain = tensors(shapes=[(8, 6), (3, 6, 8)])
    one = make(clipped, lr=0.1)
    other = make(plain, lr=0.1)
    for t in range(3):
        for a, b in zip(clipped, plain):
            a.grad = torch.randn_like(a)
            b.grad = a.grad * 0.3 ** t
        one.step(scale=torch.tensor(0.3 ** t))
        other.step()
    torch.testing.assert_close(clipped, plain)
