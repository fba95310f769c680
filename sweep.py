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
    settings  are compared at their best rates. What a finer grid could still gain, the depth of the parabola
              through the best rate and its neighbours, widens the interval of the difference

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
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import plot
from data import DataError, cores, lock

TRAIN = Path(os.environ.get("NANOLR_TRAIN") or Path(__file__).with_name("train.py")).resolve()

DENSE = [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2]
GRIDS = {   # where the search starts
    "tiny": [1e-3, 3e-3, 1e-2, 0.3, 1.0],
    "dense": DENSE,
    "dense-low": DENSE,
    "moe": [0.01, 0.02, 0.035, 0.05, 0.065, 0.085, 0.1, 0.15, 0.3],
}
SCHEDULES = {
    "warmup-ratio=0.1,min-lr-ratio=0.05": "conservative",
    "warmup-ratio=0.05,min-lr-ratio=0.1": "baseline",
    "warmup-ratio=0,min-lr-ratio=0.1": "none",
    "warmup-ratio=0.02,min-lr-ratio=0.2": "aggressive",
    "warmup-ratio=0.2,min-lr-ratio=0.1": "long",
}
VARY_SCHEDULE = "warmup-ratio,min-lr-ratio=0.1:0.05,0.05:0.1,0:0.1,0.02:0.2,0.2:0.1"
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
    "schedules": dict(around=[1], vary=[VARY_SCHEDULE], seeds=3, widen=False),
    "full": dict(refine=1, seeds=3, schedules=[VARY_SCHEDULE]),     # these at the end, at the best rate
}
HALF_DECADES = [float(f"{m}e{k}") for k in range(-9, 7) for m in (1, 3)]
NEAR = 0.1      # nats, 10% perplexity: stands in for the noise where there is one seed
WORTH = 0.01    # nats that a finer grid must promise before another midpoint is run
LEFT = 0.001    # nats, typical of what is then left between the best tried rate and the optimum


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
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired(row, other):
    """Differences row - other, {seed: loss} each, over the seeds that survived in both."""
    differences = [row[seed] - other[seed] for seed in row if seed in other]
    return [d for d in differences if math.isfinite(d)]


def best_rate(table):
    """The lowest mean of the rates that survived in all their seeds and have the most; None: none did."""
    alive = {lr: row for lr, row in table.items() if max(row.values()) < math.inf}
    most = max(map(len, alive.values()), default=0)
    means = {lr: mean(row.values()) for lr, row in alive.items() if len(row) == most}
    return min(means, key=means.get, default=None)


def noise_of(rows):
    """Rows of losses of the same seeds -> sum of squared two-way residuals (nats^2), degrees of freedom."""
    x = np.array(rows)      # (rates, seeds)
    n_rates, n_seeds = x.shape
    residuals = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    return np.array([(residuals ** 2).sum(), (n_rates - 1) * (n_seeds - 1)])


def noise_near(table, best):
    """The noise of the rates within NEAR of the best, or of the three best: not that of a wild one."""
    rows = [[row.get(seed, math.inf) for seed in table[best]] for row in table.values()]
    rows = [row for row in rows if max(row) < math.inf]
    rows.sort(key=np.mean)
    near = [row for row in rows if np.mean(row) < np.mean(rows[0]) + NEAR]
    return noise_of(rows[:max(3, len(near))])


def half_width(differences, squares, df, k):
    """Half the interval of a mean difference, one of k that hold together; NEAR where no noise is known."""
    if not df:
        return NEAR
    spread = max(math.sqrt(2 * squares / df), deviation(differences) or 0)
    return float(t_quantile(1 - 0.025 / k, df) * spread / math.sqrt(len(differences)))


def compare_rates(table, best):
    """-> {rate: mean paired difference from the best; None: nothing to pair}, rates shown to be worse, rates
    that are as good, and the nearest ones below and above these that are worse (None: none is)."""
    squares, df = noise_near(table, best)
    pairs = {lr: paired(row, table[best]) for lr, row in table.items() if lr != best}
    k = sum(len(d) > 1 for d in pairs.values())
    good = [best]
    worse = []
    for lr, d in pairs.items():
        if not d and len(table[lr]) == 1 < len(table[best]):
            continue    # it diverged, which with one seed of several may be bad luck
        steps = [mean(paired(table[lr], table[x])) for x in neighbours(table, lr)]
        gain = 0
        if d and all(step is None or step < 0 for step in steps):   # lower than both: a valley of its own
            gain = finer_gain(table, lr)
        if not d or mean(d) > half_width(d, squares, df, k) + gain:
            worse.append(lr)
        else:
            good.append(lr)
    low = max((lr for lr in worse if lr < min(good)), default=None)
    high = min((lr for lr in worse if lr > max(good)), default=None)
    return {lr: mean(d) for lr, d in pairs.items()}, worse, sorted(good), low, high


