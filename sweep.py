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

Settings are compared at their best rates in the same way. python tests/simulate.py shows how often that is
right, on sweeps whose optimum is known.
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
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from math import comb, inf, isfinite, log, nan, pi, sqrt, tan
from pathlib import Path

import numpy as np
from tqdm import tqdm

import plot
from data import DataError, catch_stops, cores, lock, say, without_nan, write_aside, write_csv, write_json

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
    """The key in {key: {seed: loss}} that is lowest, over the seeds it shares with the fullest row. It
    survived in all its seeds, and has several where others have. None: no key survived."""
    alive = {key: row for key, row in rows.items() if max(row.values()) < inf}
    fullest = max(alive.values(), key=len, default={})
    leading = [key for key in alive if len(alive[key]) > 1 or len(fullest) == 1]
    return min(leading, key=lambda key: mean(paired(alive[key], fullest) or [inf]), default=None)

def noise(table, best):
    """Sum of squared residuals (nats^2) and degrees of freedom, of all rates that survived in its seeds."""
    rows = [[row.get(seed, inf) for seed in table[best]] for row in table.values()]
    x = np.array([row for row in rows if max(row) < inf])      # (rates, seeds)
    residuals = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    n_rates, n_seeds = x.shape
    return np.array([np.sum(residuals ** 2), (n_rates - 1) * (n_seeds - 1)])

def compare(rows, best, pooled=(0, 0), k=0):
    """{key: how its row {seed: loss} stands beside the best's}, k of them at once. worse: shown to be, by two
    pairs of runs, or by two that diverged; seems: shown to be, or as far as a single run can tell. Without
    pooled squares and df the noise is that of rows; without k all count that have several pairs."""
    if best is None:
        return {}
    squares, df = pooled
    if not df:
        squares, df = noise(rows, best)
    pairs = {key: paired(row, rows[best]) for key, row in rows.items()}
    several = [key for key in rows if key != best and len(pairs[key]) > 1]
    k = k or len(several) or 1
    found = {}
    for key, row in rows.items():
        d = pairs[key]
        half = inf      # half the interval of the mean of d; all k hold together with 95%
        if d and df:
            spread = sqrt(2 * squares / df)
            if len(d) > 1:
                spread = max(spread, np.std(d, ddof=1))
            half = float(t_quantile(1 - 0.025 / k, df) * spread / sqrt(len(d)))
        diverged = list(row.values()).count(inf)
        seems = not d or mean(d) > half or diverged > 1
        worse = seems and max(len(d), diverged) > 1
        seems = worse or (seems and len(row) == 1)
        verdicts = {"best": key == best, "diverged": diverged, "one seed": len(d) < 2, "worse": worse,
                    "same": abs(mean(d)) + half < MARGIN, "cannot tell": True}
        verdict = next(name for name, holds in verdicts.items() if holds)
        if verdict in ("best", "one seed"):
            half = nan
        found[key] = dict(worse_by=mean(d), half_width=half, seems=seems, worse=worse, verdict=verdict)
    return found

def compare_settings(tables):
    """{label: table} -> the label with the lowest loss at its best rate, and {label: how each setting that
    has a seed in common stands beside it, at its own best rate}. None, {}: no run survived."""
    rows = {label: table[lowest(table)] for label, table in tables.items() if lowest(table)}
    winner = lowest(rows)
    rows = {label: row for label, row in rows.items() if paired(row, rows[winner])}
    if not rows:
        return None, {}
    pooled = sum(noise(tables[label], lowest(tables[label])) for label in rows)
    return winner, compare(rows, winner, pooled, comb(len(rows), 2))    # the winner came out of all pairs

def nearest(rates, best):
    """The nearest of the rates below and above the best; 0 and inf where there is none."""
    below = max((lr for lr in rates if lr < best), default=0)
    return below, min((lr for lr in rates if lr > best), default=inf)

# What to run next: from a setting's table to lists of (rate, seed), of which the new ones are run --

