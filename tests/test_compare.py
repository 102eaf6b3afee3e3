"""benchmarks/compare.py: two scripts are run in turn, and what the table says is what their runs took."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # isort: skip
import results  # isort: skip


def make_rows(ours: float) -> list[dict]:
    """Two rounds of one model whose first one was three times as slow for both scripts."""
    return [
        {"model": "tiny", "script": script, "round": turn, "start": 1, **dict.fromkeys(compare.FIGURES, slow * value)}
        for turn, slow in ((1, 1.0), (0, 3.0))
        for script, value in (("other", 2.0), ("ours", ours))
    ]


def test_a_ratio_is_that_of_runs_of_the_same_round():
    rows = compare.summary(make_rows(ours=1.0))
    figures = [tuple(row[key] for key in ("other", "ours", "ratio", "best_ratio")) for row in rows]
    assert figures == [(4.0, 2.0, 0.5, 0.5)] * len(compare.FIGURES)
    shown = compare.table(rows, Path("some/other.py")).splitlines()
    assert "other.py | ours | ours / other" in shown[0] and shown[2].endswith("| 4 s | 2 s | 0.50 | 0.50 |")


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_one_step_is_no_measure(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit('no such flag')")
    with pytest.raises(RuntimeError, match="no such flag"):
        compare.start(script, [], tmp_path / "seen.json")
    script.write_text(
        "import torch; o = torch.optim.SGD([torch.ones(1, requires_grad=True)]); [o.step() for _ in range(STEPS)]"
    )
    counted = script.read_text()
    script.write_text(counted.replace("STEPS", "1"))
    with pytest.raises(RuntimeError, match="after 1 steps"):
        compare.start(script, [], tmp_path / "seen.json")
    script.write_text(counted.replace("STEPS", "3"))
    found = compare.start(script, [], tmp_path / "seen.json")
    assert 0 < found["step_seconds"] < found["first_step_seconds"] < found["wall_seconds"] and found["peak_gb"] > 0.05


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")
def test_our_script_against_a_copy_of_itself_is_as_good_as_equal(tmp_path, monkeypatch, capsys):
    copy = shutil.copy(ROOT / "train_dreambooth_lora_flux2.py", tmp_path / "other.py")
    monkeypatch.setattr(results, "HERE", tmp_path)
    compare.main(["--against", str(copy), "--rounds", "1", "--steps", "3", "--models", "tiny", "--", "--rank", "4"])
    assert "| tiny, second start | peak memory |" in capsys.readouterr().out
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert stored["against"] == "other.py" and stored["versions"]["torch"] and len(stored["runs"]) == 4
    ratios = {(row["start"], row["figure"]): row["ratio"] for row in stored["medians"]}
    assert len(ratios) == 8
    for (_, figure), ratio in ratios.items():  # a busy machine has cost a factor of two; memory does not mind
        slack = 1.05 if figure == "peak_gb" else 5
        assert 1 / slack < ratio < slack, ratios
