"""Status of loss curves, reading of run folders, pictures of whatever has arrived."""
import csv
import json
import math
import os
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
    ("nan", "diverged"),
    ("5.2 4.0 6.0 6.1 6.2", "diverged"),
    ("10.9 9.6 9.9 9.0 8.1 7.4 8.3 8.0 7.4 7.7", "converged"),   # ten batches of nanoGPT, one step each
    ("10.9 10.4 9.5 9.1 8.9 8.6 8.3 7.9 7.6 7.2", "slow"),
    ("10.9 6.7 4.5 2.8 1.6 0.9 0.5 0.3 0.2 0.1", "converged"),
    ("10.9 9.9 9.0 7.8 6.6 6.1 5.9 5.7 5.3 5.1 4.8 270 183 122 97 69 78 40 31", "diverged"),
    ("2.9 4.1 6.5 7.1 4.7", "diverged"),
    ("7.56 10.53 16.63 11.70 16.04 15.65 17.07 17.01 21.65 25.92 21.20 21.53", "diverged"),
    ("7.6", "slow"),
    ("", "slow")])
def test_the_named_patterns(losses, status):
    assert plot.classify([float(loss) for loss in losses.split()]) == status


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
        "too high": 4.3 + fall(3.3, 12) - 0.2 * ramp(0.6, 1),     # a worse run, but its own curve flattens
        "1.4 above": 4.45 + fall(3.15, 30) - 0.2 * t,
        "from far above": 3 + 450 * np.exp(-40 * t) + fall(4.6, 6),
        "starved": 7.6 - 1.2 * s ** 0.8,
        "nearly straight": 7.6 - 4 * t ** 0.9,
        "nothing learned": 7.6 + 0 * t,
        "far above, and no further": 9.3 + 443 * np.exp(-8 * t),
        "stuck": 6.7 + fall(0.9, 40),   # learns how frequent tokens are and nothing more
        "spike": good + bump(2.5, 0.4, 0.05),
        "warm-up spike": good + bump(4, 0.1, 0.04),
        "swings": good + 1.2 * np.sin(40 * t) * (t > 0.2),
        "early blow-up that recovers": good + 4 * ramp(0.05, 0.1) * (1 - ramp(0.25, 0.6)),
        "rise and recovery": good + 0.5 * ramp(0.5, 0.55) * np.exp(-5.5 * ramp(0.55, 1)),
        "rises for good": good + 2 * ramp(0.7, 1),
        "rose late": good + 2 * ramp(0.72, 0.8),
        "lost it": 7.6 - 2.2 * ramp(0, 0.15) + 1.4 * ramp(0.15, 0.25),
        "back to the start": 7.5 + bump(3, 0.1, 0.05),
        "blows up": 7.6 + 3 * ramp(0, 0.1)}[kind]


FAMILIES = {
    "converged": ["good", "power law", "plateau, then decay", "bump", "too high", "1.4 above",
                  "from far above"],
    "slow": ["starved", "nearly straight", "nothing learned", "far above, and no further", "stuck"],
    "unstable": ["spike", "warm-up spike", "swings", "early blow-up that recovers"],
    "diverged": ["rises for good", "rose late", "lost it", "back to the start", "blows up"]}


@pytest.mark.parametrize("wanted", plot.STATUSES)
def test_families_of_curves_whatever_their_length_and_noise(wanted):
    rng = np.random.default_rng(0)
    right = {}
    for kind in FAMILIES[wanted]:
        for n in (50, 100, 300, 1000):
            for noise in (0.01, 0.05, 0.1, 0.2):
                found = [plot.classify(curve(kind, n) + rng.normal(0, noise, n)) for _ in range(5)]
                right[kind, n, noise] = found.count(wanted)
    assert sum(right.values()) >= 0.985 * 5 * len(right), right
    assert min(right.values()) >= 3, right


def test_a_rise_over_hundreds_of_steps_is_told_from_small_noise():
    rng = np.random.default_rng(0)
    for n in (100, 400, 1000):
        for _ in range(10):
            assert plot.classify(curve("rise and recovery", n) + rng.normal(0, 0.02, n)) == "unstable"


