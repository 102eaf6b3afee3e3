"""What goes wrong from outside: numbers that are not finite, exceptions, full disks, closed terminals, a silent Hub."""

import errno
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python
from PIL import Image
from runs import LORA, column, command_line, lora, metrics, sha256
from safetensors.torch import load_file, save_file
from servers import Hub, point_to

pytestmark = [pytest.mark.e2e, pytest.mark.scripts("t2i")]


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def all_finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether every number is one."""
    return all(tensor.isfinite().all() for tensor in tensors.values())


def poison_latents(folder: Path) -> None:
    """Makes every cached image of a cache not a number."""
    for path in (folder / "latents").glob("*.safetensors"):
        save_file({name: tensor * math.nan for name, tensor in load_file(path).items()}, path)


def before_step(script, monkeypatch, step: int, action) -> None:
    """Calls `action(training)` when the training step after `step` whole ones begins."""

    def stepped(run, training, batches, original=script.train_step):
        if training.step == step:
            action(training)
        return original(run, training, batches)

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
    """The real thing: the cached latents of one image are NaN; it is named, the steps of the others train."""
    own = tmp_path / "cache"
    flags = ("--latents_cache_dir", own, "--max_train_steps", "5")
    quick(*flags, output="clean")
    victim = sorted((own / "latents").glob("*.safetensors"))[0]
    save_file({name: tensor * math.nan for name, tensor in load_file(victim).items()}, victim)
    snapshots, steps, names = [], [], []

    def watched(run, training, batches, original=script.train_step):
        batch = next(batches)
        values = original(run, training, iter([batch]))
        slots = training.optimizer.state.values()
        tensors = [*training.parameters.values(), *(value for slot in slots for value in slot.values())]
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
            assert re.search(rf"{re.escape(names[number])} \(sigma [01]\.\d+\)", line)
        if number:
            assert all(map(torch.equal, *snapshots[number - 1 : number + 1])) == (number in skipped)
    assert all_finite(lora(folder))


def test_a_first_step_that_is_skipped_prints_no_warning_of_torch(script, quick, monkeypatch):
    """The schedule counts skipped steps too, and torch thinks that this is a mistake."""

    def poison(run, training, batch, original=script.batch_losses):
        losses, sigmas = original(run, training, batch)
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


@pytest.mark.parametrize(("encoder", "named"), [("encode_prompt", "prompt 'a photo of"), ("encode_pixels", "image 0")])
def test_an_encoding_that_is_not_finite_is_named_and_not_kept(script, train, monkeypatch, tmp_path, encoder, named):
    """From the cache it would spoil every later run as well."""

    original = getattr(script, encoder)

    def spoilt(*args):
        return original(*args) * math.nan

    monkeypatch.setattr(script, encoder, spoilt)
    with pytest.raises(script.UserError, match=f"{named}.*: its encoding is not finite"):
        train("--cache_latents")
    kind = {"encode_prompt": "prompts", "encode_pixels": "latents"}[encoder]
    assert [*(tmp_path / "out" / "cache").glob(f"{kind}/*")] == []


@pytest.mark.parametrize("when", ["at a checkpoint", "at the end", "when it breaks off"])
def test_a_lora_that_is_not_finite_is_never_saved(script, quick, monkeypatch, tmp_path, when):
    """However it came about; what was saved before stays the newest."""

    def spoil(training):
        next(iter(training.parameters.values())).data.view(-1)[0] = math.inf
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
    assert "step 3 is saved in" in capsys.readouterr().err
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


# ---------------------------------------------------------------------------------------------------------------------
# Full disks
# ---------------------------------------------------------------------------------------------------------------------


def full_disk_for(monkeypatch, part: str) -> list[str]:
    """From now on nothing with `part` in its path can be written; returns the list of the refusals."""
    refused: list[str] = []

    def guard(owner, name, place):
        original = getattr(owner, name)

        @functools.wraps(original)
        def write(*args, **kwargs):
            if part in str(args[place]) and not (name == "open" and "r" in [*args[1:], "r"][0]):
                refused.append(str(args[place]))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[place]))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, write)

    for owner, name, place in ((Path, "write_bytes", 0), (Path, "write_text", 0), (Path, "open", 0)):
        guard(owner, name, place)
    guard(Image.Image, "save", 1)
    return refused


DRAWS = ("--validation_prompt", "a toy", "--num_validation_images", "1", "--num_inference_steps", "1")


@pytest.fixture(scope="module")
def quiet(script, tiny, photos, reference_flags, tmp_path_factory):
    """The folder of a run of three steps with images to which nothing happens."""
    folder = tmp_path_factory.mktemp("quiet") / "out"
    script.main(script.parse_args(command_line(tiny, photos, folder, "--seed", "0", *reference_flags, *THREE)))
    return folder


THREE = ("--max_train_steps", "3", "--cache_latents", *DRAWS, "--validation_steps", "3")


@pytest.mark.parametrize("part", ["checked_images.json", "config.args", "prompts/", "latents/"])
def test_a_disk_that_is_full_before_training_is_one_message_that_says_where_and_what_to_do(
    script, train, monkeypatch, tmp_path, part
):
    """Exit code 2: nothing is lost yet; nothing half-written is left."""
    refused = full_disk_for(monkeypatch, part)
    with pytest.raises(script.UserError) as caught:
        train(*THREE)
    assert refused and f"{part}" in str(caught.value) and "free space" in str(caught.value)
    assert "No space left" in str(caught.value) and list(tmp_path.rglob(".*.tmp")) == []


def test_a_disk_that_is_full_of_class_images_is_one_message_too(t2i, tiny, photos, monkeypatch, tmp_path):
    """Those that are there stay."""
    full_disk_for(monkeypatch, "class-00001")
    words = ("--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a toy")
    words = command_line(
        tiny, photos, tmp_path / "out", *words, "--num_class_images", "2", "--num_inference_steps", "1"
    )
    with pytest.raises(t2i.UserError, match="free space"):
        t2i.main(t2i.parse_args(words))
    assert [path.name for path in (tmp_path / "class").iterdir()] == ["class-00000.png"]


BESIDE = {  # what cannot be written, and how often that is said
    "metrics.jsonl": 1,
    "README.md": 2,
    "samples/step": 2,
    "contact_sheet": 3,
    "samples/final": 1,
    ".tmp-checkpoint": 1,
}


@pytest.mark.parametrize("part", BESIDE)
def test_what_cannot_be_written_beside_the_lora_is_a_warning_and_the_lora_is_that_of_a_quiet_run(
    script, train, quiet, cache, monkeypatch, capsys, part
):
    """Checkpoints on the way are in it: the run goes on without."""
    flags = ("--latents_cache_dir", cache, *THREE)
    with monkeypatch.context() as patch:
        refused = full_disk_for(patch, part)
        if part == ".tmp-checkpoint":  # the last one has room again
            flags = (*flags, "--checkpointing_steps", "2")
            before_step(script, patch, 2, lambda _: patch.undo())
        folder = train(*flags)
    assert refused and sha256(folder / LORA) == sha256(quiet / LORA)
    told = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(told) == BESIDE[part], told
    if part != "metrics.jsonl":
        assert [line["loss"] for line in metrics(folder)] == [line["loss"] for line in metrics(quiet)]


def test_a_final_lora_that_does_not_fit_is_still_in_the_last_checkpoint(script, quick, monkeypatch, tmp_path):
    """Exit code 4, with the place of what is kept."""
    refused = full_disk_for(monkeypatch, f"out/.{LORA}")
    with pytest.raises(script.SaveFailed, match="checkpoint-3") as caught:
        quick()
    assert refused and "No space left" in str(caught.value) and script.EXIT_CODES[script.SaveFailed] == 4
    assert script.verify_checkpoint(tmp_path / "out" / "checkpoint-3") is None
    assert list((tmp_path / "out").glob(".*")) == []


def test_a_checkpoint_that_did_not_fit_is_tried_again_at_the_next_tenth_step(script, quick, monkeypatch, tmp_path):
    """Not only when the next one is due, which may be hundreds of steps away."""

    def save(run, training, original=script.save_checkpoint):
        if training.step == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(run, training)

    monkeypatch.setattr(script, "save_checkpoint", save)
    quick("--max_train_steps", "22", "--checkpointing_steps", "8")
    assert checkpoints(tmp_path / "out") == [10, 16, 22]


def test_a_last_checkpoint_without_room_ends_the_program_with_exit_code_4_and_what_is_kept(t2i, tiny, photos, tmp_path):
    """No file may grow over 400 kB: the checkpoint has 600, the LoRA 200."""
    pytest.importorskip("resource")
    words = command_line(tiny, photos, tmp_path / "out", "--seed", "0", "--cache_latents", "--max_train_steps", "1")
    words += ["--latents_cache_dir", str(tmp_path / "cache")]
    t2i.main(t2i.parse_args([*words, "--output_dir", str(tmp_path / "quiet")]))
    assert (tmp_path / "quiet" / "checkpoint-1" / "training_state.safetensors").stat().st_size > 409_600
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (409600, 409600)); "
    limited += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    ended = run_python("-c", limited, ROOT / Path(t2i.__file__).name, *words, timeout=120)
    assert ended.returncode == 4, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert "the final save failed" in last and f"What is on disk: {tmp_path / 'out' / LORA}" in last
    assert (tmp_path / "out" / LORA).read_bytes() == (tmp_path / "quiet" / LORA).read_bytes()
    assert checkpoints(tmp_path / "out") == [] and list((tmp_path / "out").glob(".tmp*")) == []


def test_a_metrics_file_on_a_disk_that_is_really_full_is_one_warning(script, quick, tmp_path, capsys):
    """/dev/full refuses every byte, as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "out" / "config.args").write_text(script.CONFIG_HEAD)
    folder = quick("--resume_from_checkpoint", "latest")
    assert capsys.readouterr().err.count("metrics.jsonl: step 1 was not written") == 1
    assert (folder / LORA).is_file()


