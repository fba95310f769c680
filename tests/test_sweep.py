"""The sweep: what it tries, what it concludes, and that it survives being interrupted. Most tests run
fake_train.py in place of train.py: the same flags and files, losses from a known law, milliseconds a run."""
import csv
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import plot
import sweep
from simulate import CELLS, GRID, HARD, cell, claims, law, search

ROOT = Path(__file__).resolve().parent.parent
FAKE = ROOT / "tests/fake_train.py"


def environment(program=FAKE, **env):
    return {**os.environ, "NANOLR_TRAIN": str(program), "CUDA_VISIBLE_DEVICES": "", **env}


def run(cwd, *flags, program=FAKE, **env):
    return subprocess.run([sys.executable, str(ROOT / "sweep.py"), *flags], cwd=cwd, timeout=120,
                          env=environment(program, **env), capture_output=True, text=True)


def rows(dir):
    with open(dir / "summary_table.csv") as file:
        return list(csv.DictReader(file))


def analysis(dir):
    return (dir / "lr_sweep_analysis.md").read_text()


# --------------------------------------------------------------------------------------------------
# What to try

def tried(lrs=(1e-3, 3e-3, 1e-2), **plan):
    """A whole search in a valley without noise: {rate: its seeds}, the table of losses, the optimum."""
    loss, optimum, _ = law(0, 0.0, "exponential")
    table = search(loss, lrs=list(lrs), **plan)[0][()]
    return {lr: sorted(row) for lr, row in table.items()}, table, optimum


@pytest.mark.parametrize("lrs", [
    [1e-3, 3e-3, 1e-2], [1e-6, 3e-6], [0.3, 1.0, 3.0], [1e-3], [1e-5, 1e-3, 1e-1]])
def test_a_search_brackets_the_optimum_and_finds_the_edge_wherever_it_starts(lrs):
    seeds, table, optimum = tried(lrs, seeds=1)
    best = sweep.best_rate(table)
    below, above = sweep.neighbours(table, best)
    assert below < optimum < above
    assert above / best < 2.1
    assert best / below < 2.1
    assert any(math.inf in row.values() for lr, row in table.items() if lr > best)


def test_seeds_go_to_rates_that_matter():
    seeds, table, _ = tried(seeds=3)
    best = sweep.best_rate(table)
    assert all(seeds[lr] == [0, 1, 2] for lr in [best, *sweep.neighbours(table, best)])
    assert seeds[max(seeds)] == [0] and seeds[min(seeds)] == [0]


def test_refine_halves_the_distance_and_no_widen_keeps_to_the_rates_given():
    _, table, _ = tried(seeds=1, refine=1)
    best = sweep.best_rate(table)
    assert all(max(lr / best, best / lr) < 1.5 for lr in sweep.neighbours(table, best))
    assert sorted(tried(widen=False)[0]) == [1e-3, 3e-3, 1e-2]


def test_at_max_runs_it_says_so_and_when_all_diverge_it_goes_down():
    results, why = search(law(0, 0.0, "parabola")[0], lrs=[1e-7, 3e-7], max_runs=4)[1:]
    assert len(results) == 4 and "--max-runs" in why
    results, why = search(lambda *key: math.inf, max_runs=9)[1:]
    assert len(results) == 9 and min(lr for _, lr, _ in results) < min(GRID)


def test_a_failed_run_is_not_asked_for_again():
    loss = law(0, 0.0, "parabola")[0]
    results = search(lambda setting, lr, seed: None if lr == 3e-3 else loss(setting, lr, seed), seeds=1)[1]
    assert results[(), 3e-3, 0] is None and len(results) > 5


def test_vary_combines_values():
    assert sweep.parse_vary([]) == [()]
    assert sweep.parse_vary(["optimizer=adamw,muon", "beta1=0.9"]) == [
        ("optimizer=adamw", "beta1=0.9"), ("optimizer=muon", "beta1=0.9")]
    assert sweep.parse_vary(["warmup_ratio,min-lr-ratio=0.1:0,0:0.1"]) == [
        ("warmup-ratio=0.1", "min-lr-ratio=0"), ("warmup-ratio=0", "min-lr-ratio=0.1")]


