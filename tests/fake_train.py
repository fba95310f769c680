"""Stands in for train.py in the tests: the same flags and the same run directory, losses from a law, not from training.

Final loss against rate is lowest at FAKE_BEST (2e-3); above 15 times that a run spikes, above 40 times it diverges.
FAKE_DELAY: seconds a step, FAKE_FAIL: a rate that crashes. A checkpoint is just metrics.csv itself.
"""
import argparse
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

p = argparse.ArgumentParser()
p.add_argument("--preset", default="tiny", choices=["tiny", "dense", "moe"])
p.add_argument("--lr", type=float)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--out", type=Path)
p.add_argument("--max-steps", type=int, default=40)
p.add_argument("--schedule", default="cosine", choices=["cosine", "linear", "constant"])
p.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
p.add_argument("--warmup-ratio", type=float, default=0.1)
p.add_argument("--min-lr-ratio", type=float, default=0.1)
for flag in ("resume", "no-plot", "no-progress", "dry-run"):
    p.add_argument(f"--{flag}", action="store_true")
p.error = lambda message: (print(f"train.py: {message}", file=sys.stderr), sys.exit(2))
args = p.parse_args()
if args.dry_run:
    sys.exit(0)
out, start, stopped = args.out, time.time(), []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
out.mkdir(parents=True, exist_ok=True)
if args.lr == float(os.environ.get("FAKE_FAIL", "nan")):
    raise RuntimeError("out of memory, say")


def summary(status, **figures):
    figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
    (out / "summary.tmp").write_text(json.dumps(dict(
        status=status, lr=args.lr, seed=args.seed, seconds=time.time() - start, max_steps=args.max_steps, **figures)))
    (out / "summary.tmp").replace(out / "summary.json")
    print(status)


done = out / "summary.json"
if done.exists() and json.loads(done.read_text())["status"] in ("converged", "slow", "unstable", "diverged"):
    sys.exit(0)
(out / "config.json").write_text(json.dumps(dict(args={k: v for k, v in vars(args).items() if k != "out"}, n_params=1)))
summary("running")
best = float(os.environ.get("FAKE_BEST", "2e-3")) * (8 if args.optimizer == "muon" else 1)
u = math.log(args.lr / best)
noise = random.Random(f"{args.lr:g} {args.seed} {args.schedule} {args.warmup_ratio}").gauss(0, 0.006)
luck = random.Random(args.seed).gauss(0, 0.03)
end = 2.6 + 0.25 * (math.exp(-0.5 * u) / 0.5 + math.exp(0.9 * u) / 0.9) / 2
end += luck + noise + 0.05 * (args.schedule == "constant")
wild, dead = u > math.log(15), u > math.log(40)
head = "step,tokens,elapsed,lr,train_loss,grad_norm,tokens_per_sec,val_loss,val_accuracy,val_perplexity,val_bpb\n"
path = out / "metrics.csv"
rows = [line for line in path.read_text().splitlines(True)[1:] if line.endswith("\n")] if path.exists() else []
rows = [r for r in rows if r.split(",")[7] == ""]                       # resumes after the last whole training row
losses, wiggle = [], random.Random(args.seed + 1)
with open(path, "w") as f:
    f.write(head)
    for step in range(1, args.max_steps + 1):
        t = step / args.max_steps
        loss = 7.6 * (1 - t) ** 4 + min(end, 7.4) * (1 - (1 - t) ** 4) + wiggle.gauss(0, 0.03)
        if wild:
            loss += 3 * math.exp(-((t - 0.3) / 0.06) ** 2)
        if dead:
            loss = 7.6 + 40 * t if t < 0.5 else math.nan
        losses.append(loss)
        warm = max(1, args.warmup_ratio * args.max_steps)
        factor = min(1, step / warm) * (args.min_lr_ratio + (1 - args.min_lr_ratio) * (1 + math.cos(math.pi * t)) / 2)
        if step > len(rows):
            time.sleep(float(os.environ.get("FAKE_DELAY", "0")))
        row, grad_norm = f"{step},{step * 4096},{step * .1:.3f}", 1 + 5 * wild * (loss > 6)
        f.write(f"{row},{args.lr * factor:.6g},{loss:.6g},{grad_norm},40960,,,,\n")
        f.flush()
        if step % 4 == 0 and not (dead and t >= 0.5):
            f.write(f"{row},,,,,{loss:.6g},{1 / (1 + loss):.6g},{math.exp(min(loss, 20)):.6g},{loss / 3:.6g}\n")
        if stopped:
            summary("interrupted")
            sys.exit(130)
        if dead and not math.isfinite(loss):
            break
final = math.nan if dead else end
summary("diverged" if dead else "unstable" if wild else "converged", steps=step, tokens=step * 4096,
        final_train_loss=loss, final_val_loss=final, final_val_accuracy=1 / (1 + final),
        final_val_perplexity=math.exp(final), final_val_bpb=final / 3, best_val_loss=final, best_val_step=step,
        max_grad_norm=6.0 if wild else 1.0, diverged_at=step if dead else None)