def test_a_damaged_line_of_the_metrics_file_does_not_stop_a_resume(quick, tmp_path):
    """A machine that lost its power leaves such."""
    folder = quick("--max_train_steps", "2")
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 2, "lo\x00\x00\xff{}\n[1]\n')
    quick("--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_drive_without_fsync_can_be_saved_to(script, quick, monkeypatch, number):
    """Some network drives have none, for folders at least; any other failure of it counts."""

    def refuse(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(script.os, "fsync", refuse)
    folder = quick("--max_train_steps", "1")
    assert script.verify_checkpoint(folder / "checkpoint-1") is None and (folder / LORA).is_file()
    number = errno.EIO  # any other failure counts
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        script.flush_to_disk(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Trackers and streams
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["log", "finish"])
def test_a_tracker_that_fails_while_training_is_one_warning_and_the_lora_is_that_of_a_quiet_run(
    quick, monkeypatch, capsys, call
):
    """Its service is down, or its disk is full."""
    from accelerate.tracking import TensorBoardTracker

    quiet = quick(output="quiet")
    monkeypatch.setattr(TensorBoardTracker, call, fail)
    folder = quick("--report_to", "tensorboard")
    assert (folder / LORA).read_bytes() == (quiet / LORA).read_bytes()
    assert capsys.readouterr().err.count("the device is lost") == 1


def test_log_lines_that_nobody_reads_do_not_end_a_program(t2i, tiny, photos, cache, tmp_path):
    """Exit code 0, and the LoRA is there."""
    words = command_line(tiny, photos, tmp_path / "out", "--seed", "0", "--max_train_steps", "2")
    words += ["--latents_cache_dir", str(cache), "--cache_latents"]
    command = [sys.executable, str(ROOT / Path(t2i.__file__).name), *words]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, stderr=writer, timeout=120, check=False)
    os.close(writer)
    assert ended.returncode == 0
    assert t2i.verify_checkpoint(tmp_path / "out" / "checkpoint-2") is None and (tmp_path / "out" / LORA).is_file()


def test_a_usage_error_keeps_its_exit_code_when_nobody_can_read_it(t2i, tiny, photos, tmp_path):
    """The data folder is empty: exit code 2, also into a log file on a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    (tmp_path / "empty").mkdir()
    words = command_line(tiny, photos, tmp_path / "out", "--instance_data_dir", tmp_path / "empty")
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, str(ROOT / Path(t2i.__file__).name), *words]
        assert subprocess.run(command, stderr=full, timeout=120, check=False).returncode == 2


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(script, monkeypatch, tmp_path):
    """A loopback Hub; it is waited for a fifth of a second, and between tries not at all."""
    from huggingface_hub.utils import _http

    class Clock:
        """The time module, but for sleeping."""

        def __getattr__(self, name: str) -> object:
            return getattr(time, name)

        def sleep(self, seconds: float) -> None:
            """Does not."""

    monkeypatch.setattr(_http, "time", Clock())
    with Hub() as server:
        point_to(monkeypatch, server, tmp_path / "hub_cache", "hf_canary_token_of_the_tests")
        yield server
        _http.close_session()


def test_the_hub_is_waited_for_two_minutes_and_not_for_ever(script, hub):
    """The library itself would wait without an end."""
    script.open_hub(script.Args(hub_token=None)).whoami()
    from huggingface_hub import get_session

    assert script.HUB_SILENCE == 120 and get_session().timeout.read == 120


@pytest.mark.parametrize(("fault", "reason"), [("hang", "Timeout"), ("lfs", "uploading"), ("commit", "500")])
def test_a_hub_that_fails_at_the_upload_is_a_warning_with_the_line_that_does_it_by_hand(
    script, quick, hub, monkeypatch, capsys, fault, reason
):
    """The result is on disk before the first byte goes out."""
    monkeypatch.setattr(script, "HUB_SILENCE", 0.2)

    def break_off(*args, original=script.draw_final_images):
        hub.fault = fault
        return original(*args)

    monkeypatch.setattr(script, "draw_final_images", break_off)
    started = time.monotonic()
    folder = quick("--push_to_hub", "--max_train_steps", "1")
    assert time.monotonic() - started < 20
    printed = capsys.readouterr().err
    assert f"hf upload tester/out {folder}" in printed and reason in printed and hub.files == {}
    assert (folder / LORA).is_file() and (folder / "README.md").is_file()


def test_a_hub_that_hangs_at_the_start_is_an_error_before_anything_is_loaded(script, quick, hub, monkeypatch):
    """A repository that cannot be made is a mistake that shows at once."""
    monkeypatch.setattr(script, "HUB_SILENCE", 0.2)
    monkeypatch.setattr(script, "load_transformer", fail)
    hub.fault = "hang"
    with pytest.raises(script.UserError, match="--push_to_hub: cannot create out"):
        quick("--push_to_hub")


def test_a_hub_that_is_down_after_training_is_a_warning(script, quick, hub, monkeypatch, capsys):
    """The machine lost its network while training."""

    def down(*args, original=script.draw_final_images):
        hub.server.server_close()
        return original(*args)

    monkeypatch.setattr(script, "draw_final_images", down)
    folder = quick("--push_to_hub", "--max_train_steps", "1")
    assert "hf upload tester/out" in capsys.readouterr().err and (folder / LORA).is_file()


def test_a_result_that_cannot_be_read_back_for_the_upload_is_a_warning(script, quick, hub, monkeypatch, capsys):
    """A drive that went away after the result was written must not end the run with a traceback."""
    monkeypatch.setattr(script.huggingface_hub.HfApi, "upload_folder", fail)
    quick("--push_to_hub", "--max_train_steps", "1")
    assert "hub: the upload failed" in capsys.readouterr().err
    assert hub.commits == []


def test_a_download_that_breaks_off_is_one_message_that_says_to_start_again(script, hub, tiny, tmp_path):
    """The second start fetches what is missing."""
    hub.models["lab/tiny-flux2"] = tiny
    model = script.find_model(script.Args(
        pretrained_model_name_or_path="lab/tiny-flux2", revision=None, variant=None, cache_dir=None, hub_token=None
    ))  # fmt: skip
    hub.fault = "weights"
    with pytest.raises(script.UserError, match="lab/tiny-flux2/vae: the download failed .*Start again"):
        model.part("vae")
    hub.fault = None
    assert any(model.part("vae").glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Data that changes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["gone", "damaged"])
def test_a_image_that_changes_while_training_is_named_and_the_steps_before_are_kept(
    script, train, photos, monkeypatch, tmp_path, change
):
    """A drive that went away, or a sync that is writing."""
    folder = shutil.copytree(photos, tmp_path / "photos")

    def spoil(_state):
        for path in folder.glob("*.jpg"):
            path.unlink() if change == "gone" else path.write_bytes(path.read_bytes()[:500])

    before_step(script, monkeypatch, 2, spoil)
    with pytest.raises(script.UserError, match=r"0\d\.jpg: was good at the start, but now: ") as caught:
        train("--instance_data_dir", folder, "--max_train_steps", "5")
    assert ("No such file" if change == "gone" else "truncated") in str(caught.value)
    assert checkpoints(tmp_path / "out") == [2]
