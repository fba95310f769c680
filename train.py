"""
Train one model at one learning rate, and write down everything that happened.

    python train.py --lr 3e-4 --device mps                  # the tiny preset on the Python standard library's source
    python train.py --preset dense-low --lr 3e-3            # any flag overrides what the preset says
    torchrun --nproc_per_node 2 train.py --preset dense     # several devices: each takes a slice of every batch

The loop is at the bottom, written out in order: evaluate, save, take a batch, step, log. A step is always an optimizer
step: --batch-size counts all sequences of one, and --grad-accum only says in how many pieces they are computed.

A run is a folder (--out) with config.json (all it takes to repeat it), metrics.csv (a row a log step, a row an
evaluation), summary.json, training.log, two pictures and checkpoints/{last,best}.pt. Batches are a function of
(seed, step), so a resumed run needs no generator state and ends with the same numbers as one left alone.
"""

import argparse
import csv
import ctypes
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config
import torch.distributed as dist
from tqdm import tqdm

import data
import plot
from model import PRESETS, Transformer, count_parameters
from optim import build_optimizer, set_lr
from schedule import SCHEDULES, make_schedule, rule_of_thumb

# ----------------------------------------------------------------------------------------------------------------------
# Settings

BASE = dict(optimizer="adamw", lr=3e-3, adamw_lr_ratio=0.1, weight_decay=0.1, beta1=0.9, beta2=0.95, momentum=0.95,
            grad_clip=1.0, balance_weight=0.01, schedule="cosine", warmup_ratio=0.1, min_lr_ratio=0.1, grad_accum=1)