def stages(table, plan):
    """The search in one setting. Each stage yields the runs it needs; the first that lacks one goes on."""
    best = lowest(table)
    seem_worse = [lr for lr, found in compare(table, best).items() if found["seems"]]
    low, high = nearest(seem_worse, best)
    # Outward, until rates on both sides of the best seem worse, in several seeds at the ends of the grid, and
    # one above it diverged or is a nat worse. Where all diverged, down.
    runs = [(lr, 0) for lr in plan.lrs]
    if table and plan.widen:
        first, last = min(table), max(table)
        if best in (None, first) or (low == 0 and len(table[first]) > 1):
            runs.append((float(f"{first / 3:.0e}"), 0))
        above = [row for lr, row in table.items() if best and lr > best]
        edge = any(inf in row.values() for row in above)
        edge = edge or any(mean(paired(row, table[best])) > 1 for row in above)
        if best and (not edge or (high == inf and len(table[last]) > 1)):
            runs.append((float(f"{last * 3.3:.0e}"), 0))
    yield runs
    if not best:
        return
    # Between: midpoints, until the neighbours of the best rate are within a factor of 2, or of 1.4 where
    # settings are compared: of its root where the seeds could tell what that gains, as a parabola through
    # the three lies below the best by up to an eighth of what the two are worse. --refine halves these.
    around = [lr for lr in nearest(table, best) if lr in table]
    if plan.widen or plan.refine:
        factor, least = 2.05, MARGIN / 2    # rates have two digits
        if len(plan.settings) > 1:
            factor, least = 1.45, 0
        rises = [mean(paired(table[lr], table[best]) or [inf]) for lr in around]
        gain = sum(rises) / 8
        squares, df = noise(table, best)
        if df and gain > min(max(least, sqrt(squares / df)), 3 * MARGIN):   # more than a run's noise, or much
            factor = sqrt(factor)
        far = [lr for lr in around if abs(log(lr / best)) > log(factor) / 2 ** plan.refine]
        middles = [np.clip(sqrt(best * lr), best / 2, best * 2) for lr in far]
        yield [(float(f"{lr:.2g}"), 0) for lr in middles]
    # Seeds: for the best rate and its neighbours; then for all around it, up to the first that seem worse.
    lrs = [best, *around]
    if len(table[best]) > 1:
        lrs = [lr for lr in table if low <= lr <= high]
    yield [(lr, seed) for lr in lrs for seed in range(plan.seeds)
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
        for runs in stages(tables.get(setting, {}), plan):
            new = dict.fromkeys((setting, *run) for run in runs if (setting, *run) not in results)
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
    return [], "rates on both sides of the best end higher, and one above it diverged or is a nat worse"

# The folders of runs ------------------------------------------------------------------------------

def die(message):
    say(f"sweep.py: {message}", sys.stderr)
    raise SystemExit(2)

def run_name(key):
    setting, lr, seed = key     # optimizer=muon-lr0.003-s0
    words = ",".join(setting).replace("--", "")
    return re.sub(r"[^\w.+=,-]+", "_", f"{words}-lr{lr:g}-s{seed}".lstrip("-"))

def refuse_mixture(run, made, mix_code):
    """Dies if the run's config.json has other args, data or (without mix_code) code than made has."""
    found = []
    for was in [run["config"], *run["config"].get("resumes", [])]:  # each with the code of its day
        for part in ["args", "data"] + ["code"] * (not mix_code):
            now, before = made.get(part, {}), was.get(part, {})
            found += [name for name in sorted(now.keys() - plot.FREE)
                      if before.get(name, now[name]) != now[name]]
    if found:
        advice = " or add --mix-code" * all(name.endswith(".py") for name in found)
        die(f"{run['name']} was made with another {', '.join(found)}; choose another --name{advice}")

def losses_in_folder(plan, keys):
    """{key: loss}, None where it has to be run. Every run there must be what train.py would make now."""
    losses = dict.fromkeys(keys)
    names = {run_name(key): key for key in keys}
    for run in plot.read_runs(plan.dir):
        made = next(iter(plan.settings.values())) | dict(args={})
        if run["name"] in names:
            setting, lr, seed = key = names[run["name"]]
            made["args"] = plan.settings[setting]["args"] | dict(lr=lr, seed=seed)
            losses[key] = run["loss"]
        refuse_mixture(run, made, plan.mix_code)
    return losses

# Processes ----------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
CONTEXT.set_forkserver_preload(["torch", "tqdm"])       # on Linux loaded once: it takes 2.6 CPU-seconds

def train(words, log):
    """Runs train.py with these words in this process, a copy of the server's; its errors go to the log."""
    if sys.platform == "linux":     # PR_SET_PDEATHSIG: when its sweep ends, even killed, it saves and ends
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")

def run_command(plan, key):
    setting, lr, seed = key
    out = plan.dir / run_name(key)
    own = [f"--lr={lr}", f"--seed={seed}", f"--out={out}", "--resume", "--no-plot"]
    return [*plan.command, *setting, *own]

def ask_train(plan):
    """Sets what train.py makes of each setting: its args, data, code and devices; and with them lrs, jobs."""
    for setting in plan.settings:
        process = subprocess.run([*plan.command, *setting, "--prepare"], stdout=subprocess.PIPE)
        if process.returncode < 0:
            die(f"preparing the data was killed by signal {-process.returncode} (out of memory?)")
        if process.returncode:      # it has said why
            raise SystemExit(2)
        made = plan.settings[setting] = json.loads(process.stdout.splitlines()[-1])
    if any(other["data"] != made["data"] for other in plan.settings.values()):
        die("these settings would read different amounts of text; give all of them the same --data-tokens")
    plan.devices = made["devices"]
    jobs = PER_GPU.get(plan.preset, 1) * sum(name.startswith("cuda") for name in plan.devices)
    if plan.preset == "tiny" and plan.devices == ["cpu"]:      # a larger run fills all cores
        jobs = min(8, cores())
    plan.jobs = plan.jobs or jobs or 1      # a Mac has one GPU
    if plan.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // plan.jobs)))
    own = made["args"]["lr"]
    plan.lrs = plan.lrs or [float(f"{own * times:.3g}") for times in (0.1, 0.3, 1, 3, 10)]

def start_run(plan, key, slot):
    dir = plan.dir / run_name(key)
    dir.mkdir(parents=True, exist_ok=True)
    device = plan.devices[slot % len(plan.devices)]
    words = [*run_command(plan, key)[1:], f"--device={device}"]
    process = CONTEXT.Process(target=train, args=(words, dir / "stderr.log"))
    process.start()
    process.dir, process.began = dir, time.monotonic()
    process.steps = plan.settings[key[0]]["args"]["max_steps"]
    return process

def how_it_ended(process):
    log, code = process.dir / "stderr.log", process.exitcode
    if code < 0:
        name = signal.Signals(-code).name
        return f"KILLED by {name}, from outside (out of memory? a time limit?). Its log is {log}"
    if 128 < code < 192:
        return "stopped"
    if code:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-6:])
        return f"FAILED, the others go on. The end of {log}:\n{end}"
    summary = plot.read_json(process.dir / "summary.json") or {}
    loss = summary.get("final_val_loss") or nan     # null: it was not finite
    seconds = time.monotonic() - process.began
    return f"{summary.get('status')}, validation loss {loss:.4g}, {seconds:.0f} s"

