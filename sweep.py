"""Sweep the learning rate: one process a run; decide what to try next; say what the runs show, and what not.

    python sweep.py                             the tiny preset: bracket the best rate, find the edge, report
    python sweep.py --preset moe --seeds 3      flags unknown here (--max-steps 400) go on to train.py
    python sweep.py --vary optimizer=adamw,muon any train.py flag, each value at its own best rate
    python sweep.py --dry-run                   the next round's commands, one a line: Slurm, xargs, Ray

The search is a function from the results to the next runs: an interrupted sweep replays it and goes on. Loss
against log rate is assumed to fall to one valley and rise again. A seed gives every rate the same initial
weights and batches, so that differences between rates are paired: its luck drops out (tests/simulate.py).

    noise     residuals of loss[rate, seed] - mean of the rate - mean of the seed (Fisher 1935), near the best
    shown     a rate is worse where its mean paired difference to the best exceeds t(df) s / sqrt(seeds): s is
              sqrt(2) noise, or the deviation of the differences if larger; t stands at 1 - 0.025 / k for k
              rates compared (Bonferroni). One that diverged with two seeds, all of them, is worse too
    interval  the optimum lies between the nearest rates shown to be worse, below and above all that are not
              and all local valleys that may be deeper. One seed knows no noise: 0.1 nats stand in
    settings  are compared at their best rates. What a finer grid could still gain widens the interval of the
              difference: the lowest that a convex valley through the tried rates could be between them
"""
import argparse
import csv
import ctypes
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from functools import cache
from math import comb, inf, isfinite, log, nan, pi, sqrt, tan
from pathlib import Path

import numpy as np

import plot
from data import DataError, cores, lock, write_aside

TRAIN = Path(os.environ.get("NANOLR_TRAIN") or Path(__file__).with_name("train.py")).resolve()
GRIDS = {   # where the search starts
    "tiny": [1e-3, 3e-3, 1e-2, 3e-2, 0.3],
    "dense": [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2],
    "dense-low": [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2],
    "moe": [0.01, 0.02, 0.035, 0.05, 0.065, 0.085, 0.1, 0.15, 0.3],
}
# A textbook run: one fixed batch, a constant rate, nothing that hides the edge of stability.
TEXTBOOK = ("--full-batch --batch-size 8 --context-length 64 --max-steps 400 --schedule constant "
            "--warmup-ratio 0 --grad-clip 0 --weight-decay 0 --dtype float32 --sharpness 10 --log-interval 1 "
            "--eval-interval 400 --eval-tokens 2048 --momentum 0 --optimizer ")
STUDIES = {     # only these rates (--no-widen): flags of the sweep, which yours override, and of train.py
    "explore": ("--lrs 0.001 0.01 0.03 0.1 0.3", "--max-steps 50"),
    "extend": ("--around 0.15 0.3 0.5 0.7 0.8 1 1.2 1.5 2 3 5", "--max-steps 100"),
    "fine": ("--lrs 0.06 0.07 0.08 0.09 0.1 0.11 0.12 0.13 0.14", "--max-steps 75"),
    "wide": ("--lrs 0.001 0.002 0.003 0.004 0.006 0.008 0.01 0.015 0.02 0.03 0.04 0.05 0.065 0.08 "
             "0.1 0.13 0.16 0.2 0.25 0.3 0.4 0.5 0.6 0.7 0.85 1.0", ""),
    "schedules": ("--around 1 --seeds 3 "   # conservative, baseline, none, aggressive, long
                  "--vary warmup-ratio,min-lr-ratio=0.1:0.05,0.05:0.1,0:0.1,0.02:0.2,0.2:0.1", ""),
    "edge": ("--lrs 0.004 0.01 0.025 0.06 0.15 0.4 1.0 2.5", TEXTBOOK + "sgd"),
    "edge-adamw": ("--lrs 1e-4 3e-4 1e-3 3e-3 1e-2 1e-1", TEXTBOOK + "adamw"),
}
PER_GPU = {"tiny": 4, "dense": 1, "dense-low": 8, "moe": 2}     # runs at once, measured on an H100
NEAR = 0.1      # nats, 10% perplexity: stands in for the noise where there is one seed
WORTH = 0.03    # nats that a finer grid must promise before one setting is searched closer than a factor 2

# Statistics: functions of a table {rate: {seed: loss}}; inf is the loss of a run that diverged ---

