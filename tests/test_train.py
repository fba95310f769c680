"""Whole runs on a small text: they repeat to the bit, resume, stop, refuse bad input and share work."""
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import data
import plot
import train
from model import ModelConfig, Transformer
from optim import build_optimizer

ROOT = Path(train.__file__).parent
SMALL = ("--data text.txt --vocab-size 300 --d-model 16 --n-layers 2 --n-heads 2 --d-ff 24 --batch-size 8 "
         "--context-length 16 --max-steps 20 --eval-interval 5 --log-interval 1 --eval-tokens 400 "
         "--checkpoint-interval 5 --warmup-ratio 0.1 --device cpu --no-plot --sample 0").split()
TIMES = ("elapsed", "tokens_per_sec")
PROGRAM = [sys.executable, ROOT / "train.py"]
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
CONFIG = ModelConfig(vocab_size=50, context_length=16, n_layers=2, n_heads=2, d_model=16, d_ff=24)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """All runs of this file share one folder with a text of 400 small documents, and so its token files."""
    path = tmp_path_factory.mktemp("train")
    before = os.getcwd()
    rng = random.Random(0)
    words = []
    for _ in range(200):
        length = rng.randint(1, 6)
        words.append("".join(rng.choice("abcdefgh") for _ in range(length)))
    documents = []
    for _ in range(400):
        chosen = rng.choices(words, weights=range(200, 0, -1), k=40)
        documents.append(" ".join(chosen))
    (path / "text.txt").write_text("\n\n".join(documents))
    os.chdir(path)
    yield path
    os.chdir(before)


def run(out, *flags):
    """Exit status, summary, rows of metrics.csv without times."""
    code = train.main([*SMALL, "--out", out, *flags])
    return code, read(out, "summary.json"), rows(out)


def read(out, name):
    return json.loads(Path(out, name).read_text())


