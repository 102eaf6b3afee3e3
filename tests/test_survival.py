"""Runs that are killed: one run per folder, half-written files, abandoned checkpoints, real SIGKILLs in children.

A child is forked from this process, which has imported everything; so a kill costs seconds less than a new program.
"""

import functools
import json
import logging
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from children import forked, killed_at, wait_until
from faults import KINDS, faulty_run, kill_while_saving
from runs import LORA, assert_same_run, column, files_of, sha256, spy
from safetensors.torch import load_file
from unit_parts import log_lines

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and locks of POSIX"),
    pytest.mark.scripts("i2i"),
]

RESUME = ("--resume_from_checkpoint", "latest")


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, set aside ones too."""
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def test_a_worker_that_is_killed_while_it_logs_does_not_silence_the_run(script, tmp_path):
    """The lock of a progress bar must not be one that processes share: the run would wait for it for ever."""

    def log_and_die() -> None:
        script.tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    script.set_up_logging()
    script.log.warning("the lock is made at the first line")
    with forked(log_and_die, log=tmp_path / "log") as child:
        child.wait()
    line = threading.Thread(target=script.log.warning, args=["the run goes on"], daemon=True)
    line.start()
    line.join(timeout=5)
    assert not line.is_alive()


# ---------------------------------------------------------------------------------------------------------------------
# One run per folder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(script, quick, monkeypatch, tmp_path):
    """Pid of a child that trains in `tmp_path/out` and waits there after its second step."""

    def wait_at_two(run, training, batches, original=script.train_step):
        if training.step == 2:
            (tmp_path / "waits").touch()
            time.sleep(120)
        return original(run, training, batches)

    monkeypatch.setattr(script, "train_step", wait_at_two)
    with forked(quick, "--max_train_steps", "6", "--checkpointing_steps", "1", log=tmp_path / "log") as child:
        monkeypatch.undo()
        wait_until((tmp_path / "waits").exists, child)
        yield child


@pytest.mark.parametrize("flag", [RESUME, ("--overwrite_output_dir",)], ids=["resume", "overwrite"])
def test_a_second_run_in_the_same_folder_is_refused_by_name_before_anything_is_written(
    script, quick, busy, tmp_path, flag
):
    """The message says which process holds the folder, where, and since when; every file stays as it is."""
    before = {name: sha256(tmp_path / "out" / name) for name in files_of(tmp_path / "out") - {".lock"}}
    with pytest.raises(script.UserError) as caught:
        quick("--max_train_steps", "6", *flag)
    assert re.search(
        rf"another run .*process {busy.pid} on \S+ since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", str(caught.value)
    )
    assert {name: sha256(tmp_path / "out" / name) for name in files_of(tmp_path / "out") - {".lock"}} == before
    quick("--max_train_steps", "6", *flag, "--dry_run")  # a plan needs no lock


def test_the_lock_of_a_killed_run_is_no_obstacle_and_is_gone_after_the_next_one(quick, busy, tmp_path):
    """The file of the dead process is still there; the kernel has given its lock back."""
    busy.kill()
    assert f"process {busy.pid}" in (tmp_path / "out" / ".lock").read_text()
    folder = quick("--max_train_steps", "3", *RESUME)
    assert column(folder, "step") == [1, 2, 3] and not (folder / ".lock").exists()


def test_a_drive_without_locks_is_a_warning(quick, monkeypatch):
    """Some network drives have none: the run goes on and says what not to do."""
    import fcntl

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with log_lines(logging.WARNING) as warned:
        assert (quick("--max_train_steps", "1") / LORA).is_file()
    assert any(".lock: cannot be locked" in line and "do not start a second run" in line for line in warned)


# ---------------------------------------------------------------------------------------------------------------------
# Half-written files
# ---------------------------------------------------------------------------------------------------------------------


def empty(path: Path) -> None:
    """No bytes, as after a power failure."""
    path.write_bytes(b"")


def cut(path: Path) -> None:
    """The first two thirds."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def zeros(path: Path) -> None:
    """The right length, nothing in it, as after a power failure."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [empty, cut, zeros, Path.unlink])
def test_a_damaged_cache_file_is_made_again_and_the_run_ends_the_same(script, train, monkeypatch, tmp_path, damage):
    """One embedding, one image's latents and the index; the others are not encoded a second time."""
    flags = ("--cache_latents", "--latents_cache_dir", tmp_path / "cache")
    whole = train(*flags, output="whole")
    victims = [sorted((tmp_path / "cache" / kind).iterdir())[0] for kind in ("prompts", "latents")]
    good = [{name: tensor.clone() for name, tensor in load_file(path).items()} for path in victims]  # not mapped
    for path in [*victims, tmp_path / "cache" / "checked_images.json"]:
        damage(path)
    encoded = [spy(monkeypatch, script, name) for name in ("encode_prompt", "encode_pixels")]
    again = train(*flags, output="again")
    assert [len(calls) for calls in encoded] == [1, 1]
    for path, tensors in zip(victims, good, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert len(json.loads((tmp_path / "cache" / "checked_images.json").read_text())) == 1
    assert_same_run(whole, again)


def test_left_overs_of_killed_runs_are_removed_and_nothing_of_the_users(quick, cache):
    """In the output folder at once; in a cache elsewhere, where another run may be writing, after an hour."""
    folder = quick("--max_train_steps", "1")
    ours = [folder / ".metrics.jsonl.4711.tmp", folder / "samples" / ".a.png.12.tmp", cache / ".x.safetensors.1.tmp"]
    fresh, users = cache / "prompts" / ".y.safetensors.99.tmp", [folder / ".notes.tmp", folder / "a.tmp"]
    for path in [*ours, fresh, *users, folder / ".tmp-checkpoint-4711" / "state.json"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    os.utime(ours[2], (time.time() - 4000,) * 2)
    quick("--max_train_steps", "1", *RESUME)
    assert [path for path in [*ours, folder / ".tmp-checkpoint-4711"] if path.exists()] == []
    assert [path for path in [fresh, *users] if not path.exists()] == []
    fresh.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# An older checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def test_checkpoints_beyond_an_older_one_that_was_resumed_from_are_not_taken_later(script, quick, tmp_path):
    """They keep their content under another name: a kill right afterwards goes on from the older one."""
    flags = ("--max_train_steps", "6", "--checkpointing_steps", "2")
    whole = quick(*flags, output="whole")
    shutil.copytree(whole, tmp_path / "out")
    killed_at(script, 3, quick, *flags, "--resume_from_checkpoint", "checkpoint-2", log=tmp_path / "log")
    assert checkpoints(tmp_path / "out") == ["abandoned-checkpoint-4", "abandoned-checkpoint-6", "checkpoint-2"]
    assert script.verify_checkpoint(tmp_path / "out" / "abandoned-checkpoint-6") is None
    steps = spy_steps(script)
    quick(*flags, *RESUME)
    assert steps() == 4, "not from checkpoint 2"
    assert_same_run(whole, tmp_path / "out")
    quick("--max_train_steps", "1", "--overwrite_output_dir")
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]


def spy_steps(script):
    """Counts training steps from now on: call the result."""
    patch = pytest.MonkeyPatch()
    calls = spy(patch, script, "train_step")

    def count() -> int:
        patch.undo()
        return len(calls)

    return count


def test_a_finished_run_that_is_started_again_leaves_its_last_checkpoint_alone(script, quick):
    """It holds this very state: there is no moment in which a kill could find it half replaced."""
    flags = ("--max_train_steps", "2", "--checkpoints_total_limit", "1")
    folder = quick(*flags)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "checkpoint-2").iterdir()}
    quick(*flags, *RESUME)
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "checkpoint-2").iterdir()}
    assert after == before and checkpoints(folder) == ["checkpoint-2"]