def neighbours(rates, lr):
    """The next rates below and above, those that exist."""
    below = sorted(x for x in rates if x < lr)
    above = sorted(x for x in rates if x > lr)
    return below[-1:] + above[:1]


def finer_gain(table, best):
    """Nats that a finer grid could gain: how deep the parabola through a rate and its neighbours goes."""
    points = []
    for lr in neighbours(table, best):
        d = mean(paired(table[lr], table[best]))
        if d is not None:
            points.append((math.log(lr / best), max(0, d)))
    if len(points) < 2:     # beside a diverged rate, say: as much again as by the last step
        return sum(y for _, y in points)
    (x1, y1), (x2, y2) = points
    curvature = (y1 / x1 - y2 / x2) / (x1 - x2)
    slope = y1 / x1 - curvature * x1
    return slope ** 2 / (4 * curvature or math.inf)


def compare_settings(tables, margin):
    """{label: table} -> the best label (None: all diverged), its comparisons with others (insights.json)."""
    rates = {label: best_rate(table) for label, table in tables.items()}
    rows = {label: tables[label][lr] for label, lr in rates.items() if lr}
    if not rows:
        return None, []
    winner = min(rows, key=lambda label: mean(rows[label].values()))
    squares, df = sum(noise_near(tables[label], rates[label]) for label in rows)
    seeds = set.intersection(*map(set, rows.values()))
    if not df and seeds:    # settings of one rate each: their noise is what remains between them
        squares, df = noise_of([[row[seed] for seed in seeds] for row in rows.values()])
    pairs = len(rows) * (len(rows) - 1) // 2    # the best came out of all of them
    gain = dict.fromkeys(rows, 0)
    for label in rows:
        if len(tables[label]) > 1:
            gain[label] = max(LEFT, finer_gain(tables[label], rates[label]))
    comparisons = []
    for label in rows:
        d = paired(rows[label], rows[winner])
        if label == winner or not d:
            continue
        c = dict(better=winner, worse=label, difference=mean(d), low=None, high=None, seeds=len(d),
                 verdict="not shown", seeds_needed=None)
        if df:
            half = half_width(d, squares, df, pairs)
            least = mean(d) - gain[label]
            c.update(low=least - half, high=mean(d) + half + gain[winner])
            if max(-c["low"], c["high"]) < margin:
                c["verdict"] = "same"
            elif least > half:
                c["verdict"] = "shown"
            elif least > 0:
                c["seeds_needed"] = math.ceil(len(d) * (half / least) ** 2)
        comparisons.append(c)
    return winner, comparisons


# --------------------------------------------------------------------------------------------------
# What to try next

def outward(table, best):
    """Rates beyond those tried, until the best has worse neighbours on both sides, and one above diverges."""
    below = [lr for lr in HALF_DECADES if lr < min(table) / 1.9]
    above = [lr for lr in HALF_DECADES if lr > max(table) * 1.9]
    if best is None:
        return below[-1:]
    diverged = [lr for lr, row in table.items() if lr > best and math.inf in row.values()]
    rates = []
    if best == min(table):
        rates += below[-1:]
    if not diverged:
        rates += above[:1]
    return rates


def midpoint(table, best, refine):
    """A rate between the best and a neighbour, the better one first: until both are within a factor 2, and,
    while there is one seed, WORTH is not left to gain. Each `refine` halves that distance (in log rate)."""
    distance = {lr: abs(math.log(lr / best)) for lr in neighbours(table, best)}
    limit = 1.03 * math.log(2) / 2 ** refine    # 1.03: rates have two digits
    close = max(distance.values()) < limit
    if close and len(table[best]) == 1 and finer_gain(table, best) > WORTH:
        limit /= 2
    gaps = [lr for lr in distance if distance[lr] > limit]
    gaps.sort(key=lambda lr: np.mean(paired(table[lr], table[best]) or math.inf))   # diverged: last
    return [float(f"{math.sqrt(best * lr):.2g}") for lr in gaps[:1]]


def worth_seeds(table, best):
    """Rates that can matter: the best and its neighbours; then all that are not shown to be worse, and the
    next ones outside, if they are not."""
    if len(table[best]) == 1:
        return [best, *neighbours(table, best)]
    _, worse, good, _, _ = compare_rates(table, best)
    below = neighbours(table, good[0])[:1]
    above = neighbours(table, good[-1])[-1:]
    return [lr for lr in below + good + above if lr not in worse]


