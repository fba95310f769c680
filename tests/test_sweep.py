"""The sweep: what it tries, what it concludes, and that it survives being interrupted. Most tests run
fake_train.py in place of train.py: the same flags and files, losses from a known law, milliseconds a run."""
import csv
import json
import math
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import plot
import sweep
from simulate import GRID, cell, claims, judged, law, search

ROOT = Path(__file__).resolve().parent.parent
FAKE = ROOT / "tests/fake_train.py"
DRAW = plot.draw_run, plot.draw_sweep
sweep.CONTEXT.set_forkserver_preload(["sweep"])     # fake_train.py needs no torch ...
sys.modules["__main__"].__spec__ = None     # ... and its processes no pytest, which they would import as their main module
vars(sys.modules["__main__"]).pop("__file__", None)
os.environ["PYTHONPATH"] = str(ROOT)        # where the server of processes finds sweep.py
ONE = ["--lrs", "1e-3", "--no-widen", "--seeds", "1", "--max-steps", "4"]
THREE = ["--lrs", "1e-3", "3e-3", "1e-2", "--no-widen", "--seeds", "1", "--max-steps", "12"]


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """run(*flags, VARIABLE="value") -> status, out, err of a sweep in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "TRAIN", FAKE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(plot, "draw_run", lambda dir: [])       # a second each
    monkeypatch.setattr(plot, "draw_sweep", lambda dir, runs, insights: [])
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def main(*flags, **env):
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            if env:     # the server that runs are forked from keeps the environment it started with
                multiprocessing.forkserver._forkserver._stop()
            try:
                status = sweep.main([str(flag) for flag in flags])
            except SystemExit as end:
                status = end.code
        if env:
            multiprocessing.forkserver._forkserver._stop()
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)
    yield main
    for number, handler in handlers.items():
        if handler is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, handler)


def program(cwd, *flags, train=FAKE, before=(), **env):
    """The same as a process of its own, for what signals do to it."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen([*before, sys.executable, "-c", PROGRAM, train, *flags], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


PROGRAM = """
import pathlib, sys, plot, sweep
sweep.CONTEXT.set_forkserver_preload(["sweep"])     # fake_train.py needs no torch
plot.draw_run = plot.draw_sweep = lambda *args: []
sweep.TRAIN = pathlib.Path(sys.argv[1])
sys.exit(sweep.main(sys.argv[2:]))
"""


def rows(dir):
    with open(dir / "summary_table.csv") as file:
        return list(csv.DictReader(file))


def analysis(dir):
    return (dir / "lr_sweep_analysis.md").read_text()


def wait_for(path):
    while not (path.exists() and path.stat().st_size):
        time.sleep(0.02)
    return path.read_text()


# --------------------------------------------------------------------------------------------------
# What to try

def neighbours(table):
    """The rates below and above the best, those that exist."""
    return [lr for lr in sweep.nearest(table, sweep.lowest(table)) if lr in table]


def tried(lrs=(1e-3, 3e-3, 1e-2), **plan):
    """A whole search in a valley without noise: {rate: its seeds}, the table of losses, the optimum."""
    loss, optimum, _ = law(0, 0.0, "exponential")
    table = search(loss, lrs=list(lrs), **plan)[0][()]
    return {lr: sorted(row) for lr, row in table.items()}, table, optimum


@pytest.mark.parametrize("lrs", [
    [1e-3, 3e-3, 1e-2], [1e-6, 3e-6], [0.3, 1.0, 3.0], [1e-3], [1e-5, 1e-3, 1e-1]])
def test_a_search_brackets_the_optimum_and_finds_the_edge_wherever_it_starts(lrs):
    for seeds in (1, 2):
        _, table, optimum = tried(lrs, seeds=seeds)
        best = sweep.lowest(table)
        below, above = neighbours(table)
        assert below < optimum < above
        assert above / best < 2.1
        assert best / below < 2.1
        assert table[max(table)][0] > table[best][0] + 1


def test_seeds_go_to_rates_that_matter_and_every_limit_has_them():
    for shape, sigma, n in (("exponential", 0.0, 3), ("parabola", 0.01, 3), ("flat", 0.05, 2)):
        loss, _, _ = law(1, sigma, shape)
        table = search(loss, lrs=GRID, seeds=n)[0][()]
        best, low, high, _ = judged(table)
        assert low > 0 and high < math.inf
        for lr in sorted(table):
            if low <= lr <= high and table[lr][0] < math.inf:
                assert sorted(table[lr]) == list(range(n))
        assert n < 3 or sorted(table[max(table)]) == [0]


def test_an_end_of_the_grid_that_is_not_shown_to_be_worse_is_searched_beyond():
    """At a noise of 50 mnat the first grid's ends cannot be told apart from its middle."""
    loss, optimum, _ = law(3, 0.05, "flat")
    table = search(loss, lrs=[optimum / 2, optimum, optimum * 2], seeds=3)[0][()]
    best, low, high, _ = judged(table)
    assert low > 0 and high < math.inf


def test_settings_are_compared_on_a_closer_grid():
    loss, _, _ = law(0, 0.001, "flat")
    for settings, factor in ([((),), 2.1], [(("a=1",), ("a=2",)), 1.5]):
        tables = search(lambda setting, lr, seed: loss((), lr, seed), settings, seeds=1)[0]
        for table in tables.values():
            best = sweep.lowest(table)
            ratios = [max(lr / best, best / lr) for lr in neighbours(table)]
            assert max(ratios) < factor and (factor < 2 or max(ratios) > 1.5)


def test_refine_halves_the_distance_and_no_widen_keeps_to_the_rates_given():
    _, table, _ = tried(seeds=1, refine=1)
    best = sweep.lowest(table)
    assert all(max(lr / best, best / lr) < 1.5 for lr in neighbours(table))
    assert sorted(tried(widen=False)[0]) == [1e-3, 3e-3, 1e-2]


