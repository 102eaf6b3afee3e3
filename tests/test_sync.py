"""The two scripts stay in step: tools/sync_regions.py finds every way in which they could drift apart, and copies."""

import pytest
from conftest import ROOT
from helpers import IMAGE_TO_IMAGE, TEXT_TO_IMAGE, read_script

import sync_regions  # isort: skip  (from tools/, which conftest puts on the path)

SCRIPTS = (TEXT_TO_IMAGE, IMAGE_TO_IMAGE)


@pytest.fixture
def copies(tmp_path):
    """A folder with both scripts, to be changed."""
    for script in SCRIPTS:
        (tmp_path / script).write_text(read_script(script), encoding="utf-8")
    return tmp_path


def change(folder, script: str, old: str, new: str) -> None:
    """Replaces the one occurrence of `old` in a copy."""
    text = (folder / script).read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    (folder / script).write_text(text.replace(old, new), encoding="utf-8")


def test_the_scripts_are_in_step_and_share_three_quarters(capsys):
    assert sync_regions.main([]) == 0
    assert capsys.readouterr().out.startswith("in step: ")
    assert sync_regions.shared_share([read_script(script) for script in SCRIPTS]) >= 0.75


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_changed_character_in_a_region_is_a_diff_and_exit_1(copies, capsys, script):
    change(copies, script, "return shift * sigmas / (1 + (shift - 1) * sigmas)", "return shift * sigmas")
    assert sync_regions.main([], copies) == 1
    printed = capsys.readouterr().out
    assert "models" in printed and "shift * sigmas / (1" in printed and printed.count("\n-") >= 1


@pytest.mark.parametrize(("script", "other"), [SCRIPTS, SCRIPTS[::-1]])
def test_take_copies_the_regions_of_the_named_script_and_nothing_else(copies, script, other):
    before = (copies / other).read_text(encoding="utf-8")
    change(copies, script, "MAX_PIXELS = 100_000_000", "MAX_PIXELS = 200_000_000")
    assert sync_regions.main(["--take", script], copies) == 0
    assert (copies / other).read_text(encoding="utf-8") == before.replace(
        "MAX_PIXELS = 100_000_000", "MAX_PIXELS = 200_000_000"
    )


def test_taking_in_either_direction_changes_nothing_when_both_are_in_step(copies):
    for script in SCRIPTS:
        sync_regions.main(["--take", script], copies)
    assert [(copies / script).read_text(encoding="utf-8") for script in SCRIPTS] == list(map(read_script, SCRIPTS))


def test_a_missing_region_is_an_error_and_nothing_is_copied(copies):
    change(copies, IMAGE_TO_IMAGE, "# region shared: step\n", "")
    change(copies, IMAGE_TO_IMAGE, "# endregion shared: step\n", "")
    assert sync_regions.main([], copies) == 1
    with pytest.raises(ValueError, match="differ in name or order"):
        sync_regions.main(["--take", TEXT_TO_IMAGE], copies)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# endregion shared: step\n", "", "step is not closed"),
        ("# region shared: models\n", "# region shared: data\n", "not closed|a second time"),
    ],
)
def test_a_region_that_is_not_closed_or_comes_twice_is_an_error(copies, old, new, message):
    change(copies, TEXT_TO_IMAGE, old, new)
    with pytest.raises(ValueError, match=message):
        sync_regions.main([], copies)


def test_scripts_that_drop_their_markers_fail_the_share(capsys, copies):
    for script in SCRIPTS:
        text = (copies / script).read_text(encoding="utf-8")
        text = text.replace("# region shared: run\n", "").replace("# endregion shared: run\n", "")
        (copies / script).write_text(text, encoding="utf-8")
    assert sync_regions.main([], copies) == 1
    assert "of the longer script is shared; at least 75%" in capsys.readouterr().out


def test_a_name_in_both_scripts_needs_a_region_or_a_reason(copies, capsys):
    for script in SCRIPTS:
        with (copies / script).open("a", encoding="utf-8") as stream:
            stream.write("\n\ndef both() -> None:\n    pass\n")
    assert sync_regions.main([], copies) == 1
    assert capsys.readouterr().out.count("both is in both scripts") == 2
    for script in SCRIPTS:
        change(copies, script, "\ndef both()", "\n# differs: for this test\ndef both()")
    assert sync_regions.main([], copies) == 0


def test_a_name_that_only_one_script_has_needs_no_reason(copies):
    with (copies / IMAGE_TO_IMAGE).open("a", encoding="utf-8") as stream:
        stream.write("\n\ndef only_here() -> None:\n    pass\n")
    assert sync_regions.main([], copies) == 0


def test_each_script_says_differs_only_where_the_other_has_the_name_too():
    """A reason that outlived its twin would mislead."""
    tables = [sync_regions.top_level_names(read_script(script)) for script in SCRIPTS]
    for script, names, other in zip(SCRIPTS, tables, tables[::-1], strict=True):
        lines = read_script(script).splitlines()
        reasons = [number for number, line in enumerate(lines) if line.startswith("# differs: ")]
        explained = {name for name, first in names.items() if first - 2 in reasons}
        assert len(explained) == len(reasons), script
        assert explained <= other.keys(), explained - other.keys()


def test_make_check_compares_the_scripts():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ncheck:")[2].partition("\n\n")[0]
    assert "$(BIN)/python tools/sync_regions.py\n" in recipe
