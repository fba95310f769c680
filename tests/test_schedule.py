"""Schedules against values computed by hand: first step, end of warm-up, middle and last step."""
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from schedule import SCHEDULES, SHAPES, Plateau, first_guess, make_schedule

ROOT = Path(__file__).resolve().parent.parent

# Warm-up is 20% of the steps, 0 to 20; then progress = (step - 21) / 83.
HAND = {  # name: {step: factor}, max_steps 105, warmup_ratio 0.2, min_lr_ratio 0.1
    "constant": {0: 1 / 21, 9: 10 / 21, 20: 1, 21: 1, 62: 1, 104: 1},
    "linear": {21: 1, 63: 1 - 0.9 * 42 / 83, 104: 0.1},
    "cosine": {
        21: 1,
        63: 0.1 + 0.45 * (1 + math.cos(math.pi * 42 / 83)),
        104: 0.1},
    "restarts": {
        21: 1,
        48: 0.1 + 0.45 * (1 + math.cos(math.pi * 27 * 3 / 83)),
        104: 0.1},
    "wsd": {21: 1, 60: 1, 87: 1, 100: 1 - 0.9 * (79 / 83 - 0.8) / 0.2, 104: 0.1},
    "triangular": {21: 1, 104: 0.1},
    "stages": {21: 1, 70: 1, 71: 0.46, 91: 0.46, 92: 0.15, 104: 0.15},
    "exponential": {0: 1e-4, 52: 1e-2, 104: 1},
    "plateau": {0: 1 / 21, 20: 1, 21: 1, 104: 1},
}


@pytest.mark.parametrize("name", HAND)
def test_hand_computed_values(name):
    f = make_schedule(name, 105, 0.2, 0.1)
    for step, factor in HAND[name].items():
        assert f(step) == pytest.approx(factor, abs=1e-12), step


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("max_steps", [1, 2, 7, 200])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_factors_stay_in_range_and_the_first_is_not_zero(name, max_steps, warmup):
    f = make_schedule(name, max_steps, warmup, 0.1)
    factors = [f(t) for t in range(max_steps)]
    assert all(0 < x <= 1 + 1e-12 for x in factors)
    if name != "exponential":
        w = round(warmup * max_steps)
        assert factors[:w] == pytest.approx([(t + 1) / w for t in range(w)])
        assert factors[max(0, w - 1)] == pytest.approx(1)
    if name in ("linear", "cosine", "restarts", "wsd", "triangular") and max_steps > 2 and warmup < 1:
        assert factors[-1] == pytest.approx(0.1)  # it anneals to its end, not to a quarter of the way


def test_cycles():
    restarts = np.diff([make_schedule("restarts", 301, 0.0, 0.0)(step) for step in range(301)])
    assert list(np.flatnonzero(restarts > 0)) == [99, 199]
    slopes = np.diff([make_schedule("triangular", 301, 0.0, 0.0)(step) for step in range(301)])
    assert list(np.flatnonzero(slopes[1:] * slopes[:-1] < 0) + 1) == [60, 120, 180, 240]


def test_plateau_halves_after_five_evaluations_without_one_percent():
    p = Plateau(warmup_steps=0, floor=0.2)
    p.observe(2.0)
    for loss in (1.99, 1.985, 2.5, 1.981):  # none is 1% below 2.0
        p.observe(loss)
        assert p(10) == 1
    p.observe(1.9805)
    assert p(10) == 0.5
    p.observe(1.97)  # 1.5% below 2.0: the wait starts again
    for _ in range(4):
        p.observe(1.97)
    assert p(10) == 0.5
    p.observe(1.97)
    assert p(10) == 0.25
    for _ in range(10):
        p.observe(1.97)
    assert p(10) == 0.2  # the floor
    other = Plateau(0, 0.2)
    other.state = dict(p.state)
    assert other(10) == 0.2
    assert Plateau(4, 0.2)(0) == 0.25


def test_a_new_schedule_is_one_function_and_one_entry(monkeypatch):
    monkeypatch.setitem(SHAPES, "sqrt", lambda progress, floor: 1 - (1 - floor) * math.sqrt(progress))
    f = make_schedule("sqrt", 11, 0.0, 0.2)
    assert [f(0), f(10)] == pytest.approx([1, 0.2])
    assert f(5) == pytest.approx(1 - 0.8 * math.sqrt(0.5))


def test_the_picture_shows_them_all(tmp_path, monkeypatch, capsys):
    path = tmp_path / "all.png"
    monkeypatch.setattr("sys.argv", ["schedule.py", str(path)])
    runpy.run_path(ROOT / "schedule.py", run_name="__main__")
    assert "plateau" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_first_guess():
    assert first_guess("muon", 1024) == pytest.approx(0.02)
    assert first_guess("adamw", 512) == pytest.approx(0.0009765625)
    assert first_guess("muon", 256) == pytest.approx(2 * first_guess("muon", 1024))
    assert first_guess("lion", 512) == first_guess("adamw", 512)    # a learner's optimizer
