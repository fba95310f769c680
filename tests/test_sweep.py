"""The sweep: what it tries, what it concludes, and that it survives being interrupted. Most tests run fake_train.py
in place of train.py: the same flags and files, losses from a known law, milliseconds a run."""
import argparse
import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sweep
from test_plot import curve

ROOT = Path(__file__).resolve().parent.parent


def run(cwd, *flags, program="tests/fake_train.py", **env):
    env = {**os.environ, "NANOLR_TRAIN": str(ROOT / program), "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([sys.executable, str(ROOT / "sweep.py"), *flags], cwd=cwd,
                          env=env, capture_output=True, text=True, timeout=120)


def table(dir):
    return list(csv.DictReader((dir / "summary_table.csv").open()))


def drive(law, **kw):
    """Runs a search against law(setting, lr, seed) -> (loss, status); returns all results and why it ended."""
    rounds, results = sweep.search(**{"settings": [()], "lrs": [1e-3, 3e-3, 1e-2], **kw}), {}
    keys, ended = sweep.advance(rounds)
    while keys:
        results.update({k: law(*k) for k in keys})
        keys, ended = sweep.advance(rounds, results)
    return results, ended


def valley(best=2e-3, noise=0.0, luck=0.0, seed=0, edge=20, a=0.5, b=1.2, scale=0.25):
    """Losses that rise faster above the optimum than below it (a < b), the same luck for all rates of a seed."""
    def law(setting, lr, s):
        u = math.log(lr / best)
        loss = 3 + scale * (math.exp(-a * u) / a + math.exp(b * u) / b) + random.Random(f"{seed} {s}").gauss(0, luck) \
            + random.Random(f"{seed} {s} {lr} {setting}").gauss(0, noise)
        return (math.inf, "diverged") if lr > edge * best else (loss, "converged")
    return law


# ----------------------------------------------------------------------------------------------------------------------
# What to try

@pytest.mark.parametrize("lrs", [[1e-3, 3e-3, 1e-2], [1e-6, 3e-6], [0.3, 1.0, 3.0], [1e-3]])
def test_widening_brackets_the_optimum_wherever_it_starts(lrs):
    results, why = drive(valley(), lrs=lrs)
    rates = {lr: loss for (_, lr, _), (loss, _) in results.items()}
    best = min(rates, key=rates.get)
    assert best in (1e-3, 3e-3) and min(rates) < best < max(rates)
    assert any(loss == math.inf for loss in rates.values()) and "edge is known" in why


def test_no_widening_and_limits():
    assert sorted(lr for _, lr, _ in drive(valley(), widen=False)[0]) == [1e-3, 3e-3, 1e-2]
    results, why = drive(valley(), lrs=[1e-7, 3e-7], limit=4)
    assert len(results) == 4 and "--max-runs" in why
    results, why = drive(lambda *key: (math.inf, "diverged"), limit=9)
    assert len(results) == 9 and min(lr for _, lr, _ in results) < 1e-5  # all diverge: it only goes down


def test_refine_stays_within_a_factor_two_and_seeds_go_to_survivors():
    grid = [1e-4, 1e-3, 3e-3, 1e-2]
    plain, _ = drive(valley(), lrs=grid)
    results, _ = drive(valley(), lrs=grid, refine=1, seeds=3, limit=60)
    new = [lr for _, lr, s in results if s == 0 and ((), lr, 0) not in plain]
    assert 3 <= len(new) <= 5 and all(0.5 <= lr / 2e-3 <= 2.6 for lr in new)
    seeds = {lr: sorted(s for _, lr2, s in results if lr2 == lr) for _, lr, _ in results}
    near = [lr for lr in seeds if results[(), lr, 0][0] < min(loss for loss, _ in results.values()) + sweep.NEAR]
    assert len(near) >= 4 and all(seeds[lr] == [0, 1, 2] for lr in near)
    assert seeds[max(seeds)] == [0] and seeds[min(seeds)] == [0]


def test_full_study_and_settings_share_seeds():
    schedules = sweep.parse_vary([sweep.SCHEDULES])
    results, _ = drive(valley(), seeds=3, refine=1, schedules=schedules, limit=99)
    rates = {lr for s, lr, _ in results if s in schedules}
    assert len(schedules) == 5 and len(rates) == 1
    assert all((s, lr, seed) in results for s in schedules for lr in rates for seed in range(3))


