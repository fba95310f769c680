"""Best rate against width, length and batch size, from the studies beside this file: python results/draw.py"""
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

STUDIES = Path(__file__).with_name("studies")
COLOURS = {"adamw": "#0072B2", "muon": "#D55E00"}

def settings(study):
    return json.loads((STUDIES / study / "insights.json").read_text())["settings"]

def draw(ax, x, found, colour, label):
    """A point a setting at its best rate, its bar the interval of the optimum."""
    best = np.array([s["best_lr"] for s in found])
    low = np.array([s["low"] for s in found])
    high = np.array([s["high"] for s in found])
    ax.errorbar(x, best, [best - low, high - best], fmt="o", color=colour, capsize=4, label=label)

def by_number(found, name):
    """Settings ordered by what their labels give name."""
    return sorted(found, key=lambda s: int(re.search(rf"{name}=(\d+)", s["label"])[1]))

fig = Figure(figsize=(17, 5), dpi=100, layout="constrained")
left, middle, right = fig.subplots(1, 3)
width = np.array([128, 256, 512, 1024])
for optimizer, law, name in (("adamw", 0.5 / width, "0.5 / width"),
                             ("muon", 0.64 / width ** 0.5, "0.64 / sqrt(width)")):
    found = by_number(settings(f"width-{optimizer}"), "d-model")
    if optimizer == "adamw":    # again, with rates low enough to bracket its best
        found[-1:] = settings("width-1024")
    draw(left, width, found, COLOURS[optimizer], optimizer)
    left.plot(width, law, ":", color=COLOURS[optimizer], label=name)
params = 2 * 2048 * width + 16 * width ** 2 + 12 * width * np.round(width * 8 / 3)
left.plot(width, 0.065 * np.sqrt(params / 79e6), "--", color="#999999", label="0.065 sqrt(parameters / 79 M)")
left.set(xlabel="d_model (4 layers, 400 steps of 32 x 128 tokens)", ylabel="best learning rate")
steps = np.array([50, 100, 400, 1600])
draw(middle, steps, [settings(f"moe-{n}")[0] for n in steps], COLOURS["muon"], "moe, muon")
middle.set(xlabel="steps (moe, 16 x 512 tokens)", ylabel="best learning rate")
batch = np.array([32, 128, 512])
same_steps = by_number(settings("dense-low-batch-steps"), "batch-size")
same_tokens = by_number(settings("dense-low-batch-tokens"), "batch-size")
draw(right, batch / 1.04, same_steps, COLOURS["adamw"], "adamw, 600 steps each")
draw(right, batch * 1.04, same_tokens, "#999999", "adamw, 41 M tokens each")
right.plot(batch, 0.0013 * np.sqrt(batch / 32), ":", color=COLOURS["adamw"], label="0.0013 sqrt(batch / 32)")
right.set(xlabel="sequences a batch (dense, 256 tokens each)", ylabel="best learning rate")
for ax, ticks in ((left, width), (middle, steps), (right, batch)):
    ax.set(xscale="log")
    ax.set_yscale("log", subs=[2, 5])
    ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    ax.set_xticks(ticks, ticks)
    ax.xaxis.minorticks_off()
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
fig.savefig(STUDIES.with_name("best_rate.png"))
