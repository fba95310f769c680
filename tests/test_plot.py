"""Status of loss curves, reading of run folders, pictures of whatever has arrived."""
import csv
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
COLUMNS = ["step", "tokens", "elapsed", "lr", "train_loss", "grad_norm", "tokens_per_sec",
           "val_loss", "val_accuracy", "val_perplexity", "val_bpb"]


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

    def ramp(start, end):
        return np.clip((t - start) / (end - start), 0, 1)

    def fall(height, speed):
        return height * np.exp(-speed * s)

    def bump(height, centre, width):
        return height * np.exp(-((t - centre) / width) ** 2)

    good = 3 + fall(4.6, 6) + 0.3 * (1 - s)
    return {
        "good": good,   # still falls a little at its end, as every good run does
        "power law": 1.3 + 7.9 * (1 + 400 * s) ** -0.5,
        "plateau, then decay": 3.3 + 4.3 * np.exp(-20 * t) - ramp(0.8, 1),
        "bump": good + bump(0.4, 0.07, 0.03),
        "too high": 4.3 + fall(3.3, 12) - 0.2 * ramp(0.6, 1),
        "1.4 above": 4.45 + fall(3.15, 30) - 0.2 * t,
        "starved": 7.6 - 1.2 * s ** 0.8,
        "nothing learned": 7.6 + 0 * t,
        "spike": good + bump(2.5, 0.4, 0.05),
        "warm-up spike": good + bump(4, 0.1, 0.04),
        "swings": good + 1.2 * np.sin(40 * t) * (t > 0.2),
        "rise and recovery": good + 0.5 * ramp(0.5, 0.55) * np.exp(-5.5 * ramp(0.55, 1)),
        "rises for good": good + 2 * ramp(0.7, 1),
        "rose late": good + 2 * ramp(0.72, 0.8),
        "lost it": 7.6 - 2.2 * ramp(0, 0.15) + 1.2 * ramp(0.15, 0.25),
        "stuck": 6.2 + fall(1.4, 40),   # learns how frequent tokens are and nothing more
        "back to the start": 7.5 + bump(3, 0.1, 0.05),
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
    losses = curve(kinds.get(status, "good"), n) + 0.02 * math.log(lr / 3e-3) ** 2
    if status == "diverged":
        losses[-1] = math.nan
    (dir / "config.json").write_text(json.dumps({"args": dict(lr=lr, seed=seed)}))
    (dir / "summary.json").write_text(json.dumps({"status": status}))

    shares = [f"share_L0_E{i}" for i in range(experts)]
    with open(dir / "metrics.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [*COLUMNS, *shares])
        table.writeheader()
        for step, loss in enumerate(losses, start=1):
            row = dict(step=step, tokens=100 * step)
            train = dict(lr=lr * (1 - step / 40), train_loss=loss, grad_norm=1.0)
            table.writerow({**row, **train, **dict.fromkeys(shares, 0.25)})
            if step % 10 == 1:
                table.writerow(dict(row, val_loss=loss, val_accuracy=0.1))
    loss = losses[-1]
    if status == "diverged":
        loss = math.inf
    if status == "running":
        loss = None
    return dict(plot.read_run(dir), status=status, setting=setting, loss=loss)


def make_insights(runs, use=None, edge=None):
    """What sweep.analyse finds, with the keys that the pictures need; use: of the first setting."""
    settings = {}
    for run in runs:
        setting = settings.setdefault(run["setting"], dict(label=run["setting"], edge=edge or {}, rates=[]))
        if run["loss"] is None:
            continue
        loss = run["loss"] if run["status"] != "diverged" else None
        row = dict.fromkeys(["val_loss", "val_accuracy", "val_perplexity", "accuracy_per_minute"], loss)
        row.update(lr=run["lr"], seeds=[run["seed"]], status=run["status"], diverged=int(loss is None),
                   max_grad_norm=2.0, deviation=None, val_bpb=None)
        setting["rates"].append(row)
    if use:
        use = dict(use, setting=runs[0]["setting"])
    return dict(use=use, settings=list(settings.values()))


def test_reading_tells_steps_from_evaluations_and_leaves_out_damaged_rows(tmp_path):
    make_run(tmp_path / "r", 0.1, status="diverged")
    path = tmp_path / "r" / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = "3,200,0.2,\0\0,7.1,1.0,1000,,,,\n"
    lines.append("31,3000,3.1,0.1,9.")   # cut off while it was written
    path.write_text("".join(lines))
    run = plot.read_run(tmp_path / "r")
    assert list(run["train"]["step"]) == [1, *range(3, 31)]
    evaluated = np.isfinite(run["metrics"]["val_loss"])
    assert list(run["metrics"]["step"][evaluated]) == [1, 11, 21]
    assert np.isnan(run["train"]["train_loss"][-1])


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "summary.json"])
@pytest.mark.parametrize("content", [
    b"",
    b"[]",
    b"\0\0\0\n\0",
    b"\xff\xfe rubbish",
    b"[" * 100_000,
    b'{"status": []}',
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
    for label in ["", "data=$1_"][:settings]:
        for i, status in enumerate(found):
            dir = tmp_path / f"{label}{i}"
            runs.append(make_run(dir, 1e-3 * 3 ** i, status=status, setting=label))
    use = None
    edge = None
    if "converged" in found:
        use = dict(lr=1e-3, low=None, high=None if len(found) == 1 else 9e-3)
    if "unstable" in found:
        edge = dict(unstable=dict(lr=2.7e-2, seeds=1, of=2))
    paths = plot.draw_sweep(tmp_path, runs, make_insights(runs, use, edge))
    assert {path.name for path in paths} == PICTURES and all(path.exists() for path in paths)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.filterwarnings("error")
def test_a_run_that_died_at_a_gradient_of_zero_and_one_without_losses(tmp_path):
    make_run(tmp_path / "r", 3e-3, status="diverged")
    path = tmp_path / "r" / "metrics.csv"
    path.write_text("step,lr,train_loss,grad_norm\n1,3,7.6,1\n2,3,1e12,1e9\n3,3,7.6,0\n")
    assert len(plot.draw_run(tmp_path / "r")) == 2
    path.write_text("step,lr\n1,3\n")
    assert len(plot.draw_run(tmp_path / "r")) == 2


def test_a_damaged_loss_stops_no_picture(tmp_path):
    runs = [make_run(tmp_path / "minus", 3e-3), make_run(tmp_path / "nan", 1e-2)]
    runs[0]["metrics"]["train_loss"][20] = -7.1
    runs[1]["loss"] = math.nan
    plot.draw_sweep(tmp_path, runs, make_insights(runs))


@pytest.mark.filterwarnings("error")
def test_a_sharpness_without_a_threshold_is_drawn_and_has_no_edge(tmp_path):
    run = make_run(tmp_path / "muon", 3e-3)
    run["metrics"]["sharpness"] = run["metrics"]["train_loss"]
    names = [path.name for path in plot.draw_sweep(tmp_path, [run], make_insights([run]))]
    assert "sharpness.png" in names and "edge_of_stability.png" not in names


def test_settings_that_share_one_rate_are_told_apart(tmp_path):
    runs = []
    for i in range(3):
        runs.append(make_run(tmp_path / str(i), 3e-3, setting=f"warmup-ratio={i}"))
    places, styles = zip(*plot.looks(runs).values())
    assert len(set(places)) == 3
    assert len({style["color"] for style in styles}) == 3
    plot.draw_sweep(tmp_path, runs, make_insights(runs, dict(lr=3e-3, low=None, high=None)))


@pytest.mark.parametrize("low, high", [(None, None), (1e-3, None), (None, 1e-2)])
def test_a_band_is_drawn_only_where_a_limit_of_the_optimum_is_known(tmp_path, low, high):
    runs = [make_run(tmp_path / "r", 3e-3)]
    insights = make_insights(runs, dict(lr=3e-3, low=low, high=high))
    rows = [dict(row, setting="") for row in insights["settings"][0]["rates"]]
    [ax] = plot.draw_losses(runs, plot.looks(runs), rows, insights).axes
    assert ("holds the optimum" in ax.get_legend_handles_labels()[1]) == bool(low or high)


def test_a_rate_has_one_colour_in_the_order_of_the_rates():
    rates = np.geomspace(1e-4, 0.1, 26)
    look = plot.looks([dict(setting=setting, lr=lr, status="slow") for setting in "ab" for lr in rates])
    colours = [look["a", lr][1]["color"] for lr in rates]
    assert colours == [look["b", lr][1]["color"] for lr in rates]
    grey = np.array(colours) @ [0.3, 0.59, 0.11, 0]
    assert (np.diff(grey) > 0).all()   # survives a grey print


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


@pytest.mark.parametrize("n", [1, 99, 100, 101, 199, 200, 5000])
def test_curves_are_averaged_to_at_most_fifty_points_and_keep_their_end(n):
    steps = np.arange(1.0, n + 1)
    metrics = dict(step=steps, loss=steps)
    points = plot.points(dict(metrics=metrics), "loss")
    block = math.ceil(n / 50)
    assert points.shape[1] <= 50 and points.shape[1] >= min(n, 25)
    assert points[0, -1] == n - (block - 1) / 2 and (points[0] == points[1]).all()
