"""Sweep the learning rate: one process a run; decide what to try next; say what the runs show, and what not.

    python sweep.py                             the tiny preset: bracket the best rate, find the edge, report
    python sweep.py --preset moe --seeds 3      flags unknown here (--max-steps 400) go on to train.py
    python sweep.py --vary optimizer=adamw,muon any train.py flag, each value at its own best rate
    python sweep.py --dry-run                   the next round's commands, one a line: Slurm, xargs, Ray
    python sweep.py --report runs/tiny          analyse and draw again what has arrived

The search is a function from the results to the next runs, so that an interrupted sweep replays it and goes
on as it would have. The statistics assume that loss against log rate falls to one valley and rises again, and
rest on pairing: a seed gives every rate the same initial weights and batches, so its luck drops out.

    use       the tried rate with the lowest mean over all seeds; what was not run is never recommended
    noise     residuals of loss[rate, seed] - mean of the rate - mean of the seed, at the rates near the best
    shown     a rate is worse where its mean paired difference to the best exceeds t(df) s / sqrt(seeds): s is
              sqrt(2) noise, or the deviation of the differences if larger; t stands at 1 - 0.025 / k for k
              rates compared (Bonferroni). A rate that diverged with two seeds, all of them, is worse too
    interval  the optimum lies between the nearest rates below and above that are shown to be worse; those in
              between are as good, as far as the seeds can tell. One seed knows no noise: 0.1 nats stand in
    settings  are compared at their best rates. What a finer grid could still gain widens the interval of the
              difference: the lowest that a convex valley through the tried rates could be between them

Two-way residuals: Fisher, The Design of Experiments (1935). tests/simulate.py prints how often the interval
holds a known optimum, how good the recommended rate is, and how often equal settings are called different.
"""
import argparse
import csv
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import plot
from data import DataError, cores, lock, write_aside

TRAIN = Path(os.environ.get("NANOLR_TRAIN") or Path(__file__).with_name("train.py")).resolve()

DENSE = [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2]
GRIDS = {   # where the search starts
    "tiny": [1e-3, 3e-3, 1e-2, 0.3, 1.0],
    "dense": DENSE,
    "dense-low": DENSE,
    "moe": [0.01, 0.02, 0.035, 0.05, 0.065, 0.085, 0.1, 0.15, 0.3],
}
# A textbook run: one fixed batch, a constant rate, nothing that hides the edge of stability.
EDGE = ("--full-batch --batch-size 8 --context-length 64 --max-steps 400 --schedule constant "
        "--warmup-ratio 0 --grad-clip 0 --weight-decay 0 --dtype float32 --sharpness 10 --log-interval 1 "
        "--eval-interval 400 --eval-tokens 2048 --momentum 0 --optimizer").split()
STUDIES = {     # defaults that the command line overrides; around: multiples of the middle rate of the grid
    "explore": dict(lrs=[0.001, 0.01, 0.03, 0.1, 0.3], flags=["--max-steps", "50"], widen=False),
    "extend": dict(around=[0.15, 0.3, 0.5, 0.7, 0.8, 1, 1.2, 1.5, 2, 3, 5], flags=["--max-steps", "100"],
                   widen=False),
    "fine": dict(lrs=[0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.13, 0.14],
                 flags=["--max-steps", "75"], widen=False),
    "wide": dict(lrs=[0.001, 0.002, 0.003, 0.004, 0.006, 0.008,             # conservative
                      0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08,     # moderate
                      0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4,                 # aggressive
                      0.5, 0.6, 0.7, 0.85, 1.0],                            # extreme
                 widen=False),
    "schedules": dict(around=[1], seeds=3, widen=False,     # conservative, baseline, none, aggressive, long
                      vary=["warmup-ratio,min-lr-ratio=0.1:0.05,0.05:0.1,0:0.1,0.02:0.2,0.2:0.1"]),
    "edge": dict(lrs=[0.004, 0.01, 0.025, 0.06, 0.15, 0.4, 1.0, 2.5], flags=[*EDGE, "sgd"], widen=False),
    "edge-adamw": dict(lrs=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1], flags=[*EDGE, "adamw"], widen=False),
}
PER_GPU = {"tiny": 4, "dense": 1, "dense-low": 8, "moe": 2}     # runs at once, measured on an H100
HALF_DECADES = [float(f"{m}e{k}") for k in range(-9, 7) for m in (1, 3)]
NEAR = 0.1      # nats, 10% perplexity: stands in for the noise where there is one seed
WORTH = 0.03    # nats that a finer grid must promise before one setting is searched closer than a factor 2

# --------------------------------------------------------------------------------------------------
# Statistics. A table is {rate: {seed: loss}}; a loss of inf: that run diverged