def test_parsing_of_vary():
    assert sweep.parse_vary([]) == [()]
    assert sweep.parse_vary(["optimizer=adamw,muon", "beta1=0.90"]) == [
        (("optimizer", "adamw"), ("beta1", "0.9")), (("optimizer", "muon"), ("beta1", "0.9"))]
    assert sweep.parse_vary(["warmup_ratio,min-lr-ratio=0.1:0,0:0.1"]) == [
        (("warmup-ratio", "0.1"), ("min-lr-ratio", "0")), (("warmup-ratio", "0"), ("min-lr-ratio", "0.1"))]
    assert len(sweep.STUDIES["wide"]["lrs"]) == len(set(sweep.STUDIES["wide"]["lrs"])) == 26
    assert len(sweep.STUDIES["extend"]["around"]) == 11 and len(sweep.STUDIES["fine"]["lrs"]) == 9


# ----------------------------------------------------------------------------------------------------------------------
# Statistics

def test_student_t():
    known = {(0.975, 1): 12.7062, (0.975, 2): 4.3027, (0.975, 10): 2.2281, (0.99, 5): 3.3649, (0.975, 1000): 1.9623}
    assert all(abs(sweep.t_quantile(*k) / v - 1) < 1e-3 for k, v in known.items())


def test_block_means_take_out_the_luck_of_a_seed():
    luck = {0: 0.0, 1: 0.5, 2: -0.2}
    full = {lr: {s: loss + luck[s] for s in luck} for lr, loss in ((1e-3, 3.0), (3e-3, 2.9))}
    means, residuals, df = sweep.block_means({**full, 1e-2: {1: 3.2 + luck[1]}, 1.0: {0: math.inf}})
    assert means == pytest.approx({1e-3: 3.1, 3e-3: 3.0, 1e-2: 3.3}) and df == 2 and abs(residuals).max() < 1e-9


def test_compare_is_the_paired_t_interval():
    a, b = {0: 3.00, 1: 3.10, 2: 2.95}, {0: 3.01, 1: 3.13, 2: 2.97}
    c = sweep.compare(a, b, *sweep.noise_of({"a": a, "b": b}))
    d = np.array([-0.01, -0.03, -0.02])
    half = 4.3027 * d.std(ddof=1) / 3 ** 0.5
    assert (c["low"], c["high"]) == pytest.approx((-0.02 - half, -0.02 + half), abs=1e-5)
    assert not c["shown"] and c["seeds_needed"] == 4
    text = sweep.sentence("conservative", "baseline", c)
    assert text == ("conservative beats baseline by 0.0200 nats, interval [-0.0048, 0.0448]: not shown by 3 seeds; "
                    "about 4 would be needed")
    assert "one seed" in sweep.sentence("a", "b", sweep.compare({0: 3.0}, {0: 3.1}, math.nan, 0))
    assert sweep.compare({s: 3.0 + s for s in range(3)}, {s: 3.1 + s + s / 1000 for s in range(3)}, 0.001, 2)["shown"]


def test_a_run_is_judged_beside_the_best(tmp_path):
    runs = [dict(dir=tmp_path, train={"train_loss": curve(kind, 100)},
                 summary=dict(status="converged", final_val_loss=loss))
            for kind, loss in (("good", 3.0), ("starved", 6.4), ("stuck", 6.2))]
    runs += [dict(dir=tmp_path, train={}, summary={}), dict(dir=tmp_path, train={}, summary=dict(status="diverged"))]
    assert [r["status"] for r in sweep.judge(runs)] == ["converged", "slow", "diverged", "running", "diverged"]
    assert [r["loss"] for r in runs] == [3.0, 6.4, math.inf, None, math.inf]


