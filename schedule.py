"""The shape of the learning rate over a run: pure functions of the optimizer step.

    make_schedule(name, max_steps, ...) -> f;   lr at step t (0 .. max_steps - 1) is  f(t) x peak

Every schedule but `exponential` starts with the same linear warm-up over `warmup_ratio` of the steps, where
step t uses (t + 1) / warmup_steps: the first update is small, not zero. What follows is a function of
progress, 0 just after warm-up and 1 at the last step; most go from 1 down to `min_lr_ratio`. A step is one
of the optimizer: with the number of micro-batches as max_steps, only its first part would be seen.

Sources: cosine and restarts, Loshchilov & Hutter 2017; wsd, Hu et al. 2024 (MiniCPM); triangular and the
range test, Smith 2017; stages, DeepSeek LLM 2024 (1, 0.316, 0.1) with the factors of a small-MoE study.

    python schedule.py [picture.png]        # draws them all
"""
import math
import sys

# Shapes: progress in [0, 1] -> a factor in [floor, 1] ---------------------------------------------

def constant(progress, floor):
    return 1.0

def linear(progress, floor):
    return 1 - (1 - floor) * progress

def cosine(progress, floor):
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

def restarts(progress, floor, cycles=3):
    """Cosine, started again from the peak `cycles` times."""
    cycle = min(int(progress * cycles), cycles - 1)
    return cosine(progress * cycles - cycle, floor)

def wsd(progress, floor, decay=0.2):
    """Warm-up-stable-decay: at the peak until the last `decay` of the way, then linear."""
    return linear(max(0.0, (progress - (1 - decay)) / decay), floor)

def triangular(progress, floor, cycles=3):
    """Linear down to the floor and up again, `cycles` times, ending at the floor."""
    phase = progress * (cycles - 0.5) % 1
    return linear(1 - abs(1 - 2 * phase), floor)

def stages(progress, floor):
    """1, then 0.46, then 0.15 of the peak; a floor above a stage holds it up."""
    if progress < 0.6:
        return 1.0
    return max(floor, 0.46 if progress < 0.85 else 0.15)

SHAPES = {"constant": constant, "linear": linear, "cosine": cosine, "restarts": restarts, "wsd": wsd,
          "triangular": triangular, "stages": stages}
SCHEDULES = [*SHAPES, "exponential", "plateau"]

# The schedule of a run ----------------------------------------------------------------------------

def make_schedule(name, max_steps, warmup_ratio=0.1, min_lr_ratio=0.1):
    """f(step) -> factor of the peak rate; the ratios, in [0, 1], are shares of max_steps and of the peak."""
    warmup_steps = round(warmup_ratio * max_steps)
    if name == "exponential":       # the range test: from 1e-4 of the peak up to it, without the two ratios
        return lambda step: 1e-4 ** (1 - step / max(1, max_steps - 1))
    if name == "plateau":
        return Plateau(warmup_steps, min_lr_ratio)
    shape = SHAPES[name]

    def factor(step):
        if step < warmup_steps:
            return (step + 1) / warmup_steps    # the last step of the warm-up is the first at the peak
        progress = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)
        return shape(min(1.0, progress), min_lr_ratio)
    return factor

class Plateau:
    """Halves the rate, down to the floor, when `patience` evaluations did not better the best loss enough."""
    def __init__(self, warmup_steps, floor):
        self.warmup_steps = warmup_steps
        self.floor = floor
        self.state = {"scale": 1.0, "best": math.inf, "waited": 0}      # goes into the checkpoint

    def __call__(self, step):
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.state["scale"]

    def observe(self, val_loss, threshold=0.01, patience=5):
        state = self.state
        state["waited"] += 1
        if val_loss < state["best"] * (1 - threshold):
            state.update(best=val_loss, waited=0)
        if state["waited"] == patience:
            state.update(scale=max(self.floor, state["scale"] / 2), waited=0)

def first_guess(optimizer, d_model):
    """A peak rate to start a sweep from: what the best rate of 4-layer models followed from d_model 128 to
    1,024 (400 steps of 4,096 tokens; results/README.md). Longer runs want less: a heuristic, not an answer.
    """
    if optimizer == "muon":
        return 0.64 / math.sqrt(d_model)
    if optimizer == "sgd":
        return 0.1
    return 0.5 / d_model        # adamw's

if __name__ == "__main__":
    from matplotlib.figure import Figure
    path = (sys.argv + ["schedules.png"])[1]
    fig = Figure(figsize=(11, 7), layout="constrained")
    fig.supylabel("factor of the peak rate")
    fig.supxlabel("optimizer step; 10% warm-up and a floor of 10% of the peak")
    axes = fig.subplots(math.ceil(len(SCHEDULES) / 3), 3, sharex=True, sharey=True)
    for ax, name in zip(axes.flat, SCHEDULES):
        schedule = make_schedule(name, max_steps=200)
        factors = []
        for step in range(200):
            factors.append(schedule(step))
            if name == "plateau" and step % 10 == 0:
                schedule.observe(2 + math.exp(-step / 20))      # a validation loss that settles at 2
        ax.plot(factors)
        ax.set_title(name)
    fig.savefig(path)
    print(f"{len(SCHEDULES)} schedules in {path}: {', '.join(SCHEDULES)}")