@functools.lru_cache(maxsize=None)
def t_quantile(p, df):
    """Student's t. With t = sqrt(df) tan(a) its density becomes cos(a)^(df - 1), which a sum integrates."""
    angle = np.linspace(0, math.pi / 2, 5_001)
    density = np.cos(angle) ** (df - 1)
    cdf = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    found = np.interp(2 * p - 1, cdf / cdf[-1], angle)
    return math.sqrt(df) * math.tan(found)

def mean(values):
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None

def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else None

def finite(value):
    return float(value) if math.isfinite(value) else None

def paired(row, other):
    """Differences row - other, {seed: loss} each, over the seeds that survived in both."""
    differences = [row[seed] - other[seed] for seed in row if seed in other]
    return [d for d in differences if math.isfinite(d)]

def rise(row, other):
    """Their mean; inf where there is nothing to pair."""
    return float(np.mean(paired(row, other) or math.inf))

def best_rate(table):
    """The lowest mean of the rates that survived in all their seeds and have the most; None: none did."""
    means = {lr: (-len(row), mean(row.values())) for lr, row in table.items()}
    means = {lr: value for lr, value in means.items() if value[1] < math.inf}
    return min(means, key=means.get, default=None)

def noise_near(table, best):
    """Sum of squared two-way residuals (nats^2) and degrees of freedom, of the rates within NEAR of the best,
    or of the three best: not of a wild one."""
    rows = [[row.get(seed, math.inf) for seed in table[best]] for row in table.values()]
    rows = [row for row in rows if max(row) < math.inf]
    rows.sort(key=np.mean)
    near = [row for row in rows if np.mean(row) < np.mean(rows[0]) + NEAR]
    x = np.array(rows[:max(3, len(near))])      # (rates, seeds)
    residuals = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    return np.array([np.sum(residuals ** 2), (len(x) - 1) * (len(x[0]) - 1)])

def half_width(differences, squares, df, k):
    """Half the interval of a mean difference, one of k that hold together; NEAR where no noise is known."""
    if not df:
        return NEAR
    spread = max(math.sqrt(2 * squares / df), deviation(differences) or 0)
    return float(t_quantile(1 - 0.025 / k, df) * spread / math.sqrt(len(differences)))

def neighbours(rates, lr):
    """The next rates below and above, those that exist."""
    below = sorted(x for x in rates if x < lr)
    above = sorted(x for x in rates if x > lr)
    return below[-1:] + above[:1]

def finer_gains(table, lr):
    """{neighbour: nats by which the loss between it and this rate could be lower still, in a convex valley}.

    A convex curve lies above its chords extended. Where the two beside a gap meet is the lowest it can be.
    """
    rates = sorted(table)
    i = rates.index(lr)
    points = []
    for x in rates[max(0, i - 2):i + 3]:
        y = max(0, rise(table[x], table[lr]))   # a neighbour of fewer seeds may be lower in these
        if y < math.inf:
            points.append((math.log(x / lr), y))
    gains = {}
    for other in neighbours(rates, lr):
        gap = np.linspace(0, math.log(other / lr), 200)
        lowest = np.full(200, -math.inf)
        for (x1, y1), (x2, y2) in itertools.pairwise(points):
            beside = {x1, x2} & {gap[0], gap[-1]}
            if beside and not x1 < gap[1] < x2:
                lowest = np.maximum(lowest, y1 + (y2 - y1) / (x2 - x1) * (gap - x1))
        gains[other] = max(0, -lowest.min())
    return gains

def finer_gain(table, lr):
    """The larger of both; beyond an end of the grid it can be any; a lone rate was chosen as it is."""
    gains = finer_gains(table, lr)
    if len(gains) == 1:
        return math.inf
    return max(gains.values(), default=0)

def compare_rates(table, best):
    """-> rates shown to be worse than the best, rates as good, and the nearest below and above all of these
    that are worse (None: none is)."""
    squares, df = noise_near(table, best)
    pairs = {lr: paired(row, table[best]) for lr, row in table.items() if lr != best}
    k = sum(len(d) > 1 for d in pairs.values())
    good = [best]
    worse = []
    for lr, d in pairs.items():
        if not d and len(table[lr]) == 1 < len(table[best]):
            continue    # it diverged, which with one seed of several may be bad luck
        gain = 0
        if all(rise(table[x], table[lr]) > 0 for x in neighbours(table, lr)):
            gain = finer_gain(table, lr)    # a valley of its own, whose bottom may be lower
        if not d or mean(d) > half_width(d, squares, df, k) + gain:
            worse.append(lr)
        else:
            good.append(lr)
    low = max((lr for lr in worse if lr < min(good)), default=None)
    high = min((lr for lr in worse if lr > max(good)), default=None)
    return worse, sorted(good), low, high