def test_a_sharp_valley_is_searched_closer():
    """A parabola of 0.4 u^2 with neighbours a factor 2 away could be 24 mnat lower than the best; but not where
    the noise is larger, or not known."""
    for shape, sigma, n, factor in (("sharp", 0.001, 2, 1.5), ("parabola", 0.02, 2, 2.1), ("sharp", 0.001, 1, 2.1)):
        table = search(law(0, sigma, shape)[0], seeds=n)[0][()]
        best = sweep.lowest(table)
        ratios = [max(lr / best, best / lr) for lr in neighbours(table)]
        assert max(ratios) < factor and (factor < 2 or max(ratios) > 1.5)


def test_how_a_search_ended_is_said():
    results, why = search(law(0, 0.0, "parabola")[0], lrs=[1e-7, 3e-7], max_runs=4)[1:]
    assert len(results) == 4 and "--max-runs" in why
    results, why = search(lambda *key: math.inf, max_runs=9)[1:]
    assert len(results) == 9 and min(lr for _, lr, _ in results) < min(GRID)    # all diverge: it goes down

    def valley(top):
        return search(lambda setting, lr, seed: min(3 + math.log(lr / 3e-3) ** 2 / 4, top), seeds=1)
    for results, why in (valley(9)[1:], search(law(0, 0.0, "flat")[0], seeds=1)[1:]):
        assert "one above it diverged or is a nat worse" in why
        assert max(results.values()) > min(results.values()) + 1


def test_a_failed_run_is_not_asked_for_again():
    loss = law(0, 0.0, "parabola")[0]
    results = search(lambda setting, lr, seed: None if lr == 3e-3 else loss(setting, lr, seed), seeds=1)[1]
    assert results[(), 3e-3, 0] is None and len(results) > 5


def test_vary_combines_values():
    def settings(*flags):
        return list(sweep.make_plan([word for text in flags for word in ("--vary", text)]).settings)
    assert settings() == [()]
    assert settings("optimizer=adamw,muon", "beta1=0.9") == [
        ("--optimizer=adamw", "--beta1=0.9"), ("--optimizer=muon", "--beta1=0.9")]
    assert settings("warmup_ratio,min-lr-ratio=0.1:0,0:0.1") == [
        ("--warmup-ratio=0.1", "--min-lr-ratio=0"), ("--warmup-ratio=0", "--min-lr-ratio=0.1")]
    assert settings("tied,beta1=on:0.9,off:0.8") == [("--tied", "--beta1=0.9"), ("--no-tied", "--beta1=0.8")]


def test_studies_try_what_they_say():
    for study, rates in (("explore", 5), ("extend", 11), ("fine", 9), ("wide", 26), ("edge", 8),
                         ("schedules", 1)):
        plan = sweep.make_plan(["--study", study, "--preset", "moe", "--max-steps", "7"])
        assert len(set(plan.lrs)) == rates
        assert not plan.widen
        assert plan.command[-2:] == ["--max-steps", "7"]
    assert plan.lrs == [0.065] and plan.seeds == 3
    assert len(plan.settings) == 5
    plan = sweep.make_plan(["--study", "schedules", "--lrs", "2e-3", "--seeds", "2"])
    assert plan.lrs == [2e-3] and plan.seeds == 2   # the command line overrides


def test_an_unknown_preset_is_train_pys_to_know_and_starts_around_its_own_rate(run):
    done = run("--preset", "mine", "--dry-run")     # fake_train.py's own rate is 0.002
    assert done.status == 0
    assert re.findall(r"--lr=(\S+)", done.out) == ["0.0002", "0.0006", "0.002", "0.006", "0.02"]
    assert "--preset mine" in done.out


# --------------------------------------------------------------------------------------------------
# Statistics

def test_student_t():
    for p, df, t in ((0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 10, 2.2281), (0.99, 5, 3.3649)):
        assert sweep.t_quantile(p, df) == pytest.approx(t, rel=1e-3)


def test_the_luck_of_a_seed_is_no_noise():
    luck = np.array([0.0, 0.5, -0.2])
    table = {1e-3: dict(enumerate(3.0 + luck)), 3e-3: dict(enumerate(2.9 + luck))}
    assert sweep.noise(table, 3e-3) == pytest.approx([0, 2])
    noise = np.random.default_rng(0).normal(0, 0.01, (400, 5)) + np.arange(5)
    squares, df = sweep.noise({i: dict(enumerate(row)) for i, row in enumerate(noise)}, 0)
    assert df == 399 * 4 and math.sqrt(squares / df) == pytest.approx(0.01, rel=0.05)


def test_a_rate_beside_the_best_is_judged_by_the_paired_t_interval_by_hand():
    """Two rates and three seeds: the pooled noise is the deviation of the pairs, over sqrt(2)."""
    table = {1e-3: {0: 3.00, 1: 3.10, 2: 2.95}, 3e-3: {0: 3.03, 1: 3.14, 2: 2.97}}
    row = sweep.compare(table, 1e-3)[3e-3]
    half = 4.3027 * np.std([0.03, 0.04, 0.02], ddof=1) / 3 ** 0.5
    assert row["worse_by"] == pytest.approx(0.03) and row["half_width"] == pytest.approx(half, rel=1e-3)
    assert row["worse"] and row["verdict"] == "worse"
    table[1e-2] = {0: 4.0, 1: 4.2, 2: math.inf}     # one more comparison: 1 - 0.025 / 2
    row = sweep.compare(table, 1e-3)[3e-3]
    assert row["half_width"] == pytest.approx(half * 6.2053 / 4.3027, rel=1e-3) and not row["worse"]


