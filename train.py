"""
Train one model at one learning rate, and write down everything that happened.

    python train.py --lr 3e-4 --device mps               # the tiny preset, on Python's standard library
    python train.py --preset dense-low --lr 3e-3         # any flag overrides what the preset says
    torchrun --nproc_per_node 2 train.py --preset dense  # each device takes a slice of every batch

The file goes from the outside in: flags, hardware, the folder of a run, evaluation, the step, the loop. A
step is one of the optimizer: --batch-size counts its sequences, --grad-accum the pieces in which they come.

A run is a folder (--out): config.json (all it takes to repeat it), metrics.csv (a row a log step, a row an
evaluation), summary.json, training.log, pictures, checkpoints/{last,best}.pt. Batches and dropout follow
from (seed, step), so a resumed run needs no generator state and ends with the same numbers as one left alone.
"""
import argparse
import copy
import csv
import ctypes
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import data
import plot
from data import say
from model import PRESETS, ModelConfig, Transformer, count_parameters
from optim import OPTIMIZERS, build_optimizer, measure_sharpness
from schedule import SCHEDULES, first_guess, make_schedule

# Flags --------------------------------------------------------------------------------------------

def fail(message):
    """Bad input: one line, exit status 2."""
    say(f"train.py: {message}", sys.stderr)
    sys.exit(2)

def within(kind, low, high):
    """How argparse reads a flag: as a number of that kind in [low, high]."""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text:.40} is not a number from {low:g} to {high:g}")
    return dict(type=number, metavar="N" if kind is int else "X")

TEXT, SWITCH, ON_OFF = dict(), dict(action="store_true"), dict(action=argparse.BooleanOptionalAction)
COUNT, AUTO, SHARE = within(int, 1, 1e9), within(int, 0, 1e9), within(float, 0, 1)
RATE, SIZE, BELOW_ONE = within(float, 1e-30, 1e30), within(float, 0, 1e30), within(float, 0, 0.9999999)
FLAGS = {   # group: {flag: (how to read it, default unless the preset has one, help)}
    "text and budget": {
        "data": (TEXT, None, "stdlib, tinystories, cosmopedia, or the path of a text file or folder"),
        "batch-size": (COUNT, None, "sequences in an optimizer step, on all devices together"),
        "max-steps": (COUNT, None, "optimizer steps"),
        "grad-accum": (COUNT, 1, "pieces to compute a batch in; experts are balanced within a piece"),
        "full-batch": (SWITCH, False, "use the first batch at every step"),
        "seed": (within(int, 0, 2**63 - 1), 0, "seed of initial weights, batches and dropout"),
        "data-tokens": (AUTO, 0, "tokens of text to fetch; 0: as many as the run reads")},
    "optimizer": {
        "optimizer": (dict(choices=OPTIMIZERS), "adamw", "muon: for matrices in blocks, adamw for the rest"),
        "lr": (RATE, None, "peak learning rate (default: the preset's, or a guess from optimizer and width)"),
        "adamw-lr-ratio": (RATE, 0.1, "with muon: adamw's learning rate as a share of muon's"),
        "weight-decay": (SIZE, 0.1, "a step shrinks weights by this times the learning rate"),
        "beta1": (BELOW_ONE, 0.9, "adamw: memory of the average gradient"),
        "beta2": (BELOW_ONE, 0.95, "adamw: memory of the average squared gradient"),
        "momentum": (BELOW_ONE, 0.95, "muon and sgd: memory of the average gradient"),
        "grad-clip": (SIZE, 1.0, "largest norm of the gradient; 0: no limit"),
        "balance-weight": (SIZE, 0.01, "with experts: weight of the loss that keeps them equally busy")},
    "schedule": {
        "schedule": (dict(choices=SCHEDULES), "cosine", "shape of the learning rate after the warm-up"),
        "warmup-ratio": (SHARE, 0.1, "share of the steps in which the learning rate rises to its peak"),
        "min-lr-ratio": (SHARE, 0.1, "lowest learning rate, as a share of the peak")},
    "model": {},    # the fields of ModelConfig, below
    "hardware": {
        "device": (TEXT, "auto", "cuda, cuda:1, mps or cpu; auto: the first of these that is there"),
        "dtype": (dict(choices=["auto", "bfloat16", "float32"]), "auto", "auto: bfloat16 if it is native"),
        "compile": (ON_OFF, None, "use torch.compile (default: on CUDA, and on a CPU for long runs)")},
    "what is written down": {
        "out": (TEXT, None, "folder of the run (default: a new one in runs/single)"),
        "resume": (SWITCH, False, "go on with the run in --out, if there is one"),
        "log-interval": (AUTO, 0, "steps from one log line to the next; 0: a hundredth of the run"),
        "eval-interval": (AUTO, 0, "steps from one evaluation to the next; 0: a tenth of the run"),
        "eval-tokens": (COUNT, None, "tokens of an evaluation, always the same ones"),
        "checkpoint-interval": (AUTO, 0, "steps from one to the next; 0: a tenth of the run, at least 10 s"),
        "sharpness": (AUTO, 0, "steps between measurements of the Hessian's top eigenvalue; 0: none"),
        "sample": (AUTO, 64, "tokens of text to generate at the end"),
        "no-plot": (SWITCH, False, "draw no pictures"),
        "dry-run": (SWITCH, False, "check the flags, print the settings as JSON, and stop"),
        "prepare": (SWITCH, False, "prepare the text, print the settings as JSON, and stop")},
}
for field in fields(ModelConfig):
    how = within(field.type, 1e-9 if field.default else 0, 1e9)     # a size is not 0
    text = field.metadata.get("help", "a field of ModelConfig")
    FLAGS["model"][field.name] = ON_OFF if field.type is bool else how, field.default, text
