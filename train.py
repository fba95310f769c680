"""
Train one model at one learning rate, and write down everything that happened.

    python train.py --lr 3e-4 --device mps               # the tiny preset, on Python's standard library
    python train.py --preset dense-low --lr 3e-3         # any flag overrides what the preset says
    torchrun --nproc_per_node 2 train.py --preset dense  # each device takes a slice of every batch

The loop is at the bottom: evaluate, save, stop, take a batch, step, log. A step is always an optimizer step:
--batch-size counts the sequences of one, on all devices; --grad-accum only says in how many pieces they come.

A run is a folder (--out): config.json (all it takes to repeat it), metrics.csv (a row a log step, a row an
evaluation), summary.json, training.log, pictures, checkpoints/{last,best}.pt. Batches and dropout follow
from (seed, step), so a resumed run needs no generator state and ends with the same numbers as one left alone.
"""
import os
import signal

if __name__ == "__main__":  # before the imports, which take a second: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import copy
import csv
import ctypes
import hashlib
import importlib.util
import io
import json
import math
import platform
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import attention
from torch.utils._pytree import tree_map_only

import data
import plot
from model import PRESETS, ModelConfig, Transformer, count_parameters
from optim import adamw_preconditioner, build_optimizer, stability_threshold, top_eigenvalue
from schedule import SCHEDULES, first_guess, make_schedule

# Settings -----------------------------------------------------------------------------------------

RECIPES = {
    "tiny": dict(data="stdlib", warmup_ratio=0.3, batch_size=32, max_steps=200, eval_tokens=32_768),
    "dense": dict(data="tinystories", batch_size=128, max_steps=10_000, eval_tokens=131_072),
    "dense-low": dict(data="tinystories", batch_size=32, max_steps=5_000, eval_tokens=131_072),
    "moe": dict(data="cosmopedia", optimizer="muon", warmup_ratio=0.02, min_lr_ratio=0.2, batch_size=16,
                max_steps=100, eval_tokens=32_768),
}
FOUND = {("dense", "adamw", 512): 3e-3, ("dense-low", "adamw", 512): 1.3e-3,    # preset, optimizer, d_model:
         ("dense-low", "muon", 512): 0.01, ("moe", "muon", 384): 0.065}         # found (results/README.md)
FREE = ("out", "resume", "no_plot", "dry_run", "prepare", "sample", "checkpoint_interval",
        "data_tokens")  # change no number; if data_tokens changes the text, its hash tells
CODE = ("model.py", "optim.py", "schedule.py", "data.py", "train.py")       # what a loss depends on

