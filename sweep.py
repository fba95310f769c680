"""Sweep the learning rate: one process a run; decide what to try next; say what the runs show, and what not.

    python sweep.py                             the tiny preset: bracket the best rate, find the edge, report
    python sweep.py --preset moe --seeds 3      flags unknown here (--max-steps 400) go on to train.py
    python sweep.py --vary optimizer=adamw,muon any train.py flag, each value at its own best rate
    python sweep.py --dry-run                   the next round's commands, one a line: Slurm, xargs, Ray

The search is a function from the results to the next runs: an interrupted sweep replays it and goes on. The
statistics assume that loss against log rate falls to one valley and rises again, and rest on pairing: a seed
gives every rate the same initial weights and batches, so its luck drops out (checked: tests/simulate.py).

    use       the tried rate with the lowest mean over all seeds; what was not run is never recommended
    noise     residuals of loss[rate, seed] - mean of the rate - mean of the seed (Fisher 1935), near the best
    shown     a rate is worse where its mean paired difference to the best exceeds t(df) s / sqrt(seeds): s is
              sqrt(2) noise, or the deviation of the differences if larger; t stands at 1 - 0.025 / k for k
              rates compared (Bonferroni). A rate that diverged with two seeds, all of them, is worse too
    interval  the optimum lies between the nearest rates below and above that are shown to be worse; those in
              between are as good, as far as the seeds can tell. One seed knows no noise: 0.1 nats stand in
    settings  are compared at their best rates. What a finer grid could still gain widens the interval of the
              difference: the lowest that a convex valley through the tried rates could be between them
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
GRIDS = {   # where the search starts
    "tiny": [1e-3, 3e-3, 1e-2, 3e-2, 0.3],
    "dense": [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2],
    "dense-low": [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2],
    "moe": [0.01, 0.02, 0.035, 0.05, 0.065, 0.085, 0.1, 0.15, 0.3],
}
# A textbook run: one fixed batch, a constant rate, nothing that hides the edge of stability.
EDGE = ("--full-batch --batch-size 8 --context-length 64 --max-steps 400 --schedule constant "
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
    "edge": ("--lrs 0.004 0.01 0.025 0.06 0.15 0.4 1.0 2.5", EDGE + "sgd"),
    "edge-adamw": ("--lrs 1e-4 3e-4 1e-3 3e-3 1e-2 1e-1", EDGE + "adamw"),
}
PER_GPU = {"tiny": 4, "dense": 1, "dense-low": 8, "moe": 2}     # runs at once, measured on an H100
NEAR = 0.1      # nats, 10% perplexity: stands in for the noise where there is one seed
WORTH = 0.03    # nats that a finer grid must promise before one setting is searched closer than a factor 2

# Statistics: functions of a table {rate: {seed: loss}}; inf is the loss of a run that diverged ---

@functools.cache
def t_quantile(p, df):
    """Student's t. With t = sqrt(df) tan(a) its density becomes cos(a)^(df - 1), which a sum integrates."""
    angle = np.linspace(0, math.pi / 2, 5_001)
    density = np.cos(angle) ** (df - 1)
    cdf = np.cumsum(density) - (density + 1) / 2    # the trapezoid rule, without its factor
    return math.sqrt(df) * math.tan(np.interp(2 * p - 1, cdf / cdf[-1], angle))

def mean(values):
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan

def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

def paired(row, other):
    """Differences row - other, {seed: loss} each, over the seeds that survived in both."""
    differences = [loss - other.get(seed, math.inf) for seed, loss in row.items()]
    return [d for d in differences if math.isfinite(d)]

def rise(row, other):
    return mean(paired(row, other) or [math.inf])

def best_rate(table):
    """The lowest mean of the rates that survived in all their seeds and have the most; None: none did."""
    means = {lr: (-len(row), mean(row.values())) for lr, row in table.items() if max(row.values()) < math.inf}
    return min(means, key=means.get, default=None)

def neighbours(table, lr):
    rates = sorted(table)
    i = rates.index(lr)
    return rates[max(0, i - 1):i] + rates[i + 1:i + 2]  # below and above, those that exist

def noise_near(table, best):
    """Sum of squared two-way residuals (nats^2) and df, of the three best rates or all within NEAR."""
    rows = [[row.get(seed, math.inf) for seed in table[best]] for row in table.values()]
    rows = sorted((row for row in rows if max(row) < math.inf), key=mean)
    near = sum(mean(row) < mean(rows[0]) + NEAR for row in rows)
    x = np.array(rows[:max(3, near)])      # (rates, seeds)
    residuals = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    return np.array([np.sum(residuals ** 2), np.prod(np.subtract(x.shape, 1))])

