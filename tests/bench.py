"""Benchmarks, run by hand: timings depend on the machine, so each compares side by side in one run.

    python tests/bench.py train --preset dense --batch-size 128 32    # steps beside a plain reference
    python tests/bench.py train --preset moe                          # the same, beside a loop over experts
    python tests/bench.py parts --preset moe                          # where a step's time goes
    python tests/bench.py start                                       # seconds to the end of the first step
    python tests/bench.py data --mb 100                               # BPE and encoding beside `tokenizers`
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import train
from model import Transformer, count_parameters
from optim import AdamW, build_optimizer, newton_schulz

# --------------------------------------------------------------------------------------------------
# Measuring


def median_ms(f, repeats=5, inner=1):
    """Median time of f in ms, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        for _ in range(inner):
            f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / inner)
    return sorted(times[2:])[repeats // 2]


def product_rate(device, dtype):
    """FLOP/s of a large matrix product on random numbers."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / (median_ms(lambda: a @ b, inner=5) / 1e3)


def flops_per_token(config):
    """Of products, forward and backward: 6 for each weight (an embedding is looked up), and attention."""
    with torch.device("meta"):
        weights = count_parameters(Transformer(config))["used per token"]
    if not config.tied:
        weights -= config.vocab_size * config.d_model
    return 6 * weights + 6 * config.n_layers * config.d_model * config.context_length


def setup():
    torch.set_float32_matmul_precision("high")
    device = train.pick_device("auto")
    dtype = train.pick_dtype("auto", device)
    rate = product_rate(device, dtype)
    print(f"torch {torch.__version__}, {device}; a large {dtype} product runs at {rate / 1e12:.2f} TFLOP/s")
    return device, dtype, rate


def report(name, ms, tokens=0, flops=0, rate=1):
    """A line of the output."""
    line = f"{name:<56}{ms:>11,.2f} ms"
    if tokens:
        speed = tokens / ms * 1e3
        line += f"{speed:>13,.0f} tok/s {flops * speed / rate:>7.1%} of the product rate"
        if torch.cuda.is_available():
            line += f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
            torch.cuda.reset_peak_memory_stats()
    print(line, flush=True)

# --------------------------------------------------------------------------------------------------
# Complete training steps


def masked_loop(layer, x):
    """The usual educational MoE: for each expert a mask over all tokens."""
    tokens = x.flatten(0, 1)
    probs = F.linear(tokens, layer.router).softmax(-1)
    weights, experts = probs.topk(layer.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(tokens)
    for e in range(len(layer.router)):
        mask = (experts == e).any(-1)
        gate = (weights * (experts == e))[mask].sum(-1, keepdim=True)
        hidden = F.silu(F.linear(tokens[mask], layer.up[e]))
        out[mask] += gate * F.linear(hidden, layer.down[e])
    return out.view_as(x), {}


def plain_step(args, config, device):
    """float32, logits in one piece, torch.optim.AdamW, nothing compiled; for experts a loop with masks."""
    model = Transformer(config).to(device)
    for block in model.blocks:
        if config.n_experts:
            block.feed_forward.forward = partial(masked_loop, block.feed_forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(batch):
        _, loss, _ = model(*batch[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def our_step(args, config, device):
    """As train.py does it with its default flags."""
    dtype = train.pick_dtype("auto", device)
    _, _, _, step, _ = train.build(args, config, device, dtype, dict(step=0))
    return step


def time_step(preset, batch_size, make, changes, repeats, inner):
    """Median ms of a complete step on random tokens, batches included; FLOPs and tokens a step."""
    args, config = train.parse_args(["--preset", preset, "--batch-size", str(batch_size)])
    config = replace(config, **changes)
    device = train.pick_device("auto")
    torch.compiler.reset()      # it keeps 8 variants of a function, and this is another model
    torch.manual_seed(0)
    step = make(args, config, device)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 10**6).astype(np.uint16)
    count = iter(range(10**9))

    def one():
        batch = data.get_batch(tokens, batch_size, config.context_length, 0, next(count))
        batch = torch.stack(batch)[None]        # (1, 2, B, T)
        if device.type == "cuda":
            batch = batch.pin_memory()
        step(batch.to(device, non_blocking=True))
    ms = median_ms(one, repeats, inner)
    return ms, flops_per_token(config), batch_size * config.context_length


def bench_train(flags):
    parser = argparse.ArgumentParser(prog="bench.py train")
    parser.add_argument("--preset", default="dense")
    parser.add_argument("--batch-size", type=int, nargs="+")
    parser.add_argument("--no-plain", action="store_true")
    flags = parser.parse_args(flags)
    device, _, rate = setup()
    variants = [("plain: float32, torch.optim, not compiled", plain_step, {}), ("here", our_step, {})]
    if flags.preset == "moe":
        variants += [(f"here, {n} experts", our_step, {"n_experts": n}) for n in (16, 32)]
    for batch_size in flags.batch_size or [16 if flags.preset == "moe" else 32]:
        for name, make, changes in variants[flags.no_plain:]:
            repeats, inner = (5, 20) if device.type == "cuda" else (3, 1)
            if make is plain_step:
                repeats, inner = 3, 1
            measure = partial(time_step, flags.preset, batch_size, make, changes, repeats, inner)
            if device.type == "cuda":
                result = measure()
            else:   # in a process of its own, as a run is: the heap that one leaves behind slows the next
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    result = pool.submit(measure).result()
            ms, flops, tokens = result
            report(f"{flags.preset}, batch {batch_size}: {name}", ms, tokens, flops, rate)

# --------------------------------------------------------------------------------------------------
# Parts


def bench_parts(flags):
    """The loss of all logits, Newton-Schulz, and the optimizers beside torch's."""
    parser = argparse.ArgumentParser(prog="bench.py parts")
    parser.add_argument("--preset", default="moe")
    parser.add_argument("--batch-size", type=int, default=16)
    flags = parser.parse_args(flags)
    device, dtype, _ = setup()
    args, config = train.parse_args(["--preset", flags.preset])
    model = Transformer(config, dtype).to(device)

    x = torch.randn(flags.batch_size * config.context_length, config.d_model, device=device, dtype=dtype)
    targets = torch.randint(config.vocab_size, (len(x),), device=device)
    head = model.head.detach().to(dtype)
    leaves = [x.requires_grad_(), head.requires_grad_()]

    def whole():
        loss = F.cross_entropy(F.linear(x, head).float(), targets)
        torch.autograd.grad(loss, leaves)
    report("head and loss, forward and backward, not compiled", median_ms(whole, 3))
    if hasattr(F, "linear_cross_entropy"):      # torch 2.13: in pieces, without second derivatives
        options = torch.nn.LinearCrossEntropyOptions()

        def pieces():
            loss = F.linear_cross_entropy(x, head, targets, options=options)
            torch.autograd.grad(loss, leaves)
        report("  F.linear_cross_entropy in pieces", median_ms(pieces, 3))

    if config.n_experts:
        stack = torch.cat([block.feed_forward.up.detach() for block in model.blocks]).to(dtype)
        one_by_one = median_ms(lambda: [newton_schulz(matrix) for matrix in stack], 3)
        report(f"Newton-Schulz of {len(stack)} matrices, one at a time", one_by_one)
        report("  as a stack", median_ms(lambda: newton_schulz(stack), 3))

    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    ours = build_optimizer(model, args.optimizer, 1e-3)
    ours_ms = median_ms(lambda: [optimizer.step() for optimizer in ours], 3)
    report(f"optimizer step, {args.optimizer}, here, not compiled", ours_ms)
    report("  AdamW on all, here", median_ms(AdamW(params, lr=1e-3).step, 3))
    report("  torch.optim.AdamW(fused=True) on all", median_ms(torch.optim.AdamW(params, fused=True).step, 3))


def bench_start(flags):
    """Seconds from the command to its first log line, with cold and with warm compile caches."""
    parser = argparse.ArgumentParser(prog="bench.py start")
    parser.add_argument("--preset", default="dense")
    flags = parser.parse_args(flags)
    with tempfile.TemporaryDirectory() as folder:
        env = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor")
        env["TRITON_CACHE_DIR"] = f"{folder}/triton"
        program = [sys.executable, str(ROOT / "train.py"), "--preset", flags.preset, "--data", "stdlib"]
        program += ["--max-steps", "10", "--log-interval", "1", "--no-plot", "--sample", "0"]
        subprocess.run([*program, "--prepare"], check=True)
        for caches in ("cold", "warm"):
            start = time.perf_counter()
            command = [*program, "--out", f"{folder}/{caches}"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)
            while not process.stdout.readline().startswith("step 1/"):
                assert process.poll() is None, "the run failed"
            ms = (time.perf_counter() - start) * 1e3
            report(f"{flags.preset}: to the end of the first step, {caches} caches", ms)
            process.communicate()


def bench_data(flags):
    """BPE training and encoding in one process, beside the `tokenizers` library (pip install tokenizers)."""
    parser = argparse.ArgumentParser(prog="bench.py data")
    parser.add_argument("--mb", type=float, default=10)
    parser.add_argument("--vocab-size", type=int, default=10_000)
    flags = parser.parse_args(flags)
    texts, size = [], 0
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if size < flags.mb * 1e6:
            texts.append(text)
            size += len(text)
    start = time.perf_counter()
    ours = data.train_bpe(data.count(texts), flags.vocab_size)
    trained = time.perf_counter()
    ids = [ours.encode(text) for text in texts]
    report(f"{size / 1e6:.0f} MB, BPE here", (trained - start) * 1e3)
    report("  encoding", (time.perf_counter() - trained) * 1e3)

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    start = time.perf_counter()
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=flags.vocab_size, min_frequency=2, special_tokens=[data.EOT], initial_alphabet=alphabet,
        show_progress=False))
    trained = time.perf_counter()
    expected = [encoding.ids for encoding in theirs.encode_batch(texts)]
    report("BPE in `tokenizers`, all cores", (trained - start) * 1e3)
    report("  encoding", (time.perf_counter() - trained) * 1e3)
    print("the same ids:", ids == expected)


BENCHES = {"train": bench_train, "parts": bench_parts, "start": bench_start, "data": bench_data}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python tests/bench.py {{{','.join(BENCHES)}}} ...")
    BENCHES[sys.argv[1]](sys.argv[2:])
