"""Sweep the learning rate: one process a run; decide what to try next; say what the runs show, and what not.

    python sweep.py                             the tiny preset: bracket the best rate, find the edge, report
    python sweep.py --preset moe --seeds 2      flags unknown here (--max-steps 400) go on to train.py
    python sweep.py --vary optimizer=adamw,muon any train.py flag, each value at its own best rate
    python sweep.py --dry-run                   the next round's commands, one a line: Slurm, xargs, Ray

Loss against log rate is assumed to fall to one valley and rise again. A seed gives every rate the same
initial weights and batches, so that differences between rates are paired: the seed's luck drops out.

    noise     residuals of loss[rate, seed] - mean of the rate - mean of the seed (Fisher 1935)
    worse     a rate is shown to be worse where its mean paired difference to the best is over t(df) s /
              sqrt(seeds): s is sqrt(2) noise, or the deviation of the differences if larger; t stands at
              1 - 0.025 / k for k rates compared (Bonferroni). It takes two seeds, or two that diverged
    interval  the optimum lies between the nearest rates below and above the best that are shown to be worse
    settings  are compared at their best rates, in the same way

python tests/simulate.py shows how often that is right, on sweeps whose optimum is known.
"""
import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from math import comb, inf, isfinite, log, nan, pi, sqrt, tan
from pathlib import Path

import numpy as np
from tqdm import tqdm

import plot
from data import DataError, catch_stops, cores, lock, say, write_aside, write_csv, write_json

TRAIN = Path(__file__).resolve().with_name("train.py")
GRIDS = {   # where the search starts; other presets start from 0.1 to 10 times train.py's own rate
    "tiny": [3e-4, 3e-3, 1e-2, 3e-2, 1, 3],
    "dense": [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2],
    "dense-low": [1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2],
    "moe": [0.01, 0.02, 0.035, 0.05, 0.065, 0.085, 0.1, 0.15, 0.3],
}
PER_GPU = {"tiny": 4, "dense": 1, "dense-low": 8, "moe": 2}     # runs at once, measured on an H100
STUDIES = {     # only these rates (--no-widen), and more flags, which yours override
    "explore": "--lrs 0.001 0.01 0.03 0.1 0.3 --max-steps 50",
    "extend": "--lrs 0.01 0.02 0.033 0.045 0.052 0.065 0.078 0.1 0.13 0.2 0.33 --max-steps 100",
    "fine": "--lrs 0.06 0.07 0.08 0.09 0.1 0.11 0.12 0.13 0.14 --max-steps 75",
    "wide": ("--lrs 0.001 0.002 0.003 0.004 0.006 0.008 0.01 0.015 0.02 0.03 0.04 0.05 0.065 0.08 "
             "0.1 0.13 0.16 0.2 0.25 0.3 0.4 0.5 0.6 0.7 0.85 1.0"),
    # conservative, baseline, none, aggressive, long: warm-up and floor
    "schedules": "--lrs 0.065 --vary warmup-ratio,min-lr-ratio=0.1:0.05,0.05:0.1,0:0.1,0.02:0.2,0.2:0.1",
    # the textbook's edge of stability: gradient descent on one batch, with nothing that hides it
    "edge": ("--lrs 0.004 0.01 0.025 0.06 0.15 0.4 1.0 2.5 --seeds 1 --optimizer sgd --momentum 0 "
             "--full-batch --batch-size 8 --context-length 64 --max-steps 400 --schedule constant "
             "--warmup-ratio 0 --grad-clip 0 --weight-decay 0 --dtype float32 --sharpness 10 "
             "--log-interval 1 --eval-interval 400 --eval-tokens 2048"),
}
MARGIN = 0.01   # a difference in loss that does not matter, nats

# Statistics: functions of a table {rate: {seed: loss}}; inf is the loss of a run that diverged ----

@cache
def t_quantile(p, df):
    """The t below which Student's distribution has the share p. Its density, (1 + t^2 / df)^(-(df + 1) / 2),
    has endless tails; with t = sqrt(df) tan(angle) they end at 90 degrees, and the density of the angle is
    cos(angle)^(df - 1). Summed over a fine grid of angles, it reaches p of its total at this t."""
    width = pi / 20_000
    angles = np.arange(-pi / 2, pi / 2, width) + width / 2      # the middles of the grid's cells
    shares = np.cumsum(np.cos(angles) ** (df - 1))              # up to the right end of each
    return sqrt(df) * tan(np.interp(p, shares / shares[-1], angles + width / 2))

