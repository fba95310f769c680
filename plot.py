"""Read the folders of runs, name what their loss curves did, and draw them.

A run is a folder that train.py writes, a sweep a folder of runs; both are drawn from whatever has arrived.

    diverged    not finite; or it rose and stays up; or it is back where it started; or, beside a better run,
                it fell early and learned less than half as much: too high a rate to learn with
    unstable    it jumped or rose beyond the noise, and came back: the edge of stability
    slow        it learned nothing yet, or falls like a straight line, or ended well above a better run
    converged   none of these: it fell and flattened

Second differences of a smooth curve plus noise of deviation sigma have the variance 6 sigma^2, and their
median does not see a few spikes: sigma = median |loss[i+1] - 2 loss[i] + loss[i-1]| / (0.6745 sqrt 6).

    python plot.py runs/tiny/lr0.003-s0   a run: loss_curves.png, lr_schedule.png, router.png for experts
    python plot.py runs/tiny              a sweep: starts python sweep.py --report, which draws and analyses
"""
import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

# Status of a loss curve: thresholds in nats, unless they say otherwise ----------------------------

SPIKE = 0.5         # a loss above the lowest level before it; 65% more perplexity is no minibatch's luck
SPIKE_SIGMAS = 8.0  # ... and beyond the noise: 1,000 normal draws lie within 3.3 sigma of their mean
RISE = 0.1          # the median of a few losses in a row above its own lowest value
RISE_SIGMAS = 9.0   # ... in sigma / sqrt(losses in a row): medians vary by 1.25 of these, their range is 7
NOISE_CAP = 0.2     # minibatch noise of healthy small runs is 0.05 to 0.2; a noisier curve is swinging
STAYS_UP = 0.3      # the last tenth lies this far above the lowest level, and a third of the largest rise
LEARNED = 0.75      # a run starts at ln(vocabulary); less than this below has learned nothing
STEADY = 0.27       # share of the descent from the second third to the last: 1/3 for a straight line
SLOW_GAP = 0.25     # "well above" the sweep's best run: 28% more perplexity
HALF = 0.5          # learned less than half as much as the best run, and half of that in the first third
GONE = 1.0          # has_diverged: this far above its lowest loss ...
GONE_POINTS = 10    # ... for so many log steps, and for half of the run: a warm-up bump is shorter
EDGE = ("unstable", "diverged")
STATUSES = ("converged", "slow", *EDGE)

