"""Status of loss curves, reading of run folders, and that every picture can be drawn from what has arrived."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot

ROOT = Path(__file__).resolve().parent.parent
PICTURES = {"lr_sweep_comparison.png", "lr_vs_final_loss.png", "detailed_comparison.png", "lr_schedules.png",
            "summary_table.png"}


# ------------------------------------------------------------------------------------------------------------
# Status

@pytest.mark.parametrize("losses,status", [
    ("5.2 3.8 2.6 1.8 1.4", "converged"),
    ("5.2 4.9 4.6 4.3 4.0", "slow"),
    ("5.2 3.1 4.8 2.9 5.5", "unstable"),
    ("5.2 8.3 45.2 nan", "diverged"),
    ("5.2 inf", "diverged"),
    ("5.2 4.0 6.0 6.1 6.2", "diverged"),
    ("7.6", "slow"),
    ("", "slow")])
def test_the_named_patterns(losses, status):
    losses = [float(loss) for loss in losses.split()]
    assert plot.classify(losses) == status
    assert plot.classify(losses, best=1.4) == status


def curve(kind, n):
    """Training losses of a cosine run with 10% warm-up, from ln(2048) = 7.6; t is the share of the steps."""
    t = np.linspace(0, 1, n)
    rate = np.minimum(1, (t + 1e-3) / 0.1) * (0.1 + 0.45 * (1 + np.cos(np.pi * t)))
    s = np.cumsum(rate) / rate.sum()   # how much learning rate has been spent
    good = 3 + 4.6 * np.exp(-6 * s) + 0.3 * (1 - s)

    def ramp(start, end):
        return np.clip((t - start) / (end - start), 0, 1)
    return {
        "good": good,   # still falls a little at its end, as every good run does
        "power law": 1.3 + 7.9 * (1 + 400 * s) ** -0.5,
        "plateau, then decay": 3.3 + 4.3 * np.exp(-20 * t) - 1.0 * ramp(0.8, 1),
        "bump": good + 0.4 * np.exp(-((t - 0.07) / 0.03) ** 2),
        "too high": 4.3 + 3.3 * np.exp(-12 * s) - 0.5 * np.maximum(0, t - 0.6),
        "1.4 above": 4.45 + 3.15 * np.exp(-30 * s) - 0.2 * t,
        "starved": 7.6 - 1.2 * s ** 0.8,
        "nothing learned": 7.6 + 0 * t,
        "spike": good + 2.5 * np.exp(-((t - 0.4) / 0.05) ** 2),
        "warm-up spike": good + 4 * np.exp(-((t - 0.1) / 0.04) ** 2),
        "swings": good + 1.2 * np.sin(40 * t) * (t > 0.2),
        "rise and recovery": good + 0.5 * ramp(0.5, 0.55) * np.exp(-np.maximum(0, t - 0.55) / 0.1),
        "rises for good": good + 2 * ramp(0.7, 1),
        "rose late": good + 2 * ramp(0.72, 0.8),
        "lost it": np.where(t < 0.15, 7.6 - 2.2 * t / 0.15, 5.4 + 1.2 * ramp(0.15, 0.25)),
        "stuck": 6.2 + 1.4 * np.exp(-40 * s),   # learns how frequent tokens are and nothing more
        "back to the start": 7.5 + 3 * np.exp(-((t - 0.1) / 0.05) ** 2),
        "blows up": 7.6 + 3 * ramp(0, 0.1)}[kind]


def statuses(kind, n, noise, best, trials=40):
    rng = np.random.default_rng(0)
    return [plot.classify(curve(kind, n) + rng.normal(0, noise, n), best) for _ in range(trials)]


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("n", [25, 100, 1000])
def test_healthy_runs_converge_whatever_their_noise(n, noise):
    for kind in ("good", "bump", "power law", "plateau, then decay"):
        best = curve(kind, n)[-1]
        found = statuses(kind, n, noise, best) + statuses(kind, n, noise, None)
        assert found.count("converged") >= 78, (kind, found)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("n", [50, 100, 1000])
def test_other_curves(n, noise):
    families = {
        "slow": ["too high", "1.4 above", "starved"],
        "unstable": ["spike", "warm-up spike", "swings"],
        "diverged": ["rises for good", "rose late", "lost it", "stuck", "back to the start", "blows up"]}
    for wanted, kinds in families.items():
        for kind in kinds:
            found = statuses(kind, n, noise, best=3.05)
            assert found.count(wanted) >= 36, (kind, found)
            if wanted in plot.EDGE and kind != "stuck":   # which a run without its sweep cannot show
                found = statuses(kind, n, noise, best=None)
                assert found.count(wanted) >= 36, (kind, found)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_a_flat_run_has_one_answer_alone_and_in_its_sweep(noise):
    for n in (50, 100, 1000):
        for best in (None, 3.0, 7.5):
            assert set(statuses("nothing learned", n, noise, best)) == {"slow"}


def test_a_rise_over_hundreds_of_steps_is_told_from_small_noise():
    for n in (100, 400, 1000):
        assert set(statuses("rise and recovery", n, 0.02, best=3.0)) == {"unstable"}


@pytest.mark.parametrize("kind", ["good", "too high", "starved", "bump", "spike", "warm-up spike", "swings"])
def test_no_run_that_can_recover_is_stopped_early(kind):
    rng = np.random.default_rng(0)
    for n in (20, 100, 400):
        losses = curve(kind, n) + rng.normal(0, 0.1, n)
        assert not any(plot.has_diverged(losses[:i]) for i in range(n + 1))


def test_a_blow_up_is_stopped_early_and_keeps_its_status():
    # A real run of the tiny preset at a rate of 1, a loss every two steps: gradient clipping keeps it finite.
    text = "7.56 10.53 16.63 11.70 16.04 15.65 17.07 17.01 21.65 25.92 21.20 21.53"
    losses = [float(loss) for loss in text.split()]
    assert plot.has_diverged(losses) and plot.classify(losses) == "diverged"
    assert plot.has_diverged([7.6, math.nan]) and not plot.has_diverged([7.6, 20.0])
    blown = curve("blows up", 100)
    assert any(plot.has_diverged(blown[:i]) for i in range(25))


# ------------------------------------------------------------------------------------------------------------
# Folders of runs

def make_run(dir, lr, seed=0, status="converged", setting="", n=30, experts=0):
    """A run's folder as train.py writes it; returns the run as sweep.analyse leaves it."""
    dir.mkdir(parents=True)
    kinds = {"unstable": "spike", "slow": "starved", "diverged": "blows up"}
    losses = curve(kinds.get(status, "good"), n) + 0.02 * abs(math.log(lr / 3e-3)) ** 2 + 0.01 * seed
    if status == "diverged":
        losses[-1] = math.nan
    (dir / "config.json").write_text(json.dumps({"args": dict(lr=lr, seed=seed)}))
    (dir / "summary.json").write_text(json.dumps(dict(status=status)))
    shares = [f"share_L{i}_E{j}" for i in range(2) for j in range(experts)]
    rows = [[*plot.COLUMNS, *shares]]
    for i, loss in enumerate(losses):
        place = [i + 1, i * 100, i / 10]
        rows.append([*place, lr * (1 - i / n), loss, 1.0, 1000, "", "", "", "", *[0.25 for _ in shares]])
        if i % 10 == 0:
            rows.append([*place, "", "", "", "", loss, 0.1, math.exp(loss), loss / 3, *["" for _ in shares]])
    lines = [",".join(map(str, row)) + "\n" for row in rows]
    (dir / "metrics.csv").write_text("".join(lines))
    end = {"diverged": math.inf, "running": None}.get(status, float(losses[-1]))
    return plot.read_run(dir) | dict(status=status, setting=setting, loss=end)


