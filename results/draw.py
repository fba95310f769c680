"""Best rate against width and against length, from the studies beside this file: python results/draw.py"""
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
    """A point a setting at its best rate, its bar the interval of the optimum (open ends: to the axis)."""
    best = np.array([s["best_lr"] for s in found])
    low = np.array([s["low"] or s["best_lr"] / 2 for s in found])
    high = np.array([s["high"] or s["best_lr"] * 2 for s in found])
    ax.errorbar(x, best, [best - low, high - best], fmt="o", color=colour, capsize=4, label=label)
    for place, s in zip(x, found):
        if not s["low"]:
            ax.annotate("lowest tried", (place, s["best_lr"] / 2), ha="center", va="top", fontsize=8)

fig = Figure(figsize=(13, 5), dpi=110, layout="constrained")
left, right = fig.subplots(1, 2)
width = np.array([128, 256, 512, 1024])
for optimizer, power in (("adamw", -1), ("muon", -0.5)):
    found = settings(f"width-{optimizer}")
    found.sort(key=lambda s: int(re.search(r"d-model=(\d+)", s["label"])[1]))
    draw(left, width, found, COLOURS[optimizer], optimizer)
    law = {"adamw": 0.5 / width, "muon": 0.64 / width ** 0.5}[optimizer]
    name = {"adamw": "0.5 / width", "muon": "0.64 / sqrt(width)"}[optimizer]
    left.plot(width, law, ":", color=COLOURS[optimizer], label=name)
params = 2 * 2048 * width + 16 * width ** 2 + 12 * width * np.round(width * 8 / 3)
left.plot(width, 0.065 * np.sqrt(params / 79e6), "--", color="#999999", label="0.065 sqrt(parameters / 79 M)")
left.set(xlabel="d_model (4 layers, 400 steps of 32 x 128 tokens)", ylabel="best learning rate")
steps = np.array([50, 100, 400, 1600])
draw(right, steps, [settings(f"moe-{n}")[0] for n in steps], COLOURS["muon"], "moe, muon")
right.set(xlabel="steps (moe, 16 x 512 tokens)", ylabel="best learning rate")
for ax, ticks in ((left, width), (right, steps)):
    ax.set(xscale="log")
    ax.set_yscale("log", subs=[2, 5])
    ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    ax.set_xticks(ticks, ticks)
    ax.xaxis.minorticks_off()
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
fig.savefig(STUDIES.with_name("best_rate.png"))
