"""
The shape of the learning rate over a run: pure functions of the optimizer step.

    make_schedule(name, max_steps, ...) -> f;   lr at step t (0 .. max_steps - 1) is  f(t) x peak

Every schedule but `exponential` starts with the same linear warm-up over `warmup_ratio` of the steps, where step
t uses (t + 1) / warmup_steps: the first update is small, not zero. What follows goes from 1 down to `min_lr_ratio` as a
function of progress, which is 0 just after warm-up and 1 at the last step. Two mistakes are common, and impossible here:
a warm-up of step / warmup_steps, which wastes the first step, and a schedule that is told the number of micro-batches but
stepped once an optimizer step, which anneals only its first part. Steps here are always optimizer steps.

Sources: cosine and restarts, Loshchilov & Hutter 2017; warm-up-stable-decay, Hu et al. 2024 (MiniCPM); triangular cycles
and the range test, Smith 2017; stages, DeepSeek LLM 2024 (1, 0.316, 0.1) with the factors of a small-MoE study.

    python schedule.py [picture.png]        # draws them all
"""

import math

# ----------------------------------------------------------------------------------------------------------------------
# Shapes: progress in [0, 1] -> a factor in [floor, 1]

def constant(progress, floor): return 1.0
def linear(progress, floor): return 1 - (1 - floor) * progress
def cosine(progress, floor): return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def restarts(progress, floor, cycles=3):
    """Cosine, started again from the peak `cycles` times."""
    return cosine(progress * cycles % 1 if progress < 1 else 1.0, floor)


def wsd(progress, floor, decay=0.2):
    """Warm-up-stable-decay: at the peak until the last `decay` of the way, then linear. Any point can branch off to an end."""
    return linear(max(0.0, (progress - (1 - decay)) / decay), floor)


def triangular(progress, floor, cycles=3):
    """Linear down to the floor and up again, `cycles` times, ending at the floor."""
    return linear(1 - abs(1 - 2 * ((progress * (cycles - 0.5)) % 1)), floor)


def stages(progress, floor):
    """1, then 0.46, then 0.15 of the peak; a floor above a stage holds it up."""
    return max(floor, 1.0 if progress < 0.6 else 0.46 if progress < 0.85 else 0.15)


SHAPES = {"constant": constant, "linear": linear, "cosine": cosine, "restarts": restarts, "wsd": wsd,
          "triangular": triangular, "stages": stages}
SCHEDULES = [*SHAPES, "exponential", "plateau"]

# ----------------------------------------------------------------------------------------------------------------------
# The schedule of a run

def make_schedule(name, max_steps, warmup_ratio=0.1, min_lr_ratio=0.1):
    """
    f(step) -> factor of the peak rate, for step 0 .. max_steps - 1 of the optimizer.

    warmup_ratio in [0, 1] is a share of max_steps, min_lr_ratio in [0, 1] a share of the peak. `exponential` is the range
    test: from 1e-4 of the peak up to it, neither ratio used. `plateau` returns a Plateau, the only schedule with state.
    Raises ValueError on an unknown name or a setting outside its range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of: {', '.join(SCHEDULES)}")
    if max_steps < 1 or not 0 <= warmup_ratio <= 1 or not 0 <= min_lr_ratio <= 1:
        raise ValueError("a schedule needs at least 1 step and ratios in [0, 1]; got "
                         f"{max_steps} steps, warm-up ratio {warmup_ratio}, minimum ratio {min_lr_ratio}")
    warmup_steps = round(warmup_ratio * max_steps)
    if name == "exponential":
        return lambda step: 1e-4 ** (1 - step / max(1, max_steps - 1))
    if name == "plateau":
        return Plateau(warmup_steps, min_lr_ratio)
    shape, decay_steps = SHAPES[name], max(1, max_steps - 1 - warmup_steps)
    return lambda step: warmup(step, warmup_steps) or shape(min(1.0, (step - warmup_steps) / decay_steps), min_lr_ratio)


def warmup(step, warmup_steps):
    """The linear rise, the last warm-up step being the first at the peak; None once it is over."""
    return (step + 1) / warmup_steps if step < warmup_steps else None


def rule_of_thumb(n_params):
    """A first guess at Muon's peak rate, 0.065 x sqrt(parameters / 79 M). A heuristic from one study: sweep around it."""
    return 0.065 * math.sqrt(n_params / 79e6)


class Plateau:
    """
    Halves the rate, down to the floor, when `patience` evaluations in a row have not improved the best loss by `threshold`.
    Call observe(val_loss) after each evaluation; state (a plain dict) goes into the checkpoint.
    """
    def __init__(self, warmup_steps, floor, threshold=0.01, patience=5):
        self.warmup_steps, self.floor, self.threshold, self.patience = warmup_steps, floor, threshold, patience
        self.state = {"scale": 1.0, "best": math.inf, "waited": 0}

    def __call__(self, step):
        return warmup(step, self.warmup_steps) or self.state["scale"]

    def observe(self, val_loss):
        s = self.state
        if val_loss < s["best"] * (1 - self.threshold):
            s["best"], s["waited"] = val_loss, 0
        else:
            s["waited"] += 1
            if s["waited"] == self.patience:
                s["scale"], s["waited"] = max(self.floor, s["scale"] / 2), 0


if __name__ == "__main__":
    import sys
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, path = 200, sys.argv[1] if len(sys.argv) > 1 else "schedules.png"
    rows = math.ceil(len(SCHEDULES) / 3)
    fig, axes = plt.subplots(rows, 3, figsize=(11, 2.4 * rows), sharex=True, sharey=True, layout="constrained")
    for ax, name in zip(axes.flat, SCHEDULES):
        f, factors = make_schedule(name, steps), []
        for t in range(steps):
            factors.append(f(t))
            if name == "plateau" and t % 10 == 0:
                f.observe(2 + math.exp(-t / 20))  # a validation loss that settles at 2
        ax.plot(factors, color="#0072B2")
        ax.set_title(name)
        ax.grid(alpha=0.3)
    axes[1][0].set_ylabel("factor of the peak rate")
    axes[-1][1].set_xlabel("optimizer step; 10% warm-up and a floor of 10% of the peak, for the shapes that have them")
    fig.savefig(path, dpi=120)
    print(f"{len(SCHEDULES)} schedules in {path}: {', '.join(SCHEDULES)}")
