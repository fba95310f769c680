"""Every file of a run, damaged in every way: --resume ends with the right numbers, or says why not."""
import csv
import os
import shutil
import signal
from pathlib import Path

import pytest

import data
import train

FLAGS = ("--data text.txt --vocab-size 300 --d-model 16 --n-layers 1 --n-heads 2 --d-ff 16 --batch-size 4 "
         "--context-length 8 --max-steps 12 --eval-interval 4 --log-interval 1 --eval-tokens 64 "
         "--checkpoint-interval 4 --device cpu --no-plot --sample 0").split()
READ = ("config.json", "summary.json", "metrics.csv", "checkpoints/last.pt")
WRITTEN = ("training.log", "checkpoints/best.pt")       # never read


def half(content):
    return content[:len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1:]


def nulls(content):
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64:]


DAMAGE = {
    "empty": lambda content: b"",
    "half": half,
    "{}": lambda content: b"{}",
    "[]": lambda content: b"[]",
    "nulls": nulls,
    "flip": flip,
    "rubbish": lambda content: b"\xff\xfe rubbish \x00" + content[20:],
}


@pytest.fixture(scope="module", autouse=True)
def runs(text_folder):
    """A run left alone ("whole"), and one that was interrupted after step 8 ("stopped")."""
    assert train.main([*FLAGS, "--out", "whole"]) == 0
    get_batch = data.get_batch

    def interrupted(*args):
        if args[1] == 4 and args[4] == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return get_batch(*args)
    data.get_batch = interrupted
    assert train.main([*FLAGS, "--out", "stopped"]) == 130
    data.get_batch = get_batch


def numbers(out):
    with open(Path(out, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in row if key not in ("elapsed", "tokens_per_sec")} for row in rows]


CASES = [("stopped", name, damage) for name in READ for damage in DAMAGE]
CASES += [("whole", name, damage) for name in READ for damage in ("empty", "half", "flip")]
CASES += [(state, name, "half") for name in WRITTEN for state in ("stopped", "whole")]


@pytest.mark.parametrize("state, name, damage", CASES)
def test_a_damaged_run(state, name, damage, capsys):
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(state, "run")
    path = Path("run", name)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    capsys.readouterr()
    try:
        assert train.main([*FLAGS, "--out", "run", "--resume"]) == 0
    except SystemExit as e:
        lines = capsys.readouterr().err.splitlines()
        assert e.code == 2 and len(lines) == 1 and "run" in lines[0]
    else:
        assert numbers("run") == numbers("whole")


def test_the_second_owner_of_a_folder_is_told_who_the_first_one_is(capsys):
    owner = data.lock("owned")
    with pytest.raises(SystemExit) as e:
        train.main([*FLAGS, "--out", "owned"])
    assert e.value.code == 2 and str(os.getpid()) in capsys.readouterr().err
    owner.close()
    assert train.main([*FLAGS, "--out", "owned"]) == 0


def test_a_refused_owner_changes_nothing():
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree("stopped", "run")
    with open("run/metrics.csv", "a") as file:
        file.write("what the owner has written since\n")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != ".lock"}
    owner = data.lock("run")
    with pytest.raises(SystemExit):
        train.main([*FLAGS, "--out", "run", "--resume"])
    owner.close()
    assert before == {path: path.read_bytes() for path in before}


def test_nothing_changes_in_a_finished_run():
    before = {path: path.read_bytes() for path in Path("whole").rglob("*") if path.is_file()}
    assert train.main([*FLAGS, "--out", "whole", "--resume"]) == 0
    assert before == {path: path.read_bytes() for path in Path("whole").rglob("*") if path.is_file()}