FREE = {"out", "resume", "no_plot", "dry_run", "prepare", "sample", "checkpoint_interval", "grad_accum",
        "data_tokens"}      # may differ in a run that is resumed; another text has another hash

def parse_args(argv=None):
    """Command line -> (args, ModelConfig). Defaults are the preset's, which is therefore read first."""
    p = argparse.ArgumentParser("train.py", description=(__doc__ or "").split("\n\n")[0], add_help=False,
                                allow_abbrev=False)
    p.error = fail
    p.add_argument("--preset", default="tiny", choices=PRESETS, help="defaults of model, text and budget")
    name = p.parse_known_args(argv)[0].preset
    preset = PRESETS[name]
    p.add_argument("-h", "--help", action="help", help=f"show these flags, with the defaults of {name}")
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for flag, (how, default, text) in flags.items():
            if flag != "lr":
                default = preset.get(flag.replace("-", "_"), default)
            shown = "" if default in (None, False) else " (default: %(default)s)"
            group.add_argument("--" + flag.replace("_", "-"), default=default, help=text + shown, **how)
    args = p.parse_args(argv)
    try:
        config = ModelConfig(**{field.name: getattr(args, field.name) for field in fields(ModelConfig)})
    except ValueError as e:
        fail(e)
    # The preset's learning rate was found for its own optimizer and width.
    found_with = preset.get("optimizer", "adamw"), preset.get("d_model", ModelConfig.d_model)
    known = preset.get("lr") if found_with == (args.optimizer, args.d_model) else None
    args.lr = args.lr or known or first_guess(args.optimizer, args.d_model)
    return args, config

# The hardware -------------------------------------------------------------------------------------

def pick_device(name, local_rank=0, world=1):
    """A torch.device that is really there; `auto` takes cuda, then mps, then cpu.

    On Apple's mps: float32 by default, no float64 and no pinned memory, so that figures and samples go to
    the CPU first; gloo cannot sum its tensors, so that torchrun is refused. From documentation and reports:
    nobody here has a Mac.
    """
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "cuda" or (name == "auto" and there[0] == "cuda:0"):
        name = f"cuda:{local_rank}"
    elif name == "auto":
        name = there[0]
    if name not in there or (name == "mps" and world > 1):
        fail(f"device {name!r} is not available here, or not to several processes; use --device cpu")
    return torch.device(name)