def rows(out):
    with open(Path(out, "metrics.csv"), newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        for name in TIMES:
            del row[name]
    return found


def numbers(rows, column):
    """The cells of a column that are not empty."""
    return [float(row[column]) for row in rows if row[column]]


def forget_the_end(out):
    """As if killed between the last checkpoint and the summary."""
    Path(out, "summary.json").write_text('{"status": "running"}')


def refused(capsys, *flags):
    """The lines on stderr of a run that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train.main([*SMALL, *flags])
    assert e.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


def test_a_run_writes_its_folder():
    code, summary, metrics = run("full", "--lr", "0.01", "--no-plot")
    assert code == 0 and summary["status"] in ("converged", "slow") and summary["steps"] == 20
    config = read("full", "config.json")
    assert config["args"]["lr"] == 0.01 and config["data"]["corpus"]
    assert config["torch"] == torch.__version__
    assert config["code"].keys() == {"model.py", "optim.py", "schedule.py", "data.py", "train.py", "plot.py"}
    assert "step 20/20 | loss" in Path("full/training.log").read_text()

    train_rows = [row for row in metrics if row["train_loss"]]
    evals = [row for row in metrics if row["val_loss"]]
    assert numbers(train_rows, "step") == list(range(1, 21))
    assert numbers(evals, "step") == [5, 10, 15, 20]
    assert numbers(train_rows, "tokens") == [128 * t for t in range(1, 21)]
    # The schedule is that of optimizer steps: two of warm-up, not from zero, and all the way down to 10%.
    lrs = numbers(train_rows, "lr")
    assert lrs[:3] == pytest.approx([0.005, 0.01, 0.01])
    assert lrs[-1] == pytest.approx(0.001)
    losses = numbers(evals, "val_loss")
    assert numbers(train_rows, "train_loss")[0] == pytest.approx(math.log(300), abs=0.1)
    assert losses[-1] < losses[0] < math.log(300)
    assert summary["final_val_loss"] == losses[-1]
    assert summary["best_val_loss"] == min(losses)
    assert numbers(evals, "val_perplexity")[-1] == pytest.approx(math.exp(losses[-1]))


def test_the_evaluation_again_and_plainly_from_the_checkpoint():
    evals = run("evaluated", "--lr", "0.01")[2]
    loss = numbers(evals, "val_loss")[-1]
    saved = torch.load("evaluated/checkpoints/last.pt", weights_only=True)
    model = Transformer(ModelConfig(**saved["config"]["model"]), train.pick_dtype("auto", CPU))
    model.load_state_dict(saved["model"])
    corpus = data.load("text.txt", 300)
    x, y = data.val_windows(corpus.val, 16, 400)
    ids = [i for i in y.flatten().tolist() if i != corpus.tokenizer.eot]
    text = b"".join(corpus.tokenizer.bytes[i] for i in ids)     # of these windows
    bits = loss / math.log(2) * y.numel()
    assert numbers(evals, "val_bpb")[-1] == pytest.approx(bits / len(text))
    logits = model(x)[0].float()
    assert F.cross_entropy(logits.flatten(0, 1), y.flatten()).item() == pytest.approx(loss, abs=2e-3)
    accuracy = (logits.argmax(-1) == y).float().mean().item()
    assert accuracy == pytest.approx(numbers(evals, "val_accuracy")[-1], abs=0.02)


def test_the_same_seed_repeats_to_the_bit_and_another_does_not():
    found = []
    for i, seed in enumerate("001"):
        found.append(run(f"same{i}", "--seed", seed, "--dropout", "0.1")[2])
    assert found[0] == found[1] != found[2]


METHODS = {
    "adamw": [],
    "muon": ["--optimizer", "muon", "--lr", "0.02"],
    "plateau": ["--schedule", "plateau", "--dropout", "0.1"],
    "experts": ["--n-experts", "4", "--log-interval", "3"],
    "sgd": ["--optimizer", "sgd", "--lr", "0.1", "--grad-accum", "2"],
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_killed_resumes_to_the_bit(name, monkeypatch):
    flags = METHODS[name]
    whole = run(name + "-whole", *flags)[2]
    get_batch = data.get_batch
    calls = []

    def die(*args):
        if args[1] == 8:    # a batch, not the check that the text is long enough
            calls.append(args)
            if len(calls) == 13:    # three steps after the checkpoint at 10
                raise RuntimeError("killed")
        return get_batch(*args)
    monkeypatch.setattr(data, "get_batch", die)
    with pytest.raises(RuntimeError):
        run(name, *flags)
    assert read(name, "summary.json")["status"] == "running"
    assert 12 <= len(rows(name)) + 8
    code, summary, resumed = run(name, *flags, "--resume")
    assert code == 0 and summary["steps"] == 20 and resumed == whole
    assert len(calls) == 13 + 10
    run(name, *flags, "--resume")   # finished: it ends again, without a step
    assert len(calls) == 13 + 10 and rows(name) == whole
    forget_the_end(name)
    again = run(name, *flags, "--resume")
    assert len(calls) == 13 + 10 and again[2] == whole
    finals = [{key: one[key] for key in one if "final" in key} for one in (summary, again[1])]
    assert finals[0] == finals[1] != {}


def test_a_finished_run_without_its_checkpoints_stays_as_it_is(capsys):
    whole = run("light")
    Path("light/checkpoints/last.pt").unlink()
    capsys.readouterr()
    assert run("light", "--resume") == whole
    assert "already finished" in capsys.readouterr().out


JOB = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)    # as nohup does it
import train
before = signal.getsignal(signal.SIGINT)
status = train.main()
restored = signal.getsignal(signal.SIGINT) == before
train.main([*sys.argv[1:], "--resume"])
compiler = "torch._dynamo" in sys.modules       # importing it would take a second of every start
print(status, restored, compiler, file=sys.stderr)
"""


def test_a_process_that_loses_its_console_and_gets_signals_saves_once_and_resumes():
    """What its starter ignores stays ignored; and neither a run nor a resumed one imports a compiler."""
    flags = [*SMALL, *METHODS["muon"], "--max-steps", "150", "--eval-interval", "50"]
    whole = run("left-alone", *flags)[2]
    flags += ["--checkpoint-interval", "1000", "--out", "job"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", JOB, *flags], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=environment)

    def wait_for(n_rows):
        metrics = Path("job/metrics.csv")
        while not metrics.exists() or len(metrics.read_text().splitlines()) <= n_rows:
            time.sleep(0.005)
    assert "parameters" in process.stdout.readline()
    process.stdout.close()
    wait_for(5)
    process.send_signal(signal.SIGHUP)      # the terminal goes
    wait_for(20)
    process.send_signal(signal.SIGUSR1)     # a scheduler, to all processes ...
    process.send_signal(signal.SIGINT)      # ... and once more by way of the sweep
    said = process.stderr.read()
    assert process.wait(60) == 0
    assert said in [f"{128 + number} True False\n" for number in (signal.SIGUSR1, signal.SIGINT)]
    log = Path("job/training.log").read_text()
    assert "interrupted at step" in log and "--out job --resume goes on" in log
    assert rows("job") == whole
    [resume] = read("job", "config.json")["resumes"]
    assert 20 <= resume["step"] < 150


def test_without_an_interval_a_short_run_saves_only_its_end(monkeypatch):
    saved = []
    save = train.RunFolder.save

    def note(folder, name, **value):
        saved.append((name, value["step"]))
        save(folder, name, **value)
    monkeypatch.setattr(train.RunFolder, "save", note)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(*args):    # 3 seconds a step, from the tenth on
        clock[0] += 3.0 * (args[4] >= 10) + 1e-3
        return get_batch(*args)
    get_batch = data.get_batch
    monkeypatch.setattr(data, "get_batch", slow)
    run("seldom", "--checkpoint-interval", "0", "--eval-interval", "2")
    assert [step for name, step in saved if name == "last.pt"] == [14, 18, 20]


def test_divergence_ends_a_run_early_and_counts_as_a_result():
    flags = ["--lr", "30", "--max-steps", "200", "--grad-clip", "0", "--eval-interval", "50"]
    code, summary, metrics = run("diverged", *flags)
    end = summary["steps"]
    assert code == 0 and summary["status"] == "diverged" and summary["ended_early"] and end < 200
    assert int(metrics[-1]["step"]) == end and metrics[-1]["val_loss"]
    assert "ended early" in Path("diverged/training.log").read_text()
    forget_the_end("diverged")      # it stays ended
    assert run("diverged", *flags, "--resume")[1]["steps"] == end
    assert rows("diverged") == metrics


def one_sgd_step(pieces, clip):
    """The record of one step of gradient descent at rate 1, and the gradient: minus the weights' change."""
    args, _ = train.parse_args(["--grad-clip", str(clip)])
    torch.manual_seed(1)
    batch = torch.randint(50, (2, 8, 16)).view(2, pieces, -1, 16).transpose(0, 1)
    torch.manual_seed(0)
    model = Transformer(CONFIG, torch.float64).double()
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = build_optimizer(model, "sgd", 1.0, weight_decay=0.0, momentum=0.0)
    record = train.make_step(partial(losses_of, model), model, optimizers, args)(batch)
    gradients = [a - p.detach() for a, p in zip(before, model.parameters())]
    return record, gradients, (model, before, batch)


def test_accumulation_gives_the_same_gradients():
    record, gradients, _ = one_sgd_step(1, 0)
    same_record, same_gradients, _ = one_sgd_step(4, 0)
    torch.testing.assert_close(record, same_record)
    torch.testing.assert_close(gradients, same_gradients)
    assert gradients[1].abs().max() > 0


@pytest.mark.parametrize("clip", [0, 0.01, 100])
def test_clipping_is_that_of_torch(clip):
    record, gradients, (model, before, batch) = one_sgd_step(1, clip)
    with torch.no_grad():
        for p, value in zip(model.parameters(), before):
            p.copy_(value)
    model(*batch[0])[1].backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    assert 0.01 < norm < 100
    torch.testing.assert_close(record["grad_norm"], norm)
    for gradient, p in zip(gradients, model.parameters()):
        torch.testing.assert_close(gradient, p.grad)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_gradient_that_is_not_finite_changes_no_weight(optimizer):
    args, _ = train.parse_args([])
    model = Transformer(CONFIG)
    optimizers = build_optimizer(model, optimizer, 0.1)

    def losses(x, y):
        return model(x, y)[1] * math.inf, {}
    before = [p.detach().clone() for p in model.parameters()]
    batch = torch.randint(50, (1, 2, 4, 16))
    record = train.make_step(losses, model, optimizers, args)(batch)
    assert not record["train_loss"].isfinite() or not record["grad_norm"].isfinite()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_router_columns():
    _, _, metrics = run("moe", "--n-experts", "4", "--optimizer", "muon")
    for layer in range(2):
        shares = [numbers(metrics, f"share_L{layer}_E{e}")[-1] for e in range(4)]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) >= 0
        assert 0 < numbers(metrics, f"router_entropy_L{layer}")[-1] <= math.log(4) + 1e-4
        assert 0.9 < numbers(metrics, f"balance_loss_L{layer}")[-1] < 4


def losses_of(model, x, y):
    return model(x, y)[1:]


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_steps_are_those_of_the_plain_one():
    """With the backend of MPS, which needs no C++ compiler; and nothing is compiled again and again. Muon has AdamW
    beside it, experts all that a dense model has but SwiGLU."""
    args, _ = train.parse_args([])
    batches = torch.randint(50, (12, 1, 2, 4, 16)) // 5
    curves = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model = Transformer(replace(CONFIG, n_layers=1, n_experts=4))
        optimizers = build_optimizer(model, "muon", 0.03)
        losses = partial(losses_of, model)
        if backend:
            losses = torch.compile(losses, backend=backend)
            for optimizer in optimizers:
                optimizer.call = torch.compile(optimizer.call, backend=backend, dynamic=False)
        step = train.make_step(losses, model, optimizers, args)
        curves.append([step(batch) for batch in batches])
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-4)
    assert curves[0][-1]["train_loss"] < curves[0][0]["train_loss"] - 0.1


