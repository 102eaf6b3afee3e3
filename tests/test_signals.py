"""Signals: to the launcher alone, to the whole group, twice; and what must outlive its parent."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers import IMAGE_TO_IMAGE, ROOT, TEXT_TO_IMAGE
from runs import LORA, metrics, spy
from test_launch import environment, flags
from test_processes import on_cpu

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="of Linux: prctl, /proc")]

PR_SET_CHILD_SUBREAPER = 36
SECONDS = 30  # generous: here several runs train side by side on the same cores
# To whom, what, which script, and the code with which the trainer must end.
CASES = {
    "TERM to the launcher": (os.kill, signal.SIGTERM, TEXT_TO_IMAGE, 143),
    "INT to the launcher": (os.kill, signal.SIGINT, IMAGE_TO_IMAGE, 143),  # which cannot tell why it was left alone
    "USR1 to the launcher": (os.kill, signal.SIGUSR1, TEXT_TO_IMAGE, 143),
    "USR1 to the launcher of two": (os.kill, signal.SIGUSR1, TEXT_TO_IMAGE, 143),
    "INT to the group": (os.killpg, signal.SIGINT, IMAGE_TO_IMAGE, 130),  # Ctrl-C in a terminal
}


@pytest.fixture(scope="module")
def foster_parent():
    """Makes this process the parent of every orphan below it, so that it gets their exit codes."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, photos, foster_parent):
    """{case: (launcher, folder, log)} of long runs by `accelerate launch`, which import side by side."""
    runs = {}
    for case, (_, _, program, _) in CASES.items():
        tmp = tmp_path_factory.mktemp("launched")
        config = on_cpu(tmp, "multi_gpu.yaml", 2) if case.endswith("two") else "configs/accelerate/cpu.yaml"
        words = ["accelerate", "launch", "--config_file", str(config), program]
        words += flags(
            tmp / "out", photos, "--max_train_steps", 10**6, "--max_train_minutes", 10, "--dataloader_num_workers", 1
        )
        changes = environment(tmp / "home", HF_HUB_OFFLINE="1")
        # SIGINT as a terminal leaves it: a shell ignores it for what it puts into the background
        options = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        with (tmp / "log").open("wb") as log:
            launcher = subprocess.Popen(words, cwd=ROOT, env=changes, stdout=log, stderr=log, **options)
        runs[case] = launcher, tmp / "out", tmp / "log"
    yield runs
    for launcher, _, _ in runs.values():
        try:
            os.killpg(launcher.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_signal_that_reaches_only_the_launcher_or_everybody_ends_with_a_saved_step(launched, t2i, case):
    """The trainer saves, prints the line that goes on and ends with 143 or 130; nobody is left."""
    launcher, folder, log = launched[case]
    send, number, program, code = CASES[case]
    lines = folder / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (lines.is_file() and len(lines.read_text().splitlines()) >= 2):
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    family = psutil.Process(launcher.pid).children(recursive=True)
    trainers = [child for child in psutil.Process(launcher.pid).children() if program in " ".join(child.cmdline())]
    assert len(trainers) == 1 + case.endswith("two") and len(family) >= 2 * len(trainers), "workers are missing"
    send(launcher.pid, number)
    assert [exit_code(trainer.pid, SECONDS) for trainer in trainers] == [code] * len(trainers), log.read_text()
    _, left = psutil.wait_procs([process for process in family if process not in trainers], timeout=SECONDS)
    assert left == []
    launcher.wait(SECONDS)
    said = log.read_text()
    steps = len(metrics(folder))
    assert t2i.verify_checkpoint(folder / f"checkpoint-{steps}") is None and not (folder / LORA).exists()
    start = "accelerate launch --config_file YOURS.yaml" if case.endswith("two") else "python"
    line = rf" +{start} \S*{program} @\S+config.args --resume_from_checkpoint latest\n"
    assert re.search(rf"stopped at step {steps}, .*\n{line}", said)
    assert said.count("finishing and saving this step") == 1


def exit_code(pid: int, seconds: float) -> int | None:
    """Exit code of an orphan that this process has inherited, or None if it has not ended after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # its parent still lives
            done = 0
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


@pytest.mark.launch
@pytest.mark.slow
def test_a_run_under_nohup_outlives_the_shell_that_started_it(tmp_path, photos, foster_parent):
    """The shell has ended long before the first step; the run goes on to its end."""
    words = shlex.join(["nohup", "python", TEXT_TO_IMAGE, *flags(tmp_path / "out", photos)])
    command = f"{words} > {shlex.quote(str(tmp_path / 'log'))} 2>&1 & echo $!"
    changes = environment(tmp_path / "home", HF_HUB_OFFLINE="1")
    shell = subprocess.run(["bash", "-c", command], cwd=ROOT, env=changes, capture_output=True, text=True, timeout=10)
    assert not (tmp_path / "out").exists()
    assert exit_code(int(shell.stdout), 120) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "out" / LORA).is_file()


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/venv/bin/python", "/venv/bin/accelerate", "launch", "train.py"], True),
        (["/venv/bin/python3.12", "-u", "/venv/bin/torchrun", "--nproc_per_node", "2", "train.py"], True),
        (["python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["python", "-m", "torch.distributed.run", "train.py"], True),
        (["/usr/bin/bash", "-c", "cd accelerate; python train.py --config accelerate"], False),
        (["bash", "/home/me/accelerate/run.sh"], False),
        (["python", "-m", "ipykernel_launcher", "-f", "kernel.json"], False),
        (["sshd: me"], False),
        ([""], False),
    ],
)
def test_the_end_of_a_launcher_is_asked_for_and_of_no_other_parent(script, monkeypatch, words, expected):
    """A shell whose command mentions accelerate, a notebook's kernel and a daemon are none."""
    asked = []
    monkeypatch.setattr(Path, "read_bytes", lambda _: "\0".join([*words, ""]).encode())
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *numbers: asked.append(numbers)))
    script.end_with_launcher()
    assert bool(asked) == expected