def pick_dtype(name, device):
    """bfloat16 where the hardware has it, else float32 (float16 is 100 times slower on a CPU)."""
    if name != "auto":
        return getattr(torch, name)
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32

def pick_compile(wanted, device, dtype, config, flops):
    """The torch.compile backend, or None; and whether the step can be recorded as one CUDA graph."""
    long_run = flops > 1.5e14 and not config.n_experts      # 5 minutes on 2 cores, where compiling takes 40 s
    if wanted is False or (not wanted and (device.type == "mps" or device.type == "cpu" and not long_run)):
        return None, False
    if device.type == "mps":
        return "aot_eager", False
    there = any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++", "cl"]))
    capability = (0, 0)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        there = importlib.util.find_spec("triton") and capability >= (7, 0)
    if not there:
        say("torch.compile needs Triton on a GPU, a C++ compiler on a CPU: training without it", sys.stderr)
        return None, False
    # A graph holds no new random numbers and no wait for the host, so that experts need grouped_mm.
    grouped = dtype == torch.bfloat16 and capability[0] in (9, 10)
    return "inductor", device.type == "cuda" and not config.dropout and (grouped or not config.n_experts)

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
        return {name: value.clone() for name, value in output.items()}  # the next replay writes over it
    return call

def all_reduce(tensors):
    """Each tensor becomes its sum over all processes, in one float32 message: a message in bfloat16 moved
    the final loss of a tiny model by up to 0.06 nats, summing in another order moves it by 0.01 (5 seeds)."""
    message = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(message)
    for t, total in zip(tensors, message.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))

def check_size(args, config, device, world):
    """Refuse what the processes cannot share, or what no memory holds (a lower bound), before it is made."""
    if args.batch_size % (args.grad_accum * world):
        fail(f"--batch-size {args.batch_size} is no multiple of {world} x --grad-accum {args.grad_accum}")
    d, ff, tokens = config.d_model, config.d_ff, args.batch_size * config.context_length
    weights = config.vocab_size * d + config.n_layers * (4 * d * d + 2 * max(1, config.n_experts) * d * ff)
    activations = 2 * config.n_layers * (6 * d + 2 * ff) / (args.grad_accum * world)    # bytes a token
    gib = (16 * weights + tokens * (activations + 16)) / 2**30     # 16: float32, gradients, two averages
    there = math.inf
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / 2**30
    elif hasattr(os, "sysconf"):    # Windows has none
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if gib > there:
        fail(f"needs over {gib:,.0f} GiB of memory, of {there:,.0f}; lower --batch-size or a model size")

# The folder of a run ------------------------------------------------------------------------------

def provenance(device):
    """What made the numbers: code, versions, commit ("-dirty": changed since), hardware."""
    here = Path(__file__).parent
    commit = None
    with suppress(OSError):     # no git here
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip() or None
    name = f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    files = ("model.py", "optim.py", "schedule.py", "data.py", "train.py", "plot.py")
    return dict(code={file: hashlib.sha256((here / file).read_bytes()).hexdigest() for file in files},
                python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__,
                git_commit=commit, device=str(device), device_name=name)

