"""Read run directories, name what their loss curves did, and draw them.

A run is a folder with config.json, metrics.csv and summary.json (train.py writes it); a sweep is a folder of runs.
Everything here starts from those files, so a picture can be drawn again at any time, from whatever has arrived.

    status        what the curve of training losses looks like            (thresholds: the block below)
    converged     it fell and flattened
    slow          it fell late, in a sweep to well above the best run: too low a rate, or far too high a one
    unstable      it spiked or swung, and came back: close to the edge of stability
    diverged      not finite, or it rose and stayed up: beyond the edge

`unstable` is a rise above the lowest level so far, rise > max(SPIKE, 6 sigma), with sigma the noise of the minibatches,
estimated from the curve itself by the median absolute second difference (a median does not see the spikes we look for).

Colours are viridis (perceptual, safe for colour-blind readers, ordered in grey print too), given by the rank of the
rate in the sweep, so that a rate has the same colour in every panel of every picture.

    python plot.py runs/tiny/lr0.003-s0     one run: loss_curves.png, lr_schedule.png, and router.png for experts
    python plot.py runs/tiny                a sweep: all pictures, the table and the analysis (through sweep.report)
"""
import csv
import json
import sys
from pathlib import Path

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# Thresholds, in nats unless said otherwise

SPIKE = 0.5         # a rise by half a nat is 65% more perplexity: no minibatch noise of a healthy run is that large
NOISE_CAP = 0.2     # minibatch noise of healthy small runs is 0.05 to 0.2; a noisier curve is swinging, not noisy
NOISE_SIGMAS = 6.0  # 1,000 normal draws stay within 3.3 sigma of their mean and a median of 5 within 1.8: 5.1 in all
STAYS_UP = 0.5      # ends this far above its own lowest level (or above its start) and does not come back: diverged
STAY_SHARE = 0.3    # "stays" is the last 30% of the curve, so that one late spike is not a divergence
STEADY = 0.7 / 3    # share of the whole descent made in the last third: a straight line has 1/3, a flattening run less
LATE = 0.35         # share made after the first third: a starved run under a cosine schedule has 0.5, a good one 0.2
PLATEAU = 0.15      # ... and one that sits on a plateau hardly anything; with less than half of the best's descent
STUCK = 0.5         #     it learned letter frequencies at most: a rate too high to learn, called diverged
SLOW_GAP = 0.1      # "well above the best": 10% more perplexity
EARLY_POINTS = 10   # has_diverged waits for this many points above the line: a warm-up bump is shorter
EARLY_RISE = 1.0    # and wants twice the rise that the finished curve would need
STATUSES = ("converged", "slow", "unstable", "diverged")


# ----------------------------------------------------------------------------------------------------------------------
# Status of a loss curve

def rolling_median(losses, width=5):
    """Median of each point and the up to width - 1 points before it."""
    padded = np.concatenate([np.full(width - 1, np.nan), losses])
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def noise_sigma(losses):
    """Minibatch noise: second differences of a smooth curve plus noise have variance 6 sigma^2; MAD ignores spikes."""
    return float(np.median(np.abs(np.diff(losses, 2))) / 0.6745 / 6 ** 0.5) if len(losses) > 3 else 0.0


def classify(losses, best=None):
    """Status of a curve of training losses (nats, in order, at least 2); best: final loss of the sweep's best run."""
    losses = np.asarray(losses, float)
    if has_diverged(losses):
        return "diverged"
    n = len(losses)
    if n < 2:  # too short to say more
        return "converged"
    smooth = rolling_median(losses)
    level = np.minimum.accumulate(smooth)                   # the lowest level so far, deaf to single lucky batches
    curve = smooth if n > 10 else losses
    stay = max(2, round(STAY_SHARE * n))
    if n > 2 and curve[-stay:].min() > min(losses[0], level[-stay] + STAYS_UP):
        return "diverged"
    rise = (losses[1:] - level[:-1]).max()
    if rise > max(SPIKE, NOISE_SIGMAS * min(noise_sigma(losses), NOISE_CAP)):
        return "unstable"
    start, third, two_thirds, end = np.interp([0, (n - 1) / 3, (n - 1) / 1.5, n - 1], np.arange(n), curve)
    descent = max(start - end, 1e-9)
    if best is None:
        return "slow" if (two_thirds - end) / descent >= STEADY else "converged"
    if end > best + SLOW_GAP:
        if (third - end) / descent >= LATE:
            return "slow"
        if (third - end) / descent < PLATEAU and descent < STUCK * (start - best):
            return "diverged"
    return "converged"