def half_width(differences, noise, k, unknown):
    """Half the interval of a mean difference, one of k that hold together; unknown: without noise."""
    squares, df = noise
    if not df:
        return unknown
    spread = np.nanmax([math.sqrt(2 * squares / df), deviation(differences)])
    return float(t_quantile(1 - 0.025 / k, df) * spread / math.sqrt(len(differences)))

def finer_gains(table, lr):
    """{neighbour: nats by which the loss between it and this rate could be lower still}: a convex valley lies
    above the chords before and after the gap, extended. At an end of the grid: inf, the loss can be any."""
    around = neighbours(table, lr)
    if len(around) < 2:
        return dict.fromkeys(around, math.inf)
    points = [(math.log(rate / lr), max(0, rise(row, table[lr]))) for rate, row in sorted(table.items())]
    points = [point for point in points if point[1] < math.inf]     # (log rate, nats)
    gains = {}
    for near in around:
        gap = np.linspace(0, math.log(near / lr), 200)
        before = [point for point in points if point[0] <= gap.min()]
        after = [point for point in points if point[0] >= gap.max()]
        chords = [chord for chord in (before[-2:], after[:2]) if len(chord) == 2]
        lines = [np.polyval(np.polyfit(*np.transpose(chord), 1), gap) for chord in chords]
        gains[near] = max(0, -np.max(lines, axis=0, initial=-math.inf).min())
    return gains

def compare_rates(table, best):
    """-> rates shown to be worse than the best, as good ones, the nearest worse around these (or 0, inf)."""
    noise = noise_near(table, best)
    pairs = {lr: paired(row, table[best]) for lr, row in table.items() if lr != best}
    k = sum(len(d) > 1 for d in pairs.values())
    good = [best]
    worse = []
    for lr, d in pairs.items():
        if not d and len(table[lr]) == 1 < len(table[best]):
            continue    # it diverged, which with one seed of several may be bad luck
        gain = 0
        if all(0 < rise(table[x], table[lr]) < math.inf for x in neighbours(table, lr)):
            gain = max(finer_gains(table, lr).values())     # a valley of its own, whose bottom may be lower
        if not d or mean(d) > half_width(d, noise, k, NEAR) + gain:
            worse.append(lr)
        else:
            good.append(lr)
    low = max((lr for lr in worse if lr < min(good)), default=0)
    high = min((lr for lr in worse if lr > max(good)), default=math.inf)
    return worse, sorted(good), low, high

def compare_settings(tables, margin):
    """{label: table} -> the best label (None: all diverged), its comparisons with others (insights.json)."""
    rows = {}
    gain = {}
    noise = np.zeros(2)
    for label, table in tables.items():
        best = best_rate(table)
        if best:
            rows[label] = table[best]
            gain[label] = max(finer_gains(table, best).values(), default=0)
            noise += noise_near(table, best)
    winner = min(rows, key=lambda label: mean(rows[label].values()), default=None)
    comparisons = []
    for label, row in rows.items():
        d = paired(row, rows[winner])
        if label == winner or not d:
            continue
        if not noise[1]:    # one rate each: the noise is what remains between settings
            noise = noise_near(rows, winner)
        half = half_width(d, noise, math.comb(len(rows), 2), math.inf)  # the best came out of all pairs
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
    if plan.widen and best and not any(lr > best and math.inf in row.values() for lr, row in table.items()):
        rates.append(float(f"{max(table) * 3.3:.0e}"))
    # Between the best and its neighbours, until both are within a factor of 2, or closer where that pays.
    gains = finer_gains(table, best) if best else {}
    for lr, gain in gains.items():
        limit = 2.05    # rates have two digits
        if len(plan.settings) > 1 and gain > plan.margin / 2:   # it blurs their difference
            limit = 1.25
        elif gain > WORTH and len(table[best]) == 1 and max(table[lr].values()) < math.inf:
            limit = 1.4
        far = abs(math.log(lr / best)) > math.log(limit) / 2 ** plan.refine     # each halves the log distance
        if far and len(gains) == 2 and (plan.widen or plan.refine):
            rates.append(float(f"{np.clip(math.sqrt(best * lr), best / 2, best * 2):.2g}"))
    yield [(lr, 0) for lr in rates]
    # Seeds for the best and its neighbours, then for all not shown to be worse, with the next ones outside.
    rates = [best, *neighbours(table, best)] if best else []
    if best and len(table[best]) > 1:
        worse, good, _, _ = compare_rates(table, best)
        rates = good + neighbours(table, good[0])[:1] + neighbours(table, good[-1])[-1:]
        rates = [lr for lr in rates if lr not in worse]
    yield [(lr, seed) for lr in rates for seed in range(plan.seeds)
           if seed < 2 or min(table[lr].values()) < math.inf]   # two that diverged are enough