def test_two_settings_are_compared_by_the_paired_t_interval(monkeypatch):
    a = {0: 3.00, 1: 3.10, 2: 2.95}
    b = {0: 3.01, 1: 3.13, 2: 2.97}
    tables = {"a": {1e-3: a}, "b": {1e-3: b}}
    winner, found = sweep.compare_settings(tables)
    half = 4.3027 * np.std([0.01, 0.03, 0.02], ddof=1) / 3 ** 0.5
    assert winner == "a" and found["a"]["verdict"] == "best"
    assert found["b"]["worse_by"] == pytest.approx(0.02) and found["b"]["half_width"] == pytest.approx(half, abs=1e-5)
    assert found["b"]["verdict"] == "cannot tell"
    more = {**tables, "c": {1e-3: {0: 3.2, 1: 3.3, 2: 3.15}}}    # of three settings the best comes out of 3 pairs
    residuals = np.array([[*a.values()], [*b.values()], [3.2, 3.3, 3.15]])
    residuals = residuals - residuals.mean(1, keepdims=True) - residuals.mean(0) + residuals.mean()
    pooled = (2 * (residuals ** 2).sum() / 4) ** 0.5
    for label, own in (("b", 0.01), ("c", 0.0)):     # the pairs' own deviation, if it is the larger
        half = sweep.compare_settings(more)[1][label]["half_width"]
        assert half == pytest.approx(3.961 * max(pooled, own) / 3 ** 0.5, rel=1e-3)
    lone = {"a": {1e-3: {0: 3.0}}, "b": {1e-3: {0: 4.0}}}
    noisy = {"a": {1e-3: a, 2e-3: b}, "b": {1e-3: {0: 4.0}}}    # the noise is known, but one pair shows nothing
    for few in (lone, noisy):
        found = sweep.compare_settings(few)[1]["b"]
        assert found["verdict"] == "one seed" and not found["worse"] and math.isnan(found["half_width"])
    monkeypatch.setattr(sweep, "MARGIN", 0.1)
    assert sweep.compare_settings(tables)[1]["b"]["verdict"] == "same"


def test_the_best_survived_in_all_its_seeds_and_a_lost_file_does_not_move_it():
    table = {1.7e-3: {0: 2.0, 1: 2.1, 2: 2.3}, 3e-3: {0: 2.02, 1: 2.12, 2: 2.31}, 1e-2: {0: 1.5, 1: math.inf},
             3e-2: {0: 1.9}}
    assert sweep.lowest(table) == 1.7e-3
    del table[1.7e-3][2]
    assert sweep.lowest(table) == 1.7e-3    # its mean is lower still; and where its luck was bad:
    del table[3e-3][0]
    table[1.7e-3][2] = 2.3
    assert sweep.lowest(table) == 1.7e-3    # although the mean of 3e-3 is now of higher seeds
    table[3e-3] = {1: 2.0, 2: 2.2}
    assert sweep.lowest(table) == 3e-3
    assert sweep.lowest({1e-3: {0: math.inf}}) is None and sweep.lowest({}) is None


def test_one_run_of_a_rate_shows_nothing():
    table = {1e-3: {0: 2.42}, 1.7e-3: {0: 2.06, 1: 2.07}, 3e-3: {0: 2.0, 1: 2.0}, 5.5e-3: {0: 2.055, 1: 2.06},
             3e-2: {0: 2.3, 1: math.inf}, 0.1: {0: math.inf}, 0.3: {0: math.inf, 1: math.inf}}
    found = sweep.compare(table, sweep.lowest(table))
    assert {lr: row["verdict"] for lr, row in found.items()} == {
        1e-3: "one seed", 1.7e-3: "worse", 3e-3: "best", 5.5e-3: "worse", 3e-2: "diverged", 0.1: "diverged",
        0.3: "diverged"}
    assert {lr for lr, row in found.items() if row["worse"]} == {1.7e-3, 5.5e-3, 0.3}
    del table[1.7e-3], table[5.5e-3]
    assert judged(table)[:3] == (3e-3, 0, 0.3)


def test_one_seed_knows_no_interval():
    losses = {1e-4: 2.67, 1e-3: 2.05, 3e-3: 2.0, 1e-2: 2.09, 1e-1: math.inf}
    table = {lr: {0: loss} for lr, loss in losses.items()}
    found = sweep.compare(table, 3e-3)
    assert judged(table)[:3] == (3e-3, 0, math.inf)
    assert {row["verdict"] for lr, row in found.items() if lr not in (3e-3, 0.1)} == {"one seed"}


@pytest.mark.parametrize("name", ["exponential", "cliff", "own optima", "wild runs", "seeds diverge"])
def test_intervals_hold_the_known_optimum_and_the_rate_is_good(name):
    for sigma, seeds in ((0.05, 2), (0.01, 3)):
        holds, unbounded, wrong, width, regret, _, runs = cell(name, sigma, seeds, 30)
        print(f"{name}, {1000 * sigma:.0f} mnat, {seeds} seeds: {100 * holds:.0f} of 100 intervals hold the "
              f"optimum, width {width:.1f}; regret {1000 * regret:.1f} mnat, {runs:.1f} runs")
        assert holds >= 0.95 and wrong <= 0.05 and unbounded <= 0.1
    assert runs < 30
    assert regret <= 0.005


def test_equal_settings_are_seldom_called_different_and_unequal_ones_often():
    wrong = [claims("parabola", 0.01, seeds, [1, 2], 0, 30)[0] for seeds in (2, 3)]
    found = claims("parabola", 0.01, 3, [1, 1.8], 0.03, 30)[0]
    print(f"claims between equal settings {wrong}; between settings 3 sigma apart {found}")
    assert max(wrong) <= 0.06
    assert found >= 0.7


# --------------------------------------------------------------------------------------------------
# Sentences, each read beside what it says

def made_up(losses, statuses={}, **args):
    """A list of runs as read_runs gives them, from {(rate, seed): loss}, or {(rate, seed, flag's value): loss}."""
    runs = []
    for (lr, seed, *value), loss in losses.items():
        status = statuses.get(lr, "converged" if loss < math.inf else "diverged")
        settings = dict(args, **({"schedule": value[0]} if value else {}))
        train = dict(step=np.arange(1, 41), train_loss=np.linspace(7, min(loss, 7), 40))
        runs.append(dict(name=f"lr{lr:g}-s{seed}", lr=lr, seed=seed, status=status, loss=loss, config={"args": 1},
                         summary=dict(status=status, final_val_loss=loss, final_val_bpb=loss / 3, seconds=30),
                         train=train, metrics=train, args=dict(settings, lr=lr, seed=seed), setting=""))
    return runs