def compare_settings(tables, margin):
    """{label: table} -> the best label (None: all diverged), its comparisons with others (insights.json)."""
    rates = {label: best_rate(table) for label, table in tables.items()}
    rows = {label: tables[label][lr] for label, lr in rates.items() if lr}
    if not rows:
        return None, []
    winner = min(rows, key=lambda label: mean(rows[label].values()))
    squares, df = sum(noise_near(tables[label], rates[label]) for label in rows)
    if not df:      # settings of one rate each: their noise is what remains between them
        squares, df = noise_near(rows, winner)
    k = len(rows) * (len(rows) - 1) // 2    # the best came out of all pairs
    gain = {label: finer_gain(tables[label], rates[label]) for label in rows}
    comparisons = []
    for label in rows:
        d = paired(rows[label], rows[winner])
        if label == winner or not d:
            continue
        half = half_width(d, squares, df, k) if df else math.inf
        low = mean(d) - half - gain[label]
        high = mean(d) + half + gain[winner]
        verdict = "shown" if low > 0 else "not shown"
        if max(-low, high) < margin:
            verdict = "same"
        comparisons.append(dict(better=winner, worse=label, difference=mean(d), low=finite(low),
                                high=finite(high), seeds=len(d), verdict=verdict))
    return winner, comparisons

# --------------------------------------------------------------------------------------------------
# What to try next

def outward(table, best):
    """Rates beyond those tried, until the best has worse neighbours on both sides, and one above diverges."""
    rates = []
    if best in (None, min(table)):
        rates += [lr for lr in HALF_DECADES if lr < min(table) / 1.9][-1:]
    if best and not any(lr > best and math.inf in row.values() for lr, row in table.items()):
        rates += [lr for lr in HALF_DECADES if lr > max(table) * 1.9][:1]
    return rates

def midpoint(table, best, plan):
    """Rates between the best and its neighbours, until both are within a factor of 2, or closer where that is
    worth it. Each --refine halves the distance in log rate."""
    gains = finer_gains(table, best)
    gaps = {}
    for lr, gain in gains.items():
        limit = 2.05    # rates have two digits
        if len(plan.settings) > 1 and gain > plan.margin / 2:   # it blurs their difference
            limit = 1.25
        elif gain > WORTH and len(table[best]) == 1 and max(table[lr].values()) < math.inf:
            limit = 1.4
        if abs(math.log(lr / best)) > math.log(limit) / 2 ** plan.refine:
            gaps[lr] = gain
    if len(gains) < 2:
        return []
    middles = [math.sqrt(best * lr) for lr in gaps]
    return [float(f"{min(max(middle, best / 2), best * 2):.2g}") for middle in middles]

def worth_seeds(table, best):
    """Rates that can matter: the best and its neighbours; then all that are not shown to be worse, and the
    next ones outside, if they are not."""
    if len(table[best]) == 1:
        return [best, *neighbours(table, best)]
    worse, good, _, _ = compare_rates(table, best)
    around = neighbours(table, good[0])[:1] + neighbours(table, good[-1])[-1:]
    return [lr for lr in good + around if lr not in worse]

def stages(table, plan):
    """What one setting wants, lists of (rate, seed): the first of them that asks for something new is run."""
    rates = []
    seeds = []
    best = best_rate(table)
    if table and plan.widen:
        rates += outward(table, best)
    if best and (plan.widen or plan.refine):
        rates += midpoint(table, best, plan)
    if best:
        for lr in worth_seeds(table, best):
            survived = min(table[lr].values()) < math.inf
            seeds += [(lr, seed) for seed in range(plan.seeds) if survived or seed < 2]
    return [(lr, 0) for lr in plan.lrs], [(lr, 0) for lr in rates], seeds

def tables_of(results):
    """{(setting, rate, seed): loss} -> {setting: table}; without None, the losses of failed runs."""
    tables = {}
    for (setting, lr, seed), loss in results.items():
        if loss is not None:
            tables.setdefault(setting, {}).setdefault(lr, {})[seed] = loss
    return tables

def next_runs(results, plan):
    """The search: what to run next, [(setting, rate, seed)], and why it ended (None: it has not).

    results: {(setting, rate, seed): loss} of all runs asked for so far; inf: diverged, None: failed. plan:
    settings, lrs, seeds, refine, margin, widen, max_runs. It depends on nothing else: it can be replayed.
    """
    tables = tables_of(results)
    keys = []
    for setting in plan.settings:
        for stage in stages(tables.get(setting, {}), plan):
            wanted = [(setting, *pair) for pair in dict.fromkeys(stage)]
            wanted = [key for key in wanted if key not in results]
            if wanted:
                keys += wanted
                break
    if keys and len(results) < plan.max_runs:
        return keys[:plan.max_runs - len(results)], None
    if keys:
        return [], f"ended at the limit of {plan.max_runs} runs (--max-runs), before all that it wanted"
    if None in results.values():
        return [], "ended without the runs that failed; the same command tries them again"
    return [], "ran all that its plan asks for"

# --------------------------------------------------------------------------------------------------
# Runs: where they lie, how they ended, and which may be compared