# ---------------------------------------------------------------------------------------------------------------------
# Kills and faults
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_ten_kills_while_every_step_is_saved_leave_a_checkpoint_that_loads(script, quick, tmp_path, keep):
    """At random instants; at least one of them in the middle of a save."""
    counts = kill_while_saving(script, quick, 10, keep, tmp_path / "log")
    assert counts["kills"] == 10 and counts["hit_a_save"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("keep", [1, 3])
def test_soak_two_hundred_kills_while_every_step_is_saved_leave_a_checkpoint_that_loads(
    script, quick, soak, tmp_path, keep
):
    """The newest one loads each time."""
    counts = kill_while_saving(script, quick, 200, keep, tmp_path / "log", seed=1)
    assert counts["kills"] == 200
    soak(f"kills while every step is saved, {keep} kept", loaded=200, **counts)


@pytest.fixture
def compare_with_quiet_run(script, train, tmp_path):
    """`compare_with_quiet_run(kinds, seed)` meets these faults in one run, whose end must be that of a quiet run."""

    def compare(kinds: list[str], seed: int):
        cache, steps = tmp_path / "cache", str(5 * len(kinds) + 20)
        flags = ("--latents_cache_dir", cache, "--cache_latents", "--max_train_steps", steps, "--lora_dropout", "0.2")
        flags += ("--caption_dropout", "0.3", "--random_flip", "--aspect_ratio_buckets", "64,96;96,64")
        flags += ("--checkpointing_steps", "2", "--checkpoints_total_limit", "9")
        quiet = train(*flags, output="quiet")
        start = functools.partial(train, *flags, output="faulty")
        counts = faulty_run(script, start, tmp_path / "faulty", cache, kinds, tmp_path / "log", seed)
        assert_same_run(quiet, tmp_path / "faulty")
        assert sha256(quiet / LORA) == sha256(tmp_path / "faulty" / LORA)
        return counts

    return compare


def test_a_run_with_a_fault_of_each_kind_ends_with_the_lora_of_a_quiet_run(compare_with_quiet_run):
    """Every loss by its bits, and the LoRA byte by byte."""
    assert sum(compare_with_quiet_run(list(KINDS), seed=0).values()) == len(KINDS)


@pytest.mark.soak
def test_soak_a_run_with_fifty_random_faults_ends_with_the_lora_of_a_quiet_run(script, compare_with_quiet_run, soak):
    """The headline."""
    counts = compare_with_quiet_run(random.Random(50).choices(KINDS, k=50), seed=50)
    assert counts.total() == 50
    soak(f"random faults in one {script.TASK} run, same LoRA", faults=50, **counts)