def test_several_settings_are_compared_together(tmp_path):
    """The winner of four schedules against each other one: intervals that hold for all three comparisons at once."""
    ratios = (0.05, 0, 0.2, 0.15)
    losses = {(i, s): 3 + 0.02 * i + 0.03 * s + 0.004 * ((i * s) % 3) for i in range(4) for s in range(3)}
    runs = [dict(dir=tmp_path, name=f"{i}-{s}", lr=1e-3, seed=s, train={}, val={},
                 args=dict(lr=1e-3, seed=s, warmup_ratio=ratios[i], beta1=0.9),
                 summary=dict(status="converged", seconds=6.0, final_val_loss=loss))
            for (i, s), loss in losses.items()]
    insights = sweep.analyse(runs)
    losses = {r["setting"]: {q["seed"]: q["loss"] for q in runs if q["setting"] == r["setting"]} for r in runs}
    assert set(losses) == {f"warmup-ratio {w}" for w in ratios}   # named by what differs between the runs
    for c in insights["comparisons"]:
        again = sweep.compare(losses["warmup-ratio 0.05"], losses[c["worse"]], *sweep.noise_of(losses), 3)
        assert c["better"] == "warmup-ratio 0.05" and (c["low"], c["high"]) == (again["low"], again["high"])
    assert sweep.label({"warmup-ratio": "0.1", "min-lr-ratio": "0.05"}) == "conservative"
    assert insights["use"]["setting"] == "warmup-ratio 0.05" == insights["best"]["setting"]
    twice = runs + [dict(r, name=f"again-{r['name']}") for r in runs]  # under two names, as after a plain sweep
    assert sweep.analyse(twice) == insights and len(twice) == len(runs)
    # settings compared at one rate of a swept one leave the rate to that one, also when one of them is ahead
    runs += [dict(runs[3], name=f"swept-{lr}", lr=lr, args=dict(runs[3]["args"], lr=lr), train={},
                  summary=dict(status="converged", seconds=6.0, final_val_loss=3.5)) for lr in (3e-4, 3e-3)]
    insights = sweep.analyse(runs)
    assert insights["best"]["setting"] == "warmup-ratio 0.05" and insights["use"]["setting"] == "warmup-ratio 0"
    text = sweep.words(insights, {})
    assert "with warmup-ratio 0" in text.split("\n\n")[1] and "warmup-ratio 0.05 did best" in text