@cache
def t_quantile(p, df):
    """Student's t. With t = sqrt(df) tan(a) its density becomes cos(a)^(df - 1), which a sum integrates."""
    angle = np.linspace(0, pi / 2, 5_001)
    density = np.cos(angle) ** (df - 1)
    cdf = np.cumsum(density) - (density + 1) / 2    # the trapezoid rule, without its factor
    return sqrt(df) * tan(np.interp(2 * p - 1, cdf / cdf[-1], angle))

def mean(values):
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else nan

def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else nan

def paired(row, other):
    """Differences row - other, {seed: loss} each, over the seeds that survived in both."""
    differences = [loss - other.get(seed, inf) for seed, loss in row.items()]
    return [d for d in differences if isfinite(d)]

def rise(row, other):
    return mean(paired(row, other) or [inf])

def best_rate(table):
    """The lowest mean of the rates that survived in all their seeds and have the most; None: none did."""
    means = {lr: (-len(row), mean(row.values())) for lr, row in table.items() if max(row.values()) < inf}
    return min(means, key=means.get, default=None)

def neighbours(table, lr):
    rates = sorted(table)
    i = rates.index(lr)
    return rates[max(0, i - 1):i] + rates[i + 1:i + 2]  # below and above, those that exist

def noise_near(table, best):
    """Sum of squared two-way residuals (nats^2) and df, of the three best rates or all within NEAR."""
    rows = [[row.get(seed, inf) for seed in table[best]] for row in table.values()]
    rows = sorted((row for row in rows if max(row) < inf), key=mean)
    near = sum(mean(row) < mean(rows[0]) + NEAR for row in rows)
    x = np.array(rows[:max(3, near)])      # (rates, seeds)
    residuals = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    return np.array([np.sum(residuals ** 2), np.prod(np.subtract(x.shape, 1))])

def half_width(differences, noise, k, unknown):
    """Half the interval of a mean difference, one of k that hold together; unknown: without noise."""
    squares, df = noise
    if not df:
        return unknown
    spread = np.nanmax([sqrt(2 * squares / df), deviation(differences)])
    return float(t_quantile(1 - 0.025 / k, df) * spread / sqrt(len(differences)))

def finer_gains(table, lr):
    """{neighbour: nats by which the loss between it and this rate could be lower still}: a convex valley lies
    above the chords before and after the gap, extended. At an end of the grid: inf, the loss can be any."""
    around = neighbours(table, lr)
    if len(around) < 2:
        return dict.fromkeys(around, inf)
    points = [(log(rate / lr), max(0, rise(row, table[lr]))) for rate, row in sorted(table.items())]
    points = [point for point in points if point[1] < inf]  # (log rate, nats)
    gains = {}
    for near in around:
        gap = np.linspace(0, log(near / lr), 200)
        before = [point for point in points if point[0] <= gap.min()]
        after = [point for point in points if point[0] >= gap.max()]
        chords = [chord for chord in (before[-2:], after[:2]) if len(chord) == 2]
        lines = [np.polyval(np.polyfit(*np.transpose(chord), 1), gap) for chord in chords]
        gains[near] = max(0, -np.max(lines, axis=0, initial=-inf).min())
    return gains

def compare_rates(table, best):
    """-> {rate: is it shown to be worse than the best}, where that is known; the rates near which the optimum
    may lie; the nearest that are worse around these, or 0 and inf."""
    noise = noise_near(table, best)
    pairs = {lr: paired(row, table[best]) for lr, row in table.items() if lr != best}
    k = sum(len(d) > 1 for d in pairs.values())
    shown = {best: False}
    near = [best]
    for lr, d in pairs.items():
        if not d:   # it diverged, which with one seed of several may be bad luck
            if len(table[lr]) > 1 or len(table[best]) == 1:
                shown[lr] = True
            continue
        half = half_width(d, noise, k, NEAR)
        shown[lr] = mean(d) > half
        gain = 0
        if all(0 < rise(table[x], table[lr]) < inf for x in neighbours(table, lr)):
            gain = max(finer_gains(table, lr).values())     # a valley of its own, whose bottom may be lower
        if mean(d) <= half + gain:
            near.append(lr)
    low = max((lr for lr, worse in shown.items() if worse and lr < min(near)), default=0)
    high = min((lr for lr, worse in shown.items() if worse and lr > max(near)), default=inf)
    return shown, sorted(near), low, high