def test_studies_try_what_they_say():
    for study, rates in (("explore", 5), ("extend", 11), ("fine", 9), ("wide", 26), ("schedules", 1)):
        plan = sweep.make_plan(["--study", study, "--preset", "moe", "--max-steps", "7"])
        assert len(set(plan.lrs)) == rates
        assert not plan.widen
        assert plan.flags[-2:] == ["--max-steps", "7"]
    assert plan.lrs == [0.065] and plan.seeds == 3
    assert len(plan.settings) == 5
    plan = sweep.make_plan(["--study", "schedules", "--lrs", "2e-3", "--seeds", "2"])
    assert plan.lrs == [2e-3] and plan.seeds == 2   # the command line overrides


# --------------------------------------------------------------------------------------------------
# Statistics

def test_student_t():
    for p, df, t in ((0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 10, 2.2281), (0.99, 5, 3.3649)):
        assert sweep.t_quantile(p, df) == pytest.approx(t, rel=1e-3)


def test_the_luck_of_a_seed_is_no_noise():
    luck = np.array([0.0, 0.5, -0.2])
    table = {1e-3: dict(enumerate(3.0 + luck)), 3e-3: dict(enumerate(2.9 + luck))}
    assert sweep.noise_near(table, 3e-3) == pytest.approx([0, 2])
    noise = np.random.default_rng(0).normal(0, 0.01, (400, 5)) + np.arange(5)
    squares, df = sweep.noise_near({i: dict(enumerate(row)) for i, row in enumerate(noise)}, 0)
    assert math.sqrt(squares / df) == pytest.approx(0.01, rel=0.05)


def test_two_settings_are_compared_by_the_paired_t_interval():
    a = {0: 3.00, 1: 3.10, 2: 2.95}
    b = {0: 3.01, 1: 3.13, 2: 2.97}
    tables = {"a": {1e-3: a}, "b": {1e-3: b}}
    winner, [c] = sweep.compare_settings(tables, 0.01)
    half = 4.3027 * np.std([0.01, 0.03, 0.02], ddof=1) / 3 ** 0.5
    assert winner == "a" and c["verdict"] == "not shown"
    assert (c["low"], c["high"]) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-5)
    assert sweep.compare_settings(tables, 0.1)[1][0]["verdict"] == "same"
    lone = {"a": {1e-3: {0: 3.0}}, "b": {1e-3: {0: 4.0}}}
    [c] = sweep.compare_settings(lone, 0.01)[1]
    assert c["verdict"] == "not shown" and c["low"] == -math.inf


def test_what_a_finer_grid_could_gain_is_where_the_chords_meet():
    losses = {1.0: 4.0, math.e: 1.0, math.e ** 2: 0.0, math.e ** 3: 1.0, math.e ** 4: 4.0}
    table = {lr: {0: loss} for lr, loss in losses.items()}
    rates = sorted(table)
    gains = sweep.finer_gains(table, rates[2])
    assert list(gains.values()) == pytest.approx([0.5, 0.5], abs=0.01)     # slopes 3 and -1 meet at 1/2
    kink = {lr: {0: 0.1 * abs(math.log(lr) - 2.3)} for lr in rates}
    assert max(sweep.finer_gains(kink, rates[2]).values()) == pytest.approx(0.03, abs=0.001)
    table[rates[3]] = {0: math.inf}
    assert sweep.finer_gains(table, rates[2])[rates[3]] == pytest.approx(1)
    assert sweep.finer_gains({1.0: {0: 1.0}, 2.0: {0: 2.0}}, 1.0) == {2.0: math.inf}
    assert sweep.finer_gains({1.0: {0: 1.0}}, 1.0) == {}


def test_the_best_survived_in_all_seeds_and_a_wild_neighbour_sets_no_noise():
    table = {1e-3: {0: 2.42, 1: 2.49}, 1.7e-3: {0: 2.06, 1: 2.07}, 3e-3: {0: 2.0, 1: 2.0},
             5.5e-3: {0: 2.05, 1: 2.04}, 1e-2: {0: 2.1, 1: 3.5}, 3e-2: {0: 1.9, 1: math.inf},
             1e-1: {0: math.inf}}
    shown, _, _, _ = sweep.compare_rates(table, sweep.best_rate(table))
    assert sweep.best_rate(table) == 3e-3
    assert shown[1e-3] and not shown[3e-3]
    assert 1e-1 not in shown   # diverged, but with one seed of two


