"""Input that nobody should give: each line of a table is refused in one line with status 2."""
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import plot
import sweep
import train

ROOT = Path(train.__file__).parent
HUGE = "1" + 30 * "0"
TINY = ("--data text.txt --vocab-size 300 --d-model 16 --n-layers 1 --n-heads 2 --d-ff 16 --context-length 8 "
        "--batch-size 2 --max-steps 2 --eval-tokens 16 --device cpu --no-plot --sample 0 --out run").split()


@pytest.fixture(scope="module", autouse=True)
def files(text_folder):
    Path("empty.txt").write_text("")
    Path("binary.bin").write_bytes(bytes(range(256)) * 20)
    Path("latin.txt").write_bytes("Übermut tut selten gut. ".encode("latin-1") * 99)
    Path("loop").symlink_to("loop")
    os.mkdir("nothing")
    if hasattr(os, "mkfifo"):
        os.mkfifo("fifo")


def refused(main, argv, line, capsys):
    """argv and the flags in a line of a table: one line on stderr with its last word, status 2, no folder."""
    line = line.replace("HUGE", HUGE).replace("X300", 300 * "x")
    *flags, word = shlex.split(line)
    capsys.readouterr()
    shutil.rmtree("run", ignore_errors=True)
    shutil.rmtree("runs", ignore_errors=True)
    with pytest.raises(SystemExit) as e:
        raise SystemExit(main([*argv, *flags]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(lines) == 1 and word in lines[0] and len(lines[0]) < 500, lines
    assert not Path("run").exists() and not Path("runs").exists()


TRAIN = """
--batch-size 1000000000            GiB
--d-model 10000000                 GiB
--n-experts 100000000              GiB
--d-ff 1000000000                  GiB
--context-length 1000000000        GiB
--batch-size HUGE                  batch-size
--max-steps HUGE                   max-steps
--seed HUGE                        seed
--seed -1                          seed
--eval-tokens HUGE                 eval-tokens
--n-layers 0                       n-layers
--n-layers -3                      n-layers
--n-layers 1.5                     n-layers
--n-layers ''                      n-layers
--lr 1e300                         lr
--lr -inf                          lr
--lr ''                            lr
--grad-clip nan                    grad-clip
--grad-clip 1e300                  grad-clip
--weight-decay -1                  weight-decay
--beta1 1                          beta1
--beta2 nan                        beta2
--momentum -0.1                    momentum
--warmup-ratio nan                 warmup-ratio
--min-lr-ratio 1.1                 min-lr-ratio
--vocab-size 0                     vocab-size
--vocab-size 256                   257
--vocab-size HUGE                  vocab-size
--device cpu:99                    cpu:99
--device ''                        device
--device cuda:x                    cuda:x
--data ''                          corpus
--data loop                        loop
--data nothing                     nothing
--data fifo                        fifo
--data latin.txt                   latin.txt
--data binary.bin                  binary.bin
--data empty.txt                   empty.txt
--data /dev/null                   /dev/null
--data /proc/self/mem              /proc/self/mem
--data X300                        xxx
--out ''                           --out
--out /proc/run                    /proc
--out loop/run                     loop
--out X300                         xxx
--out text.txt                     text.txt
--out text.txt/run                 text.txt
--preset ''                        preset
--schedule Cosine                  Cosine
--lr=1e-3 more                     more
--context-length 100000            context-length
--top-k 0                          top-k
--d-model 17                       d_model
--dropout 1.5                      dropout
"""


@pytest.mark.parametrize("line", TRAIN.strip().splitlines())
def test_train(line, capsys):
    refused(train.main, TINY, line, capsys)


DATA = """
--tokens nan                       --tokens
--tokens many                      --tokens
--vocab-size 0                     257
--vocab-size HUGE                  vocabulary
nowhere                            nowhere
fifo                               fifo
latin.txt                          latin.txt
binary.bin                         binary.bin
text.txt --cache /proc/data        /proc
text.txt more                      more
text.txt --cache text.txt          text.txt
"""


@pytest.mark.parametrize("line", DATA.strip().splitlines())
def test_data(line, capsys, monkeypatch):
    def main(argv):
        monkeypatch.setattr(sys, "argv", ["data.py", *argv])
        data.main()
    refused(main, [], line, capsys)


SWEEP = """
--seeds HUGE                       seeds
--lrs 1e300                        --lrs
--lrs ''                           lrs
--jobs -1                          jobs
--max-runs nan                     max-runs
--vary =                           --vary
--vary data-tokens=1,2             --vary
--report nowhere                   nowhere
--refine half                      refine
"""


@pytest.mark.parametrize("line", SWEEP.strip().splitlines())
def test_sweep(line, capsys):
    refused(sweep.main, [], line, capsys)


def start(program, *flags, **settings):
    return subprocess.run([sys.executable, ROOT / program, *flags], text=True, timeout=100, **settings)


def test_a_closed_or_full_stdout(monkeypatch, capfd):
    """The files are what counts."""
    monkeypatch.setattr(sys, "stdout", None)        # what Python makes of `>&-`
    assert train.main([*TINY, "--out", "closed"]) == 0
    if os.path.exists("/dev/full"):
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
        assert train.main([*TINY, "--out", "full"]) == 0
        sys.stdout.close()      # nothing is left in it that could not be written
    assert capfd.readouterr().err == ""
    assert plot.read_run("closed")["summary"]["steps"] == 2


def test_a_locale_without_unicode():
    Path("naïve ✓.txt").write_text(Path("text.txt").read_text() + " ✓" * 99)
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = [*TINY, "--data", "naïve ✓.txt", "--out", "unicode", "--sample", "9"]
    done = start("train.py", *flags, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_seeds_up_to_the_largest_with_dropout():
    flags = [*TINY, "--out", "seeds", "--seed", str(2**63 - 1), "--dropout", "0.1"]
    assert train.main(flags) == 0


def test_a_command_that_would_take_two_lines_is_refused(monkeypatch, capsys):
    os.makedirs("two\nlines", exist_ok=True)
    Path("two\nlines/text.txt").write_text(Path("text.txt").read_text())

    def ask_train(plan):        # which would take three seconds, and does not matter here
        plan.settings = {setting: dict(args={}, data={}, code={}) for setting in plan.settings}
    monkeypatch.setattr(sweep, "ask_train", ask_train)
    with pytest.raises(SystemExit) as e:
        sweep.main(["--dry-run", "--data", "two\nlines", "--lrs", "1e-3", "--no-widen"])
    assert e.value.code == 2 and "line break" in capsys.readouterr().err