def classify(losses, best=None):
    """Status of a curve of training losses (nats, in order); best: the final loss of the sweep's best run."""
    losses = np.asarray(losses, float)
    n = len(losses)
    if has_diverged(losses):
        return "diverged"
    if n < 3:
        return "slow"

    # The curve, smoothed by medians that a single spike does not move, and its lowest level so far.
    width = min(max(1, n // 25), 8)
    curve = np.median(np.lib.stride_tricks.sliding_window_view(losses, width), axis=1)
    lowest = np.minimum.accumulate(curve)
    sigma = min(NOISE_CAP, np.median(np.abs(np.diff(losses, 2))) / 0.6745 / 6 ** 0.5)
    spike = (losses[width:] - lowest[:-1]).max()
    rise = (curve - lowest).max()
    rose = spike > max(SPIKE, SPIKE_SIGMAS * sigma) or rise > max(RISE, RISE_SIGMAS * sigma / width ** 0.5)

    # Where it ended: the lowest of its last tenth, so that a spike at the very end is not a divergence.
    end = curve[-max(3, n // 10):].min()
    learned = losses[0] - end
    if learned < max(LEARNED, 5 * sigma):
        return "diverged" if rose and rise > GONE else "slow"
    if rose and end - lowest[-1] > max(STAYS_UP, rise / 3):
        return "diverged"
    early, middle, late = [np.median(third) for third in np.array_split(losses, 3)]
    if best is not None and learned < HALF * (losses[0] - best) and losses[0] - early > HALF * learned:
        return "diverged"
    if rose:
        return "unstable"
    if middle - late > STEADY * learned or (best is not None and end > best + SLOW_GAP):
        return "slow"
    return "converged"

def has_diverged(losses):
    """For stopping early: a loss is not finite, or half of them lie far above all before, and do not fall."""
    losses = np.asarray(losses, float)
    if not np.isfinite(losses).all():
        return True
    half = max(GONE_POINTS, len(losses) // 2)
    before, since = np.split(losses, [-half])
    if len(before) < 2 or since.min() < before.min() + GONE:
        return False
    return bool(np.median(since[half // 2:]) > np.median(since[:half // 2]))

# Reading: what is damaged or half written is left out, and never stops anything -------------------

COLUMNS = ("step", "lr", "train_loss", "grad_norm", "val_loss",     # of metrics.csv, those that are drawn
           "sharpness", "preconditioned_sharpness", "stability_threshold")

def read_json(path):
    """The object in a JSON file as a dict, or None where there is none that can be read."""
    try:
        return dict(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):    # a TypeError: a list, a number
        return None

def read_metrics(path):
    """metrics.csv -> {column: array}; COLUMNS are there, nan where the file has nothing."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = [""]
    head = lines[0].split(",")
    rows = []
    for line in lines[1:-1]:    # what follows the last newline is half written
        try:
            row = [float(cell or "nan") for cell in line.split(",")]
        except ValueError:
            continue
        if len(row) == len(head):
            rows.append(row)
    values = np.reshape(rows, (-1, len(head)))
    values[np.abs(values) > 1e30] = np.inf      # only damage makes these
    metrics = dict.fromkeys(COLUMNS, np.full(len(rows), np.nan)) | dict(zip(head, values.T))
    adamw = metrics["preconditioned_sharpness"]
    metrics["sharpness"] = np.where(np.isnan(adamw), metrics["sharpness"], adamw)
    metrics["sharpness_ratio"] = metrics["sharpness"] / metrics["stability_threshold"]
    return metrics

def read_run(dir):
    """The run in a folder; train: the rows of steps, not of evaluations. None: no readable config.json."""
    dir = Path(dir)
    config = read_json(dir / "config.json")
    try:
        lr = float(config["args"]["lr"])
        seed = int(config["args"]["seed"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if not 0 < lr < np.inf:   # no place on a log axis
        return None
    metrics = read_metrics(dir / "metrics.csv")
    train = {name: column[np.isfinite(metrics["lr"])] for name, column in metrics.items()}
    summary = read_json(dir / "summary.json") or {}
    status = str(summary.get("status", "running"))
    return dict(dir=dir, name=dir.name, config=config, args=config["args"], lr=lr, seed=seed, metrics=metrics,
                train=train, summary=summary, status=status, setting=f"seed {seed}")

def read_runs(dir):
    """All runs directly under dir, ordered by rate and seed."""
    runs = [read_run(path) for path in Path(dir).iterdir() if path.is_dir()]
    return sorted(filter(None, runs), key=lambda run: (run["lr"], run["seed"], run["name"]))

# Drawing: helpers ---------------------------------------------------------------------------------

COLOURS = {"best": "#0072B2", "unstable": "#E69F00", "diverged": "#D55E00"}   # safe for colour-blind readers
LABELS = {"train_loss": "training loss (nats a token)", "val_loss": "validation loss (nats a token)",
          "lr": "learning rate of the step", "grad_norm": "gradient norm before clipping",
          "final_train_loss": "final training loss (nats a token)", "status": "worst status of the seeds",
          "sharpness": "sharpness (dashed: threshold)",
          "sharpness_ratio": "sharpness / threshold, at most 10, in the second half"}
DETAILS = ("val_loss", "val_accuracy", "val_perplexity", "max_grad_norm", "accuracy_per_minute", "status")
LOG = ("lr", "grad_norm", "max_grad_norm", "sharpness", "sharpness_ratio", "final_train_loss")

def looks(runs):
    """{(setting, lr): (x on an axis of rates, style)}: colour tells the rate, kind of line the setting."""
    from matplotlib import colormaps
    found = {}
    for run in runs:
        found.setdefault((run["setting"], run["lr"]), []).append(str(run["status"]))
    settings, rates = [sorted(set(values)) for values in zip(*found)]
    look = {}
    for (setting, lr), statuses in found.items():
        i = settings.index(setting)
        shade = rates.index(lr) / len(rates)    # below 1: the last of viridis, yellow, pales on white
        if len(rates) == 1:     # then colour tells the settings
            shade = i / len(settings)
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
        style = dict(color=colormaps["viridis"](shade), linestyle=("-", "--", ":", "-.")[i % 4],
                     label=f"{lr:g} {setting} ({counts})".replace("  ", " "))
        look[setting, lr] = (lr * 1.01 ** i, style)
    return look

def figure(columns, height=5.5):
    """A Figure (inches), without pyplot's global state, whose axes are a panel a column, in order."""
    from matplotlib.figure import Figure
    rows = 1 + len(columns) // 6
    across = math.ceil(len(columns) / rows)
    fig = Figure(figsize=(1.5 + 5 * across, height * rows), dpi=130, layout="constrained")
    fig.subplots(rows, across)
    for ax, column in zip(fig.axes, columns):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set(xlabel="step", ylabel=LABELS.get(column, column.replace("_", " ")))
        ax.locator_params(axis="x", integer=True)
        if column in LOG:   # plain numbers at 1, 2 and 5 x 10^k; a short axis has more of them
            ax.set_yscale("log", subs=[2, 5])
            ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    return fig

def save(fig, path):
    """With one legend beside the panels; written aside and renamed, so that none sees half a picture."""
    legend = {label: line for ax in fig.axes for line, label in zip(*ax.get_legend_handles_labels())}
    box = fig.legend(legend.values(), legend.keys(), loc="outside right upper", frameon=False, fontsize=8,
                     handlelength=4, ncols=1 + len(legend) // 28)
    width = box.get_window_extent().width / fig.dpi     # inches, beside the panels and not out of them
    fig.set_figwidth(fig.get_figwidth() + width)
    aside = path.with_name(path.name + ".tmp")
    fig.savefig(aside, format="png")
    return aside.replace(path)

def points(run, column):
    """Steps and values of a column, averaged in blocks to at most 50: minibatch noise hides who is lower."""
    rows = np.stack([run["metrics"]["step"], run["metrics"][column]])
    rows = rows[:, np.isfinite(rows).all(axis=0)]
    block = max(1, math.ceil(rows.shape[1] / 50))
    rest = rows.shape[1] % block
    return rows[:, rest:].reshape(2, -1, block).mean(axis=2)    # (2, points)

def loss_axis(ax, losses):
    """An upward axis, logarithmic in the distance from a little below the lowest: tells close ends apart."""
    if not len(losses):
        return
    lowest = min(losses)
    span = max(np.ptp(losses), 0.05)
    gap = max(min(0.1 * span, lowest + 0.001), 1e-4 * span)     # a loss below 0 is a damaged one
    floor = lowest - gap
    ticks = floor + np.geomspace(gap, gap + span, 7)
    digits = int(1 - np.log10(ticks[1] - ticks[0]))     # that tell the lowest two apart
    def to_height(loss):
        return np.log(np.maximum(loss - floor, 1e-6))
    def to_loss(height):
        return np.exp(height) + floor
    ax.set_yscale("function", functions=(to_height, to_loss))
    ax.set_yticks(np.round(ticks, digits))
    ax.set_ylim(floor + 0.8 * gap, lowest + 1.05 * span)

def draw_curves(runs, look, columns):
    """A panel a column against the step; the axis of a loss is set by the runs that survived."""
    fig = figure(columns)
    for ax, column in zip(fig.axes, columns):
        if column.endswith("loss"):   # from the lowest to where they began
            alive = [points(run, column)[1] for run in runs if run["status"] != "diverged"]
            loss_axis(ax, [loss for values in alive for loss in np.minimum(values, values[:1])])
        for run in runs:
            steps, values = points(run, column)
            _, style = look[run["setting"], run["lr"]]
            if column == "sharpness":
                thresholds = points(run, "stability_threshold")
                ax.plot(*thresholds, "--", linewidth=1, color=style["color"])
                values = np.minimum(values, 10 * max(thresholds[1], default=np.inf))
            ax.plot(steps, values, linewidth=1.3, **style)
            if run["status"] == "diverged" and len(steps):  # an x where it ended, or left the axis
                last = np.clip(values[-1], *ax.get_ylim())
                ax.plot(steps[-1], last, "x", color=style["color"], clip_on=False)
    return fig

# The pictures of a run and of a sweep -------------------------------------------------------------

def draw_run(dir):
    """In its folder: loss_curves.png, lr_schedule.png; router.png, sharpness.png where known. -> paths"""
    run = read_run(dir)
    if run is None or not len(run["train"]["step"]):
        return []
    look = looks([run])
    pictures = {"loss_curves.png": draw_curves([run], look, ["train_loss", "val_loss", "grad_norm"]),
                "lr_schedule.png": draw_curves([run], look, ["lr"])}
    if points(run, "sharpness").size:
        pictures["sharpness.png"] = draw_curves([run], look, ["sharpness", "train_loss"])
    experts = [name for name in run["train"] if name.startswith("share_L")]   # share_L0_E0, share_L0_E1 ...
    if experts:
        share = [points(run, name)[1] for name in experts]   # (layers * experts, points)
        fig = figure(["expert, layer after layer"], height=1.5 + 0.16 * len(share))
        box = (0, run["train"]["step"][-1], len(share), 0)
        image = fig.axes[0].imshow(share, vmin=0, aspect="auto", extent=box)
        fig.colorbar(image, label="share of its layer's assignments")
        pictures["router.png"] = fig
    return [save(fig, run["dir"] / name) for name, fig in pictures.items()]

def draw_sweep(dir, runs, insights):
    """All of them, from runs with status, loss and setting as sweep.analyse leaves them, and its insights."""
    look = looks(runs)
    rows = [dict(row, setting=s["label"]) for s in insights["settings"] for row in s["rates"]]
    pictures = {"lr_sweep_comparison.png": draw_curves(runs, look, ["train_loss", "val_loss"]),
                "lr_vs_final_loss.png": draw_losses(runs, look, rows, insights),
                "detailed_comparison.png": draw_rates(look, rows, DETAILS),
                "lr_schedules.png": draw_curves(runs, look, ["lr"]),
                "summary_table.png": draw_table(rows)}
    if any(points(run, "sharpness").size for run in runs):
        pictures["sharpness.png"] = draw_curves(runs, look, ["sharpness", "train_loss"])
    if any(points(run, "sharpness_ratio").size for run in runs):    # Muon has no threshold
        pictures["edge_of_stability.png"] = draw_edge(runs, look)
    return [save(fig, Path(dir) / name) for name, fig in pictures.items()]

def draw_rates(look, rows, columns):
    """A panel a column of insights' rows, against the rate; an x on top: some of its runs diverged."""
    fig = figure(columns)
    rates = sorted({lr for _, lr in look})
    for ax, column in zip(fig.axes, columns):
        ax.set(xscale="log", xlabel="peak learning rate (x: diverged)")
        ax.set_xticks(rates, [f"{lr:g}" for lr in rates], rotation=90, fontsize=8)
        ax.xaxis.minorticks_off()
        if column == "status":
            ax.yaxis.update_units(STATUSES)     # an axis of names, in this order
        before = {}     # setting: its last point, from which a line in this rate's colour leads here
        for row in rows:
            setting, y = row["setting"], row[column]    # None is not drawn
            x, style = look[setting, row["lr"]]
            style = style | dict(label=None if setting in before else setting)
            x0, y0 = before.get(setting, (x, y))
            ax.plot([x0, x], [y0, y], marker="o", markevery=[1], linewidth=1, **style)
            before[setting] = x, y
            if row["diverged"]:
                ax.plot(x, 1, "x", color=style["color"], clip_on=False, transform=ax.get_xaxis_transform())
    return fig

def draw_losses(runs, look, rows, insights):
    """Final loss against rate; for the setting to use, where its optimum lies and its two edges."""
    fig = draw_rates(look, rows, ["val_loss"])
    [ax] = fig.axes
    finished = [run for run in runs if run["loss"] is not None and run["loss"] < np.inf]
    loss_axis(ax, [run["loss"] for run in finished])
    ax.set_xlabel("peak learning rate (small: a run, orange if unstable; large: mean; x: diverged)")
    for run in finished:
        x, style = look[run["setting"], run["lr"]]
        ax.plot(x, run["loss"], ".", color=COLOURS.get(run["status"], style["color"]))
    use = insights["use"]
    if use:
        blue = dict(color=COLOURS["best"], zorder=0)
        left, right = ax.get_xlim()     # the optimum may lie beyond the rates tried
        if use["low"] or use["high"]:   # else nothing is known of it
            limits = (use["low"] or left, use["high"] or right)
            ax.axvspan(*limits, alpha=0.12, label="holds the optimum", **blue)
        ax.axvline(use["lr"], label=f"use {use['lr']:g} {use['setting']}", **blue)
        [edge] = [s["edge"] for s in insights["settings"] if s["label"] == use["setting"]]
        for status, line in zip(EDGE, (":", "--")):
            if status in edge:
                lr = edge[status]["lr"]
                label = f"first {status}: {lr:g}"
                ax.axvline(lr, color=COLOURS[status], linestyle=line, zorder=0, label=label)
    return fig

def draw_edge(runs, look):
    """Against the rate: sharpness over its threshold in the second half of the run, and the final loss."""
    fig = draw_rates(look, [], ["sharpness_ratio", "final_train_loss"])
    fig.axes[0].axhline(1, color=COLOURS["unstable"])
    for run in runs:
        x, style = look[run["setting"], run["lr"]]
        marker = "x" if run["status"] == "diverged" else "o"
        ratios = np.minimum(10, points(run, "sharpness_ratio")[1])
        _, losses = points(run, "train_loss")
        for ax, values in zip(fig.axes, (ratios[len(ratios) // 2:], losses[-1:])):
            ax.plot([x] * len(values), values, marker=marker, **style)
    return fig

def draw_table(rows):
    """The numbers of each rate."""
    names = ("setting", "lr", "seeds", "status", "val_loss", "deviation", "val_accuracy", "val_perplexity",
             "val_bpb", "max_grad_norm")
    cells = [names]
    for row in rows:
        values = [row[name] for name in names]
        cells.append([f"{x:.4g}" if isinstance(x, float) else str(x or "") for x in values])
    widths = [max(map(len, column)) for column in zip(*cells)]      # in letters
    fig = figure([""])
    fig.set_size_inches(0.1 * sum(widths), 0.22 * len(cells))
    fig.axes[0].axis("off")
    fig.axes[0].table(cells, colWidths=widths, bbox=(0, 0, 1, 1))
    return fig

# Command line -------------------------------------------------------------------------------------

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Draw a run, or report on a sweep.")
    parser.add_argument("folder", type=Path, help="of a run or of a sweep, such as runs/tiny")
    folder = parser.parse_args().folder
    try:
        paths = draw_run(folder)
    except OSError as error:
        parser.error(f"nothing drawn in {folder}: {error}")
    if not paths:
        print(f"no steps of one run there; python sweep.py --report {folder} draws a sweep", flush=True)
        sweep = Path(__file__).with_name("sweep.py")
        sys.exit(subprocess.run([sys.executable, sweep, "--report", folder]).returncode)
    print(*paths, sep="\n")