def test_two_processes_give_the_loss_of_one(monkeypatch):
    """This process is one of them, and the other has a torch of its own; torchrun sets what is set here."""
    flags = "--dtype float32 --optimizer muon --lr 0.02 --n-layers 3".split()   # 3 matrices do not halve
    alone = run("alone", *flags)[2]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    command = [*PROGRAM, *SMALL, "--out", "pair", *flags]
    environment = dict(os.environ, RANK="1", LOCAL_RANK="1", **settings)
    other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        with monkeypatch.context() as patch:
            for name, value in dict(settings, RANK="0").items():
                patch.setenv(name, value)
            pair = run("pair", *flags)[2]
        assert other.communicate(timeout=60)[0] == "" and other.returncode == 0     # it writes and says nothing
    finally:
        other.kill()
    for one, other in zip(alone, pair, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if one[key] or other[key]:
                assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-3), (key, one["step"])
    assert train.main([*SMALL, "--out", "pair", *flags, "--resume"]) == 0   # one process reads it, too


def test_no_folder_is_left_when_there_is_no_data(capsys):
    refused(capsys, "--data", "nowhere.txt", "--out", "new/run")
    assert not Path("new").exists()


def test_existing_runs_are_not_overwritten(capsys):
    run("kept")
    [line] = refused(capsys, "--out", "kept")
    assert "holds a run" in line
    os.mkdir("theirs")
    Path("theirs/thesis.tex").write_text("ten years of work")
    for flags in [], ["--resume"]:
        assert "other files" in refused(capsys, "--out", "theirs", *flags)[0]
    assert os.listdir("theirs") == ["thesis.tex"]
    for status in "converged", "interrupted":
        Path("kept/summary.json").write_text(json.dumps(dict(status=status)))
        [line] = refused(capsys, "--out", "kept", "--lr", "0.5", "--resume")
        assert "lr was" in line