def execute(plan, keys):
    """One round, plan.jobs runs at a time: a bar of its steps, in place on a terminal, else every 10 s."""
    columns, every, end = 0, 10, "\n"
    if sys.stdout is not None and sys.stdout.isatty():
        columns, every, end = os.get_terminal_size().columns - 1, 1, "\r"
    total = sum(plan.settings[setting]["args"]["max_steps"] for setting, _, _ in keys)
    waiting, running, done = list(keys), plan.running, 0
    began = shown = time.monotonic()
    while waiting or running:
        for slot in range(plan.jobs):
            if slot in running and running[slot].exitcode is not None:
                process = running.pop(slot)
                done += process.steps
                say(f"{process.dir.name}: {how_it_ended(process)}".ljust(columns))
            if slot not in running and waiting:
                running[slot] = start_run(plan, waiting.pop(0), slot)
        if time.monotonic() - shown > every:
            shown = time.monotonic()
            steps, losses = done, []
            for process in running.values():
                run = plot.read_run(process.dir)
                if run and run["train"]["step"].size:
                    steps += int(run["train"]["step"][-1])
                    losses.append(f"{run['name']} {run['train']['train_loss'][-1]:.3f}")
            say(tqdm.format_meter(steps, total, shown - began, unit=" steps", ascii=True,
                                  ncols=columns or None, postfix=", ".join(losses)), end=end)
        time.sleep(0.05)

