"""Faults in a run on purpose: kills while it saves, and one fault after the other until the run is through."""

import errno
import functools
import itertools
import json
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from children import forked, wait_until
from safetensors.torch import load_file

LATEST = ("--resume_from_checkpoint", "latest")
KINDS = ("kill at save", "kill in a step", "kill anywhere", "not a number", "disk full", "hang in encode")


class Enough(Exception):
    """So many kills as were wanted."""


def kill_while_saving(script: ModuleType, start: Callable, kills: int, keep: int, log: Path, seed: int = 0) -> Counter:
    """Trains with a checkpoint at every step and kills the process again and again, at random instants.

    The run is set up once; a child is forked for each kill, goes on from the newest checkpoint as a new start would,
    and gets its SIGKILL some time after its first save, every third one while it saves. After each the newest
    checkpoint must be intact, load, and be no older than before. Returns how many there were, and how many hit a save
    or a removal.
    """
    counts, rng = Counter(kills=0, hit_a_save=0), random.Random(seed)

    def killed(run, training, original=script.train):
        latest = newest(script, run)
        while counts["kills"] < kills:
            with forked(go_on, script, run, training, original, log=log) as child:
                wait_until(lambda before=latest: newest(script, run, check=False) > before, child)
                time.sleep(rng.uniform(0, 0.15))
                if counts["kills"] % 3 == 0:  # chance alone might miss every save
                    wait_until(lambda: any(run.output_dir.glob(".tmp-*")), child)
                assert child.kill() == -signal.SIGKILL, log.read_text()
            counts["kills"] += 1
            counts["hit_a_save"] += bool(list(run.output_dir.glob(".tmp-*")))
            assert newest(script, run) > latest
            latest = newest(script, run)
        training.consistent = False  # nothing is trained here that could be saved
        raise Enough

    limits = ("--checkpointing_steps", "1", "--checkpoints_total_limit", str(keep), "--max_train_steps", str(10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train", killed)
        with pytest.raises(Enough):
            start(*limits)
    return counts


def newest(script: ModuleType, run: Any, check: bool = True) -> int:
    """Step of the newest checkpoint; checked, it must load. 0 if there is none."""
    folders = script.list_checkpoints(run.output_dir)
    if not folders:
        return 0
    if check:
        assert script.verify_checkpoint(folders[-1]) is None
        assert all(tensor.isfinite().all() for tensor in load_file(folders[-1] / "training_state.safetensors").values())
    return script.step_of(folders[-1])


def go_on(script: ModuleType, run: Any, training: Any, train: Callable) -> None:
    """What a new start does once everything is loaded."""
    args = type(run.args)(**{**vars(run.args), "resume_from_checkpoint": "latest"})
    run = replace(run, resume=script.find_checkpoint(args))
    script.begin_output(run, training.samples)
    if run.resume:
        script.restore(run, training)
    train(run, training)


def faulty_run(
    script: ModuleType, start: Callable, folder: Path, cache: Path, kinds: list[str], log: Path, seed: int = 0
) -> Counter:
    """Starts a run that meets one fault of each of these kinds, one per start, and then finishes it.

    `start(*flags)` trains in `folder`. After ten steps that were not finite the run is taken back to the checkpoint
    before them, as its message says; after any other fault it goes on from the latest. Returns the faults by kind.
    """
    counts, rng, resume = Counter(), random.Random(seed), LATEST
    for number, kind in enumerate(kinds):
        marker = log.with_name(f"{log.name}-{number}")
        with pytest.MonkeyPatch.context() as patch:
            prepare_fault(script, patch, kind, rng, cache, marker)
            with forked(start, *resume, log=log) as child:
                patch.undo()
                await_fault(child, kind, rng, marker)
        assert marker.exists() or kind == "kill anywhere", f"{kind} did not happen: {log.read_text()[-3000:]}"
        counts[kind] += 1
        resume = LATEST if kind != "not a number" else back_before_skipped_steps(script, folder)
    start(*resume)
    return counts


def back_before_skipped_steps(script: ModuleType, folder: Path) -> tuple[str, ...]:
    """The flags that take a run back to the newest checkpoint before it skipped steps, or to its start."""
    states = [(path.name, json.loads((path / "state.json").read_text())) for path in script.list_checkpoints(folder)]
    good = [name for name, state in states if state["skipped"] == 0]
    return ("--resume_from_checkpoint", good[-1]) if good else ("--overwrite_output_dir",)


def await_fault(child: Any, kind: str, rng: random.Random, marker: Path) -> None:
    """Waits until the child has met its fault and is dead."""
    if kind == "kill anywhere":
        deadline = time.monotonic() + rng.uniform(0, 2.5)
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        child.kill()
    elif kind == "hang in encode":
        wait_until(marker.exists, child)
        child.kill()
    else:
        expected = 3 if kind == "not a number" else -signal.SIGKILL
        assert child.wait() == expected, child.log.read_text()[-3000:]


class Fault:
    """What befalls a child at one place of the script; `marker` is a file that says that it has happened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def die(self) -> None:
        """SIGKILL."""
        self.marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def fill_disk(self) -> None:
        """The disk is full, once."""
        if not self.marker.exists():
            self.marker.touch()
            raise OSError(errno.ENOSPC, "No space left on device")

    def die_later(self) -> None:
        """SIGKILL, once the other fault has happened."""
        if self.marker.exists():
            self.die()

    def hang(self) -> None:
        """Never comes back."""
        self.marker.touch()
        time.sleep(600)

    def spoil(self, result: tuple) -> tuple:
        """Makes losses that are not numbers."""
        self.marker.touch()
        return result[0] * math.nan, *result[1:]


def prepare_fault(
    script: ModuleType, patch: pytest.MonkeyPatch, kind: str, rng: random.Random, cache: Path, marker: Path
) -> None:
    """Patches the script so that the child that is forked next meets the fault."""
    fault, steps, flushes = Fault(marker), rng.randint(1, 5), rng.randint(1, 12)
    if kind == "hang in encode":  # half of an embedding was written
        rng.choice(sorted((cache / "prompts").glob("*.safetensors"))).write_bytes(b"half")
    plans = {
        "kill at save": [("flush_to_disk", flushes, fault.die, None)],
        "kill in a step": [("batch_losses", steps, fault.die, None)],
        "kill anywhere": [],
        "not a number": [("batch_losses", steps, None, fault.spoil)],
        "disk full": [("flush_to_disk", flushes, fault.fill_disk, None), ("batch_losses", 1, fault.die_later, None)],
        "hang in encode": [("encode_prompt", 1, fault.hang, None)],
    }
    for name, call, before, change in plans[kind]:
        patch.setattr(script, name, from_call(call, getattr(script, name), before, change))


def from_call(first: int, original: Callable, before: Callable | None, change: Callable | None) -> Callable:
    """`original`; from its call number `first` on with `before()` ahead of it and its result changed."""
    numbers = itertools.count(1)

    @functools.wraps(original)
    def called(*args: Any, **named: Any) -> Any:
        due = next(numbers) >= first
        if due and before:
            before()
        result = original(*args, **named)
        return change(result) if due and change else result

    return called