def test_one_seed_takes_a_tenth_of_a_nat_for_worse():
    losses = {1e-4: 2.67, 3e-4: 2.14, 1e-3: 2.05, 3e-3: 2.0, 1e-2: 2.09, 3e-2: 2.15, 1e-1: math.inf}
    table = {lr: {0: loss} for lr, loss in losses.items()}
    shown, near, low, high = sweep.compare_rates(table, sweep.best_rate(table))
    assert {lr for lr in shown if not shown[lr]} == {1e-3, 3e-3, 1e-2} and (low, high) == (3e-4, 3e-2)
    assert near == [1e-3, 3e-3, 1e-2]


def test_beyond_the_end_of_a_grid_the_optimum_may_lie_but_the_end_itself_is_not_as_good():
    losses = {1e-4: 7.1, 3e-4: 9.0, 1e-3: 12.0, 1e-2: 35.0, 1e-1: 16.0}
    table = {lr: {0: loss} for lr, loss in losses.items()}
    shown, near, low, high = sweep.compare_rates(table, 1e-4)
    assert shown[1e-1] and near == [1e-4, 1e-1] and (low, high) == (0, math.inf)


@pytest.mark.parametrize("name", CELLS)
def test_intervals_hold_the_known_optimum_and_the_rate_is_good(name):
    for sigma, seeds in ((0.05, 2), (0.01, 3)):
        holds, width, unbounded, regret, runs = cell(name, sigma, seeds, 100)
        print(f"{name}, {1000 * sigma:.0f} mnat, {seeds} seeds: {100 * holds:.0f} of 100 intervals hold the "
              f"optimum, width {width:.1f}; regret {1000 * regret:.1f} mnat, {runs:.1f} runs")
        assert holds >= 0.93
    assert width < 100
    assert runs < 23
    if name not in HARD:
        assert regret <= 0.005


def test_equal_settings_are_seldom_called_different_and_unequal_ones_often():
    wrong = [claims("wall above", 0.003, 5, [1, 1.2, 1.4, 1.7, 2], 0, 50)]
    for seeds in (2, 3):
        wrong += [claims("parabola", 0.01, seeds, [1, factor], 0, 100) for factor in (1, 2)]
    found = claims("parabola", 0.01, 3, [1, 1.8], 0.03, 100)
    print(f"claims between equal settings {wrong}; between settings 3 sigma apart {found}")
    assert max(wrong) <= 0.05
    assert found >= 0.7


# --------------------------------------------------------------------------------------------------
# The program

def test_a_sweep_end_to_end(tmp_path):
    flags = ["--jobs", "2", "--seeds", "3", "--max-steps", "30"]
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    dir = tmp_path / "runs/tiny-max-steps-30"
    names = {path.name for path in dir.iterdir() if path.is_file()}
    assert names == {"lr_sweep_comparison.png", "lr_vs_final_loss.png", "detailed_comparison.png",
                     "lr_schedules.png", "summary_table.csv", "summary_table.png", "insights.json",
                     "lr_sweep_analysis.md", "sweep.json", ".lock"}
    assert not list(dir.glob("*/stderr.log"))
    assert (dir / "lr0.003-s0/loss_curves.png").exists()

    insights = json.loads((dir / "insights.json").read_text())
    setting = insights["settings"][0]
    assert setting["bracketed"] and setting["noise"] > 0
    assert setting["edge"]["diverged"]["of"] == 1
    assert setting["edge"]["diverged"]["survived"] < setting["edge"]["diverged"]["lr"]
    assert insights["use"]["low"] <= 2e-3 <= insights["use"]["high"]
    alive = [row for row in setting["rates"] if row["val_loss"]]
    ordered = sorted((row["val_loss"], row["difference"]) for row in alive)
    assert [d for _, d in ordered] == sorted(d for _, d in ordered)
    assert analysis(dir).split("\n")[2].startswith("**Use ")
    assert "lowest mean of 3 seeds" in analysis(dir)
    assert "Use " in done.stdout
    assert str(dir.relative_to(tmp_path)) in done.stdout.splitlines()[-1]
    assert len(rows(dir)) == insights["runs"]
    assert {row["status"] for row in rows(dir)} >= {"converged", "diverged"}

    before = (dir / "summary_table.csv").read_bytes()
    again = run(tmp_path, *flags)
    assert again.returncode == 0 and "finished before" in again.stdout
    assert (dir / "summary_table.csv").read_bytes() == before
    other = run(tmp_path, "--name", "tiny-max-steps-30", "--max-steps", "31")
    assert other.returncode == 2 and "other flags" in other.stderr
    assert other.stderr.count("\n") == 1