@pytest.mark.scripts("t2i")
def test_a_run_in_another_thread_than_the_main_one_works_and_its_time_limit_too(script, train, tmp_path):
    """Signal handlers belong to the main thread: there it would be an error to install them."""
    caught = []

    def run(*words):
        try:
            train(*words)
        except BaseException as error:
            caught.append(error)

    for words in (("--max_train_steps", "2"), ("--max_train_minutes", "1e-6", "--overwrite_output_dir")):
        thread = threading.Thread(target=run, args=words)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert [type(error) for error in caught] == [SystemExit] and caught[0].code == 143
    assert script.verify_checkpoint(tmp_path / "out" / "checkpoint-1") is None


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM, signal.SIGTERM], 143),
        ([signal.SIGINT, signal.SIGUSR2], 130),
        ([signal.SIGINT, signal.SIGTERM], 130),
        ([signal.SIGUSR2, signal.SIGTERM], 143),
    ],
)
def test_the_echo_of_a_signal_is_not_a_second_one(script, train, monkeypatch, tmp_path, numbers, code):
    """Slurm signals the whole group and torchrun passes its own on: the step is finished and saved all the same."""

    def signalled(run, training, batches, original=script.train_step):
        for number in numbers:
            os.kill(os.getpid(), number)
        return original(run, training, batches)

    monkeypatch.setattr(script, "train_step", signalled)
    with pytest.raises(SystemExit) as caught:
        train("--max_train_steps", "5")
    assert caught.value.code == code
    assert script.verify_checkpoint(tmp_path / "out" / "checkpoint-1") is None


@pytest.mark.scripts("t2i")
def test_a_second_signal_some_time_later_acts_at_once(script, train, monkeypatch, tmp_path):
    """Who presses Ctrl-C again does not want to wait for the save."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as behind a shell's &
    steps = spy(monkeypatch, script, "batch_losses")

    def signalled(run, training, batches, original=script.train_step):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)
        return original(run, training, batches)

    monkeypatch.setattr(script, "train_step", signalled)
    with pytest.raises(KeyboardInterrupt):
        train("--max_train_steps", "5")
    assert steps == [] and not (tmp_path / "out" / LORA).exists()
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