RECIPES = {
    "tiny": dict(BASE, data="stdlib", batch_size=32, max_steps=200, eval_tokens=32_768),
    "dense": dict(BASE, data="tinystories", batch_size=128, max_steps=10_000, eval_tokens=131_072),
    "dense-low": dict(BASE, data="tinystories", batch_size=32, max_steps=5_000, eval_tokens=131_072),
    "moe": dict(BASE, data="cosmopedia", optimizer="muon", lr=0.065, min_lr_ratio=0.05, batch_size=16, max_steps=100,
                eval_tokens=32_768),
}


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)  # sweep.py compares flags by their full names

    def error(self, message):  # one line, without the long usage text
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number of `kind` in [low, high], or above low."""
    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and (value > low if above else value >= low) and value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not a number {'above' if above else 'of at least'} {low}"
                                             + (f" and at most {high}" if high < math.inf else ""))
        return value
    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    p = Parser("train.py", description=__doc__.split("\n\n")[0].strip(), epilog="Defaults not shown come from the preset.")
    count, positive, ratio = number(int, 1), number(float, 0, above=True), number(float, 0, 1)
    g = p.add_argument_group("what to train on what")
    g.add_argument("--preset", choices=PRESETS, default="tiny")
    g.add_argument("--data", help="stdlib, tinystories, cosmopedia, or the path of a text file or folder")
    g.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), cuda, cuda:1, mps or cpu")
    g.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                   help="auto: bfloat16 where the hardware computes it natively")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                   help="torch.compile; default: on CUDA, and on a CPU for runs long enough to earn it back")
    g = p.add_argument_group("optimizer")
    g.add_argument("--optimizer", choices=["adamw", "muon"])
    g.add_argument("--lr", type=positive, help="peak learning rate (Muon's, if that is the optimizer)")
    g.add_argument("--adamw-lr-ratio", type=positive, help="with Muon: AdamW's rate as a share of Muon's")
    g.add_argument("--weight-decay", type=number(float, 0))
    g.add_argument("--beta1", type=number(float, 0, 0.9999999))
    g.add_argument("--beta2", type=number(float, 0, 0.9999999))
    g.add_argument("--momentum", type=number(float, 0, 0.9999999), help="Muon's")
    g.add_argument("--grad-clip", type=number(float, 0), help="largest gradient norm; 0: no clipping")
    g.add_argument("--balance-weight", type=number(float, 0), help="MoE: weight of the load-balancing loss")
    g = p.add_argument_group("schedule")
    g.add_argument("--schedule", choices=SCHEDULES)
    g.add_argument("--warmup-ratio", type=ratio, help="share of the steps")
    g.add_argument("--min-lr-ratio", type=ratio, help="share of the peak rate")
    g = p.add_argument_group("budget")
    g.add_argument("--batch-size", type=count, help="sequences an optimizer step, on all devices together")
    g.add_argument("--grad-accum", type=count, help="pieces to compute a batch in: less memory, the same gradients (the balance "
                   "loss of experts is taken a piece)")
    g.add_argument("--context-length", type=count)
    g.add_argument("--max-steps", type=count, help="optimizer steps")
    g.add_argument("--seed", type=number(int, 0), default=0, help="of the initial weights and the order of batches")
    g = p.add_argument_group("reporting")
    g.add_argument("--eval-interval", type=count, help="steps; default a tenth of the run")
    g.add_argument("--eval-tokens", type=count)
    g.add_argument("--log-interval", type=count, help="steps; default a hundredth of the run")
    g.add_argument("--checkpoint-interval", type=count, help="steps; default a tenth of the run")
    g.add_argument("--out", type=Path, help="the run's folder; default runs/single/PRESET-lrLR-sSEED")
    g.add_argument("--resume", action="store_true", help="continue the run in --out if there is one")
    g.add_argument("--sample", type=number(int, 0), default=64, help="tokens of text to generate at the end")
    g.add_argument("--no-plot", action="store_true", help="draw no pictures")
    g.add_argument("--no-progress", action="store_true", help="plain lines in place of a bar")
    g.add_argument("--dry-run", action="store_true", help="check the arguments, prepare the data, and stop")
    g = p.add_argument_group("model (defaults from the preset)")
    for name in ("d-model", "n-layers", "n-heads", "d-ff", "vocab-size", "top-k"):
        g.add_argument(f"--{name}", type=count)
    g.add_argument("--n-experts", type=number(int, 0))
    g.add_argument("--dropout", type=number(float, 0, 0.999))
    args = p.parse_args(argv)

    recipe, config = RECIPES[args.preset], PRESETS[args.preset]
    guess = args.lr is None and args.optimizer not in (None, recipe["optimizer"])
    for name, value in (*recipe.items(), *asdict(config).items()):
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.eval_interval = args.eval_interval or max(1, args.max_steps // 10)
    args.log_interval = args.log_interval or max(1, args.max_steps // 100)
    args.checkpoint_interval = args.checkpoint_interval or max(1, args.max_steps // 10)
    try:
        make_schedule(args.schedule, args.max_steps, args.warmup_ratio, args.min_lr_ratio)
        config = replace(config, **{name: getattr(args, name) for name in asdict(config)})
    except ValueError as e:
        p.error(e)
    if guess:  # the preset's rate is for its own optimizer
        with torch.device("meta"):
            args.lr = rule_of_thumb(count_parameters(Transformer(config))["total"]) if args.optimizer == "muon" else BASE["lr"]
    return args, config


def fail(message):
    """Bad input: one line, exit status 2."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