def test_a_rate_beyond_a_diverged_one_is_judged_by_its_own_losses():
    losses = {1e-3: 4.6, 3e-3: 4.0, 1e-2: 4.1, 0.3: math.inf, 1.0: 6.3}
    table = {lr: {0: loss} for lr, loss in losses.items()}
    shown, near, low, high = sweep.compare_rates(table, 3e-3)
    assert shown == {1e-3: True, 3e-3: False, 1e-2: False, 0.3: True, 1.0: True} and (low, high) == (1e-3, 0.3)


def test_a_rate_is_shown_to_be_worse_or_not_or_nobody_knows():
    """With the only seed of several, a rate that diverged may have had bad luck."""
    def shown(losses):
        runs = []
        for (lr, seed), loss in losses.items():
            status = "converged" if loss < math.inf else "diverged"
            summary = dict(status=status, final_val_loss=loss)
            train = dict(train_loss=np.linspace(7, min(loss, 7), 40))
            runs.append(dict(name=f"lr{lr:g}-s{seed}", lr=lr, seed=seed, status=status, summary=summary,
                             train=train, args={}))
        insights = sweep.analyse(runs)
        text = sweep.write_up(dict(insights, ended="ended", unfinished=[]))
        found = insights["settings"][0]["rates"]
        for row in found:
            cells = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {row['lr']:g} |")]
            assert cells[0][6] == str(row["shown"]).replace("None", "")
        return {row["lr"]: row["shown"] for row in found}

    several = {(1e-3, 0): 2.0, (1e-3, 1): 2.01, (0.0123456, 0): 1.9, (0.0123456, 1): 1.91, (0.1, 0): math.inf,
               (0.3, 0): math.inf, (0.3, 1): math.inf, (0.02, 0): 1.903, (0.02, 1): 1.909}
    assert shown(several) == {1e-3: True, 0.0123456: False, 0.02: False, 0.1: None, 0.3: True}
    assert shown({(1e-3, 0): 2.0, (3e-3, 0): 2.05, (1, 0): math.inf}) == {1e-3: False, 3e-3: False, 1: True}
    assert shown({(0.1, 0): math.inf}) == {0.1: None}
    # Two valleys of their own, one of whose bottoms may lie lower than the best.
    losses = {1e-4: 2.4, 1e-3: 2.0, 3e-3: 2.3, 1e-2: 2.15, 3e-2: 2.2, 0.1: 2.9, 0.3: 2.8, 1.0: 3.5}
    worse = {lr: lr != 1e-3 for lr in losses}
    assert shown({(lr, 0): loss for lr, loss in losses.items()}) == worse


def test_one_seed_says_what_it_cannot_show(tmp_path):
    flags = ["--lrs", "1e-3", "3e-3", "1e-2", "--no-widen", "--vary", "schedule=cosine,constant"]
    assert run(tmp_path, *flags).returncode == 0
    text = analysis(tmp_path / "runs/tiny-schedule")
    assert "**one seed**" in text and "a rule of thumb, not a test" in text
    assert "schedule=cosine is not shown to be better than schedule=constant" in text
    assert "95%" not in text and "| not shown |" in text
    assert len(rows(tmp_path / "runs/tiny-schedule")) == 6


def test_one_rate_with_several_seeds_is_not_called_one_seed(tmp_path):
    flags = ["--vary", "schedule=cosine,constant", "--lrs", "2e-3", "--no-widen", "--seeds", "2"]
    assert run(tmp_path, *flags).returncode == 0
    text = analysis(tmp_path / "runs/tiny-schedule")
    assert "no other rate survived all its 2 seeds" in text and "one seed" not in text


def test_at_max_runs_the_text_says_so(tmp_path):
    assert run(tmp_path, "--max-runs", "5").returncode == 0
    assert "ended at the limit of 5 runs" in analysis(tmp_path / "runs/tiny")


BAD = """
--lrs 1e-3 0 | invalid learning_rate
--lrs -1 | --lrs
--lrs nan | nan
--lrs fast | fast
--around 1 0 | --around
--seeds 0 | --seeds
--seeds 1e30 | 1e30
--study nope | explore
--vary schedule | FLAG=V1
--vary a,b=1:2,3 | FLAG=V1
--vary lr=1,2 | --lrs
--vary data=a,b | tokenizer
--vary schedule=cosine,zigzag | zigzag
--jobs 0 | --jobs
--preset huge | huge
--lr 1e-3 | --lrs
--schedule zigzag | zigzag
--nonsense 1 | --nonsense
extra | extra
--name ../x | under runs/
--name a/b | under runs/
--data x\x07y | control characters
--report nowhere | nowhere
"""


