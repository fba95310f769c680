"""Stands in for train.py in the tests: the same flags and folder, losses from a law, not from training.

Final loss against rate is lowest at FAKE_BEST (2e-3); above 15 times that a run spikes, above 40 it diverges.
FAKE_DELAY: seconds a step; FAKE_FAIL: a rate that crashes; FAKE_KILL: one that is killed from outside. A checkpoint is just metrics.csv itself.
"""
import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

p = argparse.ArgumentParser(prog="train.py", allow_abbrev=False)
p.error = lambda message: (print(f"train.py: {message}", file=sys.stderr), sys.exit(2))
p.add_argument("--preset", default="tiny")
p.add_argument("--device", default="auto")
p.add_argument("--data", default="stdlib")
p.add_argument("--data-tokens", type=int, default=0)
p.add_argument("--lr", type=float)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--out", type=Path)
p.add_argument("--max-steps", type=int, default=40)
p.add_argument("--schedule", default="cosine", choices=["cosine", "linear", "constant"])
p.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
p.add_argument("--weight-decay", type=float, default=0.1)
p.add_argument("--warmup-ratio", type=float, default=0.1)
p.add_argument("--min-lr-ratio", type=float, default=0.1)
for flag in ("resume", "no-plot", "no-progress", "prepare"):
    p.add_argument(f"--{flag}", action="store_true")
args = p.parse_args()
if args.lr is None:
    args.lr = 2e-3  # the preset's own
tokens = args.data_tokens or args.max_steps * 4096

# What a loss depends on: the text, of which a run reads as much as it needs, and this file.
corpus = hashlib.sha256(f"{args.data} {tokens}".encode()).hexdigest()
data = dict(corpus=args.data, train_sha256=corpus, val_sha256=corpus)
code = {Path(__file__).name: hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
settings = {key: str(value) if key == "out" else value for key, value in vars(args).items()}
if args.prepare:
    print(json.dumps(dict(args=settings, data=data, code=code, devices=os.environ.get("FAKE_DEVICES", "cpu").split())))
    sys.exit(0)

out = args.out
start = time.time()
stopped = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: stopped.append(number))
out.mkdir(parents=True, exist_ok=True)
if args.lr == float(os.environ.get("FAKE_FAIL", "nan")):
    raise RuntimeError("out of memory, say")
if args.lr == float(os.environ.get("FAKE_KILL", "nan")):
    os.kill(os.getpid(), signal.SIGKILL)


def summary(status, **values):
    values = dict(status=status, lr=args.lr, seed=args.seed, seconds=time.time() - start, **values)
    aside = out / "summary.tmp"
    aside.write_text(json.dumps(values).replace("NaN", "null"))
    aside.replace(out / "summary.json")


try:
    status = json.loads((out / "summary.json").read_text())["status"]
except (OSError, ValueError, KeyError):
    status = None
if status in ("converged", "slow", "unstable", "diverged"):
    sys.exit(0)

if not (out / "metrics.csv").exists():
    (out / "config.json").write_text(json.dumps(dict(args=settings, data=data, code=code)))
summary("running")

# The law: the loss at the end, from the rate, the seed's luck, and the run's own.
u = math.log(args.lr / float(os.environ.get("FAKE_BEST", "2e-3")))
if args.optimizer == "muon":
    u -= math.log(8)
end = 2.6 + 0.125 * (math.exp(-0.5 * u) / 0.5 + math.exp(min(9, 0.9 * u)) / 0.9)
end += 0.05 * (args.schedule == "constant")
end += random.Random(args.seed).gauss(0, 0.03)
end += random.Random(f"{args.lr:g} {args.seed} {args.schedule} {args.warmup_ratio}").gauss(0, 0.006)
end = min(end, 7.4)
wild = u > math.log(15)
dead = u > math.log(40)

head = "step,tokens,elapsed,lr,train_loss,grad_norm,tokens_per_sec"
head += ",val_loss,val_accuracy,val_perplexity,val_bpb\n"
path = out / "metrics.csv"
rows = []
if path.exists():    # resumes after the last whole training row
    rows = [line for line in path.read_text().splitlines(True)[1:] if line.endswith(",,,,\n")]
wiggle = random.Random(args.seed + 1)
with open(path, "w") as file:
    file.write(head)
    for step in range(1, args.max_steps + 1):
        t = step / args.max_steps
        ahead = (1 - t) ** (4 if u > -2 else 1)     # too low a rate falls like a straight line
        loss = 7.6 * ahead + end * (1 - ahead) + wiggle.gauss(0, 0.03)
        if wild:
            loss += 3 * math.exp(-((t - 0.3) / 0.06) ** 2)
        if dead:
            loss = 7.6 + 40 * t if t < 0.5 else math.nan
        warmup = min(1, step / max(1, args.warmup_ratio * args.max_steps))
        cosine = (1 + math.cos(math.pi * t)) / 2
        lr = args.lr * warmup * (args.min_lr_ratio + (1 - args.min_lr_ratio) * cosine)
        if step > len(rows):
            time.sleep(float(os.environ.get("FAKE_DELAY", "0")))
        row = f"{step},{step * 4096},{step * .1:.3f}"
        file.write(f"{row},{lr:.6g},{loss:.6g},{1 + 5 * wild * (loss > 6)},40960,,,,\n")
        file.flush()
        if step % 4 == 0 and not (dead and t >= 0.5):
            perplexity = math.exp(min(loss, 20))
            file.write(f"{row},,,,,{loss:.6g},{1 / (1 + loss):.6g},{perplexity:.6g},{loss / 3:.6g}\n")
        if stopped:
            summary("interrupted")
            sys.exit(128 + stopped[0])
        if not math.isfinite(loss):
            break
final = end
status = "converged"
if wild:
    status = "unstable"
if dead:
    final = math.nan
    status = "diverged"
summary(status, steps=step, tokens=step * 4096, final_train_loss=loss, final_val_loss=final,
        final_val_accuracy=1 / (1 + final), final_val_perplexity=math.exp(min(final, 20)),
        final_val_bpb=final / 3, best_val_loss=final, best_val_step=step, max_grad_norm=1.0 + 5 * wild)
