"""A run that was killed by SIGKILL in the middle of a step and resumed is one that was never killed, whatever it uses.

Here ten combinations of settings for each script, in which every pair of choices occurs; every triple in the soak.
"""

import contextlib
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from children import killed_at
from combinations import all_tuples, covered, covering_rows
from conftest import draw_photos
from helpers import ROOT
from runs import LORA, assert_same_run, column, metrics, sha256
from test_launch import environment, flags
from test_processes import on_cpu

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]

OFF: tuple[str, ...] = ()
# The choices of each factor; DATA, CLASS are folders of the test.
FACTORS = {
    "captions": (OFF, ("--instance_data_dir", "CAPTIONED")),
    "caption_dropout": (OFF, ("--caption_dropout", "0.4")),
    "own": (OFF, "own"),  # prior preservation, or dropout of references
    "buckets": (OFF, ("--aspect_ratio_buckets", "64,96;96,64;64,64")),
    "accumulation": (OFF, ("--gradient_accumulation_steps", "2")),
    "flip": (OFF, ("--random_flip",)),
    "lora_dropout": (OFF, ("--lora_dropout", "0.3")),
    "schedule": (OFF, ("--lr_scheduler", "cosine", "--lr_warmup_steps", "3")),
    "latents": (OFF, ("--cache_latents",)),
    "validation": (OFF, ("--validation_prompt", "a toy", "--validation_steps", "2")),
    "fp8": (OFF, ("--do_fp8_training",)),
    # what a checkpoint of the middle of an epoch is followed by, and one of its end (five images)
    "cut": (("--checkpointing_steps", "2"), ("--checkpointing_steps", "5")),
    "optimizer": (OFF, ("--optimizer", "prodigy"), ("--use_8bit_adam", "--rank", "32")),
}
LEVELS = {name: len(choices) for name, choices in FACTORS.items()}
PAIRS = covering_rows(LEVELS, 2, seed=1, tries=40)
TRIPLES = covering_rows(LEVELS, 3, seed=0, tries=10)


def name_of(row: dict[str, int]) -> str:
    """The factors of a row that are not at their first choice."""
    return "-".join(name if LEVELS[name] == 2 else f"{name}{level}" for name, level in row.items() if level) or "plain"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The cache, and the folders of data that stand in FACTORS."""
    root = tmp_path_factory.mktemp("resume")
    captioned = draw_photos(root / "captioned")
    for number, image in enumerate(sorted(captioned.glob("*.jpg"))):
        image.with_suffix(".txt").write_text(f"[trigger] number {number}")
    draw_photos(root / "class", 2, seed=60)
    return {"CACHE": root / "cache", "CAPTIONED": captioned, "CLASS": root / "class"}


@pytest.fixture
def check_row(script, train, reference_flags, places, tmp_path):
    """`check_row(row)` trains quietly, then with a SIGKILL in step 4 or 6 and a resume, and compares bit by bit."""
    prior = ("--with_prior_preservation", "--class_data_dir", "CLASS", "--class_prompt", "a toy")
    own = {"text-to-image": (*prior, "--num_class_images", "2"), "image-to-image": ("--cond_dropout", "0.4")}

    def check(row: dict[str, int]) -> None:
        chosen = [FACTORS[name][level] for name, level in row.items()]
        words = [word for choice in chosen for word in (own[script.TASK] if choice == "own" else choice)]
        words = [places.get(word, word) for word in words]
        words += reference_flags if row["captions"] else ()
        words += ["--latents_cache_dir", places["CACHE"], "--max_train_steps", "7", "--num_validation_images", "1"]
        words += ["--num_inference_steps", "1", "--skip_final_inference"]
        whole, (step, kept) = train(*words, output="whole"), ((6, 5) if row["cut"] else (4, 2))
        log, again = tmp_path / "log", tmp_path / "killed"
        killed_at(script, step, train, *words, output="killed", log=log)
        assert [path.name for path in script.list_checkpoints(again)] == [f"checkpoint-{kept}"], log.read_text()
        assert not (again / LORA).exists() and len(column(again, "step")) == step - 1
        train(*words, "--resume_from_checkpoint", "latest", output="killed")
        assert_same_run(whole, again)
        for key in ("lr", "validation_loss"):
            first, second = ([line.get(key) for line in metrics(folder)] for folder in (whole, again))
            assert first == second
        assert sha256(whole / LORA) == sha256(again / LORA)

    return check


def test_ten_rows_hold_every_pair_of_choices():
    """Thirteen factors, one of them with three levels."""
    assert len(PAIRS) == 10
    assert set().union(*(covered(row, 2) for row in PAIRS)) == all_tuples(LEVELS, 2)
    assert set().union(*(covered(row, 3) for row in TRIPLES)) == all_tuples(LEVELS, 3)


@pytest.mark.parametrize("row", PAIRS, ids=name_of)
def test_a_run_that_was_killed_and_resumed_is_one_that_was_never_killed(check_row, row):
    """Losses and gradient norms of every step by `float.hex()`, the final LoRA byte by byte."""
    check_row(row)


@pytest.mark.soak
@pytest.mark.parametrize("row", TRIPLES, ids=name_of)
def test_soak_a_run_that_was_killed_and_resumed_is_one_that_was_never_killed(check_row, soak, row):
    """The same for every triple of choices."""
    check_row(row)
    soak("resume after SIGKILL, combinations", equal=1)


@pytest.mark.soak
@pytest.mark.launch
def test_soak_two_processes_that_were_killed_and_resumed_are_two_that_were_never_killed(
    script, soak, reference_flags, places, tmp_path
):
    """Launcher and trainers get SIGKILL at some instant; mid-epoch, with all that is drawn at random."""
    words = [*reference_flags, "--max_train_steps", 60, "--checkpointing_steps", 4, "--dataloader_num_workers", 1]
    words += ["--lora_dropout", "0.2", "--caption_dropout", "0.3", "--random_flip", "--use_aspect_ratio_buckets"]

    def start(folder: Path, *later: str) -> subprocess.Popen:
        config = on_cpu(tmp_path / f"config-{time.monotonic_ns()}", "multi_gpu.yaml", 2)
        line = ["accelerate", "launch", "--config_file", config, Path(script.__file__).name]
        line += flags(folder, places["CAPTIONED"], *words, *later)
        changes = environment(tmp_path / "home", HF_HUB_OFFLINE="1")
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen([*map(str, line)], cwd=ROOT, env=changes, stdout=log, stderr=log)

    whole, again, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    assert start(whole).wait(300) == 0, log.read_text()
    assert "accumulation 1 x 2 processes" in log.read_text()
    launcher = start(again)
    deadline = time.monotonic() + 200
    while not (again / "metrics.jsonl").is_file() or len((again / "metrics.jsonl").read_text().splitlines()) < 11:
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    family = [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait(30)
    assert not (again / LORA).exists() and script.list_checkpoints(again)
    assert start(again, "--resume_from_checkpoint", "latest").wait(300) == 0, log.read_text()
    assert_same_run(whole, again)
    assert sha256(whole / LORA) == sha256(again / LORA)
    soak("resume after SIGKILL, two processes", equal=1)
