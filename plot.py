"""Read the folders of runs, name what their loss curves did, and draw them.

A run is a folder that train.py writes, a sweep a folder of runs. What became of a run is read from its own
training losses and from nothing else:

    diverged    not finite at the end, or it rose far above its lowest and stays up
    unstable    it jumped and came back: the edge of stability
    slow        it still falls steadily at the end, or it hardly learned
    converged   none of these: it fell and flattened

    python plot.py runs/tiny/lr0.003-s0   a run: loss_curves.png, lr_schedule.png, router.png for experts
    python plot.py runs/tiny              a sweep: starts python sweep.py --report, which draws and analyses
"""
import csv
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from data import say, write_aside

# A run's fate: all thresholds, in nats unless they say otherwise ----------------------------------

FAR = 1.0           # a rise that matters: 2.7 times the perplexity
JUMP = 0.1          # a rise is a jump above this, and above what the noise of the smoothed curve explains ...
JUMP_SIGMAS = 7     # ... whose own range is about 6
ANY_JUMP = 2.0      # this much, and half of what was learned, is a jump: of 5 points the noise is not known
LEARNED = 0.2       # share of the first loss; knowing how frequent tokens are, and no more, takes off as much
LN_VOCABULARY = 11  # the loss of a guess among 60,000 tokens: to fall from above that is not to learn
STEADY = 0.25       # share of the descent in the last third of the steps; 0.4 for a straight line
HUGE = 1e9          # stands for a loss that is not finite
STATUSES = ("converged", "slow", "unstable", "diverged")
FREE = ("out", "resume", "no_plot", "prepare", "sample", "checkpoint_interval", "device",
        "data_tokens")      # args that make no other run; if data_tokens changes the text, its hash tells

def finite(losses):
    return np.nan_to_num(np.asarray(losses, float), nan=HUGE, posinf=HUGE)

