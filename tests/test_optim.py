"""AdamW against torch.optim.AdamW, Muon against the SVD and torch.optim.Muon, and who owns which parameter."""
import pytest
import torch

from model import PRESETS, ModelConfig, Transformer
from optim import SGD, AdamW, Muon, build_optimizer, newton_schulz

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


@pytest.mark.parametrize("settings", [
    dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    dict(lr=3e-4, betas=(0.9, 0.999), weight_decay=0.0),
    dict(lr=0.1, betas=(0.0, 0.5), weight_decay=1.0, eps=1e-3)])
def test_adamw_is_torchs_adamw(settings):
    mine, theirs = tensors(), tensors()
    drive(AdamW(mine, **settings), mine, 20)
    drive(torch.optim.AdamW(theirs, **settings), theirs, 20)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_sgd(momentum):
    mine, theirs = tensors(), tensors()
    drive(SGD(mine, lr=1e-3, momentum=momentum), mine, 20)
    drive(torch.optim.SGD(theirs, lr=1e-3, momentum=momentum), theirs, 20)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [AdamW, Muon, SGD])
def test_a_scale_of_zero_changes_no_weight_whatever_the_gradient(make):
    params = tensors(shapes=[(4, 3), (2, 3, 4)])
    before = [p.detach().clone() for p in params]
    optimizer = make(params, lr=0.1, weight_decay=0.1)
    params[0].grad = torch.full((4, 3), torch.nan)
    params[1].grad = torch.full((2, 3, 4), torch.inf)
    optimizer.step(scale=0.0)
    assert all(torch.equal(p, q) for p, q in zip(params, before))
    drive(optimizer, params, 2)
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(params, before))


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (3, 5, 24, 8), (4, 8, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_is_nearly_the_polar_factor(shape, dtype):
    torch.manual_seed(0)
    G = torch.randn(shape)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    G = U * (0.02 + S / S.amax(-1, keepdim=True))[..., None, :] @ Vh  # keeps away from singular matrices
    X = newton_schulz(G.to(dtype))
    assert X.dtype == dtype and X.shape == G.shape
    s = torch.linalg.svdvals(X.float())
    assert s.min() > 0.6 and s.max() < 1.25  # the band of these coefficients
    # the same directions: U' X V is diagonal
    middle = U.mT @ X.float() @ Vh.mT
    off = middle - torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < (1e-4 if dtype == torch.float32 else 0.06)


@pytest.mark.parametrize("shape", [(7, 7), (9, 4), (4, 9), (3, 8, 5)])
def test_newton_schulz_is_the_formula(shape):
    torch.manual_seed(0)
    G = torch.randn(shape, dtype=torch.float64) * 30
    X = G / torch.linalg.matrix_norm(G, keepdim=True)
    for steps in range(1, 6):
        X = 3.4445 * X - 4.7750 * X @ X.mT @ X + 2.0315 * X @ X.mT @ X @ X.mT @ X
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
    torch.testing.assert_close(newton_schulz(stack * 1e-3), X, rtol=1e-3, atol=1e-3)  # the size of a gradient is ignored


def plain_muon(params, steps, lr, momentum, weight_decay, seed=5):
    """One matrix at a time, as the method is described."""
    torch.manual_seed(seed)
    state = [torch.zeros_like(p) for p in params]
    for t in range(steps):
        grads = [torch.randn_like(p) * 10.0 ** (t % 4 - 2) for p in params]
        for p, g, m in zip(params, grads, state):
            m.copy_(momentum * m + (1 - momentum) * g)
            update = (1 - momentum) * g + momentum * m
            for W, G in zip(p.data.view(-1, *p.shape[-2:]), update.view(-1, *p.shape[-2:])):
                W *= 1 - lr * weight_decay
                W -= lr * max(1, G.size(0) / G.size(1)) ** 0.5 * newton_schulz(G)
    return params


def test_muon_equals_one_matrix_at_a_time():
    shapes = [(6, 4), (4, 6), (3, 6, 4), (2, 4, 6), (5, 5), (2, 3, 4, 6)]
    mine, plain = tensors(shapes=shapes), tensors(shapes=shapes)
    drive(Muon(mine, lr=0.02, momentum=0.9, weight_decay=0.1), mine, 6)
    plain_muon(plain, 6, 0.02, 0.9, 0.1)
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_muon_is_torchs_muon():
    shapes = [(6, 4), (4, 6), (5, 5)]
    mine, theirs = tensors(shapes=shapes), tensors(shapes=shapes)
    drive(Muon(mine, lr=0.02, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16), mine, 10)
    drive(torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True), theirs, 10)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)  # theirs iterates in bfloat16 in another order
        assert (a - b).norm() / b.norm() < 0.01


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("preset", PRESETS)
def test_each_parameter_has_one_owner(name, preset):
    config = PRESETS[preset]
    with torch.device("meta"):
        model = Transformer(config)
        optimizers = build_optimizer(model, name, lr=0.02, adamw_lr_ratio=0.1)
    named = {id(p): n for n, p in model.named_parameters()}
    owners = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in owners
                owners[id(p)] = (type(optimizer).__name__, group["weight_decay"] > 0, group["peak_lr"])
    assert set(owners) == set(named)
    for key, (kind, decayed, lr) in owners.items():
        n = named[key]
        muon = name == "muon" and n.startswith("blocks.") and "norm" not in n
        assert kind == ("Muon" if muon else "SGD" if name == "sgd" else "AdamW"), n
        assert decayed == ("norm" not in n and n != "embed"), n
        assert lr == (0.02 if muon or name != "muon" else pytest.approx(0.002)), n
    if preset == "moe" and name == "muon":
        assert sum(p.numel() for g in optimizers[0].param_groups for p in g["params"]) == 60_180_480