def run_sweep(plan):
    """Round after round; a restart replays them, and finished runs answer at once. Then the report. With
    --dry-run only the commands of the next round are printed, and no run is started."""
    results, ended = {}, None
    if not plan.dry_run:
        say("checking the flags and preparing the data ...")
    ask_train(plan)
    if not plan.dry_run:
        owner = lock(plan.dir)      # until the end
        say(f"runs go to {plan.dir}, {plan.jobs} at a time")
    while not ended:
        new, ended = next_runs(results, plan)
        missing = [key for key, loss in losses_in_folder(plan, new).items() if loss is None]
        if plan.dry_run and missing:
            for key in missing:
                line = f"cd {shlex.quote(os.getcwd())} && {shlex.join(run_command(plan, key))}"
                if "\n" in line:    # what follows it would be run as a command of its own
                    die(f"{line!r:.200}: a command with a line break is refused")
                say(line)
            return 0
        execute(plan, missing)
        results |= losses_in_folder(plan, new)
    if not plan.dry_run:
        report(plan.dir, plan.mix_code, [f"The search ended because {ended}."])
    return int(None in results.values())

# Analysis: insights.json --------------------------------------------------------------------------

COLUMNS = ("setting", "lr", "seed", "status", "steps", "final_val_loss", "final_val_accuracy",
           "final_val_perplexity", "final_val_bpb", "final_train_loss", "best_val_loss", "best_val_step",
           "max_grad_norm")     # no times: repeatable
MEANS = (*COLUMNS[5:9], "max_grad_norm", "steps_to_loss")

def analyse(runs, notes=()):
    """All that the runs show. Sets each run's setting, those of its args in which the runs differ, and its
    steps to the training loss that the worst surviving run ends with."""
    varied = [flag for flag in runs[0]["args"] if flag not in (*plot.FREE, "lr", "seed")
              and len({str(run["args"].get(flag)) for run in runs}) > 1]
    over = [run for run in runs if run["loss"] is not None]
    ends = [run["train"]["train_loss"][-1] for run in over if run["loss"] < inf]
    target = max(ends, default=-inf)
    for run in runs:
        words = [f"{flag.replace('_', '-')}={run['args'].get(flag)}" for flag in varied]
        if words:       # else it may be known from curves.csv
            run["setting"] = " ".join(words)
        reached = run["train"]["step"][run["train"]["train_loss"] <= target]
        run["summary"]["steps_to_loss"] = min(reached, default=None)
    losses = {(run["setting"], run["lr"], run["seed"]): run["loss"] for run in over}
    tables = tables_of(losses)
    settings = [analyse_setting(label, table, over) for label, table in tables.items()]
    winner, comparisons = compare_settings(tables)
    if runs[0]["args"].get("full_batch"):
        winner, comparisons = None, {}
    use = None
    for s in settings:
        if s["label"] == winner:
            use = s | dict(setting=winner, lr=s["best_lr"])
    minutes = sum(run["summary"].get("seconds") or 0 for run in over) / 60      # none in curves.csv
    insights = dict(use=use, notes=notes, runs=len(over), minutes=minutes,
                    target_loss=target, comparisons=comparisons, settings=settings)
    return without_nan(insights)