def has_diverged(losses):
    """Is it hopeless already? For stopping early: must not fire on a run that can still recover from a bump.

    True when a loss is not finite, or when half of the curve so far, and at least EARLY_POINTS points, lies above where
    it started (a model that knows nothing scores ln(vocab)), or far above its own lowest level without coming down.
    """
    losses = np.asarray(losses, float)
    if not np.isfinite(losses).all():
        return True
    n = len(losses)
    half = max(EARLY_POINTS, n // 2)
    if n < half + 2:
        return False
    late = losses[-half:]
    if late.min() > losses[0] + STAYS_UP:
        return True
    lowest = rolling_median(losses[:-half]).min()
    return bool(late.min() > lowest + EARLY_RISE and np.median(late[half // 2:]) > np.median(late[:half // 2]) - 0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_metrics(path):
    """metrics.csv -> (train, val), dicts of columns: the rows that hold a train_loss and those that hold a val_loss.

    An empty cell is nan. A last line without its newline is a row cut off while it was written, and is left out.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        lines = []
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))

    def columns(kind):
        kept = [r for r in rows if r.get(kind)]
        return {c: np.array([float(r[c] or "nan") for r in kept]) for c in (rows[0] if kept else ())}
    return columns("train_loss"), columns("val_loss")


def read_run(dir):
    """One run as {dir, name, config, args, summary, train, val}, or None where no readable config.json lies."""
    dir = Path(dir)
    config = read_json(dir / "config.json")
    if not config or "args" not in config:
        return None
    train, val = read_metrics(dir / "metrics.csv")
    return dict(dir=dir, name=dir.name, config=config, args=config["args"], lr=float(config["args"]["lr"]),
                seed=int(config["args"]["seed"]), summary=read_json(dir / "summary.json") or {}, train=train, val=val)


def read_runs(dir):
    """All runs directly under dir, ordered by rate and seed."""
    runs = [read_run(d) for d in sorted(Path(dir).iterdir()) if d.is_dir()]
    return sorted((r for r in runs if r), key=lambda r: (r["lr"], r["seed"], r["name"]))


# ----------------------------------------------------------------------------------------------------------------------
# Drawing: helpers

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"   # safe for colour-blind readers (Okabe and Ito)
STATUS_COLOURS = dict(converged=BLUE, slow="#56B4E9", unstable="#E69F00", diverged=ORANGE, stopped=GREY)
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"), ((0, (1, 3)), "P")]


def rate(lr):
    """A rate as people write it: 3e-4, 2.1e-3, 0.065."""
    if 0.01 <= lr < 1000:
        return f"{lr:.3g}"
    mantissa, exponent = f"{lr:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def rate_colours(rates):
    """{rate: colour} by rank, dark for low; the pale end of viridis is left out, it is hard to see on white."""
    from matplotlib import colormaps
    rates = sorted(set(rates))
    return {lr: colormaps["viridis"](0.92 * i / max(1, len(rates) - 1)) for i, lr in enumerate(rates)}


def figure(width, height, rows=1, cols=1, **kw):
    """A Figure on its own Agg canvas, and its axes as an array (rows, cols): no pyplot, no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, cols, squeeze=False, **kw)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return fig, axes


def save(fig, path):
    """Under a temporary name first: a reader never sees half a picture."""
    fig.savefig(path.with_suffix(".tmp"), format="png")
    return path.with_suffix(".tmp").replace(path)


def plain_log(ax):
    """A log axis upward with 0.2 and 500 where matplotlib would write powers of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "235" else "")


def rate_axis(ax, rates, settings):
    """A log axis of rates with ticks that people would choose; the settings side by side where there is but one rate.
    Returns where(setting, lr): the place on this axis."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
    low, high = min(rates), max(rates)
    if low == high and len(settings) > 1:
        ax.set_xticks(range(len(settings)), settings, rotation=20 if len(settings) > 3 else 0)
        ax.set_xlim(-0.5, len(settings) - 0.5)
        return lambda setting, lr: settings.index(setting)
    margin, decades = 1.1 if high < 3 * low else 1.25, np.log10(high / low)
    ax.set(xscale="log", xlabel="peak learning rate", xlim=(low / margin, high * margin))
    subs = (1, 2, 3, 4, 5, 7) if decades < 0.8 else (1, 2, 3, 5) if decades < 1.2 else (1, 3) if decades < 4 else (1,)
    ax.xaxis.set_major_locator(FixedLocator([low]) if low == high else LogLocator(subs=subs))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda x, _: rate(x))
    return lambda setting, lr: lr


def loss_limits(ax, curves):
    """From the lowest loss to where the curves began: what diverged beyond that does not squash the rest."""
    curves = [c[np.isfinite(c)] for c in curves if np.isfinite(c).any()]
    if curves:
        low, high = min(c.min() for c in curves), max(c[0] for c in curves)
        high = 1.5 * high if high - low < 0.1 * high else high   # nothing fell: every run diverged
        ax.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)


def smooth(values):
    """Running mean over a fiftieth of the curve: minibatch noise hides the order of neighbouring rates."""
    width = max(1, len(values) // 50)
    if width == 1 or not np.isfinite(values).all():
        return values
    total, upto = np.cumsum(np.insert(values, 0, 0.0)), np.arange(1, len(values) + 1)
    first = np.maximum(0, upto - width)
    return (total[upto] - total[first]) / (upto - first)


def draw_curve(ax, x, y, died=False, **style):
    """A line up to its last finite value; a run that died gets an x there, at the top of the axis if it left it."""
    ok = np.isfinite(y)
    line, = ax.plot(x[ok], y[ok], **{"linewidth": 1.3, **style})
    if died and ok.any():
        ax.plot(x[ok][-1], min(y[ok][-1], ax.get_ylim()[1]), "x", color=line.get_color(), markersize=8,
                markeredgewidth=2.2, clip_on=False, zorder=5)


# ----------------------------------------------------------------------------------------------------------------------
# The pictures of a run

def draw_run(dir):
    """In its folder: loss_curves.png, lr_schedule.png, and router.png where there are experts. Returns the paths."""
    run = read_run(dir)
    if run is None or not len(run["train"].get("step", ())):
        return []
    train, val, status = run["train"], run["val"], run["summary"].get("status", "running")
    fig, ((ax, ax2),) = figure(11, 4.2, 1, 2, width_ratios=(3, 2))
    loss_limits(ax, [smooth(train["train_loss"]), val.get("val_loss", np.zeros(0))])
    draw_curve(ax, train["step"], train["train_loss"], color="#9ecae1", label="training, mean between two log steps")
    draw_curve(ax, train["step"], smooth(train["train_loss"]), status == "diverged", color="#08519c",
               label="training, running mean")
    if len(val.get("step", ())):
        draw_curve(ax, val["step"], val["val_loss"], color=ORANGE, marker="o", markersize=4, label="validation")
    ax.set(xlabel="step", ylabel="loss (nats a token)", title=f"lr {rate(run['lr'])}, seed {run['seed']}: {status}")
    ax.legend(frameon=False)
    draw_curve(ax2, train["step"], train["grad_norm"], color="#08519c")
    ax2.set(xlabel="step", ylabel="gradient norm before clipping")
    plain_log(ax2)
    paths = [save(fig, run["dir"] / "loss_curves.png")]

    fig, ((ax,),) = figure(7, 3.5)
    draw_curve(ax, train["step"], train["lr"], color="#08519c")
    ax.set(xlabel="step", ylabel="learning rate", ylim=(0, None),
           title=f"{run['args'].get('schedule', 'schedule')}, peak {rate(run['lr'])}")
    paths.append(save(fig, run["dir"] / "lr_schedule.png"))

    layers = sorted({int(c[7:].split("_")[0]) for c in train if c.startswith("share_L")})
    if layers:
        fig, axes = figure(9, 1.2 + 1.1 * len(layers), len(layers), 1, sharex=True)
        for layer, ax in zip(layers, axes[:, 0]):
            columns = [c for c in train if c.startswith(f"share_L{layer}_E")]
            share = np.stack([train[c] for c in columns])   # (experts, log steps)
            image = ax.pcolormesh(train["step"], np.arange(len(columns)), share, shading="nearest", cmap="viridis",
                                  vmin=0, vmax=4 / len(columns))  # one scale for all layers and runs
            ax.set_ylabel(f"layer {layer}\nexpert")
            ax.grid(False)
        fig.colorbar(image, ax=axes, label=f"share (even: {1 / len(columns):.3g})", extend="max")
        axes[0, 0].set_title("share of the assignments that each expert gets")
        axes[-1, 0].set_xlabel("step")
        paths.append(save(fig, run["dir"] / "router.png"))
    return paths


# ----------------------------------------------------------------------------------------------------------------------
# The pictures of a sweep

def draw_sweep(dir, runs, insights):
    """All of them. runs: with status, loss and setting as sweep.analyse leaves them; insights: what it found."""
    if not runs:
        return []
    dir, settings = Path(dir), list(dict.fromkeys(r["setting"] for r in runs))
    colours, styles = rate_colours(r["lr"] for r in runs), {s: STYLES[i % len(STYLES)] for i, s in enumerate(settings)}
    named = rate_colours(range(len(settings))).values() if len(colours) == 1 < len(settings) else ()
    by_setting = dict(zip(settings, named))   # where there is but one rate, colour tells the settings apart
    look = {r["name"]: dict(color=by_setting.get(r["setting"], colours[r["lr"]]), linestyle=styles[r["setting"]][0])
            for r in runs}
    drawn = [r for r in runs if len(r["train"].get("step", ()))]

    fig, (axes,) = figure(13, 5.6, 1, 2)
    for ax, part, name in ((axes[0], "train", "training"), (axes[1], "val", "validation")):
        shown = [(r, r[part]["step"], r[part][f"{part}_loss"]) for r in runs if len(r[part].get("step", ()))]
        shown = [(r, x, smooth(y) if part == "train" else y) for r, x, y in shown]
        loss_limits(ax, [y for _, _, y in shown])
        for r, x, y in shown:
            draw_curve(ax, x, y, r["status"] == "diverged", alpha=0.85, **look[r["name"]])
        ax.set(xlabel="step", ylabel=f"{name} loss (nats a token)")
    legend(fig, runs, colours, styles, by_setting)
    paths = [save(fig, dir / "lr_sweep_comparison.png"), draw_valley(dir, runs, insights, colours, styles),
             draw_details(dir, drawn, insights, colours, styles, look, by_setting), draw_table(dir, insights, colours)]

    fig, ((ax,),) = figure(9, 5)
    seen = []
    for r in {(r["setting"], r["lr"]): r for r in reversed(drawn)}.values():  # as they were run, one seed each
        under = seen.count(curve := tuple(r["train"]["lr"]))  # one like another shows as a wide pale line below it
        draw_curve(ax, r["train"]["step"], r["train"]["lr"], r["status"] == "diverged", **look[r["name"]],
                   linewidth=1.3 + 4 * under, alpha=0.35 if under else 1, zorder=2 - under / 10)
        seen.append(curve)
    ax.set(xlabel="step", ylabel="learning rate of the step")
    if max(colours) > 4 * min(colours):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda x, _: rate(x))
    legend(fig, runs, colours, styles, by_setting)
    return paths + [save(fig, dir / "lr_schedules.png")]


def legend(fig, runs, colours, styles, by_setting):
    """Beside the panels: a rate a line with the worst that befell it, highest on top; then the settings."""
    from matplotlib.lines import Line2D
    found, handles = {(r["lr"], r["status"]) for r in runs}, []
    for lr in [] if by_setting else sorted(colours)[::-1]:
        note = [s for s in ("diverged", "unstable", "stopped", "running", "interrupted") if (lr, s) in found]
        handles.append(Line2D([], [], color=colours[lr], linewidth=2.5, label=" ".join([rate(lr), *note[:1]])))
    if len(styles) > 1:
        handles += [Line2D([], [], color=by_setting.get(s, "#444444"), linestyle=style, label=s)
                    for s, (style, _) in styles.items()]
    fig.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8 if len(handles) > 14 else 9,
               title=f"learning rate {rate(min(colours))}" if by_setting else "learning rate", alignment="left")