def compare_settings(tables, margin):
    """{label: table} -> the best label (None: all diverged), its comparisons with others (insights.json)."""
    rows, gain, noise = {}, {}, np.zeros(2)
    for label, table in tables.items():
        best = best_rate(table)
        if best:
            rows[label] = table[best]
            gain[label] = max(finer_gains(table, best).values(), default=0)
            noise += noise_near(table, best)
    winner = min(rows, key=lambda label: mean(rows[label].values()), default=None)
    if rows and not noise[1]:   # one rate each: the noise is what remains between settings
        noise = noise_near(rows, winner)
    comparisons = []
    for label, row in rows.items():
        d = paired(row, rows[winner])
        if label == winner or not d:
            continue
        half = half_width(d, noise, comb(len(rows), 2), inf)    # the best came out of all pairs
        low = mean(d) - half - gain[label]
        high = mean(d) + half + gain[winner]
        verdict = "shown" if low > 0 else "not shown"
        if max(-low, high) < margin:
            verdict = "same"
        comparisons.append(dict(better=winner, worse=label, difference=mean(d), low=low, high=high,
                                seeds=len(d), verdict=verdict))
    return winner, comparisons

# What to run next ---------------------------------------------------------------------------------

def stages(table, plan):
    """What one setting wants, lists of (rate, seed): the first of them that asks for something new is run."""
    yield [(lr, 0) for lr in plan.lrs]
    # Outward, until the best has worse neighbours on both sides, and a rate above it diverges.
    best = best_rate(table)
    rates = []
    if plan.widen and table and best in (None, min(table)):
        rates.append(float(f"{min(table) / 3:.0e}"))
    if plan.widen and best and not any(lr > best and inf in row.values() for lr, row in table.items()):
        rates.append(float(f"{max(table) * 3.3:.0e}"))
    # Between the best and its neighbours, until both are within a factor of 2, or closer where that pays.
    wanted = best and (plan.widen or plan.refine) and len(neighbours(table, best)) == 2
    gains = finer_gains(table, best) if wanted else {}
    for lr, gain in gains.items():
        limit = 2.05    # rates have two digits
        if len(plan.settings) > 1 and gain > plan.margin / 2:   # it blurs their difference
            limit = 1.25
        elif gain > WORTH and len(table[best]) == 1 and max(table[lr].values()) < inf:
            limit = 1.4
        if abs(log(lr / best)) > log(limit) / 2 ** plan.refine:     # each halves the log distance
            rates.append(float(f"{np.clip(sqrt(best * lr), best / 2, best * 2):.2g}"))
    yield [(lr, 0) for lr in rates]
    # Seeds for the best and its neighbours, then for all not shown to be worse, with the next ones outside.
    rates = [best, *neighbours(table, best)] if best else []
    if best and len(table[best]) > 1:
        shown, near, _, _ = compare_rates(table, best)
        outside = neighbours(table, near[0])[:1] + neighbours(table, near[-1])[-1:]
        rates = near + [lr for lr in outside if lr not in shown]
    yield [(lr, seed) for lr in rates for seed in range(plan.seeds)
           if seed < 2 or min(table[lr].values()) < inf]   # two that diverged are enough

def tables_of(results):
    """{(setting, rate, seed): loss} -> {setting: table}, without the failed runs, whose loss is None."""
    tables = {}
    for (setting, lr, seed), loss in results.items():
        if loss is not None:
            tables.setdefault(setting, {}).setdefault(lr, {})[seed] = loss
    return tables

def next_runs(results, plan):
    """The search: {(setting, rate, seed): loss} of all asked for so far (inf: diverged, None: failed) -> the
    next of them, and why it ended (None: it goes on)."""
    tables = tables_of(results)
    keys = []
    for setting in plan.settings:
        for stage in stages(tables.get(setting, {}), plan):
            new = [(setting, *pair) for pair in dict.fromkeys(stage) if (setting, *pair) not in results]
            if new:
                keys += new
                break
    if keys and len(results) < plan.max_runs:
        return keys[:plan.max_runs - len(results)], None
    if keys:
        return [], f"ended at the limit of {plan.max_runs} runs (--max-runs), before all that it wanted"
    if None in results.values():
        return [], "ended without the runs that failed; the same command tries them again"
    return [], "ran all that its plan asks for"

# The folders of runs: how each run ended, and which may be compared -------------------------------

def die(message):
    print(f"sweep.py: {message}", file=sys.stderr)
    raise SystemExit(2)

def run_name(key):
    setting, lr, seed = key     # optimizer=muon-lr0.003-s0
    return re.sub(r"[^\w.+=,-]+", "_", f"{','.join(setting)}-lr{lr:g}-s{seed}".lstrip("-"))