def tables_of(results):
    """{(setting, rate, seed): loss} -> {setting: table}, without the failed runs, whose loss is None."""
    tables = {}
    for (setting, lr, seed), loss in results.items():
        if loss is not None:
            tables.setdefault(setting, {}).setdefault(lr, {})[seed] = loss
    return tables

def next_runs(results, plan):
    """The search: what to run next, [(setting, rate, seed)], and why it ended (None: it has not). results:
    {(setting, rate, seed): loss} of all runs asked for so far; inf: diverged, None: failed."""
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

def folder(plan, key):
    setting, lr, seed = key
    varied = ",".join(f"{flag}={value}" for flag, value in setting)     # optimizer=muon-lr0.003-s0
    return plan.dir / re.sub(r"[^\w.+=,-]+", "_", f"{varied}-lr{lr:g}-s{seed}".lstrip("-"))

def judge(runs):
    """Sets status and loss of each run, beside the best: inf where it diverged, None where it goes on."""
    for run in runs:
        run["loss"] = None
        if run["status"] in plot.STATUSES:
            run["loss"] = run["summary"].get("final_val_loss")
            if run["status"] == "diverged" or not isinstance(run["loss"], float):
                run.update(status="diverged", loss=math.inf)
    alive = [run for run in runs if run["loss"] not in (None, math.inf) and len(run["train"]["train_loss"])]
    best = min(alive, key=lambda run: run["loss"], default=None)
    for run in alive:
        run["status"] = plot.classify(run["train"]["train_loss"], np.median(best["train"]["train_loss"][-5:]))
        if run["status"] == "diverged":
            run["loss"] = math.inf

def losses(plan, keys):
    """{key: loss}, judged beside each other; None: not finished, or not there."""
    runs = {key: plot.read_run(folder(plan, key)) for key in keys}
    judge([run for run in runs.values() if run])
    return {key: run and run["loss"] for key, run in runs.items()}

def comparable(dir, mix_code=True):
    """All runs in a folder. Dies at two texts or tokenizers and, without mix_code, at code since edited."""
    runs = plot.read_runs(dir) if dir.is_dir() else []
    code = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in TRAIN.parent.glob("*.py")}
    corpora = {}
    edited = set()  # files
    old = []        # runs of the time before
    for run in runs:
        data = run["config"].get("data") or {}
        if data:    # else config.json is damaged
            corpora[data.get("train_sha256"), data.get("val_sha256")] = run["name"]
        began = run["config"].get("code") or {}
        changed = [name for name in began if began[name] != code.get(name)]
        if changed:
            edited.update(changed)
            old.append(run["name"])
    if len(corpora) > 1:
        die(f"{' and '.join(corpora.values())} read other data; choose another --name")
    if old and not mix_code:
        if len(old) > 8:
            old[8:] = ["..."]
        die(f"the code changed since {', '.join(old)} began ({', '.join(sorted(edited))}); choose another "
            "--name, or compare old and new code with --mix-code")
    return runs

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
    if names is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        return [str(i) for i in range(listed.count("UUID"))]
    return re.findall(r"[^\s,]+", names or "")

def command(plan, key, *more):
    setting, lr, seed = key
    varied = [word for flag, value in setting for word in (f"--{flag}", value)]
    own = ["--lr", f"{lr:g}", "--seed", str(seed), "--out", str(folder(plan, key)), "--resume", "--no-plot"]
    return [sys.executable, str(TRAIN), *plan.flags, *varied, *own, *more]

def ask_train(plan, key, flag):
    asked = subprocess.run(command(plan, key, flag), stdout=subprocess.PIPE, text=True, **CHILD)
    if asked.returncode:
        raise SystemExit(2)     # it has said why
    return asked.stdout     # of --dry-run or --prepare, which train.py answers at once

