"""Sweep the learning rate: one process a setting; decide what to try next; say what the runs show and what they do not.

    python sweep.py                                the tiny preset: grid, widening until bracketed, pictures, analysis
    python sweep.py --preset moe --seeds 3         anything unknown here (--max-steps 400) goes on to train.py
    python sweep.py --vary optimizer=adamw,muon    any train.py flag; --vary warmup-ratio,min-lr-ratio=0.1:0,0:0.1
    python sweep.py --study full                   coarse, zoom, seeds, schedules; the other studies: --help
    python sweep.py --dry-run                      one command a line, for Slurm arrays, xargs or Ray; then plot.py DIR

What to run is decided by one generator, `search`: it yields rounds of (setting, rate, seed) and is sent the losses.
A restart replays it, and finished runs answer at once: an interrupted sweep ends exactly like one left alone.

The statistics are pure functions and rest on pairing: seed s gives every rate the same initial weights and batches.
    noise    loss[rate, seed] = mean[rate] + effect[seed] + noise, by least squares (randomized blocks): the luck that a
             seed brings to all rates alike drops out of every difference
    compare  difference of two means +- t(df) noise sqrt(2 / seeds); each of k comparisons at 1 - 0.05 / k (Bonferroni):
             "shown" is wrong in at most one study of 20, not in one comparison of 20
    optimum  bootstrap: resample that noise, fit a parabola to the 3 rates around the best and a cubic to all within a
             factor 2 (at least 5), take each one's lowest point; the interval holds 95% of them. Loss rises faster
             above the optimum than below, so that between two neighbours the shape is a guess: a tenth of the distance
             (in log rate) is added, or a third of what exceeds a factor 1.5. On simulated sweeps 92 to 100 of 100 such
             intervals hold the true optimum (tests/test_sweep.py prints the figures)

insights.json (losses in nats): {runs, finished, seeds, minutes, unfinished [names], best {setting, lr, val_loss},
use {setting, lr, low, high}, comparisons [{better, worse, difference, low, high, seeds, shown, seeds_needed, sentence}],
settings [{label, flags, best_lr, best_loss, optimum {lr, low, high, fitted, curve [[lr, loss]]}, as_good [low, high] or
null, untested [lr], edge {lr, calm, ratio, status, seeds, diverged} or null, searched_up_to, bracketed, noise, df, correlation {loss, accuracy,
perplexity}, summary {mean, deviation, best, worst}, rates [{lr, seeds, status, edge_seeds, val_loss, deviation,
val_accuracy, val_perplexity, val_bpb, max_grad_norm, accuracy_per_minute}]}]}
"""
import argparse
import bisect
import csv
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import plot

TRAIN = Path(os.environ.get("NANOLR_TRAIN") or Path(__file__).with_name("train.py")).resolve()

# ----------------------------------------------------------------------------------------------------------------------
# What to try

GRIDS = {
    "tiny": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    "dense": [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2],
    "dense-low": [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2],
    "moe": [0.01, 0.02, 0.035, 0.05, 0.065, 0.085, 0.1, 0.15, 0.3],
}
WARMUP_AND_FLOOR = {"conservative": ("0.1", "0.05"), "baseline": ("0.05", "0.1"), "none": ("0", "0.1"),
                    "aggressive": ("0.02", "0.2"), "long": ("0.2", "0.1")}
SCHEDULES = "warmup-ratio,min-lr-ratio=" + ",".join(":".join(pair) for pair in WARMUP_AND_FLOOR.values())
STUDIES = {  # defaults that the command line overrides; "around": multiples of the middle rate of the preset's grid
    "explore": dict(lrs=[0.001, 0.01, 0.03, 0.1, 0.3], flags=["--max-steps", "50"], widen=False),
    "extend": dict(around=[0.15, 0.3, 0.5, 0.7, 0.8, 1, 1.2, 1.5, 2, 3, 5], flags=["--max-steps", "100"], widen=False),
    "fine": dict(lrs=[0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.13, 0.14], flags=["--max-steps", "75"], widen=False),
    "wide": dict(lrs=[0.001, 0.002, 0.003, 0.004, 0.006, 0.008,            # conservative
                      0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08,    # moderate
                      0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4,                # aggressive
                      0.5, 0.6, 0.7, 0.85, 1.0], widen=False),             # extreme
    "schedules": dict(around=[1], vary=[SCHEDULES], seeds=3, widen=False),
    "full": dict(refine=1, seeds=3, schedules=[SCHEDULES]),
}
EDGE = ("unstable", "diverged")
RANK = ("converged", "slow", "stopped", *EDGE)  # a finished run is one of these; the worst of its seeds names a rate
NEAR = 0.1      # nats (10% perplexity): rates this close to the best after one seed get the other seeds too
HOPELESS = 0.5  # nats: --stop-hopeless ends a run this far above the best one at the same step, half-way through


def half_decades(lr, way):
    """The next rate of 1, 3, 10, 30, ... upward (way 1) or downward (-1), at least a factor 1.9 away."""
    rates = [float(f"{m}e{k}") for k in range(-12, 9) for m in (1, 3)]
    return min(x for x in rates if x >= 1.9 * lr) if way > 0 else max(x for x in rates if x <= lr / 1.9)


def outward(curve):
    """curve {lr: (loss, status)} -> rates to add: below and above, until the best is inside and an edge is known."""
    rates = sorted(lr for lr in curve if 1e-9 < lr < 1e6)
    alive = [lr for lr in rates if curve[lr][0] < math.inf]
    if not rates:
        return []
    best = min(alive or rates[:1], key=lambda lr: curve[lr][0])
    edge = any(curve[lr][1] in EDGE for lr in rates if lr > best or not alive)
    return [half_decades(rates[0], -1)] * (best == rates[0]) + [half_decades(rates[-1], 1)] * (not edge)


def zoom(curve, r):
    """3 to 5 rates within a factor 2 of the fitted optimum (in round r: the r-th root of 2), but none twice."""
    found = optimum({lr: {0: loss} for lr, (loss, _) in curve.items()}, draws=50)
    new = {float(f"{found['lr'] * 2 ** (f / r):.2g}") for f in (-1, -0.5, 0, 0.5, 1)} if found else ()
    return sorted(lr for lr in new if all(abs(math.log(lr / known)) > 0.1 / r for known in curve))


def survivors(curve, noise):
    """Rates worth more seeds: those near the best (as the noise, once known, defines near), and its two neighbours."""
    alive = sorted(lr for lr in curve if curve[lr][0] < math.inf)
    best = min(alive, key=lambda lr: curve[lr][0], default=None)
    return [lr for i, lr in enumerate(alive)
            if abs(i - alive.index(best)) <= 1 or curve[lr][0] <= curve[best][0] + max(NEAR, 3 * noise)]