def test_a_run_does_not_go_on_with_another_text(capsys):
    text = Path("text.txt").read_text()
    Path("edited.txt").write_text(text)
    run("edited", "--data", "edited.txt")
    Path("edited.txt").write_text(text + text[:2000])
    assert "another text" in refused(capsys, "--data", "edited.txt", "--out", "edited", "--resume")[-1]


def test_a_training_text_shorter_than_its_context_is_refused_before_anything_is_written(capsys):
    """Equal documents stay together, so that the validation side may be the longer one."""
    os.mkdir("copies")
    for i in range(10):
        Path(f"copies/{i}.txt").write_text("the same words again and again " * 40)
    Path("copies/other.txt").write_text("a larger text, so that it stays out of validation " * 30)
    lines = refused(capsys, "--data", "copies", "--context-length", "1400", "--out", "short", "--prepare")
    assert "use --context-length" in lines[-1] and not Path("short").exists()


def test_more_text_than_a_run_reads_changes_neither_its_compiling_nor_its_resuming(monkeypatch):
    """A sweep of several budgets names the largest to every run, and it may grow."""
    asked = []

    def pick_compile(wanted, device, dtype, config, flops):
        asked.append(flops)
        return None, False
    monkeypatch.setattr(train, "pick_compile", pick_compile)
    whole = run("budget", "--data-tokens", "30000000")[2]
    forget_the_end("budget")
    assert run("budget", "--data-tokens", "60000000", "--resume")[2] == whole
    assert asked[0] == asked[1] == 6 * read("budget", "config.json")["n_params"] * 20 * 8 * 16