def test_it_seldom_calls_equal_settings_different():
    """Five equal settings, 3 seeds, the winner picked after the fact: a claim in at most 8 of 100 studies."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        losses = rng.normal(0, 0.03, (1, 3)) + rng.normal(0, 0.01, (5, 3))
        rows = {i: dict(enumerate(row)) for i, row in enumerate(losses.tolist())}
        best = min(rows, key=lambda i: sum(rows[i].values()))
        wrong += any(sweep.compare(rows[best], rows[i], *sweep.noise_of(rows), 4)["shown"] for i in rows if i != best)
    assert wrong <= 16


@pytest.mark.parametrize("seeds,refine,noise,a,b", [
    (3, 0, 0.01, 0.5, 1.2),    # a half-decade grid: between its points the shape is a guess
    (5, 1, 0.003, 0.3, 2.0),   # hardly any noise, very lopsided: the shape decides
    (2, 1, 0.05, 0.8, 0.8),    # much noise, few seeds
    (3, 2, 0.05, 0.8, 0.8),    # rates so close that noise picks the best of them
    (1, 1, 0.01, 0.5, 1.2), (1, 0, 0.01, 0.5, 1.2)])
def test_intervals_contain_the_known_optimum(seeds, refine, noise, a, b):
    """Whole searches (grid, widening, zoom, seeds to survivors) on noisy valleys: 90 of 100 intervals are right."""
    hits, widths = 0, []
    for trial in range(100):
        best = 10 ** random.Random(trial).uniform(-3, -2)
        results, _ = drive(valley(best, noise, 0.03, trial, a=a, b=b), seeds=seeds, refine=refine, limit=90)
        losses = {}
        for (_, lr, s), (loss, _) in results.items():
            losses.setdefault(lr, {})[s] = loss
        o = sweep.optimum(losses, draws=400)
        hits += o["low"] <= best <= o["high"]
        widths.append(o["high"] / o["low"])
    print(f"seeds {seeds}, refine {refine}, noise {noise}, slopes {a} {b}: {hits} of 100 intervals hold the optimum, "
          f"median width a factor {np.median(widths):.2f}")
    assert hits >= 90
    assert np.median(widths) < (2.6 if seeds > 1 else 12)  # an interval that always says "somewhere" is no answer


def test_optimum_at_the_end_of_the_grid_is_not_invented():
    o = sweep.optimum({1e-3: {0: 3.0}, 3e-3: {0: 2.9}, 1e-2: {0: 2.8}})
    assert not o["fitted"] and o["lr"] == 1e-2 and o["low"] == 3e-3
    o = sweep.optimum({1e-3: {0: 3.0}, 3e-3: {0: 2.9}, 1e-2: {0: math.inf}})
    assert (o["lr"], o["low"], o["high"]) == (3e-3, 1e-3, 1e-2)
    assert sweep.optimum({1e-3: {0: math.inf}}) is None


# ----------------------------------------------------------------------------------------------------------------------
# The program

def test_a_sweep_end_to_end(tmp_path):
    done = run(tmp_path, "--jobs", "2", "--seeds", "3", "--max-steps", "30")
    assert done.returncode == 0, done.stderr
    dir = tmp_path / "runs/tiny-max-steps-30"
    names = {p.name for p in dir.iterdir() if p.is_file()}
    assert names >= {"lr_sweep_comparison.png", "lr_vs_final_loss.png", "detailed_comparison.png", "lr_schedules.png",
                     "summary_table.csv", "summary_table.png", "insights.json", "lr_sweep_analysis.md", "sweep.json"}
    assert not any(n.endswith(".tmp") for n in names) and not list(dir.glob("*/stderr.log"))
    assert (dir / "lr0.003-s0/loss_curves.png").exists()
    insights = json.loads((dir / "insights.json").read_text())
    setting = insights["settings"][0]
    assert setting["bracketed"] and setting["edge"]["lr"] > insights["best"]["lr"]
    assert insights["use"]["low"] <= 2e-3 <= insights["use"]["high"]
    text = (dir / "lr_sweep_analysis.md").read_text()
    assert text.split("\n")[2].startswith("**Use ") and "3 seeds" in text and "The edge" in text
    rows = table(dir)
    assert len(rows) == insights["runs"] and not any("sec" in c or "time" in c for c in rows[0])
    assert {r["status"] for r in rows} >= {"converged", "diverged"}
    again = run(tmp_path, "--jobs", "2", "--seeds", "3", "--max-steps", "30")
    assert again.returncode == 0 and "were finished before" in again.stdout
    other = run(tmp_path, "--name", "tiny-max-steps-30", "--max-steps", "31")
    assert other.returncode == 2 and "--max-steps was 30, is 31" in other.stderr and other.stderr.count("\n") == 1


def test_one_seed_says_what_it_cannot_show(tmp_path):
    flags = ["--lrs", "1e-3,3e-3", "1e-2", "--no-widen", "--vary", "schedule=cosine,constant"]
    assert run(tmp_path, *flags).returncode == 0
    text = (tmp_path / "runs/tiny-schedule/lr_sweep_analysis.md").read_text()
    assert "cannot show" in text and "not shown, one seed has no interval" in text and "shown by" not in text
    assert "95%" not in text.split("##")[0] and len(table(tmp_path / "runs/tiny-schedule")) == 6


@pytest.mark.parametrize("flags,words", [
    (["--lrs", "1e-3,0"], "--lrs 0"), (["--lrs", "-1"], "--lrs"), (["--lrs", "nan"], "--lrs nan"),
    (["--lrs", "fast"], "not a number"), (["--seeds", "0"], "--seeds 0"), (["--study", "nope"], "explore"),
    (["--vary", "schedule"], "FLAG=V1"), (["--vary", "a,b=1:2,3"], "FLAG=V1"), (["--vary", "lr=1,2"], "--lrs"),
    (["--jobs", "0"], "--jobs 0"), (["--jobs", "x"], "--jobs x"), (["--preset", "huge"], "huge"),
    (["--lr", "1e-3"], "--lrs"), (["--max-runs", "2"], "--max-runs 2"), (["--schedule", "zigzag"], "zigzag"),
    (["--nonsense", "1"], "--nonsense"), (["extra"], "extra")])
def test_bad_input_is_one_line_and_status_2(tmp_path, flags, words):
    done = run(tmp_path, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path):
    done = run(tmp_path, "--lrs", "1e-3,3e-3,1e-2", "--no-widen", FAKE_FAIL="3e-3")
    assert done.returncode == 1 and "out of memory, say" in done.stdout and "lr0.003-s0" in done.stdout
    assert [r["lr"] for r in table(tmp_path / "runs/tiny")] == ["0.001", "0.01"]
    assert "Failed: lr0.003-s0" in (tmp_path / "runs/tiny/lr_sweep_analysis.md").read_text()
    assert run(tmp_path, "--lrs", "1e-3,3e-3,1e-2", "--no-widen").returncode == 0   # it is tried again
    assert len(table(tmp_path / "runs/tiny")) == 3


def test_dry_run_prints_commands_that_work_anywhere(tmp_path):
    flags = ["--lrs", "1e-3,3e-3,1e-2", "--seeds", "2", "--dry-run", "--vary", "schedule=cosine"]
    done = run(tmp_path, *flags)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 6 and not (tmp_path / "runs").exists()
    for line in lines:
        assert subprocess.run(["sh", "-c", line], cwd="/", capture_output=True).returncode == 0
    command = [sys.executable, str(ROOT / "plot.py"), "runs/tiny-schedule"]
    drawn = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert drawn.returncode == 0 and "lr_vs_final_loss.png" in drawn.stdout and len(table(tmp_path / "runs/tiny-schedule")) == 6
    clash = run(tmp_path, *flags, "--max-steps", "99", "--name", "tiny-schedule")
    assert clash.returncode == 2 and "--max-steps was 40, is 99" in clash.stderr
    more = run(tmp_path, *flags).stdout.splitlines()
    assert more and not set(more) & set(lines)   # the next round of the search


def test_a_closed_pipe_ends_a_dry_run_quietly(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "sweep.py", "--dry-run", "--seeds", "400"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # more lines than a pipe holds
    assert b"train.py" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == b""


def test_killed_at_random_moments_it_ends_like_one_left_alone(tmp_path):
    flags = ["--seeds", "2", "--jobs", "2"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "whole", *flags).returncode == 0
    env = dict(os.environ, NANOLR_TRAIN=str(ROOT / "tests/fake_train.py"), FAKE_DELAY="0.004", CUDA_VISIBLE_DEVICES="")
    dice, kills = random.Random(0), 0
    for how in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        p = subprocess.Popen([sys.executable, str(ROOT / "sweep.py"), *flags],
                             cwd=tmp_path / "killed", env=env, stdout=subprocess.PIPE, text=True)
        try:
            p.wait(dice.uniform(0.4, 1.0))
        except subprocess.TimeoutExpired:
            p.send_signal(how)
            kills += 1
            text = p.communicate(timeout=30)[0]
            if how != signal.SIGKILL:
                assert p.returncode == 0 or p.returncode == 130 and "To go on: python sweep.py --seeds 2" in text
        time.sleep(0.1)
        if sys.platform == "linux":
            assert not orphans(tmp_path / "killed")   # which would go on writing
    assert kills >= 3
    assert run(tmp_path / "killed", *flags).returncode == 0
    whole, killed = ((tmp_path / name / "runs/tiny/summary_table.csv").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def orphans(cwd):
    """Ids of the fake training processes that run in this folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/cwd") == str(cwd) and "fake_train" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
        except OSError:   # it has just ended
            pass
    return found