def next_of(table, asked, plan):
    """What one setting wants next, [(rate, seed)]: the first stage's runs that were not asked for yet."""
    grid = [(lr, 0) for lr in plan.lrs]
    rates = []
    seeds = []
    best = best_rate(table)
    if table and plan.widen:
        rates += outward(table, best)
    if best and len(neighbours(table, best)) == 2 and (plan.widen or plan.refine):
        rates += midpoint(table, best, plan.refine)
    if best:
        seeds = [(lr, seed) for lr in worth_seeds(table, best) for seed in range(plan.seeds)]
    for stage in (grid, [(lr, 0) for lr in rates], seeds):
        wanted = [pair for pair in dict.fromkeys(stage) if pair not in asked]
        if wanted:
            return wanted
    return []


def next_runs(results, plan):
    """The search: what to run next, [(setting, rate, seed)], and why it ended (None: it has not).

    results: {(setting, rate, seed): loss} of all runs asked for so far; inf: diverged, None: failed. plan:
    settings, lrs, seeds, refine, widen, max_runs, schedules. It depends on nothing else: it can be replayed.
    """
    keys = []
    for setting in plan.settings:
        asked = {key[1:]: loss for key, loss in results.items() if key[0] == setting}
        table = {}
        for (lr, seed), loss in asked.items():
            if loss is not None:
                table.setdefault(lr, {})[seed] = loss
        keys += [(setting, *pair) for pair in next_of(table, asked, plan)]
    if not keys and table and best_rate(table):     # the schedules, at the best rate
        keys = [(setting, best_rate(table), seed) for setting in plan.schedules for seed in range(plan.seeds)]
        keys = [key for key in keys if key not in results]
    if not keys:
        return [], "it had run all that its plan asks for"
    if len(results) >= plan.max_runs:
        return [], f"the limit of {plan.max_runs} runs was reached (--max-runs), before all that it wanted"
    return keys[:plan.max_runs - len(results)], None


# --------------------------------------------------------------------------------------------------
# Runs: where they lie, and how they ended

class Stopped(Exception):
    """Ctrl-C, SIGTERM or SIGHUP: the number of the signal."""