def draw_valley(dir, runs, insights, colours, styles):
    """Final loss against rate: every run, and of the setting that the analysis tells of, the fitted curve, the interval of the
    optimum and the edge. Beside it the neighbourhood of the optimum again, where there are enough rates to look closer."""
    ended = [r for r in runs if r["loss"] is not None]
    best = next((s for s in insights["settings"] if s["label"] == (insights["use"] or {}).get("setting")), None)
    o, edge = (best["optimum"], best["edge"]) if best else (None, None)
    close = [lr for lr in sorted(colours) if o and o["low"] / 2.5 < lr < o["high"] * 2.5]
    closer = 3 <= len(close) < len(colours)
    fig, (axes,) = figure(14 if closer else 9.5, 5.6, 1, 1 + closer)
    for ax, rates in zip(axes, (sorted(colours), close)):
        where, right = rate_axis(ax, rates, list(styles)), ax.get_xlim()[1]
        finals = [r["loss"] for r in ended if np.isfinite(r["loss"]) and r["lr"] in rates]
        if finals:
            pad = 0.06 * max(max(finals) - min(finals), 0.01)
            ax.set_ylim(min(finals) - 1.5 * pad, max(finals) + 2.5 * pad)
        else:
            ax.set(yticks=[], ylim=(0, 1))
            ax.text(0.5, 0.5, "every run diverged" if ended else "no run has finished", transform=ax.transAxes)
        for s in insights["settings"]:
            alive = [r for r in s["rates"] if r["val_loss"] is not None]
            ax.plot([where(s["label"], r["lr"]) for r in alive], [r["val_loss"] for r in alive], color=GREY, zorder=2,
                    linewidth=1.2, linestyle=styles[s["label"]][0], marker="_", markersize=16, label=s["label"] or None)
        for seed in {r["seed"] for r in ended} if len(colours) == 1 else ():
            pairs = [r for r in ended if r["seed"] == seed]   # a seed's luck shows as lines that run side by side
            ax.plot([where(r["setting"], r["lr"]) for r in pairs], [r["loss"] for r in pairs], color="#cccccc")
        for r in (r for r in ended if r["lr"] in rates):
            place, style = where(r["setting"], r["lr"]), dict(color=colours[r["lr"]], zorder=4, clip_on=False)
            rim = STATUS_COLOURS["unstable"] if r["status"] == "unstable" else "white"
            if np.isfinite(r["loss"]):
                ax.plot(place, r["loss"], styles[r["setting"]][1], markeredgecolor=rim, markeredgewidth=1.2, **style)
            else:
                ax.plot(place, ax.get_ylim()[1], "x", markersize=9, markeredgewidth=2.4, **style)
        above = dict(transform=ax.get_xaxis_transform(), ha="center", va="bottom")   # two rows: labels meet no curve
        if o and len(colours) > 1:
            ax.axvspan(o["low"], o["high"], color=BLUE, alpha=0.13, linewidth=0, zorder=0)
            ax.axvline(o["lr"], color=BLUE, linewidth=1.4, zorder=1)
            ax.plot(*zip(*o["curve"] or [(o["lr"], np.nan)]), color=BLUE, linestyle=(0, (2, 2)), linewidth=1.2)
            kind = "95% interval" if o["fitted"] and len({r["seed"] for r in runs}) > 1 else "somewhere from"
            ax.text(np.sqrt(o["low"] * o["high"]), 1.065, color=BLUE, **above,
                    s=f"optimum {rate(o['lr'])}, {kind} {rate(o['low'])} to {rate(o['high'])}")
        if edge and edge["lr"] < right:
            ax.axvspan(edge["lr"], right, color=ORANGE, alpha=0.10, linewidth=0, zorder=0)
            ax.axvline(edge["lr"], color=ORANGE, linewidth=1.4, zorder=1)
            ax.text(edge["lr"], 1.02, f"edge: {edge['status']} from {rate(edge['lr'])}", color=ORANGE, **above)
        ax.set_ylabel("final validation loss (nats a token)")
    if len(styles) > 1 and len(colours) > 1:
        axes[0].legend(frameon=False, title="setting")
    axes[0].annotate("point: a run; dash: mean, the luck of its seeds taken out; orange rim: unstable; x: diverged",
                     (0, 0), (0, -0.13), xycoords="axes fraction", textcoords="axes fraction", fontsize=8)
    return save(fig, dir / "lr_vs_final_loss.png")