def start(plan, key, slot):
    env = dict(os.environ)
    if plan.gpus:
        env["CUDA_VISIBLE_DEVICES"] = plan.gpus[slot % len(plan.gpus)]  # each has its share of the slots
    if plan.jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // plan.jobs)))
    folder(plan, key).mkdir(parents=True, exist_ok=True)
    with open(folder(plan, key) / "stderr.log", "wb") as log:
        return subprocess.Popen(command(plan, key), stdout=subprocess.DEVNULL, stderr=log, env=env, **CHILD)

def finish(plan, key):
    loss = losses(plan, [key])[key]     # the status waits for better runs to judge it by
    log = folder(plan, key) / "stderr.log"
    text = log.read_text(errors="replace")
    if not text:
        log.unlink()
    if loss is None:
        print(f"{log.parent.name}: FAILED, the others go on. The end of {log}:")
        print(*text.splitlines()[-6:], sep="\n")
    else:
        print(f"{log.parent.name}: val loss {loss:.3f}".replace("val loss inf", "diverged"))

def execute(plan, keys):
    running = {}    # slot: (key, process)
    try:
        while keys or running:
            for slot in range(plan.jobs):
                if slot in running and running[slot][1].poll() is not None:
                    finish(plan, running.pop(slot)[0])
                if slot not in running and keys:
                    key = keys.pop(0)
                    running[slot] = key, start(plan, key, slot)
            time.sleep(0.05)
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

def prepare(plan, todo):
    """Once, before the first run: one corpus, one code, and one owner of the folder. Returns its lock."""
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
    flags = plan.flags  # to which prepare adds
    made_with = (plot.read_json(plan.dir / "sweep.json") or {}).get("flags", flags)
    if made_with != flags:
        die(f"{plan.dir} was made with other flags, {made_with}; choose another --name")
    results = {}
    owner = ended = None
    while not ended:
        keys, ended = next_runs(results, plan)
        todo = [key for key, loss in losses(plan, keys).items() if loss is None]
        if todo and not plan.dry_run:   # in each round: somebody may have edited what it reads
            comparable(plan.dir, plan.mix_code)
        if todo or ended:
            owner = owner or prepare(plan, todo)
            write_aside(plan.dir / "sweep.json", json.dumps(dict(flags=flags, ended=ended)).encode())
        execute(plan, todo)
        results = losses(plan, [*results, *keys])
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
    use = [dict(setting=winner, lr=s["best_lr"], val_loss=s["best_loss"], low=s["low"], high=s["high"])
           for s in settings if s["label"] == winner] or [None]
    minutes = sum(run["summary"].get("seconds") or 0 for run in runs) / 60
    insights = dict(best=use[0], use=use[0], margin=margin, comparisons=comparisons, settings=settings,
                    runs=len(runs), minutes=minutes,
                    one_batch=any(run["args"].get("full_batch") for run in runs))
    return json.loads(json.dumps(insights), parse_constant=lambda unknown: None)   # nan and inf become None

def analyse_setting(label, table, runs):
    """One setting: what is known of its best rate, a row for each rate, and what these have in common."""
    best = best_rate(table)
    worse, good, low, high = compare_rates(table, best) if best else ([], [], None, None)
    squares, df = noise_near(table, best) if best else (0, 0)
    rates = []
    for lr in sorted(table):
        row = analyse_rate([run for run in runs if (run["setting"], run["lr"]) == (label, lr)])
        row.update(shown=lr in worse, difference=rise(table[lr], table.get(best, {})))
        if row["difference"] < math.inf:    # without its seeds' luck: in the order of the pairs
            row["val_loss"] = mean(table[best].values()) + row["difference"]
        elif lr not in worse:   # it diverged with its only seed: nobody knows
            row["shown"] = None
        rates.append(row)
    x = [[math.log(row["lr"]), row["val_loss"], row["val_accuracy"], row["val_perplexity"]]
         for row in rates if math.isfinite(row["val_loss"])]    # (rates that survived, 4)
    values = [row[1] for row in x] or [math.nan]
    summary = dict(mean=mean(values), deviation=deviation(values), best=min(values), worst=max(values))
    correlation = [None] * 3
    if len(x) > 2:
        with np.errstate(all="ignore"):     # no variation, no correlation
            correlation = np.corrcoef(x, rowvar=False)[0, 1:]
    return dict(label=label, best_lr=best, best_loss=mean(table.get(best, {}).values()), low=low or None,
                high=high, as_good=[lr for lr in good if max(table[lr].values()) < math.inf],
                noise=math.sqrt(squares / df) if df else None, seeds=len(table.get(best, {})), rates=rates,
                bracketed=bool(best) and len(neighbours(table, best)) == 2,
                edge=find_edge(rates, best) if best else None, summary=summary,
                correlation=dict(zip(("loss", "accuracy", "perplexity"), correlation)))