class RunFolder:
    """The files of a run: its config (.json), saved (the checkpoint to go on with, or None), and the rest.
    Of the processes of a torchrun only the first one, the owner, writes and speaks."""
    def __init__(self, path, resume, owner):
        self.path = Path(path)
        self.owner = owner
        self.saved = None
        self.config = (resume and plot.read_json(self.path / "config.json")) or {}
        self.saver = ThreadPoolExecutor(1)      # writes a checkpoint while the next steps run
        self.saving = self.saver.submit(int)
        found = set(os.listdir(path)) - {".lock", "stderr.log"} if self.path.exists() else set()
        if found and not (resume and found & {"config.json", "checkpoints"}):
            fail(f"{path} already holds a run or other files; add --resume to go on, or choose another --out")

    def read_checkpoint(self, device):
        """A checkpoint mends whatever else is damaged in the folder; without one a run begins anew."""
        path = self.path / "checkpoints/last.pt"
        if not path.exists():
            return
        content = path.read_bytes()     # an error here ends the program and changes nothing
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:       # with a checksum for each tensor
                assert archive.testzip() is None
            self.saved = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            self.config = self.saved["config"]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:               # torch, pickle and zipfile raise a dozen kinds for a damaged file
            if path.with_name("best.pt").exists():
                fail(f"{path} is damaged, best.pt beside it is not; to begin again, choose another --out")
            path.replace(path.with_name("last.pt.damaged"))
            say(f"{path} is damaged and set aside: the run begins again", sys.stderr)

    def refuse_change(self, now):
        """A run does not go on with other settings, or with other text: compares what both know."""
        began = (self.config.get("args") or {}) | (self.config.get("data") or {})
        for key in sorted(began.keys() & now.keys() - FREE):
            if began[key] != now[key]:
                what = key if key in self.config["args"] else f"another text, {key}"
                fail(f"{self.path} began otherwise: {what.replace('_', '-')} was {began[key]!s:.80}, is "
                     f"{now[key]!s:.80}; repeat what it began with, or choose another --out")

    def finished(self):
        run = plot.read_run(self.path)          # None: config.json is damaged
        rows = (self.path / "metrics.csv").read_bytes() if run else b""
        over = run and run["status"] in plot.STATUSES and "final_val_loss" in run["summary"]
        return over and (not self.saved or self.saved["metrics"].encode() == rows)

    def open(self, config):
        """Begin the files, or go on with those of the checkpoint."""
        rows = ("step,tokens,elapsed,lr,train_loss,grad_norm,tokens_per_sec,"
                "val_loss,val_accuracy,val_perplexity,val_bpb\r\n")
        since = {}      # the run began
        if self.saved:
            rows = self.saved["metrics"]
            now, began = config["args"], self.config["args"]
            code = config["code"].items() - self.config["code"].items()
            since["edited"] = sorted(file for file, sha in code)
            since["new"] = [f"{key} {now[key]}" for key in sorted(now.keys() - began.keys())]
            self.config["resumes"].append(dict(config, step=self.saved["state"]["step"], **since))
        else:
            self.config = dict(config, resumes=[])
        if self.owner:
            self.lock = data.lock(self.path)
            self.write_json("config.json", self.config)
            self.write_json("summary.json", dict(status="running"))
            self.text = open(self.path / "training.log", "a", encoding="utf-8", errors="backslashreplace")
            self.table = open(self.path / "metrics.csv", "w+", newline="", buffering=1)     # a row at a time
            self.table.write(rows)
            self.writer = csv.DictWriter(self.table, rows.split("\r\n")[0].split(","))
        for what, names in since.items():
            if names:
                self.say(f"{what} since this run began: {', '.join(names)}")

    def say(self, line):
        if self.owner:
            say(line)
            print(line, file=self.text, flush=True)

    def log(self, line, **cells):
        """Say the line, and write a row of metrics.csv; a new column widens the table."""
        self.say(line)
        if not self.owner:
            return
        new = [name for name in cells if name not in self.writer.fieldnames]
        if new:
            self.table.seek(0)
            rows = list(csv.DictReader(self.table))
            self.table.seek(self.table.truncate(0))
            self.writer = csv.DictWriter(self.table, [*self.writer.fieldnames, *new])
            self.writer.writeheader()
            self.writer.writerows(rows)
        self.writer.writerow(cells)

    def save(self, name, **value):
        """A checkpoint, of a copy that the next steps do not change."""
        def write(value):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            data.write_aside(self.path / "checkpoints" / name, buffer.getvalue())
        if self.owner:
            self.saving.result()        # raises what went wrong with the last one
            value.update(config=self.config, metrics=(self.path / "metrics.csv").read_bytes().decode())
            self.saving = self.saver.submit(write, copy.deepcopy(value))

    def write_json(self, name, value):
        """JSON has no nan: what is not finite becomes null."""
        finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
        data.write_aside(self.path / name, (json.dumps(finite, indent=2) + "\n").encode())

