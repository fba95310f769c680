"""Read the folders of runs, name what their loss curves did, and draw them.

A run is a folder that train.py writes, a sweep a folder of runs; both are drawn from whatever has arrived. What
became of a run is read from its own training losses and from nothing else:

    diverged    not finite at the end, or it rose far above its lowest and stays up
    unstable    it jumped and came back: the edge of stability
    slow        it still falls steadily at the end, or it hardly learned
    converged   none of these: it fell and flattened

Noise is no jump. Second differences of a smooth curve plus noise of deviation sigma have the variance 6 sigma^2,
and their median does not see a few jumps: sigma = median |loss[i+1] - 2 loss[i] + loss[i-1]| / (0.6745 sqrt 6).

Against the step, colour tells the learning rate; against the learning rate, colour and marker tell the setting.

    python plot.py runs/tiny/lr0.003-s0   a run: loss_curves.png, lr_schedule.png, router.png for experts
    python plot.py runs/tiny              a sweep: starts python sweep.py --report, which draws and analyses
"""
import argparse
import csv
import io
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

from data import say, write_aside

# A run's fate: all thresholds, in nats unless they say otherwise ----------------------------------

FAR = 1.0           # a rise that matters: 2.7 times the perplexity
JUMP = 0.1          # a smaller rise is no jump, ...
JUMP_SIGMAS = 8     # ... nor one within the noise of the smoothed curve, whose own range is about 6
ANY_JUMP = 2.0      # this much, and half of what was learned, is a jump: of 5 points the noise is not known
LEARNED = 0.2       # share of the first loss; knowing how frequent tokens are, and no more, takes off as much
LN_VOCABULARY = 11  # the loss of a guess among 60,000 tokens: to fall from above that is not to learn
STEADY = 0.25       # share of the descent in the last third of the steps; 0.4 for a straight line
STATUSES = ("converged", "slow", "unstable", "diverged")