def analyse_rate(runs):
    runs = [run for run in runs if run["loss"] is not None]
    alive = [run for run in runs if run["loss"] < math.inf]     # the means are of these
    states = [run["status"] for run in runs]
    row = dict(lr=runs[0]["lr"], seeds=[run["seed"] for run in runs], unstable=states.count("unstable"),
               diverged=states.count("diverged"), status=max(states, key=plot.STATUSES.index),
               deviation=deviation([run["loss"] for run in alive]),
               max_grad_norm=mean(run["summary"].get("max_grad_norm") for run in runs))
    for name in ("val_loss", "val_accuracy", "val_perplexity", "val_bpb"):
        row[name] = mean(run["summary"].get("final_" + name) for run in alive)
    seconds = mean(run["summary"].get("seconds") for run in alive)
    row["accuracy_per_minute"] = row["val_accuracy"] / max(seconds / 60, 1e-9)
    return row

def find_edge(rates, best):
    """The first unstable and the first diverged rate above the best, in how many of their seeds, and the rate
    below the diverged one: runs begin to diverge somewhere between these two. None: neither was found."""
    edge = dict.fromkeys(("lr", "ratio", "survived", *plot.EDGE))
    for below, row in reversed(list(itertools.pairwise(rates))):
        for status in plot.EDGE:
            if row["lr"] > best and row[status]:
                edge["lr"] = row["lr"]
                edge[status] = dict(lr=row["lr"], seeds=row[status], of=len(row["seeds"]))
                if status == "diverged":
                    edge.update(ratio=row["lr"] / best, survived=below["lr"])
    return edge if edge["lr"] else None

# Report -------------------------------------------------------------------------------------------

COLUMNS = ("steps", "final_val_loss", "final_val_accuracy", "final_val_perplexity", "final_val_bpb",
           "final_train_loss", "best_val_loss", "best_val_step", "max_grad_norm")   # no times: repeatable
ANSWERS = {
    "tested": """the lowest mean of {seeds} seeds. The optimum lies from {between}; paired tests show the \
limits to be worse, 95% together (noise {noise:.4f} nats). As good, as far as {seeds} seeds can tell: \
{good}.""",
    "one seed": """the lowest loss with **one seed**; another may have another best. As a rule of thumb, not \
a test, the optimum lies from {between}; the limits are over 0.1 nats worse. As good, it seems: {good}.""",
    "one rate": """no rival: no other rate survived all its {seeds} seeds, if one was tried. Where the \
optimum lies is unknown."""}
FIRST = "The first {} rate above the best is {lr:g}, in {seeds} of {of} seeds."
DIVERGE = """Runs begin to diverge somewhere between {survived:g} and there, at {least:.1f} to {ratio:.1f} \
times the best rate; by the folk rule 2 to 4 is usual, less is near the edge, more is conservative."""
RATES = "`difference`: nats above the best, paired over seeds; `shown`: to be worse (empty: no pair tells)."

def markdown(rows, columns):
    """A table of some columns of insights.json."""
    lines = [columns.split(), ["---"] * len(columns.split())]
    for row in rows:
        cells = []
        for column in lines[0]:
            digits = ".6g" if column == "lr" else ".4g"
            cells.append(format(row[column], digits) if isinstance(row[column], float) else str(row[column]))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace(" None ", "  ")