# Evaluation ---------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, x, y, batch_size, bytes_per_token):
    """x, y (windows, T) -> cells of metrics.csv; accuracy is the share of tokens that were ranked first."""
    model.eval()
    total = 0.0
    for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
        logits, loss, _ = model(xb, yb)
        total = total + torch.stack((loss * yb.numel(), (logits.argmax(-1) == yb).sum()))
    model.train()
    loss, accuracy = (total / y.numel()).tolist()
    return dict(val_loss=loss, val_accuracy=accuracy, val_perplexity=math.exp(min(loss, 700)),
                val_bpb=loss / math.log(2) / bytes_per_token)

# What a run is made of ----------------------------------------------------------------------------

def open_text(args, config):
    """The corpus; get_batch(n, step) -> x and y (2, n, T); the validation windows (2, W, T)."""
    n_tokens = args.data_tokens or args.batch_size * config.context_length * args.max_steps
    corpus = data.load(args.data, config.vocab_size, n_tokens)
    def get_batch(n, step):
        return torch.stack(data.get_batch(corpus.train, n, config.context_length, args.seed, step))
    get_batch(1, 0)                     # is the text long enough?
    windows = torch.stack(data.val_windows(corpus.val, config.context_length, args.eval_tokens))
    return corpus, get_batch, windows

def keep_freed_memory():
    """glibc would give it back and have it zeroed anew at every step: a fifth of tiny's time on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)     # M_MMAP_MAX
        libc.mallopt(-1, -1)    # M_TRIM_THRESHOLD: never

def build(args, config, device, dtype):
    """Model, optimizers, schedule and step; compiled, and on a GPU one graph, where that pays."""
    keep_freed_memory()
    torch.set_flush_denormal(True)      # a CPU is several times slower with numbers below 1e-38
    torch.manual_seed(args.seed)        # weights are drawn on the CPU: alike on every device
    model = Transformer(config, dtype).to(device)
    optimizers = build_optimizer(model, args.optimizer, args.lr, args.weight_decay, (args.beta1, args.beta2),
                                 args.momentum, args.adamw_lr_ratio)
    schedule = make_schedule(args.schedule, args.max_steps, args.warmup_ratio, args.min_lr_ratio)
    flops = 6 * count_parameters(model)["total"] * args.batch_size * config.context_length * args.max_steps
    backend, graph = pick_compile(args.compile, device, dtype, config, flops)
    def losses(x, y):                   # without the logits, which a compiled step then never writes out
        return model(x, y)[1:]
    losses = torch.compile(losses, backend=backend) if backend else losses
    for optimizer in optimizers if backend == "inductor" else []:
        optimizer.compile()
    step = make_step(losses, model, optimizers, args)
    if graph:
        step = graphed(step)
    return model, optimizers, schedule, step, backend

class Stop(list):
    """(signal, time) of those that came. The first one ends the run after its step. One within 2 s is the
    same, sent to a whole job and passed on by the sweep. A later one, or one before a step, ends it now."""
    def __init__(self):
        self.stepped = False
        self.handlers = {}
        for number in signal.Signals:
            known = number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
            if known and signal.getsignal(number) != signal.SIG_IGN:    # what nohup ignores stays ignored
                self.handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.append((number, time.monotonic()))
        if not self.stepped or self[-1][1] > self[0][1] + 2:
            os._exit(128 + number)

    def release(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

def finish(folder, args, state, stopped, model, tokenizer, device):
    """The summary, a sample of text, the pictures."""
    status = "interrupted" if stopped else plot.classify(state.history)
    tokens = state.step * args.batch_size * args.context_length
    folder.write_json("summary.json", dict(
        state.results, status=status, steps=state.step, max_steps=args.max_steps, tokens=tokens, lr=args.lr,
        seed=args.seed, seconds=state.elapsed, tokens_per_sec=tokens / state.elapsed, ended_early=state.lost,
        n_params=folder.config["n_params"], max_grad_norm=state.max_grad_norm.item(),
        peak_memory_mb=torch.cuda.max_memory_allocated() / 2**20 or None))
    folder.say(f"{status} at step {state.step}: {state.elapsed:.0f} s, {tokens / state.elapsed:,.0f} tok/s")
    if stopped:
        folder.say(f"the same command with --out {folder.path} --resume goes on from here")
    elif state.lost:
        folder.say("ended early, as it cannot come back from such losses")
    elif args.sample:
        prompt = torch.tensor([[tokenizer.eot]], device=device)
        ids = model.eval().generate(prompt, args.sample, temperature=0.8, top_k=50)[0, 1:].tolist()
        folder.say("sample: " + tokenizer.decode(ids))
    if not args.no_plot:
        plot.draw_run(folder.path)

def means(sums, n_steps):
    """Sums of a step's records -> cells of metrics.csv; a layer's is name_L0, an expert's name_L0_E0."""
    cells = {}
    for name, total in sums.items():
        for index, mean in np.ndenumerate((total / n_steps).cpu().numpy()):
            cells[name + "".join(f"_{axis}{i}" for axis, i in zip("LE", index))] = float(mean)
    return cells