def refuse_mixture(runs, mix_code):
    """Dies at runs of other data than the first's or, without mix_code, of other code than there is now."""
    now = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in TRAIN.parent.glob("*.py")}
    mixed = {}  # run: what has changed since it began
    for run in runs:
        began = {}
        if not mix_code:
            began.update(run["config"].get("code") or {})
        data = run["config"].get("data")
        if data:    # else config.json is damaged
            began["data"] = data.get("train_sha256"), data.get("val_sha256")
            now.setdefault("data", began["data"])
        changed = [name for name in began if began[name] != now.get(name)]
        if changed:
            mixed[run["name"]] = changed
    if mixed:
        names = textwrap.shorten(", ".join(mixed), 200, placeholder=" ...")
        other = sorted(set().union(*mixed.values()))
        advice = "" if mix_code or "data" in other else ", or mix old and new with --mix-code"
        die(f"{names} began with other {', '.join(other)}; choose another --name{advice}")

def judge(runs):
    """Sets loss and status of each run, beside the best: inf where it diverged, None where it goes on."""
    for run in runs:
        run["loss"] = None
        if run["status"] == "diverged":
            run["loss"] = inf
        elif run["status"] in plot.STATUSES and isinstance(run["summary"].get("final_val_loss"), float):
            run["loss"] = run["summary"]["final_val_loss"]
    alive = [run for run in runs if run["loss"] not in (None, inf) and len(run["train"]["train_loss"])]
    best = min(alive, key=lambda run: run["loss"], default=None)
    for run in alive:
        run["status"] = plot.classify(run["train"]["train_loss"], np.median(best["train"]["train_loss"][-5:]))
        if run["status"] == "diverged":
            run["loss"] = inf

def losses(runs, keys):
    """{key: loss} of these among the runs, judged beside each other here; None: not finished or begun."""
    names = {run_name(key): key for key in keys}
    found = [run for run in runs if run["name"] in names]
    judge(found)
    return dict.fromkeys(keys) | {names[run["name"]]: run["loss"] for run in found}

# Processes ----------------------------------------------------------------------------------------

# A child has a session of its own: Ctrl-C reaches the sweep alone, which passes it on. On Linux it dies with
# its parent (PR_SET_PDEATHSIG is 1): a killed sweep leaves no run beside its successor's.
CHILD = dict(stdin=subprocess.DEVNULL, start_new_session=True)
if sys.platform == "linux":
    LIBC = ctypes.CDLL(None)
    CHILD["preexec_fn"] = lambda: LIBC.prctl(1, signal.SIGKILL)