class Stopped(Exception):
    """Ctrl-C, SIGTERM or SIGHUP: the number of the signal."""

def die(message):
    print(f"sweep.py: {message}", file=sys.stderr)
    raise SystemExit(2)

def folder(plan, key):
    """A run's folder is named by what varies: optimizer=muon-lr0.003-s0."""
    setting, lr, seed = key
    varied = ",".join(f"{flag}={value}" for flag, value in setting)
    return plan.dir / re.sub(r"[^\w.+=,-]+", "_", f"{varied}-lr{lr:g}-s{seed}".lstrip("-"))

def command(plan, key, *more):
    """train.py with the flags of one run."""
    setting, lr, seed = key
    flags = [word for flag, value in setting for word in (f"--{flag}", value)]
    flags += ["--lr", f"{lr:g}", "--seed", str(seed), "--out", str(folder(plan, key))]
    return [sys.executable, str(TRAIN), *plan.flags, *flags, "--resume", "--no-plot", *more]

def judge(runs):
    """Sets status and loss of each run, beside the best: inf where it diverged, None where it goes on."""
    for run in runs:
        loss = run["summary"].get("final_val_loss")
        run["status"] = run["summary"].get("status") or "running"
        run["loss"] = None
        if run["status"] in plot.STATUSES:
            run["loss"] = math.inf
            if run["status"] != "diverged" and isinstance(loss, float):
                run["loss"] = loss
    alive = [run for run in runs if run["loss"] not in (None, math.inf) and len(run["train"]["train_loss"])]
    best = min(alive, key=lambda run: run["loss"], default=None)
    for run in alive:
        level = np.median(best["train"]["train_loss"][-5:])
        run["status"] = plot.classify(run["train"]["train_loss"], level)
    for run in runs:
        if run["loss"] == math.inf or run["status"] == "diverged":
            run.update(status="diverged", loss=math.inf)

def load(plan, keys):
    """{key: run} of those that are finished, judged beside each other."""
    runs = {key: plot.read_run(folder(plan, key)) for key in keys}
    judge([run for run in runs.values() if run])
    return {key: run for key, run in runs.items() if run and run["loss"] is not None}

def check(runs, mix_code=True):
    """Losses of other texts, tokenizers or, without mix_code, other code than today's are not compared."""
    corpora = {}
    for run in runs:
        data = run["config"].get("data") or {}
        code = run["config"].get("code") or {}
        corpora[data.get("train_sha256"), data.get("val_sha256")] = run["name"]
        now = {name: hashlib.sha256(TRAIN.with_name(name).read_bytes()).hexdigest() for name in code}
        if now != code and not mix_code:
            die(f"the code changed since {run['name']} began; choose another --name, or compare old and new "
                "code with --mix-code")
    if len(corpora) > 1:
        die(f"{' and '.join(corpora.values())} read other data; choose another --name")

# --------------------------------------------------------------------------------------------------
# Running

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

def die_with_parent():
    LIBC.prctl(1, signal.SIGKILL)   # PR_SET_PDEATHSIG: a killed sweep leaves no run beside its successor's

# A child has a session of its own: Ctrl-C reaches the sweep alone, which passes it on.
CHILD = dict(stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent if LIBC else None)

