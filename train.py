"""Train one model at one learning rate, and write down everything that happened.

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
import csv
import ctypes
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

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
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text:.40} is not a number from {low:g} to {high:g}")
        return kind(text)
    return dict(type=number)

TEXT, SWITCH, ON_OFF = dict(), dict(action="store_true"), dict(action=argparse.BooleanOptionalAction)
COUNT, AUTO, SHARE = within(int, 1, 1e9), within(int, 0, 1e9), within(float, 0, 1)
RATE, SIZE, BELOW_ONE = within(float, 1e-30, 1e30), within(float, 0, 1e30), within(float, 0, 0.9999999)
FLAGS = {   # group: {flag: (how to read it, default unless the preset has one, help)}
    "text and budget": {
        "data": (TEXT, None, "stdlib, tinystories, cosmopedia, or the path of a text file or folder"),
        "data-tokens": (AUTO, 0, "tokens of text to fetch; 0: as many as the run reads"),
        "batch-size": (COUNT, None, "sequences in an optimizer step, on all devices together"),
        "max-steps": (COUNT, None, "optimizer steps"),
        "grad-accum": (COUNT, 1, "pieces to compute a batch in; experts are balanced within a piece"),
        "full-batch": (SWITCH, False, "train on the first batch only, at every step"),
        "seed": (within(int, 0, 2**63 - 1), 0, "seed of initial weights, batches and dropout")},
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
        "dtype": (dict(choices=["auto", "bfloat16", "float32"]), "auto", "auto: bfloat16 where it is native"),
        "compile": (ON_OFF, None, "use torch.compile (default: on CUDA, and on a CPU for long runs)")},
    "what is written down": {
        "out": (TEXT, None, "folder of the run (default: a new one in runs/single)"),
        "resume": (SWITCH, False, "go on with the run in --out, if there is one"),
        "log-interval": (AUTO, 0, "steps from one log line to the next; 0: a hundredth of the run"),
        "eval-interval": (AUTO, 0, "steps from one evaluation to the next; 0: a tenth of the run"),
        "eval-tokens": (COUNT, None, "tokens of an evaluation, always the same ones"),
        "checkpoint-interval": (AUTO, 0, "steps between checkpoints; 0: at evaluations, from 10 s on"),
        "sharpness": (AUTO, 0, "steps between measurements of the Hessian's top eigenvalue; 0: none"),
        "sample": (AUTO, 64, "tokens of text to generate at the end"),
        "no-plot": (SWITCH, False, "draw no pictures"),
        "prepare": (SWITCH, False, "prepare the text, print the settings as JSON, and stop")},
}
for f in fields(ModelConfig):
    how = ON_OFF if f.type is bool else within(f.type, 1e-9 if f.default else 0, 1e9)
    FLAGS["model"][f.name.replace("_", "-")] = how, f.default, f.metadata.get("help", "of ModelConfig")

def parse_args(argv=None):
    """Command line -> (args, ModelConfig). Defaults are the preset's, which is therefore read first."""
    p = argparse.ArgumentParser("train.py", description="Trains one model at one learning rate.",
                                add_help=False, allow_abbrev=False)
    p.error = fail
    p.add_argument("--preset", default="tiny", choices=PRESETS, help="defaults of model, text and budget")
    preset = dict(PRESETS[p.parse_known_args(argv)[0].preset])
    lr = preset.pop("lr", None)
    p.add_argument("-h", "--help", action="help", help="show these flags, with the defaults of the preset")
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for flag, (how, default, text) in flags.items():
            default = preset.get(flag.replace("-", "_"), default)
            if default is not None and default is not False:
                text += " (default: %(default)s)"
            group.add_argument(f"--{flag}", default=default, help=text, **how)
    args = p.parse_args(argv)
    try:
        config = ModelConfig(**{f.name: getattr(args, f.name) for f in fields(ModelConfig)})
    except ValueError as e:
        fail(e)
    # The preset's learning rate was found for its own optimizer and width.
    if all(getattr(args, name) == p.get_default(name) for name in ("optimizer", "d_model")):
        args.lr = args.lr or lr
    args.lr = args.lr or first_guess(args.optimizer, args.d_model)
    return args, config

# The hardware -------------------------------------------------------------------------------------