# The step -----------------------------------------------------------------------------------------

def make_step(losses, model, optimizers, args):
    """step(x, y) -> {name: tensor} of what it met: train_loss, grad_norm before clipping, the router's.
    x, y (grad_accum, batch / grad_accum / devices, T). Nothing in it waits for a GPU."""
    world = dist.get_world_size() if dist.is_initialized() else 1

    def step(x, y):
        record = {}
        share = 1 / (len(x) * world)
        for xi, yi in zip(x, y):
            # Forward.
            loss, router = losses(xi, yi)
            objective = loss
            if router:
                objective = loss + args.balance_weight * router["balance_loss"].sum()
            # Backward: the gradients of all pieces, and of all devices, add up to the batch's.
            (objective * share).backward()
            for name, value in dict(train_loss=loss, **router).items():
                record[name] = record.get(name, 0.0) + value.detach() * share
        grads = [p.grad for p in model.parameters()]
        if world > 1:
            all_reduce([*grads, *record.values()])

        # Clip: a factor in the update, 0 where something is not finite.
        norm = record["grad_norm"] = torch.nn.utils.get_total_norm(grads)
        scale = ((args.grad_clip or math.inf) / norm).clamp(max=1)
        scale = torch.where(norm.isfinite() & record["train_loss"].isfinite(), scale, 0.0)

        # Update.
        for optimizer in optimizers:
            optimizer.step(scale)
            optimizer.zero_grad()
        return record
    return step

# The run ------------------------------------------------------------------------------------------