def visible_gpus(device):
    """Ids of the GPUs to share out, without importing torch (2 s); cuda:1 is train.py's to find."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        names = ",".join(map(str, range(listed.count("UUID"))))
    if device not in ("auto", "cuda") or names in (None, "", "-1"):
        return []
    return names.replace(" ", "").split(",")

def start(plan, key, slot):
    """Starts train.py; each GPU has its share of the slots, and each run its share of the cores."""
    env = dict(os.environ)
    if plan.gpus:
        env["CUDA_VISIBLE_DEVICES"] = plan.gpus[slot % len(plan.gpus)]
    if plan.jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // plan.jobs)))
    folder(plan, key).mkdir(parents=True, exist_ok=True)
    with open(folder(plan, key) / "stderr.log", "wb") as log:
        return subprocess.Popen(command(plan, key), stdout=subprocess.DEVNULL, stderr=log, env=env, **CHILD)

def execute(plan, keys):
    """One round, plan.jobs runs at a time, a line as each ends."""
    running = {}    # slot: (key, process)
    try:
        while keys or running:
            for slot in range(plan.jobs):
                if slot in running and running[slot][1].poll() is not None:
                    print(finish(plan, *running.pop(slot)))
                if slot not in running and keys:
                    running[slot] = keys[0], start(plan, keys[0], slot)
                    keys = keys[1:]
            time.sleep(0.05)
    finally:    # interrupted, or a full disk
        stop([process for _, process in running.values()])

def stop(children):
    """Ctrl-C for children: each saves a checkpoint and ends. A second signal kills them."""
    try:
        for child in children:
            if os.name == "posix":  # elsewhere the console has told them
                child.send_signal(signal.SIGINT)
        for child in children:
            child.wait()
    except Stopped:
        for child in children:
            child.kill()

def finish(plan, key, process):
    """One run has ended: its loss, or the end of its log. Its status waits for better runs to judge it by."""
    log = folder(plan, key) / "stderr.log"
    text = log.read_text(errors="replace")
    found = load(plan, [key])
    if not found or process.returncode:
        plan.failed.append(key)
        tail = "\n".join(text.splitlines()[-6:])
        return f"{log.parent.name}: FAILED, the others go on. The end of {log}:\n{tail}"
    if not text:
        log.unlink()
    return f"{log.parent.name}: val loss {found[key]['loss']:.3f}".replace("val loss inf", "diverged")

def ask_train(plan, key, flag):
    """What train.py prints at once, --dry-run or --prepare; where it refuses, it has said why."""
    asked = subprocess.run(command(plan, key, flag), stdout=subprocess.PIPE, text=True, **CHILD)
    if asked.returncode:
        raise SystemExit(2)
    return asked.stdout

def prepare(plan, key, meta):
    """Once, before the first run: one corpus, one code, one owner."""
    if len(plan.settings) > 1:  # each setting reads the corpus that the largest budget needs
        tokens = [ask_train(plan, (setting, *key[1:]), "--dry-run") for setting in plan.settings]
        plan.flags = plan.flags + ["--data-tokens", str(max(map(int, tokens)))]
    if not plan.dry_run:
        if plan.dir.is_dir():
            check(plot.read_runs(plan.dir), plan.mix_code)
        ask_train(plan, key, "--prepare")   # in plain sight
        plan.owner = lock(plan.dir)
        write_aside(plan.dir / "sweep.json", json.dumps(meta, indent=1).encode())
        print(f"runs go to {plan.dir}, {plan.jobs} at a time")

def search(plan, meta):
    """Round after round; a restart replays them, and finished runs answer at once. Returns why it ended."""
    asked = []
    while True:
        runs = load(plan, asked)
        check(runs.values())
        results = {key: None for key in asked} | {key: run["loss"] for key, run in runs.items()}
        keys, ended = next_runs(results, plan)
        if ended:
            return ended
        finished = load(plan, keys)
        todo = [key for key in keys if key not in finished]
        if todo and not plan.owner:
            prepare(plan, todo[0], meta)
        if todo and plan.dry_run:
            for key in todo:
                print(f"cd {shlex.quote(os.getcwd())} && {shlex.join(command(plan, key))}")
            return None
        execute(plan, todo)
        asked += keys

# --------------------------------------------------------------------------------------------------
# Analysis: insights.json

def analyse(runs, margin=0.01, ended=None):
    """All that the sweep shows. Leaves status, loss (nats) and setting in the runs."""
    judge(runs)
    for run in runs:
        run["setting"] = re.sub(r"-?lr[\d.e+-]+-s\d+$", "", run["name"])   # what varies
    finished = [run for run in runs if run["loss"] is not None]
    tables = tables_of({(run["setting"], run["lr"], run["seed"]): run["loss"] for run in finished})
    winner, comparisons = compare_settings(tables, margin)
    settings = []
    best = None
    for label, table in tables.items():
        s = analyse_setting(label, table, [run for run in finished if run["setting"] == label])
        settings.append(s)
        if label == winner:
            best = dict(setting=label, lr=s["best_lr"], val_loss=s["best_loss"], low=s["low"], high=s["high"])
    minutes = sum(run["summary"].get("seconds") or 0 for run in runs) / 60
    unfinished = [run["name"] for run in runs if run["loss"] is None]
    one_batch = any(run["args"].get("full_batch") for run in runs)
    return dict(best=best, use=best, ended=ended, margin=margin, comparisons=comparisons, settings=settings,
                runs=len(runs), minutes=minutes, unfinished=unfinished, one_batch=one_batch)

def analyse_setting(label, table, runs):
    """One setting over its rates."""
    rates = []
    for lr in sorted(table):
        rates.append(analyse_rate([run for run in runs if run["lr"] == lr]))
    best = best_rate(table)
    s = dict(label=label, best_lr=best, best_loss=None, low=None, high=None, as_good=[], noise=None,
             bracketed=False, edge=None, rates=rates, seeds=len(table.get(best, [])))
    if best:
        worse, good, s["low"], s["high"] = compare_rates(table, best)
        squares, df = noise_near(table, best)
        s["as_good"] = [lr for lr in good if max(table[lr].values()) < math.inf]
        s["noise"] = math.sqrt(squares / df) if df else None
        s["best_loss"] = mean(table[best].values())
        s["bracketed"] = len(neighbours(table, best)) == 2
        s["edge"] = find_edge(rates, best)
        for row in rates:
            row["shown"] = row["lr"] in worse
            row["difference"] = finite(rise(table[row["lr"]], table[best]))
            if row["difference"] is not None:   # without its seeds' luck: in the order of the pairs
                row["val_loss"] = s["best_loss"] + row["difference"]

    alive = [row for row in rates if row["val_loss"] is not None]
    losses = [row["val_loss"] for row in alive]
    s["summary"] = dict(mean=mean(losses), deviation=deviation(losses), best=min(losses, default=None),
                        worst=max(losses, default=None))
    s["correlation"] = dict.fromkeys(("loss", "accuracy", "perplexity"))
    logs = [math.log(row["lr"]) for row in alive]
    for what in s["correlation"]:
        values = np.array([row["val_" + what] for row in alive], float)
        if len(alive) > 2:
            with np.errstate(all="ignore"):     # no variation, no correlation
                s["correlation"][what] = finite(np.corrcoef(logs, values)[0, 1])
    return s

def analyse_rate(runs):
    """One rate over its seeds; the means are of those that survived."""
    alive = [run for run in runs if run["loss"] < math.inf]
    states = [run["status"] for run in runs]
    row = dict(lr=runs[0]["lr"], seeds=[run["seed"] for run in runs], difference=None, shown=False,
               status=max(states, key=plot.STATUSES.index), unstable=states.count("unstable"),
               diverged=states.count("diverged"), deviation=deviation([run["loss"] for run in alive]))
    for name in ("val_loss", "val_accuracy", "val_perplexity", "val_bpb"):
        row[name] = mean(run["summary"].get("final_" + name) for run in alive)
    row["max_grad_norm"] = mean(run["summary"].get("max_grad_norm") for run in runs)
    seconds = mean(run["summary"].get("seconds") for run in alive) or math.inf
    row["accuracy_per_minute"] = 60 * (row["val_accuracy"] or 0) / seconds or None
    return row

def find_edge(rates, best):
    """The first unstable and the first diverged rate above the best, in how many of their seeds, and the rate
    below the diverged one: runs begin to diverge somewhere between these two."""
    edge = dict(lr=None, ratio=None, survived=None, unstable=None, diverged=None)
    for row, below in zip(rates[1:], rates):
        for status in plot.EDGE:
            if row["lr"] > best and row[status] and not edge[status]:
                edge[status] = dict(lr=row["lr"], seeds=row[status], of=len(row["seeds"]))
                edge["lr"] = edge["lr"] or row["lr"]
                if status == "diverged":
                    edge.update(ratio=row["lr"] / best, survived=below["lr"])
    return edge if edge["lr"] else None

# --------------------------------------------------------------------------------------------------
# Report

COLUMNS = ("steps", "final_val_loss", "final_val_accuracy", "final_val_perplexity", "final_val_bpb",
           "final_train_loss", "best_val_loss", "best_val_step", "max_grad_norm")   # no times: repeatable

ONE_SEED = """**Use {best_lr:g} {label}**, validation loss {best_loss:.3f} nats a token. It has the lowest \
loss with **one seed**; another seed may have another best. As a rule of thumb, not a test, the optimum lies \
from {between}; the limits are over 0.1 nats worse. As good, as far as one seed can tell: {good}."""
SEEDS = """**Use {best_lr:g} {label}**, validation loss {best_loss:.3f} nats a token. It has the lowest mean \
of {seeds} seeds. The optimum lies from {between}; paired tests show the limits to be worse, 95% together \
(noise {noise:.4f} nats). As good, as far as {seeds} seeds can tell: {good}."""
FIRST = "The first {} rate above the best is {lr:g}, in {seeds} of {of} seeds."
NONE = "No rate from the best to {:g} was {}."
DIVERGE = """Runs begin to diverge somewhere between {survived:g} and there, at {least:.1f} to {ratio:.1f} \
times the best rate; by the folk rule 2 to 4 is usual, less is near the edge, more is conservative."""
RATES = """## Rates {label}

