"""Read the folders of runs, name what their loss curves did, and draw them.

A run is a folder with config.json, metrics.csv and summary.json (train.py writes it); a sweep is a folder of
runs. A picture can be drawn again at any time, from whatever has arrived.

    status      what the curve of training losses looks like; the thresholds are the block below
    diverged    not finite; or it rose and stays up to its end; or it is back where it started; or, beside a
                better run, it fell early and learned less than half as much: too high a rate to learn with
    unstable    it jumped, or its smoothed curve rose, beyond the noise, and came back: the edge of stability
    slow        it has learned nothing yet; or it falls as steadily as a straight line; or, beside a better
                run, it ended well above it (too low a rate, or too high a one that survived)
    converged   none of these: it fell and flattened

"Beyond the noise" needs sigma, the noise of the minibatches. Second differences of a smooth curve plus noise
have the variance 6 sigma^2, and their median absolute value does not see the few spikes that we look for:

    sigma = median |loss[i+1] - 2 loss[i] + loss[i-1]| / (0.6745 sqrt 6)

Colours are viridis (even steps to the eye, safe for colour-blind readers, ordered in grey print) by the rank
of the rate, so that a rate has one colour in every picture of a sweep.

    python plot.py runs/tiny/lr0.003-s0   a run: loss_curves.png, lr_schedule.png, router.png for experts
    python plot.py runs/tiny              a sweep: starts python sweep.py --report, which draws and analyses
"""
import array
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