def die(message):
    print(f"sweep.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def folder(plan, key):
    """A run's folder is named by what varies: optimizer=muon-lr0.003-s0."""
    setting, lr, seed = key
    varied = ",".join(f"{flag}={value}" for flag, value in setting)
    name = f"{varied}-lr{lr:g}-s{seed}".lstrip("-")
    return plan.dir / re.sub(r"[^\w.+=,-]+", "_", name)


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
            if isinstance(loss, float) and run["status"] != "diverged" and math.isfinite(loss):
                run["loss"] = loss
    alive = [run for run in runs if run["loss"] not in (None, math.inf)]
    alive = [run for run in alive if len(run["train"]["train_loss"])]
    best = min(alive, key=lambda run: run["loss"], default=None)
    for run in alive:
        level = np.median(best["train"]["train_loss"][-5:])
        run["status"] = plot.classify(run["train"]["train_loss"], level)
    for run in runs:
        if run["loss"] == math.inf or run["status"] == "diverged":
            run.update(status="diverged", loss=math.inf)


def load(plan, keys):
    """{key: run} of those that are finished."""
    runs = {key: plot.read_run(folder(plan, key)) for key in keys}
    runs = {key: run for key, run in runs.items() if run}
    judge(list(runs.values()))
    return {key: run for key, run in runs.items() if run["loss"] is not None}


# --------------------------------------------------------------------------------------------------
# Running

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent():
    LIBC.prctl(1, signal.SIGKILL)   # PR_SET_PDEATHSIG: a killed sweep leaves no run beside its successor's


# A child has a session of its own: Ctrl-C reaches the sweep alone, which passes it on.
CHILD = dict(stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent if LIBC else None)


def visible_gpus(device):
    """Ids of the GPUs to share out, without importing torch (2 s); cuda:1 is train.py's to find."""
    if device.startswith("cuda:"):
        return [device]
    if device not in ("auto", "cuda"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:    # an empty name or -1 ends the list
        names = os.environ["CUDA_VISIBLE_DEVICES"].replace(" ", "").split(",")
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(listed.count("UUID"))]


def auto_jobs(preset, device, gpus):
    """Runs at once: small ones share a GPU (measured on an H100); on a CPU a large one fills all cores."""
    if gpus:
        return len(gpus) * {"tiny": 4, "dense-low": 8, "moe": 2}.get(preset, 1)
    if preset == "tiny" and (sys.platform != "darwin" or device == "cpu"):  # a Mac has one GPU
        return min(8, cores())
    return 1


def start(plan, key, slot):
    """Starts train.py; each GPU has its share of the slots, and each run its share of the cores."""
    env = dict(os.environ)
    if plan.gpus and plan.device in ("auto", "cuda"):
        env["CUDA_VISIBLE_DEVICES"] = plan.gpus[slot % len(plan.gpus)]
    if plan.jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // plan.jobs)))
    folder(plan, key).mkdir(parents=True, exist_ok=True)
    with open(folder(plan, key) / "stderr.log", "wb") as log:
        return subprocess.Popen(command(plan, key), stdout=subprocess.DEVNULL, stderr=log, env=env, **CHILD)


def execute(plan, keys):
    """One round, plan.jobs runs at a time, a line as each ends: fills plan.done {key: run}, plan.failed."""
    quiet = not sys.stderr.isatty()
    bar = tqdm(total=len(keys), unit="run", desc=plan.dir.name, leave=False, disable=quiet)
    running = {}    # slot: (key, process, when it began)
    try:
        while keys or running:
            for slot in range(plan.jobs):
                if slot in running and running[slot][1].poll() is not None:
                    tqdm.write(finish(plan, *running.pop(slot)))
                    bar.update()
                if slot not in running and keys:
                    running[slot] = keys[0], start(plan, keys[0], slot), time.time()
                    keys = keys[1:]
            time.sleep(0.05)
    finally:    # interrupted, or a full disk
        bar.close()
        stop([process for _, process, _ in running.values()])


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


def finish(plan, key, process, begun):
    """One run has ended: a line that says how, or the end of its log."""
    out = folder(plan, key)
    log = out / "stderr.log"
    text = log.read_text(errors="replace")
    found = load(plan, [key])
    if not found or process.returncode not in (0, 130):
        plan.failed.append(out.name)
        tail = "\n".join(text.splitlines()[-6:])
        return (f"{out.name}: FAILED with exit status {process.returncode}, the others go on. "
                f"The end of {log}:\n{tail}")
    if not text:
        log.unlink()
    plan.done.update(found)
    summary = found[key]["summary"]
    loss = summary.get("final_val_loss") or math.nan
    bits = summary.get("final_val_bpb") or math.nan
    seconds = time.time() - begun
    return f"{out.name}: {summary['status']}, val loss {loss:.3f}, {bits:.3f} bits a byte, {seconds:.0f} s"


# --------------------------------------------------------------------------------------------------
# What may be compared: one corpus, one code, one owner

def check_data(runs):
    """Losses of different texts or tokenizers must not be compared."""
    corpora = {}
    for run in runs:
        corpus = run["config"].get("data") or {}
        corpora.setdefault((corpus.get("train_sha256"), corpus.get("val_sha256")), []).append(run["name"])
    if len(corpora) > 1:
        rare = min(corpora.values(), key=len)
        die(f"{len(rare)} runs read other data than the rest, {', '.join(rare[:5])}; choose another --name")


def check_code(plan):
    """What a loss depends on must not have been edited since the runs that are already there began."""
    if plan.mix_code or not plan.dir.is_dir():
        return
    old = []
    changed = set()
    for run in plot.read_runs(plan.dir):
        for name, before in (run["config"].get("code") or {}).items():
            path = TRAIN.with_name(name)
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != before:
                changed.add(name)
                old.append(run["name"])
    if old:
        names = ", ".join(sorted(changed))
        die(f"{names} changed since {', '.join(dict.fromkeys(old))} began; choose another --name, or compare "
            "old and new code with --mix-code")


def ask_train(plan, key, flag):
    """What train.py prints at once, --dry-run or --prepare; where it refuses, it has said why."""
    asked = subprocess.run(command(plan, key, flag), stdout=subprocess.PIPE, text=True, **CHILD)
    if asked.returncode:
        raise SystemExit(2)
    return asked.stdout


def size_data(plan, key):
    """Every setting is checked, and reads the corpus that the largest budget needs."""
    settings = plan.settings + plan.schedules
    if len(settings) > 1:
        tokens = [int(ask_train(plan, (setting, *key[1:]), "--dry-run")) for setting in settings]
        plan.flags = plan.flags + ["--data-tokens", str(max(tokens))]


def search(plan, meta):
    """Round after round; a restart replays them, and finished runs answer at once. Returns why it ended."""
    results = {}
    keys, ended = next_runs(results, plan)
    while not ended:
        plan.done.update(load(plan, keys))
        todo = [key for key in keys if key not in plan.done]
        if todo and not plan.owner:     # once, before the first run
            size_data(plan, todo[0])
            if plan.dry_run:
                for key in todo:
                    print(f"cd {shlex.quote(os.getcwd())} && {shlex.join(command(plan, key))}")
                return None
            check_code(plan)
            ask_train(plan, todo[0], "--prepare")   # in plain sight
            plan.owner = lock(plan.dir)
            write(plan.dir / "sweep.json", json.dumps(meta, indent=1))
            gpus = ", ".join(plan.gpus) or "none"
            print(f"runs go to {plan.dir}, {plan.jobs} at a time; GPUs: {gpus}; "
                  f"finished before: {len(plan.done)}")
        execute(plan, todo)
        judge(list(plan.done.values()))
        check_data(plan.done.values())
        results.update({key: None for key in keys})
        results.update({key: run["loss"] for key, run in plan.done.items()})
        keys, ended = next_runs(results, plan)
    return ended


# --------------------------------------------------------------------------------------------------
# Analysis

def correlation(x, y):
    """Pearson's r, or None where it does not exist."""
    if len(x) < 3 or None in y or np.std(x) * np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def analyse(runs, margin=0.01, ended=None):
    """All that the sweep shows, as insights.json has it. Leaves status, loss and setting in the runs."""
    judge(runs)
    groups = {}
    tables = {}
    for run in runs:
        label = re.sub(r"-?lr[\d.e+-]+-s\d+$", "", run["name"])     # what varies: the folder's name says it
        run["setting"] = SCHEDULES.get(label, label)
        if run["loss"] is not None:
            groups.setdefault(run["setting"], []).append(run)
            table = tables.setdefault(run["setting"], {})
            table.setdefault(run["lr"], {})[run["seed"]] = run["loss"]
    winner, comparisons = compare_settings(tables, margin)
    settings = {label: analyse_setting(label, tables[label], groups[label]) for label in tables}
    best = use = None
    if winner is not None:
        s = settings[winner]
        best = dict(setting=winner, lr=s["best_lr"], val_loss=s["best_loss"])
        use = dict(setting=winner, lr=s["best_lr"], low=s["low"], high=s["high"])
    unfinished = [run["name"] for run in runs if run["loss"] is None]
    seeds = {run["seed"] for group in groups.values() for run in group}
    minutes = sum(run["summary"].get("seconds") or 0 for run in runs) / 60
    return dict(runs=len(runs), finished=len(runs) - len(unfinished), seeds=len(seeds), minutes=minutes,
                unfinished=unfinished, ended=ended, best=best, use=use, margin=margin,
                comparisons=comparisons, settings=list(settings.values()))


def analyse_setting(label, table, runs):
    """One setting over its rates."""
    s = dict(label=label, best_lr=None, best_loss=None, low=None, high=None, evidence=None, as_good=[],
             noise=None, df=0, bracketed=False, edge=None, searched_up_to=max(table))
    s["rates"] = []
    for lr in sorted(table):
        s["rates"].append(analyse_rate(lr, [run for run in runs if run["lr"] == lr]))
    best = best_rate(table)
    if best:
        differences, worse, s["as_good"], s["low"], s["high"] = compare_rates(table, best)
        squares, s["df"] = map(float, noise_near(table, best))
        s["noise"] = math.sqrt(squares / s["df"]) if s["df"] else None
        s["evidence"] = "paired tests" if s["df"] else "margin"
        s["best_lr"] = best
        s["best_loss"] = mean(table[best].values())
        s["bracketed"] = len(neighbours(table, best)) == 2
        s["edge"] = find_edge([row for row in s["rates"] if row["lr"] > best], best)
        differences[best] = 0.0
        for row in s["rates"]:
            row["shown"] = row["lr"] in worse
            row["difference"] = differences[row["lr"]]
            if row["difference"] is not None:   # without its seeds' luck: in the order of the pairs
                row["val_loss"] = s["best_loss"] + row["difference"]
    alive = [row for row in s["rates"] if row["val_loss"] is not None]
    losses = [row["val_loss"] for row in alive]
    s["summary"] = dict(mean=mean(losses), deviation=deviation(losses))
    s["summary"].update(best=min(losses, default=None), worst=max(losses, default=None))
    s["correlation"] = {}
    logs = [math.log(row["lr"]) for row in alive]
    for what in ("loss", "accuracy", "perplexity"):
        s["correlation"][what] = correlation(logs, [row["val_" + what] for row in alive])
    return s


def analyse_rate(lr, runs):
    """One rate over its seeds; the means are of those that survived."""
    alive = [run for run in runs if run["loss"] < math.inf]
    states = [run["status"] for run in runs]
    row = dict(lr=lr, seeds=[run["seed"] for run in runs], status=max(states, key=plot.STATUSES.index),
               difference=None, shown=False, accuracy_per_minute=None)
    row["deviation"] = deviation([run["loss"] for run in alive])
    for status in plot.EDGE:
        row[status] = states.count(status)
    for name in ("val_loss", "val_accuracy", "val_perplexity", "val_bpb"):
        row[name] = mean(run["summary"].get("final_" + name) for run in alive)
    row["max_grad_norm"] = mean(run["summary"].get("max_grad_norm") for run in runs)
    seconds = mean(run["summary"].get("seconds") for run in alive)
    if seconds and row["val_accuracy"]:
        row["accuracy_per_minute"] = 60 * row["val_accuracy"] / seconds
    return row


def find_edge(rates, best):
    """Of the rates above the best, the first unstable and the first diverged, and in how many seeds."""
    edge = dict(lr=None, status=None, ratio=None, unstable=None, diverged=None)
    for row in reversed(rates):
        for status in plot.EDGE:
            if row[status]:
                edge[status] = dict(lr=row["lr"], seeds=row[status], of=len(row["seeds"]))
                edge.update(lr=row["lr"], status=status)
    if edge["diverged"]:
        edge["ratio"] = edge["diverged"]["lr"] / best
    return edge if edge["lr"] else None


# --------------------------------------------------------------------------------------------------
# Report

COLUMNS = ("steps", "final_val_loss", "final_val_accuracy", "final_val_perplexity", "final_val_bpb",
           "final_train_loss", "best_val_loss", "best_val_step", "max_grad_norm")   # no times: repeatable


def answer(insights, s):
    """Which rate to use, and between which the optimum lies; s: the setting with which rates were tried."""
    best = insights["best"]
    name = f" with {best['setting']}" if best["setting"] else ""
    text = (f"**Use {plot.rate(best['lr'])}{name}.** Of all that was tried it has the lowest validation "
            f"loss, {best['val_loss']:.3f} nats a token.\n\n")
    low = high = "rates of which none is known to be worse"
    if s["low"]:
        low = plot.rate(s["low"])
    if s["high"]:
        high = plot.rate(s["high"])
    name = f" with {s['label']}" if s["label"] else ""
    text += f"The optimum{name} lies between {low} and {high}"
    good = ", ".join(plot.rate(lr) for lr in s["as_good"] if lr != s["best_lr"])
    if s["evidence"] == "margin":
        text += f", if {NEAR:g} nats are no luck: one seed knows no noise."
    else:
        text += (f": paired tests over {insights['seeds']} seeds, 95% together, with a noise of "
                 f"{s['noise']:.4f} nats.")
    if good:
        text += f" Nothing tells {plot.rate(s['best_lr'])} from {good}."
    return text


def markdown(rows, *columns):
    """A table of some columns of insights.json."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = ["" if row[column] is None else row[column] for column in columns]
        lines.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def edge_text(s):
    """The two edges, and the folk rule."""
    edge = s["edge"] or dict.fromkeys([*plot.EDGE, "ratio"])
    text = []
    for status in plot.EDGE:
        first = edge[status]
        if first:
            text.append(f"The first {status} rate above the best is {plot.rate(first['lr'])}, "
                        f"in {first['seeds']} of {first['of']} seeds.")
        else:
            text.append(f"No rate up to {plot.rate(s['searched_up_to'])} was {status}.")
    if edge["ratio"]:
        place = "near the edge" if edge["ratio"] < 2 else "the usual distance"
        if edge["ratio"] > 4:
            place = "conservative"
        text.append(f"It lies {edge['ratio']:.1f} times above the best: {place}, by the folk rule of 2 to 4.")
    return " ".join(text)


def in_numbers(insights):
    lines = [f"- {insights['runs']} runs took {insights['minutes']:.1f} minutes of computing"]
    titles = {"summary": "loss over the rates that survived", "correlation": "correlation with log rate"}
    for s in insights["settings"]:
        name = s["label"] + ": " if s["label"] else ""
        for key, title in titles.items():
            known = [f"{what} {value:.3f}" for what, value in s[key].items() if value is not None]
            lines.append(f"- {name}{title}: {', '.join(known) or 'too few rates'}")
        speeds = [(row["accuracy_per_minute"], row["lr"]) for row in s["rates"] if row["accuracy_per_minute"]]
        for speed, lr in sorted(speeds)[-1:]:
            lines.append(f"- {name}most accuracy a minute: {speed:.3f}, at {plot.rate(lr)}")
    return "\n".join(lines)


def next_steps(insights, s, again):
    lines = []
    if not s["bracketed"] or not s["edge"] or not s["edge"]["diverged"]:
        lines.append(f"- `{again} --widen --max-runs {insights['runs'] + 8}`: goes on until a rate diverges.")
    if insights["seeds"] < 3:
        lines.append(f"- `{again} --seeds 3`: measures the noise, so that differences can be shown.")
    if s["low"] and s["high"] and s["high"] > 3 * s["low"]:
        lines.append(f"- `{again} --refine 1`: tries rates closer to the best.")
    return "\n".join(lines) or "Nothing: the answer is as sharp as it needs to be."


def write_up(insights, meta):
    """lr_sweep_analysis.md, the answer first. Every number in it comes out of insights."""
    best = insights["best"] or {}
    text = ["# Which learning rate?"]
    if insights["ended"]:
        text.append(f"The search ended because {insights['ended']}.")
    if insights["unfinished"]:
        text.append(f"Left out, not finished or damaged: {', '.join(insights['unfinished'])}.")
    if meta.get("failed"):
        text.append(f"Failed: {', '.join(meta['failed'])}.")
    if not best:
        text.insert(1, "There is no answer: no run has survived. Try lower rates with --lrs.")
        return "\n\n".join(text) + "\n"
    # A setting of one rate was compared at that rate only: another one has the rates to tell of.
    swept = [s for s in insights["settings"] if len(s["rates"]) > 1] or insights["settings"]
    s = max(swept, key=lambda s: s["label"] == best["setting"])
    text.insert(1, answer(insights, s))
    if insights["comparisons"]:
        text += [f"## Settings, each at its best rate (same: within {insights['margin']:g} nats)",
                 markdown(insights["comparisons"], "better", "worse", "difference", "low", "high", "seeds",
                          "verdict", "seeds_needed")]
    how = f"by over {NEAR:g} nats" if s["evidence"] == "margin" else "by the tests"
    text.append(f"## Rates {s['label']}".strip())
    text.append(f"`difference`: nats above the best rate, paired over seeds; `shown`: worse {how}; "
                "`unstable`, `diverged`: in so many of the seeds.")
    columns = ("lr", "seeds", "status", "unstable", "diverged", "difference", "shown", "val_bpb")
    text.append(markdown(s["rates"], *columns))
    text += ["## The edge", edge_text(s), "## In numbers", in_numbers(insights), "## What to run next"]
    text.append(next_steps(insights, s, meta.get("command") or "python sweep.py"))
    return "\n\n".join(text) + "\n"


def write(path, text):
    """Aside, then renamed: a reader never sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8", newline="")
    aside.replace(path)


def report(dir, margin):
    """Reads the runs under dir, and writes table, analysis and all pictures there; returns the analysis."""
    meta = plot.read_json(dir / "sweep.json") or {}
    runs = plot.read_runs(dir) if dir.is_dir() else []
    if not runs:
        die(f"{dir} holds no run with a readable config.json")
    check_data(runs)
    insights = analyse(runs, margin, meta.get("ended"))
    damaged = {path.name for path in dir.iterdir() if path.is_dir()} - {run["name"] for run in runs}
    insights["unfinished"] += sorted(damaged)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["setting", "lr", "seed", "status", *COLUMNS])
    for run in runs:
        values = [run["summary"].get(column) for column in COLUMNS]     # csv writes None as nothing
        rows.writerow([run["setting"], f"{run['lr']:g}", run["seed"], run["status"], *values])
    text = write_up(insights, meta)
    write(dir / "summary_table.csv", table.getvalue())
    write(dir / "insights.json", json.dumps(insights, indent=1, allow_nan=False))
    write(dir / "lr_sweep_analysis.md", text)
    for run in runs:
        if not (run["dir"] / "loss_curves.png").exists():
            plot.draw_run(run["dir"])
    plot.draw_sweep(dir, runs, insights)
    return text