def classify(losses):
    """The status of a curve of training losses (nats a token, in the order they were logged)."""
    losses = finite(losses)
    n = len(losses)
    if HUGE in losses[-1:]:
        return "diverged"
    if n < 3:
        return "slow"
    # Medians of a few losses in a row, at least 25 side by side, and the lowest so far. Second differences of
    # a smooth curve plus noise have the variance 6 sigma^2, and their median does not see a few jumps.
    width = 2 * (n // 50) + 1
    level = np.median(np.lib.stride_tricks.sliding_window_view(losses, width), axis=1)
    lowest = np.minimum.accumulate(np.minimum(level, losses[0] + FAR))
    sigma = np.median(np.abs(np.diff(losses, 2))) / 0.6745 / 6 ** 0.5
    rise = (level - lowest).max()
    end = level[-max(2, n // 10):].min()    # a jump at the very end may still come back
    hardly_learned = end > (1 - LEARNED) * min(losses[0], LN_VOCABULARY)
    if end > losses[0] + FAR:
        return "diverged"
    surely = max(ANY_JUMP, (losses[0] - lowest[-1]) / 2)
    if rise > min(JUMP + JUMP_SIGMAS * sigma / width ** 0.5, surely):
        if end - lowest[-1] > max(FAR, rise / 3) or (hardly_learned and rise > FAR):
            return "diverged"
        return "unstable"
    _, middle, late = [np.median(third) for third in np.array_split(losses, 3)]
    if hardly_learned or middle - late > STEADY * (losses[0] - late):
        return "slow"
    return "converged"

def is_lost(losses, n_expected):
    """May a run of n_expected log steps stop here? Only where it cannot come back: the last three losses are
    not finite, or those of half the run lie over a nat above the first. classify then says diverged."""
    losses = finite(losses)
    half = max(3, math.ceil(n_expected / 2))
    if len(losses) > half and losses[-half:].min() > losses[0] + FAR:
        return True
    return len(losses) > 2 and bool(losses[-3:].min() == HUGE)

# Reading: what cannot be read is named and left out -----------------------------------------------

def read_json(path):
    """The object in a JSON file, or None where there is none that can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        say(f"left out: {path} ({error})", sys.stderr)

def read_table(path):
    """The rows of a CSV file as dicts of numbers, but for the setting; nan where there is nothing."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\0", "?").split("\n")
    rows = []
    for row in csv.DictReader(lines[:-1]):      # what follows the last newline is half written
        setting = row.pop("setting", "")
        try:
            numbers = {name: float(cell or "nan") for name, cell in row.items()}
            rows.append(numbers | dict(setting=setting))
        except (ValueError, TypeError) as error:    # a TypeError: more cells than the header
            say(f"left out: a row of {path} ({error})", sys.stderr)
    return rows

def make_run(dir, args, rows, summary, config):
    """A run from the rows of its metrics.csv; its train: those of steps, not of evaluations."""
    names = ["step", "lr", "train_loss", "val_loss"]
    names += [name for row in rows[:1] for name in row]
    metrics = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    if "stability_threshold" in metrics:    # Adam's is that of the preconditioned sharpness
        sharpness = metrics.get("preconditioned_sharpness", metrics["sharpness"])
        metrics["sharpness_ratio"] = sharpness / metrics["stability_threshold"]
    steps = np.isfinite(metrics["lr"]) & np.isnan(metrics["val_loss"])
    train = {name: column[steps] for name, column in metrics.items()}
    status = str(summary.get("status", "running"))
    loss = None
    if status in STATUSES and len(train["step"]):       # the run is over
        status = classify(train["train_loss"])
        loss = math.inf if status == "diverged" else summary.get("final_val_loss")
    return dict(dir=dir, name=dir.name, setting="", lr=float(args["lr"]), seed=int(args["seed"]), loss=loss,
                config=config, args=args, metrics=metrics, train=train, summary=summary, status=status)

def read_run(dir):
    """The run in a folder, or None where there is no config.json that can be read."""
    dir = Path(dir)
    config = read_json(dir / "config.json")
    if not config:
        return None
    summary = read_json(dir / "summary.json") or {}
    try:
        return make_run(dir, config["args"], read_table(dir / "metrics.csv"), summary, config)
    except (KeyError, TypeError, ValueError) as error:      # it is no run's, or damaged
        say(f"left out: {dir} ({error!r})", sys.stderr)

def read_runs(dir):
    """All runs under dir that made a step, or those in its curves.csv, ordered by learning rate and seed."""
    dir = Path(dir)
    runs = [read_run(path.parent) for path in dir.glob("*/config.json")]
    runs = [run for run in runs if run and len(run["train"]["step"])]
    curves = {}
    if not runs:
        for row in read_table(dir / "curves.csv"):
            curves.setdefault((row["setting"], row["lr"], row["seed"]), []).append(row)
    for (setting, lr, seed), rows in curves.items():
        ends = [None] + [row["val_loss"] for row in rows if row["val_loss"] < np.inf]
        summary = dict(status="converged", final_val_loss=ends[-1])
        run = make_run(dir, dict(lr=lr, seed=seed), rows, summary, {})
        runs.append(run | dict(setting=setting, name=f"{setting} lr{lr:g}-s{seed:g}".strip()))
    return sorted(runs, key=lambda run: (run["lr"], run["seed"], run["name"]))

# Drawing: against the step colour tells the learning rate; against that, colour and marker the setting

RUN = {"loss_curves.png": ("train_loss", "val_loss", "grad_norm"),      # add your own column of metrics.csv
       "lr_schedule.png": ("lr",), "sharpness.png": ("sharpness_ratio", "sharpness")}
SWEEP = {"lr_sweep_comparison.png": ("train_loss", "val_loss"), "lr_schedules.png": ("lr",),
         "sharpness.png": ("sharpness_ratio", "sharpness")}
DETAILS = ("val_loss", "val_accuracy", "val_perplexity", "max_grad_norm", "steps_to_loss", "status")
LABELS = {"train_loss": "training loss (nats a token)", "val_loss": "validation loss (nats a token)",
          "lr": "learning rate", "max_grad_norm": "largest gradient norm", "grad_norm": "gradient norm",
          "val_accuracy": "accuracy (share of tokens)", "val_perplexity": "perplexity", "status": "",
          "sharpness_ratio": "sharpness / its threshold", "steps_to_loss": "steps to the worst rate's loss"}
LOG = ("lr", "grad_norm", "max_grad_norm", "val_perplexity", "sharpness", "sharpness_ratio")
RATE = "peak learning rate (x: diverged)"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LOOKS = list(zip(COLOURS, "osD^vPXp")) * 9      # Okabe and Ito (2008): colours that everybody can tell apart
HEAD = "learning rate   seeds   verdict         loss   bits a byte   worse by"
ROW = "{:<16g}{:<8}{:<12}{:>8.3f}{:>14.3f}{:>11.3f} ± {:.3f}"

def panels(title, columns, x, across=1, height=4.2, rates=()):
    """A figure 10 inches wide, and its axes: a panel a column; the ticks of a rate's axis are the rates."""
    os.environ.pop("MPLBACKEND", None)      # Jupyter's, which may be missing where it starts a program
    import matplotlib.figure
    matplotlib.rcParams["text.parse_math"] = False      # a setting's name may hold a $
    rows = math.ceil(len(columns) / across)
    tall = height * rows + 0.5
    fig = matplotlib.figure.Figure((10, tall), dpi=110)
    fig.suptitle(title, x=0.02, y=1 - 0.12 / tall, ha="left", va="top", weight="bold", size=13)
    fig.subplots_adjust(0.09, 0.85 / tall, 0.97, 1 - 0.75 / tall, 0.4, 0.35)
    for i, column in enumerate(columns):
        ax = fig.add_subplot(rows, across, i + 1)
        ax.grid(alpha=0.25)
        ax.set_xlabel(x)
        ax.set_ylabel(LABELS.get(column, column.replace("_", " ")))
        if column in LOG:
            ax.set_yscale("log", subs=[2, 5])
            ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        if rates:
            ax.set_xscale("log")
            ax.set_xticks([], minor=True)
            ax.set_xticks(rates, [f"{lr:.3g}" for lr in rates], size=10 - across, rotation=90)
    return fig, fig.axes

def save(pictures, dir):
    """{name: figure} -> the paths written; one that cannot be written is named and left to the next time."""
    paths = []
    for name, fig in pictures.items():
        lines = {label: line for ax in fig.axes for line, label in zip(*ax.get_legend_handles_labels())}
        if len(lines) > 1:      # one legend, beside the panels
            box = fig.legend(lines.values(), lines, loc="upper right", frameon=False, fontsize=8)
            fig.subplots_adjust(right=0.97 - box.get_window_extent().width / fig.bbox.width)
        content = io.BytesIO()
        fig.savefig(content)
        try:
            write_aside(Path(dir) / name, content.getvalue())
            paths.append(Path(dir) / name)
        except OSError as error:
            say(f"not drawn: {Path(dir) / name} ({error.strerror or error})", sys.stderr)
    return paths

def points(run, column, x="step"):
    """x and column, medians of at most 50 blocks: minibatch noise hides who is lower. (2, blocks)"""
    xs = run["metrics"][x]
    rows = np.stack([xs, run["metrics"].get(column, xs * np.nan)])
    rows = rows[:, np.isfinite(rows).all(axis=0)]
    block = max(1, math.ceil(rows.shape[1] / 50))
    return np.median(rows[:, rows.shape[1] % block:].reshape(2, -1, block), axis=2)

def draw_curves(pictures, runs, title):
    """{name: figure} for {name: columns}, as far as the runs have them: a panel a setting and column."""
    figures = {}
    rates = sorted({run["lr"] for run in runs})
    settings = sorted({run["setting"] for run in runs})
    for name, columns in pictures.items():
        columns = [column for column in columns if any(points(run, column).size for run in runs)]
        if not columns:
            continue
        figures[name], axes = panels(title, columns * len(settings), "step (x: diverged)", len(columns))
        from matplotlib import colormaps    # after panels, which minds Jupyter
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(rates)))
        for ax, (setting, column) in zip(axes, itertools.product(settings, columns)):
            ax.set_title(setting, fontsize=9)
            for run in [run for run in runs if run["setting"] == setting]:
                steps, values = points(run, column)
                if "loss" in column:    # what rises above the start runs along the top edge
                    values = np.fmin(values, run["train"]["train_loss"][0] + 0.5)
                style = "--x" if run["status"] == "diverged" else "-"
                ax.plot(steps, values, style, color=colours[rates.index(run["lr"])], lw=1.2,
                        markevery=slice(-1, None), label=f"rate {run['lr']:g}")
            if column == "sharpness_ratio":
                ax.axhline(1, color="black", lw=1)
    return figures