@pytest.mark.parametrize("line", BAD.strip().split("\n"))
def test_bad_input_is_one_line_and_status_2(tmp_path, line):
    flags, expected = line.split(" | ")
    done = run(tmp_path, *flags.split())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_shows_the_defaults_of_the_preset():
    done = run(ROOT, "--preset", "moe", "--help")
    assert "0.065" in done.stdout and done.returncode == 0


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path):
    flags = ["--lrs", "1e-3", "3e-3", "1e-2", "--no-widen"]
    done = run(tmp_path, *flags, FAKE_FAIL="3e-3")
    assert done.returncode == 1
    assert "out of memory, say" in done.stdout
    assert "lr0.003-s0: FAILED" in done.stdout
    assert [row["lr"] for row in rows(tmp_path / "runs/tiny")] == ["0.001", "0.01"]
    assert "ended without the runs that failed" in analysis(tmp_path / "runs/tiny")
    assert "damaged: lr0.003-s0" in analysis(tmp_path / "runs/tiny")
    assert run(tmp_path, *flags).returncode == 0   # it is tried again
    assert len(rows(tmp_path / "runs/tiny")) == 3


def test_dry_run_prints_commands_that_work_anywhere(tmp_path):
    flags = ["--lrs", "1e-3", "3e-3", "1e-2", "--dry-run", "--vary", "max-steps=20,40", "--data", "a b;'"]
    done = run(tmp_path, *flags)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) == 6
    assert not (tmp_path / "runs").exists()
    for line in lines:
        assert f"--data-tokens {40 * 4096}" in line
        assert subprocess.run(["sh", "-c", line], cwd="/", capture_output=True).returncode == 0
    dir = next((tmp_path / "runs").iterdir())
    assert run(tmp_path, "--report", str(dir)).returncode == 0
    assert "The search goes on" in analysis(dir)
    insights = json.loads((dir / "insights.json").read_text())
    labels = {s["label"] for s in insights["settings"]}
    assert labels == {"max-steps=20", "max-steps=40"}
    more = run(tmp_path, *flags).stdout.splitlines()
    assert more and not set(more) & set(lines)   # the next round of the search


def test_a_closed_pipe_ends_a_dry_run_quietly(tmp_path):
    rates = [f"{1e-3 * 1.001 ** i:g}" for i in range(700)]     # more lines than a pipe holds
    command = [sys.executable, ROOT / "sweep.py", "--dry-run", "--no-widen", "--lrs", *rates]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert b"fake_train.py" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == b""


# --------------------------------------------------------------------------------------------------
# Comparable, or refused; interrupted, and gone on with

def test_edited_code_is_not_mixed_with_old(tmp_path):
    program = tmp_path / "train.py"
    shutil.copy(FAKE, program)
    flags = ["--lrs", "1e-3", "3e-3", "--no-widen"]
    assert run(tmp_path, *flags, program=program).returncode == 0
    program.write_text(program.read_text() + "# edited\n")
    assert run(tmp_path, *flags, program=program).returncode == 0    # nothing new is run
    done = run(tmp_path, *flags, "--seeds", "2", program=program)
    assert done.returncode == 2 and "lr0.001-s0, lr0.003-s0 began with other train.py" in done.stderr
    assert run(tmp_path, *flags, "--seeds", "2", "--mix-code", program=program).returncode == 0
    assert len(rows(tmp_path / "runs/tiny")) == 4


