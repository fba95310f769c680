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
import json
import math
import os
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

def classify(losses):
    """The status of a curve of training losses (nats a token, in the order they were logged)."""
    losses = np.nan_to_num(np.asarray(losses, float), nan=HUGE, posinf=HUGE)
    n = len(losses)
    if n < 3 or losses[-1] == HUGE:
        return "diverged" if HUGE in losses[-1:] else "slow"
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
    losses = np.nan_to_num(np.asarray(losses, float), nan=HUGE, posinf=HUGE)
    half = max(3, math.ceil(n_expected / 2))
    gone = len(losses) > 2 and losses[-3:].min() == HUGE
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
    """The rows of a CSV file as dicts of numbers, but for the setting; nan where there is nothing."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\0", "?").split("\n")
    rows = []
    for row in csv.DictReader(lines[:-1]):      # what follows the last newline is half written
        setting = row.pop("setting", "")
        row.pop(None, None)     # what is longer than the header
        try:
            rows.append({name: float(cell or "nan") for name, cell in row.items()} | dict(setting=setting))
        except ValueError as error:
            left_out(f"a row of {path}", error)
    return rows

def make_run(dir, config, rows, summary):
    """A run from the rows of its metrics.csv; its train: those of steps, not of evaluations."""
    names = {"step", "lr", "train_loss", "val_loss"}.union(*rows[:1])
    metrics = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    if "stability_threshold" in names:      # Adam's is that of the preconditioned sharpness
        sharpness = metrics.get("preconditioned_sharpness", metrics.pop("sharpness"))
        metrics["sharpness_ratio"] = sharpness / metrics["stability_threshold"]
    steps = np.isfinite(metrics["lr"]) & np.isnan(metrics["val_loss"])
    train = {name: column[steps] for name, column in metrics.items()}
    status = str(summary.get("status", "running"))
    if status in STATUSES:      # the run is over
        status = classify(train["train_loss"])
    args = config["args"]
    return dict(dir=dir, name=dir.name, config=config, args=args, lr=float(args["lr"]),
                seed=int(args["seed"]), metrics=metrics, train=train, summary=summary, status=status,
                setting="")

def read_run(dir):
    """The run in a folder, or None where there is no config.json that can be read."""
    dir = Path(dir)
    config = read_json(dir / "config.json")
    summary = read_json(dir / "summary.json") or {}
    try:
        return config and make_run(dir, config, read_table(dir / "metrics.csv"), summary)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        left_out(dir, error)

def read_runs(dir):
    """All runs under dir, or in its curves.csv where there are none, ordered by learning rate and seed."""
    runs = list(filter(None, map(read_run, Path(dir).iterdir())))
    curves = {}
    for row in [] if runs else read_table(Path(dir) / "curves.csv"):
        curves.setdefault((row["setting"], row["lr"], row["seed"]), []).append(row)
    for (setting, lr, seed), rows in curves.items():
        losses = [None] + [row["val_loss"] for row in rows if row["val_loss"] < np.inf]
        summary = dict(status="converged", final_val_loss=losses[-1])
        run = make_run(Path(dir), dict(args=dict(lr=lr, seed=seed)), rows, summary)
        runs.append(run | dict(setting=setting, name=f"{setting} lr{lr:g}-s{seed:g}".strip()))
    return sorted(runs, key=lambda run: (run["lr"], run["seed"], run["name"]))

# Drawing: against the step colour tells the learning rate; against that, colour and marker the setting

RUN = {"loss_curves.png": ("train_loss", "val_loss", "grad_norm"),      # add your own column of metrics.csv
       "lr_schedule.png": ("lr",), "sharpness.png": ("sharpness_ratio", "sharpness")}
SWEEP = {"lr_sweep_comparison.png": ("train_loss", "val_loss"), "lr_schedules.png": ("lr",),
         "sharpness.png": RUN["sharpness.png"]}
DETAILS = ("val_loss", "val_accuracy", "val_perplexity", "max_grad_norm", "steps_to_loss", "status")
LABELS = {"train_loss": "training loss (nats a token)", "val_loss": "validation loss (nats a token)",
          "lr": "learning rate", "grad_norm": "gradient norm", "max_grad_norm": "largest gradient norm",
          "val_accuracy": "accuracy (share of tokens)", "val_perplexity": "perplexity",
          "sharpness_ratio": "sharpness / its threshold", "steps_to_loss": "steps to the worst rate's loss"}
LOG = ("lr", "grad_norm", "max_grad_norm", "val_perplexity", "sharpness", "sharpness_ratio")
RATE = "peak learning rate (x: diverged)"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442") * 9
MARKERS = "osD^vPXp" * 9    # these and the colours of Okabe and Ito (2008) are told apart by everybody
HEAD = "learning rate   seeds   loss      worse by      verdict    bits a byte   gradient norm"
ROW = ("{lr:<16g}{n:<6}{val_loss:>6.3f}{worse_by:>9.3f} ± {half_width:<5.3f}   {verdict:<12}{val_bpb:>8.3f}"
       "{max_grad_norm:>13.3g}")

def panels(title, columns, x, across=1, height=4.0):
    """A figure 10 inches wide, without pyplot, and its axes: a panel a column, whose name stands above it."""
    if "ipykernel" not in sys.modules:      # Jupyter's backend may be missing where it starts a program
        os.environ.pop("MPLBACKEND", None)
    import matplotlib.figure
    matplotlib.rcParams["text.parse_math"] = False      # a setting's name may hold a $
    rows = math.ceil(len(columns) / across)
    tall = 0.4 + height * rows
    fig = matplotlib.figure.Figure((10, tall), dpi=110)
    fig.suptitle(title, x=0.02, y=1 - 0.1 / tall, ha="left", va="top", weight="bold")
    fig.subplots(rows, min(across, len(columns)))
    fig.subplots_adjust(0.07, 0.75 / tall, 0.98, 1 - 0.75 / tall, 0.32, 0.5)
    for ax, column in zip(fig.axes, columns):
        ax.grid(alpha=0.25)
        ax.set_xlabel(x)
        ax.set_title(LABELS.get(column, column.replace("_", " ")), loc="left", fontsize=10)
        if column in LOG:
            ax.set_yscale("log", subs=[2, 5])
            ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        if "rate" in x:
            ax.set_xscale("log", subs=[2, 5])
            ax.xaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
            ax.tick_params(axis="x", which="both", labelsize=10 - across)
    return fig, fig.axes

def save(pictures, dir):
    """{name: figure} -> the paths written. One that cannot be written is named; none is half written."""
    paths = []
    for name, fig in pictures.items():
        labels = {label: line for ax in fig.axes for line, label in zip(*ax.get_legend_handles_labels())}
        if len(labels) > 1:     # one legend, beside the panels
            box = fig.legend(labels.values(), labels, loc="upper right", frameon=False, fontsize=8,
                             ncols=1 + len(labels) // 20)
            fig.subplots_adjust(right=0.98 - box.get_window_extent().width / fig.bbox.width)
        content = io.BytesIO()
        fig.savefig(content)
        try:
            write_aside(Path(dir) / name, content.getvalue())
            paths.append(Path(dir) / name)
        except OSError as error:
            say(f"not drawn: {error}", sys.stderr)
    return paths

def points(run, column):
    """Steps and values, medians of at most 50 blocks: minibatch noise hides who is lower. (2, blocks)"""
    steps = run["metrics"]["step"]
    rows = np.stack([steps, run["metrics"].get(column, steps * np.nan)])
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
        places = [(setting, column) for setting in settings for column in columns]
        if not places:
            continue
        across = min(len(places), 2 + len(columns) % 2)
        what = [column for _, column in places]
        figures[name], axes = panels(title, what, "step (dashed: diverged)", across)
        from matplotlib import colormaps    # after panels, which sees to MPLBACKEND
        colours = dict(zip(rates, colormaps["viridis"](np.linspace(0, 0.9, len(rates)))))
        for (setting, column), ax in zip(places, axes):
            ax.set_title(setting, loc="right", fontsize=8)
            starts = []
            for run in runs:
                steps, values = points(run, column)
                if run["setting"] == setting and len(steps):
                    lost = run["status"] == "diverged"
                    ax.plot(steps, values, "--" if lost else "-", color=colours[run["lr"]], lw=1.3,
                            label=f"{run['lr']:g}")
                    starts += [] if lost else [values[0]]
            if starts and "loss" in column:     # what rises above where the others began leaves the picture
                ax.set_ylim(top=max(starts) + 0.2)
            if column == "sharpness_ratio":
                ax.axhline(1, color="black", lw=1)
    return figures

def draw_rates(ax, insights, column):
    """A column of insights' rows against the rate; on the top edge an x for what diverged."""
    for s, colour, marker in zip(insights["settings"], COLOURS, MARKERS):
        rates = [row["lr"] for row in s["rates"]]
        ax.plot(rates, [row[column] for row in s["rates"]], marker=marker, color=colour, label=s["label"])
        lost = [row["lr"] for row in s["rates"] if row["diverged"]]
        ax.plot(lost, [1] * len(lost), "x", color=colour, clip_on=False, transform=ax.get_xaxis_transform())