def write_up(insights):
    """lr_sweep_analysis.md, the answer first. Every number in it comes out of insights."""
    use = insights["use"]
    comparisons = insights["comparisons"]
    first = "There is no answer: no run has survived. Try lower rates with --lrs."
    text = ["The search {ended}. {runs} runs took {minutes:.1f} minutes.".format(**insights)]
    if insights["unfinished"]:
        text.append(f"Left out, not finished or damaged: {', '.join(insights['unfinished'])}.")
    unsure = [c["worse"] for c in comparisons if c["verdict"] != "shown"]
    if unsure:
        text.append(f"{use['setting']} is not shown to be better than {' and '.join(unsure)}.")
    if comparisons:
        text.append("## Settings, each at its best rate (same: within {margin:g} nats)".format(**insights))
        text.append(markdown(comparisons, "better worse difference low high seeds verdict"))
    for s in insights["settings"]:
        text += [f"## Rates {s['label']}".strip(), RATES]
        text.append(markdown(s["rates"], "lr seeds status unstable diverged difference shown val_bpb"))
        if use and use["setting"] == s["label"]:
            limits = [f"{lr:g}" if lr else "no known limit" for lr in (s["low"], s["high"])]
            good = [f"{lr:g}" for lr in s["as_good"] if lr != s["best_lr"]]
            name = "tested"
            if s["noise"] is None:
                name = "one seed" if s["seeds"] == 1 else "one rate"
            why = ANSWERS[name].format(**s, between=" to ".join(limits), good=", ".join(good) or "no other")
            first = f"**Use {s['best_lr']:g} {s['label']}".strip()
            first += f"**, validation loss {s['best_loss']:.3f} nats a token. It has {why}"
        edge = s["edge"] or {}
        for status in plot.EDGE:
            if edge.get(status):
                text.append(FIRST.format(status, **edge[status]))
            elif s["best_lr"]:
                text.append(f"No rate from the best to {s['rates'][-1]['lr']:g} was {status}.")
        if edge.get("diverged"):
            text.append(DIVERGE.format(**edge, least=edge["survived"] / s["best_lr"]))
        text.append("Over the rates that survived, and the correlation of their log rate with:")
        text.append(markdown([s["summary"] | s["correlation"]],
                             "mean deviation best worst loss accuracy perplexity"))
    if insights["one_batch"]:
        first = "These runs fit one batch: their validation loss recommends no rate. Look at sharpness.png."
    return "\n\n".join(["# Which learning rate?", first, *text]) + "\n"

def report(dir, margin):
    """Reads the runs under dir, and writes table, analysis and all pictures there; returns the analysis."""
    runs = comparable(dir)
    if not runs:
        die(f"{dir} holds no run with a readable config.json")
    insights = analyse(runs, margin)
    ended = (plot.read_json(dir / "sweep.json") or {}).get("ended")
    insights["ended"] = ended or "goes on: the same command continues it"
    done = [run["name"] for run in runs if run["loss"] is not None]
    insights["unfinished"] = sorted(x.name for x in dir.iterdir() if x.is_dir() and x.name not in done)
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

def make_plan(argv):
    """The flags, checked, and what follows from them: flags and settings of the runs, dir, gpus, jobs."""
    about = "Sweep the learning rate. Flags not listed here go on to train.py."
    p = argparse.ArgumentParser("sweep.py", allow_abbrev=False, add_help=False, description=about,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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
    add("--max-runs", type=positive, help="at most this many; None: 16 for each setting and seed")
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
    if Path(plan.name).name != plan.name or plan.name in ("", ".."):
        die(f"--name {plan.name!r}: a plain name, for a folder under runs/")
    if not 0 <= plan.margin < math.inf:
        die(f"--margin {plan.margin}: a number of nats, from 0")
    plan.dir = Path("runs") / plan.name
    plan.settings = parse_vary(plan.vary)
    plan.max_runs = plan.max_runs or plan.seeds * len(plan.settings) * max(16, len(plan.lrs))
    plan.gpus = visible_gpus(plan.device)
    on_cpu = 1      # a larger run fills all cores, and a Mac has one GPU
    if plan.preset == "tiny" and sys.platform != "darwin":
        on_cpu = min(8, cores())
    plan.jobs = plan.jobs or len(plan.gpus) * PER_GPU[plan.preset] or on_cpu
    return plan

def main(argv):
    sys.stdout.reconfigure(line_buffering=True)
    for text in [os.getcwd(), *argv]:
        if not text.isprintable():  # a newline would cut a line of --dry-run in two, and run what follows
            die(f"{text!a}: control characters are refused")
    plan = make_plan(argv)
    if plan.report:
        print(report(plan.report, plan.margin))
        return 0
    for name in {"SIGINT", "SIGTERM", "SIGHUP"}.intersection(dir(signal)):
        signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    try:
        return run_sweep(plan)
    except SystemExit as end:
        if end.code > 128:  # by one of these signals
            print("stopped; every run keeps what it has. The same command goes on")
        raise

if __name__ == "__main__":
    if sys.stdout is None:      # closed by whoever started this
        sys.stdout = open(os.devnull, "w")
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:     # whoever read the lines has gone (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except DataError as error:  # another sweep owns the folder
        die(error)
    except OSError as error:    # a full disk, a folder that is read-only
        die(f"{error.filename or 'output'}: {error.strerror}")
