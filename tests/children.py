"""Runs in forked children of the test process, which has imported everything: to be killed, or only waited for."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DONE, FAILED = 0, 1


@dataclass
class Child:
    """A forked process."""

    pid: int
    log: Path
    code: int | None = None  # exit code, minus the signal that ended it

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = 120) -> int:
        """Waits for its end and returns the exit code."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running: {self.log.read_text()}"
            time.sleep(0.005)
        return self.code

    def kill(self) -> int:
        """SIGKILL, unless it has ended; returns the exit code."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()


@contextlib.contextmanager
def forked(function: Callable, *arguments: Any, log: Path, **named: Any) -> Iterator[Child]:
    """Calls the function in a forked child whose output goes to `log`; kills the child at the end if it still runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        run_in_child(function, arguments, named, log)
    child = Child(pid, log)
    try:
        yield child
    finally:
        child.kill()


def run_in_child(function: Callable, arguments: tuple, named: dict, log: Path) -> None:
    """The child's whole life; never returns into the test."""
    code = FAILED
    try:
        with log.open("ab", buffering=0) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = open(2, "w", closefd=False)  # not pytest's
        function(*arguments, **named)
        code = DONE
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        traceback.print_exc()
        code = {"NotFinite": 3, "SaveFailed": 4}.get(type(error).__name__, FAILED)
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_until(condition: Callable[[], bool], child: Child, seconds: float = 120) -> None:
    """Waits until the condition holds; fails when the child ends before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None and time.monotonic() < deadline, child.log.read_text()
        time.sleep(0.005)


def killed_at(script: Any, step: int, function: Callable, *arguments: Any, log: Path, **named: Any) -> None:
    """Calls the function in a child that gets a SIGKILL in the middle of training step `step`."""

    def stepped(run, training, batches, original=script.train_step):
        losses = script.batch_losses

        def killing(*inputs):
            result = losses(*inputs)
            if training.step == step - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        script.batch_losses = killing
        try:
            return original(run, training, batches)
        finally:
            script.batch_losses = losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_step", stepped)
        with forked(function, *arguments, log=log, **named) as child:
            assert child.wait() == -signal.SIGKILL, log.read_text()
