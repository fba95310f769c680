"""The top eigenvalue against full Hessians, thresholds against quadratics; measuring changes no figure."""
import csv
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import plot
import train
from model import ModelConfig, Transformer
from optim import (SGD, AdamW, Muon, adamw_update, build_optimizer, flat, measure_sharpness, stability_threshold,
                   top_eigenvalue)

SIZES = dict(vocab_size=16, context_length=8, n_layers=1, n_heads=2, d_model=4, d_ff=6)
DENSE = ModelConfig(**SIZES)
MOE = ModelConfig(n_experts=4, tied=True, **SIZES)
NEW = ("sharpness", "preconditioned_sharpness", "stability_threshold", "sharpness_tolerance")
SMALL = ("--data text.txt --vocab-size 300 --d-model 16 --n-layers 1 --n-heads 2 --d-ff 24 --batch-size 8 "
         "--context-length 16 --max-steps 12 --log-interval 1 --eval-interval 6 --eval-tokens 400 "
         "--checkpoint-interval 5 --device cpu --sample 0 --no-plot --lr 0.01").split()


# ----------------------------------------------------------------------------------------------------
# The eigenvalue

def symmetric(eigenvalues):
    torch.manual_seed(0)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n))
    return Q * eigenvalues @ Q.T


@pytest.mark.parametrize("lowest", [0.0, -30.0])    # the largest, not the largest in size
def test_a_known_spectrum(lowest):
    A = symmetric(torch.linspace(lowest, 7, 200))
    value, vector, reached = top_eigenvalue(A.mv, torch.randn(200), tolerance=1e-3, max_products=150)
    assert value == pytest.approx(7, rel=1e-4) and reached <= 1e-3
    assert vector.norm().item() == pytest.approx(1, rel=1e-5)
    residual = (A @ vector - value * vector).norm().item() / 7
    assert residual == pytest.approx(reached, rel=0.1)


def test_too_few_products_say_what_they_reached():
    A = symmetric(torch.linspace(0, 7, 200))
    value, _, reached = top_eigenvalue(A.mv, torch.randn(200), max_products=3)
    assert 3 < value < 7 and reached > 0.02


def test_a_direction_that_overtakes_the_last_eigenvector_is_found():
    diagonal = torch.ones(50)
    diagonal[0] = 5.0
    start = torch.ones(50) / 50 ** 0.5
    _, vector, _ = top_eigenvalue(lambda v: diagonal * v, start)
    assert vector[0].abs() > 0.999
    diagonal[1] = 6.0
    value, _, _ = top_eigenvalue(lambda v: diagonal * v, vector + start)
    assert value == pytest.approx(6, rel=1e-3)


def test_a_space_of_one_product_and_an_overflow():
    start = torch.ones(5)
    assert top_eigenvalue(lambda v: 3 * v, start)[0] == pytest.approx(3)
    for bad in (torch.inf, torch.nan):
        value, vector, reached = top_eigenvalue(lambda v: bad * v, start)
        assert np.isnan(value) and np.isnan(reached) and not vector.any()


def full_hessian(model, params, x, y):
    """A row at a time, and the gradient, both in the order of params."""
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(model(x, y)[1], params, create_graph=True)
    gradient = flat(grads)
    rows = []
    for unit in torch.eye(len(gradient)):
        rows.append(flat(torch.autograd.grad(gradient, params, unit, retain_graph=True)))
    return torch.stack(rows), gradient.detach()