def analyse_setting(label, table, runs):
    """One setting: what is known of its best rate; its edge, the lowest rates above that were unstable and
    that diverged; and for each rate its runs, the worst of their fates, and means of those that survived."""
    best = lowest(table)
    found = compare(table, best)
    low, high = nearest([lr for lr in found if found[lr]["worse"]], best)
    rates, edge = [], {}
    for lr in sorted(table):
        here = [run for run in runs if (run["setting"], run["lr"]) == (label, lr)]
        alive = [run["summary"] for run in here if run["loss"] < inf]
        row = dict(worse_by=nan, half_width=nan, verdict="diverged") | found.get(lr, {})
        row |= {name.removeprefix("final_"): mean(summary.get(name) for summary in alive) for name in MEANS}
        row |= dict(lr=lr, seeds=[run["seed"] for run in here], diverged=len(here) - len(alive))
        fates = [run["status"] for run in here]
        row["status"] = max(fates, key=plot.STATUSES.index)
        row["runs"] = [[run["seed"], run["loss"], run["status"], run["summary"].get("seconds")]
                       for run in here]
        rates.append(row)
        if best and lr > best and row["status"] in ("unstable", "diverged"):
            edge.setdefault(row["status"], lr)
    losses = table.get(best, {}).values()
    return dict(label=label, best_lr=best, loss=mean(losses), seeds=len(losses), low=low or nan, high=high,
                edge=edge, rates=rates)

# Report -------------------------------------------------------------------------------------------

CURVE = ("setting", "lr", "seed", "step", "train_loss", "val_loss")
SAID = {"worse": "the seeds show it.", "same": f"the same, for all that matters ({MARGIN} nats)."}

def answer(s):
    """Which rate to use, in the setting that is best, and how sure that is."""
    if not s:
        return ("No answer: no run is over, no rate survived, or all fit one batch, whose validation loss "
                "says little.")
    text = ("**Use {best_lr:g} {label}.** Of the learning rates tried it has the lowest validation loss: "
            "{loss:.3f} nats a token, ").format(**s).replace(" .", ".")
    if s["seeds"] == 1:
        return text + "in its only run. One seed cannot tell a better rate from luck: add --seeds 3."
    text += f"the mean of {s['seeds']} seeds."
    sides = dict(below=s["low"], above=s["high"])
    for side, limit in sides.items():
        if not limit:
            text += f" No rate {side} it is shown to be worse, so the optimum may lie far {side}."
    if all(sides.values()):
        text += (" The optimum lies between {low:g} and {high:g}: these two are shown to be worse (paired "
                 "t-tests over the seeds, 95% together").format(**s)
        for row in s["rates"]:
            if row["lr"] in sides.values() and row["diverged"] > 1:
                text += "; {diverged} runs at {lr:g} diverged".format(**row)
        text += ")."
    close = ["{lr:g} ({worse_by:+.3f})".format(**row) for row in s["rates"]
             if row["verdict"] in ("same", "cannot tell")]
    if close:
        text += f" {', '.join(close)} cannot be told from it with {s['seeds']} seeds."
    return text