def make_insights(runs, use=None, edge=None):
    """What sweep.analyse finds, with the keys that the pictures need; use: of the first setting."""
    settings = []
    for label in dict.fromkeys(run["setting"] for run in runs):
        rates = []
        for run in runs:
            if run["setting"] == label and run["loss"] is not None:
                loss = run["loss"] if run["status"] != "diverged" else None
                row = dict.fromkeys(["val_loss", "val_accuracy", "val_perplexity", "accuracy_per_minute"], loss)
                row |= dict(lr=run["lr"], seeds=[run["seed"]], status=run["status"], diverged=int(loss is None))
                rates.append(row | dict(max_grad_norm=2.0, deviation=None, val_bpb=None))
        settings.append(dict(label=label, best_lr=use and use["lr"], edge=edge, rates=rates))
    return dict(use=use and dict(setting=runs[0]["setting"], **use), settings=settings)


def test_reading_tells_steps_from_evaluations_and_leaves_out_damaged_rows(tmp_path):
    make_run(tmp_path / "r", 0.1, status="diverged")
    path = tmp_path / "r" / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = "3,200,0.2,\0\0,7.1,1.0,1000,,,,\n"
    path.write_text("".join(lines) + "31,3000,3.1,0.1,9.")   # cut off while it was written
    run = plot.read_run(tmp_path / "r")
    assert list(run["train"]["step"]) == [1, *range(3, 31)] and list(run["val"]["step"]) == [1, 11, 21]
    assert np.isnan(run["train"]["train_loss"][-1]) and not np.isnan(run["val"]["val_loss"]).any()


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "summary.json"])
@pytest.mark.parametrize("content", [
    b"",
    b"[]",
    b"\0\0\0\n\0",
    b"\xff\xfe rubbish",
    b"[" * 100_000,
    b'{"args": {"lr": NaN, "seed": 1}}',
    b'{"args": {"lr": "x", "seed": 1e999}}'])