def pick_device(name, local_rank=0):
    """A torch.device that is really there; `auto` takes cuda, then mps, then cpu."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f"unknown device {name!r}; use auto, cuda, mps or cpu")
    there = {"cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(), "mps": mps, "cpu": True}
    if not there.get(device.type, False):
        fail(f"{name} is not available here; use --device cpu")
    return torch.device("cuda", local_rank) if name == "cuda" else device


def pick_dtype(name, device):
    """bfloat16 where the hardware multiplies it natively, else float32. float16 on a CPU is over 100 times slower."""
    if name != "auto":
        return getattr(torch, name)
    native = {"cuda": lambda: torch.cuda.get_device_capability(device) >= (8, 0),
              "cpu": lambda: any(getattr(torch.cpu, f, bool)() for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))}
    return torch.bfloat16 if native.get(device.type, bool)() else torch.float32


def pick_compile(wanted, device, config, n_params, tokens):
    """The torch.compile backend, or None. On 2 CPU cores it costs 40 s and saves a sixth: worth it from about 5 minutes."""
    if wanted is False or device.type == "mps" and not wanted:
        return None
    long_run = 6 * n_params * tokens > 1.5e14 and not config.n_experts  # 5 minutes at 500 GFLOP/s
    return {"cuda": "inductor", "mps": "aot_eager"}.get(device.type, "inductor" if wanted or long_run else None)


def pick_graph(device, dtype, config, backend):
    """
    Whether a step can be recorded as a CUDA graph, which holds no wait for the host and draws no new random numbers: experts need
    the fused grouped_mm, which Hopper and Blackwell have for bfloat16, and dropout rules it out.
    """
    if device.type != "cuda" or not backend or config.dropout:
        return False
    return not config.n_experts or dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)


def keep_freed_memory():
    """
    Tell glibc to keep large freed blocks. By default it returns them to the system, and every activation of every step is
    then mapped and zeroed anew: on 2 cores that costs 5% of a dense step and 40% of a moe step. Other systems: no effect.
    """
    try:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0), libc.mallopt(M_TRIM_THRESHOLD, -1)  # -1: never (a large MoE frees over 2 GB)
    except OSError:
        pass


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if os.path.exists("/proc/cpuinfo") else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

# ----------------------------------------------------------------------------------------------------------------------
# One step, and one evaluation

def compiled(model, optimizers, backend, device):
    """
    torch.compile of model.losses, and with inductor of the optimizers, whose groups differ in shapes but never change them; for
    a GPU the model first gets the attention of attention.py.
    """
    # Otherwise graphs with model.py's autograd functions are never cached, and each start takes 2 s longer (H100).
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    if backend == "inductor":
        for optimizer in optimizers:
            optimizer.update = torch.compile(optimizer.update, dynamic=False)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            from attention import rotary_attention  # not above: it needs Triton, as does inductor on a GPU
            for block in model.blocks:
                block.attention.core = rotary_attention
    return torch.compile(model.losses, backend=backend)


def make_step(losses, optimizers, model, args):
    """
    step(x, y) -> (1 + router figures,) float32: the cross-entropy, the gradient's norm before clipping, the router's
    figures; x, y (grad_accum, batch / grad_accum / devices, T). Nothing in it waits for a GPU.
    """
    params, world = list(model.parameters()), dist.get_world_size() if dist.is_initialized() else 1

    def step(x, y):
        figures, share = 0, 1 / (len(x) * world)
        for xi, yi in zip(x, y):
            ce, router = losses(xi, yi)
            loss = ce if router is None else ce + args.balance_weight * router[:, 0].sum()
            (loss * share).backward()
            row = ce[None] if router is None else torch.cat((ce[None], router.flatten()))
            figures = figures + row.detach() * share
        grads = [p.grad for p in params]
        if world > 1:
            add_up(grads + [figures])
        norm = torch.nn.utils.get_total_norm(grads)
        scale = args.grad_clip / norm.clamp(min=args.grad_clip) if args.grad_clip else 1.0
        for optimizer in optimizers:
            optimizer.step(scale=scale)  # clipping: compiled, it is one with the update and costs no pass of its own
            optimizer.zero_grad(set_to_none=True)
        return torch.cat((figures[:1], norm[None], figures[1:]))
    return step


def add_up(tensors):
    """
    Each tensor becomes its sum over all processes: one message for all of them. Gradients travel in float32: in bfloat16 the
    final loss of the tiny preset moved by up to 0.06 nats, while merely summing in another order moves it by 0.01 (5 seeds).
    """
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)])


def graphed(step, warmup=3):
    """
    The same step as one CUDA graph, for the hundreds of small kernels of a small model to follow each other without gaps.
    The first calls run as they are (they compile, and allocate the optimizers' state), the next is recorded, then replayed.
    """
    stream, calls, static, graph = torch.cuda.Stream(), 0, {}, torch.cuda.CUDAGraph()

    def call(x, y):
        nonlocal calls
        calls += 1
        if calls <= warmup:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                out = step(x, y)
            torch.cuda.current_stream().wait_stream(stream)
            return out
        if calls == warmup + 1:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            static["x"], static["y"] = x.clone(), y.clone()
            with torch.cuda.graph(graph):
                static["out"] = step(static["x"], static["y"])
        static["x"].copy_(x)
        static["y"].copy_(y)
        graph.replay()
        return static["out"].clone()  # the next replay writes over it
    return call


@torch.no_grad()
def evaluate(model, x, y, batch_size, device):
    """x, y (windows, T), the same every time -> mean cross-entropy in nats a token, and the share of tokens ranked first."""
    model.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = torch.zeros(2, device=device)
    for xb, yb in zip(x[rank::world].split(batch_size), y[rank::world].split(batch_size)):
        if not len(xb):  # more devices than windows
            continue
        yb = yb.to(device)
        logits, loss = model(xb.to(device), yb)
        total += torch.stack((loss * yb.numel(), (logits.argmax(-1) == yb).sum())) / y.numel()
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return total.tolist()

# ----------------------------------------------------------------------------------------------------------------------
# The folder of a run

def write_json(path, value):
    """Atomically; JSON has no nan, so what is not finite becomes null."""
    value = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=2, default=str) + "\n")
    path.with_suffix(".tmp").replace(path)


def save(path, value):
    path.parent.mkdir(exist_ok=True)
    torch.save(value, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def git_commit():
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True,
                              text=True, check=True, cwd=Path(__file__).parent).stdout.strip()  # "-dirty": with local changes
    except (OSError, subprocess.CalledProcessError):
        return None


def open_metrics(path, columns, upto):
    """metrics.csv open for appending, cut back to the rows up to step `upto`: a resumed run writes the rest again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [r for r in csv.DictReader(line for line in lines if line.endswith("\n")) if int(r["step"]) <= upto]
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)
    file = path.open("a", newline="", buffering=1)  # each row reaches the disk as it is written
    return file, csv.DictWriter(file, columns)