def write_up(insights):
    """lr_sweep_analysis.md, the answer first. Every number in it comes out of insights."""
    text = ["# Which learning rate?", answer(insights["use"])]
    text.append("Runs: {runs}, with {minutes:.1f} minutes of training in all.".format(**insights))
    if not insights["minutes"]:     # it is not in curves.csv
        text[-1] = "Runs: {runs}.".format(**insights)
    text += insights["notes"]
    for label, c in insights["comparisons"].items():
        if c["verdict"] != "best":
            size = "{worse_by:.4f}".format(**c)
            if c["half_width"] is not None:
                size += " ± {half_width:.4f}".format(**c)
            text.append(f"{label} at its best rate is {size} nats worse than {insights['use']['setting']}: "
                        + SAID.get(c["verdict"], "the seeds do not show which is better."))
    for s in insights["settings"]:
        text.append(f"## The learning rates {s['label']}".strip())
        best, last = s["best_lr"], s["rates"][-1]
        for fate, lr in s["edge"].items():
            times = lr / best
            text.append(f"The first {fate} rate above the best is {lr:g}, {times:.3g} times the best.")
        if "diverged" in s["edge"]:
            text.append("A folk rule says that runs begin to diverge at 2 to 4 times the best rate.")
        elif best == last["lr"]:
            text.append("No rate above the best was tried.")
        elif best:
            text.append("No rate above the best diverged, up to {lr:g}.".format(**last))
            if last["worse_by"] is not None:        # they have a seed in common
                text[-1] = text[-1][:-1] + ", {worse_by:.2f} nats worse.".format(**last)
        lines = ["| " + " | ".join(cells[1:]) + " |" for cells in plot.table([s])]
        lines.insert(1, "| --- " * 8 + "|")
        text.append("\n".join(lines))
        losses = [row["val_loss"] for row in s["rates"] if not row["diverged"]]
        if len(losses) > 1:
            text.append("The rates that survived in all their seeds end at "
                        f"{mean(losses):.3f} nats on average (deviation {np.std(losses, ddof=1):.3f}), "
                        f"from {min(losses):.3f} to {max(losses):.3f}.")
    return "\n\n".join(text) + "\n"

def curve(run):
    """A run's rows in curves.csv: at most 100 means of training losses, and every validation loss."""
    blocks = min(100, len(run["train"]["step"]))
    steps = np.array_split(run["train"]["step"], blocks)
    losses = np.array_split(run["train"]["train_loss"], blocks)
    for step, loss in zip(steps, losses):
        yield run | dict(step=int(step[-1]), train_loss=f"{loss.mean():.4g}")
    for step, loss in zip(run["metrics"]["step"], run["metrics"]["val_loss"]):
        if isfinite(loss):
            yield run | dict(step=int(step), val_loss=f"{loss:.4g}")

def report(dir, mix_code, notes):
    """Reads the runs under dir, writes tables, analysis and pictures there, and says the answer."""
    runs = plot.read_runs(dir)
    if not runs:
        die(f"{dir} holds no run that made a step")
    for run in runs:
        refuse_mixture(run, runs[0]["config"] | dict(args={}), mix_code)
    over = [run for run in runs if run["loss"] is not None]
    left_out = {path.name for path in dir.iterdir() if path.is_dir()} - {run["name"] for run in over}
    if left_out:
        notes.append(f"Left out, as they are not over or cannot be read: {', '.join(sorted(left_out))}.")
    if mix_code:
        notes.append("Runs of edited code may be among them (--mix-code).")
    insights = analyse(runs, notes)
    text = write_up(insights)
    if runs[0]["config"]:       # else they come from curves.csv, and know less than is written there
        write_csv(dir / "summary_table.csv", COLUMNS, [run["summary"] | run for run in runs])
        write_csv(dir / "curves.csv", CURVE, [row for run in over for row in curve(run)])
    if runs[0]["config"] or not (dir / "insights.json").exists():
        write_aside(dir / "lr_sweep_analysis.md", text.encode())
        write_json(dir / "insights.json", insights)
    for run in over:
        if not (run["dir"] / "loss_curves.png").exists():
            plot.draw_run(run["dir"])
    if insights["settings"]:    # else no run is over
        plot.draw_sweep(dir, runs, insights)
    summary, *_ = text.replace("**", "").split("## ")
    say(f"\n{summary.rstrip()}\n\nTable, analysis and pictures: {dir}")

# Command line -------------------------------------------------------------------------------------