def note(ax, lr, height, text, colour, turn=90):
    """Text that ends at a learning rate, and at a height as a share of the panel's."""
    ax.annotate(text, (lr, height), xycoords=ax.get_xaxis_transform(), ha="right", va="top", color=colour,
                rotation=turn, fontsize=9)

def mark(ax, lr, height, text, colour):
    ax.axvline(lr, color=colour, lw=1)
    note(ax, lr, height, f"{text}: {lr:.3g}", colour)

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
        pictures["router.png"], [ax] = panels(title, ["expert, layer after layer"], "part of the run")
        share = ax.imshow([points(run, name)[1] for name in experts], vmin=0, aspect="auto")
        ax.figure.colorbar(share, label="share of its layer's tokens")
    if run["args"].get("schedule") == "exponential":
        pictures["lr_range_test.png"] = draw_range_test(run["train"]["lr"], run["train"]["train_loss"])
    return save(pictures, dir)

def smooth(lrs, losses):
    """Means of a twentieth of the losses in a row, and the learning rates in their middles."""
    known = np.isfinite(losses)
    half = known.sum() // 40
    losses = np.convolve(losses[known], np.ones(2 * half + 1) / (2 * half + 1), "valid")
    return lrs[known][half:][:len(losses)], losses

def range_test_readings(lrs, losses):
    """What people read off a learning-rate range test (Smith 2017; fastai): {name: learning rate}."""
    lrs, losses = smooth(lrs, losses)
    lowest = np.argmin(losses)
    risen = losses[lowest:] > 0.95 * losses[lowest] + 0.05 * losses[0]
    return {"steepest": lrs[np.argmin(np.diff(losses[:lowest + 1], append=np.inf))],
            "minimum / 10": lrs[lowest] / 10,
            "before it rises": lrs[lowest + np.argmax(np.append(risen, True)) - 1]}