@pytest.mark.parametrize("n", [100, 300, 2000, 10_000])
def test_noise_of_minibatches_is_no_jump(n):
    rng = np.random.default_rng(0)
    found = []
    for deviation in (0.3, 0.5, 0.8):
        for noise in (rng.normal(0, deviation, n), 0.6 * deviation * rng.standard_t(3, n)):
            found.append(plot.classify(curve("good", n) + noise))
    assert found.count("converged") >= 5, found
    one_wild_batch = curve("good", n)
    one_wild_batch[n // 2] += 5
    assert plot.classify(one_wild_batch) == "converged"


@pytest.mark.parametrize("kind", FAMILIES["converged"] + FAMILIES["slow"] + FAMILIES["unstable"])
def test_no_run_that_recovers_is_stopped_early(kind):
    rng = np.random.default_rng(0)
    for n in (20, 100, 400):
        losses = curve(kind, n) + rng.normal(0, 0.1, n)
        assert not any(plot.is_lost(losses[:i], n) for i in range(n + 1))


def test_runs_that_looked_lost_and_recovered_go_on():
    start = [9.25, 3.01, 4.47, 5.2, 5.1, 4.99]     # and ended at 1.98
    assert not any(plot.is_lost(start[:i], 20) for i in range(7))
    up = [9.0, 255.0, 180.0, 90.0, 40.0, 15.0]      # and ended at 2.83
    assert not any(plot.is_lost(up[:i], 20) for i in range(7))
    assert not plot.is_lost([7.6, math.nan, math.nan], 100)


def test_a_blow_up_is_stopped_at_half_of_the_run_and_what_is_cut_off_is_diverged():
    blown = curve("blows up", 100)
    stopped = [i for i in range(101) if plot.is_lost(blown[:i], 100)]
    assert 50 < stopped[0] < 65
    assert plot.is_lost([7.6, 7.0, math.nan, math.inf, math.nan], 100)
    rng = np.random.default_rng(0)
    lost = 0
    for _ in range(400):
        n = int(rng.choice([3, 4, 7, 10, 30, 100, 300]))
        walk = rng.uniform(2, 16) + np.cumsum(rng.normal(0, rng.choice([0.1, 0.5, 2]), n))
        losses = np.concatenate([[rng.uniform(3, 11)], walk])
        ends = [i for i in range(n + 1) if plot.is_lost(losses[:i], n)]
        if ends:
            lost += 1
            assert plot.classify(losses[:ends[0]]) == "diverged", losses
    assert lost > 80


# ------------------------------------------------------------------------------------------------------------
# Folders of runs

def make_run(dir, lr, seed=0, status="converged", setting="", n=30):
    """A run's folder as train.py writes it; returns the run as sweep.analyse leaves it."""
    dir.mkdir(parents=True)
    kinds = {"unstable": "spike", "slow": "starved", "diverged": "blows up"}
    losses = curve(kinds.get(status, "good"), n) + 0.02 * math.log(lr / 3e-3) ** 2
    if status == "diverged":
        losses[-1] = math.nan
    args = dict(lr=lr, seed=seed, optimizer="adamw", preset="tiny")
    (dir / "config.json").write_text(json.dumps({"args": args}))
    (dir / "summary.json").write_text(json.dumps({"status": status}))

    with open(dir / "metrics.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for step, loss in enumerate(losses, start=1):
            row = dict(step=step, tokens=100 * step)
            train = dict(lr=lr * (1 - step / 40), train_loss=loss, grad_norm=1.0)
            table.writerow(row | train)
            if step % 10 == 1:
                table.writerow(dict(row, val_loss=loss, val_accuracy=0.1))
    loss = losses[-1]
    if status == "diverged":
        loss = math.inf
    if status == "running":
        loss = None
    return dict(plot.read_run(dir), setting=setting, loss=loss)


def make_insights(runs, use=None, edge=None):
    """What sweep.analyse finds, with the keys that the pictures need; use: of the first setting."""
    settings = {}
    for run in runs:
        label = run["setting"]
        setting = settings.setdefault(label, dict(label=label, loss=None, rates=[]))
        if run["loss"] is None:
            continue
        loss = run["loss"] if run["status"] != "diverged" else None
        row = dict.fromkeys(["val_loss", "val_accuracy", "val_perplexity", "val_bpb", "worse_by"], loss)
        row.update(lr=run["lr"], seeds=[run["seed"]], status=run["status"], diverged=int(loss is None),
                   unstable=0, max_grad_norm=2.0, half_width=None, steps_to_loss=loss and 20, verdict="not tested",
                   runs=[[run["seed"], loss, run["status"]]])
        setting["rates"].append(row)
        setting["loss"] = min([row["val_loss"] for row in setting["rates"] if row["val_loss"]], default=None)
    settings = {label: s for label, s in settings.items() if s["rates"]}     # those of which a run is over
    if use:
        use = dict(dict(low=None, high=None, seeds=3, loss=3.0, edge=edge or {}), **use, setting=runs[0]["setting"])
    insights = dict(use=use, target_loss=4.0, settings=list(settings.values()))
    return json.loads(json.dumps(insights))     # plain numbers, as sweep.analyse gives


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, by name of their picture, in place of the files: {name: figure}."""
    figures = {}

    def keep(pictures, dir):
        figures.update(pictures)
        return [Path(dir) / name for name in pictures]
    monkeypatch.setattr(plot, "save", keep)
    return figures


def texts(fig):
    """All that is written in a figure."""
    import matplotlib.text
    return [text.get_text() for text in fig.findobj(matplotlib.text.Text)]


def test_reading_tells_steps_from_evaluations_and_names_what_it_leaves_out(tmp_path, capsys):
    make_run(tmp_path / "r", 0.1, status="diverged")
    path = tmp_path / "r" / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    lines[4] = "3,300,0.1,0.09,7.25\n"          # shorter: padded
    lines.append("31,3000,3.1,0.1,9.")          # cut off while it was written
    path.write_text("".join(lines))
    run = plot.read_run(tmp_path / "r")
    assert list(run["train"]["step"]) == [*range(1, 31)]
    assert run["train"]["train_loss"][2] == 7.25 and np.isnan(run["train"]["grad_norm"][2])
    evaluated = np.isfinite(run["metrics"]["val_loss"])
    assert list(run["metrics"]["step"][evaluated]) == [1, 11, 21]
    assert np.isnan(run["train"]["train_loss"][-1])
    assert capsys.readouterr().err == ""
    for damaged in ("4,200,0.2,\0\0,7.1,1.0,1000,,,,\n", lines[5].rstrip() + ",7,8\n"):    # or too long
        path.write_text("".join([*lines[:5], damaged, *lines[6:]]))
        assert list(plot.read_run(tmp_path / "r")["train"]["step"]) == [1, 2, 3]    # what comes before
        assert capsys.readouterr().err.count(f"left out: {path}") == 1


def test_the_header_decides_and_new_columns_are_known(tmp_path):
    make_run(tmp_path / "r", 0.1)
    (tmp_path / "r/metrics.csv").write_text("update_ratio,lr,step,train_loss\n0.5,0.1,1,7\n,0.1,2,6\n")
    metrics = plot.read_run(tmp_path / "r")["metrics"]
    assert metrics["update_ratio"][0] == 0.5 and np.isnan(metrics["update_ratio"][1])
    assert list(metrics["train_loss"]) == [7, 6] and np.isnan(metrics["val_loss"]).all()


def test_the_status_of_a_run_that_is_over_is_its_curves_and_else_what_summary_says(tmp_path):
    make_run(tmp_path / "spike", 0.1, status="unstable")
    (tmp_path / "spike/summary.json").write_text('{"status": "converged"}')
    make_run(tmp_path / "stopped", 0.1, status="interrupted")
    make_run(tmp_path / "begun", 0.1)
    (tmp_path / "begun/summary.json").unlink()
    assert {run["name"]: run["status"] for run in plot.read_runs(tmp_path)} == dict(
        spike="unstable", stopped="interrupted", begun="running")


@pytest.mark.parametrize("content", [b"", b"[1]", b"\0\0\0\n\0", b"\xff\xfe rubbish", b'{"status": []}',
                                     b'{"args": {"lr": "x", "seed": 0}}'])
def test_one_damaged_file_stops_nothing_and_is_named(tmp_path, content, capsys):
    make_run(tmp_path / "good", 3e-3)
    make_run(tmp_path / "bad", 1e-2)
    (tmp_path / "bad/metrics.csv").write_bytes(content)
    assert [run["name"] for run in plot.read_runs(tmp_path)] == ["good"]
    assert plot.draw_run(tmp_path / "bad") == []
    shutil.copy(tmp_path / "good/metrics.csv", tmp_path / "bad")
    (tmp_path / "bad/summary.json").write_bytes(content.strip(b"[]1"))
    assert [run["name"] for run in plot.read_runs(tmp_path)] == ["good", "bad"]
    capsys.readouterr()
    (tmp_path / "bad/config.json").write_bytes(content)
    assert [run["name"] for run in plot.read_runs(tmp_path)] == ["good"]
    assert str(tmp_path / "bad") in capsys.readouterr().err
    assert plot.read_run(tmp_path / "nowhere") is None and plot.read_json(tmp_path) is None


def test_runs_are_read_from_their_curves_where_there_are_no_folders(tmp_path):
    (tmp_path / "curves.csv").write_text(
        "setting,lr,seed,step,train_loss,val_loss\n"
        '"a=1,b=2",0.003,1,1,7.6,\n"a=1,b=2",0.003,1,2,4.1,\n'
        '"a=1,b=2",0.003,1,3,3.5,\n"a=1,b=2",0.003,1,3,,3.4\n'
        ",0.1,0,1,7.6,\n,0.1,0,2,nan,\n,0.1,0,3,na")
    first, second = plot.read_runs(tmp_path)
    assert (first["setting"], first["lr"], first["seed"]) == ("a=1,b=2", 0.003, 1)
    assert list(first["train"]["train_loss"]) == [7.6, 4.1, 3.5] and first["summary"]["final_val_loss"] == 3.4
    assert first["status"] == "converged" and second["status"] == "diverged" and not first["config"]
    assert second["summary"]["final_val_loss"] is None
    make_run(tmp_path / "run", 3e-3)
    assert [run["name"] for run in plot.read_runs(tmp_path)] == ["run"]


# ------------------------------------------------------------------------------------------------------------
# Pictures

def test_pictures_of_a_run(tmp_path):
    make_run(tmp_path / "b", 3e-3, status="diverged")
    names = ["loss_curves.png", "lr_schedule.png"]
    assert [path.name for path in plot.draw_run(tmp_path / "b")] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "b").glob("*.png"))


def test_a_learners_metric_gets_into_the_picture_by_one_edit(tmp_path, drawn, monkeypatch):
    make_run(tmp_path / "r", 3e-3)
    path = tmp_path / "r/metrics.csv"
    rows = [f"{i},{3 + 1 / (1 + i)},0.003,{i}\n" for i in range(300)]
    path.write_text("step,train_loss,lr,update_ratio\n" + "".join(rows))
    monkeypatch.setitem(plot.RUN, "loss_curves.png", (*plot.RUN["loss_curves.png"], "update_ratio"))
    plot.draw_run(tmp_path / "r")
    loss, mine = drawn["loss_curves.png"].axes     # columns that the run has not are left out
    assert "update ratio" in texts(drawn["loss_curves.png"])
    steps, values = mine.lines[0].get_data()
    assert len(steps) == 50 and (steps == values).all()


def test_a_range_test_is_drawn_with_its_three_readings(tmp_path, drawn):
    make_run(tmp_path / "r", 1.0)
    (tmp_path / "r/config.json").write_text('{"args": {"lr": 1.0, "seed": 0, "schedule": "exponential"}}')
    lrs = np.geomspace(1e-4, 1, 400)
    x = np.log10(lrs)
    losses = 7 - 2 / (1 + np.exp(-6 * (x + 2.5))) + 40 * np.maximum(0, x + 1) ** 2     # steepest at 10^-2.5
    readings = plot.range_test_readings(lrs, losses + np.random.default_rng(0).normal(0, 1e-3, 400))
    assert list(readings) == ["steepest", "minimum / 10", "before it rises"]
    for value, expected in zip(readings.values(), (10 ** -2.5, 0.1 / 10, 0.11)):
        assert 0.6 < value / expected < 1.6, readings
    rows = [f"{i},{lr},{loss}\n" for i, (lr, loss) in enumerate(zip(lrs, losses))]
    (tmp_path / "r/metrics.csv").write_text("step,lr,train_loss\n" + "".join(rows) + "400,1.1,nan\n")
    plot.draw_run(tmp_path / "r")
    [ax] = drawn["lr_range_test.png"].axes
    assert ax.get_xscale() == "log"
    curve, *marks = ax.lines
    assert [mark.get_label().split(":")[0] for mark in marks] == list(readings)
    assert len({mark.get_marker() for mark in marks}) == 3 and max(curve.get_ydata()) < 8    # not up to 47
    assert not plot.range_test_readings(lrs, 7 + lrs)["steepest"] > 1e-3    # it only rises


@pytest.mark.parametrize("found", [
    ["diverged", "diverged"], ["slow", "converged", "converged", "unstable", "diverged", "running"]])
def test_pictures_of_a_sweep_from_whatever_has_arrived(tmp_path, found):
    runs = []
    for label in ["", "data=$1_\N{GRINNING FACE}\u8a9e"][:1 + (len(found) > 1)]:
        for i, status in enumerate(found):
            dir = tmp_path / f"{label}{i}"
            runs.append(make_run(dir, 1e-3 * 3 ** i, status=status, setting=label))
    use = dict(lr=1e-3, high=9e-3) if "converged" in found else None
    edge = dict(unstable=2.7e-2) if "unstable" in found else None
    paths = plot.draw_sweep(tmp_path, runs, make_insights(runs, use, edge))
    assert {path.name for path in paths} == PICTURES and all(path.exists() for path in paths)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.filterwarnings("error")
def test_huge_losses_a_gradient_of_zero_and_no_losses_at_all(tmp_path):
    make_run(tmp_path / "r", 3e-3, status="diverged")
    path = tmp_path / "r" / "metrics.csv"
    path.write_text("step,lr,train_loss,grad_norm\n1,3,7.6,1\n2,3,3e38,1e38\n3,3,-7.6,0\n4,3,inf,nan\n")
    assert len(plot.draw_run(tmp_path / "r")) == 2
    path.write_text("step,lr\n1,3\n")
    assert [path.name for path in plot.draw_run(tmp_path / "r")] == ["lr_schedule.png"]


def sweep_of_three(tmp_path, settings=("",)):
    runs = []
    for i, setting in enumerate(settings):
        for lr, status in ((1e-3, "slow"), (3e-3, "converged"), (1e-2, "converged"), (3e-2, "diverged")):
            runs.append(make_run(tmp_path / f"{i} {lr}", lr, status=status, setting=setting))
    return runs


def test_the_shared_picture_says_the_answer_and_its_band_and_edges(tmp_path, drawn):
    runs = sweep_of_three(tmp_path)
    edge = dict(diverged=3e-2)
    plot.draw_sweep(tmp_path, runs, make_insights(runs, dict(lr=3e-3, low=1e-3, high=1e-2), edge))
    fig = drawn["lr_vs_final_loss.png"]
    written = texts(fig)
    assert "Use 0.003: AdamW, tiny, 3 seeds" in written
    assert "best: 0.003" in written and "first diverged: 0.03" in written
    assert "the optimum lies in the shaded band (95%)" in written
    [ax] = fig.axes
    assert ax.get_xscale() == "log" and ax.get_yscale() == "linear"
    best = min(run["loss"] for run in runs)
    low, high = ax.get_ylim()
    assert best - 0.2 < low < best and best + 0.9 < high < best + 1.2
    left, right = ax.get_xlim()
    marks = {line.get_marker(): line.get_xydata()[0] for line in ax.lines if line.get_marker() in ("x", "^")}
    assert {marker: rate for marker, (rate, _) in marks.items()} == {"x": 3e-2, "^": 1e-3}    # the slow one: above
    assert all(best + 1 < level < high and left < rate < right for rate, level in marks.values())
    for figure in drawn.values():
        assert any("Use 0.003" in text for text in texts(figure))      # every picture has a title


def test_one_seed_cannot_tell_and_says_so_without_a_band(tmp_path, drawn):
    runs = sweep_of_three(tmp_path)
    plot.draw_sweep(tmp_path, runs, make_insights(runs, dict(lr=3e-3, seeds=1)))
    written = texts(drawn["lr_vs_final_loss.png"])
    assert any("one seed cannot tell" in text for text in written)
    assert not any("optimum" in text for text in written)


@pytest.mark.parametrize("low, high", [(1e-3, None), (None, 1e-2)])
def test_an_open_side_of_the_band_reaches_the_edge_of_the_picture(tmp_path, drawn, low, high):
    runs = sweep_of_three(tmp_path)
    plot.draw_sweep(tmp_path, runs, make_insights(runs, dict(lr=3e-3, low=low, high=high)))
    [ax] = drawn["lr_vs_final_loss.png"].axes
    box = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    left, right = ax.get_xlim()
    assert right / left < 100       # the rates, and a margin
    assert box.x0 == pytest.approx(low) if low else box.x0 < left
    assert box.x1 == pytest.approx(high) if high else box.x1 > right


def test_settings_are_told_by_colour_and_marker(tmp_path, drawn):
    runs = sweep_of_three(tmp_path, ["a=1", "a=2", "a=3"])
    plot.draw_sweep(tmp_path, runs, make_insights(runs, dict(lr=3e-3, low=1e-3, high=1e-2)))
    [ax] = drawn["lr_vs_final_loss.png"].axes
    lines = {line.get_label(): line for line in ax.lines if line.get_label() in ("a=1", "a=2", "a=3")}
    for read in ("get_color", "get_marker"):
        assert len({getattr(line, read)() for line in lines.values()}) == 3
    curves = drawn["lr_sweep_comparison.png"].axes      # against the step: a panel a setting and column
    assert len(curves) == 6 and all(len(ax.lines) == 4 for ax in curves)


def test_a_rate_has_one_colour_in_every_panel_that_survives_a_grey_print(tmp_path, drawn):
    runs = [make_run(tmp_path / f"{lr:g}", lr, setting="b") for lr in np.geomspace(1e-4, 0.1, 26)]
    plot.draw_sweep(tmp_path, runs, make_insights(runs))
    seen = {}
    for name in ("lr_sweep_comparison.png", "lr_schedules.png"):
        for ax in drawn[name].axes:
            for line in ax.lines:
                seen.setdefault(float(line.get_label().split()[1]), set()).add(tuple(line.get_color()))
    assert len(seen) == 26 and all(len(colours) == 1 for colours in seen.values())
    grey = [np.dot(*colours, [0.3, 0.59, 0.11, 0]) for _, colours in sorted(seen.items())]
    assert (np.diff(grey) > 0).all() and grey[-1] < 0.85


def test_diverged_runs_are_dashed_and_do_not_widen_the_axis(tmp_path, drawn):
    runs = [make_run(tmp_path / "a", 3e-3), make_run(tmp_path / "b", 1e-2, status="diverged")]
    runs[1]["metrics"]["train_loss"][5:] = 1e6
    plot.draw_sweep(tmp_path, runs, make_insights(runs))
    ax = drawn["lr_sweep_comparison.png"].axes[0]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"] and ax.get_ylim()[1] < 9
    for ax in drawn["detailed_comparison.png"].axes:    # against the rate: the rates tried
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.003", "0.01"]
        assert ax.get_xlim()[1] >= 0.01     # though nothing is drawn at it


def test_no_seed_falls_out_of_the_picture_and_two_settings_marks_do_not_overlap(tmp_path, drawn):
    runs = sweep_of_three(tmp_path, ["a=1", "a=2"])
    insights = make_insights(runs, dict(lr=3e-3))
    insights["settings"][0]["rates"][1]["runs"].append([1, 2.0, "converged"])
    plot.draw_sweep(tmp_path, runs, insights)
    [ax] = drawn["lr_vs_final_loss.png"].axes
    assert ax.get_ylim()[0] < 2
    heights = [line.get_ydata()[0] for line in ax.lines if line.get_marker() in ("x", "^")]
    assert len(heights) == 4 and len(set(heights)) == 2     # the one above and the one that diverged, twice


def test_sharpness_is_its_ratio_to_the_threshold_where_one_is_known(tmp_path, drawn):
    run = make_run(tmp_path / "r", 3e-3)
    path = tmp_path / "r/metrics.csv"
    rows = [f"{i},0.003,7,{900 + i},{2 * i},100\n" for i in range(1, 101)]
    names = "sharpness,preconditioned_sharpness,stability_threshold"
    path.write_text(f"step,lr,train_loss,{names}\n" + "".join(rows))
    run = dict(plot.read_run(tmp_path / "r"), setting="", loss=3.0)
    plot.draw_sweep(tmp_path, [run], make_insights([run]))
    ax, _ = drawn["sharpness.png"].axes     # the ratio, and the sharpness itself
    threshold, ratio = ax.lines
    assert ax.get_yscale() == "log" and ratio.get_ydata()[-1] == pytest.approx(1.99)
    assert set(threshold.get_ydata()) == {1}
    path.write_text(f"step,lr,train_loss,{names}\n1,0.003,7,9,50,100\n")      # measured once
    run = dict(plot.read_run(tmp_path / "r"), setting="", loss=3.0)
    plot.draw_sweep(tmp_path, [run], make_insights([run]))
    assert list(drawn["sharpness.png"].axes[0].lines[1].get_ydata()) == [0.5]
    drawn.clear()
    path.write_text("step,lr,train_loss,sharpness\n1,0.003,7,5\n2,0.003,6,8\n")     # Muon has none
    run = dict(plot.read_run(tmp_path / "r"), setting="", loss=3.0)
    plot.draw_sweep(tmp_path, [run], make_insights([run]))
    [ax] = drawn["sharpness.png"].axes
    assert list(ax.lines[0].get_ydata()) == [5, 8]


def test_the_table_has_the_analysis_columns_and_no_empty_words(tmp_path, drawn):
    runs = sweep_of_three(tmp_path)
    insights = make_insights(runs, dict(lr=3e-3))
    insights["settings"][0]["rates"][0].update(half_width=0.0123, worse_by=0.5)
    plot.draw_sweep(tmp_path, runs, insights)
    [table] = drawn["summary_table.png"].axes[0].tables
    cells = {place: cell.get_text().get_text() for place, cell in table.get_celld().items()}
    head, first = ([cells[row, column] for column in range(9)] for row in (0, 1))
    assert head == ["", "learning rate", "seeds", "curves", "verdict", "loss", "bits a byte", "worse by", "\u00b1"]
    assert first == ["", "0.001", "1", "slow", "not tested", "6.4241", "6.4241", "0.5000", "0.0123"]
    table = "\n".join(cells.values())
    for word in ("nan", "None", "True", "["):
        assert word not in table


def test_no_panel_title_or_legend_overlaps_another_or_is_cut(tmp_path, drawn, monkeypatch):
    runs = sweep_of_three(tmp_path, ["a=a_rather_long_value,b=0.1234", "a=a_rather_long_value,b=0.5678"])
    edge = dict(unstable=1e-2, diverged=3e-2)
    plot.draw_sweep(tmp_path, runs, make_insights(runs, dict(lr=3e-3, low=1e-3, high=1e-2), edge))
    monkeypatch.undo()
    names = ("lr_vs_final_loss.png", "detailed_comparison.png")
    plot.save({name: drawn[name] for name in names}, tmp_path)
    for name in names:
        fig = drawn[name]
        title, [legend] = fig.texts[0], fig.legends
        boxes = [title.get_window_extent(), legend.get_window_extent(), *(ax.get_tightbbox() for ax in fig.axes)]
        for i, box in enumerate(boxes):
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= fig.bbox.x1 + 1 and box.y1 <= fig.bbox.y1 + 1, name
            assert not any(box.overlaps(other) for other in boxes[:i]), name


@pytest.mark.parametrize("n", [1, 50, 51, 199, 5000])
def test_curves_are_thinned_to_at_most_fifty_points_and_keep_their_end(n):
    steps = np.arange(1.0, n + 1)
    points = plot.points(dict(metrics=dict(step=steps, loss=steps)), "loss")
    block = n // 51 + 1
    assert points.shape[1] <= 50 and points.shape[1] >= min(n, 25)
    assert points[0, -1] == n - (block - 1) / 2 and (points[0] == points[1]).all()


# ------------------------------------------------------------------------------------------------------------
# The program

def test_the_program_draws_a_run_whatever_jupyter_sets_and_starts_the_report_of_a_sweep(tmp_path):
    make_run(tmp_path / "sweep" / "run", 3e-3)
    for name in ("plot.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "sweep.py").write_text("def main(argv):\n    print(argv)\n    return 3")

    def python(folder):
        env = dict(os.environ, MPLBACKEND="module://matplotlib_inline.backend_inline")
        command = [sys.executable, str(tmp_path / "plot.py"), str(folder)]
        return subprocess.run(command, capture_output=True, text=True, env=env)
    assert "loss_curves.png" in python(tmp_path / "sweep" / "run").stdout
    done = python(tmp_path / "sweep")
    assert done.returncode == 3 and str(["--report", str(tmp_path / "sweep")]) in done.stdout


def test_a_picture_that_cannot_be_written_is_named_and_drawn_the_next_time(tmp_path, capsys):
    make_run(tmp_path / "run", 3e-3)
    (tmp_path / "run" / "lr_schedule.png").mkdir()      # cannot be written over
    assert [path.name for path in plot.draw_run(tmp_path / "run")] == ["loss_curves.png"]
    assert f"left out: {tmp_path / 'run' / 'lr_schedule.png'}" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.tmp*"))
    (tmp_path / "run" / "lr_schedule.png").rmdir()
    assert len(plot.draw_run(tmp_path / "run")) == 2