def parse_vary(text):
    """"b,c=3:on,4:off" -> train.py's flags for each value: [["--b=3", "--c"], ["--b=4", "--no-c"]]"""
    names, _, values = text.partition("=")
    flags = names.replace("_", "-").split(",")
    if {"lr", "seed", "out", "preset", "data", "data-tokens", "vocab-size"}.intersection(flags):
        die(f"--vary {text}: rates have --lrs, seeds --seeds; losses compare within one tokenizer only")
    axis = []
    for value in values.split(","):
        parts = value.split(":", len(flags) - 1)
        if len(parts) != len(flags) or "" in flags + parts:
            die(f"--vary {text}: write FLAG=V1,V2 or FLAG1,FLAG2=A:B,C:D")
        words = [f"--{flag}={part}".removesuffix("=on") for flag, part in zip(flags, parts)]
        axis.append([re.sub("^--(.*)=off$", r"--no-\1", word) for word in words])
    return axis

def make_plan(argv):
    """The flags, checked, and what follows from them: command and settings of the runs, and their folder."""
    p = argparse.ArgumentParser("sweep.py", allow_abbrev=False,
                                description="All other flags are sent on to train.py: see train.py --help.")
    p.error = lambda message: die(f"{message}; see --help")
    add = p.add_argument_group("what to train").add_argument
    add("--preset", default="tiny", help="tiny (the default), dense, dense-low, moe, or your own in model.py")
    add("--vary", action="append", default=[], metavar="FLAG=V1,V2", help="compare values of a train.py flag "
        "(on,off for a switch), each at its own best learning rate; A,B=1:2,3:4 for pairs")
    add = p.add_argument_group("what to try").add_argument
    add("--study", choices=STUDIES, help="a named experiment, which sets --lrs, --no-widen and more")
    add("--lrs", nargs="+", type=float, metavar="LR",
        help="learning rates to start from (default for tiny: {tiny}; for moe: {moe})".format(**GRIDS))
    add("--seeds", type=int, default=3,
        help="runs of a rate at or near the best (default: 3); others get one")
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
    plan, given = p.parse_known_args(argv)
    if plan.study:
        plan, given = p.parse_known_args(["--no-widen", *STUDIES[plan.study].split(), *argv])
    ours = {"--lr", "--seed", "--out", "--resume", "--prepare"} & {word.split("=")[0] for word in given}
    if ours:
        die(f"{', '.join(ours)}: set by the sweep; see --lrs, --seeds and --name in --help")
    varied = [text.split("=")[0] for text in plan.vary]
    words = " ".join([plan.preset, plan.study or "", *varied, *given])
    name = re.sub(r"[^\w.+]+", "-", words)
    plan.dir = Path("runs", plan.name or name[:150].strip("-"))
    plan.command = [sys.executable, str(TRAIN), "--preset", plan.preset, *given]
    combinations = itertools.product(*map(parse_vary, plan.vary))
    plan.settings = {tuple(sum(words, [])): {} for words in combinations}   # and what train.py makes of each
    plan.running = {}       # {slot: process}
    plan.lrs = plan.lrs or GRIDS.get(plan.preset, [])
    if not plan.max_runs:
        plan.max_runs = plan.seeds * len(plan.settings) * max(16, len(plan.lrs))
    numbers = [*plan.lrs, plan.seeds, plan.jobs or 1, plan.max_runs]
    if not all(0 < number < 1e6 for number in numbers):
        die("--lrs, --seeds, --jobs and --max-runs must be above 0 and below a million")
    return plan

def main(argv):
    plan = make_plan(argv)
    stopped = []
    def on_signal(number, frame):
        """Stops are passed on to the runs: train.py saves at the first, and ends at once 2 s after it."""
        for process in plan.running.values():
            with suppress(ProcessLookupError):      # it has just ended
                if os.name == "posix":      # on Windows the console has told them
                    os.kill(process.pid, number)
        stopped.append(number)
        if len(stopped) == 1:
            raise SystemExit(128 + number)
    try:
        if plan.report:
            report(plan.report, plan.mix_code, [])
            return 0
        catch_stops(on_signal)
        return run_sweep(plan)
    except (DataError, OSError) as error:   # a folder that another sweep owns, or is not there; a full disk
        die(error)
    finally:
        if stopped:
            for process in plan.running.values():
                process.join()
                lock(process.dir, wait=True).close()    # join sees no more than the end of the server
            say("stopped; every run keeps what it has. The same command goes on")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