def draw_range_test(lrs, losses):
    title = "Learning-rate range test: a first look; a sweep is the answer"
    fig, [ax] = panels(title, ["train_loss"], "learning rate")
    ax.plot(lrs, losses, ".", color="#999999")
    ax.plot(*smooth(lrs, losses), color=COLOURS[0])
    ax.set_ylim(np.nanmin(losses) - 0.2, losses[0] + 0.5)
    for (name, lr), colour in zip(range_test_readings(lrs, losses).items(), COLOURS[1:]):
        mark(ax, lr, 0.95, name, colour)
    return fig

def draw_sweep(dir, runs, insights):
    """All of them, from runs with status and setting as sweep.py leaves them, and its insights. -> paths"""
    use = insights["use"]
    title = "No learning rate to use yet"
    if use:
        [args, *_] = [run["args"] for run in runs if run["setting"] == use["setting"]]
        optimizer = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}.get(args.get("optimizer"))
        what = ", ".join(filter(None, [optimizer, args.get("preset"), use["setting"]]))
        title = f"Use {use['lr']:g}: {what}, {use['seeds']} seeds"
        if use["seeds"] == 1:
            title = f"Lowest at {use['lr']:g}, but one seed cannot tell: {what}"
    pictures = draw_curves(SWEEP, runs, title)
    pictures["lr_vs_final_loss.png"] = draw_losses(insights, title)
    pictures["detailed_comparison.png"], axes = panels(title, DETAILS, RATE, 3, 3.6)
    axes[-1].yaxis.update_units(STATUSES)       # an axis of names, in this order
    for ax, column in zip(axes, DETAILS):
        draw_rates(ax, insights, column)
    ratios = [run for run in runs if points(run, "sharpness_ratio").size]
    if ratios:      # 10, 50 and 90% of the second half of each run; Muon has no threshold
        pictures["edge_of_stability.png"], [ax] = panels("The edge of stability", ["sharpness_ratio"], RATE)
        ax.axhline(1, color="black", lw=1)
    settings = sorted({run["setting"] for run in ratios})
    for run in ratios:
        later = np.array_split(points(run, "sharpness_ratio")[1], 2)[1]
        colour = COLOURS[settings.index(run["setting"])]
        ax.plot([run["lr"]] * 3, np.quantile(later, [0.1, 0.5, 0.9]), "_-", c=colour, label=run["setting"])
    pictures["summary_table.png"] = draw_table(insights, title)
    return save(pictures, dir)