def draw_rates(ax, settings, column):
    """A column of insights' rows against the rate; above the panel an x for what diverged."""
    for i, s in enumerate(settings):
        colour, marker = LOOKS[i]
        lrs = [row["lr"] for row in s["rates"]]
        values = [row[column] for row in s["rates"]]
        ax.plot(lrs, values, color=colour, marker=marker, mfc="white", label=s["label"])
        lost = [row["lr"] for row in s["rates"] if row["diverged"]]
        ax.plot(lost, [1.03 + 0.05 * i] * len(lost), "x", color=colour, clip_on=False,
                transform=ax.get_xaxis_transform())

def write(ax, lr, level, text, colour, ha="left"):
    """Text at a learning rate, above the panel, in a line of its level."""
    ax.text(lr, 1.03 + 0.05 * level, text, transform=ax.get_xaxis_transform(), ha=ha, va="center",
            color=colour, fontsize=9)

def mark(ax, lr, level, text, colour="#444444"):
    """A line at a rate, and what is there."""
    ax.plot([lr, lr], [0, 1.05 + 0.05 * level], color=colour, lw=1, zorder=1, clip_on=False,
            transform=ax.get_xaxis_transform())
    write(ax, lr, level, f"{text}: {lr:.3g} ", colour, "right")

# The pictures of a run and of a sweep -------------------------------------------------------------