def search(settings, lrs, seeds=1, refine=0, widen=True, limit=16, schedules=(), all_seeds=False):
    """A generator: yields rounds, lists of keys (setting, lr, seed); is sent {key: (loss, status)} of all that finished
    so far (loss inf: diverged); returns why it ended. It depends on nothing but what it is sent."""
    asked, results, ended = [], {}, "its plan is complete"
    first = range(seeds) if all_seeds else [0]

    def ask(keys):
        nonlocal asked, results, ended
        new = [k for k in dict.fromkeys(keys) if k not in asked]
        if len(asked) + len(new) > limit:
            new, ended = new[:limit - len(asked)], f"the limit of {limit} runs was reached (--max-runs)"
        asked += new
        if new:
            results = yield new
        return bool(new)

    def table(setting):
        rates = dict.fromkeys(lr for s, lr, _ in results if s == setting)
        return {lr: {k[2]: loss for k, (loss, _) in results.items() if k[:2] == (setting, lr)} for lr in rates}

    def curve(setting):
        means, states = block_means(table(setting))[0], {}
        for (s, lr, _), (_, state) in results.items():
            if s == setting:
                states[lr] = max(states.get(lr, state), state, key=RANK.index)
        return {lr: (means.get(lr, math.inf), state) for lr, state in states.items()}

    yield from ask((s, lr, seed) for seed in first for s in settings for lr in lrs)
    while widen and (yield from ask((s, lr, seed) for s in settings for lr in outward(curve(s)) for seed in first)):
        pass
    for r in range(1, refine + 1):
        yield from ask((s, lr, seed) for s in settings for lr in zoom(curve(s), r) for seed in first)
    while (yield from ask([(s, lr, seed) for s in settings for lr in (outward(curve(s)) if widen else ()) for seed in first] +
                          [(s, lr, seed) for seed in range(seeds) for s in settings
                           for lr in survivors(curve(s), near_noise(table(s))[0])])):
        pass  # more seeds can move the best rate, to an end of the grid too
    if widen and results and not any(outward(curve(s)) for s in settings):
        ended = "the best rate has worse neighbours on both sides and the edge is known"
    best = min(((loss, lr) for s in settings for lr, (loss, _) in curve(s).items()), default=None)
    if best:
        yield from ask((s, best[1], seed) for s in schedules for seed in range(seeds))
    return ended


# ----------------------------------------------------------------------------------------------------------------------
# Statistics. A table is {row: {seed: loss}}; a row is a rate or a setting; a row with a loss of inf diverged

def t_quantile(p, df):
    """Student's t. With t = sqrt(df) tan(a) its density becomes cos(a)^(df - 1), which a plain sum integrates."""
    a = np.linspace(0, math.pi / 2, 5_001)
    density = np.cos(a) ** (df - 1)
    cdf = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(df) * math.tan(np.interp(2 * p - 1, cdf / cdf[-1], a))


def block_means(table):
    """Least squares of loss = mean[row] + effect[seed] + noise -> ({row: mean}, residuals, degrees of freedom).

    Effects sum to zero: a row that has every seed gets its plain mean. Rows far from the best one weigh little: runs
    near the edge are wild, and their luck is not that of the others. Rows that diverged are left out.
    """
    rows = [r for r in table if table[r] and all(math.isfinite(x) for x in table[r].values())]
    seeds = sorted({s for r in rows for s in table[r]})
    cells = [(i, s, table[r][s]) for i, r in enumerate(rows) for s in table[r]]
    if not cells:
        return {}, np.zeros(0), 0
    X = np.array([[i == j for j in range(len(rows))] + [(s == q) - (s == seeds[-1]) for q in seeds[:-1]]
                  for i, s, _ in cells], float)
    y, weight = np.array([loss for _, _, loss in cells]), np.ones(len(cells))
    for _ in range(2):
        coef, _, rank, _ = np.linalg.lstsq(X * weight[:, None], y * weight, rcond=None)
        gap = (coef[:len(rows)] - coef[:len(rows)].min()) / NEAR
        weight = np.array([1 / max(1, gap[i]) ** 2 for i, _, _ in cells])
    return dict(zip(rows, coef.tolist())), y - X @ coef, len(y) - int(rank)


def noise_of(table):
    """Standard deviation of the run-to-run noise and its degrees of freedom (0, 0: one seed cannot show it)."""
    _, residuals, df = block_means(table)
    return (math.sqrt(float(residuals @ residuals) / df), df) if df else (0.0, 0)


def near_best(table):
    """The rates whose noise speaks for the best one's: those near it in loss, or, in a steep valley, its two neighbours."""
    means = block_means(table)[0]
    rates, best = sorted(means), min(means, key=means.get)
    near = [lr for lr in rates if means[lr] <= means[best] + NEAR]
    at = rates.index(best)
    return near if noise_of({lr: table[lr] for lr in near})[1] else rates[max(0, at - 1):at + 2]


def near_noise(table):
    return noise_of({lr: table[lr] for lr in near_best(table)}) if block_means(table)[0] else (0.0, 0)


def compare(a, b, noise, df, k=1):
    """Paired difference of losses a - b ({seed: loss} each) with an interval that holds for k comparisons together.

    The error is the pooled noise of the whole table, but never less than that of this pair's own differences.
    """
    d = np.array([a[s] - b[s] for s in sorted(a.keys() & b.keys())])
    n, difference = len(d), float(d.mean()) if len(d) else math.nan
    if n < 2 or not df:
        return dict(difference=difference, low=-math.inf, high=math.inf, seeds=n, shown=False, seeds_needed=None)
    spread = max(noise * math.sqrt(2), float(d.std(ddof=1)))

    def half_width(m):  # with m seeds
        return t_quantile(1 - 0.025 / k, df * (m - 1) / (n - 1)) * spread / math.sqrt(m)
    half, needed = half_width(n), 2 + bisect.bisect(range(2, 1001), 0, key=lambda m: half_width(m) < abs(difference))
    return dict(difference=difference, low=difference - half, high=difference + half, seeds=n,
                shown=abs(difference) > half, seeds_needed=needed if needed <= 1000 else None)


def sentence(a, b, c):
    """c = compare(a, b) in plain words."""
    better, worse, low, high = (a, b, -c["high"], -c["low"]) if c["difference"] <= 0 else (b, a, c["low"], c["high"])
    text = f"{better} beats {worse} by {abs(c['difference']):.4f} nats"
    if low == -math.inf:
        return f"{text} on {plural(c['seeds'], 'seed')}: not shown, one seed has no interval"
    text += f", interval [{low:.4f}, {high:.4f}]: "
    if c["shown"]:
        return f"{text}shown by {c['seeds']} seeds"
    more = f"about {c['seeds_needed']}" if c["seeds_needed"] else "over 1,000"
    return f"{text}not shown by {c['seeds']} seeds; {more} would be needed"