def mean(values):
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else nan

def paired(row, other):
    """Differences row - other, {seed: loss} each, over the seeds that survived in both."""
    differences = [loss - other.get(seed, inf) for seed, loss in row.items()]
    return [d for d in differences if isfinite(d)]

def lowest(rows):
    """The key in {key: {seed: loss}} that is lowest, over the seeds it shares with the fullest row: of those
    that survived in all their seeds; one seed is not enough where others have more. None: none survived."""
    alive = {key: row for key, row in rows.items() if max(row.values()) < inf}
    fullest = max(alive.values(), key=len, default={})
    leading = [key for key in alive if len(alive[key]) > 1 or len(fullest) == 1]
    return min(leading, key=lambda key: mean(paired(alive[key], fullest) or [inf]), default=None)

def noise(table, best):
    """Sum of squared residuals (nats^2) and degrees of freedom, of all rates that survived in its seeds."""
    rows = [[row.get(seed, inf) for seed in table[best]] for row in table.values()]
    x = np.array([row for row in rows if max(row) < inf])      # (rates, seeds)
    residuals = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    return np.array([np.sum(residuals ** 2), np.prod(np.subtract(x.shape, 1))])

def half_width(differences, squares, df, k):
    """Half the interval of a mean of paired differences, one of k that hold together with 95%."""
    n = len(differences)
    if not df or not n:
        return inf
    spread = sqrt(2 * squares / df)
    if n > 1:
        spread = max(spread, np.std(differences, ddof=1))
    return float(t_quantile(1 - 0.025 / k, df) * spread / sqrt(n))

def compare(rows, best, squares, df, k):
    """{key: how its row {seed: loss} stands beside the best's}, k of them at once. worse: shown to be, by two
    pairs of runs, or by two that diverged; seems: shown to be, or as far as a single run can tell."""
    found = {}
    for key, row in rows.items():
        d = paired(row, rows[best])
        half = half_width(d, squares, df, k)
        diverged = list(row.values()).count(inf)
        seems = not d or mean(d) > half or diverged > 1
        worse = seems and max(len(d), diverged) > 1
        seems = worse or (seems and len(row) == 1)
        verdict = "cannot tell"
        if key == best:
            verdict = "best"
        elif diverged:
            verdict = "diverged"
        elif len(d) < 2:
            verdict = "one seed"
        elif worse:
            verdict = "worse"
        elif abs(mean(d)) + half < MARGIN:
            verdict = "same"
        if verdict in ("best", "one seed"):
            half = nan
        found[key] = dict(worse_by=mean(d), half_width=half, seems=seems, worse=worse, verdict=verdict)
    return found

def compare_rates(table, best):
    """{rate: how it stands beside the best}; k counts those with several pairs, without the best."""
    k = sum(len(paired(row, table[best])) > 1 for row in table.values()) - 1
    return compare(table, best, *noise(table, best), max(1, k))

def limits(found, best, what="worse"):
    """The nearest rates below and above the best that are worse, or seem so; 0 and inf where none is."""
    rates = [lr for lr in found if found[lr][what]]
    low = max((lr for lr in rates if lr < best), default=0)
    return low, min((lr for lr in rates if lr > best), default=inf)

def compare_settings(tables):
    """{label: table} -> the label with the lowest loss at its best rate, and {label: how each setting that has
    a seed in common stands beside it, at its own best rate}. None, {}: no run survived."""
    best = {label: lowest(table) for label, table in tables.items() if lowest(table)}
    rows = {label: tables[label][lr] for label, lr in best.items()}
    winner = lowest(rows)
    rows = {label: row for label, row in rows.items() if paired(row, rows[winner])}
    if not rows:
        return None, {}
    pooled = sum(noise(tables[label], best[label]) for label in rows)
    if not pooled[1]:       # one rate each: the noise is what remains between the settings
        pooled = noise(rows, winner)
    k = max(1, comb(len(rows), 2))      # the winner came out of all pairs
    return winner, compare(rows, winner, *pooled, k)

# What to run next: from a setting's table to a list of (rate, seed), of which the new ones are run -

def neighbours(table, lr):
    rates = sorted(table)
    i = rates.index(lr)
    return rates[max(0, i - 1):i] + rates[i + 1:i + 2]  # below and above, those that exist

def edge_above(table, best):
    """What ends the search upward; "" where nothing does."""
    above = sorted(lr for lr in table if lr > best)
    edges = [f"{lr:g} diverged" for lr in above if inf in table[lr].values()]
    edges += [f"{lr:g} is more than a nat worse" for lr in above if mean(paired(table[lr], table[best])) > 1]
    return "".join(edges[:1])