def said(losses, ended="", **more):
    """The analysis of made up runs, as text and as numbers."""
    insights = sweep.analyse(made_up(losses, **more), [ended])
    return sweep.write_up(insights), insights


def verdicts(text):
    """{rate: {column: cell}} in the first table."""
    lines = [line for line in text.split("##")[1].splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


SEVERAL = {(1e-3, 0): 2.3, (1e-3, 1): 2.31, (3e-3, 0): 2.0, (3e-3, 1): 2.02, (5e-3, 0): 2.006, (5e-3, 1): 2.022,
           (1e-2, 0): 2.1, (1e-2, 1): 2.13, (3e-2, 0): 2.9, (1e-1, 0): math.inf, (1e-1, 1): math.inf}


def test_the_answer_says_what_two_seeds_show():
    text, insights = said(SEVERAL, ended="The search ended because it rained.")
    first, second, third = text.split("\n")[2:7:2]
    assert first == (
        "**Use 0.003.** Of the learning rates tried it has the lowest validation loss: 2.010 nats a token, the mean "
        "of 2 seeds. The optimum lies between 0.001 and 0.01: these two are shown to be worse (paired t-tests over "
        "the seeds, 95% together). 0.005 (+0.004) cannot be told from it with 2 seeds.")
    assert second == "Runs: 11, with 5.5 minutes of training in all."
    assert third == "The search ended because it rained."
    assert insights["use"].items() >= dict(setting="", lr=3e-3, low=1e-3, high=1e-2, seeds=2).items()
    assert insights["use"]["loss"] == pytest.approx(2.01)
    table = verdicts(text)
    assert [row["verdict"] for row in table.values()] == ["worse", "best", "cannot tell", "worse", "one seed", "diverged"]
    assert table["0.001"]["seeds"] == "2" and table["0.001"]["worse by"] == "0.2950"
    assert re.fullmatch(r"0\.0\d+", table["0.001"]["±"]) and table["0.03"]["±"] == ""
    assert table["0.03"]["worse by"] == "0.9000" and table["0.1"]["loss"] == table["0.1"]["worse by"] == ""
    assert table["0.003"]["worse by"] == "" and table["0.1"]["curves"] == "diverged"
    assert "## The learning rates\n" in text and "| learning rate | seeds |" in text
    assert "the first rate" not in text and "None" not in text and "[0" not in text and "True" not in text


def test_a_limit_that_diverged_is_said_to_have():
    """Where two runs that diverged are why, and only there."""
    text = said({key: loss for key, loss in SEVERAL.items() if key[0] not in (1e-2, 3e-2)})[0]
    assert "(paired t-tests over the seeds, 95% together; 2 runs at 0.1 diverged)" in text


def test_a_rate_that_is_not_shown_to_be_worse_is_the_same_only_where_the_seeds_say_so():
    """It was called as good, at 0.525 nats above the best with two seeds."""
    text, insights = said({(1e-3, 0): 2.0, (1e-3, 1): 2.0, (3e-3, 0): 2.2, (3e-3, 1): 2.85})
    assert verdicts(text)["0.003"]["verdict"] == "cannot tell"
    assert "0.003 (+0.525) cannot be told from it with 2 seeds." in text
    near = {(1e-3, 0): 2.0, (1e-3, 1): 2.1, (3e-3, 0): 2.0001, (3e-3, 1): 2.1, (1e-2, 0): 2.3, (1e-2, 1): 2.4}
    text, _ = said(near)
    assert verdicts(text)["0.003"]["verdict"] == "same" and "0.003 (+0.000) cannot be told from it" in text


def test_where_no_rate_is_shown_to_be_worse_on_a_side_no_limit_is_said():
    text, insights = said({(1.5e-3, 0): 2.1, (2e-3, 0): 2.0, (3e-3, 0): 2.3})   # was: "over 0.1 nats worse"
    assert "limit" not in text and "lies between" not in text and "One seed cannot tell" in text
    assert not any(row["±"] for row in verdicts(text).values())
    assert insights["use"]["low"] is None and insights["use"]["high"] is None
    below = {key: loss for key, loss in SEVERAL.items() if key[0] <= 5e-3}
    assert "No rate above it is shown to be worse, so the optimum may lie far above." in said(below)[0]
    above = {key: loss for key, loss in SEVERAL.items() if key[0] >= 3e-3}
    assert "No rate below it is shown to be worse, so the optimum may lie far below." in said(above)[0]
    lone = {(3e-3, 0): 2.0, (3e-3, 1): 2.0, (1e-3, 0): 2.1}     # was: "no other rate survived all its 2 seeds"
    assert "No rate below it is shown to be worse" in said(lone)[0]
    assert "No rate above it is shown to be worse" in said(lone)[0]
    assert "survived all" not in said(lone)[0]


def test_the_sentence_on_what_lies_above_the_best():
    assert "No rate above the best was tried." in said({(1e-4, 0): 2.1, (1e-3, 0): 2.0})[0]
    text, insights = said({(1e-4, 0): 2.1, (1e-3, 0): 2.0, (3e-3, 0): 2.25})
    assert "No rate above the best diverged, up to 0.003, 0.25 nats worse." in text and "folk rule" not in text
    assert verdicts(text)["0.003"]["worse by"] == "0.2500"
    text, insights = said(SEVERAL, statuses={3e-2: "unstable"})
    assert "The first unstable rate above the best is 0.03, 10 times the best." in text
    assert "The first diverged rate above the best is 0.1, 33.3 times the best." in text
    assert text.count("folk rule") == 1
    edge = insights["settings"][0]["edge"]
    assert (edge["unstable"], edge["diverged"]) == (0.03, 0.1)


def test_only_rates_without_a_diverged_run_are_said_to_have_survived():
    losses = {(1e-3, 0): 2.0, (1e-3, 1): 2.2, (3e-3, 0): 2.4, (3e-3, 1): 2.6, (1e-2, 0): 9.0, (1e-2, 1): math.inf,
              (1e-2, 2): math.inf}
    text, insights = said(losses)
    assert "survived in all their seeds end at 2.300 nats on average (deviation 0.283), from 2.100 to 2.500" in text


def test_a_rates_loss_is_the_mean_of_its_own_runs():
    _, insights = said({(1e-3, 0): 3.0, (1e-3, 1): 3.1, (3e-3, 0): 3.1286})
    lone = insights["settings"][0]["rates"][1]
    assert lone["val_loss"] == 3.1286 and lone["runs"][0][:3] == [0, 3.1286, "converged"]
    assert lone["worse_by"] == pytest.approx(0.1286) and lone["half_width"] is None


def test_nothing_survived_or_all_fit_one_batch():
    assert "no rate survived" in said({(1e-3, 0): math.inf})[0]
    assert "fit one batch" in said(SEVERAL, full_batch=True)[0]
    assert said(SEVERAL, full_batch=True)[1]["use"] is None


def test_settings_are_compared_in_a_sentence_each():
    losses = {(*key, value): loss + more for value, more in (("cosine", 0), ("linear", 0.2))
              for key, loss in SEVERAL.items()}
    text, insights = said(losses)
    assert re.search(r"schedule=linear at its best rate is 0\.2000 ± 0\.0\d+ nats worse than schedule=cosine: the seeds "
                     "show it", text)
    assert [s["label"] for s in insights["settings"]] == ["schedule=cosine", "schedule=linear"]
    one = {key: loss for key, loss in losses.items() if key[1] == 0}
    assert "0.2000 nats worse than schedule=cosine: the seeds do not show which is better." in said(one)[0]


def test_steps_to_the_loss_that_the_worst_survivor_ends_with():
    _, insights = said({(1e-3, 0): 4.0, (3e-3, 0): 1.0, (1, 0): math.inf})
    slow, fast, diverged = insights["settings"][0]["rates"]
    assert insights["target_loss"] == 4
    assert slow["steps_to_loss"] == 40 and fast["steps_to_loss"] == 21 and diverged["steps_to_loss"] is None


# --------------------------------------------------------------------------------------------------
# The program

def test_a_sweep_end_to_end(tmp_path, run, monkeypatch):
    draw_run, draw_sweep = DRAW     # with pictures of one run, and below of the sweep
    monkeypatch.setattr(plot, "draw_run", lambda dir: draw_run(dir) if dir.name == "lr0.003-s0" else [])
    flags = ["--jobs", "2", "--max-steps", "30", "--name", "whole"]
    done = run(*flags)
    assert done.status == 0, done.err
    dir = tmp_path / "runs/whole"
    names = {path.name for path in dir.iterdir() if path.is_file()}
    assert names == {"summary_table.csv", "insights.json", "lr_sweep_analysis.md", "curves.csv", ".lock"}
    assert (dir / "lr0.003-s0/loss_curves.png").exists()

    insights = json.loads((dir / "insights.json").read_text())
    setting = insights["settings"][0]
    assert setting["edge"]["diverged"] > setting["best_lr"]
    assert insights["use"]["low"] <= 2e-3 <= insights["use"]["high"]
    assert analysis(dir).split("\n")[2].startswith("**Use ") and "the mean of 3 seeds" in analysis(dir)
    assert "The search ended because rates on both sides of the best end higher, and one" in analysis(dir)
    assert "Use " in done.out and "runs/whole" in done.out.splitlines()[-1]
    assert re.search(r"^lr0.003-s0: converged, validation loss 3\.\d+, \d+ s$", done.out, re.M)
    assert len(rows(dir)) == insights["runs"]
    assert {row["status"] for row in rows(dir)} >= {"converged", "diverged"}

    # The same from the curves alone, which are in four digits; and again from the runs.
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(dir / "curves.csv", only)
    monkeypatch.setattr(plot, "draw_sweep", draw_sweep)
    assert run("--report", only).status == 0
    again = json.loads((only / "insights.json").read_text())
    assert (again["use"]["lr"], again["use"]["low"]) == (insights["use"]["lr"], insights["use"]["low"])
    for a, b in zip(again["settings"][0]["rates"], setting["rates"]):
        assert (a["lr"], a["seeds"], a["verdict"], a["status"]) == (b["lr"], b["seeds"], b["verdict"], b["status"])
        assert a["val_loss"] == b["val_loss"] or a["val_loss"] == pytest.approx(b["val_loss"], abs=0.05)
    assert {path.name for path in only.glob("*.png")} == {
        "lr_sweep_comparison.png", "lr_vs_final_loss.png", "detailed_comparison.png", "lr_schedules.png",
        "summary_table.png"}
    assert (only / "curves.csv").read_text() == (dir / "curves.csv").read_text()
    before = (dir / "summary_table.csv").read_bytes()
    monkeypatch.setattr(plot, "draw_sweep", lambda *args: [])
    assert run(*flags).status == 0
    assert (dir / "summary_table.csv").read_bytes() == before


def test_one_seed_says_what_it_cannot_show(tmp_path, run):
    assert run(*THREE, "--vary", "schedule=cosine,constant", "--name", "one").status == 0
    text = analysis(tmp_path / "runs/one")
    assert "in its only run. One seed cannot tell a better rate from luck: add --seeds 3." in text
    assert "the seeds do not show which is better" in text and "between" not in text
    assert len(rows(tmp_path / "runs/one")) == 6
    assert "because all that was asked for has run" in text


def test_at_max_runs_the_text_says_so(tmp_path, run):
    assert run("--max-runs", "5", "--max-steps", "12", "--name", "max").status == 0
    assert "The search ended because it reached its limit of 5 runs" in analysis(tmp_path / "runs/max")
    assert run("--report", "runs/max").status == 0      # how a search ended is not known to a report
    assert "The search" not in analysis(tmp_path / "runs/max")


BAD = """
--lrs 1e-3 0 | --lrs
--lrs -1 | --lrs
--lrs nan | --lrs
--lrs fast | fast
--seeds 0 | --seeds
--seeds 1e30 | 1e30
--study nope | explore
--vary schedule | FLAG=V1
--vary a,b=1:2,3 | FLAG=V1
--vary lr=1,2 | --lrs
--vary data=a,b | tokenizer
--jobs -1 | --jobs
--lr 1e-3 | --lrs
--report nowhere | nowhere
"""


@pytest.mark.parametrize("line", BAD.strip().split("\n"))
def test_bad_input_is_one_line_and_status_2(tmp_path, run, line):
    flags, expected = line.split(" | ")
    done = run(*flags.split())
    assert done.status == 2
    assert done.err.count("\n") == 1 and expected in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--vary schedule=cosine,zigzag", "--nonsense 1"])
def test_what_train_py_refuses_ends_the_sweep(tmp_path, run, flags):
    done = run(*flags.split())
    assert done.status == 2
    assert done.err.startswith("train.py: ") and done.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_has_groups_defaults_and_says_what_train_py_gets(run):
    done = run("--preset", "moe", "--help")
    assert done.status == 0 and "sent on to train.py" in done.out and "None" not in done.out
    assert "0.065" in done.out and "(default: 3)" in done.out
    for group in ("what to train:", "what to try:", "how to run"):
        assert group in done.out


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path, run):
    done = run(*THREE, "--name", "tiny", FAKE_FAIL="3e-3")
    assert done.status == 1
    assert "out of memory, say" in done.out
    assert "lr0.003-s0: FAILED" in done.out
    assert [row["lr"] for row in rows(tmp_path / "runs/tiny")] == ["0.001", "0.01"]
    assert "only failed runs were left" in analysis(tmp_path / "runs/tiny")
    assert "cannot be read: lr0.003-s0" in analysis(tmp_path / "runs/tiny")
    assert run(*THREE, "--name", "tiny").status == 0   # it is tried again
    assert len(rows(tmp_path / "runs/tiny")) == 3