def test_set_lr_scales_every_group_and_the_step_follows():
    config = ModelConfig(vocab_size=20, context_length=8, n_layers=1, n_heads=2, d_model=8, d_ff=8)
    moved = []
    for factor in (1.0, 0.5, 0.0):
        torch.manual_seed(0)
        model = Transformer(config)
        optimizers = build_optimizer(model, "muon", lr=0.02, weight_decay=0.0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.set_lr(factor)
            optimizer.step()
        moved.append({n: (p - before[n]).norm().item() for n, p in model.named_parameters()})
    for n in moved[0]:
        assert moved[0][n] > 0 and moved[2][n] == 0
        assert moved[1][n] == pytest.approx(moved[0][n] / 2, rel=1e-3)


def test_state_survives_saving(tmp_path):
    for make in (lambda p: AdamW(p, lr=0.01), lambda p: Muon(p, lr=0.01)):
        shapes = SHAPES[1:]
        one, two = tensors(shapes=shapes), tensors(shapes=shapes)
        straight = make(one)
        drive(straight, one, 3)
        drive(straight, one, 3, seed=6)
        first = make(two)
        drive(first, two, 3)
        torch.save(first.state_dict(), tmp_path / "o.pt")
        second = make(two)
        second.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
        drive(second, two, 3, seed=6)
        assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("bad", [
    lambda p: AdamW(p, lr=0), lambda p: AdamW(p, lr=float("nan")), lambda p: AdamW(p, betas=(1, 0)),
    lambda p: Muon(p, lr=-1), lambda p: Muon(p, dtype=torch.float16),
    lambda p: Muon([torch.zeros(3, requires_grad=True)])])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError):
        bad(tensors(shapes=[(3, 3)]))


@pytest.mark.parametrize("make", [AdamW, Muon, SGD])
def test_scale_is_a_factor_on_the_gradients(make):
    clipped, plain = tensors(shapes=[(8, 6), (3, 6, 8)]), tensors(shapes=[(8, 6), (3, 6, 8)])
    one, other = make(clipped, lr=0.1), make(plain, lr=0.1)
    for t in range(3):
        for a, b in zip(clipped, plain):
            a.grad = torch.randn_like(a)
            b.grad = a.grad * 0.3 ** t
        one.step(scale=torch.tensor(0.3 ** t))
        other.step()
    for a, b in zip(clipped, plain):
        torch.testing.assert_close(a, b)
