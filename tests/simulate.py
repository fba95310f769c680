"""How often is the analysis of a sweep right? Simulated sweeps with a known optimum, run by hand:

    python tests/simulate.py             a line for 120 sweeps of a cell: noise of 3, 10, 50 mnat; 2, 3 seeds
    python tests/simulate.py kink        that cell alone
    python tests/simulate.py settings    how often equal settings are called different, and unequal ones found

A law gives each run its loss: a shape over u = log(rate / optimum), the luck of its seed (30 mnat) and its
own noise sigma. holds: of 100 intervals, those with the optimum inside (an open side holds all); open: of 100
intervals, those with an open side; wrong: of 100 sweeps, those that call a rate worse which is not; width:
median high / low; regret: what the recommended rate costs above the optimum (mnat), median and mean; runs:
their mean number.
"""
import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sweep

GRID = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
DECADES = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
LUCK = 0.03
SHAPES = {
    "parabola": lambda u: 0.1 * u ** 2,
    "flat": lambda u: 0.03 * u ** 2,
    "sharp": lambda u: 0.4 * u ** 2,
    "wall above": lambda u: max(0.05 * -u, 2 * u) * abs(u),
    "wall below": lambda u: max(2 * -u, 0.05 * u) * abs(u),
    "quartic": lambda u: 0.05 * u ** 4,
    "lopsided": lambda u: 0.12 * math.exp(-0.6 * u) + 0.024 * math.exp(3 * u) - 0.144,
    "exponential": lambda u: 0.25 * (math.exp(-0.5 * u) / 0.5 + math.exp(1.2 * u) / 1.2 - 1 / 0.5 - 1 / 1.2),
    "second minimum": lambda u: min(0.1 * u ** 2, 0.02 + 0.3 * (u - 1.6) ** 2),
    "second far": lambda u: min(0.1 * u ** 2, 0.015 + 0.1 * (u - 2.5) ** 2),
    "kink": lambda u: 0.1 * abs(u),
    "kink, steep above": lambda u: max(-0.05 * u, u),
    "narrow well": lambda u: 0.02 * abs(u) + 0.15 * (1 - math.exp(-(u / 0.3) ** 2)),
    "cliff": lambda u: 0.1 * u ** 2 + 2 * (u > math.log(1.3)),
    "staircase": lambda u: 0.05 * math.floor(2 * abs(u)),
    "flat decade": lambda u: 0.2 * max(0, abs(u) - math.log(10) / 2) ** 2,
}
TWO_VALLEYS = ("second minimum", "second far")          # against the one assumption: no interval is promised
HARD = ("kink", "kink, steep above", "narrow well")     # too narrow for the grid: the regret is larger
CELLS = {name: dict(shape=name) for name in SHAPES} | {
    "noise grows": dict(shape="exponential", grows=3),
    "student-t": dict(shape="parabola", student=True),
    "slopes": dict(shape="parabola", slopes=0.02),
    "slopes, quartic": dict(shape="quartic", slopes=0.03),
    "own optima": dict(shape="parabola", own_optima=0.3),
    "wild runs": dict(shape="parabola", wild=0.1),
    "seeds diverge": dict(shape="parabola", edge=1.2),
    "seeds diverge 2": dict(shape="exponential", edge=1.2),
    "far below": dict(shape="parabola", lrs=[1e-6, 3e-6, 1e-5]),
    "far above": dict(shape="parabola", lrs=[1.0, 3.0, 10.0]),
    "decades": dict(shape="parabola", lrs=DECADES),
    "decades, wall": dict(shape="wall above", lrs=DECADES),
    "decades, lopsided": dict(shape="lopsided", lrs=DECADES),
}


@functools.lru_cache(maxsize=None)
def lowest(shape):
    """Where the shape is lowest, and how low: not at u = 0 in all."""
    u = np.linspace(-2, 2, 4001)
    y = [SHAPES[shape](x) for x in u]
    return u[np.argmin(y)], min(y)


def law(trial, sigma, shape, grows=0, student=False, slopes=0, edge=None, own_optima=0, wild=0, lrs=GRID):
    """-> loss(setting, lr, seed), the optimum, regret(lr). A setting may hold ("optimum", (factor, nats))."""
    draw = np.random.default_rng([trial, 1])
    optimum = math.exp(draw.uniform(math.log(1e-3), math.log(1e-2)))
    luck = draw.normal(0, LUCK, 9)
    slope = draw.normal(0, slopes, 9)
    shift = draw.normal(0, own_optima, 9)
    u0, y0 = lowest(shape)

    def regret(lr):
        return SHAPES[shape](math.log(lr / optimum) + u0) - y0

    def loss(setting, lr, seed):
        known = dict(setting)
        factor, above = known.get("optimum", (1, 0))
        u = math.log(lr / optimum / factor)
        own = np.random.default_rng([trial, seed, int(abs(math.log(lr)) * 1e6), known.get("id", 0)])
        if u > 3.4:
            return math.inf
        if edge and own.random() < 1 / (1 + math.exp(-(u - edge) / 0.35)):
            return math.inf
        noise = own.normal()
        if student:
            noise = own.standard_t(3) / math.sqrt(3)
        if own.random() < wild:
            noise += 0.3 / sigma
        noise *= sigma * (1 + grows / (1 + math.exp(-2 * (u - 1))))
        return 3 + above + regret(lr / factor * math.exp(-shift[seed])) + luck[seed] + slope[seed] * u + noise
    return loss, optimum, regret