def test_a_run_that_was_killed_from_outside_is_said_to_have_been(tmp_path, run):
    done = run(*THREE, "--name", "tiny", FAKE_KILL="3e-3")
    assert done.status == 1 and "lr0.003-s0: KILLED by SIGKILL" in done.out
    assert (tmp_path / "runs/tiny/lr0.003-s0/stderr.log").exists()
    assert len(rows(tmp_path / "runs/tiny")) == 2


def test_progress_is_said_while_a_round_runs(tmp_path, run, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: time.perf_counter() * 200)      # ten seconds pass quickly
    done = run(*THREE, FAKE_DELAY="0.02")
    assert "preparing the data" in done.out.splitlines()[0]
    lines = [line for line in done.out.splitlines() if "/36 [" in line]
    assert lines and re.search(r"\d+%\|.*\|", lines[0])
    assert re.search(r"lr0\.0\d+-s0 \d\.\d{3}", " ".join(lines))


def test_dry_run_prints_commands_that_work_anywhere(tmp_path, run):
    flags = ["--lrs", "1e-3", "3e-3", "1e-2", "--seeds", "1", "--dry-run", "--vary", "max-steps=20,40", "--data",
             "a b;'\u06f1\u3000\u732b"]
    done = run(*flags)      # the longer one would read more text, of which another tokenizer would be made
    assert done.status == 2 and "--data-tokens" in done.err and done.err.count("\n") == 1
    flags += ["--data-tokens", str(40 * 4096)]
    lines = run(*flags).out.splitlines()
    assert len(lines) == 6
    assert not (tmp_path / "runs").exists()
    for line in lines:
        assert f"--data-tokens {40 * 4096}" in line
        assert subprocess.run(["sh", "-c", line], cwd="/", capture_output=True).returncode == 0
    dir = next((tmp_path / "runs").iterdir())
    assert run("--report", dir).status == 0
    assert "The search" not in analysis(dir)    # whether it goes on is not known here
    insights = json.loads((dir / "insights.json").read_text())
    assert [s["label"] for s in insights["settings"]] == ["max-steps=20", "max-steps=40"]
    more = run(*flags).out.splitlines()
    assert more and not set(more) & set(lines)   # the next round of the search


