"""Every edit that the README suggests is applied to a copy of the files, as it stands there, and trained with."""
import csv
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FILES = ("model", "optim", "schedule", "data", "plot", "train", "sweep")
SMALL = ("--data text.txt --vocab-size 300 --d-model 16 --n-layers 2 --n-heads 2 --d-ff 24 --batch-size 8 "
         "--context-length 16 --max-steps 3 --log-interval 1 --eval-tokens 64 --device cpu --no-plot --sample 0 "
         "--dtype float32 --seed 1").split()
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTER = README.split("## Change something")[1].split("\n## ")[0]
BLOCKS = re.findall(r"\*\*([^*]+?)[:.]?\*\*|```diff\n# (\w+\.py)\n(.*?)```", CHAPTER, re.DOTALL)


def recipes():
    """{title: [(file, diff), ...]} in the order of the README."""
    found = {}
    for title, file, diff in BLOCKS:
        if title:
            found[title] = []
        else:
            list(found.values())[-1].append((file, diff))
    return {title: edits for title, edits in found.items() if edits}


def apply(diff, text):
    """Each part between lines of "..." replaces its old lines, which stand once in the text, with its new ones."""
    for part in re.split(r"(?m)^\.\.\.\n", diff):
        lines = part.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"stands {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    return text


@pytest.fixture
def edited(tmp_path, monkeypatch, text_folder):
    """edited(title) -> the modules of a copy to which that recipe was applied."""
    mine = {name: sys.modules.pop(name, None) for name in FILES}
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", tmp_path)

    def make(title):
        for file, diff in recipes()[title]:
            path = tmp_path / file
            path.write_text(apply(diff, path.read_text(encoding="utf-8")), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        for name in FILES:      # the unedited ones may have come back
            sys.modules.pop(name, None)
        return SimpleNamespace(**{name: importlib.import_module(name) for name in FILES})
    yield make
    for name in FILES:
        sys.modules.pop(name, None)
        if mine[name]:
            sys.modules[name] = mine[name]


def train_with(modules, out, *flags):
    """Three steps: the rows of metrics.csv. The count that is printed and recorded is that of the weights."""
    shutil.rmtree(out, ignore_errors=True)
    assert modules.train.main([*SMALL, "--out", out, *flags]) == 0
    weights = torch.load(Path(out, "checkpoints/last.pt"), weights_only=True)["model"]
    n_params = sum(weight.numel() for weight in weights.values())
    assert json.loads(Path(out, "config.json").read_text())["n_params"] == n_params
    assert f"{n_params:,} parameters" in Path(out, "training.log").read_text()
    with open(Path(out, "metrics.csv"), newline="") as file:
        return [row for row in csv.DictReader(file) if row["train_loss"]], n_params


def losses(rows):
    return [float(row["train_loss"]) for row in rows]


def test_the_readme_has_these_recipes():
    assert list(recipes()) == ["A layer", "QK-norm", "Learned positions", "An optimizer", "A schedule", "A metric",
                               "A flag of the model", "A preset"]
    files = [len(edits) for edits in recipes().values()]
    assert files == [1, 1, 1, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("title, more", [("A layer", -2 * 24 * 16), ("QK-norm", 0),
                                         ("Learned positions", 16 * 16)])
def test_a_changed_model(title, more, edited):
    import train
    before, n_before = train_with(SimpleNamespace(train=train), "before")
    rows, n_params = train_with(edited(title), "after")
    assert n_params == n_before + more
    assert losses(rows) != losses(before)
    assert losses(rows)[-1] < losses(rows)[0]


def test_learned_positions_go_to_adamw(edited):
    modules = edited("Learned positions")
    model = modules.model.Transformer(modules.model.ModelConfig())
    for optimizer in modules.optim.build_optimizer(model, "muon", 0.02):
        if any(p is model.positions for p in optimizer.params):
            assert optimizer.update is modules.optim.adamw_update and optimizer.settings["weight_decay"] == 0


def test_an_optimizer_is_the_one_that_runs(edited):
    modules = edited("An optimizer")
    model = modules.model.Transformer(modules.model.ModelConfig())
    for optimizer in modules.optim.build_optimizer(model, "lion", 0.1):
        assert optimizer.update is modules.optim.lion_update
    lion, _ = train_with(modules, "lion", "--optimizer", "lion", "--lr", "1e-3")
    adamw, _ = train_with(modules, "adamw", "--lr", "1e-3")
    assert losses(lion)[0] == losses(adamw)[0] and losses(lion)[2] != losses(adamw)[2]
    # One step by hand: each weight moves by the learning rate.
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = modules.optim.Lion([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.tensor([2.0, -0.1, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, 1.1, 1.0]))


def test_a_schedule(edited):
    rows, _ = train_with(edited("A schedule"), "sqrt", "--schedule", "sqrt", "--warmup-ratio", "0", "--lr", "1")
    expected = [1, 0.1 + 0.9 * (1 - 0.5 ** 0.5), 0.1]
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected)


def test_a_metric_is_written_and_drawn(edited):
    modules = edited("A metric")
    rows, _ = train_with(modules, "metric")
    ratios = [float(row["update_ratio"]) for row in rows]
    assert all(0 < ratio < 1 for ratio in ratios)
    before = len(figure_of(modules.plot, "metric", without="update_ratio").axes)
    assert len(figure_of(modules.plot, "metric").axes) == before + 1
    assert [path.name for path in modules.plot.draw_run("metric")] == ["loss_curves.png", "lr_schedule.png"]


def figure_of(plot, dir, without=None):
    """The curves of a run, as loss_curves.png has them."""
    run = dict(plot.read_run(dir), setting="")
    if without:
        del run["metrics"][without]
    pictures = {"loss_curves.png": plot.RUN["loss_curves.png"]}
    return plot.draw_curves(pictures, [run], "curves")["loss_curves.png"]


def test_a_flag_of_the_model_can_be_swept(edited, capsys):
    modules = edited("A flag of the model")
    small, _ = train_with(modules, "small", "--init-std", "0.001")
    large, _ = train_with(modules, "large", "--init-std", "0.5")
    assert abs(losses(small)[0] - 5.7) < 0.01 < losses(large)[0] - losses(small)[0]
    flags = " ".join(SMALL).replace("--no-plot", "").replace("--seed 1", "").split()
    flags += ["--vary", "init-std=0.01", "--lrs", "1e-3", "--no-widen", "--dry-run"]
    assert modules.sweep.main(flags) == 0
    assert "--init-std=0.01" in capsys.readouterr().out


def test_a_preset(edited, capsys):
    assert edited("A preset").train.main(["--preset", "wide", "--prepare", "--data", "text.txt"]) == 0
    args = json.loads(capsys.readouterr().out)["args"]
    assert args["d_model"] == 128 and args["lr"] == 0.005
