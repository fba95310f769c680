"""Read the folders of runs, name what their loss curves did, and draw them.

What became of a run is read from its own training losses and from nothing else:

    diverged    not finite at the end, or it rose far above its lowest and stays up
    unstable    it jumped and came back: the edge of stability
    slow        it still falls steadily at the end, or it hardly learned
    converged   none of these: it fell and flattened

    python plot.py runs/tiny/lr0.003-s0   a run: loss_curves.png, lr_schedule.png
    python plot.py runs/tiny              a sweep: the same as python sweep.py --report runs/tiny
"""
import csv
import io
import json
import math
import os
import sys
from contextlib import contextmanager
from itertools import groupby, product
from operator import itemgetter
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
    # Medians of a few losses in a row, at least 25 side by side, and the lowest so far.
    width = 2 * (n // 50) + 1
    level = np.median(np.lib.stride_tricks.sliding_window_view(losses, width), 1)
    lowest = np.minimum.accumulate(np.minimum(level, losses[0] + FAR))
    sigma = np.median(np.abs(np.diff(losses, 2))) / 0.6745 / 6 ** 0.5   # second differences have 6 sigma^2
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
    _, middle, late = map(np.median, np.array_split(losses, 3))
    if hardly_learned or middle - late > STEADY * (losses[0] - late):
        return "slow"
    return "converged"

def is_lost(losses, n_expected):
    """Can a run of n_expected log steps not come back: half of it a nat above its start, or 3 not finite?"""
    losses = finite(losses)
    half = max(3, math.ceil(n_expected / 2))
    if len(losses) > half and losses[-half:].min() > losses[0] + FAR:
        return True
    return len(losses) > 2 and bool(losses[-3:].min() == HUGE)

# Reading: a run is a folder that train.py writes, a sweep a folder of runs ------------------------
FREE = ("out", "resume", "no_plot", "prepare", "sample", "checkpoint_interval", "device",
        "data_tokens")      # args that make no other run; if data_tokens changes the text, its hash tells

@contextmanager
def left_out(path):
    """Names what fails in here on stderr, and goes on without it. A file that is not there is no failure."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        say(f"left out: {path} ({error!r})", sys.stderr)

def read_json(path):
    """The object in a JSON file, or None where there is none that can be read."""
    with left_out(path):
        return json.loads(path.read_text("utf-8"))

def read_table(path):
    """The rows of a CSV file, up to one that is damaged: dicts of numbers, nan where there is nothing."""
    rows = []
    with left_out(path):
        lines = path.read_text("utf-8", "replace").split("\n")
        for row in csv.DictReader(lines[:-1]):      # what follows the last newline is half written
            numbers = {name: float(cell or "nan") for name, cell in row.items() if name != "setting"}
            rows.append(row | numbers)
    return rows

def make_run(dir, args, rows, summary, config):
    """A run from the rows of its metrics.csv; its train: those of steps, not of evaluations."""
    names = {"step", "lr", "train_loss", "val_loss"}.union(*rows)
    metrics = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    if "stability_threshold" in metrics:    # Adam's is that of the preconditioned sharpness
        sharpness = metrics.get("preconditioned_sharpness", metrics["sharpness"])
        metrics["sharpness_ratio"] = sharpness / metrics["stability_threshold"]
    steps = np.isfinite(metrics["lr"]) & np.isnan(metrics["val_loss"])
    train = {name: column[steps] for name, column in metrics.items()}
    status, loss = str(summary.get("status", "running")), None
    if status in STATUSES:      # the run is over
        status = classify(train["train_loss"])
        loss = {"diverged": math.inf}.get(status, summary.get("final_val_loss"))
    return dict(dir=dir, name=dir.name, lr=float(args["lr"]), seed=int(args["seed"]), setting="",
                config=config, args=args, metrics=metrics, train=train, summary=summary, status=status,
                loss=loss)

def read_run(dir):
    """The run in a folder, or None where there is no config.json that can be read."""
    config = read_json(Path(dir, "config.json"))
    summary = read_json(Path(dir, "summary.json")) or {}
    rows = read_table(Path(dir, "metrics.csv"))
    with left_out(dir):
        return config and make_run(Path(dir), config["args"], rows, summary, config)

def read_runs(dir):
    """All runs under dir that made a step, by learning rate and seed; where there are none, those of its
    curves.csv. loss: the last on validation, inf if it diverged, None while it goes on."""
    dir = Path(dir)
    runs = [read_run(path.parent) for path in dir.glob("*/config.json")]
    runs = [run for run in runs if run and run["train"]["step"].size]
    if runs:
        return sorted(runs, key=itemgetter("lr", "seed", "name"))
    table = read_table(dir / "curves.csv")
    for (setting, lr, seed), rows in groupby(table, itemgetter("setting", "lr", "seed")):
        rows = list(rows)
        ends = [row["val_loss"] for row in rows if row["val_loss"] < math.inf]
        summary = dict(status="converged", final_val_loss=[None, *ends][-1])
        run = make_run(dir, dict(lr=lr, seed=seed), rows, summary, {})
        runs.append(run | dict(setting=setting))
    return runs

# Drawing: against the step colour tells the learning rate; against that, colour and marker the setting
RUN = {"loss_curves.png": ("train_loss", "val_loss", "grad_norm"),      # add your own column of metrics.csv
       "lr_schedule.png": ("lr",), "sharpness.png": ("sharpness_ratio", "sharpness")}
SWEEP = {"lr_sweep_comparison.png": ("train_loss", "val_loss"), "lr_schedules.png": ("lr",),
         "sharpness.png": ("sharpness_ratio", "sharpness")}
DETAILS = ("val_loss", "val_accuracy", "val_perplexity", "max_grad_norm", "steps_to_loss", "status")
LABELS = {"train_loss": "training loss (nats a token)", "val_loss": "validation loss (nats a token)",
          "lr": "learning rate", "val_accuracy": "accuracy (share of tokens)",
          "sharpness_ratio": "sharpness / its threshold", "steps_to_loss": "steps to the worst rate's loss"}
RANGE_TEST = "Learning-rate range test: a first look; a sweep is the answer"
LOG = ("lr", "grad_norm", "max_grad_norm", "val_perplexity", "sharpness", "sharpness_ratio")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LOOKS = list(zip(COLOURS, "osD^vPXp")) * 9      # Okabe and Ito (2008): colours that everybody can tell apart

def panels(title, columns, x, across=1, height=4.2):
    """A figure 10 inches wide, and its axes: a panel a column."""
    os.environ.pop("MPLBACKEND", None)      # Jupyter's, which may be missing where it starts a program
    import matplotlib.figure
    matplotlib.rcParams["text.parse_math"] = False      # a setting's name may hold a $
    rows = math.ceil(len(columns) / across)
    fig = matplotlib.figure.Figure((10, height * rows + 0.5), dpi=110, layout="constrained")
    fig.suptitle(title, x=0.02, ha="left", weight="bold")
    for i, column in enumerate(columns, 1):
        ax = fig.add_subplot(rows, across, i)
        ax.grid(alpha=0.25)
        ax.set(xlabel=x, ylabel=LABELS.get(column, column.replace("_", " ")))
        if "rate" in x:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
        if column in LOG:
            ax.set_yscale("log", subs=[2, 5])
            ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        if column == "sharpness_ratio":
            ax.axhline(1, color="black")
    return fig, fig.axes

def save(pictures, dir):
    """{name: figure} -> the paths written; one that cannot be written is named, the next time tries again."""
    paths = []
    for name, fig in pictures.items():
        lines = {label: line for ax in fig.axes for line, label in zip(*ax.get_legend_handles_labels())}
        if len(lines) > 1:      # one legend for all panels, at a height that no title reaches
            fig.legend(lines.values(), lines, loc="outside right center", frameon=False, fontsize=8)
        content = io.BytesIO()
        fig.savefig(content)
        path = Path(dir) / name
        with left_out(path):
            write_aside(path, content.getvalue())
            paths.append(path)
    return paths

def points(run, column, x="step"):
    """x and column, medians of at most 50 blocks: minibatch noise hides who is lower. (2, blocks)"""
    xs = run["metrics"][x]
    rows = np.stack([xs, run["metrics"].get(column, xs * np.nan)])
    rows = rows[:, np.isfinite(rows).all(0)]
    block = rows.shape[1] // 51 + 1
    blocks = rows[:, rows.shape[1] % block:].reshape(2, -1, block)
    return np.median(blocks, 2)

def draw_curves(pictures, runs, title):
    """{name: figure} for {name: columns}, as far as the runs have them: a panel a setting and column."""
    figs = {}
    rates = sorted({run["lr"] for run in runs})
    settings = sorted({run["setting"] for run in runs})
    for name, columns in pictures.items():
        columns = [column for column in columns if any(points(run, column).size for run in runs)]
        if columns:
            figs[name], axes = panels(title, columns * len(settings), "step (dashed: diverged)", len(columns))
            from matplotlib import colormaps    # after panels, which minds Jupyter
            axes = dict(zip(product(settings, columns), axes))
            for run, column in product(runs, columns):
                steps, values = points(run, column)
                if "loss" in column:    # what rises above the start runs along the top edge
                    values = np.fmin(values, runs[0]["train"]["train_loss"][0] + 0.5)
                colour = colormaps["viridis"](0.9 * rates.index(run["lr"]) / len(rates))
                style = {"diverged": "--"}.get(run["status"], "-")
                ax = axes[run["setting"], column]
                ax.set_title(run["setting"], fontsize=9)
                ax.plot(steps, values, style, color=colour, lw=1.2, label=f"rate {run['lr']:g}")
    return figs

def range_test_readings(lrs, losses):
    """What people read off a learning-rate range test (Smith 2017; fastai): {name: learning rate}."""
    best = np.argmin(losses)
    steepest = np.argmin(np.diff(losses[:best + 1], append=np.inf))
    low = losses <= 0.95 * losses[best] + 0.05 * losses[0]
    return {"steepest": lrs[steepest], "minimum / 10": lrs[best] / 10, "before it rises": lrs[low][-1]}

def draw_run(dir):
    """Draws, in a run's folder, what the run has of RUN, and its range test if it is one. -> paths"""
    run = read_run(dir)
    if not run or not run["train"]["step"].size:
        return []
    pictures = draw_curves(RUN, [run], "{name}: learning rate {lr:g}, {status}".format(**run))
    if run["args"].get("schedule") == "exponential":
        lrs, losses = points(run, "train_loss", "lr")
        pictures["lr_range_test.png"], [ax] = panels(RANGE_TEST, ["train_loss"], "learning rate")
        ax.plot(lrs, np.fmin(losses, losses[0] + 0.5), color="gray")
        for (name, lr), marker in zip(range_test_readings(lrs, losses).items(), "osD"):
            loss = np.interp(lr, lrs, losses)
            ax.plot(lr, loss, marker, label=f"{name}: {lr:.2g}")
    return save(pictures, dir)

def draw_sweep(dir, runs, insights):
    """All pictures of a sweep, from its runs and insights as sweep.py leaves them. -> paths"""
    use, settings, title = insights["use"], insights["settings"], "No learning rate to use yet"
    if use:     # the answer is the title of every picture
        args = runs[0]["args"]
        seeds = {1: "but one seed cannot tell"}.get(use["seeds"], f"{use['seeds']} seeds")
        optimizer = args.get("optimizer", "").replace("adamw", "AdamW").replace("muon", "Muon")
        words = [use["setting"] or optimizer, args.get("preset"), seeds]
        words = ", ".join(filter(None, words))
        title = f"Use {use['lr']:g}: {words}"
    pictures = draw_curves(SWEEP, runs, title)
    pictures["lr_vs_final_loss.png"] = draw_losses(use, settings, title)
    pictures["detailed_comparison.png"], axes = panels(title, DETAILS, "peak learning rate", 3, 3.8)
    axes[-1].yaxis.update_units(STATUSES)       # an axis of names, in this order
    for ax, column in zip(axes, DETAILS):
        draw_rates(ax, settings, column)
    cells = table(settings)
    pictures["summary_table.png"], [ax] = panels(title, [""], "", height=0.25 * len(cells))
    ax.axis("off")
    ax.table(cells, edges="open", loc="upper left").auto_set_column_width(range(9))
    return save(pictures, dir)

def table(settings):
    """Rows of cells: a head, and a row a rate, with nothing in place of 0 and of what is not known."""
    cells = [["", "learning rate", "seeds", "curves", "verdict", "loss", "bits a byte", "worse by", "±"]]
    for s in settings:
        for row in s["rates"]:
            words = [s["label"], f"{row['lr']:g}", str(len(row["seeds"])), row["status"], row["verdict"]]
            numbers = [row[name] or np.nan for name in ("val_loss", "val_bpb", "worse_by", "half_width")]
            numbers = [f"{number:.4f}".replace("nan", "") for number in numbers]
            cells.append(words + numbers)
    return cells

def draw_rates(ax, settings, column):
    """A column of insights' rows against the rate, whose ticks are the rates tried."""
    for s, (colour, marker) in zip(settings, LOOKS):
        ax.plot([row["lr"] for row in s["rates"]], [row[column] for row in s["rates"]],
                color=colour, marker=marker, mfc="white", label=s["label"])
    rates = sorted({row["lr"] for s in settings for row in s["rates"]})
    ax.set_xticks(rates, [f"{lr:.3g}" for lr in rates], size=8, rotation=90)
    ax.xaxis.minorticks_off()

def draw_losses(use, settings, title):
    """Final loss against rate: every run, the means, where the optimum lies, the best rate and the edges."""
    x = "peak learning rate (dot: one run, triangle: one above, x: one that diverged; open marker: mean)"
    fig, [ax] = panels(title, ["val_loss"], x, height=5.2)
    ax.margins(y=0.1)
    top = 1 + min((s["loss"] for s in settings if s["loss"]), default=0)
    for s, (colour, _) in zip(settings, LOOKS):
        top += 0.05     # about a nat above the best each setting has a line for what lies above
        for row in s["rates"]:
            for _, loss, *_ in row["runs"]:
                marker = "x"
                if loss:    # it did not diverge
                    marker = ".^"[loss > top]
                ax.plot(row["lr"], min(loss or top, top), marker, color=colour, zorder=3)
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())      # what follows does not widen the axes
    draw_rates(ax, settings, "val_loss")
    if use:
        marks = {f"first {status}": lr for status, lr in use["edge"].items()}
        for name, lr in dict(marks, best=use["lr"]).items():
            ax.axvline(lr, 0.06, color="black", lw=1)
            ax.text(lr * 0.98, 0.85, f"{name}: {lr:g}", rotation=90, ha="right", va="top",
                    transform=ax.get_xaxis_transform())
        if use["low"] or use["high"]:       # a side that is not known reaches beyond the picture
            looks = {s["label"]: colour for s, (colour, _) in zip(settings, LOOKS)}
            ax.axvspan(use["low"] or 1e-9, use["high"] or 1e9, alpha=0.1, color=looks[use["setting"]])
            ax.set_title("the optimum lies in the shaded band (95%)", y=0.01, fontsize=9)
    return fig

if __name__ == "__main__":
    paths = draw_run(Path(*sys.argv[1:]))
    for path in paths:
        say(path)
    if not paths:       # it is no run's folder
        import sweep    # here, as it imports this file
        sys.exit(sweep.main(["--report", *sys.argv[1:]]))