BAD = """
--preset huge                      huge
--data nowhere                     nowhere
--schedule sine                    sine
--device mps                       use --device cpu
--device cuda                      use --device cpu
--device tpu9                      tpu9
--lr 0                             lr
--lr -1                            lr
--lr nan                           lr
--lr inf                           lr
--lr fast                          fast
--n-heads 3                        n_heads
--n-experts 2 --top-k 3            top_k
--context-length 100000            context
--data empty.txt                   empty
--data binary.bin                  binary
--out text.txt/run                 text.txt
--batch-size 6 --grad-accum 4      grad-accum
--max-steps 0                      max-steps
--warmup-ratio 2                   warmup
--vocab-size 100                   257
--vocab-size 70000                 65,536
--colour red                       colour
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_input_is_one_line_and_status_2(line, capsys):
    flags, word = re.split("   +", line)
    if "cuda" in flags and torch.cuda.is_available() or "mps" in flags and torch.backends.mps.is_available():
        pytest.skip("it is there")
    Path("empty.txt").write_text("")
    Path("binary.bin").write_bytes(bytes(range(256)) * 20)
    err = refused(capsys, "--out", "bad", *flags.split())
    assert word in err[-1], err
    assert [line for line in err if "train.py:" in line or "Traceback" in line] == err[-1:], err


def test_the_dtype_is_one_that_the_hardware_has(monkeypatch):
    mps = torch.device("mps")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert train.pick_dtype("auto", CPU) == torch.bfloat16
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert train.pick_dtype("auto", CPU) == torch.float32 == train.pick_dtype("auto", mps)
    assert train.pick_dtype("bfloat16", CPU) == torch.bfloat16


def test_what_is_compiled_and_recorded(monkeypatch, capsys):
    """A step is a CUDA graph where nothing in it waits for the host or draws random numbers."""
    dense, moe, dropout = ModelConfig(), ModelConfig(n_experts=4), ModelConfig(dropout=0.1)
    bfloat16 = torch.bfloat16
    mps = torch.device("mps")
    compiled = []

    def compile(function, backend):
        compiled.append(backend)
        return lambda: None
    monkeypatch.setattr(torch, "compile", compile)
    assert train.pick_compile(None, CPU, bfloat16, dense, 1e12) == (None, False)            # a minute of work
    assert train.pick_compile(None, CPU, bfloat16, dense, 1e16) == ("inductor", False)      # a day
    assert train.pick_compile(True, mps, bfloat16, dense, 1e12) == ("aot_eager", False)
    assert train.pick_compile(None, mps, bfloat16, dense, 1e16) == (None, False)
    assert compiled == ["inductor", "aot_eager"]
    for capability in ((9, 0), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert train.pick_compile(None, CUDA, bfloat16, dense, 1e12) == ("inductor", True)
        assert train.pick_compile(None, CUDA, bfloat16, moe, 1e12) == ("inductor", capability == (9, 0))
        assert train.pick_compile(None, CUDA, torch.float32, moe, 1e12) == ("inductor", False)
        assert train.pick_compile(None, CUDA, bfloat16, dropout, 1e12) == ("inductor", False)
        assert train.pick_compile(False, CUDA, bfloat16, dense, 1e12) == (None, False)
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "nowhere")           # there is no compiler, and no Triton
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "inductor")
    for device in (CPU, CUDA):
        if device == CPU or not torch.cuda.is_available():
            assert train.pick_compile(True, device, bfloat16, dense, 1e12) == (None, False)
            assert "without" in capsys.readouterr().err


def test_the_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert train.pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train.pick_device("auto").type == "cuda"
    assert train.pick_device("auto", local_rank=1) == train.pick_device("cuda:1") == torch.device("cuda:1")


def test_one_step_and_one_log_row_are_enough():
    assert run("one", "--max-steps", "1")[1]["steps"] == 1
    assert run("few", "--log-interval", "15")[1]["status"] in ("converged", "slow")


def test_muons_first_guess_follows_the_width():
    def guess(*flags):
        return train.parse_args(flags)[0].lr
    small, large = [guess("--optimizer", "muon", "--d-model", size) for size in ("128", "256")]
    assert small / large == pytest.approx(2 ** 0.5)
    assert guess("--optimizer", "muon", "--lr", "0.5") == 0.5
    assert guess("--preset", "moe") == 0.065


def test_a_resumed_run_goes_on_with_new_columns_and_flags_and_says_what_was_edited(monkeypatch, capsys):
    stop_at(8, monkeypatch, "older")
    path = Path("older/checkpoints/last.pt")
    saved = torch.load(path, weights_only=True)
    del saved["config"]["args"]["rope_base"]        # as if the flag were new ...
    saved["config"]["code"]["model.py"] = "other"   # ... and the model edited
    torch.save(saved, path)
    shutil.copy("older/config.json", "config.json")
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: dict(evaluate(*args), my_metric=1.5))
    assert run("older", "--resume")[0] == 0
    log = Path("older/training.log").read_text()
    assert "since this run began: model.py edited, rope_base new" in log
    [resume] = read("older", "config.json")["resumes"]
    assert resume["changes"] == ["model.py edited", "rope_base new"]
    metrics = rows("older")
    assert numbers(metrics, "my_metric") == [1.5, 1.5, 1.5]
    assert all(len(row) == len(metrics[0]) and None not in row for row in metrics)
    drawn = plot.read_run("older")
    assert len(drawn["train"]["step"]) == 20


def stop_at(step, monkeypatch, out, *flags):
    """A run that is interrupted after that many steps."""
    get_batch = data.get_batch

    def interrupted(*args):
        if args[1] == 8 and args[4] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return get_batch(*args)
    with monkeypatch.context() as patch:
        patch.setattr(data, "get_batch", interrupted)
        assert run(out, *flags)[0] == 130


def test_a_run_that_is_stopped_before_its_first_step_begins_again(monkeypatch):
    whole = run("begun-whole")[2]
    with monkeypatch.context() as patch:
        patch.setattr(train, "watch_signals", lambda: ([(signal.SIGTERM, 0.0)], {}))
        assert train.main([*SMALL, "--out", "begun-early"]) == 128 + signal.SIGTERM
    summary = read("begun-early", "summary.json")
    assert summary["steps"] == 0 and not Path("begun-early/metrics.csv").exists()
    assert summary["status"] == "interrupted" and summary["best_val_loss"] is None
    assert run("begun-early", "--resume")[2] == whole


def test_a_checkpoint_that_cannot_be_read_is_not_a_damaged_one(monkeypatch, capsys):
    stop_at(8, monkeypatch, "locked")
    before = Path("locked/checkpoints/last.pt").read_bytes()

    def read_bytes(path):
        raise PermissionError(13, "Permission denied", str(path))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        assert "Permission denied" in refused(capsys, "--out", "locked", "--resume")[-1]
    assert Path("locked/checkpoints/last.pt").read_bytes() == before
    assert read("locked", "summary.json")["status"] == "interrupted"


def test_a_damaged_checkpoint_beside_a_best_one_is_left_to_the_user(monkeypatch, capsys):
    stop_at(8, monkeypatch, "half")
    path = Path("half/checkpoints/last.pt")
    path.write_bytes(path.read_bytes()[:1000])
    assert "best.pt" in refused(capsys, "--out", "half", "--resume")[-1]
    assert len(path.read_bytes()) == 1000
    path.unlink()       # as the line says: it begins again
    assert run("half", "--resume")[1]["steps"] == 20


def test_another_grad_accum_may_resume_and_another_vocabulary_is_refused_at_once(monkeypatch, capsys):
    stop_at(8, monkeypatch, "pieces")
    folders = set(os.listdir("data"))
    assert "vocab-size" in refused(capsys, "--out", "pieces", "--resume", "--vocab-size", "290")[-1]
    assert set(os.listdir("data")) == folders       # no corpus was prepared for it
    assert run("pieces", "--resume", "--grad-accum", "2")[1]["steps"] == 20


def test_two_runs_without_names_do_not_share_a_folder(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda text: text.replace("%m%d-%H%M%S", "now"))
    flags = [flag for flag in SMALL] + ["--max-steps", "1"]
    train.main(flags)
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    train.main([*flags, "--weight-decay", "0"])
    assert len(os.listdir("runs/single")) == 2


@pytest.mark.parametrize("message", ["[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
                                     "MPS backend out of memory (MPS allocated: 9 GB)"])
def test_out_of_memory_is_one_line(message, monkeypatch, capsys):
    def build(*args):
        raise RuntimeError(message)
    monkeypatch.setattr(train, "build", build)
    [line] = refused(capsys, "--out", f"large{len(message)}")
    assert "lower --batch-size" in line


def test_the_settings_are_printed_for_the_sweep(capsys):
    assert train.main([*SMALL, "--lr", "0.01", "--prepare"]) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert prepared["args"]["lr"] == 0.01 and prepared["devices"] == ["cpu"]
    assert run("as-printed", "--lr", "0.01")[0] == 0
    config = read("as-printed", "config.json")
    assert prepared["data"] == config["data"] and prepared["code"] == config["code"]
    assert {key for key in config["args"] if config["args"][key] != prepared["args"][key]} == {"out", "prepare"}


def test_the_devices_that_a_sweep_may_share_its_runs_out_over(monkeypatch, capsys):
    """As far as it takes no GPU: what is asked for, and what is there."""
    monkeypatch.setattr(train, "devices", lambda: ["cuda:0", "cuda:1", "cpu"])
    monkeypatch.setattr(train, "provenance", lambda device: {})
    monkeypatch.setattr(train, "pick_dtype", lambda name, device: torch.float32)
    for asked, shared in (("auto", ["cuda:0", "cuda:1"]), ("cuda", ["cuda:0", "cuda:1"]), ("cuda:1", ["cuda:1"]),
                          ("cpu", ["cpu"])):
        assert train.main([*SMALL, "--prepare", "--device", asked]) == 0
        assert json.loads(capsys.readouterr().out)["devices"] == shared


def test_several_processes_do_not_share_a_mac(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes" in refused(capsys, "--device", "mps")[-1]


def test_what_is_known_of_a_mac_is_said_in_a_line(capsys):
    """It takes no Mac: only the name of the device counts."""
    mps = torch.device("mps")

    def said(*flags):
        args, config = train.parse_args(["--preset", "dense", *flags])
        train.check_size(args, config, mps, 1)
        return capsys.readouterr().err.splitlines()
    assert said() == []     # 128 x 256 is exactly the limit
    [line] = said("--batch-size", "256")
    assert "65,536" in line and "pytorch#177116" in line and "--grad-accum" in line
    assert said("--batch-size", "256", "--grad-accum", "2") == []
    [line] = said("--dtype", "bfloat16")
    assert "macOS 14" in line


def test_a_text_with_fewer_tokens_than_the_vocabulary_resumes(monkeypatch):
    flags = ["--vocab-size", "60000"]
    stop_at(8, monkeypatch, "few-tokens", *flags)
    config = read("few-tokens", "config.json")
    assert config["data"]["vocab_size"] == config["model"]["vocab_size"] < 60000 == config["args"]["vocab_size"]
    assert run("few-tokens", *flags, "--resume")[1]["steps"] == 20


def test_help_shows_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse_args(["--preset", "moe", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "optimizer steps (default: 100)" in text and "(default: 49152)" in text


def test_a_folder_that_lost_its_rows_gets_them_from_the_checkpoint():
    whole = run("rows")[2]
    Path("rows/metrics.csv").unlink()
    assert run("rows", "--resume")[2] == whole


def test_what_a_killed_first_write_leaves_is_nobodys_file():
    os.makedirs("begun")
    Path("begun/config.json.123.tmp").write_text("{")
    assert run("begun", "--resume")[1]["steps"] == 20


def test_a_checkpoint_that_finds_no_memory_is_not_called_damaged(monkeypatch, capsys):
    stop_at(8, monkeypatch, "crowded")

    def load(*args, **settings):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, "load", load)
    [line] = refused(capsys, "--out", "crowded", "--resume")
    assert "out of memory" in line and "damaged" not in line