# --------------------------------------------------------------------------------------------------
# Command line

def learning_rate(text):
    rate = float(f"{float(text):g}")
    if not 1e-9 <= rate <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no learning rate from 1e-9 to 1e6")
    return rate


def whole(text):
    if not text.isdecimal() or len(text) > 6:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to 999999")
    return int(text)


def parse_vary(texts):
    """["a=1,2", "b,c=3:4,5:6"] -> every combination, tuples of (flag, value); [] -> one empty setting."""
    axes = []
    for text in texts:
        names, _, values = text.partition("=")
        flags = names.replace("_", "-").split(",")
        rows = [value.split(":", len(flags) - 1) for value in values.split(",")]
        if not all(flags) or not all(len(row) == len(flags) and all(row) for row in rows):
            die(f"--vary {text}: write FLAG=V1,V2 or FLAG1,FLAG2=A:B,C:D")
        wrong = {"lr", "seed", "out", "preset", "data", "vocab-size"}.intersection(flags)
        if wrong:
            die(f"--vary {text}: not {wrong.pop()}; rates have --lrs, seeds --seeds, and what changes the "
                "tokenizer takes a sweep each, since a loss a token compares within one only")
        axes.append([tuple(zip(flags, row)) for row in rows])
    return [sum(combination, ()) for combination in itertools.product(*axes)]