def optimum(table, draws=2000, points=201):
    """The rate of the lowest loss, tried or between -> {lr, low, high, fitted, curve}; the method: top of the file."""
    means, residuals, df = block_means(table)
    if not means:
        return None
    rates, tried = sorted(means), sorted(table)
    x, y = np.log(rates), np.array([means[lr] for lr in rates])
    b = int(y.argmin())
    one_seed = len(residuals) == len(rates)
    left, right = max(0, b - 3), min(len(x), b + 4)
    if one_seed and right - left > 3:  # what a parabola leaves over stands in for the noise
        P = np.vander(x[left:right], 3)
        residuals, df = y[left:right] - P @ np.linalg.lstsq(P, y[left:right], rcond=None)[0], right - left - 3
    if b in (0, len(x) - 1) or not df:  # no fit: it lies between the neighbours, diverged ones included
        around = tried[max(0, tried.index(rates[b]) - 1):tried.index(rates[b]) + 2]
        return dict(lr=rates[b], low=around[0], high=around[-1], fitted=False, curve=[])
    rng = np.random.default_rng(0)
    residuals = residuals * math.sqrt(len(residuals) / df) * t_quantile(0.975, df) / 1.96  # few seeds know it badly
    noisy = y + np.stack([rng.choice(residuals, (draws, len(table[lr]))).mean(1) for lr in rates], axis=1)
    close, centres, found, curves = np.flatnonzero(abs(x - x[b]) < math.log(2.01)), [], [], []
    for degree, lo, hi in ((2, b - 1, b + 1), (3, min(b - 2, close[0]), max(b + 2, close[-1]))):
        lo, hi = max(0, lo), min(len(x), hi + 1)
        if hi - lo > degree:
            grid = np.linspace(x[lo], x[hi - 1], points)
            fit = np.vander(grid - x[b], degree + 1) @ np.linalg.pinv(np.vander(x[lo:hi] - x[b], degree + 1))
            curves.append([[math.exp(g), float(c)] for g, c in zip(grid, fit @ y[lo:hi])])
            centres.append(grid[(fit @ y[lo:hi]).argmin()])
            found.append(grid[(noisy[:, lo:hi] @ fit.T).argmin(1)])
    centre, (low, high) = float(np.mean(centres)), np.quantile(np.concatenate(found), [0.025, 0.975])
    j = min(max(int(np.searchsorted(x, centre)), 1), len(x) - 1)
    guess = max((x[j] - x[j - 1]) / 10, (x[j] - x[j - 1] - math.log(1.5)) / 3)
    sure = 2 * NEAR if one_seed else NEAR + 3 * near_noise(table)[0]
    walls = x[y > y[b] + sure]  # a valley has its bottom between rates that are surely worse
    low = max([x[0], low - guess] + [w for w in walls if w < x[b]])
    high = min([x[-1], high + guess] + [w for w in walls if w > x[b]])
    return dict(lr=math.exp(min(max(centre, low), high)), low=math.exp(low), high=math.exp(high), fitted=True,
                curve=curves[0])


def correlation(x, y):
    """Pearson's r, or None where it does not exist."""
    x, y = np.array(x, float), np.array(y, float)
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and np.isfinite(y).all() and x.std() * y.std() > 0 else None


# ----------------------------------------------------------------------------------------------------------------------
# Running

def judge(runs):
    """Sets status and loss of each run: loss is inf where it diverged or was stopped, None where it has not finished.
    The slow and the stuck are told by the best run among them."""
    for run in runs:
        summary, losses = run["summary"], run["train"].get("train_loss", ())
        status, loss = summary.get("status", "running"), summary.get("final_val_loss")
        status = "diverged" if status in RANK and loss is None else status
        status = "stopped" if (run["dir"] / "hopeless").exists() else status
        loss = None if status not in RANK else math.inf if status in ("diverged", "stopped") else float(loss)
        run.update(status=status, loss=loss, level=float(np.median(losses[-5:])) if len(losses) > 1 else math.inf)
    alive = [r for r in runs if r["loss"] is not None and max(r["loss"], r["level"]) < math.inf]
    best = min(alive, key=lambda r: r["level"], default=None)
    for run in alive:
        run["status"] = plot.classify(run["train"]["train_loss"], best["level"])
        if run["status"] == "diverged" and run.get("lr", 0) < best.get("lr", 0) and run["summary"]["status"] != "diverged":
            run["status"] = "slow"  # it learned nothing either, but for the opposite reason
        run["loss"] = math.inf if run["status"] == "diverged" else run["loss"]
    return runs


def folder(setting, lr, seed):
    """Name of a run's folder: what varies."""
    return re.sub(r"[^\w.+-]+", "_", "-".join([f"{k}{v}" for k, v in setting] + [f"lr{lr:g}", f"s{seed}"]))


def title(key):
    setting, lr, seed = key
    return f"{label(dict(setting)) + ', ' if setting else ''}lr {plot.rate(lr)} seed {seed}"


def command(plan, key):
    setting, lr, seed = key
    return [sys.executable, str(TRAIN), *plan.flags, *(x for k, v in setting for x in (f"--{k}", v)), "--lr", f"{lr:g}",
            "--seed", str(seed), "--out", str(plan.dir / folder(*key)), "--resume", "--no-plot", "--no-progress"]


def flag_values(words):
    """["--lr", "1e-3", "--no-compile"] -> {"lr": "1e-3", "compile": False}; the last one wins, as in argparse."""
    values, key = {}, None
    for word in words:
        if word.startswith("--"):
            key, given, value = word[2:].partition("=")
            key, on = (key[3:], False) if key == "no-compile" else (key, True)  # train.py's only flag of two faces
            key = key.replace("-", "_")
            values[key] = value if given else on
        elif key:
            values[key] = word
    return values


def differences(wanted, found):
    """Flags whose values differ, in words; 0.10 and 1e-1 are the same value."""
    return "; ".join(f"--{k.replace('_', '-')} was {found.get(k, 'not given')}, is {v}" for k, v in wanted.items()
                     if k not in ("device", "out") and plain(found.get(k, "not given")) != plain(v))


def load(plan, key):
    """The finished run of this key, or None; it must have been made with the same flags."""
    run = plot.read_run(plan.dir / folder(*key))
    if not run or judge([run])[0]["loss"] is None:
        return None
    if found := differences(flag_values(command(plan, key)[2:-3]), run["args"]):
        die(f"{run['dir']} was made with other settings ({found}); choose another --name")
    return run