def draw_details(dir, runs, insights, colours, styles, look, by_setting):
    """Six panels: loss, accuracy, perplexity, gradient norm, accuracy a minute, status."""
    fig, axes = figure(15, 8.4, 2, 3)
    for ax, key, name, scale in (
            (axes[0, 0], "val_loss", "final validation loss (nats a token)", 1),
            (axes[0, 1], "val_accuracy", "next-token accuracy (%)", 100),
            (axes[0, 2], "val_perplexity", "perplexity", 1),
            (axes[1, 1], "accuracy_per_minute", "accuracy a minute (points)", 100)):
        where = rate_axis(ax, list(colours), list(styles))
        for s in insights["settings"]:
            good, (style, marker) = [r for r in s["rates"] if r[key] is not None], styles[s["label"]]
            x, y = [where(s["label"], r["lr"]) for r in good], [scale * r[key] for r in good]
            ax.plot(x, y, linestyle=style, color=GREY, linewidth=1)
            ax.scatter(x, y, marker=marker, color=[colours[r["lr"]] for r in good], zorder=3)
        ax.set_ylabel(name)
        if key == "val_perplexity" and ax.get_ylim()[1] > 5 * max(ax.dataLim.y0, 1):
            plain_log(ax)
    for r in runs:
        draw_curve(axes[1, 0], r["train"]["step"], smooth(r["train"]["grad_norm"]), r["status"] == "diverged",
                   alpha=0.85, **look[r["name"]])
    axes[1, 0].set(xlabel="step", ylabel="gradient norm before clipping")
    plain_log(axes[1, 0])
    ax, names = axes[1, 2], [*STATUSES, *{"stopped"}.intersection(r["status"] for r in runs)]
    where = rate_axis(ax, list(colours), list(styles))
    for r in (r for r in runs if r["status"] in names):   # the seeds of a rate stand a little above each other
        ax.plot(where(r["setting"], r["lr"]), names.index(r["status"]) + 0.08 * (r["seed"] % 5), styles[r["setting"]][1],
                markersize=8, alpha=0.8, color=STATUS_COLOURS[r["status"]])
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.2)
    legend(fig, runs, colours, styles, by_setting)
    return save(fig, dir / "detailed_comparison.png")


