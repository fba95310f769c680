"""
Benchmarks, run by hand: `python tests/bench.py data`. Never part of the tests, since timings depend on the machine.
"""

import argparse
import os
import resource
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


# ----------------------------------------------------------------------------------------------------------------------
# data: train a tokenizer and encode with it, here and with the `tokenizers` library, on the same cores


def bench_data(args):
    """--mb of text (default: the Python code of this installation; or --file), a vocabulary of 10,000."""
    import data
    parser = argparse.ArgumentParser(prog="bench.py data")
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--file", help="text with <|endoftext|> between its documents, in place of this Python's code")
    args = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        path, size, rounds = os.path.join(folder, "text"), 0, 0
        with open(path, "wb") as file:
            while size < args.mb * 10**6:
                rounds += 1
                for document in file_documents(args.file) if args.file else code_documents():
                    if size < args.mb * 10**6 and (document := document.strip()):
                        size += file.write(document.encode() + b"<|endoftext|>")
        print(f"{size / 1e6:.1f} MB (the same {rounds} times), {args.vocab_size:,} tokens, {data.cores()} cores")
        for name, work in {"data.py": data_ours, "tokenizers": data_theirs}.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # memory is counted for a process of its own
                try:
                    trained, encoded, memory = pool.submit(work, path, args.vocab_size).result()
                except ImportError as e:
                    return print(f"{name:10}: {e}; pip install {name}")
            print(f"{name:10}: train {trained:6.1f} s   encode {encoded:6.1f} s = {size / 1e6 / encoded:5.1f} MB/s   "
                  f"peak memory {memory / 2**20:,.0f} MiB")
        ours, theirs = (np.fromfile(f"{path}.{name}", "<u2") for name in ("ours", "theirs"))  # 0 ends a document
        ours, theirs = ([part.tobytes() for part in np.split(ids, np.flatnonzero(ids == 0))] for ids in (ours, theirs))
        print(f"{len(ours) - 1:,} documents; with other ids (characters newer than this Python's Unicode tables): "
              f"{sum(a != b for a, b in zip(ours, theirs)) + abs(len(ours) - len(theirs)):,}")


def file_documents(path):
    return Path(path).read_text("utf-8").split("<|endoftext|>")