def draw_run(dir):
    """In its folder: what it has of RUN; router.png of experts, lr_range_test.png of one. -> paths"""
    run = read_run(dir)
    if not run or not len(run["train"]["step"]):
        return []
    title = "{name}: learning rate {lr:g}, {status}".format(**run)
    pictures = draw_curves(RUN, [run], title)
    experts = [name for name in run["train"] if name.startswith("share_L")]     # share_L0_E0, share_L0_E1 ...
    if experts:
        fig, [ax] = panels(title, ["expert, layer after layer"], "part of the run")
        share = ax.imshow([points(run, name)[1] for name in experts], vmin=0, aspect="auto")
        fig.colorbar(share, label="share of its layer's tokens")
        pictures["router.png"] = fig
    if run["args"].get("schedule") == "exponential":
        pictures["lr_range_test.png"] = draw_range_test(run)
    return save(pictures, dir)

def range_test_readings(lrs, losses):
    """What people read off a learning-rate range test (Smith 2017; fastai): {name: learning rate}."""
    lowest = np.argmin(losses)
    slopes = np.diff(losses[:lowest + 1], append=np.inf)
    low = losses <= 0.95 * losses[lowest] + 0.05 * losses[0]
    return {"steepest": lrs[np.argmin(slopes)],
            "minimum / 10": lrs[lowest] / 10,
            "before it rises": lrs[low][-1]}

def draw_range_test(run):
    """Loss against the learning rate that rises from step to step."""
    lrs, losses = points(run, "train_loss", "lr")
    title = "Learning-rate range test: a first look; a sweep is the answer"
    fig, [ax] = panels(title, ["train_loss"], "learning rate", height=5)
    fig.subplots_adjust(top=0.75)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.plot(lrs, losses, ".-", color=COLOURS[0])
    ax.set_ylim(losses.min() - 0.2, losses[0] + 0.5)
    readings = range_test_readings(lrs, losses)
    for level, name in enumerate(sorted(readings, key=readings.get)):   # no line crosses another's text
        mark(ax, readings[name], level, name, COLOURS[1 + level])
    return fig

def draw_sweep(dir, runs, insights):
    """All of them, from runs with status and setting as sweep.py leaves them, and its insights. -> paths"""
    settings = insights["settings"]
    rates = sorted({row["lr"] for s in settings for row in s["rates"]})
    title = headline(runs, insights["use"])
    pictures = draw_curves(SWEEP, runs, title)
    pictures["lr_vs_final_loss.png"] = draw_losses(insights, title, rates)
    pictures["detailed_comparison.png"], axes = panels(title, DETAILS, RATE, 3, 3.8, rates)
    axes[-1].yaxis.update_units(STATUSES)       # an axis of names, in this order
    for ax, column in zip(axes, DETAILS):
        draw_rates(ax, settings, column)
    measured = [run for run in runs if points(run, "sharpness_ratio").size]
    if measured:        # Muon has no threshold
        pictures["edge_of_stability.png"] = draw_edge(measured, settings, rates)
    pictures["summary_table.png"] = draw_table(settings, title)
    return save(pictures, dir)