def test_a_folder_with_a_name_in_any_script_is_a_folder(tmp_path, run, monkeypatch):
    folder = tmp_path / "\u0646\u0631\u062e\u200c\u0622\u0645\u0648\u0632\u0634 \u5b66\u7fd2\u7387"     # with a zero-width non-joiner
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert run(*THREE, "--name", "\u7387").status == 0 and len(rows(folder / "runs/\u7387")) == 3


# --------------------------------------------------------------------------------------------------
# Comparable, or refused; interrupted, and gone on with

def test_edited_code_is_not_mixed_with_old(tmp_path, run, monkeypatch):
    train = tmp_path / "train.py"
    shutil.copy(FAKE, train)
    monkeypatch.setattr(sweep, "TRAIN", train)
    assert run(*THREE, "--name", "tiny").status == 0
    train.write_text(train.read_text() + "# edited\n")
    done = run(*THREE, "--name", "tiny", "--seeds", "2")
    assert done.status == 2 and "lr0.001-s0 was made with another train.py" in done.err
    assert "--mix-code" in done.err and done.err.count("\n") == 1 and len(list(tmp_path.glob("runs/*/lr*-s*"))) == 3
    assert run(*THREE, "--name", "tiny", "--seeds", "2", "--mix-code").status == 0
    assert len(rows(tmp_path / "runs/tiny")) == 6
    assert "--mix-code" in analysis(tmp_path / "runs/tiny")
    assert run("--report", "runs/tiny").status == 2     # the runs beside each other
    assert run("--report", "runs/tiny", "--mix-code").status == 0