def devices():
    """The names of those that are there, in the order of `auto`."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return gpus + ["mps"] * torch.backends.mps.is_available() + ["cpu"]

def pick_device(name, local_rank=0, world=1):
    """A torch.device that is really there. What is known of mps, from reports (nobody here has a Mac):
    - it has no float64 and no pinned memory; figures go to the CPU before they become Python's;
    - float32 is the default; bfloat16 needs macOS 14, and nanochat#244 found it no faster;
    - multinomial drew impossible tokens, so that samples are drawn on the CPU (pytorch#192577);
    - gloo cannot sum its tensors, so that torchrun is refused;
    - gradients of over 32,768 tokens at once can be wrong (pytorch#177116): --grad-accum splits them."""
    if name == "auto":
        name = devices()[0].split(":")[0]
    if name == "cuda":
        name = f"cuda:{local_rank}"
    if name not in devices() or (name == "mps" and world > 1):
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
    if wanted is None:      # compiling takes 40 s on a CPU, where it is for runs of over 5 minutes on 2 cores
        wanted = dict(cuda=True, cpu=flops > 1.5e14 and not config.n_experts).get(device.type)
    if not wanted:
        return None, False
    backend = {"mps": "aot_eager"}.get(device.type, "inductor")
    try:
        torch.compile(lambda: torch.ones(8, device=device) + 1, backend=backend)()
    except Exception:       # of many kinds: Triton or the compiler may be missing, too old or broken
        say("torch.compile needs Triton on a GPU, a C++ compiler on a CPU: training without it", sys.stderr)
        return None, False
    # A graph draws no new random numbers, and does not wait for the host, so that experts need grouped_mm.
    graph = device.type == "cuda" and not config.dropout
    if graph and config.n_experts:
        graph = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return backend, graph

def graphed(step):
    """The same step as one CUDA graph: the hundreds of small kernels of a small model follow each other
    without gaps. Three calls compile, the fourth is recorded and from then on replayed on new batches."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_stream(torch.cuda.Stream())      # the default stream cannot be recorded
    calls, fixed, record = 0, None, None
    def call(batch):
        nonlocal calls, fixed, record
        calls += 1
        if calls <= 3:
            return step(batch)
        if calls == 4:
            fixed = batch.clone()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                record = step(fixed)
        fixed.copy_(batch)
        graph.replay()
        return {name: value.clone() for name, value in record.items()}  # the next replay writes over it
    return call

def check_size(args, config, device, world):
    """Refuse what the processes cannot share, or what no memory holds (a lower bound), before it is made."""
    if args.batch_size % (args.grad_accum * world):
        fail(f"--batch-size {args.batch_size} is no multiple of {world} x --grad-accum {args.grad_accum}")
    d, piece = config.d_model, args.batch_size * config.context_length // (args.grad_accum * world)
    if device.type == "mps" and piece > 32_768:
        say(f"mps: gradients of {piece:,} tokens may be wrong (pytorch#177116); use --grad-accum", sys.stderr)
    if device.type == "mps" and args.dtype == "bfloat16":
        say("mps: bfloat16 needs macOS 14, and was reported to be no faster than float32", sys.stderr)
    if device.type == "cuda" or not hasattr(os, "sysconf"):     # a GPU says so itself; Windows has no sysconf
        return
    layer = 4 * d * d + 2 * max(1, config.n_experts) * d * config.d_ff
    need = 16 * (config.vocab_size * d + config.n_layers * layer)   # bytes: weights, gradients, averages ...
    need += piece * config.n_layers * (12 * d + 4 * config.d_ff)    # ... and activations
    if need > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        fail(f"needs over {need / 2**30:,.0f} GiB of memory, more than there is; lower --batch-size or sizes")

# The folder of a run ------------------------------------------------------------------------------

def provenance(device):
    """What made the numbers: code, versions, commit ("-dirty": changed since), hardware."""
    here = Path(__file__).parent
    files = ("model.py", "optim.py", "schedule.py", "data.py", "train.py", "plot.py")
    git = subprocess.run("git describe --always --dirty --abbrev=40 --exclude=*", shell=True, cwd=here,
                         capture_output=True, text=True)
    name = f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return dict(code={file: data.sha256(here / file) for file in files}, git_commit=git.stdout.strip(),
                python=sys.version.split()[0], torch=str(torch.__version__), numpy=np.__version__,
                device=str(device), device_name=name)

class RunFolder:
    """The files of a run. saved: the checkpoint to go on with (step 0: none); rows: those of metrics.csv so
    far. Of the processes of a torchrun only the first one, the owner, writes and speaks."""
    def __init__(self, args, owner, device):
        name = time.strftime(f"{args.preset}-lr{args.lr:g}-s{args.seed}-%m%d-%H%M%S-{os.getpid()}")
        self.path = Path(args.out or f"runs/single/{name}")
        self.args, self.owner = args, owner
        self.config, self.rows, self.columns = {}, [], []
        self.saved = dict(step=0, elapsed=0.0, sums={}, eigenvectors={})
        self.saver = ThreadPoolExecutor(1)      # writes a checkpoint while the next steps run
        self.saving = self.saver.submit(int)
        found = {file.name for file in self.path.glob("*") if file.suffix != ".tmp"} - {".lock", "stderr.log"}
        if args.out == "" or args.resume and not args.out:
            fail("--out needs a folder; with --resume, that of the run to go on with")
        if found and not (args.resume and found & {"config.json", "checkpoints"}):
            fail(f"{self.path} holds a run or other files; add --resume to go on, or choose another --out")
        if args.resume:
            self.read(self.path / "checkpoints/last.pt", device)
            self.refuse_change("args", vars(args))

    def read(self, last, device):
        """A checkpoint mends whatever else is damaged in the folder; without one a run begins anew."""
        self.config = plot.read_json(self.path / "config.json") or {}
        if last.exists():
            content = last.read_bytes()     # an error here ends the program and changes nothing
            try:
                damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()    # compares the tensors' checksums
            except Exception:       # zipfile raises half a dozen kinds
                damaged = True
            if damaged:
                fail(f"{last} is damaged (best.pt beside it may not be): choose another --out, or delete "
                     "last.pt to begin again")
            self.saved = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            self.config, self.rows = self.saved["config"], self.saved["rows"]

    def refuse_change(self, part, now):
        """A run does not go on with other args, or with other data: compares what both know."""
        began = self.config.get(part, {})
        for key in sorted(began.keys() & now.keys() - {"grad_accum", *plot.FREE}):
            if began[key] != now[key]:
                what = "another text: " * (part == "data") + key.replace("_", "-")
                fail(f"{self.path} began otherwise: {what} was {began[key]!s:.80}, is {now[key]!s:.80}; "
                     "repeat what it began with, or choose another --out")

    def finished(self):
        """Is nothing left to do? First metrics.csv becomes what it was at the checkpoint."""
        self.write_table()
        run = plot.read_run(self.path)
        return run and len(run["train"]["step"]) and run["status"] in plot.STATUSES

    def open(self, config):
        """Begin the files, or go on with those of the checkpoint; what changed since is said and kept."""
        self.began = time.perf_counter() - self.saved["elapsed"]
        changes = []
        if self.saved["step"]:
            began = self.config
            changes = [f"{file} edited" for file, _ in sorted(config["code"].items() - began["code"].items())]
            changes += [f"{flag} new" for flag in config["args"] if flag not in began["args"]]
            began["resumes"].append(dict(config, step=self.saved["step"], changes=changes))
        else:
            self.config = dict(config, resumes=[])
        if self.owner:
            data.write_json(self.path / "config.json", self.config)
            data.write_json(self.path / "summary.json", dict(status="running"))
        if changes:
            self.say("since this run began: " + ", ".join(changes))

    def say(self, line):
        if self.owner:
            say(line)
            with open(self.path / "training.log", "a", encoding="utf-8", errors="backslashreplace") as file:
                print(line, file=file)

    def log(self, step, line, **cells):
        """Say a line, filled with cells, and write them as a row; where a column is new, all rows again."""
        self.say(f"step {step}/{self.args.max_steps} | {line.format(**cells)}")
        tokens = step * self.args.batch_size * self.args.context_length
        row = dict(step=step, tokens=tokens, elapsed=time.perf_counter() - self.began, **cells)
        self.rows.append(row)
        if not row.keys() <= set(self.columns):
            self.write_table()
        elif self.owner:
            with open(self.path / "metrics.csv", "a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def write_table(self):
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if self.owner and self.rows:
            data.write_csv(self.path / "metrics.csv", self.columns, self.rows)

    def column(self, name):
        """Its cells so far, of the rows that have it."""
        return [row[name] for row in self.rows if name in row]

    def save(self, name, **value):
        """A checkpoint as it is now; the disk gets it while the next steps run."""
        if self.owner:
            path, content = self.path / "checkpoints" / name, io.BytesIO()
            torch.save(dict(value, config=self.config, rows=self.rows), content)
            self.saving.result()        # raises what went wrong with the last one
            self.saving = self.saver.submit(data.write_aside, path, content.getbuffer())

# Evaluation ---------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, x, y, batch_size, token_bytes):
    """x, y (windows, T) -> cells of metrics.csv; accuracy is the share of tokens that were ranked first."""
    model.eval()
    total = 0.0
    for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
        logits, loss, _ = model(xb, yb)
        total = total + torch.stack((loss * yb.numel(), (logits.argmax(-1) == yb).sum()))
    model.train()
    loss, accuracy = (total / y.numel()).tolist()
    return dict(val_loss=loss, val_accuracy=accuracy, val_perplexity=math.exp(min(loss, 700)),
                val_bpb=loss / math.log(2) * y.numel() / float(token_bytes[y.cpu().numpy()].sum()))

# What a run is made of ----------------------------------------------------------------------------

def build(args, config, device, dtype, saved):
    """Model, optimizers and schedule, fresh or as saved, and the step: compiled, where it pays a graph."""
    if sys.platform == "linux":     # glibc would give memory back, and have it zeroed anew at every step: ...
        ctypes.CDLL(None).mallopt(-4, 0)    # ... a fifth of tiny's time on a CPU (M_MMAP_MAX)
        ctypes.CDLL(None).mallopt(-1, -1)   # M_TRIM_THRESHOLD: never
    torch.set_flush_denormal(True)      # a CPU is several times slower with numbers below 1e-38
    torch.manual_seed(args.seed)        # weights are drawn on the CPU: alike on every device
    model = Transformer(config, dtype).to(device)
    optimizers = build_optimizer(model, args.optimizer, args.lr, args.weight_decay, (args.beta1, args.beta2),
                                 args.momentum, args.adamw_lr_ratio)
    schedule = make_schedule(args.schedule, args.max_steps, args.warmup_ratio, args.min_lr_ratio)
    if saved["step"]:
        model.load_state_dict(saved["model"])
        vars(schedule).update(saved["schedule"])    # plateau has attributes, the others have none
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
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

def watch_signals():
    """came, a list of (signal, time) that grows, and the handlers from before. The first signal ends the run
    after its step; another within 2 s is the same, sent to a whole job and passed on by the sweep."""
    came = []
    def on_signal(number, frame):
        came.append((number, time.monotonic()))
        if came[-1][1] > came[0][1] + 2:
            os._exit(128 + number)      # a later one ends it at once
    return came, data.catch_stops(on_signal)

def means(sums, n_steps):
    """Sums of a step's records -> cells of metrics.csv; a layer's is name_L0, an expert's name_L0_E0."""
    cells = {}
    for name, total in sums.items():
        for index, mean in np.ndenumerate((total / n_steps).cpu().numpy()):
            cells[name + "".join(f"_{axis}{i}" for axis, i in zip("LE", index))] = float(mean)
    return cells

def finish(folder, args, step, seconds, stopped, lost, model, tokenizer):
    """The summary, a sample of text, the pictures."""
    status = "interrupted" if stopped else plot.classify(folder.column("train_loss"))
    final = {f"final_{name}": folder.column(name)[-1] for name in folder.columns
             if name.startswith(("train_loss", "val_"))}
    losses = {row["val_loss"]: row["step"] for row in folder.rows if row.get("val_loss", math.inf) < math.inf}
    best = min(losses, default=None)
    data.write_json(folder.path / "summary.json", dict(
        final, best_val_loss=best, best_val_step=losses.get(best), status=status, steps=step, seconds=seconds,
        ended_early=lost, max_grad_norm=float(np.max(folder.column("grad_norm") or [math.nan]))))
    speed = step * args.batch_size * args.context_length / seconds
    folder.say(f"{status} at step {step}: {seconds:.0f} s, {speed:,.0f} tok/s")
    if stopped:
        folder.say(f"the same command with --out {folder.path} --resume goes on from here")
    elif lost:
        folder.say("ended early, as it cannot come back from such losses")
    elif args.sample and status != "diverged":
        prompt = torch.full((1, 1), tokenizer.eot, device=model.embed.device)
        ids = model.eval().generate(prompt, args.sample, temperature=0.8)[0, 1:].tolist()
        folder.say("sample: " + tokenizer.decode(ids))
    if not args.no_plot:
        plot.draw_run(folder.path)

# The step -----------------------------------------------------------------------------------------

def make_step(losses, model, optimizers, args):
    """step(batch) -> {name: tensor} of what it met: train_loss, grad_norm before clipping, the router's.
    batch (grad_accum, 2, B, T): x and y of each piece. Nothing in it waits for a GPU."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    def step(batch):
        record = {}
        share = 1 / (len(batch) * world)
        for x, y in batch:
            # Forward.
            loss, router = losses(x, y)
            objective = loss + args.balance_weight * sum(router.get("balance_loss", []))
            # Backward: the gradients of all pieces, and of all devices, add up to the batch's.
            (objective * share).backward()
            for name, value in dict(train_loss=loss, **router).items():
                record[name] = record.get(name, 0.0) + value.detach() * share
        grads = [p.grad for p in model.parameters()]
        if world > 1:
            for tensor in [*grads, *record.values()]:
                dist.all_reduce(tensor)

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
    # The hardware, and whether the run fits it; torchrun tells each process its number.
    rank, world, local_rank = (int(os.environ.get(name, alone)) for name, alone in
                               [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])
    device = pick_device(args.device, local_rank, world)
    dtype = pick_dtype(args.dtype, device)
    check_size(args, config, device, world)

    # The folder and the text. Of several processes one prepares the text, and the others wait for it.
    folder = RunFolder(args, rank == 0, device)
    tokens_per_step = args.batch_size * config.context_length
    corpus = data.load(args.data, config.vocab_size, args.data_tokens or args.max_steps * tokens_per_step)
    def get_batch(n, step):                             # x and y (2, n, T)
        return torch.stack(data.get_batch(corpus.train, n, config.context_length, args.seed, step))
    get_batch(1, 0)                                     # is the text long enough?
    windows = torch.stack(data.val_windows(corpus.val, config.context_length, args.eval_tokens))
    folder.refuse_change("data", corpus.meta)
    settings = dict(args=vars(args), data=corpus.meta, **provenance(device))
    if args.prepare:        # the sweep shares its runs out over the devices
        same = [name for name in devices() if args.device in ("auto", device.type) and device.type in name]
        say(json.dumps(settings | dict(devices=same or [args.device])))
        return 0
    owned = folder.owner and data.lock(folder.path)     # until the end of this function
    if args.resume and folder.finished():
        if owned:
            say(f"{folder.path} is already finished")
        return 0

    # The model, and what changes from step to step: fresh, or the checkpoint's.
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.barrier()                                  # all have read the folder before one writes
    config = replace(config, vocab_size=corpus.tokenizer.vocab_size)
    model, optimizers, schedule, train_step, backend = build(args, config, device, dtype, folder.saved)
    start = step = folder.saved["step"]
    sums, eigenvectors = folder.saved["sums"], folder.saved["eigenvectors"]
    counts = count_parameters(model)
    folder.open(dict(settings, model=asdict(config), n_params=counts["total"], dtype=str(dtype)[6:],
                     devices=world, compile=backend))
    folder.say(f"{args.preset} on {corpus.meta['corpus']}: {counts['total']:,} parameters, "
               f"{counts['used per token']:,} a token; {args.max_steps} steps of {tokens_per_step:,} tokens, "
               f"{args.max_steps * tokens_per_step / len(corpus.train):.2g} x the text; {args.optimizer} at "
               f"{args.lr:g} on {device}, {dtype}, compiled: {backend} -> {folder.path}")

    # The loop -------------------------------------------------------------------------------------
    came, handlers = watch_signals()
    eval_interval = args.eval_interval or max(1, args.max_steps // 10)
    log_interval = args.log_interval or max(1, args.max_steps // 100)
    saved_at = timed_from = time.perf_counter()         # tokens_per_sec is that of training alone
    while True:
        paused = time.perf_counter()
        last = step == args.max_steps
        lost = (last or step % log_interval == 0) and plot.is_lost(
            folder.column("train_loss"), args.max_steps // log_interval)
        last = last or lost

        # Evaluate: always the same windows, before the step that follows.
        if step > start and (step % eval_interval == 0 or last):
            val = evaluate(model, *windows.to(device), min(args.batch_size, 32), corpus.token_bytes)
            line = "val loss {val_loss:.4f} | accuracy {val_accuracy:.2%} | {val_bpb:.4f} bits a byte"
            folder.log(step, line, **val)
            if val["val_loss"] <= min(folder.column("val_loss")):
                folder.save("best.pt", model=model.state_dict(), step=step, **val)
            if args.schedule == "plateau":
                schedule.observe(val["val_loss"])

        # Stop? A signal may reach processes at different steps, so they agree at the log steps.
        stopped = bool(came) and not last and (world == 1 or step % log_interval == 0)
        if world > 1 and step % log_interval == 0:
            votes = torch.tensor(float(stopped), device=device)
            dist.all_reduce(votes)
            stopped = votes.item() > 0

        # Save everything that the next step depends on, and the rows written so far.
        due = step > start and step % (args.checkpoint_interval or eval_interval) == 0
        due = due and (args.checkpoint_interval or paused > saved_at + 10)      # it takes time
        if due or last or stopped:
            saved_at = time.perf_counter()
            folder.save("last.pt", model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                        schedule=vars(schedule), step=step, elapsed=saved_at - folder.began, sums=sums,
                        eigenvectors=eigenvectors)
        if last or stopped:
            break

        # Measure the sharpness that this step meets, always on the same 16 sequences, or the full batch.
        factor = schedule(step)
        for optimizer in optimizers:
            optimizer.set_lr(factor)
        if args.sharpness and step % args.sharpness == 0:
            batch = get_batch(args.batch_size if args.full_batch else min(args.batch_size, 16), 0)
            cells = measure_sharpness(model, optimizers, *batch.to(device), args.grad_clip, eigenvectors)
            folder.log(step, "sharpness {sharpness:.4g}", **cells)
        timed_from += time.perf_counter() - paused

        # Take a batch: this process's slice of it, in grad_accum pieces.
        batch = get_batch(args.batch_size, 0 if args.full_batch else step)      # (2, batch_size, T)
        batch = batch.view(2, args.grad_accum, world, -1, config.context_length)[:, :, rank]
        batch = batch.transpose(0, 1)                                           # (grad_accum, 2, B, T)
        if device.type == "cuda":
            batch = batch.pin_memory()
        if args.dropout:                                # a function of (seed, step, rank), too
            torch.manual_seed((args.seed * 1_000_003 + step * world + rank) % 2**63)

        # Step.
        record = train_step(batch.to(device, non_blocking=device.type == "cuda"))
        sums = {name: sums.get(name, 0.0) + value for name, value in record.items()}
        step += 1

        # Log: means since the last log step.
        if step % log_interval == 0 or step == args.max_steps:
            n_steps = (step - 1) % log_interval + 1
            cells = means(sums, n_steps)                # which waits for the GPU
            seconds = time.perf_counter() - timed_from
            speed = min(n_steps, step - start) * tokens_per_step / seconds
            eta = timedelta(seconds=int((args.max_steps - step) * tokens_per_step / speed))
            line = f"loss {{train_loss:.3f}} | lr {{lr:.1e}} | {{tokens_per_sec:,.0f}} tok/s | eta {eta}"
            folder.log(step, line, lr=args.lr * factor, **cells, tokens_per_sec=speed)
            timed_from += seconds
            sums = {}

    # The end.
    folder.saving.result()
    for number, handler in handlers.items():            # from here on the first Ctrl-C ends it
        signal.signal(number, handler)
    if folder.owner:
        finish(folder, args, step, saved_at - folder.began, stopped, lost, model, corpus.tokenizer)
    if world > 1:
        del train_step                                  # NCCL waits for the graphs that hold its calls
        dist.destroy_process_group()
    return 128 + (came or [[signal.SIGINT]])[0][0] if stopped else 0    # perhaps another process got it

def main(argv=None):
    try:
        return run(*parse_args(argv))
    except KeyboardInterrupt:   # before the first step
        return 130
    except data.DataError as e:
        fail(e)
    except (MemoryError, RuntimeError) as e:    # torch's is a RuntimeError, on a CPU of no kind of its own
        if not re.search("MemoryError|(out of|allocate|not enough) memory", repr(e)):
            raise
        fail("out of memory; lower --batch-size, or raise --grad-accum")
    except OSError as e:        # a full disk, a folder that cannot be written
        fail(f"cannot use {e.filename or 'the disk'}: {e.strerror or e}; make room, or choose another --out")

if __name__ == "__main__":
    sys.exit(main())
