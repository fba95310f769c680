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
import json
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
    """For stopping early: a loss is not finite, or half of them lie far above all before, and do not fall."""
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
    """metrics.csv -> {column: array}; COLUMNS and HESSIAN are there, nan where the file has nothing."""
    head = []
    rows = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            head = file.readline().strip().split(",")
            for line in file:
                try:
                    row = [float(cell or "nan") for cell in line.strip("\n").split(",")]
                except ValueError:
                    continue
                if len(row) == len(head) and line.endswith("\n"):
                    rows.append(row)
    except OSError:
        pass
    found = dict(zip(head, np.reshape(rows, (-1, max(1, len(head)))).T))
    metrics = dict.fromkeys(COLUMNS + HESSIAN, np.full(len(rows), np.nan)) | found
    preconditioned = metrics["preconditioned_sharpness"]    # AdamW's
    metrics["sharpness"] = np.where(np.isnan(preconditioned), metrics["sharpness"], preconditioned)
    metrics["sharpness_ratio"] = metrics["sharpness"] / metrics["stability_threshold"]
    return metrics

def read_run(dir):
    """The run in a folder, train and val: its steps and its evaluations; None: no readable config.json."""
    dir = Path(dir)
    config = read_json(dir / "config.json") or {}
    try:
        lr = float(config["args"]["lr"])
        seed = int(config["args"]["seed"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if not 0 < lr < np.inf:   # no place on a log axis
        return None
    metrics = read_metrics(dir / "metrics.csv")
    train, val = [{name: column[np.isfinite(metrics[key])] for name, column in metrics.items()}
                  for key in ("lr", "val_loss")]
    return dict(dir=dir, name=dir.name, config=config, args=config["args"], lr=lr, seed=seed,
                summary=read_json(dir / "summary.json") or {}, metrics=metrics, train=train, val=val)

def read_runs(dir):
    """All runs directly under dir, ordered by rate and seed."""
    runs = [read_run(path) for path in Path(dir).iterdir() if path.is_dir()]
    return sorted(filter(None, runs), key=lambda run: (run["lr"], run["seed"], run["name"]))

# --------------------------------------------------------------------------------------------------
# Drawing: helpers

COLOURS = {"best": "#0072B2", "unstable": "#E69F00", "diverged": "#D55E00"}   # safe for colour-blind readers
LABELS = {"train_loss": "training loss (nats a token)", "val_loss": "validation loss (nats a token)",
          "lr": "learning rate of the step", "grad_norm": "gradient norm before clipping",
          "val_accuracy": "next-token accuracy", "val_perplexity": "perplexity",
          "max_grad_norm": "largest gradient norm", "accuracy_per_minute": "accuracy a minute",
          "status": "worst status of the seeds", "table": "", "router": "expert, layer after layer",
          "sharpness": "sharpness (dashed: threshold)",
          "sharpness_ratio": "sharpness / threshold, at most 10: median and peak of the second half"}
LOG = ("lr", "grad_norm", "max_grad_norm", "sharpness", "sharpness_ratio")

def rate(lr):
    """A rate as people write it: 3e-4, 2.1e-3, 0.065."""
    if 0.01 <= lr < 1000:
        return f"{lr:.3g}"
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"

def figure(width, height, columns, rows=1):
    """A Figure (inches) without pyplot's global state, and its axes: a panel a column, in order."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = fig.subplots(rows, len(columns) // rows, squeeze=False).flatten()
    for ax, column in zip(axes, columns):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_ylabel(LABELS[column])
        if column in LOG:   # plain numbers at 1, 2 and 5 x 10^k; a short axis has more of them
            ax.set_yscale("log", subs=[2, 5])
            ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    return fig, axes

def save(fig, path):
    """Written aside and renamed: a reader never sees half a picture. Returns the path."""
    aside = path.with_name(path.name + ".tmp")
    fig.savefig(aside, format="png")
    return aside.replace(path)

def points(run, column):
    """Steps and values of a column, averaged in blocks to at most 100: minibatch noise hides who is lower."""
    rows = np.stack([run["metrics"]["step"], run["metrics"][column]])
    rows = rows[:, np.isfinite(rows).all(axis=0)]
    block = 1 + rows.shape[1] // 100
    whole = rows.shape[1] // block * block
    return rows[:, :whole].reshape(2, -1, block).mean(axis=2)   # (2, points)

def loss_axis(ax, losses):
    """An upward axis, logarithmic in the distance from a little below the lowest: tells close ends apart."""
    if not len(losses):
        return
    lowest = min(losses)
    span = max(np.ptp(losses), 0.05)
    floor = max(-0.001, lowest - 0.1 * span)
    ticks = floor + np.geomspace(lowest - floor, lowest - floor + span, 7)
    ax.set_yscale("function", functions=(lambda loss: np.log(np.maximum(loss - floor, 1e-6)),
                                         lambda height: np.exp(height) + floor))
    ax.set_yticks(ticks, [f"{tick:.4g}" for tick in ticks])
    ax.set_ylim(ticks[0] - 0.2 * (lowest - floor), ticks[-1] + 0.05 * span)

def looks(runs):
    """{(setting, lr): (x on an axis of rates, style)}: colour tells the rate, kind of line the setting."""
    from matplotlib import colormaps
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    rates = sorted({run["lr"] for run in runs})
    look = {}
    for run in runs:
        i = settings.index(run["setting"])
        shade = rates.index(run["lr"]) / len(rates)   # below 1: the last of viridis, yellow, pales on white
        if len(rates) == 1:     # then colour tells the settings
            shade = i / len(settings)
        style = dict(color=colormaps["viridis"](shade), linestyle=("-", "--", ":", "-.")[i % 4])
        look[run["setting"], run["lr"]] = (run["lr"] * 1.04 ** i, style)
    return look

def legend(fig, runs, look):
    """Beside the panels: a line for a rate, with how many of its runs were at the edge."""
    handles = []
    for setting, lr in sorted(look, key=lambda key: (key[0], -key[1])):
        label = f"{rate(lr)} {setting}".strip()
        found = [run["status"] for run in runs if (run["setting"], run["lr"]) == (setting, lr)]
        for status in EDGE:
            if status in found:
                label += f", {found.count(status)} of {len(found)} {status}"
        handles += fig.axes[0].plot([], [], label=label, **look[setting, lr][1])
    fig.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8,
               ncols=1 + len(handles) // 28)

def draw_curves(runs, look, columns):
    """A panel a column against the step; the axis of a loss is set by the runs that survived."""
    fig, axes = figure(5 + 4 * len(columns), 5.5, columns)
    for ax, column in zip(axes, columns):
        curves = [(run, *points(run, column)) for run in runs]
        ax.set_xlabel("step")
        if column.endswith("loss"):   # from the lowest to where they began
            alive = [values for run, _, values in curves if run["status"] != "diverged"]
            loss_axis(ax, [loss for values in alive for loss in np.minimum(values, values[:1])])
        for run, steps, values in curves:
            _, style = look[run["setting"], run["lr"]]
            if column == "sharpness":
                thresholds = points(run, "stability_threshold")
                ax.plot(*thresholds, linewidth=1, color=style["color"], linestyle="--")
                values = np.minimum(values, 10 * max(thresholds[1], default=np.inf))
            ax.plot(steps, values, linewidth=1.3, **style)
            if run["status"] == "diverged" and len(steps):   # an x where it ended, or left the axis
                last = np.clip(values[-1], *ax.get_ylim())
                ax.plot(steps[-1], last, "x", color=style["color"], clip_on=False)
    legend(fig, runs, look)
    return fig

# --------------------------------------------------------------------------------------------------
# The pictures of a run and of a sweep

def draw_run(dir):
    """In its folder: loss_curves.png, lr_schedule.png; router.png, sharpness.png where known. -> paths"""
    run = read_run(dir)
    if run is None or not len(run["train"]["step"]):
        return []
    run["status"] = run["summary"].get("status", "running")
    run["setting"] = f"seed {run['seed']}: {run['status']}"
    look = looks([run])
    pictures = {"loss_curves.png": draw_curves([run], look, ["train_loss", "val_loss", "grad_norm"]),
                "lr_schedule.png": draw_curves([run], look, ["lr"])}
    if np.isfinite(run["metrics"]["sharpness"]).any():
        pictures["sharpness.png"] = draw_curves([run], look, ["sharpness", "train_loss"])
    experts = [name for name in run["train"] if name.startswith("share_L")]   # share_L0_E0, share_L0_E1 ...
    if experts:
        share = [points(run, name)[1] for name in experts]   # (layers * experts, points)
        fig, [ax] = figure(9, 1.5 + 0.16 * len(share), ["router"])
        ax.set_xlabel("step")
        image = ax.imshow(share, vmin=0, aspect="auto", extent=(0, run["train"]["step"][-1], len(share), 0))
        fig.colorbar(image, label="share of its layer's assignments")
        pictures["router.png"] = fig
    return [save(fig, run["dir"] / name) for name, fig in pictures.items()]

def draw_sweep(dir, runs, insights):
    """All of them, from runs with status, loss and setting as sweep.analyse leaves them, and its insights."""
    look = looks(runs)
    pictures = {"lr_sweep_comparison.png": draw_curves(runs, look, ["train_loss", "val_loss"]),
                "lr_vs_final_loss.png": draw_losses(runs, look, insights),
                "detailed_comparison.png": draw_details(runs, look, insights),
                "lr_schedules.png": draw_curves(runs, look, ["lr"]),
                "summary_table.png": draw_table(insights)}
    measured = [run for run in runs if np.isfinite(run["metrics"]["sharpness"]).any()]
    if measured:
        pictures["sharpness.png"] = draw_curves(measured, look, ["sharpness", "train_loss"])
        pictures["edge_of_stability.png"] = draw_edge(measured, look)
    return [save(fig, Path(dir) / name) for name, fig in pictures.items()]

def draw_edge(runs, look):
    """Against the rate: sharpness over its threshold in the second half of the run, and the final loss."""
    fig, axes = figure(13, 5.5, ["sharpness_ratio", "train_loss"])
    axes[0].axhline(1, color=COLOURS["unstable"])
    axes[1].set_yscale("log")
    for run in runs:
        x, style = look[run["setting"], run["lr"]]
        marker = "x" if run["status"] == "diverged" else "o"
        for ax, column in zip(axes, ("sharpness_ratio", "train_loss")):
            _, values = points(run, column)
            second_half = np.minimum(values[len(values) // 2:], 10 if column == "sharpness_ratio" else np.inf)
            heights = [np.median(second_half), second_half.max()]
            if column == "train_loss":
                heights = values[-1:]
            ax.plot([x] * len(heights), heights, marker, color=style["color"])
    for ax in axes:
        ax.set(xscale="log", xlabel="peak learning rate (x: diverged)")
    legend(fig, runs, look)
    return fig

def draw_panel(ax, look, insights, column):
    """A column of insights' rates against the rate; x: some of its runs diverged; a line joins the others."""
    rates = sorted({lr for _, lr in look})
    ax.set(xscale="log", xlabel="peak learning rate (x: diverged)")
    ax.set_xticks(rates, [rate(lr) for lr in rates], rotation=90, fontsize=8)
    ax.xaxis.minorticks_off()
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
    fig, [ax] = figure(11, 6, ["val_loss"])
    draw_panel(ax, look, insights, "val_loss")
    loss_axis(ax, [run["loss"] for run in runs if run["loss"] not in (None, np.inf)])
    ax.set_xlabel("peak learning rate (small: a run, orange if unstable; large: mean; x: diverged)")
    for run in runs:
        x, style = look[run["setting"], run["lr"]]
        if run["loss"] is not None:
            ax.plot(x, run["loss"], ".", color=COLOURS.get(run["status"], style["color"]))
    use = insights["use"]
    if use:
        blue = dict(color=COLOURS["best"], zorder=0)
        ax.axvline(use["lr"], label=f"use {rate(use['lr'])} {use['setting']}", **blue)
        left, right = ax.get_xlim()     # it may lie beyond the rates tried
        ax.axvspan(use["low"] or left, use["high"] or right, alpha=0.12, label="holds the optimum", **blue)
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
    columns = ("val_loss", "val_accuracy", "val_perplexity", "max_grad_norm", "accuracy_per_minute", "status")
    fig, axes = figure(16, 8.4, columns, rows=2)
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
    fig, [ax] = figure(13, 0.3 + 0.3 * len(cells), ["table"])
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
        if read_runs(dir):
            print(f"a sweep's folder: python sweep.py --report {dir} analyses and draws it", flush=True)
            sweep = Path(__file__).with_name("sweep.py")
            return subprocess.run([sys.executable, sweep, "--report", dir]).returncode
        problem = "no config.json and metrics.csv of a run that can be read, and no runs"
    except OSError as error:
        problem = error
    print(f"plot.py: nothing drawn in {dir}: {problem}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