def test_a_steep_valley_still_has_its_noise():
    """Neighbours half a nat above the best are not near it, but it takes them to know the noise."""
    rng = random.Random(0)
    table = {lr: {s: loss + rng.gauss(0, 0.02) for s in range(3)} for lr, loss in ((1e-3, 4.6), (3e-3, 4.2), (1e-2, 4.7))}
    table |= {3e-4: {0: 5.7}, 3e-2: {0: 5.9}}
    noise, df = sweep.near_noise(table)
    assert df == 4 and 0.005 < noise < 0.05 and sweep.near_best(table) == [1e-3, 3e-3, 1e-2]
    assert sweep.near_noise({lr: {0: row[0]} for lr, row in table.items()}) == (0.0, 0) == sweep.near_noise({})


def test_stop_hopeless_ends_beaten_runs(tmp_path):
    done = run(tmp_path, "--lrs", "2e-3,5e-2", "--no-widen", "--stop-hopeless", "--jobs", "1", "--max-steps", "60",
               FAKE_DELAY="0.04")
    assert done.returncode == 0, done.stderr + done.stdout
    rows = {r["lr"]: r for r in table(next((tmp_path / "runs").iterdir()))}
    assert rows["0.05"]["status"] == "stopped" and rows["0.002"]["status"] == "converged"
    assert int(rows["0.05"]["steps"] or 0) < 60