def classify(losses):
    """The status of a curve of training losses (nats a token, in the order they were logged)."""
    losses = np.nan_to_num(np.asarray(losses, float), nan=np.inf, posinf=np.inf)
    n = len(losses)
    if n and losses[-1] == np.inf:
        return "diverged"
    if n < 3:
        return "slow"

    # The curve smoothed by medians, at least 25 side by side; its lowest level so far; its noise.
    width = 2 * (n // 50) + 1
    level = np.median(np.lib.stride_tricks.sliding_window_view(losses, width), axis=1)
    lowest = np.minimum.accumulate(np.minimum(level, losses[0] + FAR))
    with np.errstate(invalid="ignore"):     # inf - inf, where a loss was not finite
        sigma = np.nanmedian(np.abs(np.diff(losses, 2))) / 0.6745 / 6 ** 0.5

    # Did it jump, where did it end, what did it learn? The end is the lowest of the last tenth.
    rise = (level - lowest).max()
    surely = max(ANY_JUMP, (losses[0] - lowest[-1]) / 2)
    jumped = rise > max(JUMP, min(JUMP_SIGMAS * sigma / width ** 0.5, surely))
    end = level[-max(2, n // 10):].min()
    hardly_learned = end > (1 - LEARNED) * min(losses[0], LN_VOCABULARY)
    stays_up = end - lowest[-1] > max(FAR, rise / 3) or (hardly_learned and rise > FAR)
    if (jumped and stays_up) or end > losses[0] + FAR:
        return "diverged"
    if jumped:
        return "unstable"
    _, middle, late = [np.median(third) for third in np.array_split(losses, 3)]
    if hardly_learned or middle - late > STEADY * (losses[0] - late):
        return "slow"
    return "converged"

def is_lost(losses, n_expected):
    """May a run of n_expected log steps stop here? Only where it cannot come back: the last three losses are
    not finite, or those of half the run lie over a nat above the first. classify then says diverged."""
    losses = np.nan_to_num(np.asarray(losses, float), nan=np.inf, posinf=np.inf)
    half = max(3, math.ceil(n_expected / 2))
    gone = len(losses) >= 3 and np.isinf(losses[-3:]).all()
    return bool(gone or (len(losses) > half and losses[-half:].min() > losses[0] + FAR))

# Reading: what cannot be read is named and left out, and never stops anything ---------------------

def left_out(what, error):
    say(f"left out: {what} ({type(error).__name__}: {error})", sys.stderr)

def read_json(path):
    """The object in a JSON file as a dict, or None where there is none that can be read."""
    try:
        return dict(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:   # a TypeError: a list, a number
        left_out(path, error)

def read_table(path):
    """The rows of a CSV file as dicts, padded or cut to its header. A line without its end is half written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return list(csv.DictReader(lines[:-1]))
    except (OSError, csv.Error) as error:
        if path.exists():
            left_out(path, error)
        return []

def to_numbers(rows, path):
    """{column: array}, nan where a cell is empty; a row with anything else in it is left out."""
    kept = []
    for row in rows:
        row.pop(None, None)     # what a row has beyond the header
        try:
            kept.append({name: float(cell or "nan") for name, cell in row.items()})
        except ValueError as error:
            left_out(f"a row of {path}", error)
    names = {"step", "lr", "train_loss", "val_loss", *(kept[0] if kept else ())}
    return {name: np.array([row.get(name, np.nan) for row in kept]) for name in names}

def make_run(dir, args, metrics, steps, summary, **more):
    """A run as all functions here know it; steps: which rows are of steps, not of evaluations."""
    try:
        lr, seed = float(args["lr"]), int(args["seed"])
        if not 0 < lr < np.inf:     # no place on a log axis
            raise ValueError(f"a learning rate of {lr}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return left_out(dir, error)
    train = {name: column[steps] for name, column in metrics.items()}
    status = str(summary.get("status", "running"))
    if status in STATUSES:      # the run is over
        status = classify(train["train_loss"])
    run = dict(dir=dir, name=dir.name, config={}, args=args, lr=lr, seed=seed, metrics=metrics, train=train)
    return run | dict(summary=summary, status=status, setting="") | more

def read_run(dir):
    """The run in a folder, or None where there is no config.json that can be read."""
    dir = Path(dir)
    config = read_json(dir / "config.json")
    if config is None:
        return None
    metrics = to_numbers(read_table(dir / "metrics.csv"), dir / "metrics.csv")
    if "stability_threshold" in metrics:    # Adam's is that of the preconditioned sharpness
        sharpness = metrics.get("preconditioned_sharpness", metrics["sharpness"])
        metrics["sharpness_ratio"] = sharpness / metrics["stability_threshold"]
    summary = read_json(dir / "summary.json") or {}
    return make_run(dir, config.get("args"), metrics, np.isfinite(metrics["lr"]), summary, config=config)

def read_curves(path):
    """The runs of a curves.csv, which has a row a logged step and a row an evaluation."""
    found = {}
    for row in read_table(path):
        found.setdefault(tuple(row.pop(name, "") for name in ("setting", "lr", "seed")), []).append(row)
    for (setting, lr, seed), rows in found.items():
        metrics = to_numbers(rows, path)
        evaluated = np.isfinite(metrics["val_loss"])
        last = np.append(np.nan, metrics["val_loss"][evaluated])[-1]
        summary = dict(status=STATUSES[0], final_val_loss=last)
        yield make_run(path.parent, dict(lr=lr, seed=seed), metrics, ~evaluated, summary, setting=setting,
                       name=f"{setting} lr{lr}-s{seed}".strip())

def read_runs(dir):
    """All runs under dir, or in its curves.csv where there are none, ordered by learning rate and seed."""
    found = [read_run(path) for path in Path(dir).iterdir() if path.is_dir()]
    runs = list(filter(None, found)) or list(filter(None, read_curves(Path(dir) / "curves.csv")))
    return sorted(runs, key=lambda run: (run["lr"], run["seed"], run["name"]))

# Drawing: helpers ---------------------------------------------------------------------------------

RUN_COLUMNS = ("train_loss", "val_loss", "grad_norm")   # of metrics.csv in loss_curves.png: add your own
RATE_COLUMNS = ("val_loss", "val_accuracy", "val_perplexity", "max_grad_norm", "steps_to_loss", "status")
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
EDGE = {"unstable": "#E69F00", "diverged": "#D55E00"}   # of Okabe and Ito (2008), too
LABELS = {"train_loss": "training loss (nats a token)", "val_loss": "validation loss (nats a token)",
          "lr": "learning rate of the step", "grad_norm": "gradient norm before clipping",
          "max_grad_norm": "largest gradient norm", "val_accuracy": "accuracy (share of tokens)",
          "val_perplexity": "perplexity", "status": "worst status of its seeds",
          "sharpness_ratio": "sharpness / its threshold of stability"}
LOG = ("lr", "grad_norm", "max_grad_norm", "sharpness", "sharpness_ratio")

def panels(columns, title, across=3, height=3.4, beside=0.1):
    """A figure 10 inches wide and its axes, one a column; beside: inches for a legend at the right."""
    try:
        from matplotlib.figure import Figure    # without pyplot, and only where something is drawn
    except ValueError:      # MPLBACKEND, as Jupyter sets it, names a backend that is not installed here
        del os.environ["MPLBACKEND"]
        from matplotlib.figure import Figure
    across = min(across, len(columns))
    rows = math.ceil(len(columns) / across)
    tall = 0.5 + height * rows
    fig = Figure(figsize=(10, tall), dpi=120)
    fig.suptitle(title, x=0.02, y=1 - 0.12 / tall, ha="left", va="top", fontsize=13, weight="bold")
    axes = list(fig.subplots(rows, across, squeeze=False).flat)
    fig.subplots_adjust(0.08, 0.55 / tall, 1 - beside / 10, 1 - 0.7 / tall, 0.3, 0.4)
    for ax in axes[len(columns):]:
        ax.remove()
    for ax, column in zip(axes, columns):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set(xlabel="step", ylabel=LABELS.get(column, column.replace("_", " ")))
        if column in LOG:   # plain numbers
            ax.set_yscale("log", subs=[2, 5])
            ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    return fig, axes

def save(pictures, dir):
    """{name: figure} -> the paths written. One that cannot be written is named; none is half written."""
    paths = []
    for name, fig in pictures.items():
        for text in fig.findobj(lambda artist: hasattr(artist, "set_parse_math")):
            text.set_parse_math(False)      # a setting's name may hold a $
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # ... or an emoji, of which the font has no picture
            fig.savefig(content, format="png")
        try:
            write_aside(Path(dir) / name, content.getvalue())
            paths.append(Path(dir) / name)
        except OSError as error:
            say(f"not drawn: {error}", sys.stderr)
    return paths

def points(run, column):
    """At most 50 blocks of a column: step, median, and where the middle 80% begins and ends. (4, blocks)"""
    steps = run["metrics"]["step"]
    rows = np.stack([steps, run["metrics"].get(column, np.nan * steps)])
    rows = rows[:, np.isfinite(rows).all(axis=0)]
    block = max(1, math.ceil(rows.shape[1] / 50))
    steps, values = rows[:, rows.shape[1] % block:].reshape(2, -1, block)
    return np.array([steps.mean(axis=1), *np.quantile(values, (0.5, 0.1, 0.9), axis=1)])

def draw_curves(runs, columns, title):
    """A panel a setting and column, against the step; an x where a diverged run ended, or left the axis."""
    from matplotlib import colormaps
    settings = sorted({run["setting"] for run in runs})
    rates = sorted({run["lr"] for run in runs})
    places = [(setting, column) for setting in settings for column in columns]
    across = 2 if len(columns) == 2 else 3
    fig, axes = panels([column for _, column in places], title, across, 4.2, 1.3 if len(rates) > 1 else 0.1)
    for ax, (setting, column) in zip(axes, places):
        ax.set_title(setting, fontsize=9)
        mine = [run for run in runs if run["setting"] == setting]
        alive = [points(run, column)[1] for run in mine if run["status"] != "diverged"]
        alive = [values for values in alive if len(values)]
        if column.endswith("loss") and alive:   # the axis from the lowest loss to where the runs began
            low, high = min(map(min, alive)), max(values[0] for values in alive)
            ax.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
        if column == "sharpness_ratio":
            ax.axhline(1, color="black", linewidth=1)
        for run in mine:
            steps, values, low, high = points(run, column)
            style = dict(color=colormaps["viridis"](0.9 * rates.index(run["lr"]) / max(1, len(rates) - 1)))
            ended = run["status"] == "diverged"
            ax.plot(steps, values, "--" if ended else "-", linewidth=1.3, label=f"{run['lr']:g}", **style)
            if column.startswith("sharpness"):
                ax.fill_between(steps, low, high, alpha=0.2, **style)
            if ended and len(steps):
                ax.plot(steps[-1], np.clip(values[-1], *ax.get_ylim()), "x", clip_on=False, **style)
    legend = {label: line for line, label in zip(*axes[0].get_legend_handles_labels())}
    if len(rates) > 1:
        fig.legend(legend.values(), legend, title="learning rate\n(dashed, x:\ndiverged)", loc="upper right",
                   fontsize=8, title_fontsize=8, frameon=False, bbox_to_anchor=(1, axes[0].get_position().y1))
    return fig

# The pictures of a run ----------------------------------------------------------------------------

def draw_run(dir):
    """In its folder: loss_curves.png and lr_schedule.png, and what else the run has measured. -> paths"""
    run = read_run(dir)
    if run is None or not len(run["train"]["step"]):
        return []
    title = f"{run['name']}: learning rate {run['lr']:g}, {run['status']}"
    pictures = {"lr_schedule.png": draw_curves([run], ["lr"], title)}
    for name, columns in {"loss_curves.png": RUN_COLUMNS, "sharpness.png": ("sharpness_ratio", "sharpness")}.items():
        known = [column for column in columns if points(run, column).size]
        if known:
            pictures[name] = draw_curves([run], known, title)
    experts = [name for name in run["train"] if name.startswith("share_L")]   # share_L0_E0, share_L0_E1 ...
    if experts:
        share = [points(run, name)[1] for name in experts]   # (layers * experts, blocks)
        fig, [ax] = panels(["expert, layer after layer"], title, height=1.5 + 0.16 * len(share))
        box = (0, run["train"]["step"][-1], len(share), 0)
        fig.colorbar(ax.imshow(share, vmin=0, aspect="auto", extent=box), label="share of its layer's tokens")
        pictures["router.png"] = fig
    if run["args"].get("schedule") == "exponential":
        pictures["lr_range_test.png"] = draw_range_test(run)
    return save(pictures, dir)

def smooth(values, width):
    """Means of width values in a row, of fewer at both ends."""
    return np.convolve(values, np.ones(width), "same") / np.convolve(np.ones(len(values)), np.ones(width), "same")

def range_test_readings(lrs, losses):
    """What people read off a learning-rate range test (Smith 2017; fastai), from its smoothed curve."""
    losses = smooth(losses, 2 * (len(losses) // 40) + 1)
    lowest = int(np.argmin(losses))
    slope = np.gradient(losses[:lowest + 1], np.log(lrs[:lowest + 1])) if lowest else [0]
    risen = np.flatnonzero(losses[lowest:] > losses[lowest] + 0.05 * (losses[0] - losses[lowest]))
    last = lowest + risen[0] - 1 if len(risen) else len(losses) - 1
    return {"steepest": float(lrs[np.argmin(slope)]), "minimum / 10": float(lrs[lowest] / 10),
            "before it rises": float(lrs[last])}

def draw_range_test(run):
    known = np.isfinite(run["train"]["train_loss"])
    lrs, losses = run["train"]["lr"][known], run["train"]["train_loss"][known]
    fig, [ax] = panels(["train_loss"], "Learning-rate range test: a first look; a sweep is the answer", height=4.8)
    ax.plot(lrs, losses, ".", color="#999999")
    ax.plot(lrs, smooth(losses, 2 * (len(losses) // 40) + 1), color=OKABE_ITO[0])
    span = losses[0] - losses.min() + 0.1
    ax.set(xscale="log", xlabel="learning rate of the step", ylim=(losses.min() - 0.1 * span, losses[0] + 0.2 * span))
    for (name, lr), colour in zip(range_test_readings(lrs, losses).items(), OKABE_ITO[1:]):
        mark(ax, lr, f"{name}: {lr:.2g}", colour)
    return fig

# The pictures of a sweep --------------------------------------------------------------------------

def draw_sweep(dir, runs, insights):
    """All of them, from runs with status and setting as sweep.py leaves them, and its insights. -> paths"""
    title = answer(runs, insights)
    pictures = {"lr_vs_final_loss.png": draw_losses(insights, title),
                "lr_sweep_comparison.png": draw_curves(runs, ["train_loss", "val_loss"], "Loss curves. " + title),
                "detailed_comparison.png": draw_details(insights, "In detail. " + title),
                "summary_table.png": draw_table(insights, title)}
    for name, column, what in (("lr_schedules.png", "lr", "Schedules"),
                               ("sharpness.png", "sharpness_ratio", "Sharpness / threshold"),
                               ("sharpness.png", "sharpness", "Sharpness")):
        if name not in pictures and any(points(run, column).size for run in runs):
            pictures[name] = draw_curves(runs, [column], f"{what}. {title}")
    if any(points(run, "sharpness_ratio").size for run in runs):    # Muon has no threshold
        pictures["edge_of_stability.png"] = draw_edge(runs)
    return save(pictures, dir)

def answer(runs, insights):
    """The answer in a line, the title of every picture."""
    use = insights["use"]
    if not use:
        return "No learning rate to use yet"
    args = next((run["args"] for run in runs if run["setting"] == use["setting"]), {})
    names = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}
    words = [names.get(args.get("optimizer"), ""), str(args.get("preset", "")), use["setting"]]
    if use["seeds"] == 1:
        return f"Lowest at {use['lr']:g}, one seed cannot tell: {', '.join(filter(None, words))}"
    return f"Use {use['lr']:g}: {', '.join(filter(None, words))}, {use['seeds']} seeds"

def mark(ax, lr, text, colour, side="left"):
    """A line at a learning rate with its name beside it."""
    ax.axvline(lr, color=colour, linewidth=1.2, zorder=1)
    ax.annotate(text, (lr, 0.95), (3 if side == "left" else -3, 0), ha=side, va="top", rotation=90, fontsize=9,
                xycoords=ax.get_xaxis_transform(), textcoords="offset points", color=colour,
                bbox=dict(facecolor="white", edgecolor="none", alpha=0.7, pad=1))

def spaced(rates, room):
    """Those of the learning rates that keep a share of the axis between them, for numbers that do not overlap."""
    shown = []
    for lr in sorted(set(rates)):
        if not shown or math.log(lr / shown[-1]) > room * math.log(max(rates) / min(rates)):
            shown.append(lr)
    return shown

def draw_rates(ax, insights, column, highest=np.inf):
    """A column of insights' rows against the rate; on the top edge arrows to what lies higher, an x if diverged."""
    rates = [row["lr"] for s in insights["settings"] for row in s["rates"]]
    edge = ax.get_xaxis_transform()
    above = []
    for s, colour, marker in zip(insights["settings"], OKABE_ITO * 9, "osD^vPXp" * 9):
        rows = [row for row in s["rates"] if row[column] is not None]
        ax.plot([row["lr"] for row in rows], [row[column] for row in rows], marker=marker, color=colour, linewidth=1.2,
                label=s["label"])
        for row in s["rates"]:
            if row["diverged"]:
                ax.plot(row["lr"], 1, "x", color=colour, markersize=9, markeredgewidth=2, clip_on=False, transform=edge)
            elif row[column] is not None and row[column] != row["status"] and row[column] > highest:
                ax.plot(row["lr"], 0.985, "^", color=colour, clip_on=False, transform=edge)
                above.append((row["lr"], row[column]))
    ax.set(xscale="log", xlabel="peak learning rate")
    if rates:
        shown = spaced(rates, 0.07 if highest < np.inf else 0.2)
        ax.set_xticks(shown, [f"{lr:g}" for lr in shown])
        ax.set_xticks(rates, [""] * len(rates), minor=True)
    return above

def draw_losses(insights, title):
    """Final loss against rate: the seeds, their mean, where the optimum lies and the two edges."""
    labels = [s["label"] for s in insights["settings"]]
    beside = 0.1 if len(labels) < 2 else 0.7 + 0.075 * max(map(len, labels))
    fig, [ax] = panels(["val_loss"], title, height=5, beside=beside)
    best = [s["best_loss"] for s in insights["settings"] if s["best_loss"] is not None]
    means = [row["val_loss"] for s in insights["settings"] for row in s["rates"] if row["val_loss"] is not None]
    if best:
        span = min(max(np.ptp(means), 0.05), 1)
        ax.set_ylim(min(best) - 0.12 * span, min(best) + 1.08 * span)
    above = draw_rates(ax, insights, "val_loss", ax.get_ylim()[1])
    for lr in spaced([lr for lr, _ in above], 0.05):
        ax.annotate(f"{dict(above)[lr]:.2f}", (lr, 1), (0, 3), ha="center", fontsize=8, textcoords="offset points",
                    xycoords=ax.get_xaxis_transform())
    for s, colour in zip(insights["settings"], OKABE_ITO * 9):
        for row in s["rates"]:
            for _, loss, status in row["runs"]:
                if loss is not None:
                    ax.plot(row["lr"], loss, ".", color=colour, alpha=0.6, markersize=5,
                            markerfacecolor="white" if status == "unstable" else colour)
        use = insights["use"]
        if use and use["setting"] == s["label"]:
            draw_optimum(ax, use, s, colour)
    ax.set_xlabel("peak learning rate (small: a seed, hollow if unstable; large: their mean; x: diverged)")
    if len(labels) > 1:
        fig.legend(*ax.get_legend_handles_labels(), loc="upper right", frameon=False, fontsize=9,
                   bbox_to_anchor=(1, ax.get_position().y1))
    return fig

def draw_optimum(ax, use, s, colour):
    """For the setting to use: the band that holds its optimum, its best rate and its two edges."""
    left, right = ax.get_xlim()
    low, high = use["low"] or left, use["high"] or right
    if use["low"] or use["high"]:
        ax.axvspan(low, high, alpha=0.12, color=colour, zorder=0)
        ax.annotate(f"the optimum lies here, 95% {s['label']}".strip(), ((low * high) ** 0.5, 0.02), ha="center",
                    xycoords=ax.get_xaxis_transform(), color=colour, fontsize=9)
        ax.set_xlim(left, right)
    mark(ax, use["lr"], f"best: {use['lr']:g}", colour, "right")
    found = {}
    for status, edge in s["edge"].items():
        if edge:
            found.setdefault(edge["lr"], []).append(status)
    for lr, statuses in found.items():
        mark(ax, lr, f"first {' and '.join(statuses)}: {lr:g}", EDGE[statuses[-1]])

def draw_details(insights, title):
    fig, axes = panels(RATE_COLUMNS, title)
    for ax, column in zip(axes, RATE_COLUMNS):
        if column == "status":
            ax.yaxis.update_units(STATUSES)     # an axis of names, in this order
        draw_rates(ax, insights, column)
    axes[4].set_ylabel(f"steps to a loss of {insights['target_loss']:.2f}")
    return fig

def draw_edge(runs):
    """Against the rate: the middle 80% of sharpness over its threshold in the second half of each run."""
    fig, [ax] = panels(["sharpness_ratio"], "The edge of stability: sharpness / threshold, second half of each run",
                       height=4.5)
    settings = sorted({run["setting"] for run in runs})
    for run in runs:
        _, values, _, _ = points(run, "sharpness_ratio")
        if len(values):
            colour = OKABE_ITO[settings.index(run["setting"]) % 8]
            low, middle, high = np.quantile(values[len(values) // 2:], (0.1, 0.5, 0.9))
            ax.plot([run["lr"]] * 2, [low, high], color=colour, linewidth=2)
            ax.plot(run["lr"], middle, "x" if run["status"] == "diverged" else "o", color=colour)
    ax.axhline(1, color="black", linewidth=1)
    ax.set(xscale="log", xlabel="peak learning rate (line: 10 to 90%; x: diverged)")
    return fig

def draw_table(insights, title):
    """The numbers of each rate."""
    cells = [["setting", "learning rate", "seeds", "loss", "worse by", "verdict", "bits a byte", "gradient norm"]]
    for s in insights["settings"]:
        for row in s["rates"]:
            worse = f"{row['worse_by'] or 0:.3f}"
            if row["half_width"]:
                worse += f" ± {row['half_width']:.3f}"
            cells.append([s["label"], f"{row['lr']:g}", str(len(row["seeds"])), row["val_loss"], worse, row["verdict"],
                          row["val_bpb"], row["max_grad_norm"]])
    fig, [ax] = panels([""], title, height=0.28 * len(cells) + 0.3)
    ax.axis("off")
    text = [[f"{x:.4g}" if isinstance(x, float) else x or "" for x in row] for row in cells]
    ax.table(text, bbox=(0, 0, 1, 1))
    return fig

# Command line -------------------------------------------------------------------------------------

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Draw a run, or report on a sweep.")
    parser.add_argument("folder", type=Path, help="of a run or of a sweep, such as runs/tiny")
    folder = parser.parse_args().folder
    for path in draw_run(folder):
        say(path)
    if not (folder / "config.json").exists():
        say(f"no run; python sweep.py --report {folder} draws a sweep")
        program = Path(__file__).with_name("sweep.py")
        sys.exit(subprocess.run([sys.executable, program, "--report", folder]).returncode)
