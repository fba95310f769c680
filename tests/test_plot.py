"""Status of loss curves, reading of run directories, and that every picture can be drawn from whatever has arrived."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot
import sweep

ROOT = Path(__file__).resolve().parent.parent
nan = math.nan


@pytest.mark.parametrize("losses,status", [
    ([5.2, 3.8, 2.6, 1.8, 1.4], "converged"), ([5.2, 4.9, 4.6, 4.3, 4.0], "slow"),
    ([5.2, 3.1, 4.8, 2.9, 5.5], "unstable"),
    ([5.2, 8.3, 45.2, nan], "diverged"), ([5.2, math.inf], "diverged"), ([5.2, 4.0, 6.0, 6.1, 6.2], "diverged")])
def test_the_named_patterns(losses, status):
    assert plot.classify(losses) == status
    assert plot.classify(losses, best=1.4) == status


def curve(kind, n):
    """Training losses of a cosine run with 10% warm-up, from ln(2048) = 7.6; t is the share of the steps."""
    t = np.linspace(0, 1, n)
    rate = np.minimum(1, (t + 1e-3) / 0.1) * (0.1 + 0.45 * (1 + np.cos(np.pi * t)))
    s = np.cumsum(rate) / rate.sum()                     # how much learning rate has been spent
    good = 3 + 4.6 * np.exp(-6 * s) + 0.3 * (1 - s)
    return {"good": good,                                # still falls a little at its end, as every good run does
            "too high": 4.3 + 3.3 * np.exp(-12 * s) - 0.5 * np.maximum(0, t - 0.6),
            "starved": 7.6 - 1.2 * s ** 0.8,
            "bump": good + 0.2 * np.exp(-((t - 0.07) / 0.03) ** 2),
            "spike": good + 2.5 * np.exp(-((t - 0.4) / 0.05) ** 2),
            "warm-up spike": good + 4 * np.exp(-((t - 0.1) / 0.04) ** 2),
            "swings": good + 1.2 * np.sin(40 * t) * (t > 0.2),
            "unigram": np.where(t < 0.15, 7.6 - 2.2 * t / 0.15, 5.4 + 1.2 * np.minimum(1, (t - 0.15) / 0.1)),
            "stuck": 6.2 + 1.4 * np.exp(-40 * s),        # learns letter frequencies and nothing more
            "blows up": 7.6 + 3 * np.minimum(1, t / 0.1)}[kind]


@pytest.mark.parametrize("kind,status", [
    ("good", "converged"), ("too high", "converged"), ("starved", "slow"), ("bump", "converged"), ("spike", "unstable"),
    ("warm-up spike", "unstable"), ("swings", "unstable"), ("unigram", "diverged"), ("stuck", "diverged"),
    ("blows up", "diverged")])
@pytest.mark.parametrize("n", [25, 100, 1000])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_realistic_curves(kind, status, n, noise):
    rng, trials = np.random.default_rng(0), 20 if noise else 1
    found = [plot.classify(curve(kind, n) + rng.normal(0, noise, n), best=3.05) for _ in range(trials)]
    wanted = {status, "unstable"} if (kind, n) == ("unigram", 25) else {status}  # there its dip is 3 points wide
    right = sum(f in wanted for f in found)
    assert right >= (0.75 if kind == "starved" else 0.85) * trials, f"{right} of {trials}"


@pytest.mark.parametrize("kind", ["good", "too high", "starved", "bump", "spike", "warm-up spike"])
def test_no_run_that_can_recover_is_stopped_early(kind):
    rng = np.random.default_rng(0)
    for n in (20, 100, 400):
        losses = curve(kind, n) + rng.normal(0, 0.1, n)
        assert not any(plot.has_diverged(losses[:i]) for i in range(1, n + 1))


def test_early_stop_fires_and_agrees_with_the_status():
    blown = curve("blows up", 100)
    first = next(i for i in range(1, 101) if plot.has_diverged(blown[:i]))
    assert first < 40 and plot.classify(blown[:first]) == "diverged"
    assert plot.has_diverged([7.6, 7.0, nan]) and not plot.has_diverged([7.6]) and not plot.has_diverged([7.6, 20.0])


# ----------------------------------------------------------------------------------------------------------------------
# Folders of runs

def make_run(dir, lr, seed=0, status="converged", n=30, experts=0, **args):
    """A run directory as train.py writes it."""
    dir.mkdir(parents=True)
    kind = {"unstable": "spike", "slow": "starved", "diverged": "blows up"}.get(status, "good")
    losses = curve(kind, n) + 0.02 * abs(math.log(lr / 3e-3)) ** 2 + 0.01 * seed
    config = {"args": dict(lr=lr, seed=seed, max_steps=n, schedule="cosine", **args)}
    (dir / "config.json").write_text(json.dumps(config))
    if status != "running":
        end = None if status == "diverged" else float(losses[-1])
        (dir / "summary.json").write_text(json.dumps(dict(
            status=status, steps=n, seconds=9.0, lr=lr, seed=seed, final_train_loss=end, final_val_loss=end,
            final_val_perplexity=end and math.exp(end), final_val_accuracy=end and 1 / end,
            final_val_bpb=end and end / 3, max_grad_norm=2.0, diverged_at=n if end is None else None)))
    shares = [f"share_L{i}_E{j}" for i in range(2) for j in range(experts)]
    head = "step,tokens,elapsed,lr,train_loss,grad_norm,tokens_per_sec,val_loss,val_accuracy,val_perplexity,val_bpb"
    lines = [",".join([head, *shares])]
    for i, loss in enumerate(losses):
        if status == "diverged" and i == n - 1:
            loss = nan
        row = f"{i + 1},{i * 100},{i * .1}"
        lines.append(f"{row},{lr * (1 - i / n)},{loss},1.0,1000,,,," + ",0.25" * len(shares))
        if i % 10 == 0:
            lines.append(f"{row},,,,,{loss},0.1,{math.exp(min(loss, 9))},{loss / 3}" + "," * len(shares))
    (dir / "metrics.csv").write_text("\n".join(lines) + "\n")
    return dir


def test_reading_tells_train_rows_from_evaluations(tmp_path):
    dir = make_run(tmp_path / "r", 0.1, status="diverged")
    with (dir / "metrics.csv").open("a") as f:
        f.write("31,3000,3.1,0.1,9.")   # cut off while it was written
    run = plot.read_run(dir)
    assert list(run["train"]["step"]) == list(range(1, 31)) and list(run["val"]["step"]) == [1, 11, 21]
    assert np.isnan(run["train"]["train_loss"][-1]) and not np.isnan(run["val"]["val_loss"]).any()
    assert plot.read_run(tmp_path) is None and plot.read_run(tmp_path / "nowhere") is None


def test_pictures_of_a_run(tmp_path):
    pictures = ["loss_curves.png", "lr_schedule.png"]
    assert [p.name for p in plot.draw_run(make_run(tmp_path / "a", 3e-3))] == pictures
    assert [p.name for p in plot.draw_run(make_run(tmp_path / "b", 3e-3, experts=4))] == [*pictures, "router.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "b").glob("*.png"))


@pytest.mark.parametrize("statuses", [
    ["converged"], ["diverged", "diverged"], ["running"],
    ["slow", "converged", "converged", "unstable", "diverged", "running"]])
def test_a_report_on_whatever_has_arrived(tmp_path, statuses):
    for i, status in enumerate(statuses):
        make_run(tmp_path / f"r{i}", 1e-3 * 3 ** i, status=status)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"args": {"lr": 1')
    insights = sweep.report(tmp_path)
    assert insights["runs"] == len(statuses) and insights["finished"] == sum(s != "running" for s in statuses)
    assert len(list(tmp_path.glob("*.png"))) == 5 and json.loads((tmp_path / "insights.json").read_text()) == insights
    text = (tmp_path / "lr_sweep_analysis.md").read_text()
    assert ("**Use" in text) == bool({"converged", "slow", "unstable"} & set(statuses))
    assert "nan" not in text and "None" not in text


def test_a_rate_has_one_colour_in_the_order_of_the_rates():
    rates = [10 ** (-4 + i / 8) for i in range(26)]
    colours = plot.rate_colours(rates + rates)
    assert len(set(colours.values())) == 26
    grey = [0.3 * r + 0.59 * g + 0.11 * b for r, g, b, _ in (colours[lr] for lr in rates)]
    assert grey == sorted(grey)   # survives a grey print
    assert [plot.rate(x) for x in (3e-4, 2.1e-3, 0.065, 1e-2, 1.0)] == ["3e-4", "2.1e-3", "0.065", "0.01", "1"]


def test_the_program(tmp_path):
    make_run(tmp_path / "s" / "a", 3e-3)

    def python(*args):
        command = [sys.executable, str(ROOT / "plot.py"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True)
    assert "loss_curves.png" in python(tmp_path / "s" / "a").stdout
    assert "lr_vs_final_loss.png" in python(tmp_path / "s").stdout and (tmp_path / "s/a/lr_schedule.png").exists()
    for bad in (tmp_path / "NOPE", tmp_path / "s" / "a" / "metrics.csv"):
        done = python(bad)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and bad.name in done.stderr
    (tmp_path / "void").mkdir()
    assert python(tmp_path / "void").returncode == 2 and python().returncode == 2