# --------------------------------------------------------------------------------------------------
# Status of a loss curve: thresholds in nats, unless they say otherwise

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
    """Is it hopeless already? For stopping early: must not fire on a run that can still recover from a spike.

    True when a loss is not finite, or when half of the losses lie far above all before and do not come down.
    """
    losses = np.asarray(losses, float)
    if not np.isfinite(losses).all():
        return True
    half = max(GONE_POINTS, len(losses) // 2)
    before = losses[:-half]
    since = losses[-half:]
    if len(before) < 2 or since.min() < before.min() + GONE:
        return False
    return bool(np.median(since[half // 2:]) > np.median(since[:half // 2]))

# --------------------------------------------------------------------------------------------------
# Reading: what is damaged or half written is left out, and never stops anything

COLUMNS = ("step", "tokens", "elapsed", "lr", "train_loss", "grad_norm", "tokens_per_sec",
           "val_loss", "val_accuracy", "val_perplexity", "val_bpb")
HESSIAN = ("sharpness", "preconditioned_sharpness", "stability_threshold")      # with train.py --sharpness

def read_json(path):
    """The object in a JSON file as a dict, or None where there is none that can be read."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

def read_metrics(path):
    """metrics.csv -> train, val, hessian: {column: array} of rows of steps (they have an lr), of evaluations
    and of measurements of the sharpness.

    COLUMNS and HESSIAN are there, nan where the file has nothing; damaged and unfinished rows are left out.
    Numbers go into one flat array of doubles: a million rows take 2 seconds.
    """
    head = []
    table = array.array("d")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            head = file.readline().strip().split(",")
            for line in file:
                try:
                    row = [float(cell or "nan") for cell in line.strip("\n").split(",")]
                except ValueError:
                    continue
                if len(row) == len(head) and line.endswith("\n"):
                    table.extend(row)
    except OSError:
        pass
    rows = np.array(table).reshape(-1, max(1, len(head)))
    columns = dict.fromkeys(COLUMNS + HESSIAN, np.full(len(rows), np.nan)) | dict(zip(head, rows.T))
    kinds = [np.isfinite(columns[name]) for name in ("lr", "val_loss", "sharpness")]
    return [{name: column[kind] for name, column in columns.items()} for kind in kinds]

def read_run(dir):
    """{dir, name, config, args, lr, seed, summary, train, val, hessian}; None: no readable config.json."""
    dir = Path(dir)
    config = read_json(dir / "config.json") or {}
    try:
        lr = float(config["args"]["lr"])
        seed = int(config["args"]["seed"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if not 0 < lr < np.inf:   # no place on a log axis
        return None
    train, val, hessian = read_metrics(dir / "metrics.csv")
    return dict(dir=dir, name=dir.name, config=config, args=config["args"], lr=lr, seed=seed,
                summary=read_json(dir / "summary.json") or {}, train=train, val=val, hessian=hessian)

def read_runs(dir):
    """All runs directly under dir, ordered by rate and seed."""
    runs = [read_run(path) for path in Path(dir).iterdir() if path.is_dir()]
    return sorted(filter(None, runs), key=lambda run: (run["lr"], run["seed"], run["name"]))

# --------------------------------------------------------------------------------------------------
# Drawing: helpers

COLOURS = {"best": "#0072B2", "unstable": "#E69F00", "diverged": "#D55E00"}   # safe for colour-blind readers
LINES = ("-", "--", ":", "-.")
LABELS = {"train_loss": "training loss (nats a token)", "val_loss": "validation loss (nats a token)",
          "lr": "learning rate of the step", "grad_norm": "gradient norm before clipping",
          "val_accuracy": "next-token accuracy", "val_perplexity": "perplexity",
          "max_grad_norm": "largest gradient norm", "accuracy_per_minute": "accuracy a minute",
          "status": "worst status of the seeds"}
LOG = ("lr", "grad_norm", "max_grad_norm")

def rate(lr):
    """A rate as people write it: 3e-4, 2.1e-3, 0.065."""
    if 0.01 <= lr < 1000:
        return f"{lr:.3g}"
    mantissa, exponent = f"{lr:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"

def figure(width, height, rows=1, cols=1):
    """A Figure (inches) on an Agg canvas, without pyplot's display and global state; its axes in order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, cols, squeeze=False).flatten()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return fig, axes

def save(fig, path):
    """Written aside and renamed: a reader never sees half a picture. Returns the path."""
    aside = path.with_name(path.name + ".tmp")
    fig.savefig(aside, format="png")
    return aside.replace(path)

def points(run, column):
    """Steps and values of a column, averaged in blocks to at most 100: minibatch noise hides who is lower."""
    part = "val" if column == "val_loss" else "train"
    rows = np.stack([run[part]["step"], run[part][column]])
    rows = rows[:, np.isfinite(rows).all(axis=0)]
    block = 1 + rows.shape[1] // 100
    whole = rows.shape[1] // block * block
    return rows[:, :whole].reshape(2, -1, block).mean(axis=2)   # (2, points)

def loss_axis(ax, losses):
    """An upward axis for losses (nats), logarithmic in the distance from a little below the lowest.

    It tells losses apart that end close together, and gives little room to the early fall that runs share.
    """
    if not len(losses):
        return
    span = max(np.ptp(losses), 0.05)
    floor = min(losses) - 0.1 * span
    ticks = floor + span * np.array([0.1, 0.15, 0.22, 0.32, 0.48, 0.72, 1.1])
    ax.set_yscale("function", functions=(lambda y: np.log(np.maximum(y - floor, 1e-6)),
                                         lambda z: np.exp(z) + floor))
    ax.set_ylim(floor + 0.08 * span, floor + 1.15 * span)
    ax.set_yticks(ticks, [f"{tick:.4g}" for tick in ticks])

def looks(runs):
    """{(setting, lr): (x, style)}: colour tells the rate, the kind of line the setting.

    x is the place on an axis of rates, settings side by side. With one rate, colour tells the settings.
    """
    from matplotlib import colormaps
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    rates = sorted({run["lr"] for run in runs})
    look = {}
    for run in runs:
        i = settings.index(run["setting"])
        shade = rates.index(run["lr"]) / len(rates)   # below 1: the last of viridis, yellow, pales on white
        if len(rates) == 1:
            shade = i / len(settings)
        style = dict(color=colormaps["viridis"](shade), linestyle=LINES[i % len(LINES)])
        look[run["setting"], run["lr"]] = (run["lr"] * 1.04 ** i, style)
    return look

def legend(fig, runs, look):
    """Beside the panels: a line for a rate, with how many of its runs were at the edge."""
    from matplotlib.lines import Line2D
    handles = []
    for setting, lr in sorted(look, key=lambda key: (key[0], -key[1])):
        found = [run["status"] for run in runs if (run["setting"], run["lr"]) == (setting, lr)]
        notes = [f"{found.count(status)} of {len(found)} {status}" for status in EDGE if status in found]
        _, style = look[setting, lr]
        handles.append(Line2D([], [], label=", ".join(filter(None, [rate(lr), setting, *notes])), **style))
    columns = 1 + len(handles) // 28
    fig.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8, ncols=columns)

def draw_curves(runs, look, columns):
    """A panel a column against the step; the axis of a loss is set by the runs that survived."""
    fig, axes = figure(5 + 4 * len(columns), 5.5, 1, len(columns))
    for ax, column in zip(axes, columns):
        curves = [(run, *points(run, column)) for run in runs]
        ax.set(xlabel="step", ylabel=LABELS[column])
        if column in LOG:
            ax.set_yscale("log")
        else:   # from the lowest to where they began
            alive = [values for run, _, values in curves if run["status"] != "diverged"]
            loss_axis(ax, [loss for values in alive for loss in np.minimum(values, values[:1])])
        for run, steps, values in curves:
            _, style = look[run["setting"], run["lr"]]
            ax.plot(steps, values, linewidth=1.3, **style)
            if run["status"] == "diverged" and len(steps):   # an x where it ended, or left the axis
                top = min(values[-1], ax.get_ylim()[1])
                ax.plot(steps[-1], top, "x", color=style["color"], clip_on=False)
    legend(fig, runs, look)
    return fig

def edge_of_stability(run):
    """Steps, sharpness (AdamW: the preconditioned one) and the threshold above which a quadratic diverges."""
    rows = run["hessian"]
    preconditioned = rows["preconditioned_sharpness"]
    sharpness = np.where(np.isfinite(preconditioned), preconditioned, rows["sharpness"])
    return rows["step"], sharpness, rows["stability_threshold"]

def draw_sharpness(runs, look):
    """The sharpness (up to 10 times its threshold) against the step, thresholds dashed; the loss beneath."""
    fig, [top, bottom] = figure(10, 8, 2)
    top.set(yscale="log", ylabel="sharpness; dashed: threshold")
    bottom.set(yscale="log", ylabel=LABELS["train_loss"], xlabel="step")
    for run in runs:
        _, style = look[run["setting"], run["lr"]]
        steps, sharpness, threshold = edge_of_stability(run)
        sharpness[sharpness > 10 * threshold] = np.nan
        top.plot(steps, sharpness, linewidth=1.3, **style)
        top.plot(steps, threshold, linewidth=1, color=style["color"], linestyle="--")
        steps, losses = points(run, "train_loss")
        bottom.plot(steps, np.minimum(losses, losses[:1]), linewidth=1.3, **style)
    legend(fig, runs, look)
    return fig

def draw_edge(runs, look):
    """What the second half of each run came to: sharpness in units of the threshold, and the loss."""
    rates = sorted({run["lr"] for run in runs})
    fig, [left, right] = figure(14, 5, 1, 2)
    left.set(ylabel="sharpness / threshold (0.1 to 10): lowest, median, highest")
    left.axhline(1, color=COLOURS["unstable"])
    right.set(ylabel=LABELS["train_loss"])
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", xlabel="peak learning rate (x: diverged)")
        ax.set_xticks(rates, [rate(lr) for lr in rates])
        ax.minorticks_off()
    for run in runs:
        x, style = look[run["setting"], run["lr"]]
        marker = "x" if run["status"] == "diverged" else "o"
        _, sharpness, threshold = edge_of_stability(run)
        late = np.clip(sharpness / threshold, 0.1, 10)[len(sharpness) // 2:]
        left.plot([x, x, x], np.quantile(late, [0, 0.5, 1]), "-" + marker, color=style["color"])
        right.plot(x, run["train"]["train_loss"][-1], marker, color=style["color"])
    legend(fig, runs, look)
    return fig

# --------------------------------------------------------------------------------------------------
# The pictures of a run

def draw_run(dir):
    """In its folder: loss_curves.png, lr_schedule.png, router.png where there are experts. Returns paths."""
    run = read_run(dir)
    if run is None or not len(run["train"]["step"]):
        return []
    run["status"] = run["summary"].get("status", "running")
    run["setting"] = f"seed {run['seed']}: {run['status']}"
    look = looks([run])
    pictures = {"loss_curves.png": draw_curves([run], look, ["train_loss", "val_loss", "grad_norm"]),
                "lr_schedule.png": draw_curves([run], look, ["lr"])}
    if len(run["hessian"]["step"]):
        pictures["sharpness.png"] = draw_sharpness([run], look)
    experts = [name for name in run["train"] if name.startswith("share_L")]   # share_L0_E0, share_L0_E1 ...
    if experts:
        share = np.stack([points(run, name)[1] for name in experts])   # (layers * experts, points)
        fig, [ax] = figure(9, 1.5 + 0.16 * len(experts))
        image = ax.imshow(share, vmin=0, aspect="auto", extent=(0, run["train"]["step"][-1], len(experts), 0))
        ax.set(xlabel="step", ylabel="expert, layer after layer")
        fig.colorbar(image, label="share of its layer's assignments")
        pictures["router.png"] = fig
    return [save(fig, run["dir"] / name) for name, fig in pictures.items()]

# --------------------------------------------------------------------------------------------------
# The pictures of a sweep

def draw_sweep(dir, runs, insights):
    """All of them, from runs with status, loss and setting as sweep.analyse leaves them, and its insights."""
    if not runs:
        return []
    look = looks(runs)
    pictures = {"lr_sweep_comparison.png": draw_curves(runs, look, ["train_loss", "val_loss"]),
                "lr_vs_final_loss.png": draw_losses(runs, look, insights),
                "detailed_comparison.png": draw_details(runs, look, insights),
                "lr_schedules.png": draw_curves(runs, look, ["lr"]),
                "summary_table.png": draw_table(insights)}
    measured = [run for run in runs if len(run["hessian"]["step"]) and len(run["train"]["step"])]
    if measured:
        pictures["sharpness.png"] = draw_sharpness(measured, look)
        pictures["edge_of_stability.png"] = draw_edge(measured, look)
    return [save(fig, Path(dir) / name) for name, fig in pictures.items()]

def draw_panel(ax, look, insights, column):
    """A column of insights' rates against the rate; x: some of its runs diverged; a line joins the rest."""
    rates = sorted({lr for _, lr in look})
    ax.set(xscale="log", xlabel="peak learning rate", ylabel=LABELS[column])
    ax.set_xticks(rates, [rate(lr) for lr in rates], rotation=90, fontsize=8)
    ax.minorticks_off()
    if column in LOG:
        ax.set_yscale("log")
    for setting in insights["settings"]:
        alive = []
        for row in setting["rates"]:
            x, style = look[setting["label"], row["lr"]]
            value = row[column]
            if column == "status":
                value = STATUSES.index(value)
            if row["diverged"]:
                ax.plot(x, 1, "x", color=style["color"], clip_on=False, transform=ax.get_xaxis_transform())
            if value is not None:
                ax.plot(x, value, "o", color=style["color"])
                alive.append((x, value))
        ax.plot(*np.reshape(alive, (-1, 2)).T, color="#999999", linewidth=1, zorder=1)

def draw_losses(runs, look, insights):
    """Final loss against rate, the interval of the optimum, and the two edges, of the setting to use."""
    fig, [ax] = figure(11, 6)
    draw_panel(ax, look, insights, "val_loss")
    loss_axis(ax, [run["loss"] for run in runs if run["loss"] not in (None, np.inf)])
    ax.set_xlabel("peak learning rate (small: a run, orange if unstable; large: mean; x: diverged)")
    for run in runs:
        x, style = look[run["setting"], run["lr"]]
        if run["loss"] is not None:
            ax.plot(x, run["loss"], ".", color=COLOURS.get(run["status"], style["color"]))

    use = insights["use"]
    if use:
        left, right = ax.get_xlim()
        ends = [f"{side} {rate(use[end])}" for side, end in (("above", "low"), ("below", "high")) if use[end]]
        label = f"use {rate(use['lr'])} {use['setting']}"
        ax.axvline(use["lr"], color=COLOURS["best"], zorder=0, label=label)
        if ends:
            ax.axvspan(use["low"] or left, use["high"] or right, color=COLOURS["best"], alpha=0.12, zorder=0,
                       label="optimum " + " and ".join(ends))
        edges = {setting["label"]: setting["edge"] or {} for setting in insights["settings"]}
        for status, line in zip(EDGE, (":", "--")):
            first = edges[use["setting"]].get(status)
            if first:
                label = f"first {status}: {rate(first['lr'])} ({first['seeds']} of {first['of']} seeds)"
                ax.axvline(first["lr"], color=COLOURS[status], linestyle=line, zorder=0, label=label)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2, frameon=False)
    legend(fig, runs, look)
    return fig

def draw_details(runs, look, insights):
    """Six panels against the rate."""
    fig, axes = figure(16, 8.4, 2, 3)
    columns = ("val_loss", "val_accuracy", "val_perplexity", "max_grad_norm", "accuracy_per_minute", "status")
    for ax, column in zip(axes, columns):
        draw_panel(ax, look, insights, column)
    axes[5].set_yticks(range(len(STATUSES)), STATUSES)
    legend(fig, runs, look)
    return fig

def draw_table(insights):
    """The numbers of each rate."""
    names = ("val_loss", "deviation", "val_accuracy", "val_perplexity", "val_bpb", "max_grad_norm")
    cells = [("setting", "rate", "seeds", "status", *names)]
    for setting in insights["settings"]:
        for row in setting["rates"]:
            numbers = ["" if row[name] is None else f"{row[name]:.4g}" for name in names]
            cells.append((setting["label"], rate(row["lr"]), len(row["seeds"]), row["status"], *numbers))
    fig, [ax] = figure(13, 0.3 + 0.3 * len(cells))
    ax.axis("off")
    table = ax.table(cells, bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    return fig

# --------------------------------------------------------------------------------------------------
# Command line

def main(argv):
    if len(argv) != 1:
        print("plot.py: give one folder, of a run or a sweep: python plot.py runs/tiny", file=sys.stderr)
        return 2
    dir = Path(argv[0])
    try:
        paths = draw_run(dir)
        if paths:
            print(*paths, sep="\n")
            return 0
        if (dir / "sweep.json").exists() or read_runs(dir):
            print(f"a sweep's folder: python sweep.py --report {dir} analyses and draws it", flush=True)
            command = [sys.executable, str(Path(__file__).with_name("sweep.py")), "--report", str(dir)]
            return subprocess.run(command).returncode
        problem = "no config.json and metrics.csv of a run that can be read, and no runs"
    except OSError as error:
        problem = error
    print(f"plot.py: nothing drawn in {dir}: {problem}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