`difference`: nats above the best, paired over seeds; `shown`: to be worse."""

def answer(s):
    """The rate to use, how sure that is, and between which rates the optimum lies."""
    limits = [f"{lr:g}" if lr else "no known limit" for lr in (s["low"], s["high"])]
    good = [f"{lr:g}" for lr in s["as_good"] if lr != s["best_lr"]]
    sentences = ONE_SEED if s["noise"] is None else SEEDS
    text = sentences.format(**s, between=" to ".join(limits), good=", ".join(good) or "no other")
    return text.replace(" **,", "**,")

def edge_text(s):
    """The two edges, and the folk rule."""
    edge = s["edge"] or {}
    text = []
    for status in plot.EDGE:
        if edge.get(status):
            text.append(FIRST.format(status, **edge[status]))
        else:
            text.append(NONE.format(s["rates"][-1]["lr"], status))
    if edge.get("diverged"):
        text.append(DIVERGE.format(**edge, least=edge["survived"] / s["best_lr"]))
    return " ".join(text)

def markdown(rows, *columns):
    """A table of some columns of insights.json."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [row[column] for column in columns]
        lines.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("None", "")

def write_up(insights):
    """lr_sweep_analysis.md, the answer first. Every number in it comes out of insights."""
    best = insights["best"]
    text = ["# Which learning rate?", "There is no answer: no run has survived. Try lower rates with --lrs."]
    text.append("The search {ended}. {runs} runs took {minutes:.1f} minutes.".format(**insights))
    if insights["unfinished"]:
        text.append(f"Left out, not finished or damaged: {', '.join(insights['unfinished'])}.")
    unsure = [c["worse"] for c in insights["comparisons"] if c["verdict"] != "shown"]
    if unsure:
        text.append(f"{best['setting']} is not shown to be better than {' and '.join(unsure)}.")
    if insights["comparisons"]:
        text.append("## Settings, each at its best rate (same: within {margin:g} nats)".format(**insights))
        text.append(markdown(insights["comparisons"], "better", "worse", "difference", "low", "high", "seeds",
                             "verdict"))
    for s in insights["settings"]:
        if best and best["setting"] == s["label"]:
            text[1] = answer(s)
        if insights["one_batch"]:
            text[1] = ("These runs fit one batch again and again: their validation loss recommends no rate. "
                       "Look at sharpness.png and edge_of_stability.png.")
        text.append(RATES.format(**s))
        text.append(markdown(s["rates"], "lr", "seeds", "status", "unstable", "diverged", "difference",
                             "shown", "val_bpb"))
        if s["best_lr"]:
            text.append(edge_text(s))
        text.append("Over the rates that survived:")
        text.append(markdown([s["summary"]], "mean", "deviation", "best", "worst"))
        text.append("Correlation with log rate:")
        text.append(markdown([s["correlation"]], "loss", "accuracy", "perplexity"))
    return "\n\n".join(text).replace(" \n", "\n") + "\n"