def draw_losses(insights, title):
    """Final loss against rate: the seeds and their mean, where the optimum lies, and the two edges."""
    fig, [ax] = panels(title, ["val_loss"], RATE + "; small: a seed, large: their mean", 1, 5)
    draw_rates(ax, insights, "val_loss")
    low, high = ax.dataLim.intervaly
    if low < high:      # from just below the best to about a nat above it
        ax.set_ylim(low - 0.1 * min(high - low, 1), low + 1.05 * min(high - low, 1))
    for s, colour in zip(insights["settings"], COLOURS):
        for row in s["rates"]:
            losses = [loss for _, loss, _ in row["runs"]]
            ax.plot([row["lr"]] * len(losses), losses, ".", color=colour)
            if row["val_loss"] and row["val_loss"] > low + 1:
                note(ax, row["lr"], 1, f"{row['val_loss']:.2f} →", colour)
        use = insights["use"]
        if use and use["setting"] == s["label"]:
            left, right = ax.get_xlim()
            band = use["low"] or left, use["high"] or right
            if use["low"] or use["high"]:
                ax.axvspan(*band, alpha=0.12, color=colour)
                note(ax, band[1], 0.06, "the optimum lies here, 95% ", colour, 0)
            ax.set_xlim(left, right)
            for text, found, height in (("best", use, 0.95), ("first unstable", s["edge"]["unstable"], 0.95),
                                        ("first diverged", s["edge"]["diverged"], 0.6)):
                if found:
                    mark(ax, found["lr"], height, text, "#444444")
    return fig

def draw_table(insights, title):
    """The numbers of each rate."""
    lines = []
    for s in insights["settings"]:
        lines += ["", s["label"], HEAD]
        for row in s["rates"]:
            known = {name: np.nan if value is None else value for name, value in row.items()}
            line = ROW.format(**known, n=len(row["seeds"]))
            lines.append(line.replace("± nan", "     ").replace("nan", "   "))
    fig, [ax] = panels(title, [""], "", height=0.22 * len(lines) + 0.6)
    ax.axis("off")
    ax.text(0, 1, "\n".join(lines[1:]), family="monospace", va="top", linespacing=1.5)
    return fig

if __name__ == "__main__":
    folder = Path(*sys.argv[1:])
    for path in draw_run(folder):
        say(path)
    if not (folder / "config.json").exists():
        say(f"no run; python sweep.py --report {folder} draws a sweep")
        program = Path(__file__).with_name("sweep.py")
        sys.exit(subprocess.run([sys.executable, program, "--report", folder]).returncode)
