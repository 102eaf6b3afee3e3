"""What goes wrong from outside: numbers that are not finite, exceptions, full disks, closed terminals, a silent Hub."""

import functools
import math
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python
from runs import LORA, column, command_line, lora
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that the tests of this file share, so that only the first run encodes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def quick(train, cache):
    """`train` with the shared cache, pictures in it too."""
    return functools.partial(train, "--latents_cache_dir", cache, "--cache_latents")


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def all_finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether every number is one."""
    return all(tensor.isfinite().all() for tensor in tensors.values())


def poison_latents(folder: Path) -> None:
    """Makes every cached picture of a cache not a number."""
    for path in (folder / "latents").glob("*.safetensors"):
        save_file({name: tensor * math.nan for name, tensor in load_file(path).items()}, path)


def before_step(script, monkeypatch, step: int, action) -> None:
    """Calls `action(state)` when the training step after `step` whole ones begins."""

    def stepped(run, parts, state, batches, original=script.train_step):
        if state.step == step:
            action(state)
        return original(run, parts, state, batches)

    monkeypatch.setattr(script, "train_step", stepped)


def fail(*_args, **_kwargs):
    """What a driver error looks like."""
    raise RuntimeError("the device is lost")


# ---------------------------------------------------------------------------------------------------------------------
# Not finite
# ---------------------------------------------------------------------------------------------------------------------


def test_latents_that_are_not_numbers_skip_the_step_and_leave_weights_and_moments_bit_equal(
    script, quick, monkeypatch, tmp_path, capsys
):
    """The real thing: the cached latents of one picture are NaN; it is named, the steps of the others train."""
    own = tmp_path / "cache"
    flags = ("--latents_cache_dir", own, "--max_train_steps", "5")
    quick(*flags, output="clean")
    victim = sorted((own / "latents").glob("*.safetensors"))[0]
    save_file({name: tensor * math.nan for name, tensor in load_file(victim).items()}, victim)
    snapshots, steps, names = [], [], []

    def watched(run, parts, state, batches, original=script.train_step):
        batch = next(batches)
        values = original(run, parts, state, iter([batch]))
        slots = state.optimizer.state.values()
        tensors = [*state.parameters.values(), *(value for slot in slots for value in slot.values())]
        snapshots.append([tensor.detach().clone() for tensor in tensors])
        steps.append(values)
        names.append(batch[0]["name"][0])
        return values

    monkeypatch.setattr(script, "train_step", watched)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, about a schedule that moves before the optimizer
        folder = quick(*flags, output="poisoned")
    skipped = [number for number, values in enumerate(steps) if not math.isfinite(values["loss"])]
    told = capsys.readouterr().err
    assert 1 <= len(skipped) < 5 and told.count("not finite") == len(skipped)
    for number in range(5):
        if number in skipped:
            line = next(line for line in told.splitlines() if f"step {number + 1}: not finite" in line)
            assert names[number] in line
        if number:
            assert all(map(torch.equal, *snapshots[number - 1 : number + 1])) == (number in skipped)
    assert all_finite(lora(folder))


def test_a_first_step_that_is_skipped_prints_no_warning_of_torch(script, quick, monkeypatch):
    """The schedule counts skipped steps too, and torch thinks that this is a mistake."""

    def poison(run, parts, batch, original=script.batch_losses):
        losses, sigmas = original(run, parts, batch)
        return (losses * math.nan if batch["position"][0] == 0 else losses), sigmas

    monkeypatch.setattr(script, "batch_losses", poison)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        folder = quick("--max_train_steps", "2")
    assert [str(one.message) for one in told if "lr_scheduler" in str(one.message)] == []
    assert [math.isfinite(loss) for loss in column(folder, "loss")] == [False, True]


def test_ten_bad_steps_in_a_row_end_the_program_with_exit_code_3_and_a_finite_checkpoint(t2i, tiny, photos, tmp_path):
    """Nothing was saved before; the ten steps end with a checkpoint that holds the finite weights."""
    words = command_line(tiny, photos, tmp_path / "out", "--seed", "0", "--cache_latents", "--max_train_steps", "20")
    words += ["--latents_cache_dir", str(tmp_path / "cache")]
    t2i.main(t2i.parse_args([*words, "--output_dir", str(tmp_path / "first"), "--max_train_steps", "1"]))
    poison_latents(tmp_path / "cache")
    ended = run_python(ROOT / Path(t2i.__file__).name, *words, timeout=120)
    assert ended.returncode == 3, ended.stderr
    assert "Traceback" not in ended.stderr and "ten steps in a row" in ended.stderr.splitlines()[-1]
    assert checkpoints(tmp_path / "out") == [10] and not (tmp_path / "out" / LORA).exists()
    assert t2i.verify_checkpoint(tmp_path / "out" / "checkpoint-10") is None
    assert all_finite(load_file(tmp_path / "out" / "checkpoint-10" / "training_state.safetensors"))


@pytest.mark.parametrize("when", ["at a checkpoint", "at the end", "when it breaks off"])
def test_a_lora_that_is_not_finite_is_never_saved(script, quick, monkeypatch, tmp_path, when):
    """However it came about; what was saved before stays the newest."""

    def spoil(state):
        next(iter(state.parameters.values())).data.view(-1)[0] = math.inf
        if when == "when it breaks off":
            fail()

    before_step(script, monkeypatch, 3, spoil)
    steps = {"at a checkpoint": "8", "at the end": "4", "when it breaks off": "8"}[when]
    with pytest.raises((script.NotFinite, RuntimeError)):
        quick("--max_train_steps", steps, "--checkpointing_steps", "2")
    assert checkpoints(tmp_path / "out") == [2] and not (tmp_path / "out" / LORA).exists()
    assert all_finite(load_file(tmp_path / "out" / "checkpoint-2" / LORA))


# ---------------------------------------------------------------------------------------------------------------------
# Exceptions in training
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_that_breaks_off_keeps_its_last_whole_step_and_goes_on_from_it_exactly(
    script, quick, monkeypatch, tmp_path, capsys
):
    """No checkpoint was due; the failure itself is what ends the run."""
    whole = quick("--max_train_steps", "5", output="whole")
    with monkeypatch.context() as patch:
        before_step(script, patch, 3, fail)
        with pytest.raises(RuntimeError, match="the device is lost"):
            quick("--max_train_steps", "5")
    folder = tmp_path / "out"
    assert checkpoints(folder) == [3] and script.verify_checkpoint(folder / "checkpoint-3") is None
    assert "step 3 is kept in" in capsys.readouterr().err
    quick("--max_train_steps", "5", "--resume_from_checkpoint", "latest")
    assert [loss.hex() for loss in column(folder, "loss")] == [loss.hex() for loss in column(whole, "loss")]
    assert (folder / LORA).read_bytes() == (whole / LORA).read_bytes()


def test_a_step_that_breaks_off_within_its_update_is_not_kept(script, quick, monkeypatch, tmp_path):
    """Half of the weights may have moved: only what was saved before counts."""
    count = 0

    def half(self, *args, original=torch.optim.AdamW.step, **kwargs):
        nonlocal count
        count += 1
        original(self, *args, **kwargs)
        if count == 4:
            fail()

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(RuntimeError, match="the device is lost"):
        quick("--max_train_steps", "5", "--checkpointing_steps", "2")
    assert checkpoints(tmp_path / "out") == [2]


def test_a_failure_before_the_first_step_leaves_no_checkpoint(script, quick, monkeypatch, tmp_path):
    """There is nothing to keep."""
    before_step(script, monkeypatch, 0, fail)
    with pytest.raises(RuntimeError, match="the device is lost"):
        quick()
    assert checkpoints(tmp_path / "out") == []


def test_a_save_that_fails_while_a_run_breaks_off_does_not_hide_why_it_did(script, quick, monkeypatch, capsys):
    """The first failure is the one that is told at the end."""
    before_step(script, monkeypatch, 2, fail)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "save_checkpoint", refuse)
    with pytest.raises(RuntimeError, match="the device is lost"):
        quick()
    assert "step 2 was not saved" in capsys.readouterr().err