def search(loss, settings=((),), lrs=GRID, seeds=3, refine=0, max_runs=500, widen=True):
    """Runs a whole search against a law. Returns {setting: table}, all results, and why it ended."""
    plan = argparse.Namespace(settings=settings, lrs=lrs, seeds=seeds, refine=refine,
                              max_runs=max_runs, widen=widen)
    results = {}
    ended = None
    while not ended:
        keys, ended = sweep.next_runs(results, plan)
        results.update({key: loss(*key) for key in keys})
    return sweep.tables_of(results), results, ended


def judged(table):
    """-> the best rate, the limits of the optimum (0, inf: open), the rates that are called worse"""
    best = sweep.lowest(table)
    worse = [lr for lr, row in sweep.compare(table, best).items() if row["worse"]]
    return best, *sweep.nearest(worse, best), worse


def cell(name, sigma, seeds, trials):
    """-> shares of intervals that hold, are open, of sweeps with a wrong "worse"; median width; median and
    mean regret (nats); mean of runs."""
    found = []
    for trial in range(trials):
        loss, optimum, regret = law(trial, sigma, **CELLS[name])
        tables, results, _ = search(loss, lrs=CELLS[name].get("lrs", GRID), seeds=seeds)
        best, low, high, worse = judged(tables[()])
        width = high / low if low else math.inf
        survivors = [lr for lr in worse if max(tables[()][lr].values()) < math.inf]
        wrong = any(regret(lr) <= regret(best) for lr in survivors)
        found.append((low <= optimum <= high, math.isinf(width), wrong, width, regret(best), len(results)))
    holds, unbounded, wrong, width, regret, runs = zip(*found)
    return (np.mean(holds), np.mean(unbounded), np.mean(wrong), np.median(width), np.median(regret),
            np.mean(regret), np.mean(runs))


def claims(shape, sigma, seeds, factors, above, trials):
    """Share of studies that call settings different, mean of runs a setting: optima apart by factors, the last `above` nats worse."""
    count, runs = 0, 0
    for trial in range(trials):
        loss, _, _ = law(trial, sigma, shape)
        worse = [0] * (len(factors) - 1) + [above]
        settings = []
        for i, pair in enumerate(zip(factors, worse)):
            settings.append((("optimum", pair), ("id", i)))
        tables, results, _ = search(loss, settings, seeds=seeds)
        comparisons = sweep.compare_settings(tables)[1]
        count += any(c["worse"] for c in comparisons.values())
        runs += len(results) / len(settings)
    return count / trials, runs / trials


STUDIES = [     # factors between the optima, and by how many sigma the last setting is worse
    ([1, 1], 0),
    ([1, 1.8], 0),
    ([1, 2], 0),
    ([1] * 5, 0),
    ([1, 1.2, 1.4, 1.7, 2], 0),
    ([1, 1], 3),
    ([1, 1.8], 3),
]
SIGMAS = (0.003, 0.01, 0.05)
TRIALS = 120


def print_claims():
    print("of 100 studies, those that call settings different: sigma 3, 10, 50 mnat at 2, 3 seeds each; runs")
    for shape in ("parabola", "exponential", "quartic", "wall above", "cliff", "staircase"):
        for factors, above in STUDIES:
            line = f"{shape:12} optima {str(factors):26} last {above} sigma worse:"
            runs = []
            for sigma in SIGMAS:
                for seeds in (2, 3):
                    found, mean_runs = claims(shape, sigma, seeds, factors, above * sigma, TRIALS)
                    line += f"{100 * found:4.0f}"
                    runs.append(mean_runs)
            print(f"{line}  {np.mean(runs):.1f} runs a setting", flush=True)


LINE = ("{:18} {:3.0f} mnat, {} seeds: holds {:3.0f} open {:3.0f} wrong {:3.0f} width {:5.1f} regret {:4.1f} "
        "{:5.1f} runs {:4.1f}")


def main(argv):
    if argv == ["settings"]:
        return print_claims()
    for name in argv or CELLS:
        for sigma in SIGMAS:
            for seeds in (2, 3):
                found = cell(name, sigma, seeds, TRIALS) * np.array([100, 100, 100, 1, 1000, 1000, 1])
                print(LINE.format(name, 1000 * sigma, seeds, *found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