def test_code_that_is_edited_during_the_only_round_is_noticed(tmp_path, run, monkeypatch):
    train = tmp_path / "train.py"
    shutil.copy(FAKE, train)
    monkeypatch.setattr(sweep, "TRAIN", train)
    start_run = sweep.start_run

    def edit_before_the_last(plan, key, slot):
        if key[1] == 1e-2:
            train.write_text(train.read_text() + "# edited\n")
        return start_run(plan, key, slot)
    monkeypatch.setattr(sweep, "start_run", edit_before_the_last)
    done = run(*THREE, "--jobs", "1")
    assert done.status == 2 and "lr0.01-s0 was made with another train.py" in done.err


def test_a_resumed_run_was_made_with_the_code_of_both_days():
    whole = dict(code=dict(a="1", b="2"))
    resumed = dict(name="resumed", config=dict(whole, resumes=[dict(step=3, code=dict(a="1", b="3"))]))
    with pytest.raises(SystemExit):
        sweep.refuse_mixture(resumed, whole, False)
    sweep.refuse_mixture(resumed, whole, True)


def test_runs_of_other_flags_data_or_names_are_refused_before_anything_is_run(tmp_path, run):
    assert run(*THREE, "--name", "tiny").status == 0
    dir = tmp_path / "runs/tiny"
    done = run(*THREE, "--name", "tiny", "--seeds", "2", "--max-steps", "13")
    assert done.status == 2 and "made with another max_steps" in done.err
    done = run(*THREE, "--name", "tiny", "--seeds", "2", "--data", "other")
    assert done.status == 2 and "data" in done.err
    (dir / "lr0.003-s0").rename(dir / "aside")
    shutil.copytree(dir / "lr0.01-s0", dir / "lr0.003-s0")
    done = run(*THREE, "--name", "tiny", "--seeds", "2")
    assert done.status == 2 and "lr0.003-s0 was made with another lr" in done.err
    shutil.rmtree(dir / "lr0.003-s0")
    (dir / "aside").rename(dir / "lr0.003-s0")
    path = dir / "lr0.001-s0/config.json"
    config = json.loads(path.read_text())
    config["data"]["train_sha256"] = "other"
    path.write_text(json.dumps(config))
    for flags in ([*THREE, "--name", "tiny", "--seeds", "2"], ["--report", "runs/tiny"]):
        done = run(*flags)
        assert done.status == 2 and "train_sha256" in done.err and "--mix-code" not in done.err
    assert len(list(dir.glob("lr*-s*"))) == 3


def test_a_run_that_failed_before_its_first_step_counts_for_nothing(tmp_path, run):
    flags = ["--lrs", "1e-3", "--no-widen", "--seeds", "1", "--name", "tiny", "--max-steps", "12"]
    broken = tmp_path / "runs/tiny/lr0.001-s0"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text(json.dumps(dict(args=dict(lr=1e-3, seed=0, max_steps=99), code={"a": "b"},
                                                        data=dict(train_sha256="other"))))
    assert run(*flags).status == 0


def test_damaged_runs_stop_neither_report_nor_sweep(tmp_path, run):
    damage = [("config.json", "{"), ("config.json", "[]"), ("config.json", ""), ("summary.json", "\0\0"),
              ("summary.json", "{}"), ("summary.json", '{"status": "sideways"}'), ("metrics.csv", "")]
    rates = [f"{1 + i}e-3" for i in range(len(damage) + 2)]
    flags = ["--no-widen", "--max-steps", "12", "--seeds", "1", "--jobs", "2", "--name", "tiny", "--lrs", *rates]
    dir = tmp_path / "runs/tiny"
    assert run(*flags).status == 0
    for i, (name, text) in enumerate(damage):
        (dir / f"lr0.00{1 + i}-s0" / name).write_text(text)
    assert run("--report", dir).status == 0
    left_out = [line for line in analysis(dir).splitlines() if line.startswith("Left out")][0]
    for i in range(6):
        assert f"lr0.00{1 + i}-s0" in left_out
    assert "lr0.008-s0" not in left_out
    assert run(*flags).status in (0, 1)


def test_one_sweep_owns_a_folder(tmp_path, run):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    owner = sweep.lock(tmp_path / "runs/tiny")
    done = run(*THREE, "--name", "tiny")
    assert done.status == 2 and f"process {os.getpid()}" in done.err
    owner.close()
    assert run(*THREE, "--name", "tiny").status == 0


def test_three_reports_at_once_all_succeed(tmp_path, run):
    assert run(*THREE, "--name", "tiny").status == 0
    reports = [program(tmp_path, "--report", "runs/tiny") for _ in range(3)]
    assert [report.wait(60) for report in reports] == [0, 0, 0], [report.stderr.read() for report in reports]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, run):
    (tmp_path / "runs").write_text("a file, where the folder should be")
    done = run(*THREE)
    assert done.status == 2 and done.err.splitlines()[-1].startswith("sweep.py: ") and "runs" in done.err


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


