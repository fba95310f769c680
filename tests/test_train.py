"""Whole runs on a small text: what they write, that they repeat to the bit, resume, stop, refuse bad input, share work."""
import csv
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import data
import train
from model import ModelConfig, Transformer
from optim import build_optimizer

ROOT = Path(train.__file__).parent
SMALL = ("--data text.txt --vocab-size 300 --d-model 16 --n-layers 2 --n-heads 2 --d-ff 24 --context-length 16 "
         "--batch-size 8 --max-steps 20 --eval-interval 5 --log-interval 1 --eval-tokens 400 --checkpoint-interval 5 "
         "--device cpu --no-plot --sample 0").split()
TIMES = ("elapsed", "tokens_per_sec")
CONFIG = ModelConfig(vocab_size=50, context_length=16, n_layers=2, n_heads=2, d_model=16, d_ff=24)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """All runs of this file share one folder with a text of 400 small documents, and so its token files."""
    path, before = tmp_path_factory.mktemp("train"), os.getcwd()
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 6))) for _ in range(200)]
    docs = [" ".join(rng.choices(words, weights=range(200, 0, -1), k=40)) for _ in range(400)]
    (path / "text.txt").write_text("\n\n".join(docs))
    os.chdir(path)
    yield path
    os.chdir(before)


def run(out, *flags):
    code = train.main([*SMALL, "--out", out, *flags])
    return code, json.loads(Path(out, "summary.json").read_text()), rows(out)