def peak_memory_mb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

# ----------------------------------------------------------------------------------------------------------------------
# The run

def main(argv=None):
    args, config = parse_args(argv)
    keep_freed_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    dtype = pick_dtype(args.dtype, device)
    if args.batch_size % (args.grad_accum * world):
        fail(f"batch size {args.batch_size} is not a multiple of grad-accum {args.grad_accum} x {world} devices")

    # The folder ------------------------------------------------------------------------------------------------------
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "no_plot", "no_progress", "dry_run", "sample")}
    saved = None
    out = args.out or Path("runs/single") / f"{args.preset}-lr{args.lr:g}-s{args.seed}"
    if not args.dry_run:
        while rank == 0 and not args.resume and (out / "summary.json").exists():
            if args.out:
                fail(f"{out} already holds a run; add --resume to continue it, or choose another --out")
            stem, _, n = out.name.partition("+")  # a default name never overwrites: +2, +3, ...
            out = out.with_name(f"{stem}+{int(n or 1) + 1}")
        checkpoint, summary_path = out / "checkpoints/last.pt", out / "summary.json"
        there = next(path for path in (out, *out.parents) if os.path.exists(path))  # nothing is made before the data is ready
        if not (there.is_dir() and os.access(there, os.W_OK)):
            fail(f"cannot write to {there}; choose another --out")
        if args.resume and checkpoint.exists():  # with the flags that it was started with, or not at all
            saved = torch.load(checkpoint, map_location=device, weights_only=True)
            for flag, value in settings.items():
                if (before := saved["settings"].get(flag)) != value:
                    fail(f"{out} was started with another --{flag.replace('_', '-')} ({before}); repeat its flags, or choose "
                         "another --out")
        if args.resume and summary_path.exists():
            if json.loads(summary_path.read_text())["status"] not in ("running", "interrupted"):
                print(f"{out} is already finished")
                return 0

    # Data, model, optimizers, schedule -------------------------------------------------------------------------------
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
        if rank > 0:
            dist.barrier()  # the first process prepares the data, the others find it ready
    n_tokens = args.batch_size * args.context_length * args.max_steps
    try:
        corpus = data.load(args.data, args.vocab_size, n_tokens)
        val_x, val_y = data.val_windows(corpus.val, config.context_length, args.eval_tokens)
    except data.DataError as e:
        fail(e)
    if len(corpus.train) <= config.context_length:
        fail(f"the training text has only {len(corpus.train)} tokens; lower --context-length {config.context_length}")
    if world > 1 and rank == 0:
        dist.barrier()
    config = replace(config, vocab_size=corpus.tokenizer.vocab_size)
    if args.dry_run:
        return 0

    torch.manual_seed(args.seed)  # weights are drawn on the CPU: the same on every device
    model = Transformer(config, dtype).to(device)
    counts = count_parameters(model)
    optimizers = build_optimizer(model, args.optimizer, args.lr, args.weight_decay, (args.beta1, args.beta2), args.momentum,
                                 args.adamw_lr_ratio)
    schedule = make_schedule(args.schedule, args.max_steps, args.warmup_ratio, args.min_lr_ratio)
    losses, backend = model.losses, pick_compile(args.compile, device, config, counts["total"], n_tokens)
    if backend:
        losses = compiled(model, optimizers, backend, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where streams, graphs and Triton's kernels go
        torch.set_float32_matmul_precision("high")  # TF32
    train_step = make_step(losses, optimizers, model, args)
    if pick_graph(device, dtype, config, backend):
        train_step = graphed(train_step)

    # State: fresh, or the checkpoint's -------------------------------------------------------------------------------
    state = dict(step=0, elapsed=0.0, history=[], running=None, best_val_loss=math.inf,
                 max_grad_norm=torch.zeros((), device=device))
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, s in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(s)
        if args.schedule == "plateau":
            schedule.state = saved["schedule"]
        state = saved["state"]
    start = state["step"]

    # What is written down --------------------------------------------------------------------------------------------
    names = [name for i in range(config.n_layers if config.n_experts else 0) for name in (
        f"balance_loss_L{i}", f"router_entropy_L{i}", *(f"share_L{i}_E{j}" for j in range(config.n_experts)))]
    master = rank == 0
    if master:
        out.mkdir(parents=True, exist_ok=True)
        file, writer = open_metrics(out / "metrics.csv", ["step", "tokens", "elapsed", "lr", "train_loss", "grad_norm",
                                    "tokens_per_sec", "val_loss", "val_accuracy", "val_perplexity", "val_bpb", *names], start)
        log_file = (out / "training.log").open("a")
        write_json(out / "config.json", dict(
            args=vars(args), model=asdict(config), n_params=counts["total"], data=corpus.meta,
            versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            git_commit=git_commit(), device=str(device), device_name=describe(device), dtype=str(dtype)[6:], devices=world,
            compile=backend))
        write_json(summary_path, dict(status="running", steps=start, max_steps=args.max_steps))
    bar = tqdm(total=args.max_steps, initial=start, unit="step", dynamic_ncols=True,
               disable=not master or args.no_progress or not sys.stderr.isatty())

    def say(line, console=True):
        if master:
            log_file.write(line + "\n")
            log_file.flush()
            if console:
                bar.write(line)

    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):  # once: finish the step and save; twice: now
        signal.signal(s, lambda *_: sys.exit(130) if stop else stop.append(True))
    say(f"{args.preset} on {corpus.meta['corpus']}: {counts['total']:,} parameters ({counts['used per token']:,} used per token), "
        f"vocabulary {config.vocab_size:,}; {args.max_steps} steps of {args.batch_size} x {config.context_length} tokens, "
        f"{n_tokens / len(corpus.train):.2g} times the training text; "
        f"{device}, {str(dtype)[6:]}{', compiled' if backend else ''}; {args.optimizer} at {args.lr:g} -> {out}"
        + (f", from step {start}" if start else ""))

    # The loop --------------------------------------------------------------------------------------------------------
    step, tokens_a_step, diverged = start, args.batch_size * config.context_length, plot.has_diverged(state["history"])
    began, mark, mark_step = time.perf_counter() - state["elapsed"], time.perf_counter(), start
    while True:
        last = step == args.max_steps or diverged
        paused, agreed = time.perf_counter(), False
        if (step % args.eval_interval == 0 or last) and step > start:
            loss, accuracy = evaluate(model, val_x, val_y, min(args.batch_size, 32), device)
            bpb = loss / math.log(2) * corpus.meta["val_tokens"] / corpus.meta["val_bytes"]
            state["val"] = val = dict(val_loss=loss, val_accuracy=accuracy, val_perplexity=math.exp(min(loss, 700)), val_bpb=bpb)
            diverged = diverged or not math.isfinite(loss)
            if args.schedule == "plateau":
                schedule.observe(loss)
            if master:
                writer.writerow(dict(step=step, tokens=step * tokens_a_step, elapsed=f"{time.perf_counter() - began:.3f}", **val))
            say(f"step {step}/{args.max_steps} | val loss {loss:.4f} | accuracy {accuracy:.2%} | {bpb:.4f} bits a byte")
            if loss < state["best_val_loss"]:
                state.update(best_val_loss=loss, best_val_step=step, best_val_accuracy=accuracy)
                if master:
                    save(out / "checkpoints/best.pt", dict(model=model.state_dict(), config=asdict(config), step=step, **val))
        if world > 1 and step % args.log_interval == 0:  # a signal may reach processes at different steps: stop together
            flag = torch.tensor(float(bool(stop)), device=device)
            dist.all_reduce(flag)
            agreed = flag.item() > 0
        stopped = (agreed if world > 1 else bool(stop)) and not last
        if master and (stopped or last or step % args.checkpoint_interval == 0 and step > start):
            state.update(step=step, elapsed=time.perf_counter() - began)
            save(checkpoint, dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], state=state,
                                  schedule=getattr(schedule, "state", None), settings=settings, config=asdict(config)))
        mark += time.perf_counter() - paused  # tokens_per_sec is that of training alone
        if last or stopped:
            break

        x, y = (t.view(args.grad_accum, world, -1, config.context_length)[:, rank] for t in
                data.get_batch(corpus.train, args.batch_size, config.context_length, args.seed, step))
        if device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        if args.dropout:
            torch.manual_seed(args.seed * 1_000_003 + step)  # dropout, too, is a function of (seed, step)
        factor = schedule(step)
        set_lr(optimizers, factor)
        figures = train_step(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
        state["running"] = figures if state["running"] is None else state["running"] + figures
        state["max_grad_norm"] = torch.maximum(state["max_grad_norm"], figures[1])
        step += 1
        bar.update()

        if step % args.log_interval == 0 or step == args.max_steps:
            since = (step - 1) % args.log_interval + 1
            loss, norm, *router = (state["running"] / since).tolist()
            state["running"] = None
            state["history"].append(loss)
            diverged = plot.has_diverged(state["history"])
            now = time.perf_counter()
            speed, mark, mark_step = (step - mark_step) * tokens_a_step / (now - mark), now, step
            lr, eta = args.lr * factor, (args.max_steps - step) * tokens_a_step / speed
            if master:
                writer.writerow(dict(step=step, tokens=step * tokens_a_step, elapsed=f"{now - began:.3f}", lr=lr, train_loss=loss,
                                     grad_norm=norm, tokens_per_sec=f"{speed:.0f}", **dict(zip(names, router))))
            bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tok/s")
            say(f"step {step}/{args.max_steps} | loss {loss:.3f} | lr {lr:.1e} | {speed:,.0f} tok/s | "
                f"eta {int(eta) // 3600}:{int(eta) // 60 % 60:02}:{int(eta) % 60:02}", console=bar.disable)
    bar.close()

    # The end ---------------------------------------------------------------------------------------------------------
    if master:
        seconds, val = time.perf_counter() - began, state.get("val")  # of a run killed after its last checkpoint, too
        status = "interrupted" if stopped else "diverged" if diverged else plot.classify(state["history"])
        summary = dict(status=status, steps=step,
                       max_steps=args.max_steps, tokens=step * tokens_a_step, seconds=seconds,
                       tokens_per_sec=step * tokens_a_step / seconds, lr=args.lr, seed=args.seed,
                       peak_memory_mb=peak_memory_mb(device), n_params=counts["total"], diverged_at=step if diverged else None)
        if state["history"]:
            summary.update(final_train_loss=state["history"][-1], max_grad_norm=state["max_grad_norm"].item())
        summary.update({k: v for k, v in state.items() if k.startswith("best_")})
        if last:
            summary.update({f"final_{k}": v for k, v in val.items()})
        write_json(summary_path, summary)
        file.close()
        if stopped:
            say(f"interrupted at step {step}; the same command with --out {out} --resume goes on from here")
        else:
            say(f"{summary['status']}: val loss {val['val_loss']:.4f}, accuracy {val['val_accuracy']:.2%}, perplexity "
                f"{val['val_perplexity']:.1f}, {val['val_bpb']:.4f} bits a byte; {seconds:.0f} s, {summary['tokens_per_sec']:,.0f} tok/s")
        if last and args.sample and not diverged:
            prompt = torch.tensor([[corpus.tokenizer.eot]], device=device)
            ids = model.eval().generate(prompt, args.sample, temperature=0.8, top_k=50)[0, 1:].tolist()
            say("sample: " + corpus.tokenizer.decode(ids))
        if not args.no_plot:
            plot.draw_run(out)
    if world > 1:
        del train_step  # NCCL waits for the graphs that hold its calls
        dist.destroy_process_group()
    return 130 if stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the loop, which handles it: nothing to save yet
        sys.exit(130)
    except BrokenPipeError:  # whoever read the lines has gone (| head): end without a traceback; --resume goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