def report(dir, margin):
    """Reads the runs under dir, and writes table, analysis and all pictures there; returns the analysis."""
    runs = plot.read_runs(dir) if dir.is_dir() else []
    if not runs:
        die(f"{dir} holds no run with a readable config.json")
    check(runs)
    meta = plot.read_json(dir / "sweep.json") or {}
    insights = analyse(runs, margin, meta.get("ended") or "goes on: the same command continues it")
    names = [run["name"] for run in runs]
    insights["unfinished"] += sorted(x.name for x in dir.iterdir() if x.is_dir() and x.name not in names)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["setting", "lr", "seed", "status", *COLUMNS])
    for run in runs:
        values = [run["summary"].get(column) for column in COLUMNS]     # csv writes None as nothing
        rows.writerow([run["setting"], f"{run['lr']:g}", run["seed"], run["status"], *values])
        if not (run["dir"] / "loss_curves.png").exists():
            plot.draw_run(run["dir"])
    text = write_up(insights)
    write_aside(dir / "summary_table.csv", table.getvalue().encode())
    write_aside(dir / "insights.json", json.dumps(insights, indent=1, allow_nan=False).encode())
    write_aside(dir / "lr_sweep_analysis.md", text.encode())
    plot.draw_sweep(dir, runs, insights)
    return text

# --------------------------------------------------------------------------------------------------
# Command line

def learning_rate(text):
    rate = float(f"{float(text):g}")
    if not 1e-9 <= rate <= 1e6:
        raise ValueError
    return rate

def positive(text):
    if not 1 <= int(text) <= 999_999:
        raise ValueError
    return int(text)

def nats(text):
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)

def parse_vary(texts):
    """["a=1,2", "b,c=3:4,5:6"] -> every combination, tuples of (flag, value); [] -> one empty setting."""
    axes = []
    for text in texts:
        names, _, values = text.partition("=")
        flags = names.replace("_", "-").split(",")
        rows = [tuple(zip(flags, value.split(":", len(flags) - 1))) for value in values.split(",")]
        if not all(len(row) == len(flags) and all(map(all, row)) for row in rows):
            die(f"--vary {text}: write FLAG=V1,V2 or FLAG1,FLAG2=A:B,C:D")
        if {"lr", "seed", "out", "preset", "data", "vocab-size"}.intersection(flags):
            die(f"--vary {text}: rates have --lrs, seeds --seeds; losses compare within one tokenizer only")
        axes.append(rows)
    return [sum(combination, ()) for combination in itertools.product(*axes)]

