"""The golden matrix: some of its cases against stored curves, and that it sees what it is there to see.

After a change that is meant to move the stored curves:
python tests/golden_matrix.py --out tests/golden/matrix.json --stored
"""

import json

import pytest
from conftest import ROOT, SCRIPTS
from golden_matrix import CURVES, STORED, compare, run_matrix

pytestmark = pytest.mark.e2e

# A script whose command line is this checkout's with flags added: a change that any edition of the scripts can have.
CHANGED = """
import importlib, sys
sys.path.insert(0, {root!r})
script = importlib.import_module({name!r})
main = script.main
def parse_args(words):
    return script.parse_args([*words, *{flags!r}])
"""


def test_cases_that_no_other_stored_run_has_follow_their_stored_curves(tmp_path):
    """Losses and gradient norms agree with the file to 1e-4: other processors round otherwise."""
    stored = json.loads((ROOT / "tests" / "golden" / "matrix.json").read_text())
    assert stored["cases"].keys() == {*STORED}
    now = run_matrix(ROOT, STORED, tmp_path)
    for name, case in stored["cases"].items():
        for key in CURVES:
            expected, curve = ([float.fromhex(x) for x in side[key]] for side in (case, now["cases"][name]))
            assert curve == pytest.approx(expected, rel=1e-4), f"{name}: {key}; stored with {stored['versions']}"


def test_the_same_scripts_agree_and_a_planted_change_is_named_with_its_first_step(tmp_path, capsys):
    """A script with another shift differs from step 1 on; one that lacks a flag of the case is said to."""
    cases = ["t2i/plain", "i2i/plain"]
    before, again = (run_matrix(ROOT, cases[:count], tmp_path / "work")["cases"] for count in (2, 1))
    assert compare(again, before) == []
    assert "1 of 1 cases are the same to the bit" in capsys.readouterr().out
    for script, flags in {"t2i": ["--timestep_shift", "none"], "i2i": ["--no_such_flag"]}.items():
        text = CHANGED.format(root=str(ROOT), name=SCRIPTS[script], flags=flags)
        (tmp_path / f"{SCRIPTS[script]}.py").write_text(text)
    changed = run_matrix(tmp_path, cases, tmp_path / "work")["cases"]
    capsys.readouterr()
    assert compare(changed, before) == cases
    lines = capsys.readouterr().out.splitlines()
    assert "DIFFERS: loss from step 1: 0x" in lines[0]
    assert "--scripts CANNOT RUN: exit code 2: " in lines[1] and "--no_such_flag" in lines[1]


def test_a_difference_in_the_lora_alone_or_in_its_header_alone_is_told_apart(capsys):
    """Same curves: other values, other names, other pixels are differences; another header is said, and is none."""
    case = {"loss": ["0x1p+0"], "grad_norm": ["0x1p+0"], "layout": "a", "lora": "b", "header": "c", "images": ["d"]}
    changes = {"header": "same, with another header", "lora": "DIFFERS: values of the LoRA",
               "layout": "DIFFERS: names, dtypes or shapes", "images": "DIFFERS: drawn images",
               "grad_norm": "DIFFERS: grad_norm"}  # fmt: skip
    for key, verdict in changes.items():
        other = {**case, key: ["0x1.8p+0"] if key == "grad_norm" else "x"}
        assert bool(compare({"one": other}, {"one": case})) == (key != "header")
        assert verdict in capsys.readouterr().out