def visible_gpus(device):
    """Ids of the GPUs to share out, without importing torch (2 s); cuda:1 is train.py's to find."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device not in ("auto", "cuda") or names in ("", "-1"):
        return []
    if names is None:   # without nvidia-smi the shell's complaint holds no UUID
        return [str(i) for i in range(subprocess.getoutput("nvidia-smi -L").count("UUID"))]
    return re.findall(r"[^\s,]+", names)

def command(plan, key, *more):
    setting, lr, seed = key
    varied = [f"--{text}" for text in setting]
    own = [f"--lr={lr:g}", f"--seed={seed}", f"--out={plan.dir / run_name(key)}", "--resume", "--no-plot"]
    return [sys.executable, str(TRAIN), *plan.flags, *varied, *own, *more]

def ask_train(plan, key, flag):
    """What train.py prints; its refusal, a line on stderr, ends the sweep (CalledProcessError, below)."""
    return subprocess.check_output(command(plan, key, flag), text=True, **CHILD)

def start(plan, key, slot):
    env = dict(os.environ)
    if plan.gpus:
        env["CUDA_VISIBLE_DEVICES"] = plan.gpus[slot % len(plan.gpus)]  # each has its share of the slots
    if plan.jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // plan.jobs)))
    dir = plan.dir / run_name(key)
    dir.mkdir(parents=True, exist_ok=True)
    with open(dir / "stderr.log", "wb") as log:
        return subprocess.Popen(command(plan, key), stdout=subprocess.DEVNULL, stderr=log, env=env, **CHILD)

def finish(dir, failed):
    """Says how a run ended, as it sees it: beside a better one it may yet be slow, or diverged."""
    summary = plot.read_json(dir / "summary.json") or {}
    log = dir / "stderr.log"
    lines = log.read_text(errors="replace").splitlines()
    if not lines:
        log.unlink()
    if summary.get("status") in plot.STATUSES and not failed:
        loss = summary.get("final_val_loss") or nan     # null: it was not finite
        print(f"{dir.name}: {summary['status']}, val loss {loss:.4g}")
    else:
        print(f"{dir.name}: FAILED, the others go on. The end of {log}:", *lines[-6:], sep="\n")

def execute(plan, keys):
    running = {}    # slot: (key, process)
    try:
        while keys or running:
            for slot in range(plan.jobs):
                if slot in running and running[slot][1].poll() is not None:
                    key, process = running.pop(slot)
                    finish(plan.dir / run_name(key), failed=process.returncode != 0)
                if slot not in running and keys:
                    key = keys.pop(0)
                    running[slot] = key, start(plan, key, slot)
            time.sleep(0.05)
            if plan.stopped:
                sys.exit(plan.stopped)
    finally:    # interrupted, or a full disk: Ctrl-C, on which each saves a checkpoint and ends
        processes = [process for _, process in running.values()]
        try:
            for process in processes:
                if os.name == "posix":  # elsewhere the console has told them
                    process.send_signal(signal.SIGINT)
            for process in processes:
                process.wait()
        finally:    # a second Ctrl-C does not wait; a process that has ended is not killed
            for process in processes:
                process.kill()
                process.wait()

def begin(plan, todo):
    """Once, before the first run: one corpus, and one owner of the folder. Returns its lock. A dry run prints
    its commands here, and ends."""
    if todo and len(plan.settings) > 1:     # each setting reads the corpus that the largest budget needs
        tokens = [int(ask_train(plan, (setting, *todo[0][1:]), "--dry-run")) for setting in plan.settings]
        plan.flags = [*plan.flags, "--data-tokens", str(max(tokens))]
    if plan.dry_run:
        for key in todo:
            print(f"cd {shlex.quote(os.getcwd())} && {shlex.join(command(plan, key))}")
        raise SystemExit(0)
    if todo:
        ask_train(plan, todo[0], "--prepare")   # in plain sight
        print(f"runs go to {plan.dir}, {plan.jobs} at a time")
    else:
        print("all runs were finished before and are kept; for new ones choose another --name")
    return lock(plan.dir)

def run_sweep(plan):
    """Round after round; a restart replays them, and finished runs answer at once. Then the report."""
    flags = plan.flags  # to which begin() adds
    made_with = (plot.read_json(plan.dir / "sweep.json") or {}).get("flags", flags)
    if made_with != flags:
        die(f"{plan.dir} was made with other flags, {made_with}; choose another --name")
    asked = []  # in all rounds
    owner = ended = None
    while not ended:
        runs = plot.read_runs(plan.dir) if plan.dir.is_dir() else []
        results = losses(runs, asked)
        keys, ended = next_runs(results, plan)
        todo = [key for key, loss in losses(runs, keys).items() if loss is None]
        refuse_mixture(runs, plan.mix_code or not todo)     # somebody may have edited what is run
        if todo or ended:
            owner = owner or begin(plan, todo)
            write_aside(plan.dir / "sweep.json", json.dumps(dict(flags=flags, ended=ended)).encode())
        execute(plan, todo)
        asked += keys
    text = report(plan.dir, plan.margin).split("## ")[0].replace("**", "")
    print(f"\n{text}Table, analysis and pictures: {plan.dir}")
    return int(None in results.values())

# Analysis: insights.json --------------------------------------------------------------------------

def analyse(runs, margin=0.01):
    """All that the sweep shows. Leaves status, loss (nats) and setting in the runs."""
    judge(runs)
    for run in runs:
        run["setting"] = re.sub(r"-?lr[\d.e+-]+-s\d+$", "", run["name"])   # what varies
    tables = tables_of({(run["setting"], run["lr"], run["seed"]): run["loss"] for run in runs})
    winner, comparisons = compare_settings(tables, margin)
    settings = [analyse_setting(label, table, runs) for label, table in tables.items()]
    use = None
    for s in settings:
        if s["label"] == winner:
            use = dict(setting=winner, lr=s["best_lr"], low=s["low"], high=s["high"])
    insights = dict(best=use, use=use, margin=margin, comparisons=comparisons, settings=settings,
                    runs=len(runs), minutes=sum(run["summary"].get("seconds") or 0 for run in runs) / 60,
                    one_batch=any(run["args"].get("full_batch") for run in runs))
    return json.loads(json.dumps(insights), parse_constant=lambda unknown: None)   # nan and inf become None

def analyse_setting(label, table, runs):
    """One setting: what is known of its best rate, a row for each rate, and what these have in common."""
    runs = [run for run in runs if run["setting"] == label and run["loss"] is not None]
    rates = [analyse_rate([run for run in runs if run["lr"] == lr]) for lr in sorted(table)]
    best = best_rate(table)
    if not best:
        return dict(label=label, best_lr=None, bracketed=False, edge={}, rates=rates)
    best_loss = mean(table[best].values())
    shown, _, low, high = compare_rates(table, best)
    for row in rates:
        row["shown"] = shown.get(row["lr"])
        difference = rise(table[row["lr"]], table[best])
        if difference < inf:    # without its seeds' luck: in the order of the pairs
            row.update(difference=difference, val_loss=best_loss + difference)
    alive = [row for row in rates if isfinite(row["val_loss"])]
    values = [row["val_loss"] for row in alive]
    summary = dict(mean=mean(values), deviation=deviation(values), best=min(values), worst=max(values))
    for name in ("loss", "accuracy", "perplexity"):     # correlation with log rate
        x = [(log(row["lr"]), row["val_" + name]) for row in alive]
        with np.errstate(all="ignore"):     # no variation, no correlation
            summary[name] = np.corrcoef(x, rowvar=False)[0, 1] if len(x) > 2 else None
    edge = {}   # the first rates above the best with a run that was unstable, or diverged; and the one below
    for below, row in itertools.pairwise(rates):
        for status in plot.EDGE:
            if row["lr"] > best and row[status] and status not in edge:
                edge.setdefault("lr", row["lr"])
                edge[status] = dict(lr=row["lr"], ratio=row["lr"] / best, least=below["lr"] / best,
                                    survived=below["lr"], seeds=row[status], of=len(row["seeds"]))
    squares, df = noise_near(table, best)
    return dict(label=label, best_lr=best, best_loss=best_loss, low=low or None, high=high,
                as_good=[row["lr"] for row in rates if row["shown"] is False and not row["diverged"]],
                noise=sqrt(squares / df) if df else None, seeds=len(table[best]), rates=rates,
                bracketed=len(neighbours(table, best)) == 2, edge=edge, summary=summary)

def analyse_rate(runs):
    alive = [run for run in runs if run["loss"] < inf]  # the means are of these
    states = [run["status"] for run in runs]
    row = dict(lr=runs[0]["lr"], seeds=[run["seed"] for run in runs], unstable=states.count("unstable"),
               diverged=states.count("diverged"), status=max(states, key=plot.STATUSES.index),
               deviation=deviation([run["loss"] for run in alive]), difference=None, shown=None,
               max_grad_norm=mean(run["summary"].get("max_grad_norm") for run in runs))
    for name in ("val_loss", "val_accuracy", "val_perplexity", "val_bpb"):
        row[name] = mean(run["summary"].get("final_" + name) for run in alive)
    minutes = mean(run["summary"].get("seconds") for run in alive) / 60
    row["accuracy_per_minute"] = row["val_accuracy"] / max(minutes, 1e-9)
    return row

# Report -------------------------------------------------------------------------------------------

COLUMNS = ("setting", "lr", "seed", "status", "steps", "final_val_loss", "final_val_accuracy",
           "final_val_perplexity", "final_val_bpb", "final_train_loss", "best_val_loss", "best_val_step",
           "max_grad_norm")     # no times: repeatable
ANSWER = "**Use {best_lr:g} {label}**, validation loss {best_loss:.3f} nats a token. It has "
WHY = {
    "tested": """the lowest mean of {seeds} seeds. The optimum lies from {between}; paired tests show the \