def headline(runs, use):
    if not use:
        return "No learning rate to use yet"
    [args, *_] = [run["args"] for run in runs if run["setting"] == use["setting"]]
    optimizer = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}.get(args.get("optimizer"))
    words = [use["setting"] or optimizer, args.get("preset"), f"{use['seeds']} seeds"]
    if use["seeds"] == 1:
        words[-1] = "but one seed cannot tell"
    return f"Use {use['lr']:g}: {', '.join(filter(None, words))}"

def draw_losses(insights, title, rates):
    """Final loss against rate: every run, the means, where the optimum lies, the best rate and the edges."""
    use, settings = insights["use"], insights["settings"]
    x = "peak learning rate (dot: one run; open marker: mean over the seeds; x: diverged)"
    fig, [ax] = panels(title, ["val_loss"], x, 1, 5.2, rates)
    fig.subplots_adjust(top=0.81 - 0.03 * len(settings))
    draw_rates(ax, settings, "val_loss")
    for s, (colour, _) in zip(settings, LOOKS):
        for row in s["rates"]:
            losses = [loss for _, loss, *_ in row["runs"]]
            ax.plot([row["lr"]] * len(losses), losses, ".", color=colour)
    low, high = ax.dataLim.intervaly
    if low < high:      # from just below the best to about a nat above it
        ax.set_ylim(low - 0.12 * min(1, high - low), low + 1.06 * min(1, high - low))
    for i, s in enumerate(settings):
        for row in s["rates"]:
            if (row["val_loss"] or 0) > low + 1.06:
                write(ax, row["lr"], i, f" ↑ {row['val_loss']:.2f}", LOOKS[i][0])
        if use and use["setting"] == s["label"]:
            draw_answer(ax, use, s["edge"], LOOKS[i][0], len(settings))
    return fig

def draw_answer(ax, use, edge, colour, level):
    """The band that holds the optimum, the best rate, and the edges above it."""
    left, right = ax.get_xlim()
    low, high = use["low"] or left, use["high"] or right
    if use["low"] or use["high"]:
        ax.axvspan(low, high, alpha=0.12, color=colour)
        write(ax, math.sqrt(low * high), -20, "the optimum lies here (95%)", colour, "center")
    ax.set_xlim(left, right)
    mark(ax, use["lr"], level, "best")
    for status in ("unstable", "diverged"):
        level += 1
        if edge[status]:
            mark(ax, edge[status]["lr"], level, f"first {status}")

def draw_edge(runs, settings, rates):
    """Sharpness over its threshold in the second half of each run: the median, from 10 to 90%."""
    fig, [ax] = panels("The edge of stability", ["sharpness_ratio"], RATE, rates=rates)
    ax.axhline(1, color="black", lw=1)
    for s, (colour, marker) in zip(settings, LOOKS):
        for run in [run for run in runs if run["setting"] == s["label"]]:
            _, ratios = points(run, "sharpness_ratio")
            later = ratios[len(ratios) // 2:]
            ax.plot([run["lr"]] * 3, np.quantile(later, [0.1, 0.5, 0.9]), color=colour, marker=marker,
                    markevery=[1], label=s["label"])
            if run["status"] == "diverged":
                ax.plot(run["lr"], np.median(later), "x", color="black")
    return fig

def draw_table(settings, title):
    """The numbers of each rate; nothing in place of 0 and of what is not known."""
    lines = []
    for s in settings:
        lines += ["", s["label"], HEAD]
        for row in s["rates"]:
            numbers = [row[name] or np.nan for name in ("val_loss", "val_bpb", "worse_by", "half_width")]
            line = ROW.format(row["lr"], len(row["seeds"]), row["verdict"], *numbers)
            lines.append(re.sub("± nan|nan ±.*|nan", "   ", line))
    fig, [ax] = panels(title, [""], "", height=0.22 * len(lines) + 0.6)
    ax.axis("off")
    ax.text(0, 1, "\n".join(lines[1:]), family="monospace", va="top", linespacing=1.5)
    return fig

if __name__ == "__main__":
    folder = Path(*sys.argv[1:])
    for path in draw_run(folder):
        say(path)
    if not (folder / "config.json").exists():
        program = Path(__file__).with_name("sweep.py")
        sys.exit(subprocess.run([sys.executable, program, "--report", folder]).returncode)