def test_jobs_and_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert sweep.visible_gpus() == ["2", "5"] and sweep.visible_gpus("cpu") == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\ncase $1 in -L) echo 'GPU 0: H'; echo 'GPU 1: H';; *) echo 9000; echo 80000;; esac\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sweep.visible_gpus() == ["0", "1"]
    assert sweep.auto_jobs("tiny", ["0", "1"]) == (8, 0) and sweep.auto_jobs("dense", []) == (1, 0)
    assert sweep.auto_jobs("tiny", []) == (1 if sys.platform == "darwin" else min(8, os.cpu_count()), 0)
    assert sweep.auto_jobs("dense-low", ["0", "1"]) == (2, 0)   # 9,000 MiB are free: room for one run of 6 GiB
    smi.write_text("#!/bin/sh\necho 24000\n")
    assert sweep.auto_jobs("dense", ["0"]) == (1, 0)            # 23 GiB: no room for a second run, not even while the first ends
    smi.write_text("#!/bin/sh\necho 80000\n")
    assert sweep.auto_jobs("dense", ["0"]) == (1, 15) and sweep.auto_jobs("dense-low", ["0"]) == (8, 0)
    assert sweep.auto_jobs("moe", ["0", "1"]) == (4, 0)


@pytest.mark.parametrize("active, lead, free", [
    ([], 0, [0, 1]), ([(0, 3.0)], 0, [1]), ([(0, 3.0)], 15, [0, 1]), ([(0, 30.0), (1, math.inf)], 15, []),
    ([(0, 3.0), (0, math.inf), (1, 20.0)], 15, []), ([(0, 3.0), (0, 14.0), (1, 9.0)], 15, [1])])  # two a slot, never three
def test_slots(active, lead, free):
    jobs = [argparse.Namespace(slot=slot, left=left) for slot, left in active]
    assert sweep.free_slots(jobs, 2, lead) == free


def test_on_a_gpu_the_next_run_starts_while_one_ends(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 80000\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    flags, path = ["--preset", "dense", "--no-widen", "--lrs", "1e-3", "2e-3", "3e-3"], f"{tmp_path}:{os.environ['PATH']}"
    done = run(tmp_path, *flags, CUDA_VISIBLE_DEVICES="0", FAKE_DELAY="0.12", PATH=path)
    assert done.returncode == 0 and "1 at a time on 1 GPU" in done.stdout, done.stderr
    runs = [tmp_path / "runs/dense" / f"lr{lr}-s0" for lr in ("0.001", "0.002", "0.003")]
    begun, ended = ([(r / name).stat().st_mtime for r in runs] for name in ("config.json", "summary.json"))
    assert begun[0] < begun[1] < ended[0] < begun[2] < ended[1]  # two overlap, never three


def test_time_left_of_a_run_that_was_killed_and_goes_back_to_its_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(args=dict(lr=1e-3, seed=0, max_steps=100))))
    bar = sweep.tqdm(disable=True)
    plan = argparse.Namespace(bar=bar, started=1, stop_hopeless=False)
    job = argparse.Namespace(key=((), 1e-3, 0), out=tmp_path, begun=time.time() - 10, first=math.inf, step=0, left=math.inf)
    for steps, left in ((60, math.inf), (50, math.inf), (75, 10)):   # of a second life: 25 steps in 10 s, 25 to go
        (tmp_path / "metrics.csv").write_text("step,train_loss,val_loss\n" + "".join(f"{i},2.0,\n" for i in range(1, steps + 1)))
        sweep.watch(plan, job, False, bar)
        assert job.left == pytest.approx(left, abs=0.5)


def test_with_the_real_training_program(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {a} {b} looked at the {c}.\n" for a in ("red", "old", "sad")
                            for b in ("fox", "cat", "king") for c in ("moon", "tree", "door", "river")) * 60)
    sizes = dict(max_steps=8, d_model=32, n_layers=1, n_heads=2, d_ff=64, vocab_size=300, context_length=16,
                 batch_size=4, eval_tokens=64, sample=0, device="cpu", data=text)
    flags = [str(x) for name, value in sizes.items() for x in ("--" + name.replace("_", "-"), value)]
    flags += ["--lrs", "1e-3", "1e-2", "--no-widen", "--jobs", "2", "--name", "real"]
    done = run(tmp_path, *flags, program="train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["steps"] for r in table(tmp_path / "runs/real")] == ["8", "8"]
    assert (tmp_path / "runs/real/lr0.01-s0/lr_schedule.png").exists()