def parse_flags(argv):
    """argparse, twice: --preset and --study give the others defaults. -> all, and the flags for train.py."""
    about = "Sweep the learning rate. Flags not listed here go on to train.py."
    p = argparse.ArgumentParser("sweep.py", allow_abbrev=False, add_help=False, description=about,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: die(f"{message}; see --help")
    p.add_argument("--preset", choices=GRIDS, default="tiny", help="of the model")
    p.add_argument("--study", choices=STUDIES, help="a named plan, which sets defaults of the others")
    first, _ = p.parse_known_args(argv)
    study = dict(lrs=GRIDS[first.preset]) | STUDIES.get(first.study, {})
    middle = GRIDS[first.preset][(len(GRIDS[first.preset]) - 1) // 2]
    if "around" in study:
        study["lrs"] = [float(f"{factor * middle:.2g}") for factor in study["around"]]

    add = p.add_argument
    add("-h", "--help", action="help", help="show this and stop")
    add("--lrs", nargs="+", type=learning_rate, help="rates to start from")
    add("--seeds", type=whole, default=1, help="of the rates that matter; a seed fixes weights and batches")
    add("--refine", type=whole, default=0, help="halve the distance between rates around the best, so often")
    add("--vary", action="append", default=[], help="FLAG=V1,V2 of train.py, or FLAG1,FLAG2=A:B,C:D")
    add("--widen", action=argparse.BooleanOptionalAction, default=True,
        help="go outward to the edge and close in on the best; --no-widen: only the rates given")
    add("--max-runs", type=whole, help="at most this many; None: 16 for each setting and seed")
    add("--jobs", type=whole, help="runs at once; None: as many as pay")
    add("--margin", type=float, default=0.01, help="nats: settings within it are called the same")
    add("--name", help="folder under runs/; None: from the flags")
    add("--device", default="auto", help="as train.py takes it")
    add("--mix-code", action="store_true", help="compare runs of edited code with those before the edit")
    add("--dry-run", action="store_true", help="print the next round's commands, one a line, and stop")
    add("--report", type=Path, help="analyse and draw again what lies in this folder, and stop")
    p.set_defaults(**(dict(flags=[], schedules=[]) | study))
    return p.parse_known_args(argv)


def make_plan(args, extra):
    """Checks what argparse could not, and says what to do: args with more in it."""
    for word in extra:
        if word.split("=")[0] in ("--lr", "--seed", "--out", "--resume", "--prepare", "--data-tokens"):
            die(f"{word} is set by the sweep; see --lrs, --seeds and --name in --help")
    if args.name is None:
        varied = [text.split("=")[0] for text in args.vary]
        parts = [args.preset, args.study or "", *varied, *extra]
        parts = [part.lstrip("-") for part in parts if part]
        args.name = re.sub(r"[^\w.+-]+", "_", "-".join(parts))[:150]
    if Path(args.name).name != args.name or args.name in ("", ".."):
        die(f"--name {args.name!r}: a plain name, for a folder under runs/")
    args.dir = Path("runs") / args.name
    args.flags = ["--preset", args.preset, "--device", args.device, *args.flags, *extra]
    args.settings = parse_vary(args.vary)
    args.schedules = parse_vary(args.schedules) if args.schedules else []
    least = len(args.settings) * len(args.lrs)
    if args.max_runs is None:
        args.max_runs = args.seeds * (max(16 * len(args.settings), least) + len(args.schedules))
    if args.max_runs < least or args.jobs == 0:
        die(f"--seeds {args.seeds} --max-runs {args.max_runs} --jobs {args.jobs}: at least one seed, one "
            f"job, and the {least} runs of the grid")
    args.gpus = visible_gpus(args.device)
    args.jobs = args.jobs or auto_jobs(args.preset, args.device, args.gpus)
    args.failed = []
    args.done = {}
    args.owner = None
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
    meta = dict(command=shlex.join(["python", "sweep.py", *argv]), flags=plan.flags)
    old = plot.read_json(plan.dir / "sweep.json") or meta
    if old.get("flags") != plan.flags:
        die(f"{plan.dir} was made with other flags, {old.get('flags')}; choose another --name")
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)
    try:
        ended = search(plan, meta)
        if plan.dry_run:
            return 0
        if plan.owner is None:
            plan.owner = lock(plan.dir)
            print("all runs were finished before and are kept; for new ones choose another --name")
        write(plan.dir / "sweep.json", json.dumps(dict(meta, ended=ended, failed=plan.failed), indent=1))
        text = report(plan.dir, plan.margin)
        answered = text.replace("**", "").split("\n\n")[1:3]
        print("", *answered, f"Table, analysis and pictures: {plan.dir}", sep="\n\n")
        return 1 if plan.failed else 0
    except Stopped as stopped:
        print(f"stopped: {len(plan.done)} runs are finished, the others keep what they have. To go on: "
              + meta["command"])
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