def outward(table, plan):
    """Until there are worse rates on both sides of the best, and one above it diverged or is a nat worse."""
    start = [(lr, 0) for lr in plan.lrs]
    if not table or not plan.widen:
        return start
    first, last, best = min(table), max(table), lowest(table)
    down, up = best in (None, first), best and not edge_above(table, best)
    if best:    # no rate between it and an end seems worse, nor the end itself, in several seeds
        low, high = limits(compare_rates(table, best), best, "seems")
        down = down or (low == 0 and len(table[first]) > 1)
        up = up or (high == inf and len(table[last]) > 1)
    lower, higher = float(f"{first / 3:.0e}"), float(f"{last * 3.3:.0e}")
    return start + [(lower, 0)] * bool(down) + [(higher, 0)] * bool(up)

def between(table, plan):
    """Midpoints, until the neighbours of the best rate are within a factor of 2, or of 1.4 where settings are
    compared: of its root where the seeds could tell what that gains, as a parabola through the three lies
    below the best by up to an eighth of what the two are worse. --refine halves these, on the log axis."""
    best = lowest(table)
    if not best or not (plan.widen or plan.refine):
        return []
    factor, least = 2.05, MARGIN / 2    # rates have two digits
    if len(plan.settings) > 1:
        factor, least = 1.45, 0
    around = neighbours(table, best)
    gain = sum(mean(paired(table[lr], table[best]) or [inf]) for lr in around) / 8
    squares, df = noise(table, best)
    if df and gain > min(max(least, sqrt(squares / df)), 3 * MARGIN):   # more than the noise of a run, or much
        factor = sqrt(factor)
    far = [lr for lr in around if abs(log(lr / best)) > log(factor) / 2 ** plan.refine]
    middles = [np.clip(sqrt(best * lr), best / 2, best * 2) for lr in far]
    return [(float(f"{lr:.2g}"), 0) for lr in middles]

