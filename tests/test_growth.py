"""benchmarks/growth.py: what docs/memory.md says of growth is what was measured."""

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import growth  # isort: skip

STORED = json.loads((ROOT / "benchmarks" / "growth.json").read_text(encoding="utf-8"))


def rows_of(axis: str) -> dict[int, dict]:
    """The stored rows of an axis by their value."""
    return {row["value"]: row for row in STORED["rows"] if row["axis"] == axis}


def test_every_axis_was_measured_at_every_value():
    assert {axis: (*rows_of(axis),) for axis in growth.AXES} == growth.AXES


@pytest.mark.parametrize("axis", ["images", "captions"])
def test_memory_is_flat_and_time_linear_in_the_number(axis):
    few, some, many = rows_of(axis).values()
    assert many["peak_mb"] < 1.1 * few["peak_mb"]
    slopes = [(b["cpu_seconds"] - a["cpu_seconds"]) / (b["value"] - a["value"]) for a, b in ((few, some), (some, many))]
    assert slopes[1] < 2 * slopes[0]
    assert many["again_cpu_seconds"] < many["cpu_seconds"]


def test_a_file_of_the_cache_has_the_bytes_that_the_table_of_the_models_is_computed_with():
    config = json.loads((ROOT / "tiny_flux2" / "transformer" / "config.json").read_text())
    caption = growth.TEXT_TOKENS * config["joint_attention_dim"] * 4  # in fp32 on the CPU
    image = 2 * config["in_channels"] * (64 // 16) ** 2 * 4
    for axis, part, bytes_each in (("captions", "prompts", caption), ("images", "latents", image)):
        for value, row in rows_of(axis).items():
            assert row[f"{part}_files"] == value
            assert 0 < row[f"{part}_bytes"] / value - bytes_each < 200  # the header
    assert STORED["disk"] == growth.disk_of_models()
    assert STORED["disk"]["dev"] == {"caption": 512 * 15360 * 2, "image_1024": 2 * 32 * 128 * 128 * 4}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")
def test_a_point_is_measured_by_a_run_of_the_script(capsys):
    row = growth.measure("references", 2)
    assert row["peak_mb"] > 100 and row["cpu_seconds"] > row["step_seconds"] > 0
    assert row["latents_files"] == 8 and row["prompts_files"] == 1  # both references of an image are equal: one file
    stored = rows_of("references")[2]
    assert (row["lora_bytes"], row["latents_bytes"]) == (stored["lora_bytes"], stored["latents_bytes"])