def rows(out):
    with open(Path(out, "metrics.csv"), newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def test_a_run_writes_its_folder():
    code, summary, metrics = run("full", "--lr", "0.01", "--no-plot")
    assert code == 0 and summary["status"] in ("converged", "slow") and summary["steps"] == 20
    config = json.loads(Path("full/config.json").read_text())
    assert config["args"]["lr"] == 0.01 and config["data"]["corpus"] and config["versions"]["torch"] == torch.__version__
    train_rows, evals = [r for r in metrics if r["train_loss"]], [r for r in metrics if r["val_loss"]]
    assert [int(r["step"]) for r in train_rows] == list(range(1, 21))
    assert [int(r["step"]) for r in evals] == [5, 10, 15, 20]
    assert [int(r["tokens"]) for r in train_rows] == [128 * t for t in range(1, 21)]
    # the schedule is that of optimizer steps: two of warm-up, not from zero, and all the way down to 10% (trap 2 and 3)
    lrs = [float(r["lr"]) for r in train_rows]
    assert lrs[:3] == pytest.approx([0.005, 0.01, 0.01]) and lrs[-1] == pytest.approx(0.001)
    first, last = float(evals[0]["val_loss"]), float(evals[-1]["val_loss"])
    assert float(train_rows[0]["train_loss"]) == pytest.approx(math.log(300), abs=0.1) and last < first < math.log(300)
    assert summary["final_val_loss"] == last and summary["best_val_loss"] == min(float(r["val_loss"]) for r in evals)
    assert config["code"].keys() == {"model.py", "optim.py", "schedule.py", "data.py", "train.py"}
    assert float(evals[-1]["val_perplexity"]) == pytest.approx(math.exp(last))
    assert "step 20/20 | loss" in Path("full/training.log").read_text()

    # the evaluation, again and plainly, from the checkpoint
    saved = torch.load("full/checkpoints/last.pt", weights_only=True)
    model = Transformer(ModelConfig(**saved["config"]), train.pick_dtype("auto", torch.device("cpu")))
    model.load_state_dict(saved["model"])
    corpus = data.load("text.txt", 300)
    x, y = data.val_windows(corpus.val, 16, 400)
    text = b"".join(corpus.tokenizer.bytes[i] for i in y.flatten().tolist() if i != corpus.tokenizer.eot)
    assert float(evals[-1]["val_bpb"]) == pytest.approx(last / math.log(2) * y.numel() / len(text))  # of these windows
    logits = model(x)[0].float()
    assert F.cross_entropy(logits.flatten(0, 1), y.flatten()).item() == pytest.approx(last, abs=2e-3)
    assert (logits.argmax(-1) == y).float().mean().item() == pytest.approx(float(evals[-1]["val_accuracy"]), abs=0.02)


def test_the_same_seed_repeats_to_the_bit_and_another_does_not():
    one, two, three = (run(f"same{i}", "--seed", s, "--dropout", "0.1")[2] for i, s in enumerate("001"))
    assert one == two and one != three


@pytest.mark.parametrize("flags", [[], ["--optimizer", "muon", "--lr", "0.02"], ["--schedule", "plateau", "--dropout", "0.1"],
                                   ["--n-experts", "4", "--log-interval", "3"],
                                   ["--optimizer", "sgd", "--lr", "0.1", "--grad-accum", "2"]])
def test_a_run_that_is_killed_resumes_to_the_bit(flags, monkeypatch):
    name = "killed" + "".join(flags).replace("--", "-")
    whole = run(name + "-whole", *flags)[2]
    get_batch, calls = data.get_batch, []

    def die(*args):
        if args[1] == 8:  # a batch, not the check that the text is long enough
            calls.append(args)
            if len(calls) == 13:  # three steps after the checkpoint at 10
                raise RuntimeError("killed")
        return get_batch(*args)
    monkeypatch.setattr(data, "get_batch", die)
    with pytest.raises(RuntimeError):
        run(name, *flags)
    assert json.loads(Path(name, "summary.json").read_text())["status"] == "running" and 12 <= len(rows(name)) + 8
    code, summary, resumed = run(name, *flags, "--resume")
    assert code == 0 and summary["steps"] == 20 and resumed == whole
    assert len(calls) == 13 + 10
    run(name, *flags, "--resume")  # finished: returns at once
    assert len(calls) == 13 + 10
    Path(name, "summary.json").write_text('{"status": "running"}')  # as if killed between the last checkpoint and the summary
    again = run(name, *flags, "--resume")
    assert len(calls) == 13 + 10 and again[2] == whole
    assert {k: v for k, v in again[1].items() if "final" in k} == {k: v for k, v in summary.items() if "final" in k} != {}


def test_ctrl_c_saves_and_resume_goes_on():
    whole = run("whole", "--max-steps", "300", "--eval-interval", "100")[2]
    flags = [*SMALL, "--max-steps", "300", "--eval-interval", "100", "--checkpoint-interval", "1000", "--out", "stopped"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stdout=subprocess.PIPE, text=True)
    while not (Path("stopped/metrics.csv").exists() and len(Path("stopped/metrics.csv").read_text().splitlines()) > 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "--resume" in process.stdout.read()
    summary = json.loads(Path("stopped/summary.json").read_text())
    assert summary["status"] == "interrupted" and 10 < summary["steps"] < 300
    assert train.main([*flags, "--resume"]) == 0
    assert rows("stopped") == whole


def test_divergence_ends_a_run_early_and_counts_as_a_result():
    code, summary, metrics = run("diverged", "--lr", "30", "--max-steps", "200", "--grad-clip", "0", "--eval-interval", "50")
    assert code == 0 and summary["status"] == "diverged" and summary["diverged_at"] < 200
    assert int(metrics[-1]["step"]) == summary["diverged_at"] and metrics[-1]["val_loss"]
    Path("diverged/summary.json").write_text('{"status": "running"}')  # killed just before its summary: it stays ended
    assert run("diverged", "--lr", "30", "--max-steps", "200", "--grad-clip", "0", "--eval-interval", "50",
               "--resume")[1]["diverged_at"] == summary["diverged_at"] and rows("diverged") == metrics


def one_sgd_step(pieces, clip):
    """The weights' change in one step of gradient descent at rate 1, which is minus the gradient, and the record."""
    args, _ = train.parse_args(["--grad-clip", str(clip)])
    torch.manual_seed(1)
    x, y = torch.randint(50, (2, pieces, 8 // pieces, 16))
    torch.manual_seed(0)
    model = Transformer(CONFIG, torch.float64).double()
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = build_optimizer(model, "sgd", 1.0, weight_decay=0.0, momentum=0.0)
    record = train.make_step(model.losses, optimizers, model, args)(x, y)
    return record, [a - p.detach() for a, p in zip(before, model.parameters())], (model, before, x, y)


def test_accumulation_gives_the_same_gradients():
    whole, pieces = one_sgd_step(1, 0), one_sgd_step(4, 0)
    for a, b in zip([whole[0], *whole[1]], [pieces[0], *pieces[1]]):
        torch.testing.assert_close(a, b)
    assert whole[1][1].abs().max() > 0


@pytest.mark.parametrize("clip", [0, 0.01, 100])
def test_clipping_is_that_of_torch(clip):
    record, gradients, (model, before, x, y) = one_sgd_step(1, clip)
    with torch.no_grad():
        for p, value in zip(model.parameters(), before):
            p.copy_(value)
    model.losses(x[0], y[0])[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    assert 0.01 < norm < 100
    torch.testing.assert_close(record[1], norm)
    for gradient, p in zip(gradients, model.parameters()):
        torch.testing.assert_close(gradient, p.grad)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_gradient_that_is_not_finite_changes_no_weight(optimizer):
    args, _ = train.parse_args([])
    model = Transformer(CONFIG)
    optimizers = build_optimizer(model, optimizer, 0.1)

    def losses(x, y):
        return model.losses(x, y)[0] * math.inf, None
    before = [p.detach().clone() for p in model.parameters()]
    x, y = torch.randint(50, (2, 1, 4, 16))
    record = train.make_step(losses, optimizers, model, args)(x, y)
    assert not record[:2].isfinite().all()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_router_columns():
    _, _, metrics = run("moe", "--n-experts", "4", "--optimizer", "muon")
    last = [r for r in metrics if r["train_loss"]][-1]
    for layer in range(2):
        shares = [float(last[f"share_L{layer}_E{e}"]) for e in range(4)]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) >= 0
        assert 0 < float(last[f"router_entropy_L{layer}"]) <= math.log(4) + 1e-4
        assert 0.9 < float(last[f"balance_loss_L{layer}"]) < 4


@pytest.mark.parametrize("n_experts", [0, 4])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_steps_are_those_of_the_plain_one(n_experts):
    """With the backend of MPS, which needs no C++ compiler; and nothing is compiled again and again."""
    args, _ = train.parse_args([])
    batches, curves = torch.randint(50, (12, 2, 1, 4, 16)) // 5, []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model = Transformer(replace(CONFIG, n_experts=n_experts))
        optimizers = build_optimizer(model, "muon", 0.03)
        losses = model.losses
        if backend:
            losses = torch.compile(losses, backend=backend)
            for optimizer in optimizers:
                optimizer.compile(backend=backend)
        step = train.make_step(losses, optimizers, model, args)
        curves.append(torch.stack([step(x, y) for x, y in batches]))
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-4)
    assert curves[0][-1, 0] < curves[0][0, 0] - 0.1


def test_two_processes_give_the_loss_of_one():
    flags = ["--dtype", "float32", "--optimizer", "muon", "--lr", "0.02", "--n-layers", "3"]  # 3 matrices do not halve
    alone = run("alone", *flags)[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py"]
    pair = subprocess.run([*command, *SMALL, "--out", "pair", *flags], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert pair.returncode == 0, pair.stderr
    for a, b in zip(alone, rows("pair"), strict=True):
        for key in a:
            assert (a[key] == b[key] == "") or float(a[key]) == pytest.approx(float(b[key]), rel=1e-3), (key, a["step"])
    assert train.main([*SMALL, "--out", "pair", *flags, "--resume"]) == 0  # its checkpoint is one process's, too


def test_a_plain_run_does_not_import_the_compiler():  # it would take a second of every start
    code = "import sys, train; train.main(sys.argv[1:]); sys.exit('torch._dynamo' in sys.modules)"
    flags = ["--optimizer", "muon", "--lr", "0.02", "--out", "plain", "--resume"]
    for _ in range(2):  # the second one loads the checkpoint of the first
        process = subprocess.run([sys.executable, "-c", code, *SMALL, *flags], text=True, capture_output=True,
                                 env=dict(os.environ, PYTHONPATH=str(ROOT)))
        assert process.returncode == 0, process.stderr or "imported torch._dynamo"
        Path("plain/summary.json").unlink()


def test_a_closed_pipe_ends_the_run_quietly():
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *SMALL, "--max-steps", "2000", "--out", "pipe"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"parameters" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == b""


def test_no_folder_is_left_when_there_is_no_data(capsys):
    with pytest.raises(SystemExit):
        train.main([*SMALL, "--data", "nowhere.txt", "--out", "new/run"])
    assert not Path("new").exists()


def test_existing_runs_are_not_overwritten(capsys):
    run("kept")
    with pytest.raises(SystemExit) as e:
        run("kept")
    assert e.value.code == 2 and "already holds a run" in capsys.readouterr().err
    for status in "converged", "interrupted":
        Path("kept/summary.json").write_text(json.dumps(dict(status=status)))
        with pytest.raises(SystemExit) as e:
            run("kept", "--lr", "0.5", "--resume")
        assert e.value.code == 2 and "--lr" in capsys.readouterr().err


@pytest.mark.parametrize("flags, word", [
    (["--preset", "huge"], "huge"), (["--data", "nowhere"], "nowhere"), (["--schedule", "sine"], "sine"),
    (["--device", "mps"], "use --device cpu"), (["--device", "cuda"], "use --device cpu"), (["--device", "tpu9"], "tpu9"),
    (["--lr", "0"], "lr"), (["--lr", "-1"], "lr"), (["--lr", "nan"], "lr"), (["--lr", "inf"], "lr"), (["--lr", "fast"], "fast"),
    (["--n-heads", "3"], "n_heads"), (["--n-experts", "2", "--top-k", "3"], "top_k"), (["--context-length", "100000"], "context"),
    (["--data", "empty.txt"], "empty"), (["--data", "binary.bin"], "binary"), (["--out", "text.txt/run"], "text.txt"),
    (["--batch-size", "6", "--grad-accum", "4"], "grad-accum"), (["--max-steps", "0"], "max-steps"),
    (["--warmup-ratio", "2"], "warmup"), (["--vocab-size", "100"], "257"), (["--vocab-size", "70000"], "65,536"),
    (["--colour", "red"], "colour")])
def test_bad_input_is_one_line_and_status_2(flags, word, capsys):
    if "cuda" in flags and torch.cuda.is_available() or "mps" in flags and torch.backends.mps.is_available():
        pytest.skip("it is there")
    Path("empty.txt").write_text("")
    Path("binary.bin").write_bytes(bytes(range(256)) * 20)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train.main([*SMALL, "--out", "bad", *flags])
    err = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and word in err[-1], err
    assert [line for line in err if "train.py:" in line or "Traceback" in line] == err[-1:], err


def test_dtype_and_compile_are_chosen_by_the_hardware(monkeypatch, capsys):
    cpu, mps = torch.device("cpu"), torch.device("mps")
    config = ModelConfig()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert train.pick_dtype("auto", cpu) == torch.bfloat16
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert train.pick_dtype("auto", cpu) == torch.float32 == train.pick_dtype("auto", mps)
    assert train.pick_dtype("bfloat16", cpu) == torch.bfloat16
    cuda, tokens = torch.device("cuda"), 10**6
    assert train.pick_compile(None, cpu, config, tokens) is None                # a minute of work
    assert train.pick_compile(None, cpu, config, 10**9) == "inductor"           # a day
    assert train.pick_compile(True, mps, config, tokens) == "aot_eager"
    assert train.pick_compile(None, mps, config, tokens) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "here")
    assert train.pick_compile(None, cuda, config, tokens) == "inductor"
    assert train.pick_compile(False, cuda, config, tokens) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train.pick_compile(None, cuda, config, tokens) is None               # Windows has no Triton
    assert "without torch.compile" in capsys.readouterr().err
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert train.pick_device("auto") == mps
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train.pick_device("auto").type == "cuda"


def test_a_step_is_a_cuda_graph_where_nothing_in_it_waits_for_the_host(monkeypatch):
    cuda, dense, moe = torch.device("cuda"), ModelConfig(), ModelConfig(n_experts=4)
    for hopper in (True, False):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if hopper else (8, 0))
        assert train.can_record(cuda, torch.bfloat16, dense, "inductor")
        assert train.can_record(cuda, torch.bfloat16, moe, "inductor") == hopper
        assert not train.can_record(cuda, torch.float32, moe, "inductor")
        assert not train.can_record(cuda, torch.bfloat16, dense, None)
        assert not train.can_record(cuda, torch.bfloat16, ModelConfig(dropout=0.1), "inductor")
    assert not train.can_record(torch.device("cpu"), torch.bfloat16, dense, "inductor")


def test_one_step_and_one_log_row_are_enough():
    assert run("one", "--max-steps", "1")[1]["steps"] == 1
    assert run("few", "--log-interval", "15")[1]["status"] in ("converged", "slow")


def test_muons_first_guess_follows_the_size():
    guess = [train.parse_args(["--optimizer", "muon", "--d-model", str(d)])[0].lr for d in (128, 256)]
    assert 1.5 < guess[1] / guess[0] < 2 and train.parse_args(["--optimizer", "muon", "--lr", "0.5"])[0].lr == 0.5
    assert train.parse_args(["--preset", "moe"])[0].lr == 0.065