def draw_table(dir, insights, colours):
    """summary_table.png: a line a rate, its colour in front, the best of each setting bold."""
    columns = (("val loss", "val_loss", ".4f"), ("± seeds", "deviation", ".4f"), ("accuracy", "val_accuracy", ".1%"),
               ("perplexity", "val_perplexity", ".1f"), ("bits a byte", "val_bpb", ".4f"),
               ("largest grad norm", "max_grad_norm", ".2g"))
    lines = [(s, r) for s in insights["settings"] for r in s["rates"]]
    named = len(insights["settings"]) > 1
    rows = [[s["label"]] * named + [rate(r["lr"]), len(r["seeds"]), r["status"]]
            + ["" if r[key] is None else format(r[key], form) for _, key, form in columns] for s, r in lines]
    fig, ((ax,),) = figure(11 + 3 * named, 0.6 + 0.3 * (len(rows) + 1))
    ax.axis("off")
    if rows:
        head = ["setting"] * named + ["rate", "seeds", "status"] + [name for name, _, _ in columns]
        table = ax.table(rows, colLabels=head, cellLoc="right", bbox=(0.02, 0, 0.98, 1))
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        for (i, _), cell in table.get_celld().items():
            cell.set(linewidth=0.4, edgecolor="#cccccc", facecolor="#eeeeee" if i == 0 else "white")
            if i and lines[i - 1][1]["lr"] == lines[i - 1][0]["best_lr"]:
                cell.set_text_props(weight="bold")
        for i, (_, r) in enumerate(lines):
            top = 1 - (i + 1) / (len(rows) + 1)
            ax.axhspan(top - 0.9 / (len(rows) + 1), top - 0.1 / (len(rows) + 1), 0, 0.015, color=colours[r["lr"]])
        ax.set(xlim=(0, 1), ylim=(0, 1))
    return save(fig, dir / "summary_table.png")


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def main(argv):
    usage = "python plot.py DIR   (the folder of a run or of a sweep, such as runs/tiny)"
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    dir = Path(argv[0]) if len(argv) == 1 else None
    runs = read_runs(dir) if dir and dir.is_dir() else []
    if dir and read_run(dir):
        paths = draw_run(dir)
    elif runs:
        import sweep   # here, because sweep imports this file
        for run in runs:
            draw_run(run["dir"])
        sweep.report(dir)
        paths = sorted(p for p in dir.iterdir() if p.suffix in (".png", ".csv", ".md", ".json"))
    else:
        print(f"plot.py: {dir} holds no run; {usage}" if dir else f"usage: {usage}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