def seeds(table, plan):
    """For the best rate and its neighbours; then for all around it, up to the first that seem worse."""
    best = lowest(table)
    lrs = [best, *neighbours(table, best)] if best else []
    if best and len(table[best]) > 1:
        low, high = limits(compare_rates(table, best), best, "seems")
        lrs = [lr for lr in table if low <= lr <= high]
    return [(lr, seed) for lr in lrs for seed in range(plan.seeds)
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
    next of them; and why it ended, once there are none."""
    tables = tables_of(results)
    keys = []
    for setting in plan.settings:
        for stage in (outward, between, seeds):     # the first that asks for something new
            wanted = dict.fromkeys((setting, *run) for run in stage(tables.get(setting, {}), plan))
            new = [key for key in wanted if key not in results]
            if new:
                keys += new
                break
    if keys and len(results) < plan.max_runs:
        return keys[:plan.max_runs - len(results)], None
    if keys:
        return [], f"it reached its limit of {plan.max_runs} runs (--max-runs), before it had all it wanted"
    if None in results.values():
        return [], "only failed runs were left; the same command tries them again"
    if not plan.widen:
        return [], "all that was asked for has run"
    edges = {edge_above(table, lowest(table)) for table in tables.values()}
    return [], f"the best rate has worse ones on both sides, and {' and '.join(sorted(edges))}"

# The folders of runs ------------------------------------------------------------------------------

def die(message):
    say(f"sweep.py: {message}", sys.stderr)
    raise SystemExit(2)

def run_name(key):
    setting, lr, seed = key     # optimizer=muon-lr0.003-s0
    return re.sub(r"[^\w.+=,-]+", "_", f"{','.join(setting)}-lr{lr:g}-s{seed}".lstrip("-"))

def refuse_mixture(run, made, mix_code):
    """Dies if the run's config.json has other args, data or (without mix_code) code than made has."""
    found = []
    for was in [run["config"], *run["config"].get("resumes", [])]:  # each with the code of its day
        for part in ["args", "data"] + ["code"] * (not mix_code):
            before, now = was.get(part) or {}, made.get(part) or {}
            found += [name for name in now if name not in plot.FREE and before.get(name, now[name]) != now[name]]
    if found:
        advice = " or add --mix-code" * all(name.endswith(".py") for name in found)
        die(f"{run['name']} was made with another {', '.join(found)}; choose another --name{advice}")

def losses_in_folder(plan, keys):
    """{key: loss}, None where it has to be run. Every run there must be what train.py would make now."""
    losses = dict.fromkeys(keys)
    names = {run_name(key): key for key in keys}
    for run in plot.read_runs(plan.dir):
        made = plan.made[plan.settings[0]] | dict(args={})
        if run["name"] in names:
            setting, lr, seed = key = names[run["name"]]
            made["args"] = plan.made[setting]["args"] | dict(lr=lr, seed=seed)
            losses[key] = run["loss"]
        refuse_mixture(run, made, plan.mix_code)
    return losses

# Processes ----------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
CONTEXT.set_forkserver_preload(["torch", "tqdm"])       # on Linux loaded once: it takes 2.6 CPU-seconds

def train(words, log, cwd, env):
    """Runs train.py with these words in this process, a copy of the server's; its complaints go to a log."""
    if sys.platform == "linux":     # PR_SET_PDEATHSIG: when its sweep ends, however that is, it saves and ends
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    os.chdir(cwd)
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")

def handle_stops(plan):
    """Stops are passed on to the runs: train.py saves at the first, and ends at once 2 s after it."""
    def on_signal(number, frame):
        for process in plan.running.values():
            if os.name == "posix":      # on Windows the console has told them
                os.kill(process.pid, number)
        if not plan.stopped:
            plan.stopped = True
            raise SystemExit(128 + number)
    catch_stops(on_signal)

def command(plan, setting, *more):
    varied = [re.sub("^(.*)=off$", r"no-\1", text.removesuffix("=on")) for text in setting]    # switches
    return [sys.executable, str(TRAIN), *plan.flags, *(f"--{text}" for text in varied), *more]

def run_command(plan, key, *more):
    setting, lr, seed = key
    own = [f"--lr={lr}", f"--seed={seed}", f"--out={plan.dir / run_name(key)}", "--resume", "--no-plot"]
    return command(plan, setting, *own, *more)

def ask_train(plan):
    """Sets what train.py makes of each setting: its args, data, code and devices; and with them lrs, jobs."""
    plan.made = {}
    for setting in plan.settings:
        process = subprocess.run(command(plan, setting, "--prepare"), stdout=subprocess.PIPE)
        if process.returncode < 0:
            die(f"preparing the data was {killed(process.returncode)}")
        if process.returncode:      # it has said why
            raise SystemExit(2)
        made = plan.made[setting] = json.loads(process.stdout.splitlines()[-1])
    if any(other["data"] != made["data"] for other in plan.made.values()):
        die("these settings would read different amounts of text; give all of them the same --data-tokens")
    plan.devices = made["devices"]
    on_cpu = 1      # a larger run fills all cores; a Mac has one GPU
    if plan.preset == "tiny" and plan.devices == ["cpu"]:
        on_cpu = min(8, cores())
    gpus = sum(name.startswith("cuda") for name in plan.devices)
    plan.jobs = plan.jobs or gpus * PER_GPU.get(plan.preset, 1) or on_cpu
    if plan.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // plan.jobs)))
    plan.lrs = plan.lrs or [float(f"{made['args']['lr'] * times:.3g}") for times in (0.1, 0.3, 1, 3, 10)]

def start_run(plan, key, slot):
    dir = plan.dir / run_name(key)
    dir.mkdir(parents=True, exist_ok=True)
    words = run_command(plan, key, f"--device={plan.devices[slot % len(plan.devices)]}")
    process = CONTEXT.Process(target=train, args=(words[1:], dir / "stderr.log", os.getcwd(), dict(os.environ)))
    process.start()
    process.dir, process.began = dir, time.monotonic()
    process.steps = plan.made[key[0]]["args"]["max_steps"]
    plan.running[slot] = process

def killed(code):
    return f"KILLED by {signal.Signals(-code).name}, from outside (out of memory? a time limit?)"

def how_it_ended(process):
    log, code = process.dir / "stderr.log", process.exitcode
    if code < 0:
        return f"{killed(code)}. Its log is {log}"
    if code > 128:
        return "stopped"
    if code:
        end = log.read_text(errors="replace").splitlines()[-6:]
        return "\n".join([f"FAILED, the others go on. The end of {log}:", *end])
    summary = plot.read_json(process.dir / "summary.json") or {}
    loss = summary.get("final_val_loss") or nan     # null: it was not finite
    return f"{summary.get('status')}, validation loss {loss:.4g}, {time.monotonic() - process.began:.0f} s"

def progress(plan, done, total, seconds):
    """A bar of the steps of a round, with the losses of the runs that are going on."""
    losses = []
    for process in plan.running.values():
        run = plot.read_run(process.dir)
        if run and len(run["train"]["step"]):
            done += int(run["train"]["step"][-1])
            losses.append(f"{run['name']} {run['train']['train_loss'][-1]:.3f}")
    return tqdm.format_meter(done, total, seconds, unit=" steps", ascii=True, postfix=", ".join(losses))

def execute(plan, keys):
    """One round: runs, plan.jobs at a time, with one bar for all of them, in place on a terminal."""
    waiting, done = list(keys), 0
    total = sum(plan.made[setting]["args"]["max_steps"] for setting, _, _ in keys)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns - 1
    began = shown = time.monotonic()
    while plan.running or waiting:
        for slot in range(plan.jobs):
            if slot in plan.running and plan.running[slot].exitcode is not None:
                process = plan.running.pop(slot)
                done += process.steps
                say(f"{process.dir.name}: {how_it_ended(process)}".ljust(columns * terminal))
            if slot not in plan.running and waiting:
                start_run(plan, waiting.pop(0), slot)
        if time.monotonic() - shown > (1 if terminal else 10):
            shown = time.monotonic()
            line = progress(plan, done, total, shown - began)
            if terminal:
                say(f"{line[:columns]:{columns}}", end="\r")
            else:
                say(line)
        time.sleep(0.05)

def print_commands(plan, keys):
    for key in keys:
        line = f"cd {shlex.quote(os.getcwd())} && {shlex.join(run_command(plan, key))}"
        if "\n" in line:    # what follows it would be run as a command of its own
            die(f"{line!r:.200}: a command with a line break is refused")
        say(line)

def run_sweep(plan):
    """Round after round; a restart replays them, and finished runs answer at once. Then the report. With
    --dry-run only the commands of the next round are printed, and nothing is written."""
    results, ended, owner = {}, None, None
    if not plan.dry_run:
        say("checking the flags and preparing the data ...")
    ask_train(plan)
    if not plan.dry_run:
        owner = lock(plan.dir)      # until the end
        say(f"runs go to {plan.dir}, {plan.jobs} at a time")
    while not ended:
        new, ended = next_runs(results, plan)
        losses = losses_in_folder(plan, new)
        missing = [key for key in new if losses[key] is None]
        if plan.dry_run and missing:
            print_commands(plan, missing)
            return 0
        execute(plan, missing)
        results |= losses_in_folder(plan, new)
    if owner:
        text = report(plan.dir, plan.mix_code, f"The search ended because {ended}.")
        say("\n" + text.split("## ")[0].replace("**", "") + f"Table, analysis and pictures: {plan.dir}")
    return int(None in results.values())

# Analysis: insights.json --------------------------------------------------------------------------

def analyse(runs, ended=""):
    """All that the runs show. Sets each run's setting, those of its args in which the runs differ, and its
    steps to the training loss that the worst surviving run ends with."""
    varied = [flag for flag in runs[0]["args"] if flag not in (*plot.FREE, "lr", "seed")
              and len({str(run["args"].get(flag)) for run in runs}) > 1]
    over = [run for run in runs if run["loss"] is not None]
    target = max((run["train"]["train_loss"][-1] for run in over if run["loss"] < inf), default=-inf)
    for run in runs:
        if varied:      # else it may be known from curves.csv
            values = [f"{flag.replace('_', '-')}={run['args'].get(flag)}" for flag in varied]
            run["setting"] = " ".join(values)
        reached = run["train"]["step"][run["train"]["train_loss"] <= target]
        run["steps_to_loss"] = min(reached, default=None)
    tables = tables_of({(run["setting"], run["lr"], run["seed"]): run["loss"] for run in over})
    winner, beside = compare_settings(tables)
    settings = [analyse_setting(label, table, over) for label, table in tables.items()]
    use, comparisons = None, {}
    if winner is not None and not runs[0]["args"].get("full_batch"):
        [s] = [s for s in settings if s["label"] == winner]
        use = dict(setting=winner, lr=s["best_lr"])
        use |= {name: s[name] for name in ("loss", "low", "high", "seeds")}
        comparisons = {label: how for label, how in beside.items() if label != winner}
    minutes = sum(run["summary"].get("seconds") or 0 for run in over) / 60
    insights = dict(use=use, ended=ended, runs=len(over), minutes=minutes, target_loss=target,
                    comparisons=comparisons, settings=settings)
    return json.loads(json.dumps(insights), parse_constant=lambda unknown: None)   # nan and inf become None

def analyse_setting(label, table, runs):
    """One setting: what is known of its best rate, a row for each rate, and the edges above the best."""
    best = lowest(table)
    s = dict(label=label, best_lr=best, loss=nan, low=nan, high=nan, seeds=0, noise=nan, rates=[],
             edge=dict(unstable=None, diverged=None))
    beside = {}
    if best:
        beside = compare_rates(table, best)
        low, high = limits(beside, best)
        squares, df = noise(table, best)
        s |= dict(loss=mean(table[best].values()), low=low or nan, high=high, seeds=len(table[best]),
                  noise=float(np.sqrt(squares / (df or nan))))
    for lr in sorted(table):
        row = dict(lr=lr, worse_by=nan, half_width=nan, verdict="diverged") | beside.get(lr, {})
        row |= analyse_rate([run for run in runs if run["setting"] == label and run["lr"] == lr])
        s["rates"].append(row)
        if best and lr > best and row["status"] in s["edge"]:
            s["edge"][row["status"]] = s["edge"][row["status"]] or dict(lr=lr)
    return s

def analyse_rate(runs):
    """The runs of a rate: the worst of their fates, and means of those that did not diverge."""
    alive = [run for run in runs if run["loss"] < inf]
    row = dict(seeds=[run["seed"] for run in runs], diverged=len(runs) - len(alive),
               runs=[[run["seed"], run["loss"], run["status"], run["summary"].get("seconds")]
                     for run in runs],
               status=max((run["status"] for run in runs), key=plot.STATUSES.index),
               val_loss=mean(run["loss"] for run in alive),
               steps_to_loss=mean(run["steps_to_loss"] for run in alive))
    for name in ("final_val_accuracy", "final_val_perplexity", "final_val_bpb", "max_grad_norm"):
        row[name.removeprefix("final_")] = mean(run["summary"].get(name) for run in alive)
    return row

# Report -------------------------------------------------------------------------------------------

COLUMNS = ("setting", "lr", "seed", "status", "steps", "final_val_loss", "final_val_accuracy",
           "final_val_perplexity", "final_val_bpb", "final_train_loss", "best_val_loss", "best_val_step",
           "max_grad_norm")     # no times: repeatable
CURVE = ("setting", "lr", "seed", "step", "train_loss", "val_loss")
HEAD = """| learning rate | seeds | loss | worse by | verdict | curves | bits a byte |
| --- | --- | --- | --- | --- | --- | --- |"""
ROW = ("| {lr:g} | {n} | {val_loss:.4f} | {worse_by:.4f} ± {half_width:.4f} | {verdict} | {status} | "
       "{val_bpb:.4f} |")
NOT_SHOWN = "the seeds do not show which is better."
SAID = {"worse": "the seeds show it.", "cannot tell": NOT_SHOWN, "one seed": NOT_SHOWN,
        "same": f"the same, for all that matters ({MARGIN} nats)."}

def answer(s):
    """Which rate to use in a setting, and how sure that is."""
    name = f"{s['best_lr']:g} {s['label']}".strip()
    text = (f"**Use {name}.** Of the learning rates tried it has the lowest validation loss: "
            f"{s['loss']:.3f} nats a token, ")
    if s["seeds"] == 1:
        return text + "in its only run. One seed cannot tell a better rate from luck: add --seeds 3."
    text += f"the mean of {s['seeds']} seeds. "
    sides = " or ".join(["below"] * (not s["low"]) + ["above"] * (not s["high"]))
    if sides:
        text += f"No rate {sides} it is shown to be worse, so the optimum may lie far {sides}."
    else:
        tests = ["paired t-tests over the seeds, 95% together"]
        tests += [f"{row['diverged']} runs at {row['lr']:g} diverged" for row in s["rates"]
                  if row["lr"] in (s["low"], s["high"]) and row["diverged"] > 1]
        text += (f"The optimum lies between {s['low']:g} and {s['high']:g}: these two are shown to be worse "
                 f"({'; '.join(tests)}).")
    close = [f"{row['lr']:g} ({row['worse_by']:+.3f})" for row in s["rates"]
             if row["verdict"] in ("same", "cannot tell")]
    if close:
        text += f" {', '.join(close)} cannot be told from it with {s['seeds']} seeds."
    return text

def above_the_best(s):
    """What happened at higher rates."""
    unstable, diverged, top = s["edge"]["unstable"], s["edge"]["diverged"], s["rates"][-1]
    if top["lr"] == s["best_lr"]:
        return "No rate above the best was tried."
    text = f"No rate above the best diverged, up to {top['lr']:g}."
    if diverged:
        below = max(row["lr"] for row in s["rates"] if row["lr"] < diverged["lr"])
        text = (f"The first diverged rate is {diverged['lr']:g}, {diverged['lr'] / s['best_lr']:.3g} times the "
                f"best; {below:g}, the highest rate below it, survived.")
    elif top["worse_by"] is not None:       # they have a seed in common
        text = text[:-1] + f", {top['worse_by']:.2f} nats worse."
    if unstable:
        text += f" The first unstable rate above the best is {unstable['lr']:g}."
    return text

def rates_table(rates):
    """The rates of a setting in markdown."""
    lines = [HEAD]
    for row in rates:
        known = {name: nan if value is None else value for name, value in row.items()}
        line = ROW.format(n=len(row["seeds"]), **known)
        lines.append(line.replace(" ± nan", "").replace("nan", "").replace("| 0.0000 | best", "|  | best"))
    return "\n".join(lines)

def write_up(insights, left_out=(), mix_code=False):
    """lr_sweep_analysis.md, the answer first. Every number in it comes out of insights."""
    use, settings = insights["use"], insights["settings"]
    text = ["# Which learning rate?"]
    text += [answer(s) for s in settings if use and s["label"] == use["setting"]]
    if not use:
        text.append("No answer: no rate survived, or all fit one batch, whose validation loss says little.")
    took = "{runs} runs took {minutes:.1f} minutes of training, summed over the runs. {ended}"
    if not insights["minutes"]:     # read from curves.csv
        took = "{runs} runs. {ended}"
    text.append(took.format(**insights).strip())
    if left_out:
        text.append(f"Left out, as they are not over or cannot be read: {', '.join(left_out)}.")
    if mix_code:
        text.append("Runs of edited code may be among them (--mix-code).")
    for label, c in insights["comparisons"].items():
        size = "{worse_by:.4f}".format(**c)
        if c["half_width"] is not None:
            size += " ± {half_width:.4f}".format(**c)
        text.append(f"{label} at its best rate is {size} nats worse than {use['setting']}: {SAID[c['verdict']]}")
    for s in settings:
        text.append(f"## The learning rates {s['label']}".strip())
        if s["best_lr"]:
            text.append(above_the_best(s))
        text.append(rates_table(s["rates"]))
        losses = [row["val_loss"] for row in s["rates"] if not row["diverged"]]
        if len(losses) > 1:
            text.append("The rates that survived in all their seeds end at "
                        f"{mean(losses):.3f} nats on average (deviation {np.std(losses, ddof=1):.3f}), "
                        f"from {min(losses):.3f} to {max(losses):.3f}.")
    if any(s["edge"]["diverged"] for s in settings):
        text.append("A folk rule says that runs begin to diverge at 2 to 4 times the best rate.")
    return "\n\n".join(text) + "\n"

def curve(run):
    """A run's rows in curves.csv: at most 100 means of training losses, and every validation loss."""
    blocks = min(100, len(run["train"]["step"]))
    steps = np.array_split(run["train"]["step"], blocks)
    losses = np.array_split(run["train"]["train_loss"], blocks)
    for step, loss in zip(steps, losses):
        yield run | dict(step=int(step[-1]), train_loss=f"{np.mean(loss):.4g}")
    for step, loss in zip(run["metrics"]["step"], run["metrics"]["val_loss"]):
        if isfinite(loss):
            yield run | dict(step=int(step), val_loss=f"{loss:.4g}")

def report(dir, mix_code=False, ended=""):
    """Reads the runs under dir, and writes tables, analysis and pictures there; returns the analysis."""
    runs = plot.read_runs(dir)
    if not runs:
        die(f"{dir} holds no run that made a step")
    for run in runs:
        refuse_mixture(run, dict(runs[0]["config"], args={}), mix_code)
    insights = analyse(runs, ended)
    folders = {path.name for path in dir.iterdir() if path.is_dir()}
    over = [run for run in runs if run["loss"] is not None]
    text = write_up(insights, sorted(folders - {run["name"] for run in over}), mix_code)
    if runs[0]["config"]:       # else they come from curves.csv, and know less than is written there
        write_csv(dir / "summary_table.csv", COLUMNS, [run["summary"] | run for run in runs])
        write_csv(dir / "curves.csv", CURVE, [row for run in over for row in curve(run)])
    write_aside(dir / "lr_sweep_analysis.md", text.encode())
    write_json(dir / "insights.json", insights)
    for run in runs:
        if not (run["dir"] / "loss_curves.png").exists():
            plot.draw_run(run["dir"])
    if insights["settings"]:    # else no run is over
        plot.draw_sweep(dir, runs, insights)
    return text

# Command line -------------------------------------------------------------------------------------

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
            axes[-1].append(tuple(f"{flag}={part}" for flag, part in zip(flags, parts)))
    return [sum(combination, ()) for combination in itertools.product(*axes)]

def parse_flags(argv):
    """-> the flags of the sweep, and those that are train.py's."""
    p = argparse.ArgumentParser("sweep.py", allow_abbrev=False, add_help=False,
                                description="All other flags are sent on to train.py: see train.py --help.")
    p.error = lambda message: die(f"{message}; see --help")
    add = p.add_argument_group("what to train").add_argument
    add("--preset", default="tiny", help="tiny (the default), dense, dense-low, moe, or your own in model.py")
    add("--vary", action="append", default=[], metavar="FLAG=V1,V2",
        help="compare values of a train.py flag (on,off for a switch), each at its own best learning rate; "
             "A,B=1:2,3:4 for pairs")
    add = p.add_argument_group("what to try").add_argument
    add("--study", choices=STUDIES, help="a named experiment, which sets --lrs, --no-widen and more")
    add("--lrs", nargs="+", type=float, metavar="LR",
        help="learning rates to start from (default for tiny: {tiny}; for moe: {moe})".format(**GRIDS))
    add("--seeds", type=int, default=3,
        help="runs at the best learning rate and at those near it (default: 3); others get one")
    add("--refine", type=int, default=0, help="times to halve the steps around the best one (default: 0)")
    add("--widen", action=argparse.BooleanOptionalAction, default=True,
        help="search beyond and between --lrs (default: yes, but not in a --study)")
    add("--max-runs", type=int, help="how many runs at most (default: 16 for each setting and seed)")
    add = p.add_argument_group("how to run, and what to do with the runs").add_argument
    add("--jobs", type=int, help="runs at once (default: as many as the cores or GPUs are good for)")
    add("--name", help="folder of the sweep, under runs/ (default: made of the flags)")
    add("--mix-code", action="store_true", help="allow runs that were made before the code was edited")
    add("--dry-run", action="store_true", help="print the commands of the next round, one a line, and stop")
    add("--report", type=Path, metavar="FOLDER", help="analyse and draw again what is in a folder, and stop")
    add("-h", "--help", action="help", help="show this and stop")
    plan, given = p.parse_known_args(argv)
    if plan.study:
        plan, given = p.parse_known_args(["--no-widen", *STUDIES[plan.study].split(), *argv])
    return plan, given

def make_plan(argv):
    """The flags, checked, and what follows from them: flags and settings of the runs, and their folder."""
    plan, given = parse_flags(argv)
    for word in given:
        flag = word.split("=")[0]
        if flag in ("--lr", "--seed", "--out", "--resume", "--prepare"):
            die(f"{flag} is set by the sweep; see --lrs, --seeds and --name in --help")
    varied = [text.split("=")[0] for text in plan.vary]
    words = " ".join([plan.preset, plan.study or "", *varied, *given])
    name = plan.name or re.sub(r"[^\w.+]+", "-", words)[:150].strip("-")
    plan.dir = Path("runs") / name
    plan.flags = ["--preset", plan.preset, *given]
    plan.settings = parse_vary(plan.vary)
    plan.lrs = plan.lrs or GRIDS.get(plan.preset, [])
    plan.max_runs = plan.max_runs or plan.seeds * len(plan.settings) * max(16, len(plan.lrs))
    if not all(0 < number < 1e6 for number in (*plan.lrs, plan.seeds, plan.jobs or 1, plan.max_runs)):
        die("--lrs, --seeds, --jobs and --max-runs must be above 0 and below a million")
    plan.running, plan.stopped = {}, False      # {slot: process}; has a signal come?
    return plan

def main(argv):
    try:
        plan = make_plan(argv)
        if plan.report:
            say(report(plan.report, plan.mix_code))
            return 0
        handle_stops(plan)
        try:
            return run_sweep(plan)
        finally:
            if plan.stopped:    # the runs are told; they save what they have
                for process in plan.running.values():
                    process.join()
                say("stopped; every run keeps what it has. The same command goes on")
    except DataError as error:  # another sweep owns the folder
        die(error)
    except OSError as error:    # a full disk, a folder that is read-only or not there
        die(f"{error.filename or 'output'}: {error.strerror}")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
