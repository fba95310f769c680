"""What lies in results/ can be judged again without training: by one command, from the curves alone."""
import json
import shutil
from pathlib import Path

import pytest

import sweep

STUDIES = Path(__file__).resolve().parent.parent / "results/studies"


@pytest.mark.parametrize("study", ["tiny-edge-rates", "dense-batch-edge"])
def test_a_studys_table_is_made_again_from_its_curves(study, tmp_path, capsys):
    shutil.copy(STUDIES / study / "curves.csv", tmp_path)
    assert sweep.main(["--report", str(tmp_path)]) == 0
    before = json.loads((STUDIES / study / "insights.json").read_text())
    after = json.loads((tmp_path / "insights.json").read_text())
    assert after["use"]["lr"] == before["use"]["lr"] and len(after["settings"]) == len(before["settings"])
    rows = [[row for s in insights["settings"] for row in s["rates"]] for insights in (before, after)]
    for then, now in zip(*rows, strict=True):
        assert then["lr"] == now["lr"] and then["seeds"] == now["seeds"]
        assert then["verdict"] == now["verdict"] and then["status"] == now["status"]
        if then["val_loss"] is not None:
            assert now["val_loss"] == pytest.approx(then["val_loss"], abs=1e-3)
    assert "Use" in capsys.readouterr().out
    assert (tmp_path / "lr_vs_final_loss.png").exists()


def test_results_stay_small():
    size = sum(path.stat().st_size for path in STUDIES.parent.rglob("*") if path.is_file())
    assert size < 6e6