def fail(message):
    """Bad input: one line, exit status 2."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)

def within(kind, low, high):
    """How argparse reads a flag: as a number of that kind in [low, high]."""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text:.40} is not a number from {low:g} to {high:g}")
    return dict(type=number)

TEXT, SWITCH = dict(type=str), dict(action="store_true")
COUNT, AUTO = within(int, 1, 1e9), within(int, 0, 1e9)
RATE, SIZE = within(float, 1e-30, 1e30), within(float, 0, 1e30)
SHARE, BELOW_ONE = within(float, 0, 1), within(float, 0, 0.9999999)
FLAGS = {   # flag: how to read it, default (None: the preset's, unless the help says more), help
    "data": (TEXT, None, "stdlib, tinystories, cosmopedia, or the path of a text file or folder"),
    "data-tokens": (AUTO, 0, "tokens of text to fetch; 0: as many as the run reads"),
    "device": (TEXT, "auto", "auto (cuda, else mps, else cpu), cuda, cuda:1, mps or cpu"),
    "dtype": (dict(choices=["auto", "bfloat16", "float32"]), "auto", "auto: bfloat16 if the hardware has it"),
    "optimizer": (dict(choices=["adamw", "muon", "sgd"]), "adamw", "muon: for matrices, adamw for the rest"),
    "lr": (RATE, None, "peak learning rate; None: the best found for the preset, or a first guess"),
    "adamw-lr-ratio": (RATE, 0.1, "with muon: adamw's rate as a share of it"),
    "weight-decay": (SIZE, 0.1, "a step, times the rate"),
    "beta1": (BELOW_ONE, 0.9, "of adamw's averaged gradient"),
    "beta2": (BELOW_ONE, 0.95, "of adamw's averaged square"),
    "momentum": (BELOW_ONE, 0.95, "of muon and sgd; sgd with 0 is gradient descent"),
    "grad-clip": (SIZE, 1.0, "largest gradient norm; 0: no clipping"),
    "balance-weight": (SIZE, 0.01, "with experts: weight of the load-balancing loss"),
    "schedule": (dict(choices=SCHEDULES), "cosine", "what follows the warm-up"),
    "warmup-ratio": (SHARE, 0.1, "share of the steps"),
    "min-lr-ratio": (SHARE, 0.1, "share of the peak rate"),
    "batch-size": (COUNT, None, "sequences an optimizer step, on all devices together"),
    "grad-accum": (COUNT, 1, "pieces to compute each device's share in: less memory, the same gradients"),
    "max-steps": (COUNT, None, "optimizer steps"),
    "seed": (within(int, 0, 2**63 - 1), 0, "of weights, batches and dropout"),
    "eval-interval": (AUTO, 0, "steps; 0: a tenth of the run"),
    "eval-tokens": (COUNT, None, "validation tokens, always the same"),
    "log-interval": (AUTO, 0, "steps; 0: a hundredth of the run"),
    "sharpness": (AUTO, 0, "steps between measurements of the Hessian's top eigenvalue; 0: none"),
    "checkpoint-interval": (AUTO, 0, "steps; 0: a tenth of the run, but no sooner than after 10 s"),
    "out": (TEXT, None, "the run's folder; None: one in runs/single"),
    "sample": (AUTO, 64, "tokens of text to generate in the end"),
    "n-experts": (AUTO, None, "0: dense"),
    "dropout": (BELOW_ONE, None, "share of activations"),
    "full-batch": (SWITCH, False, "the same batch at every step"),
    "resume": (SWITCH, False, "go on with the run in --out, if there is one"),
    "no-plot": (SWITCH, False, "draw no pictures"),
    "dry-run": (SWITCH, False, "check the flags, print how many tokens the run would read, and stop"),
    "prepare": (SWITCH, False, "check the flags, prepare the data, and stop"),
    "compile": (dict(action=argparse.BooleanOptionalAction), None, "None: on CUDA; on a CPU for long runs"),
}
for flag in ("context-length", "vocab-size", "n-layers", "n-heads", "d-model", "d-ff", "top-k"):
    FLAGS[flag] = (COUNT, None, "of the model")

def parse_args(argv=None):
    """Command line -> (args, ModelConfig). Defaults are the preset's, which is therefore read first."""
    p = argparse.ArgumentParser("train.py", description=__doc__.split("\n\n")[0], add_help=False,
                                allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = fail
    p.add_argument("--preset", default="tiny", choices=PRESETS, help="of model, data and budget")
    preset = p.parse_known_args(argv)[0].preset
    p.add_argument("-h", "--help", action="help", help="show these flags, with the preset's defaults")
    for flag, (how, default, text) in FLAGS.items():
        p.add_argument(f"--{flag}", default=default, help=text, **how)
    p.set_defaults(**asdict(PRESETS[preset]), **RECIPES[preset])
    args = p.parse_args(argv)
    args.eval_interval = args.eval_interval or max(1, args.max_steps // 10)
    args.log_interval = args.log_interval or max(1, args.max_steps // 100)
    try:
        config = ModelConfig(**{key: getattr(args, key) for key in asdict(PRESETS[preset])})
    except ValueError as e:
        fail(e)
    method = args.optimizer, args.d_model
    args.lr = args.lr or FOUND.get((preset, *method)) or first_guess(*method)
    return args, config

# The hardware -------------------------------------------------------------------------------------

def torchrun_place():
    """(rank, world, local_rank) from the environment that torchrun sets; (0, 1, 0) without it."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    texts = [os.environ.get(name, default) for name, default in defaults.items()]
    if all(map(str.isdecimal, texts)):
        rank, world, local_rank = map(int, texts)
        if max(rank, local_rank) < world and (world == 1 or {"MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}):
            return rank, world, local_rank
    fail(f"{[*defaults]} = {texts} make no sense, or not without a MASTER_ADDR and MASTER_PORT; use torchrun")

def pick_device(name, local_rank=0):
    """A torch.device that is really there; `auto` takes cuda, then mps, then cpu."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "cuda" or (name == "auto" and there[0] == "cuda:0"):
        name = f"cuda:{local_rank}"
    elif name == "auto":
        name = there[0]
    if name not in there:
        fail(f"device {name!r} is not available here; use --device cpu")
    return torch.device(name)

def pick_dtype(name, device):
    """bfloat16 where the hardware has it, else float32 (float16 is 100 times slower on a CPU)."""
    if name != "auto":
        return getattr(torch, name)
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32

def pick_compile(wanted, device, config, tokens):
    """The torch.compile backend, or None. On 2 CPU cores it costs 40 s: worth it from about 5 minutes."""
    if wanted is False:
        return None
    if device.type == "mps":
        return "aot_eager" if wanted else None
    if device.type == "cpu":
        flops = 6 * count_parameters(config)["total"] * tokens
        long_run = flops > 1.5e14 and not config.n_experts      # 5 minutes at 500 GFLOP/s
        return "inductor" if wanted or long_run else None
    if importlib.util.find_spec("triton") and torch.cuda.get_device_capability(device) >= (7, 0):
        return "inductor"
    print("no Triton for this GPU: training without torch.compile, which is slower", file=sys.stderr)
    return None

def can_record(device, dtype, config, backend):
    """A CUDA graph holds no wait for the host (so experts need grouped_mm) and no new random numbers."""
    if device.type != "cuda" or not backend or config.dropout:
        return False
    hopper_or_blackwell = torch.cuda.get_device_capability(device)[0] in (9, 10)
    return not config.n_experts or (dtype == torch.bfloat16 and hopper_or_blackwell)

def check_size(args, config, device, world):
    """Refuse what the processes cannot share, or what no memory holds (a lower bound), before it is made."""
    if args.batch_size % (args.grad_accum * world):
        fail(f"--batch-size {args.batch_size} is no multiple of {world} x --grad-accum {args.grad_accum}")
    tokens = args.batch_size * config.context_length
    kept = 2 * config.n_layers * (6 * config.d_model + 2 * config.d_ff) / (args.grad_accum * world)
    # Float32 weights, gradients and two averages; what a token leaves for the backward pass; batches.
    gib = (16 * count_parameters(config)["total"] + tokens * (kept + 16)) / 2**30
    there = math.inf
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / 2**30
    elif hasattr(os, "sysconf"):    # Windows has none
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if gib > there:
        fail(f"needs over {gib:,.0f} GiB of memory, of {there:,.0f}; lower --batch-size or a model size")

def keep_freed_memory():
    """glibc would have it zeroed anew at every step: 5% of a dense step on 2 cores, 40% of a moe step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)     # M_MMAP_MAX
        libc.mallopt(-1, -1)    # M_TRIM_THRESHOLD: never

# One step, and one evaluation ---------------------------------------------------------------------

def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])

def make_step(losses, optimizers, model, args):
    """step(x, y) -> (2 + router records,) float32: cross-entropy, norm of the gradient before clipping, what
    the routers did; x, y (grad_accum, batch / grad_accum / devices, T). Nothing in it waits for a GPU."""
    world = dist.get_world_size() if dist.is_initialized() else 1

    def step(x, y):
        record = 0.0
        share = 1 / (len(x) * world)
        for xi, yi in zip(x, y):
            loss, router = losses(xi, yi)
            parts = [loss]
            if router is not None:
                parts.append(router)
                loss = loss + args.balance_weight * router[:, 0].sum()
            (loss * share).backward()
            record = record + flat(parts).detach() * share
        grads = [p.grad for p in model.parameters()]
        if world > 1:
            all_reduce([*grads, record])

        # Clipping is a factor in the update: no pass of its own. 0 where something is not finite: no update.
        norm = torch.nn.utils.get_total_norm(grads)
        scale = ((args.grad_clip or math.inf) / norm).clamp(max=1)
        scale = torch.where(norm.isfinite() & record[0].isfinite(), scale, 0.0)
        for optimizer in optimizers:
            optimizer.step(scale)
            optimizer.zero_grad()
        return torch.cat((record[:1], norm[None], record[1:]))
    return step

def all_reduce(tensors):
    """Each tensor becomes its sum over all processes, in one float32 message: a message in bfloat16 moved
    the final loss of tiny by up to 0.06 nats, while summing in another order moves it by 0.01 (5 seeds)."""
    message = flat(tensors)
    dist.all_reduce(message)
    for t, total in zip(tensors, message.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))

def graphed(step):
    """The same step as one CUDA graph: the hundreds of small kernels of a small model follow each other
    without gaps. Three calls compile, the fourth is recorded and from then on replayed on new x and y."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_stream(torch.cuda.Stream())      # the default stream cannot be recorded
    calls, inputs, output = 0, None, None

    def call(*batch):
        nonlocal calls, inputs, output
        calls += 1
        if calls <= 3:
            return step(*batch)
        if calls == 4:
            inputs = [t.clone() for t in batch]
            torch.cuda.empty_cache()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                output = step(*inputs)
        for fixed, t in zip(inputs, batch):
            fixed.copy_(t)
        graph.replay()
        return output.clone()                       # the next replay writes over it
    return call

@torch.no_grad()
def evaluate(model, x, y, batch_size, bytes_per_token):
    """x, y (windows, T) -> cells of metrics.csv; accuracy is the share of tokens that were ranked first."""
    model.eval()
    total = 0.0
    for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
        logits, loss = model(xb, yb)
        total = total + torch.stack((loss * yb.numel(), (logits.argmax(-1) == yb).sum()))
    model.train()
    loss, accuracy = (total / y.numel()).tolist()
    return dict(val_loss=loss, val_accuracy=accuracy, val_perplexity=math.exp(min(loss, 700)),
                val_bpb=loss / math.log(2) / bytes_per_token)

def measure_sharpness(model, optimizers, x, y, args, lr, vectors):
    """Top eigenvalue of the Hessian H of the cross-entropy of x, y (B, T), in float32; with AdamW also of
    P^-1/2 H P^-1/2 -> cells of metrics.csv. Changes only vectors {column: where the next one starts}."""
    params = [p for optimizer in optimizers for p in optimizer.params]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")       # no TF32
    plain = copy.copy(model).eval()     # the same blocks, without dropout until model.train() below
    plain.dtype = torch.float32
    # forward() has second derivatives, HeadLoss none; of a GPU's attention kernels only MATH has.
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        grads = torch.autograd.grad(plain(x, y)[1], params, create_graph=True)
    slope = flat(grads)
    gradient = slope.detach()

    scales = {"sharpness": torch.ones_like(gradient)}
    if args.optimizer == "adamw":
        clip = ((args.grad_clip or math.inf) / gradient.norm()).clamp(max=1)
        clipped = [g.detach() * clip for g in grads]
        vs = [v for optimizer in optimizers for v in optimizer.state["vs"]]
        betas, eps = optimizers[0].settings["betas"], optimizers[0].settings["eps"]
        P = adamw_preconditioner(clipped, vs, optimizers[0].state["step"], betas, eps)
        scales["preconditioned_sharpness"] = flat(P) ** -0.5
    cells = {"stability_threshold": stability_threshold(args.optimizer, lr, args.momentum, args.beta1)}
    for column, scale in scales.items():
        def product(v):
            return scale * flat(torch.autograd.grad(slope, params, scale * v, retain_graph=True))
        # The gradient is mixed in to see a direction that has overtaken the last eigenvector.
        start = scale * gradient
        start = start / start.norm() + vectors.get(column, 0)
        cells[column], vectors[column], cells["sharpness_tolerance"] = top_eigenvalue(product, start)
    model.train()
    torch.set_float32_matmul_precision(precision)
    return cells

# The folder of a run ------------------------------------------------------------------------------

def write(path, value):
    """A checkpoint, or a .json file; JSON has no nan: what is not finite becomes null."""
    if path.suffix == ".json":
        finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
        data.write_aside(path, (json.dumps(finite, indent=2) + "\n").encode())
    else:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data.write_aside(path, buffer.getvalue())

def provenance(device):
    """What made the numbers: versions, the files that a loss depends on, the commit ("-dirty": changed)."""
    folder = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with suppress(OSError):     # no git here
        commit = subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip() or None
    name = f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    code = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in CODE}
    return dict(versions=versions, code=code, git_commit=commit, device=str(device), device_name=name)

def read_folder(out, args, meta, device):
    """The checkpoint, or None, and config.json of a run that goes on with the same settings and text."""
    saved, path = None, out / "checkpoints/last.pt"
    try:
        with zipfile.ZipFile(path) as archive:          # with a checksum for each tensor
            damaged = archive.testzip()
        saved = None if damaged else torch.load(path, map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):       # it is not the file's fault
        raise
    except Exception:           # torch, pickle and zipfile raise a dozen kinds for a damaged file
        pass
    if path.exists() and not saved:
        print(f"{path} is damaged and is not used", file=sys.stderr)
    if saved and "started" not in saved:
        fail(f"{path} was written by an older version; choose another --out")
    started = saved["started"] if saved else plot.read_json(out / "config.json") or {}
    parts = [started.get("args"), started.get("data")]
    if not all(isinstance(part, dict) for part in parts):
        return None, {}
    for key, now in (vars(args) | meta).items():
        was = (parts[0] | parts[1]).get(key)
        if key not in FREE and was != now:
            change = f"--{key.replace('_', '-')} was {was!s:.80}, is {now!s:.80}"
            if key not in vars(args):
                change = f"with another text or tokenizer ({key} differs)"
            fail(f"{out} began otherwise: {change}; repeat what it began with, or change --out")
    return saved, started

# The run ------------------------------------------------------------------------------------------

def run(args, config):
    rank, world, local_rank = torchrun_place()
    device = pick_device(args.device, local_rank)
    dtype = pick_dtype(args.dtype, device)
    check_size(args, config, device, world)
    tokens_per_step = args.batch_size * config.context_length
    n_tokens = tokens_per_step * args.max_steps
    if args.dry_run:
        print(args.data_tokens or n_tokens)
        return 0
    if not args.out and (args.resume or args.out == ""):
        fail("--out needs a folder; with --resume, that of the run to go on with")
    out = Path(args.out or time.strftime(f"runs/single/{args.preset}-lr{args.lr:g}-s{args.seed}-%m%d-%H%M%S"))
    if not args.resume and (out / "summary.json").exists():
        fail(f"{out} already holds a run; add --resume to continue it, or choose another --out")

    # Data: one process prepares it, the others wait for it.
    corpus = data.load(args.data, config.vocab_size, args.data_tokens or n_tokens)
    def get_batch(n, step):         # x and y: (2, n, T)
        return torch.stack(data.get_batch(corpus.train, n, config.context_length, args.seed, step))
    get_batch(1, 0)                 # is the text long enough?
    windows = torch.stack(data.val_windows(corpus.val, config.context_length, args.eval_tokens))
    bytes_per_token = float(corpus.token_bytes[windows[1].numpy()].mean())

    # What is in the folder: a checkpoint mends whatever else is damaged; without one a run begins anew.
    saved, started = None, {}
    if args.resume:
        saved, started = read_folder(out, args, corpus.meta, device)
        before = plot.read_run(out)                     # None: config.json is damaged
        finished = (before and before["status"] in plot.STATUSES and "final_val_loss" in before["summary"]
                    and len(before["metrics"]["step"]))
        if finished and (not saved or saved["metrics"].encode() == (out / "metrics.csv").read_bytes()):
            print(f"{out} is already finished")
            return 0
    if args.prepare:
        return 0

    # The model, its optimizers and the schedule; compiled, and on a GPU one graph, where that pays.
    keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.barrier()                                  # all have read the folder before one writes
    torch.manual_seed(args.seed)                        # weights are drawn on the CPU: alike on every device
    config = replace(config, vocab_size=corpus.tokenizer.vocab_size)
    counts = count_parameters(config)
    model = Transformer(config, dtype).to(device)
    optimizers = build_optimizer(model, args.optimizer, args.lr, args.weight_decay, (args.beta1, args.beta2),
                                 args.momentum, args.adamw_lr_ratio)
    schedule = make_schedule(args.schedule, args.max_steps, args.warmup_ratio, args.min_lr_ratio)
    losses = model.losses
    backend = pick_compile(args.compile, device, config, n_tokens)
    if backend:
        losses = torch.compile(losses, backend=backend)
    if backend == "inductor":
        for optimizer in optimizers:
            optimizer.compile()
    train_step = make_step(losses, optimizers, model, args)
    if can_record(device, dtype, config, backend):
        train_step = graphed(train_step)

    # The state between steps: fresh, or the checkpoint's.
    state = SimpleNamespace(step=0, elapsed=0.0, running=0.0, history=[], diverged=False, eigenvectors={},
                            max_grad_norm=torch.zeros((), device=device), results={"best_val_loss": math.inf})
    if saved:
        state = SimpleNamespace(**saved["state"])
        model.load_state_dict(saved["model"])
        vars(schedule).update(saved["schedule"])        # plateau has attributes, the others have none
        for optimizer, kept in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(kept)
    start = step = state.step
    began = time.perf_counter() - state.elapsed

    # What is written down, by the first process alone.
    router_columns = []
    for i in range(config.n_layers if config.n_experts else 0):
        router_columns += [f"balance_loss_L{i}", f"router_entropy_L{i}"]
        router_columns += [f"share_L{i}_E{j}" for j in range(config.n_experts)]
    columns = ["step", "tokens", "elapsed", "lr", "train_loss", "grad_norm", "tokens_per_sec", "val_loss",
               "val_accuracy", "val_perplexity", "val_bpb", *router_columns]
    if args.sharpness:
        columns += ["sharpness", "preconditioned_sharpness", "stability_threshold", "sharpness_tolerance"]
    if rank == 0:
        owner = data.lock(out)
        made_by = provenance(device)
        if saved:
            started["resumes"].append(dict(step=start, **made_by))
        else:
            started = dict(args=vars(args), model=asdict(config), n_params=counts["total"], data=corpus.meta,
                           dtype=str(dtype)[6:], devices=world, compile=backend, resumes=[], **made_by)
        write(out / "config.json", started)
        write(out / "summary.json", dict(status="running", steps=start, max_steps=args.max_steps))
        log_file = (out / "training.log").open("a", errors="backslashreplace", buffering=1)
        metrics_file = (out / "metrics.csv").open("w", newline="", buffering=1)    # each row reaches the disk
        metrics_file.write(saved["metrics"] if saved else ",".join(columns) + "\r\n")
        writer = csv.DictWriter(metrics_file, columns)

    def say(line):                  # on the console and in training.log
        if rank == 0:
            print(line, flush=True)
            log_file.write(line + "\n")

    def log_row(line, **cells):     # the same, and a row of metrics.csv
        if rank == 0:
            elapsed = time.perf_counter() - began
            writer.writerow(dict(cells, step=step, tokens=step * tokens_per_step, elapsed=elapsed))
        say(f"step {step}/{args.max_steps} | {line}")

    stop, pending = [], []                          # signals that came; a checkpoint that is being written
    saver = ThreadPoolExecutor(1)                   # ... while the next steps run

    def save(name, **value):
        value = tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), value)
        while pending:
            pending.pop().result()                  # raises what went wrong with the last one
        pending.append(saver.submit(write, out / "checkpoints" / name, value))

    def on_signal(number, frame):   # once: finish the step and save; twice, or before any step: now
        if stop or step == start:
            os._exit(128 + number)
        stop.append(number)
    handlers = {number: signal.signal(number, on_signal) for number in signal.Signals
                if number.name in ("SIGINT", "SIGTERM", "SIGHUP")}

    epochs = n_tokens / len(corpus.train)
    say(f"{args.preset} on {corpus.meta['corpus']}: {counts['total']:,} parameters, "
        f"{counts['used per token']:,} a token; {args.max_steps} steps of {args.batch_size} x "
        f"{config.context_length} tokens, {epochs:.2g} times the text; {args.optimizer} at {args.lr:g} on "
        f"{device}, {dtype}, compiled by {backend} -> {out}")

    # The loop -------------------------------------------------------------------------------------
    saved_at = timed_from = time.perf_counter()         # tokens_per_sec is that of training alone
    while True:
        last = step == args.max_steps or state.diverged
        paused = time.perf_counter()

        # Evaluate: always the same windows, before the step that follows.
        if step > start and (step % args.eval_interval == 0 or last):
            val = evaluate(model, *windows.to(device), min(args.batch_size, 32), bytes_per_token)
            loss, accuracy, bpb = val["val_loss"], val["val_accuracy"], val["val_bpb"]
            log_row(f"val loss {loss:.4f} | accuracy {accuracy:.2%} | {bpb:.4f} bits a byte", **val)
            state.results.update({f"final_{key}": value for key, value in val.items()})
            if loss < state.results["best_val_loss"]:
                state.results.update(best_val_loss=loss, best_val_step=step, best_val_accuracy=accuracy)
                if rank == 0:
                    save("best.pt", model=model.state_dict(), config=asdict(config), step=step, **val)
            if args.schedule == "plateau":
                schedule.observe(loss)
            state.diverged = state.diverged or not math.isfinite(loss)
            last = last or state.diverged

        # Stop? A signal may reach processes at different steps, so they agree at the log steps.
        stopped = bool(stop) and not last and (world == 1 or step % args.log_interval == 0)
        if world > 1 and step % args.log_interval == 0:
            votes = torch.tensor(float(stopped), device=device)
            all_reduce([votes])
            stopped = votes.item() > 0

        # Save everything that the next step depends on, and the rows written so far.
        due = step > start and step % (args.checkpoint_interval or max(1, args.max_steps // 10)) == 0
        due = due and (args.checkpoint_interval or time.perf_counter() - saved_at > 10)     # it takes time
        if rank == 0 and (due or last or stopped):
            saved_at = time.perf_counter()
            state.step, state.elapsed = step, saved_at - began
            save("last.pt", model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                 schedule=vars(schedule), state=vars(state), config=asdict(config), started=started,
                 metrics=(out / "metrics.csv").read_bytes().decode())
        if last or stopped:
            break

        # Measure the sharpness that this step meets, always on the same 16 sequences, or the full batch.
        factor = schedule(step)
        lr = args.lr * factor
        if args.sharpness and step % args.sharpness == 0:
            n = args.batch_size if args.full_batch else min(args.batch_size, 16)
            xy = get_batch(n, 0).to(device)
            cells = measure_sharpness(model, optimizers, *xy, args, lr, state.eigenvectors)
            log_row(f"sharpness {cells['sharpness']:.4g}", **cells)
        timed_from += time.perf_counter() - paused

        # Take a batch: this process's slice of it, in grad_accum pieces.
        xy = get_batch(args.batch_size, 0 if args.full_batch else step)      # (2, B, T)
        xy = xy.view(2, args.grad_accum, world, -1, config.context_length)[:, :, rank]
        xy = xy.pin_memory() if device.type == "cuda" else xy
        if args.dropout:                                # a function of (seed, step, rank), too
            torch.manual_seed((args.seed * 1_000_003 + step * world + rank) % 2**63)

        # Step.
        for optimizer in optimizers:
            optimizer.set_lr(factor)
        record = train_step(*xy.to(device, non_blocking=True))
        state.running = state.running + record
        state.max_grad_norm = torch.maximum(state.max_grad_norm, record[1])
        step += 1

        # Log: means since the last log step.
        if step % args.log_interval == 0 or step == args.max_steps:
            n_steps = (step - 1) % args.log_interval + 1
            loss, grad_norm, *router = (state.running / n_steps).tolist()
            state.running = 0.0
            state.history.append(loss)
            state.results["final_train_loss"] = loss
            state.diverged = plot.has_diverged(state.history) or not math.isfinite(grad_norm)
            now = time.perf_counter()
            speed = min(n_steps, step - start) * tokens_per_step / (now - timed_from)
            timed_from = now
            eta = timedelta(seconds=int((args.max_steps - step) * tokens_per_step / speed))
            log_row(f"loss {loss:.3f} | lr {lr:.1e} | {speed:,.0f} tok/s | eta {eta}", lr=lr, train_loss=loss,
                    grad_norm=grad_norm, tokens_per_sec=speed, **dict(zip(router_columns, router)))

    # The end --------------------------------------------------------------------------------------
    for result in pending:
        result.result()
    for number, handler in handlers.items():            # from here on the first Ctrl-C ends it
        signal.signal(number, handler)
    if rank == 0:
        status = "diverged" if state.diverged else plot.classify(state.history)
        if stopped:
            status = "interrupted"
        seconds = time.perf_counter() - began
        tokens = step * tokens_per_step
        write(out / "summary.json", dict(
            status=status, steps=step, max_steps=args.max_steps, tokens=tokens, seconds=seconds, lr=args.lr,
            tokens_per_sec=tokens / seconds, seed=args.seed, n_params=counts["total"],
            peak_memory_mb=torch.cuda.max_memory_allocated() / 2**20 or None,
            diverged_at=step if status == "diverged" else None, max_grad_norm=state.max_grad_norm.item(),
            **state.results))
        say(f"{status} at step {step}: {seconds:.0f} s, {tokens / seconds:,.0f} tok/s")
        if stopped:
            say(f"the same command with --out {out} --resume goes on from here")
        elif args.sample and not state.diverged:
            prompt = torch.tensor([[corpus.tokenizer.eot]], device=device)
            ids = model.eval().generate(prompt, args.sample, temperature=0.8, top_k=50)[0, 1:].tolist()
            say("sample: " + corpus.tokenizer.decode(ids))
        if not args.no_plot:
            plot.draw_run(out)
        owner.close()
    if world > 1:
        del train_step                                  # NCCL waits for the graphs that hold its calls
        dist.destroy_process_group()
    return 128 + (stop or [signal.SIGINT])[0] if stopped else 0     # perhaps another process got the signal

def main(argv=None):
    try:
        return run(*parse_args(argv))
    except BrokenPipeError:     # whoever read the lines has gone (| head): no traceback; --resume goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except data.DataError as e:
        fail(e)
    except (MemoryError, torch.OutOfMemoryError):
        fail("out of memory; lower --batch-size, or raise --grad-accum")
    except OSError as e:        # a full disk, a folder that cannot be written
        fail(f"cannot use {e.filename or 'the disk'}: {e.strerror or e}; make room, or choose another --out")

if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")    # None: closed by whoever started this
    sys.stdout.reconfigure(errors="backslashreplace")   # a sample may hold what the terminal cannot show
    sys.exit(main())