def code_documents():
    """The .py files of the standard library and of what is installed beside it."""
    for root in dict.fromkeys((sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                yield path.read_text("utf-8").replace("<|endoftext|>", "")
            except (OSError, ValueError):
                pass


def peak_memory(processes):
    """Bytes of this process at its highest, and as much for each child as for the largest: an upper bound."""
    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return (usage[0] + processes * usage[1]) * (1 if sys.platform == "darwin" else 1024)


def data_ours(path, vocab_size):
    """The passes of data.prepare, timed."""
    import data
    tasks, start = data.plan([path]), time.time()
    with ProcessPoolExecutor(data.cores(), get_context("fork")) as pool:
        pieces = Counter()
        for part in data.parallel(pool, partial(data.count, held_out=frozenset()), tasks, "counting"):
            pieces.update(part)
        data.train_bpe(pieces, vocab_size).save(path + ".json")
        del pieces
        trained = time.time()
        with open(path + ".ours", "wb") as out:
            work = partial(data.encode, held_out=frozenset(), tokenizer=path + ".json")
            for ids, *_ in data.parallel(pool, work, tasks, "encoding"):
                out.write(ids)
        encoded = time.time()
    return trained - start, encoded - trained, peak_memory(data.cores())


def data_theirs(path, vocab_size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    def batches(n=1000):
        documents = Path(path).read_text("utf-8").split("<|endoftext|>")[:-1]
        return [documents[i:i + n] for i in range(0, len(documents), n)]

    start = time.time()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(batches(), trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    trained = time.time()
    with open(path + ".theirs", "wb") as out:
        for batch in batches():
            for encoding in tokenizer.encode_batch_fast(batch):
                out.write(np.array([*encoding.ids, 0], "<u2").tobytes())
    return trained - start, time.time() - trained, peak_memory(0)


# ----------------------------------------------------------------------------------------------------------------------
# moe and train: complete training steps, beside plain references, as a share of the machine's product rate


def median_ms(f, repeats=5, inner=1):
    """Median time of f in ms, after two calls to warm up."""
    import torch
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        for _ in range(inner):
            f()
        wait()
        times.append((time.perf_counter() - start) * 1e3 / inner)
    return sorted(times[2:])[repeats // 2]


def product_rate(device, dtype, n):
    """FLOP/s of a large matrix product on random numbers."""
    import torch
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / (median_ms(lambda: a @ b, inner=5) / 1e3)


def flops_a_token(config, counts):
    """Multiply-adds of products, forward and backward: 6 a weight used (not the embedding look-up), causal attention."""
    looked_up = 0 if config.tied else config.vocab_size * config.d_model
    return 6 * (counts["used per token"] - looked_up) + 6 * config.n_layers * config.d_model * config.context_length


def full_step(preset, batch_size, device, plain=False, **changes):
    """
    (step, model, config, optimizers, losses): step() does one complete training step on random tokens, as train.py does.
    plain: float32, logits in one piece, torch.optim.AdamW, no compile; and for MoE a loop over experts with masks.
    """
    import torch
    import torch.nn.functional as F
    from dataclasses import replace
    import data
    import model as m
    import train
    args, config = train.parse_args(["--preset", preset, "--batch-size", str(batch_size), "--device", str(device)])
    config, dtype, backend = replace(config, **changes), train.pick_dtype("auto", device), None
    torch.manual_seed(0)
    model = m.Transformer(config, torch.float32 if plain else dtype).to(device)
    params = list(model.parameters())
    if plain:
        if config.n_experts:
            for block in model.blocks:
                block.feed_forward.forward = partial(masked_loop, block.feed_forward)
        optimizers = [torch.optim.AdamW(params, lr=1e-3)]
        optimizers[0].step = partial(clip_and_step, params, optimizers[0].step)
        losses = lambda x, y: (F.cross_entropy(F.linear(h := model.hidden(x)[0], model.head).flatten(0, 1), y.flatten()), None)
    else:
        optimizers = train.build_optimizer(model, args.optimizer, args.lr)
        backend = train.pick_compile(None, device, config, sum(p.numel() for p in params),
                                     batch_size * config.context_length * args.max_steps)
        losses = train.compiled(model, optimizers, backend, device) if backend else model.losses
    step = train.make_step(losses, optimizers, model, args)
    if train.pick_graph(device, dtype, config, backend):
        step = train.graphed(step)
    tokens = torch.randint(config.vocab_size, (10**6,)).numpy().astype("uint16")
    count = iter(range(10**9))

    def one():
        x, y = (t[None] for t in data.get_batch(tokens, batch_size, config.context_length, 0, next(count)))
        if device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        if not plain:
            train.set_lr(optimizers, 1e-3)
        return step(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
    return one, model, config, optimizers, losses


def clip_and_step(params, step, scale):
    import torch
    torch._foreach_mul_([p.grad for p in params], scale)
    step()


def masked_loop(layer, x):
    """The usual educational MoE: for each expert a mask over all tokens."""
    import torch
    import torch.nn.functional as F
    tokens = x.flatten(0, 1)
    probs = F.linear(tokens, layer.router).softmax(-1)
    weights, experts = probs.topk(layer.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(tokens)
    for e in range(layer.router.size(0)):
        mask = (experts == e).any(-1)
        if mask.any():
            gate = (weights * (experts == e))[mask].sum(-1, keepdim=True)
            out[mask] += gate * F.linear(F.silu(F.linear(tokens[mask], layer.up[e])), layer.down[e])
    return out.view_as(x), torch.zeros(2 + layer.router.size(0), device=x.device)


def torch_attention(qkv, cos, sin):
    """model.rotary_attention with torch's own kernel, on a CPU too."""
    import torch.nn.functional as F
    from model import rope
    qk, v = qkv.split((qkv.size(2) // 3 * 2, qkv.size(2) // 3), dim=2)
    q, k, v = (t.transpose(1, 2) for t in (*rope(qk, cos, sin).chunk(2, dim=2), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def setup():
    import torch
    import train
    train.keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    device = train.pick_device("auto")
    dtype = train.pick_dtype("auto", device)
    rate = product_rate(device, dtype, 8192 if device.type == "cuda" else 2048)
    print(f"torch {torch.__version__}, {train.describe(device)}; a large {str(dtype)[6:]} product runs at {rate / 1e12:.2f} TFLOP/s")
    return device, rate


def row(name, ms, tokens=0, flops=0, rate=1, memory=True):
    import torch
    text = f"{name:<52}{ms:>10,.2f} ms"
    if tokens:
        text += f"{tokens / ms * 1e3:>14,.0f} tok/s {flops * tokens / ms * 1e3 / rate:>7.1%} of the product rate"
        if torch.cuda.is_available():
            text += f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
            torch.cuda.reset_peak_memory_stats()
    print(text, flush=True)


def step_ms(batch_size, device, repeats, inner, kwargs):
    """Median ms of a complete moe step, and its FLOPs a token."""
    import train
    from model import count_parameters
    train.keep_freed_memory()
    step, model, config, *_ = full_step("moe", batch_size, device, **kwargs)
    return median_ms(step, repeats, inner), flops_a_token(config, count_parameters(model))


def bench_moe(args):
    """The moe preset: complete steps, Newton-Schulz, the optimizers. --batch-size 16 (default), of 512 tokens."""
    import torch
    import torch.nn.functional as F
    from model import grouped_linear
    from optim import AdamW, is_hidden_matrix, newton_schulz
    parser = argparse.ArgumentParser(prog="bench.py moe")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(args)
    device, rate = setup()
    cuda, tokens = device.type == "cuda", args.batch_size * 512
    repeats, inner = (5, 20) if cuda else (3, 1)
    base = None
    for name, kwargs in {"complete step, loop over experts with masks, float32": dict(plain=True), "complete step, this project": {},
                         "  with 16 experts": dict(n_experts=16), "  with 32 experts": dict(n_experts=32)}.items():
        measure = partial(step_ms, args.batch_size, device, *((1, 1) if kwargs.get("plain") else (repeats, inner)), kwargs)
        if cuda:
            ms, flops = measure()
        else:  # in a process of its own, as a run is: the heap that one variant leaves behind slows the next
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                ms, flops = pool.submit(measure).result()
        base = base or (None if kwargs.get("plain") else ms)
        row(name + (f" ({ms / base:.2f}x)" if "with" in name and base else ""), ms, tokens, flops, rate)
    _, model, config, optimizers, _ = full_step("moe", args.batch_size, device)
    experts = [p.detach() for n, p in model.named_parameters() if n.endswith((".up", ".down"))]
    matrices = [m.contiguous() for p in experts for m in p]
    stack = torch.cat([p if p.size(1) < p.size(2) else p.mT for p in experts])
    run = torch.compile(newton_schulz) if cuda else newton_schulz
    for name, f in {"Newton-Schulz of 96 expert matrices, one at a time": lambda: [newton_schulz(m, 5, model.dtype) for m in matrices],
                    "  stacked": lambda: newton_schulz(stack, 5, model.dtype),
                    "  stacked and compiled": lambda: run(stack, 5, model.dtype)}.items():
        if cuda or "compiled" not in name:
            row(name, median_ms(f, 3, 5 if cuda else 1))
    layer = model.blocks[0].feed_forward.up.detach().to(model.dtype).requires_grad_()
    x = torch.randn(2 * tokens, layer.size(2), device=device, dtype=model.dtype, requires_grad=True)
    ends = torch.arange(1, len(layer) + 1, device=device, dtype=torch.int32) * (len(x) // len(layer))
    grad = torch.ones(len(x), layer.size(1), device=device, dtype=model.dtype)
    for name, f in {"products of one layer's experts, both passes, this project": grouped_linear,
                    "  torch's grouped_mm": lambda x, w, ends: F.grouped_mm(x, w.mT, offs=ends)}.items():
        if hasattr(F, "grouped_mm") or "torch" not in name:
            row(name, median_ms(lambda: torch.autograd.grad(f(x, layer, ends), (x, layer), grad), 3, 5))
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    hidden = [p for n, p in model.named_parameters() if is_hidden_matrix(n, p)]
    rest = [p for n, p in model.named_parameters() if not is_hidden_matrix(n, p)]
    views = [torch.nn.Parameter(v.clone()) for p in hidden for v in p.detach().view(-1, *p.shape[-2:])]
    for v in views:
        v.grad = torch.randn_like(v) * 1e-3
    theirs = [torch.optim.Muon(views, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3, fused=True)] if hasattr(torch.optim, "Muon") else []
    def both(optimizers): return lambda: [o.step() for o in optimizers]
    for name, f in {"optimizer step: Muon + AdamW, this project": captured(both(optimizers)) if cuda else both(optimizers),
                    "  torch.optim.Muon + torch.optim.AdamW(fused=True)": both(theirs),
                    "optimizer step: AdamW on all, this project": both([AdamW(params, lr=1e-3)]),
                    "  torch.optim.AdamW(fused=True)": both([torch.optim.AdamW(params, lr=1e-3, fused=True)])}.items():
        row(name, median_ms(f, 3, 5 if cuda else 1))


def captured(f):
    """f as a CUDA graph."""
    import torch
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def bench_train(args):
    """--preset dense, --batch-size: complete steps beside a plain reference, where a step's time goes, and start-up."""
    import subprocess
    import torch
    from model import count_parameters
    parser = argparse.ArgumentParser(prog="bench.py train")
    parser.add_argument("--preset", default="dense")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32])
    parser.add_argument("--no-plain", action="store_true")
    args = parser.parse_args(args)
    device, rate = setup()
    cuda = device.type == "cuda"
    for batch_size in args.batch_size:
        for name, kwargs in {"plain float32 step, torch.optim": dict(plain=True), "complete step, this project": {}}.items():
            if kwargs and args.no_plain:
                continue
            step, model, config, optimizers, losses = full_step(args.preset, batch_size, device, **kwargs)
            tokens = batch_size * config.context_length
            ms = median_ms(step, 3, (5 if kwargs else 20) if cuda else 1)
            row(f"{args.preset}, batch {batch_size}: {name}", ms, tokens, flops_a_token(config, count_parameters(model)), rate)
        x, y = torch.randint(config.vocab_size, (2, batch_size, config.context_length), device=device)
        params, one = list(model.parameters()), torch.ones((), device=device)
        forward = median_ms(lambda: losses(x, y), 3, 5 if cuda else 1)
        both = median_ms(lambda: losses(x, y)[0].backward(), 3, 5 if cuda else 1)
        row("  forward (with the head's gradient)", forward)
        row("  backward", both - forward)
        row("  gradient norm", median_ms(lambda: torch.nn.utils.get_total_norm([p.grad for p in params]), 3, 5))
        row("  optimizer", median_ms(lambda: [o.step(scale=one) for o in optimizers], 3, 5))
        tokens = torch.randint(config.vocab_size, (10**6,)).numpy().astype("uint16")
        import data
        row("  data", median_ms(lambda: data.get_batch(tokens, batch_size, config.context_length, 0, 0), 3, 5))
        qkv, dy = (torch.randn(batch_size, config.context_length, n * config.n_heads, config.d_model // config.n_heads,
                               device=device, dtype=model.dtype) for n in (3, 1))
        for name, f in {"rope and attention of a layer, forward and backward": model.blocks[0].attention.core,
                        "  with torch's fused kernel": torch_attention}.items():
            f = torch.compile(f, dynamic=False) if cuda else f

            def both():
                leaf = qkv.detach().requires_grad_()
                return torch.autograd.grad(f(leaf, model.cos, model.sin), leaf, dy)
            row(f"  {name}", median_ms(captured(both) if cuda else both, 3, 5))
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton",
               "PYTHONDONTWRITEBYTECODE": ""}  # where it is set, torch's 1,700 modules are compiled anew at each start
        for attempt in "cold", "warm":
            out, start = Path(folder) / attempt, time.perf_counter()
            command = [sys.executable, Path(__file__).resolve().parent.parent / "train.py", "--preset", args.preset, "--data", "stdlib",
                       "--max-steps", "10", "--log-interval", "1", "--eval-interval", "10", "--eval-tokens", "1024", "--no-plot",
                       "--sample", "0", "--out", out, "--batch-size", str(args.batch_size[0])]
            if attempt == "cold":
                subprocess.run([*command, "--dry-run"], check=True, env=env)  # prepares the data
                start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
            while process.poll() is None and not (
                    (out / "metrics.csv").exists() and len((out / "metrics.csv").read_text().splitlines()) > 1):
                time.sleep(0.05)
            row(f"start-up to the end of the first step, {attempt} caches", (time.perf_counter() - start) * 1e3)
            process.wait()


# ----------------------------------------------------------------------------------------------------------------------

BENCHES = {"data": bench_data, "moe": bench_moe, "train": bench_train}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python tests/bench.py {{{','.join(BENCHES)}}} ...")
    BENCHES[sys.argv[1]](sys.argv[2:])