def inverse_preconditioner(optimizers, gradient, clip):
    """What AdamW's next update, of lr 1, moves weights whose averaged gradient becomes 1: by taking it."""
    g = gradient.double()
    g = g * min(1, clip / g.norm())
    v = flat([v for optimizer in optimizers for v in optimizer.state["vs"]]).double()
    step = optimizers[0].state["step"].double()
    w = torch.zeros_like(g)
    m = (1 - 0.1 * g) / 0.9
    adamw_update([w], [g], [m], [v], step, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    return -w.float()


@pytest.mark.parametrize("config, name", [(DENSE, "sgd"), (DENSE, "adamw"), (DENSE, "muon"), (MOE, "adamw")])
def test_against_the_full_hessian(config, name):
    torch.manual_seed(0)
    model = Transformer(config)
    optimizers = build_optimizer(model, name, lr=0.03, momentum=0.5)
    x, y = torch.randint(config.vocab_size, (2, 4, config.context_length))
    for _ in range(10):
        model(x, y)[1].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        for optimizer in optimizers:
            optimizer.step((0.1 / norm).clamp(max=1))
            optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    precise = torch.get_float32_matmul_precision()

    model.dtype = torch.bfloat16        # it is measured in float32 and without dropout
    for block in model.blocks:
        block.dropout.p = block.attention.dropout = 0.5
    vectors = {}
    cells = measure_sharpness(model, optimizers, x, y, 0.1, vectors)
    again = measure_sharpness(model, optimizers, x, y, 0.1, vectors)
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert model.dtype == torch.bfloat16 and torch.get_float32_matmul_precision() == precise

    model.dtype = torch.float32
    model.eval()
    params = [p for optimizer in optimizers for p in optimizer.params]
    H, gradient = full_hessian(model, params, x, y)
    assert torch.allclose(H, H.T, atol=1e-4)
    tops = {"sharpness": torch.linalg.eigvalsh(H)[-1].item()}
    if name == "adamw":
        D = inverse_preconditioner(optimizers, gradient, 0.1) ** 0.5
        tops["preconditioned_sharpness"] = torch.linalg.eigvalsh(D[:, None] * H * D)[-1].item()
    for found in (cells, again):
        assert {key: found[key] for key in tops} == pytest.approx(tops, rel=2e-3)
        assert found.keys() == {*tops, "stability_threshold", "sharpness_tolerance"}
        assert found["sharpness_tolerance"] <= 0.003
        threshold = {"sgd": 2 * 1.5 / 0.03, "adamw": 38 / 0.03, "muon": None}[name]
        assert found["stability_threshold"] == pytest.approx(threshold)


# ----------------------------------------------------------------------------------------------------
# The thresholds

@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("factor, diverges", [(0.98, False), (1.02, True)])
def test_gradient_descent_on_a_quadratic(momentum, factor, diverges):
    w = torch.ones(2, requires_grad=True)
    optimizer = SGD([w], lr=0.1, momentum=momentum)
    sharpness = factor * stability_threshold(optimizer)
    assert stability_threshold(SGD([w], lr=0.1)) == pytest.approx(20)
    assert stability_threshold(SGD([w], lr=0.0)) == torch.inf
    h = torch.tensor([sharpness, 1.0])
    for _ in range(2000):
        w.grad = h * w.detach()
        optimizer.step()
        if w.abs().max() > 1e6:
            break
    assert (w.abs().max() > 1e6) == diverges and (w.abs().max() < 1e-3) != diverges


@pytest.mark.parametrize("factor, diverges", [(0.98, False), (1.02, True)])
def test_adamw_with_its_preconditioner_held_fixed(factor, diverges):
    """beta2 of nearly 1 holds v: what is left is momentum on a quadratic."""
    lr = 1e-4
    w = torch.ones(1, requires_grad=True)
    optimizer = AdamW([w], lr=lr, betas=(0.9, 1 - 1e-7), eps=0.0, weight_decay=0.0)
    threshold = stability_threshold(optimizer)
    assert threshold == pytest.approx(38 / lr)
    optimizer.state["step"].fill_(1e9)
    optimizer.state["vs"][0].fill_(1.0)       # beta2^t is 0, so that v^ is 1
    w.data.fill_(1e-9)
    for _ in range(2000):
        w.grad = factor * threshold * w.detach()
        optimizer.step()
        if w.abs() > 1e-5:
            break
    assert (w.abs().item() > 1e-5) == diverges
    assert stability_threshold(Muon([w], lr=lr)) is None


# ----------------------------------------------------------------------------------------------------
# Whole runs

@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)    # for tensors this small, threads wait for each other
    path = tmp_path_factory.mktemp("sharpness")
    before = os.getcwd()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(200)]
    documents = [" ".join(rng.choices(words, k=40)) for _ in range(400)]
    (path / "text.txt").write_text("\n\n".join(documents))
    os.chdir(path)
    yield path
    os.chdir(before)
    torch.set_num_threads(n_threads)


def run(out, *flags):
    """Rows of metrics.csv without times: of the training, and of the sharpness."""
    train.main([*SMALL, "--out", out, *flags])
    training = []
    measured = []
    with open(Path(out, "metrics.csv"), newline="") as file:
        for row in csv.DictReader(file):
            del row["elapsed"], row["tokens_per_sec"]
            if row.get("sharpness"):
                measured.append(row)
                continue
            for column in NEW:
                row.pop(column, None)
            training.append(row)
    return training, measured


@pytest.mark.parametrize("name, flags", [
    ("adamw", "--dropout 0.1 --n-experts 4 --dtype bfloat16"),
    ("sgd", "--momentum 0 --full-batch")])
def test_measuring_changes_no_figure_and_a_resumed_run_repeats_it(name, flags, monkeypatch):
    flags = ["--optimizer", name, *flags.split()]
    plain, nothing = run(name + "-plain", *flags)
    rows, measured = run(name, *flags, "--sharpness", "4")
    assert rows == plain and not nothing
    expected = torch.load(f"{name}-plain/checkpoints/last.pt")["model"]
    found = torch.load(f"{name}/checkpoints/last.pt")["model"]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [row["step"] for row in measured] == ["0", "4", "8"]
    for row in measured:
        assert float(row["sharpness"]) > 0
        assert float(row["sharpness_tolerance"]) <= 0.003
        assert row["lr"] == row["val_loss"] == row["train_loss"] == ""
        assert bool(row["stability_threshold"])
        assert bool(row.get("preconditioned_sharpness")) == (name == "adamw")

    measure = train.measure_sharpness
    calls = []

    def die(*args, **settings):
        calls.append(args)
        if len(calls) == 3:     # at step 8, after the checkpoint of step 5
            raise AssertionError("killed")
        return measure(*args, **settings)
    monkeypatch.setattr(train, "measure_sharpness", die)
    with pytest.raises(AssertionError):
        run(name + "-killed", *flags, "--sharpness", "4")
    assert run(name + "-killed", *flags, "--sharpness", "4", "--resume") == (rows, measured)
    assert len(calls) == 4


def test_the_picture_of_a_run(folder):
    run("pictured", "--optimizer", "sgd", "--sharpness", "2", "--grad-clip", "0", "--lr", "0.01")
    pictures = plot.draw_curves(plot.RUN, [plot.read_run(folder / "pictured")], "a run")
    assert "sharpness.png" in pictures
    metrics = plot.read_run(folder / "pictured")["metrics"]
    assert list(metrics["step"][np.isfinite(metrics["sharpness_ratio"])]) == [0, 2, 4, 6, 8, 10]