def test_stopped_at_random_moments_it_ends_like_one_left_alone(tmp_path, run, monkeypatch):
    flags = ["--seeds", "2", "--jobs", "2", "--no-widen", "--lrs", "1e-3", "2e-3", "4e-3", "--name", "tiny"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert run(*flags).status == 0
    dice = random.Random(0)
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        process = program(tmp_path / "killed", *flags, FAKE_DELAY="0.05")
        while "runs go to" not in process.stdout.readline():
            pass
        time.sleep(dice.uniform(0.2, 0.6))
        process.send_signal(how)
        text = process.communicate(timeout=60)[0]
        if how == signal.SIGKILL:
            time.sleep(0.1)
        else:
            assert process.returncode == 128 + how
            assert "The same command goes on" in text and "FAILED" not in text
        assert sys.platform != "linux" or not orphans(tmp_path / "killed")   # which would go on writing
    monkeypatch.chdir(tmp_path / "killed")
    assert run(*flags).status == 0
    assert rows(tmp_path / "whole/runs/tiny") == rows(tmp_path / "killed/runs/tiny")


SLOW_TO_STOP = """
import json, os, pathlib, signal, sys, time
if "--prepare" in sys.argv:
    print(json.dumps(dict(args=dict(lr=1e-3, max_steps=1), data={}, code={}, devices=["cpu"])))
    sys.exit()
asked = []
def on_signal(number, frame):
    asked.append(number)
    print(*asked, file=open("asked", "w"), flush=True)
    if asked.count(signal.SIGTERM) == 2:
        os._exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, on_signal)
print(os.getpid(), file=open("started", "w"), flush=True)
while True:
    time.sleep(0.05)
"""


def test_every_stop_goes_on_to_the_runs_and_an_ignored_one_stays_ignored(tmp_path):
    train = tmp_path / "slow_to_stop.py"
    train.write_text(SLOW_TO_STOP)
    deaf = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]       # as a shell starts what runs in the background
    process = program(tmp_path, "--lrs", "1e-3", "--no-widen", train=train, before=deaf)
    child = int(wait_for(tmp_path / "started"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "asked")
    assert process.poll() is None   # it waits for the run's checkpoint
    process.send_signal(signal.SIGTERM)     # train.py ends at once at a second one
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    assert (tmp_path / "asked").read_text() == "15 15\n"
    assert out.count("The same command goes on") == 1
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


SLOW_TO_SAVE = """
import fcntl, json, os, pathlib, signal, sys, time
if "--prepare" in sys.argv:
    print(json.dumps(dict(args=dict(lr=1e-3, max_steps=1), data={}, code={}, devices=["cpu"])))
    sys.exit()
out = [word[6:] for word in sys.argv if word.startswith("--out=")][0]
owned = open(os.path.join(out, ".lock"), "a+")      # as train.py owns its folder
fcntl.flock(owned, fcntl.LOCK_EX)
def save(number, frame):
    time.sleep(1.0)
    pathlib.Path("saved").write_text("all of it")
    sys.exit(128 + number)
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, lambda *how: None if "saving" in globals() else (globals().update(saving=1), save(*how)))
pathlib.Path("started").write_text("yes")
while True:
    time.sleep(0.05)
"""


def test_a_stop_of_a_whole_job_is_waited_for_until_its_runs_have_saved(tmp_path):
    """It ends the server of the processes, too, through which the sweep would hear of their end."""
    train = tmp_path / "slow_to_save.py"
    train.write_text(SLOW_TO_SAVE)
    process = program(tmp_path, "--lrs", "1e-3", "--no-widen", train=train, before=["setsid"])
    wait_for(tmp_path / "started")
    os.killpg(os.getpgid(process.pid), signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert (tmp_path / "saved").exists() and "The same command goes on" in out and "Traceback" not in err


def test_losing_the_console_loses_no_run(tmp_path):
    process = program(tmp_path, *THREE, "--name", "tiny")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) in (0, 120)     # 120: Python could not flush what nobody reads
    assert len(rows(tmp_path / "runs/tiny")) == 3


def test_runs_are_shared_out_over_the_devices_that_train_py_names(tmp_path, run):
    """Two GPUs, as fake_train.py says: four runs at once on each, of the tiny preset; elsewhere as many as given."""
    done = run("--lrs", "1e-3", "2e-3", "3e-3", "--no-widen", "--seeds", "1", "--max-steps", "12", "--name", "gpus",
               FAKE_DEVICES="cuda:0 cuda:1")
    assert done.status == 0 and "8 at a time" in done.out
    used = [json.loads(path.read_text())["args"]["device"] for path in tmp_path.glob("runs/gpus/*/config.json")]
    assert len(used) == 3 and set(used) == {"cuda:0", "cuda:1"}
    assert "1 at a time" in run(*ONE, "--preset", "moe", "--name", "cpu").out
    assert "2 at a time" in run(*ONE, "--preset", "moe", "--name", "one", FAKE_DEVICES="cuda:1").out
    assert "1 at a time" in run(*ONE, "--preset", "mine", "--name", "mine", FAKE_DEVICES="cuda:0").out
    assert "1 at a time" in run(*ONE, "--name", "mac", FAKE_DEVICES="mps").out


def test_with_the_real_training_program(tmp_path, run, monkeypatch):
    monkeypatch.setattr(sweep, "TRAIN", ROOT / "train.py")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {a} {b} looked at the {c}.\n" for a in ("red", "old", "sad")
                            for b in ("fox", "cat", "king") for c in ("moon", "tree", "door", "river")) * 60)
    sizes = dict(max_steps=8, d_model=32, n_layers=1, n_heads=2, d_ff=64, vocab_size=300, context_length=16,
                 batch_size=4, eval_tokens=64, sample=0, device="cpu", data=text)
    flags = [str(x) for name, value in sizes.items() for x in ("--" + name.replace("_", "-"), value)]
    flags += ["--lrs", "1e-3", "--no-widen", "--seeds", "1", "--name", "real"]
    done = run(*flags)
    assert done.status == 0, done.out + done.err
    assert [row["steps"] for row in rows(tmp_path / "runs/real")] == ["8"]


def test_rates_and_settings_without_a_seed_in_common_are_not_compared():
    table = {1e-3: {0: 2.0}, 3e-3: {1: 2.5}}
    assert sweep.compare_settings({"a": {1e-3: {0: 2.0}}, "b": {1e-3: {1: 2.1}}}) [0] == "a"
    assert list(sweep.compare_settings({"a": {1e-3: {0: 2.0}}, "b": {1e-3: {1: 2.1}}})[1]) == ["a"]
    text = said({(1e-3, 0): 2.0, (3e-3, 1): 2.5})[0]
    assert "No rate above the best diverged, up to 0.003." in text and verdicts(text)["0.003"]["worse by"] == ""
    assert sweep.compare(table, 1e-3)[3e-3]["verdict"] != "worse"


def test_a_switch_is_varied_by_on_and_off():
    plan = sweep.make_plan(["--vary", "tied=on,off"])
    on, off = [sweep.run_command(plan, (setting, 1e-3, 0)) for setting in plan.settings]
    assert "--tied" in on and "--no-tied" in off
    assert f"--out={Path('runs/tiny-tied/tied-lr0.001-s0')}" in on