def run(args, config):
    # The hardware, and whether the run fits it.
    torchrun = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    rank, world, local_rank = (int(os.environ.get(name, alone)) for name, alone in torchrun.items())
    device = pick_device(args.device, local_rank, world)
    dtype = pick_dtype(args.dtype, device)
    check_size(args, config, device, world)
    tokens_per_step = args.batch_size * config.context_length
    n_tokens = tokens_per_step * args.max_steps
    settings = dict(args=vars(args), tokens=n_tokens, steps=args.max_steps)
    if args.dry_run:
        say(json.dumps(settings))
        return 0

    # The folder and the text. Of several processes one prepares the text, and the others wait for it.
    if not args.out and (args.resume or args.out == ""):
        fail("--out needs a folder; with --resume, that of the run to go on with")
    name = time.strftime(f"{args.preset}-lr{args.lr:g}-s{args.seed}-%m%d-%H%M%S-{os.getpid()}")
    folder = RunFolder(args.out or f"runs/single/{name}", args.resume, owner=rank == 0)
    folder.refuse_change(vars(args))
    corpus, get_batch, windows = open_text(args, config)
    bytes_per_token = float(corpus.token_bytes[windows[1].numpy()].mean())
    settings.update(data=corpus.meta, **provenance(device))
    if args.prepare:
        say(json.dumps(settings))
        return 0
    if args.resume:
        folder.read_checkpoint(device)
        folder.refuse_change(vars(args) | corpus.meta)
        if folder.finished():
            say(f"{folder.path} is already finished")
            return 0

    # The model, and the state between steps: fresh, or the checkpoint's.
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.barrier()                                  # all have read the folder before one writes
    config = replace(config, vocab_size=corpus.tokenizer.vocab_size)
    model, optimizers, schedule, train_step, backend = build(args, config, device, dtype)
    counts = count_parameters(model)
    state = SimpleNamespace(step=0, elapsed=0.0, sums={}, history=[], lost=False, eigenvectors={},
                            max_grad_norm=torch.zeros((), device=device), results={"best_val_loss": math.inf})
    if folder.saved:
        state = SimpleNamespace(**folder.saved["state"])
        model.load_state_dict(folder.saved["model"])
        vars(schedule).update(folder.saved["schedule"])     # plateau has attributes, the others have none
        for optimizer, kept in zip(optimizers, folder.saved["optimizers"]):
            optimizer.load_state_dict(kept)
    start = step = state.step
    folder.open(dict(settings, model=asdict(config), n_params=counts["total"], dtype=str(dtype)[6:],
                     devices=world, compile=backend))
    folder.say(f"{args.preset} on {corpus.meta['corpus']}: {counts['total']:,} parameters, "
               f"{counts['used per token']:,} a token; {args.max_steps} steps of {args.batch_size} x "
               f"{config.context_length} tokens, {n_tokens / len(corpus.train):.2g} times the text; "
               f"{args.optimizer} at {args.lr:g} on {device}, {dtype}, compiled: {backend} -> {folder.path}")

    def log(line, **cells):
        elapsed = time.perf_counter() - began
        folder.log(f"step {step}/{args.max_steps} | {line}", step=step, tokens=step * tokens_per_step,
                   elapsed=elapsed, **cells)

    # The loop -------------------------------------------------------------------------------------
    stop = Stop()
    eval_interval = args.eval_interval or max(1, args.max_steps // 10)
    log_interval = args.log_interval or max(1, args.max_steps // 100)
    began = time.perf_counter() - state.elapsed
    saved_at = timed_from = time.perf_counter()         # tokens_per_sec is that of training alone
    while True:
        last = step == args.max_steps or state.lost
        paused = time.perf_counter()

        # Evaluate: always the same windows, before the step that follows.
        if step > start and (step % eval_interval == 0 or last):
            val = evaluate(model, *windows.to(device), min(args.batch_size, 32), bytes_per_token)
            loss, accuracy, bpb = val["val_loss"], val["val_accuracy"], val["val_bpb"]
            log(f"val loss {loss:.4f} | accuracy {accuracy:.2%} | {bpb:.4f} bits a byte", **val)
            state.results.update({f"final_{key}": value for key, value in val.items()})
            if loss < state.results["best_val_loss"]:
                state.results.update(best_val_loss=loss, best_val_step=step, best_val_accuracy=accuracy)
                folder.save("best.pt", model=model.state_dict(), step=step, **val)
            if args.schedule == "plateau":
                schedule.observe(loss)

        # Stop? A signal may reach processes at different steps, so they agree at the log steps.
        stopped = bool(stop) and not last and (world == 1 or step % log_interval == 0)
        if world > 1 and step % log_interval == 0:
            votes = torch.tensor(float(stopped), device=device)
            all_reduce([votes])
            stopped = votes.item() > 0

        # Save everything that the next step depends on, and the rows written so far.
        due = step > start and step % (args.checkpoint_interval or max(1, args.max_steps // 10)) == 0
        due = due and (args.checkpoint_interval or time.perf_counter() - saved_at > 10)     # it takes time
        if due or last or stopped:
            saved_at = time.perf_counter()
            state.step, state.elapsed = step, saved_at - began
            folder.save("last.pt", model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                        schedule=vars(schedule), state=vars(state))
        if last or stopped:
            break

        # Measure the sharpness that this step meets, always on the same 16 sequences, or the full batch.
        factor = schedule(step)
        lr = args.lr * factor
        if args.sharpness and step % args.sharpness == 0:
            batch = get_batch(args.batch_size if args.full_batch else min(args.batch_size, 16), 0)
            cells = measure_sharpness(model, optimizers, *batch.to(device), name=args.optimizer, lr=lr,
                                      momentum=args.momentum, beta1=args.beta1, grad_clip=args.grad_clip,
                                      vectors=state.eigenvectors)
            log(f"sharpness {cells['sharpness']:.4g}", **cells)
        timed_from += time.perf_counter() - paused

        # Take a batch: this process's slice of it, in grad_accum pieces.
        batch = get_batch(args.batch_size, 0 if args.full_batch else step)      # (2, B, T)
        batch = batch.view(2, args.grad_accum, world, -1, config.context_length)[:, :, rank]
        if device.type == "cuda":
            batch = batch.pin_memory()
        if args.dropout:                                # a function of (seed, step, rank), too
            torch.manual_seed((args.seed * 1_000_003 + step * world + rank) % 2**63)

        # Step.
        for optimizer in optimizers:
            optimizer.set_lr(factor)
        record = train_step(*batch.to(device, non_blocking=device.type == "cuda"))
        state.sums = {name: state.sums.get(name, 0.0) + value for name, value in record.items()}
        state.max_grad_norm = torch.maximum(state.max_grad_norm, record["grad_norm"])
        step += 1
        stop.stepped = True

        # Log: means since the last log step.
        if step % log_interval == 0 or step == args.max_steps:
            n_steps = (step - 1) % log_interval + 1
            cells = means(state.sums, n_steps)
            loss = cells["train_loss"]
            state.sums = {}
            state.history.append(loss)
            state.results["final_train_loss"] = loss
            state.lost = plot.is_lost(state.history, args.max_steps // log_interval)
            now = time.perf_counter()
            speed = min(n_steps, step - start) * tokens_per_step / (now - timed_from)
            timed_from = now
            eta = timedelta(seconds=int((args.max_steps - step) * tokens_per_step / speed))
            log(f"loss {loss:.3f} | lr {lr:.1e} | {speed:,.0f} tok/s | eta {eta}", lr=lr, **cells,
                tokens_per_sec=speed)

    # The end.
    folder.saving.result()
    stop.release()                                      # from here on the first Ctrl-C ends it
    if rank == 0:
        finish(folder, args, state, stopped, model, corpus.tokenizer, device)
    if world > 1:
        del train_step                                  # NCCL waits for the graphs that hold its calls
        dist.destroy_process_group()
    return 128 + (stop or [[signal.SIGINT]])[0][0] if stopped else 0     # perhaps another process got it

def main(argv=None):
    try:
        return run(*parse_args(argv))
    except KeyboardInterrupt:   # before the first step
        return 130
    except data.DataError as e:
        fail(e)
    except (MemoryError, RuntimeError) as e:    # on a CPU torch raises a RuntimeError
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        fail("out of memory; lower --batch-size, or raise --grad-accum")
    except OSError as e:        # a full disk, a folder that cannot be written
        fail(f"cannot use {e.filename or 'the disk'}: {e.strerror or e}; make room, or choose another --out")

if __name__ == "__main__":
    sys.exit(main())