def test_one_damaged_file_stops_nothing(tmp_path, name, content):
    make_run(tmp_path / "good", 3e-3)
    make_run(tmp_path / "bad", 1e-2)
    (tmp_path / "bad" / name).write_bytes(content)
    names = [run["name"] for run in plot.read_runs(tmp_path)]
    assert names == (["good"] if name == "config.json" else ["good", "bad"])
    assert bool(plot.draw_run(tmp_path / "bad")) == (name == "summary.json")
    assert plot.read_run(tmp_path / "nowhere") is None and plot.read_json(tmp_path) is None


def test_pictures_of_a_run(tmp_path):
    make_run(tmp_path / "a", 3e-3)
    make_run(tmp_path / "b", 3e-3, status="diverged", experts=4)
    names = ["loss_curves.png", "lr_schedule.png"]
    assert [path.name for path in plot.draw_run(tmp_path / "a")] == names
    assert [path.name for path in plot.draw_run(tmp_path / "b")] == [*names, "router.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "b").glob("*.png"))


def test_missing_columns_and_many_rows_are_drawn(tmp_path):
    make_run(tmp_path / "r", 3e-3)
    rows = [f"{i},{3 + 1 / (1 + i)},0.003\n" for i in range(300_000)]
    (tmp_path / "r" / "metrics.csv").write_text("step,train_loss,lr\n" + "".join(rows))
    assert len(plot.read_run(tmp_path / "r")["train"]["grad_norm"]) == 300_000
    assert len(plot.draw_run(tmp_path / "r")) == 2


@pytest.mark.parametrize("found", [
    ["converged"], ["diverged", "diverged"], ["running"],
    ["slow", "converged", "converged", "unstable", "diverged", "running"]])
@pytest.mark.parametrize("settings", [1, 2])
def test_pictures_of_a_sweep_from_whatever_has_arrived(tmp_path, found, settings):
    runs = []
    for j in range(settings):
        for i, status in enumerate(found):
            runs.append(make_run(tmp_path / f"r{i}{j}", 1e-3 * 3 ** i, 0, status, setting=f"data=${j}_"[: 8 * j]))
    use = None
    edge = None
    if "converged" in found:
        use = dict(lr=1e-3, low=None, high=None if len(found) == 1 else 9e-3)
    if "unstable" in found:
        edge = dict(unstable=dict(lr=2.7e-2, seeds=1, of=2), diverged=None)
    paths = plot.draw_sweep(tmp_path, runs, make_insights(runs, use, edge))
    assert {path.name for path in paths} == PICTURES and all(path.exists() for path in paths)
    assert not list(tmp_path.glob("*.tmp"))
    assert plot.draw_sweep(tmp_path, [], make_insights([])) == []


def test_settings_that_share_one_rate_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / str(i), 3e-3, setting=f"warmup-ratio={i}") for i in range(3)]
    look = plot.looks(runs)
    assert len({x for x, _ in look.values()}) == len({style["color"] for _, style in look.values()}) == 3
    plot.draw_sweep(tmp_path, runs, make_insights(runs, dict(lr=3e-3, low=None, high=None)))


def test_a_rate_has_one_colour_in_the_order_of_the_rates():
    rates = [10 ** (-4 + i / 8) for i in range(26)]
    look = plot.looks([dict(setting=setting, lr=lr) for setting in "ab" for lr in rates])
    colours = [look["a", lr][1]["color"] for lr in rates]
    assert colours == [look["b", lr][1]["color"] for lr in rates] and len(set(colours)) == 26
    grey = [0.3 * red + 0.59 * green + 0.11 * blue for red, green, blue, _ in colours]
    assert grey == sorted(grey)   # survives a grey print
    assert [plot.rate(x) for x in (3e-4, 2.1e-3, 0.065, 1e-2, 1.0)] == ["3e-4", "2.1e-3", "0.065", "0.01", "1"]


# ------------------------------------------------------------------------------------------------------------
# The program

def python(program, *args):
    command = [sys.executable, str(program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_draws_a_run_and_starts_the_report_of_a_sweep(tmp_path):
    make_run(tmp_path / "sweep" / "run", 3e-3)
    program = shutil.copy(ROOT / "plot.py", tmp_path)
    (tmp_path / "sweep.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)")
    assert "loss_curves.png" in python(program, tmp_path / "sweep" / "run").stdout
    done = python(program, tmp_path / "sweep")
    assert done.returncode == 3 and "python sweep.py --report" in done.stdout
    assert str(["--report", str(tmp_path / "sweep")]) in done.stdout


def test_what_is_wrong_is_said_in_a_line(tmp_path):
    make_run(tmp_path / "run", 3e-3)
    (tmp_path / "run" / "lr_schedule.png").mkdir()   # cannot be written over
    (tmp_path / "empty").mkdir()
    for dir in (tmp_path / "NOPE", tmp_path / "run", tmp_path / "run" / "metrics.csv", tmp_path / "empty"):
        done = python(ROOT / "plot.py", dir)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(dir) in done.stderr
    assert python(ROOT / "plot.py").returncode == 2