limits to be worse, 95% together (noise {noise:.4f} nats). As good, as far as {seeds} seeds can tell: \
{good}.""",
    "one seed": """the lowest loss with **one seed**; another may have another best. As a rule of thumb, not \
a test, the optimum lies from {between}; the limits are over 0.1 nats worse. As good, it seems: {good}.""",
    "one rate": """no rival: no other rate survived all its {seeds} seeds, if one was tried. Where the \
optimum lies is unknown."""}
FIRST = {
    "unstable": "The first unstable rate above the best is {lr:g}, in {seeds} of {of} seeds.",
    "diverged": """The first diverged rate above the best is {lr:g}, in {seeds} of {of} seeds.\n
Runs begin to diverge somewhere between {survived:g} and there, at {least:.1f} to {ratio:.1f} times the best \
rate; by the folk rule 2 to 4 is usual, less is near the edge, more is conservative."""}
RATES = "`difference`: nats above the best, paired over seeds; `shown`: to be worse (empty: no pair tells)."

def markdown(rows, columns):
    """A table of some columns of insights.json."""
    names = columns.split()
    lines = [names, ["---"] * len(names)]
    for row in rows:
        values = [row[name] for name in names]
        lines.append([f"{x:.4g}" if isinstance(x, float) else str(x) for x in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace(" None ", "  ")

def write_up(insights):
    """lr_sweep_analysis.md, the answer first. Every number in it comes out of insights."""
    use = insights["use"]
    first = "There is no answer: no run has survived. Try lower rates with --lrs."
    text = ["The search {ended}. {runs} runs took {minutes:.1f} minutes.".format(**insights)]
    if insights["unfinished"]:
        text.append(f"Left out, not finished or damaged: {', '.join(insights['unfinished'])}.")
    unsure = [c["worse"] for c in insights["comparisons"] if c["verdict"] != "shown"]
    if unsure:
        text.append(f"{use['setting']} is not shown to be better than {' and '.join(unsure)}.")
    if insights["comparisons"]:
        text.append("## Settings, each at its best rate (same: within {margin:g} nats)".format(**insights))
        text.append(markdown(insights["comparisons"], "better worse difference low high seeds verdict"))
    for s in insights["settings"]:
        text += [f"## Rates {s['label']}".strip(), RATES]
        rates = [dict(row, lr=f"{row['lr']:g}") for row in s["rates"]]
        text.append(markdown(rates, "lr seeds status unstable diverged difference shown val_bpb"))
        if not s["best_lr"]:
            continue
        if use["setting"] == s["label"]:
            limits = [f"{lr:g}" if lr else "no known limit" for lr in (s["low"], s["high"])]
            good = [f"{lr:g}" for lr in s["as_good"] if lr != s["best_lr"]]
            why = "tested"
            if s["noise"] is None:
                why = "one seed" if s["seeds"] == 1 else "one rate"
            first = ANSWER + WHY[why]
            first = first.format(**s, between=" to ".join(limits), good=", ".join(good) or "no other")
        for status in plot.EDGE:
            if status in s["edge"]:
                text.append(FIRST[status].format(**s["edge"][status]))
            else:
                text.append(f"No rate above the best, up to {s['rates'][-1]['lr']:g}, was {status}.")
        text.append("Over the rates that survived, and the correlation of their log rate with:")
        text.append(markdown([s["summary"]], "mean deviation best worst loss accuracy perplexity"))
    if insights["one_batch"]:
        first = "These runs fit one batch: their validation loss recommends no rate. Look at sharpness.png."
    return "\n\n".join(["# Which learning rate?", first.replace(" **,", "**,"), *text]) + "\n"

def report(dir, margin):
    """Reads the runs under dir, and writes table, analysis and all pictures there; returns the analysis."""
    runs = plot.read_runs(dir)
    refuse_mixture(runs, mix_code=True)
    if not runs:
        die(f"{dir} holds no run with a readable config.json")
    insights = analyse(runs, margin)
    search = plot.read_json(dir / "sweep.json") or {}
    insights["ended"] = search.get("ended") or "goes on: the same command continues it"
    done = [run["name"] for run in runs if run["loss"] is not None]
    insights["unfinished"] = sorted(x.name for x in dir.iterdir() if x.is_dir() and x.name not in done)
    table = io.StringIO()
    rows = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    for run in runs:
        rows.writerow({**run["summary"], **run, "lr": f"{run['lr']:g}"})
        if not (run["dir"] / "loss_curves.png").exists():
            plot.draw_run(run["dir"])
    text = write_up(insights)
    write_aside(dir / "summary_table.csv", table.getvalue().encode())
    write_aside(dir / "lr_sweep_analysis.md", text.encode())
    write_aside(dir / "insights.json", json.dumps(insights, indent=1).encode())
    plot.draw_sweep(dir, runs, insights)
    return text

# Command line -------------------------------------------------------------------------------------

def learning_rate(text):
    if not 1e-9 <= float(text) <= 1e6:
        raise ValueError
    return float(f"{float(text):g}")    # as folders are named

def positive(text):
    if not 1 <= int(text) <= 999_999:
        raise ValueError
    return int(text)

def parse_vary(texts):
    """["a=1,2", "b,c=3:4,5:6"] -> every combination, tuples of "flag=value"; [] -> one empty setting."""
    axes = []
    for text in texts:
        names, _, values = text.partition("=")
        flags = names.replace("_", "-").split(",")
        if {"lr", "seed", "out", "preset", "data", "data-tokens", "vocab-size"}.intersection(flags):
            die(f"--vary {text}: rates have --lrs, seeds --seeds; losses compare within one tokenizer only")
        axes.append([])
        for value in values.split(","):
            parts = value.split(":", len(flags) - 1)
            if len(parts) != len(flags) or "" in flags + parts:
                die(f"--vary {text}: write FLAG=V1,V2 or FLAG1,FLAG2=A:B,C:D")
            axes[-1].append(tuple(map("=".join, zip(flags, parts))))
    return [sum(combination, ()) for combination in itertools.product(*axes)]

def make_plan(argv):
    """The flags, checked, and what follows from them: flags and settings of the runs, dir, gpus, jobs."""
    p = argparse.ArgumentParser("sweep.py", allow_abbrev=False, add_help=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Flags not listed here go on to train.py.")
    p.error = lambda message: die(f"{message}; see --help")
    add = p.add_argument
    add("--preset", choices=GRIDS, default="tiny", help="of the model")
    add("--study", choices=STUDIES, help="a named plan, which sets defaults of the others")
    first, _ = p.parse_known_args(argv)     # these two decide the defaults of the others
    own, fixed = STUDIES.get(first.study, ("", ""))
    grid = GRIDS[first.preset]
    def multiple(text):
        return learning_rate(f"{float(text) * grid[(len(grid) - 1) // 2]:.2g}")
    add("-h", "--help", action="help", help="show this and stop")
    add("--lrs", nargs="+", type=learning_rate, default=grid, help="rates to start from")
    add("--around", nargs="+", type=multiple, dest="lrs", help="the same, as multiples of the middle one")
    add("--seeds", type=positive, default=1, help="of the rates that matter")
    add("--refine", type=int, default=0, choices=range(10), help="how often to halve steps around the best")
    add("--vary", action="append", default=[], help="FLAG=V1,V2 of train.py, or FLAG1,FLAG2=A:B,C:D")
    add("--widen", action=argparse.BooleanOptionalAction, default=not own, help="search beyond these rates")
    add("--max-runs", type=positive, help="None: per setting and seed 16, or as many as --lrs")
    add("--jobs", type=positive, help="runs at once; None: as many as pay")
    add("--margin", type=float, default=0.01, help="nats: settings within it are called the same")
    add("--name", help="folder under runs/; None: from the flags")
    add("--device", default="auto", help="as train.py takes it")
    add("--mix-code", action="store_true", help="compare runs of edited code with those before the edit")
    add("--dry-run", action="store_true", help="print the next round's commands, one a line, and stop")
    add("--report", type=Path, help="analyse and draw again what lies in this folder, and stop")
    plan, given = p.parse_known_args(own.split() + argv)
    plan.flags = ["--preset", plan.preset, "--device", plan.device, *fixed.split(), *given]
    for word in given:
        if word.split("=")[0] in ("--lr", "--seed", "--out", "--resume", "--prepare", "--data-tokens"):
            die(f"{word} is set by the sweep; see --lrs, --seeds and --name in --help")
    if plan.name is None:
        words = [plan.preset, plan.study or "", *(text.split("=")[0] for text in plan.vary), *given]
        plan.name = re.sub(r"[^\w.+]+", "-", " ".join(words))[:150].strip("-")
    if not re.fullmatch(r"\w[^/\\]*", plan.name):
        die(f"--name {plan.name!r}: a plain name, for a folder under runs/")
    if not 0 <= plan.margin < inf:
        die(f"--margin {plan.margin}: a number of nats, from 0")
    plan.dir = Path("runs") / plan.name
    plan.stopped = None     # the exit status, once a signal has come
    plan.settings = parse_vary(plan.vary)
    plan.max_runs = plan.max_runs or plan.seeds * len(plan.settings) * max(16, len(plan.lrs))
    plan.gpus = visible_gpus(plan.device)
    # Without GPUs: a larger run fills all cores, and a Mac has one GPU.
    on_cpu = min(8, cores()) if plan.preset == "tiny" and sys.platform != "darwin" else 1
    plan.jobs = plan.jobs or len(plan.gpus) * PER_GPU[plan.preset] or on_cpu
    return plan

def main(argv):
    try:
        for text in [os.getcwd(), *argv]:
            if not text.isprintable():  # a newline would cut a line of --dry-run in two, and run what follows
                die(f"{text!a}: control characters are refused")
        plan = make_plan(argv)
        if plan.report:
            print(report(plan.report, plan.margin))
            return 0
        def on_signal(number, frame):
            plan.stopped = 128 + number     # kept, as Python ignores an exit in the moment of a fork
            sys.exit(plan.stopped)
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            signal.signal(number, on_signal)
        try:
            return run_sweep(plan)
        except SystemExit as end:
            if end.code > 128:  # by one of these signals
                print("stopped; every run keeps what it has. The same command goes on")
            raise
    except BrokenPipeError:     # whoever read the lines has gone (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except subprocess.CalledProcessError:   # train.py has said what is wrong
        return 2
    except DataError as error:  # another sweep owns the folder
        die(error)
    except OSError as error:    # a full disk, a folder that is read-only or not there
        die(f"{error.filename or 'output'}: {error.strerror}")

if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")    # None: closed by whoever started this
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main(sys.argv[1:]))