def ask_nvidia(*flags):
    try:
        return subprocess.run(["nvidia-smi", *flags], capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []


def visible_gpus(device="auto"):
    """Ids of the GPUs to use, without importing torch (2 s)."""
    if device not in ("auto", "cuda"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [x for x in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if x.strip()]
    return [str(i) for i in range(sum(line.startswith("GPU") for line in ask_nvidia("-L")))]


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def auto_jobs(preset, gpus):
    """
    How many runs at once, and the seconds before the end of one at which the next may start. Tiny on a CPU: one a core (on 2
    cores two at once, a thread each, take 0.7 of the time that they take in turn); a larger preset fills all cores by itself,
    and a Mac may have one GPU. On GPUs by the table, as far as the free memory goes; the next run starts early if there is
    memory for one more. Measured on an H100, seconds a run: dense-low 28 seven at once, 32 three at once; dense 131 one at a
    time, 149 two at once (with attention.py 126 one at a time, of which the lead hides 15).
    """
    if not gpus:
        return (min(8, cores()) if preset == "tiny" and sys.platform != "darwin" else 1), 0
    #        runs a GPU, GiB that each takes, lead
    table = {"tiny": (4, 2, 0), "dense-low": (8, 6, 0), "dense": (1, 12, 15), "moe": (2, 12, 0)}
    per_gpu, gib, lead = table.get(preset, (1, 1, 0))
    free = ask_nvidia("--query-gpu=memory.free", "--format=csv,noheader,nounits")
    room = min([int(mib) // 1024 // gib for mib in free if mib.isdigit()], default=per_gpu)
    return len(gpus) * max(1, min(per_gpu, room)), lead if room > per_gpu else 0


def die_with_parent():
    """Linux: a child must not outlive a killed sweep and write beside its successor. 1 is PR_SET_PDEATHSIG."""
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def start(plan, key, slot, line):
    out, env = plan.dir / folder(*key), dict(os.environ, PYTHONUNBUFFERED="1")
    out.mkdir(parents=True, exist_ok=True)
    if plan.gpus:
        env["CUDA_VISIBLE_DEVICES"] = plan.gpus[slot % len(plan.gpus)]
    if plan.jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // plan.jobs)))
    with open(out / "stderr.log", "wb") as err:
        process = subprocess.Popen(command(plan, key), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err,
                                   env=env, start_new_session=True,  # Ctrl-C reaches the sweep, which passes it on
                                   preexec_fn=die_with_parent if sys.platform == "linux" else None)
    return argparse.Namespace(key=key, out=out, process=process, slot=slot, line=line, begun=time.time(),
                              first=math.inf, step=0, left=math.inf)


def stop(jobs):
    """Ctrl-C for children: each saves a checkpoint and ends; a second Ctrl-C, or a minute, kills them."""
    running = [job.process for job in jobs if job.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGINT)
    try:
        for process in running:
            process.wait(60)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for process in running:
            process.kill()


def hopeless(train, done):
    """Half-way through, is a run far above the best finished one at the same step?"""
    best = min((r for r in done if r["loss"] < math.inf), key=lambda r: r["loss"], default={"train": {}})["train"]
    return len(best) and train["step"][-1] >= best["step"][-1] / 2 and np.median(train["train_loss"][-5:]) > \
        HOPELESS + np.interp(train["step"][-1], best["step"], best["train_loss"])


def free_slots(active, jobs, lead):
    """Those without a run, and those whose only run ends within lead seconds."""
    runs = [[job for job in active if job.slot == slot] for slot in range(jobs)]
    return [slot for slot in range(jobs) if len(runs[slot]) < 2 and all(job.left < lead for job in runs[slot])]


def execute(plan, waiting):
    """One round, plan.jobs runs at a time (and those about to end): fills plan.done {key: run} and plan.failed [key]."""
    active, looked = [], 0.0
    plan.started += len(waiting)
    lines = [tqdm(total=0, bar_format="{desc}", position=1 + i, leave=False, disable=plan.bar.disable)
             for i in range(plan.jobs * (2 if plan.lead else 1))]
    try:
        while waiting or active:
            for slot in free_slots(active, plan.jobs, plan.lead)[:len(waiting)]:
                line = min(set(range(len(lines))) - {job.line for job in active})
                active.append(start(plan, waiting.pop(0), slot, line))
            time.sleep(0.05)
            look = time.time() > looked + 1
            looked = time.time() if look else looked
            for job in list(active):
                ended = job.process.poll() is not None
                if look or ended:
                    watch(plan, job, ended, lines[job.line])
                if ended:
                    active.remove(job)
                    finish(plan, job)
    finally:
        stop(active)
        for line in lines:
            line.close()


def watch(plan, job, ended, line):
    """Brings the bar, and the line of this run below it, up to date; stops a beaten run if that is wanted."""
    run = plot.read_run(job.out)
    if run is None or not len(run["train"].get("step", ())):
        return
    losses, step, total = run["train"]["train_loss"], int(run["train"]["step"][-1]), int(run["args"]["max_steps"])
    job.first = min(job.first, step)  # a run killed and resumed cuts its metrics back to the checkpoint
    speed = (step - job.first) / (time.time() - job.begun)
    job.left = (total - step) / speed if speed else math.inf
    left = tqdm.format_interval(job.left) if speed else "?"
    state = plot.classify(losses) if len(losses) > 1 else "running"
    line.set_description_str("" if ended else f"  {title(job.key)} | step {step}/{total} | loss {losses[-1]:.3f} | "
                             f"{state if state in EDGE else 'running'} | {left} left")
    plan.bar.total = plan.started * total
    plan.bar.update((total if ended else step) - job.step)
    job.step = step
    if plan.stop_hopeless and not ended and hopeless(run["train"], plan.done.values()):
        (job.out / "hopeless").touch()
        stop([job])


def finish(plan, job):
    """One run has ended: say how."""
    run, code = plot.read_run(job.out), job.process.returncode
    if run is None or judge([run])[0]["loss"] is None or code not in (0, 130):
        plan.failed.append(job.key)
        logs = [(job.out / name).read_text(errors="replace").splitlines()[-6:]
                for name in ("stderr.log", "training.log") if (job.out / name).exists()]
        say(f"{title(job.key)}: FAILED with exit status {code}, the others go on. From its log in {job.out}:",
            *next((log for log in logs if log), ["(empty)"]))
        return
    if (job.out / "stderr.log").stat().st_size == 0:
        (job.out / "stderr.log").unlink()
    plan.done[job.key] = run
    figures = f"val loss {run['loss']:.3f}, {run['summary'].get('final_val_bpb') or math.nan:.3f} bits a byte, "
    where = f" at step {run['summary']['diverged_at']}" if run["summary"].get("diverged_at") else ""
    status = run["status"] if run["status"] in (*EDGE, "stopped") else "done"  # what was slow shows when the best is known
    say(f"{title(job.key)}: {figures if run['loss'] < math.inf else ''}{status}{where}, "
        f"{time.time() - job.begun:.0f} s")


# ----------------------------------------------------------------------------------------------------------------------
# Analysis

IGNORED = {"lr", "seed", "out", "resume", "no_plot", "no_progress", "dry_run", "sample", "device"}


def plain(value):
    """One text for one value: 0.10, 1e-1 and 0.1 are "0.1"."""
    try:
        return str(value) if isinstance(value, bool) else f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)


def label(flags):
    """{"optimizer": "muon"} -> "optimizer muon"; the five schedules have names."""
    names = {pair: name for name, pair in WARMUP_AND_FLOOR.items()}
    pair = flags.get("warmup-ratio"), flags.get("min-lr-ratio")
    return names[pair] if len(flags) == 2 and pair in names else ", ".join(f"{k} {v}" for k, v in flags.items())


def plural(n, noun):
    return f"{n} {noun}{'' if n == 1 else 's'}"


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def analyse(runs, varied=None):
    """All that the sweep shows, as insights.json has it. varied: the flags that tell settings apart (None: those that
    differ between runs). Leaves status, loss and setting in the runs."""
    judge(runs)
    if varied is None:
        varied = sorted(k for k in {k for r in runs for k in r["args"]} - IGNORED
                        if len({plain(r["args"].get(k)) for r in runs}) > 1)
    for run in runs:
        run["flags"] = {k.replace("_", "-"): plain(run["args"].get(k.replace("-", "_"))) for k in varied}
        run["setting"] = label(run["flags"])
    # The same run under two names, as of a plain sweep and of one that varies a flag through its default, counts once.
    runs[:] = {(r["setting"], r["lr"], r["seed"]): r for r in sorted(runs, key=lambda r: r["loss"] is not None)}.values()
    finished = [r for r in runs if r["loss"] is not None]
    settings = [analyse_setting([r for r in finished if r["setting"] == s])
                for s in dict.fromkeys(r["setting"] for r in finished)]
    alive = [s for s in settings if s["best_lr"]]
    best = min(alive, key=lambda s: s["best_loss"], default=None)
    at_best = {s["label"]: {r["seed"]: r["loss"] for r in finished
                            if (r["setting"], r["lr"]) == (s["label"], s["best_lr"])} for s in alive}
    if best and not best["df"]:  # one rate a setting: its noise is that between settings
        best["noise"], best["df"] = noise_of(at_best)
    comparisons = []
    for other in (s["label"] for s in alive if s is not best):
        c = compare(at_best[best["label"]], at_best[other], *noise_of(at_best), len(alive) - 1)
        comparisons.append(dict(better=best["label"], worse=other, **c, sentence=sentence(best["label"], other, c)))
    # A setting tried at one rate only was compared at the optimum of the one that was swept: that one has the rates to tell of.
    swept = best and (best if len(best["rates"]) > 1 else max(alive, key=lambda s: (len(s["rates"]), s is best)))
    o = best and swept["optimum"]
    return dict(runs=len(runs), finished=len(finished), seeds=len({r["seed"] for r in finished}),
                minutes=sum(r["summary"].get("seconds") or 0 for r in runs) / 60,
                unfinished=[r["name"] for r in runs if r["loss"] is None],
                best=best and dict(setting=best["label"], lr=best["best_lr"], val_loss=best["best_loss"]),
                use=best and dict(setting=swept["label"], lr=float(f"{o['lr']:.2g}"), low=o["low"], high=o["high"]),
                comparisons=comparisons, settings=settings)


def analyse_setting(runs):
    """One setting over its rates."""
    by_rate = {lr: [r for r in runs if r["lr"] == lr] for lr in sorted({r["lr"] for r in runs})}
    table = {lr: {r["seed"]: r["loss"] for r in group} for lr, group in by_rate.items()}
    means, rates = block_means(table)[0], []   # means: of the rates that did not diverge
    for lr, group in by_rate.items():
        of = {k: mean([r["summary"].get(f"final_{k}") for r in group]) if lr in means else None
              for k in ("val_accuracy", "val_perplexity", "val_bpb")}
        minutes, several = mean([r["summary"].get("seconds", 0) / 60 for r in group]), lr in means and len(group) > 1
        rates.append(dict(lr=lr, seeds=sorted(table[lr]), status=max((r["status"] for r in group), key=RANK.index),
                          edge_seeds=sum(r["status"] in EDGE for r in group), val_loss=means.get(lr),
                          deviation=float(np.std(list(table[lr].values()), ddof=1)) if several else None, **of,
                          max_grad_norm=mean([r["summary"].get("max_grad_norm") for r in group]),
                          accuracy_per_minute=of["val_accuracy"] / minutes if of["val_accuracy"] and minutes else None))
    best = min(means, key=means.get, default=None)
    out = dict(label=runs[0]["setting"], flags=runs[0]["flags"], best_lr=best, best_loss=means.get(best), rates=rates,
               searched_up_to=max(table), bracketed=False, optimum=optimum(table), as_good=None, untested=[], edge=None,
               noise=None, df=0)
    if not best:
        return out
    near, (noise, df), alive, at = near_best(table), near_noise(table), list(means), list(means).index(best)
    if df:
        k = max(1, len(near) - 1)
        tell = {lr: compare(table[best], table[lr], noise, df, k) for lr in near if len(table[lr]) > 1}
        good = [lr in tell and not tell[lr]["shown"] for lr in alive]
        out["untested"] = [lr for lr in alive if lr not in tell and means[lr] <= means[best] + max(NEAR, 3 * noise)]
        low = next((i + 1 for i in range(at - 1, -1, -1) if not good[i]), 0)  # the unbroken stretch around the best
        high = next((i - 1 for i in range(at + 1, len(alive)) if not good[i]), len(alive) - 1)
        out.update(noise=noise, df=df, as_good=[alive[low], alive[high]])
    edge = next((r for r in rates if r["lr"] > best and r["status"] in EDGE), None)
    calm = max((r["lr"] for r in rates if edge and r["lr"] < edge["lr"]), default=0)  # the edge lies between calm and edge
    out["edge"] = edge and dict(lr=edge["lr"], ratio=edge["lr"] / out["optimum"]["lr"], status=edge["status"], calm=calm,
                                diverged=next((r["lr"] for r in rates if r["lr"] > best and r["status"] == "diverged"), None),
                                seeds=f"{edge['edge_seeds']} of {plural(len(edge['seeds']), 'seed')}")
    out["bracketed"] = at > 0 and (at < len(alive) - 1 or edge is not None)
    column = {k: [math.nan if r[k] is None else r[k] for r in rates if r["lr"] in means]
              for k in ("val_loss", "val_accuracy", "val_perplexity")}
    out["correlation"] = {k[4:]: correlation(np.log(alive), values) for k, values in column.items()}
    losses = column["val_loss"]
    out["summary"] = dict(mean=mean(losses), deviation=float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
                          best=min(losses), worst=max(losses))
    return out


def words(insights, meta):
    """The analysis as a person would write it, the answer first. Every number in it comes out of insights."""
    rate, again, head = plot.rate, meta.get("command", "python sweep.py"), "# Which learning rate?\n\n"
    best, n = insights["best"], insights["seeds"]
    if not best:
        tried = [r["lr"] for s in insights["settings"] for r in s["rates"]]
        return head + (f"There is no answer: every rate tried, {rate(min(tried))} to {rate(max(tried))}, diverged or "
                       f"was stopped. Try lower ones: `{again} --lrs {rate(min(tried) / 10)}`.\n" if tried else
                       "No run has finished yet.\n")
    s = next(s for s in insights["settings"] if s["label"] == insights["use"]["setting"])
    o, rates, good, edge, top = s["optimum"], s["rates"], s["as_good"], s["edge"], rate(s["best_lr"])
    alone, span, text = len(rates) == 1, o["high"] / o["low"], []
    one_seed = all(len(r["seeds"]) == 1 for r in rates)

    def add(*parts, join=" "):
        text.append(join.join(x for x in parts if x))

    add(f"**Use {rate(insights['use']['lr'])}{' with ' + s['label'] if s['label'] else ''}"
        + (".** It is the only rate tried." if alone else
           ".** One seed cannot show which of its neighbours are as good." if one_seed else
           ".** Too few runs share their seeds to show which of its neighbours are as good." if not good else
           f"; anything from {rate(good[0])} to {rate(good[1])} is as good, as far as {n} seeds can tell.**"
           if good[0] < good[1] else f"; no other rate tried was as good as {top}, as {n} seeds show.**" if not s["untested"] else
           f".** {', '.join(map(rate, s['untested']))} had too few seeds to be told from {top}."))
    undecided = [c["worse"] for c in insights["comparisons"] if not c["shown"]]
    add(f"{plural(n, 'seed')} cannot tell {best['setting']} from {', '.join(undecided)}." if undecided else "",
        "" if s["label"] == best["setting"] else f"Of the settings tried at {rate(best['lr'])}, {best['setting']} did best.",
        f"The best rate tried{' with ' + s['label'] if s['label'] != best['setting'] else ''} was {top}, with a validation loss of "
        f"{s['best_loss']:.3f} nats a token.",
        "" if alone else f"The curves fitted through the rates around it put the optimum at {rate(o['lr'])}; "
        + (f"95% interval {rate(o['low'])} to {rate(o['high'])} (bootstrap, {n} seeds, paired)." if n > 1 else
           f"it lies somewhere from {rate(o['low'])} to {rate(o['high'])} (by how well they fit; one seed shows no noise).")
        if o["fitted"] else "No curve could be fitted around it (that takes a surviving rate on both sides, and 2 "
        f"seeds or 4 rates): the optimum lies somewhere from {rate(o['low'])} to {rate(o['high'])}.")
    add("## How sure")
    add("Runs of one setting that differ in nothing but luck differ in loss with a standard deviation of "
        f"{s['noise']:.4f} nats (what a seed does to all rates alike is taken out; {plural(s['df'], 'degree')} of freedom)."
        if s["df"] else "No two rates near the best share several seeds: the noise is not known." if not one_seed else
        "Every rate was run with one seed. That cannot show how much the loss changes from run to run, so no "
        "difference between neighbouring rates is shown to be real; an interval from one seed only says how well a "
        "curve fits.",
        "" if s["bracketed"] or alone else
        f"The best rate is the {'lowest' if s['best_lr'] == rates[0]['lr'] else 'last before an end'} of those that survived: the "
        "optimum may lie beyond it.",
        f"Careful: {', '.join(shaky)} spiked and came back." if (shaky := [rate(r["lr"]) for r in rates if r["status"] in EDGE
            and (good or [s["best_lr"]])[0] <= r["lr"] <= (good or [s["best_lr"]])[-1]]) else "",
        f"The search ended because {meta['ended']}." if meta.get("ended") else "",
        f"Not counted, for not finished: {', '.join(insights['unfinished'])}." if insights["unfinished"] else "",
        f"Failed: {', '.join(meta['failed'])}." if meta.get("failed") else "")
    add("## The edge")
    def distance(ratio):
        return "near the edge, little is needed to tip it over" if ratio < 2 else \
            "conservative: the loss rises long before the edge" if ratio > 4 else "the usual distance (2 to 4)"
    if edge:
        low, high = max(1, edge["calm"] / o["lr"]), edge["ratio"]
        add(f"The first rate above the best that was {edge['status']} is {rate(edge['lr'])} ({edge['seeds']}), {high:.1f} times the "
            f"optimum{': ' + distance(high) if distance(low) == distance(high) else ''}.",
            "" if distance(low) == distance(high) else f"{rate(edge['calm'])} was still calm, so the edge lies {low:.1f} to "
            f"{high:.1f} times above the optimum (2 to 4 is usual).",
            "" if edge["status"] == "diverged" else f"The first that diverged is {rate(edge['diverged'])}." if edge["diverged"] else
            f"None diverged up to {rate(s['searched_up_to'])}.")
    else:
        add(f"Not found up to {rate(s['searched_up_to'])}: no rate above the best was unstable or diverged.")
    look = dict(slow="fell late", unstable="spiked and came back", diverged="diverged", converged="fell early and levelled off",
                stopped="was stopped as hopeless")
    for side in ("low", "high"):
        outside = [r for r in rates if (r["lr"] < (good or [s["best_lr"]])[0] if side == "low" else
                                        r["lr"] > (good or [s["best_lr"]])[-1])]
        if outside:
            add(f"## Too {side}" if good else f"## {side.capitalize()}er than the best")
            add(*(f"- {rate(r['lr'])} {look[r['status']]}" + (
                f", {r['val_loss'] - s['best_loss']:.3f} nats above the best." if r["val_loss"] else ".")
                for r in outside), join="\n")
    if insights["comparisons"]:
        k = len(insights["comparisons"])
        add("## Settings, each at the best rate that it was tried at")
        add(*(f"- {c['sentence']}." for c in insights["comparisons"]), join="\n")
        if n > 1:
            add(f"Intervals are 95%{f' for all {k} comparisons together' if k > 1 else ''}, paired over seeds.")
    figures = []
    for x in (x for x in insights["settings"] if len(x["rates"]) > 1 and x["best_lr"]):
        name, m = x["label"] + ": " if x["label"] else "", x["summary"]
        r = ", ".join(f"{k} {v:+.2f}" for k, v in x["correlation"].items() if v is not None)
        figures += [f"- {name}final loss over the rates that survived: mean {m['mean']:.3f}, deviation "
                    f"{m['deviation'] or 0:.3f}, best {m['best']:.3f}, worst {m['worst']:.3f}."
                    + (f" Correlation of log rate with {r} (linear: a valley shows little)." if r else "")]
    speed, fast = max((r["accuracy_per_minute"] or 0, r["lr"]) for x in insights["settings"] for r in x["rates"])
    add("## In figures")
    add(*figures, f"- Most accuracy a minute: {100 * speed:.1f} points, at {rate(fast)}." if speed else "",
        f"- {plural(insights['runs'], 'run')} took {insights['minutes']:.1f} minutes of computing.", join="\n")
    needed = min((c["seeds_needed"] or 9999 for c in insights["comparisons"] if not c["shown"]), default=0)
    add("## What to run next")
    add(*(f"- `{again.replace(' --no-widen', '') if 'widen' in flags else again} {flags}`: {why}." for wanted, flags, why in (
        (not (s["bracketed"] and edge), f"--widen --max-runs {insights['runs'] + 6}", "goes outward to the edge"),
        (n < 3, "--seeds 3", "measures the noise, so that differences can be called real or not"),
        (span > 2 and not alone, f"--refine {meta.get('refine', 0) + 1}", f"the optimum is known to a factor of {span:.1f}"),
        (n < needed <= 30 and n > 2, f"--seeds {needed}", "decides the easiest open comparison, if it stays as it is"),
    ) if wanted), join="\n")
    text[-1] = text[-1] or ("Nothing cheap: the easiest open comparison would take over 30 seeds." if needed else
                            "Nothing: the answer is as sharp as it needs to be.")
    return head + "\n\n".join(text) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Report

COLUMNS = ("steps", "final_val_loss", "final_val_accuracy", "final_val_perplexity", "final_val_bpb", "final_train_loss",
           "best_val_loss", "best_val_step", "max_grad_norm")  # no times: a resumed sweep must write the same table


def write(path, text):
    """Atomically."""
    path.with_name(path.name + ".tmp").write_text(text, encoding="utf-8")
    path.with_name(path.name + ".tmp").replace(path)


def finite(x):
    """JSON has no inf and no nan: null."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def report(dir):
    """Reads the runs under dir, writes table, analysis and all pictures there; returns the insights."""
    dir = Path(dir)
    meta, runs = plot.read_json(dir / "sweep.json") or {}, plot.read_runs(dir)
    insights = finite(analyse(runs, meta.get("varied")))
    runs.sort(key=lambda r: (r["setting"], r["lr"], r["seed"]))
    with open(dir / "summary_table.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["setting", "lr", "seed", "status", *COLUMNS])
        for r in runs:
            figures = [r["summary"].get(c) for c in COLUMNS]
            table.writerow([r["setting"], f"{r['lr']:g}", r["seed"], r["status"],
                            *("" if x is None else f"{x:.9g}" for x in figures)])
    write(dir / "insights.json", json.dumps(insights, indent=1) + "\n")
    write(dir / "lr_sweep_analysis.md", words(insights, meta))
    plot.draw_sweep(dir, runs, insights)
    return insights


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def die(message):
    print(f"sweep.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def say(*lines):
    for line in lines:
        tqdm.write(line)  # above the bars
    sys.stdout.flush()


def parse_rates(text):
    rates = set()
    for word in text.replace(",", " ").split():
        try:
            rates.add(float(f"{float(word):g}"))
        except ValueError:
            die(f"--lrs {word}: not a number")
        if not 0 < float(word) < math.inf:
            die(f"--lrs {word}: a learning rate is a finite number above zero")
    return sorted(rates)


def parse_vary(texts):
    """["a=1,2", "b,c=3:4,5:6"] -> every combination, as tuples of (flag, value) pairs; [] -> one empty setting."""
    axes = []
    for text in texts:
        names, _, values = text.partition("=")
        flags = [f.strip().lstrip("-").replace("_", "-") for f in names.split(",")]
        rows = [v.split(":") if len(flags) > 1 else [v] for v in values.split(",")]
        if not all(flags) or not all(len(row) == len(flags) and all(row) for row in rows):
            die(f"--vary {text}: write FLAG=V1,V2 or FLAG1,FLAG2=A:B,C:D")
        if wrong := {"lr", "seed", "out", "preset", "data", "vocab-size"} & set(flags):
            die(f"--vary {text}: not {wrong.pop()}; rates have --lrs, seeds --seeds; presets, corpora and vocabularies a "
                "sweep each, since a loss a token compares within one tokenizer only")
        axes.append([tuple(zip(flags, map(plain, row))) for row in rows])
    return [sum(combination, ()) for combination in itertools.product(*axes)]


def parse_args(argv):
    p = argparse.ArgumentParser("sweep.py", allow_abbrev=False,
                                description="Sweep the learning rate. Flags not listed here go on to train.py.")
    p.error = lambda message: die(f"{message}; see --help")
    p.add_argument("--preset", default="tiny", help="of the model: tiny, dense, dense-low or moe")
    p.add_argument("--study", help="a named plan: " + ", ".join(STUDIES))
    p.add_argument("--lrs", nargs="+", help="rates to start from (default: the preset's grid)")
    p.add_argument("--seeds", type=int, help="seeds of the rates near the best; a seed fixes weights and batches")
    p.add_argument("--refine", type=int, metavar="R", help="up to 5 rates within a factor 2 of the optimum, R times")
    p.add_argument("--vary", action="append", metavar="FLAG=V1,V2", help="any train.py flag; FLAG1,FLAG2=A:B,C:D")
    p.add_argument("--widen", action=argparse.BooleanOptionalAction, help="outward until the optimum is bracketed")
    p.add_argument("--max-runs", type=int, help="at most this many runs (default: 16 for each setting and seed)")
    p.add_argument("--jobs", default="auto", help="runs at once, never more (default: as many as pay, by preset, CPU "
                   "cores and free GPU memory)")
    p.add_argument("--stop-hopeless", action="store_true", help="end runs that are clearly beaten half-way through")
    p.add_argument("--name", help="folder under runs/ (default: from the preset, the study, what varies, and the flags for train.py)")
    p.add_argument("--dry-run", action="store_true", help="print the commands of the next round, one a line, and stop")
    args, extra = p.parse_known_args(argv)
    if args.study and args.study not in STUDIES:
        die(f"--study {args.study}: unknown; choose from {', '.join(STUDIES)}")
    if extra and not extra[0].startswith("-"):
        die(f"unrecognized argument: {extra[0]}; see --help")
    study, grid = STUDIES.get(args.study, {}), GRIDS.get(args.preset, [])
    for name, default in (("seeds", 1), ("refine", 0), ("widen", True), ("vary", [])):
        if getattr(args, name) is None:
            setattr(args, name, study.get(name, default))
    if not grid and not args.lrs:
        die(f"--preset {args.preset}: no grid of rates in sweep.py; choose from {', '.join(GRIDS)}, or give --lrs")
    around = [float(f"{grid[(len(grid) - 1) // 2] * f:.2g}") for f in study.get("around", ()) if grid]
    args.lrs = parse_rates(" ".join(args.lrs)) if args.lrs else study.get("lrs") or around or grid
    for flag, instead in (("lr", "--lrs"), ("seed", "--seeds"), ("out", "--name"), ("resume", "nothing, it does")):
        if flag in flag_values(extra):
            die(f"--{flag} is set by the sweep; use {instead}")
    args.settings = parse_vary(args.vary)
    args.schedules = parse_vary(study["schedules"]) if "schedules" in study else []
    least = len(args.settings) * len(args.lrs)
    if args.seeds < 1 or args.refine < 0:
        die(f"--seeds {args.seeds} --refine {args.refine}: at least 1 seed and 0 refinements")
    if args.jobs != "auto" and not (args.jobs.isdigit() and int(args.jobs)):
        die(f"--jobs {args.jobs}: a whole number above zero, or auto")
    if args.max_runs is not None and args.max_runs < least or not least:
        die(f"--max-runs {args.max_runs}: the grid alone is {least} runs")
    args.max_runs = args.max_runs or args.seeds * (
        len(args.settings) * (max(16, len(args.lrs)) + 5 * args.refine) + len(args.schedules))
    args.flags = ["--preset", args.preset, *study.get("flags", []), *extra]
    by = [text.split("=")[0] for text in args.vary if text not in study.get("vary", [])]  # a plain sweep has runs of its own
    parts = [args.preset, args.study, *by, *(f"{k.replace('_', '-')}-{v}" for k, v in flag_values(extra).items())]
    args.dir = Path("runs") / (args.name or re.sub(r"[^\w.+-]+", "_", "-".join(p for p in parts if p)))
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    plan, again = parse_args(argv), shlex.join(["python", "sweep.py", *argv])
    plan.done, plan.failed, plan.started, plan.bar = {}, [], 0, None
    plan.gpus = visible_gpus(flag_values(plan.flags).get("device", "auto"))
    plan.jobs, plan.lead = auto_jobs(plan.preset, plan.gpus) if plan.jobs == "auto" else (int(plan.jobs), 0)
    old = plot.read_json(plan.dir / "sweep.json") or {"flags": plan.flags}
    now, then = flag_values(plan.flags), flag_values(old["flags"])
    if found := differences({k: now.get(k, "not given") for k in {**then, **now}}, then):
        die(f"{plan.dir} was made with other settings ({found}); choose another --name")
    varied = dict.fromkeys([k for s in plan.settings + plan.schedules for k, _ in s] + old.get("varied", []))
    meta = dict(command=again, flags=plan.flags, varied=list(varied), refine=plan.refine)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the children are stopped in order
    rounds = search(plan.settings, plan.lrs, plan.seeds, plan.refine, plan.widen, plan.max_runs, plan.schedules,
                    all_seeds=plan.dry_run)  # what is handed out at once gets all its seeds at once
    try:
        keys, ended = advance(rounds)
        while keys:
            plan.done.update({key: run for key in keys if (run := load(plan, key))})
            todo = [key for key in keys if key not in plan.done]
            if plan.dry_run and todo:
                for key in todo:
                    print(f"cd {shlex.quote(os.getcwd())} && {shlex.join(command(plan, key))}")
                return 0
            if todo and not plan.started and not prepare(plan, todo[0], meta):
                return 2
            if todo:
                execute(plan, todo)
            judge(list(plan.done.values()))
            keys, ended = advance(rounds, {key: (run["loss"], run["status"]) for key, run in plan.done.items()})
        if plan.bar is not None:
            plan.bar.close()
        meta.update(ended=ended, failed=[folder(*key) for key in plan.failed])
        return 0 if plan.dry_run else conclude(plan, meta)
    except KeyboardInterrupt:
        if plan.bar is not None:
            plan.bar.close()
        say(f"stopped: {plural(len(plan.done), 'run')} finished, the others keep what they have. To go on: {again}")
        return 130


def advance(rounds, results=None):
    """The next round of a search and None, or None and why it ended."""
    try:
        return rounds.send(results), None
    except StopIteration as end:
        return None, end.value


def prepare(plan, key, meta):
    """Once, before the first run: train.py checks the flags of every setting, and prepares the data in plain sight."""
    for setting in plan.settings + plan.schedules:
        if subprocess.run([*command(plan, (setting, *key[1:])), "--dry-run"], stdout=subprocess.DEVNULL).returncode:
            return False
    plan.dir.mkdir(parents=True, exist_ok=True)
    write(plan.dir / "sweep.json", json.dumps(meta, indent=1) + "\n")
    say(f"runs go to {plan.dir}, {plan.jobs} at a time" + (f" on {plural(len(plan.gpus), 'GPU')}" if plan.gpus else "")
        + (f"; {plural(len(plan.done), 'run')} finished before and kept" if plan.done else ""))
    plan.bar = tqdm(total=0, unit="step", desc=plan.dir.name, disable=not sys.stderr.isatty())
    return True


def conclude(plan, meta):
    """The report, and the last words on the console."""
    write(plan.dir / "sweep.json", json.dumps(meta, indent=1) + "\n")
    if not plan.started:
        say(f"all {len(plan.done)} runs were finished before and are kept; for new ones choose another --name")
    for run in plan.done.values():
        picture = run["dir"] / "loss_curves.png"
        if not picture.exists() or picture.stat().st_mtime < (run["dir"] / "metrics.csv").stat().st_mtime:
            plot.draw_run(run["dir"])
    if plan.done:
        report(plan.dir)
        answer = (plan.dir / "lr_sweep_analysis.md").read_text(encoding="utf-8").split("\n\n")[1]
        say("", answer.replace("**", ""), "", f"Ended because {meta['ended']}. Pictures, table, analysis: {plan.dir}")
    say(*(f"failed: {name}" for name in meta["failed"]))
    return 1 if plan.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # whoever read the lines has gone (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