def test_all_edited_files_and_old_runs_are_named_in_one_line(tmp_path, monkeypatch, capsys):
    code = {}
    for name in ("model.py", "optim.py", "train.py"):
        (tmp_path / name).write_text("# old\n")
        code[name] = hashlib.sha256(b"# old\n").hexdigest()
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    for i in range(1, 41):
        (tmp_path / f"runs/lr{i}-s0").mkdir(parents=True)
        config = dict(args=dict(lr=i, seed=0), code=code)
        (tmp_path / f"runs/lr{i}-s0/config.json").write_text(json.dumps(config))
    runs = plot.read_runs(tmp_path / "runs")
    assert len(runs) == 40
    sweep.refuse_mixture(runs, mix_code=False)
    (tmp_path / "model.py").write_text("# new\n")
    (tmp_path / "optim.py").unlink()
    with pytest.raises(SystemExit) as refusal:
        sweep.refuse_mixture(runs, mix_code=False)
    message = capsys.readouterr().err
    assert refusal.value.code == 2
    assert "lr1-s0, lr2-s0, lr3-s0" in message and ", ... began with other model.py, optim.py;" in message
    assert message.count("\n") == 1 and len(message) < 400 and "--mix-code" in message
    sweep.refuse_mixture(runs, mix_code=True)
    runs[2]["config"]["code"] = {"data.py": "other"}    # is no other data
    with pytest.raises(SystemExit):
        sweep.refuse_mixture(runs[2:3], mix_code=False)
    assert "began with other data.py; choose another --name, or mix" in capsys.readouterr().err
    runs[0]["config"]["data"] = dict(train_sha256="a", val_sha256="b")
    sweep.refuse_mixture(runs, mix_code=True)   # the others' configs lost theirs
    runs[1]["config"]["data"] = dict(train_sha256="c", val_sha256="b")
    with pytest.raises(SystemExit):
        sweep.refuse_mixture(runs, mix_code=True)
    message = capsys.readouterr().err
    assert "lr2-s0 began with other data;" in message and "--mix-code" not in message


def test_a_run_that_fails_again_is_said_to_have_failed_and_a_damaged_loss_is_left_out(tmp_path):
    flags = ["--no-widen", "--max-steps", "12", "--lrs", "1e-3", "3e-3"]
    dir = tmp_path / "runs/tiny-max-steps-12"
    assert run(tmp_path, *flags).returncode == 0
    (dir / "lr0.001-s0/config.json").write_text("{")
    again = run(tmp_path, *flags, FAKE_FAIL="0.001")
    assert again.returncode == 1 and "lr0.001-s0: FAILED" in again.stdout and "out of memory" in again.stdout
    summary = json.loads((dir / "lr0.003-s0/summary.json").read_text())
    (dir / "lr0.003-s0/summary.json").write_text(json.dumps(dict(summary, final_val_loss="2.6")))
    assert run(tmp_path, "--report", str(dir)).returncode == 0
    assert "lr0.003-s0" in analysis(dir).split("Left out")[1].splitlines()[0]


def test_ctrl_c_when_nobody_reads_the_lines_any_more(tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "sweep.py"), "--jobs", "1"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(FAKE_DELAY="0.2"))
    process.stdout.readline()
    process.stdout.close()
    while not list(tmp_path.glob("runs/tiny/*/metrics.csv")):   # not while a run is being started
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 1 and process.stderr.read() == ""


def test_runs_of_other_data_are_refused(tmp_path):
    assert run(tmp_path, "--lrs", "1e-3", "3e-3", "--no-widen").returncode == 0
    path = tmp_path / "runs/tiny/lr0.001-s0/config.json"
    config = json.loads(path.read_text())
    config["data"]["train_sha256"] = "other"
    path.write_text(json.dumps(config))
    for flags in (["--lrs", "1e-3", "3e-3", "--no-widen"], ["--report", "runs/tiny"]):
        done = run(tmp_path, *flags)
        assert done.returncode == 2 and "other data" in done.stderr


def test_damaged_runs_stop_neither_report_nor_sweep(tmp_path):
    damage = [("config.json", "{"), ("config.json", "[]"), ("config.json", ""), ("summary.json", "\0\0"),
              ("summary.json", "{}"), ("summary.json", '{"status": "sideways"}'), ("metrics.csv", "")]
    rates = [f"{1 + i}e-3" for i in range(len(damage) + 2)]
    flags = ["--no-widen", "--max-steps", "12", "--jobs", "2", "--lrs", *rates]
    dir = tmp_path / "runs/tiny-max-steps-12"
    assert run(tmp_path, *flags).returncode == 0
    for i, (name, text) in enumerate(damage):
        (dir / f"lr0.00{1 + i}-s0" / name).write_text(text)
    assert run(tmp_path, "--report", str(dir)).returncode == 0
    left_out = [line for line in analysis(dir).splitlines() if line.startswith("Left out")][0]
    for i in range(6):
        assert f"lr0.00{1 + i}-s0" in left_out
    assert "lr0.008-s0" not in left_out
    done = run(tmp_path, *flags)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr


def test_one_sweep_owns_a_folder(tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    owner = sweep.lock(tmp_path / "runs/tiny")
    done = run(tmp_path, "--lrs", "1e-3", "--no-widen")
    assert done.returncode == 2
    assert f"process {os.getpid()}" in done.stderr
    assert done.stderr.count("\n") == 1
    owner.close()
    assert run(tmp_path, "--lrs", "1e-3", "--no-widen").returncode == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file, where the folder should be")
    done = run(tmp_path, "--lrs", "1e-3", "--no-widen")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "runs" in done.stderr


def orphans(cwd):
    """Ids of the fake training processes that run in this folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            here = os.readlink(f"/proc/{pid}/cwd") == str(cwd)
            if here and "fake_train" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
        except OSError:   # it has just ended
            pass
    return found


def test_stopped_at_random_moments_it_ends_like_one_left_alone(tmp_path):
    flags = ["--seeds", "2", "--jobs", "2", "--no-widen", "--lrs", "1e-3", "2e-3", "4e-3", "8e-3"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "whole", *flags).returncode == 0
    dice = random.Random(0)
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP):
        process = subprocess.Popen([sys.executable, str(ROOT / "sweep.py"), *flags], cwd=tmp_path / "killed",
                                   env=environment(FAKE_DELAY="0.05"), stdout=subprocess.PIPE, text=True)
        process.stdout.readline()   # runs are about to start
        time.sleep(dice.uniform(0.2, 0.9))
        process.send_signal(how)
        text = process.communicate(timeout=30)[0]
        if how == signal.SIGKILL:
            time.sleep(0.1)
        else:
            assert process.returncode == 128 + how
            assert "The same command goes on" in text
        assert sys.platform != "linux" or not orphans(tmp_path / "killed")   # which would go on writing
    assert run(tmp_path / "killed", *flags).returncode == 0
    assert rows(tmp_path / "whole/runs/tiny") == rows(tmp_path / "killed/runs/tiny")


WITHOUT_LINUX = """
import sys, sweep
sweep.CHILD.pop("preexec_fn", None)     # by which a child dies with its parent
sys.exit(sweep.main(sys.argv[1:]))
"""
STUBBORN = """
import os, pathlib, signal, sys, time
if "--prepare" not in sys.argv:
    signal.signal(signal.SIGINT, lambda *_: pathlib.Path("asked").write_text("yes"))
    pathlib.Path("started").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)
"""


def wait_for(path):
    while not (path.exists() and path.stat().st_size):
        time.sleep(0.02)
    return path.read_text()


def test_a_second_ctrl_c_kills_what_does_not_end(tmp_path):
    program = tmp_path / "stubborn.py"
    program.write_text(STUBBORN)
    command = [sys.executable, "-c", WITHOUT_LINUX, "--lrs", "1e-3", "--no-widen"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(program, PYTHONPATH=str(ROOT)),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = int(wait_for(tmp_path / "started"))
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "asked")
    assert process.poll() is None   # it waits for the run's checkpoint
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    assert out.count("The same command goes on") == 1
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_gpus_and_jobs(monkeypatch, tmp_path):
    for visible, ids in (("2,5", ["2", "5"]), ("-1", []), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert sweep.visible_gpus("auto") == ids
    assert sweep.visible_gpus("cpu") == []
    assert sweep.visible_gpus("cuda:1") == []    # train.py finds it
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H (UUID: GPU-1)\nGPU 1: H (UUID: GPU-2)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sweep.visible_gpus("auto") == ["0", "1"]
    assert sweep.make_plan(["--preset", "moe"]).jobs == 4


def test_with_the_real_training_program(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {a} {b} looked at the {c}.\n" for a in ("red", "old", "sad")
                            for b in ("fox", "cat", "king") for c in ("moon", "tree", "door", "river")) * 60)
    sizes = dict(max_steps=8, d_model=32, n_layers=1, n_heads=2, d_ff=64, vocab_size=300, context_length=16,
                 batch_size=4, eval_tokens=64, sample=0, device="cpu", data=text)
    flags = [str(x) for name, value in sizes.items() for x in ("--" + name.replace("_", "-"), value)]
    flags += ["--lrs", "1e-3", "1e-2", "--no-widen", "--jobs", "2", "--name", "real"]
    done = run(tmp_path, *flags, program=ROOT / "train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["steps"] for row in rows(tmp_path / "runs/real")] == ["8", "8"]
    assert (tmp_path / "runs/real/lr0.01-s0/lr_schedule.png").exists()