def parse_flags(argv):
    """argparse, twice: --preset and --study give the others defaults. -> all, and the flags for train.py."""
    about = "Sweep the learning rate. Flags not listed here go on to train.py."
    p = argparse.ArgumentParser("sweep.py", allow_abbrev=False, add_help=False, description=about,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: die(f"{message}; see --help")
    add = p.add_argument
    add("--preset", choices=GRIDS, default="tiny", help="of the model")
    add("--study", choices=STUDIES, help="a named plan, which sets defaults of the others")
    first, _ = p.parse_known_args(argv)
    grid = GRIDS[first.preset]
    study = dict(lrs=grid, flags=[]) | STUDIES.get(first.study, {})
    if "around" in study:
        study["lrs"] = [float(f"{factor * grid[(len(grid) - 1) // 2]:.2g}") for factor in study["around"]]

    add("-h", "--help", action="help", help="show this and stop")
    add("--lrs", nargs="+", type=learning_rate, help="rates to start from")
    add("--seeds", type=positive, default=1, help="of the rates that matter")
    add("--refine", type=int, default=0, choices=range(10),
        help="halve the distance between rates around the best, so often")
    add("--vary", action="append", default=[], help="FLAG=V1,V2 of train.py, or FLAG1,FLAG2=A:B,C:D")
    add("--widen", action=argparse.BooleanOptionalAction, default=True,
        help="go outward to the edge and close in on the best; --no-widen: only the rates given")
    add("--max-runs", type=positive, help="at most this many; None: 16 for each setting and seed")
    add("--jobs", type=positive, help="runs at once; None: as many as pay")
    add("--margin", type=nats, default=0.01, help="nats: settings within it are called the same")
    add("--name", help="folder under runs/; None: from the flags")
    add("--device", default="auto", help="as train.py takes it")
    add("--mix-code", action="store_true", help="compare runs of edited code with those before the edit")
    add("--dry-run", action="store_true", help="print the next round's commands, one a line, and stop")
    add("--report", type=Path, help="analyse and draw again what lies in this folder, and stop")
    p.set_defaults(failed=[], owner=None, **study)
    return p.parse_known_args(argv)

def make_plan(args, extra):
    """args, checked, with what the search and its runs need besides."""
    own = {"--lr", "--seed", "--out", "--resume", "--prepare", "--data-tokens"}
    for word in own.intersection(word.split("=")[0] for word in extra):
        die(f"{word} is set by the sweep; see --lrs, --seeds and --name in --help")
    if args.name is None:
        varied = [text.split("=")[0] for text in args.vary]
        words = [args.preset, args.study or "", *varied, *extra]
        args.name = "-".join(word.strip("-") for word in words if word)
        args.name = re.sub(r"[^\w.+-]+", "_", args.name)[:150]
    if Path(args.name).name != args.name or args.name in ("", ".."):
        die(f"--name {args.name!r}: a plain name, for a folder under runs/")
    args.dir = Path("runs") / args.name
    args.flags = ["--preset", args.preset, "--device", args.device, *args.flags, *extra]
    args.settings = parse_vary(args.vary)
    args.max_runs = args.max_runs or args.seeds * len(args.settings) * max(16, len(args.lrs))
    args.gpus = visible_gpus(args.device)
    fitting = 1     # on a CPU a large run fills all cores, and a Mac has one GPU
    if args.gpus:
        fitting = len(args.gpus) * PER_GPU[args.preset]
    elif args.preset == "tiny" and sys.platform != "darwin":
        fitting = min(8, cores())
    args.jobs = args.jobs or fitting
    return args

def on_signal(number, frame):
    raise Stopped(number)

def main(argv):
    sys.stdout.reconfigure(line_buffering=True)
    for text in [os.getcwd(), *argv]:
        if not text.isprintable():  # a newline would cut a line of --dry-run in two, and run what follows
            die(f"{text!a}: control characters are refused")
    args, extra = parse_flags(argv)
    if args.report:
        print(report(args.report, args.margin))
        return 0
    plan = make_plan(args, extra)
    meta = dict(flags=plan.flags)
    old = plot.read_json(plan.dir / "sweep.json") or meta
    if old.get("flags") != plan.flags:
        die(f"{plan.dir} was made with other flags, {old.get('flags')}; choose another --name")
    for name in {"SIGINT", "SIGTERM", "SIGHUP"}.intersection(dir(signal)):
        signal.signal(getattr(signal, name), on_signal)
    try:
        ended = search(plan, meta)
        if plan.dry_run:
            return 0
        if plan.owner is None:
            plan.owner = lock(plan.dir)
            print("all runs were finished before and are kept; for new ones choose another --name")
        write_aside(plan.dir / "sweep.json", json.dumps(dict(meta, ended=ended), indent=1).encode())
        text = report(plan.dir, plan.margin).split("## ")[0].replace("**", "")
        print(f"\n{text}Table, analysis and pictures: {plan.dir}")
        return int(bool(plan.failed))
    except Stopped as stopped:
        print("stopped; every run keeps what it has. The same command goes on")
        return 128 + stopped.args[0]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:     # whoever read the lines has gone (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except DataError as error:  # another sweep owns the folder
        die(error)
    except OSError as error:    # a full disk, a folder that is read-only
        die(f"{error.filename or 'output'}: {error.strerror}")
