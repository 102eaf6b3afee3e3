"""Checkpoints of runs on the tiny model, in this process: exact resume, damage, rotation, signals, full disks."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import draw_photos
from diffusers import Flux2Pipeline
from runs import LORA, assert_same_run, column, command_line, files_of, forbid, lora, metrics, sha256, spy, trajectory
from safetensors.torch import load_file
from unit_parts import start_run

pytestmark = [pytest.mark.e2e, pytest.mark.scripts("i2i")]

RESUME = ("--resume_from_checkpoint", "latest")
SIX = ("--max_train_steps", "6", "--checkpointing_steps", "2")


@pytest.fixture(scope="module")
def six_steps(script, tiny, photos, reference_flags, cache, tmp_path_factory):
    """A finished run of six steps with the checkpoints 2, 4 and 6. Read-only: copy it to change it."""
    folder = tmp_path_factory.mktemp("runs") / "six"
    flags = (*reference_flags, "--seed", "0", "--latents_cache_dir", cache, "--cache_latents", *SIX)
    script.main(script.parse_args(command_line(tiny, photos, folder, *flags)))
    return folder


@pytest.fixture
def finished(six_steps, tmp_path):
    """A copy of that run, in the folder in which `quick` would write."""
    return shutil.copytree(six_steps, tmp_path / "out")


def cut_back(folder: Path, step: int) -> Path:
    """Makes a finished run look as if it had been killed some steps after checkpoint `step`."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    (folder / LORA).unlink()
    return folder


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def nothing_temporary_in(folder: Path) -> bool:
    """Whether no half-written file or folder is left."""
    return not [path for path in folder.rglob("*") if path.name.startswith(".")]


# -------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer", "adamw", "--gradient_accumulation_steps", "2"),
        ("--optimizer", "prodigy"),
        ("--use_8bit_adam", "--rank", "32"),
        ("--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--mixed_precision", "bf16"),
        (
            *("--aspect_ratio_buckets", "64,96;96,64;64,64", "--random_flip", "--caption_dropout", "0.3"),
            *("--lora_dropout", "0.2", "--train_batch_size", "2", "--dataloader_num_workers", "2"),
        ),
    ],
    ids=["accumulation", "prodigy", "8bit", "cosine-bf16", "everything-random"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(train, cache, reference_dropout, tmp_path, flags):
    """From checkpoint 3 of 6 on, losses, gradient norms and LoRA are those of the run that was not stopped."""
    flags += reference_dropout
    cached = ("--latents_cache_dir", cache, "--max_train_steps", "6", "--checkpointing_steps", "3", *flags)
    whole = train(*cached, output="whole")
    resumed = cut_back(shutil.copytree(whole, tmp_path / "resumed"), 3)
    train(*cached, *RESUME, output="resumed")
    assert_same_run(whole, resumed)
    assert column(whole, "lr") == column(resumed, "lr")
    if "--use_8bit_adam" in flags:
        stored = load_file(resumed / "checkpoint-6" / "training_state.safetensors")
        assert {tensor.dtype for name, tensor in stored.items() if name.endswith(("state1", "state2"))} == {torch.uint8}
    first, second = (load_file(folder / "checkpoint-6" / "training_state.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("route", ["latest", "name", "path"])
def test_latest_a_folder_name_and_a_path_all_resume_exactly(quick, six_steps, finished, route):
    """All three routes find checkpoint 4; metrics.jsonl has no step twice."""
    cut_back(finished, 4 if route == "latest" else 6)
    target = {"latest": "latest", "name": "checkpoint-4", "path": six_steps / "checkpoint-4"}[route]
    quick(*SIX, "--resume_from_checkpoint", target)
    assert column(finished, "step") == [1, 2, 3, 4, 5, 6]
    assert_same_run(six_steps, finished)


def test_latest_in_an_empty_folder_starts_from_the_beginning(quick, six_steps):
    """A script with `--resume_from_checkpoint latest` in it can be started for the first time."""
    assert_same_run(six_steps, quick(*SIX, *RESUME))


def test_a_resumed_run_without_a_seed_takes_the_seed_of_the_checkpoint(
    script, tiny, photos, reference_flags, cache, tmp_path
):
    """The drawn seed is in state.json, so the run goes on exactly."""
    flags = (*reference_flags, "--latents_cache_dir", cache, "--cache_latents")
    flags += ("--max_train_steps", "4", "--checkpointing_steps", "2")
    script.main(script.parse_args(command_line(tiny, photos, tmp_path / "whole", *flags)))
    cut_back(shutil.copytree(tmp_path / "whole", tmp_path / "resumed"), 2)
    script.main(script.parse_args(command_line(tiny, photos, tmp_path / "resumed", *flags, *RESUME)))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_a_finished_constant_run_goes_on_with_more_steps(quick, six_steps):
    """Three steps and then three more are six."""
    folder = quick("--max_train_steps", "3")
    quick(*SIX, *RESUME)
    assert_same_run(six_steps, folder)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_finished_run_whose_schedule_has_ended_cannot_go_on_and_the_error_says_why(script, quick, schedule):
    """The learning rate of these schedules depends on the number of steps: the message names schedule and numbers."""
    folder = quick("--max_train_steps", "2", "--lr_scheduler", schedule)
    before = trajectory(folder)
    with pytest.raises(script.UserError) as caught:
        quick("--max_train_steps", "4", "--lr_scheduler", schedule, *RESUME)
    message = str(caught.value)
    assert "steps" in message and "was 2, is 4" in message
    assert schedule in message, f"the reason is missing: {message}"
    assert trajectory(folder) == before


# ---------------------------------------------------------------------------------------------------- what is in there


def test_a_checkpoint_holds_its_four_files_true_hashes_and_no_pickle(six_steps):
    """safetensors and JSON only; the manifest has the size and SHA-256 of every other file."""
    folder = six_steps / "checkpoint-4"
    assert files_of(folder) == {"manifest.json", LORA, "state.json", "training_state.safetensors"}
    manifest = json.loads((folder / "manifest.json").read_text())
    others = files_of(folder) - {"manifest.json"}
    assert manifest == {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in others}
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 4 and state["seed"] == 0 and "torch" in state["versions"]
    assert "instance data" in state["fingerprint"]
    tensors = load_file(folder / "training_state.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    export = load_file(folder / LORA)
    assert {f"transformer.{name.removeprefix('lora/')}" for name in tensors if name.startswith("lora/")} == set(export)
    assert not [name for name in files_of(six_steps) if Path(name).suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]


def test_the_export_inside_a_checkpoint_loads_in_diffusers(script, quick, tiny, tmp_path):
    """With rank and alpha as given, and with the weights of the training state."""
    folder = quick("--lora_alpha", "2", "--max_train_steps", "2", "--checkpointing_steps", "1") / "checkpoint-1"
    pipeline = Flux2Pipeline.from_pretrained(tiny, text_encoder=None, tokenizer=None)
    pipeline.load_lora_weights(folder)
    (config,) = pipeline.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 2)
    state = load_file(folder / "training_state.safetensors")
    loaded = {name: parameter for name, parameter in pipeline.transformer.named_parameters() if ".lora_" in name}
    assert len(loaded) == sum(name.startswith("lora/") for name in state) > 0
    for name, parameter in loaded.items():
        stored = state["lora/" + name.replace(".default_0.", ".")]
        torch.testing.assert_close(parameter.float(), stored, rtol=1e-2, atol=1e-6)  # the tiny model is loaded in bf16
    assert script.verify_checkpoint(folder) is None


# -------------------------------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    """Cuts the file in half, as a full disk does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_byte(path: Path) -> None:
    """Changes one byte near the end; the size stays."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip_byte, Path.unlink], ids=["truncated", "flipped", "removed"])
@pytest.mark.parametrize("name", ["training_state.safetensors", LORA, "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_never_resumed_from(
    script, tiny, photos, reference_flags, finished, capsys, damage, name
):
    """`latest` skips it and names the file; asking for it is an error that names folder and file."""
    damage(finished / "checkpoint-6" / name)
    args = script.parse_args(command_line(tiny, photos, finished, *reference_flags, *RESUME))
    script.set_up_logging()
    assert script.find_checkpoint(args).folder == finished / "checkpoint-4"
    said = capsys.readouterr().err
    # a wrong hash in the manifest speaks against the file that it belongs to
    named = r"\w+\.(safetensors|json)" if (name, damage) == ("manifest.json", flip_byte) else re.escape(name)
    assert re.search(f"checkpoint-6.*{named}", said)
    named_one = (*reference_flags, "--resume_from_checkpoint", "checkpoint-6")
    args = script.parse_args(command_line(tiny, photos, finished, *named_one))
    with pytest.raises(script.UserError, match=f"(?s)checkpoint-6.*{named}"):
        script.find_checkpoint(args)


def test_a_checkpoint_of_another_format_is_refused_with_the_way_that_works(script, quick, finished):
    """It is whole, so that going on from an older one would lose steps in silence."""
    folder = finished / "checkpoint-6"
    state, manifest = (json.loads((folder / name).read_text()) for name in ("state.json", "manifest.json"))
    assert state.pop("format") == script.CHECKPOINT_FORMAT
    (folder / "state.json").write_text(json.dumps(state))
    manifest["state.json"] = script.file_stamp(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        script.UserError, match="checkpoint-6: has an unknown format; start a new run with --init_lora_from its LoRA"
    ):
        quick(*SIX, *RESUME)


def test_a_run_over_a_damaged_newest_checkpoint_replaces_it_and_ends_the_same(script, quick, six_steps, finished):
    """The whole way: skip checkpoint 6, go on from 4, write 6 anew."""
    truncate(finished / "checkpoint-6" / "training_state.safetensors")
    quick(*SIX, *RESUME)
    assert_same_run(six_steps, finished)
    assert script.verify_checkpoint(finished / "checkpoint-6") is None


@pytest.mark.parametrize(
    "changed",
    [
        ("rank", "8"),
        ("learning_rate", "1e-3"),
        ("train_batch_size", "2"),
        ("gradient_accumulation_steps", "2"),
        ("seed", "1"),
        ("caption_dropout", "0.5"),
        ("weighting_scheme", "logit_normal"),
        ("text_encoder_out_layers", "5", "10", "15"),
    ],
    ids=lambda changed: changed[0],
)
def test_a_changed_setting_is_refused_by_name_before_the_transformer_is_loaded(
    script, quick, finished, monkeypatch, changed
):
    """Resuming with other settings would silently be another run."""
    forbid(monkeypatch, script, "load_transformer")
    name, *values = changed
    with pytest.raises(script.UserError, match=name):
        quick(*SIX, *RESUME, f"--{name}", *values)


@pytest.mark.parametrize(
    ("flags", "name", "values"),
    [
        (("--optimizer", "prodigy"), "prodigy_beta3", ("0.9", "0.8")),
        (("--lr_scheduler", "polynomial"), "lr_power", ("1", "2")),
        (("--lr_scheduler", "cosine_with_restarts"), "lr_num_cycles", ("1", "2")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_setting_of_optimizer_or_schedule_is_refused_by_name(script, quick, flags, name, values):
    """What bends the rest of the run is part of the run's fingerprint."""
    quick("--max_train_steps", "2", "--checkpointing_steps", "1", *flags, f"--{name}", values[0])
    with pytest.raises(script.UserError, match=name):
        quick("--max_train_steps", "2", *flags, f"--{name}", values[1], "--resume_from_checkpoint", "checkpoint-1")


WRITTEN_OUT = {  # what the first run says, what the second says, which is the same
    "learning rate": ((), ("--learning_rate", "0.0001")),
    "alpha": ((), ("--lora_alpha", "4")),
    "layers": (("--lora_layers", "attention"), ("--lora_layers", "attn.to_out.0, attn.to_k,attn.to_v,attn.to_q")),
    "layers of FLUX.1": (("--lora_layers", "ff.net.2"), ("--lora_blocks", "ff.linear_out")),
    "shift": (("--timestep_shift", "3"), ("--timestep_shift", "3.0")),
    "scaled rate": (("--scale_lr", "--learning_rate", "2e-4"), ("--learning_rate=2e-4",)),
    "layers of the text encoder": ((), ("--text_encoder_out_layers", "10", "20", "30")),
    "prodigy": (("--optimizer", "prodigy"), ("--optimizer", "Prodigy", "--prodigy_beta3", repr(0.999**0.5))),
    "switches": ((), ("--random_flip", "false", "--gradient_checkpointing=false")),
}


@pytest.mark.parametrize("case", WRITTEN_OUT)
def test_a_default_that_is_written_out_or_spelled_otherwise_is_the_same_run(script, tiny, photos, tmp_path, case):
    """What counts is what the run does."""
    said = []
    for flags in WRITTEN_OUT[case]:
        run = start_run(script, tiny, tmp_path, "--instance_data_dir", photos, *flags)
        said.append(script.fingerprint(run, [script.Stream("instance", [])]))
    assert said[0] == said[1] == json.loads(json.dumps(said[0]))


OTHERS = {
    "learning_rate": ("--learning_rate", "2e-4"), "lora_alpha": ("--lora_alpha", "3"),
    "lora_layers": ("--lora_layers", "attention"), "timestep_shift": ("--timestep_shift", "3"),
    "prodigy_beta3": ("--prodigy_beta3", "0.5"), "dtype": ("--mixed_precision", "bf16"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_resolved_value_that_differs_is_another_run(script, tiny, photos, tmp_path, name):
    data = ("--instance_data_dir", photos)
    first, second = (
        script.fingerprint(start_run(script, tiny, tmp_path, *data, *flags), [script.Stream("instance", [])])
        for flags in ((), OTHERS[name])
    )
    assert first[name] != second[name]


def test_paths_that_are_written_otherwise_are_the_same_run(quick, finished, tiny, photos, reference_flags):
    """What counts is what they lead to."""
    data = ("--instance_data_dir", f"{photos}/../{photos.name}", *reference_flags)
    quick(*SIX, *RESUME, *data, "--pretrained_model_name_or_path", f"{tiny}/.")
    assert column(finished, "step") == [1, 2, 3, 4, 5, 6]


def test_a_changed_prompt_is_told_in_words_with_the_way_that_works(script, quick, finished):
    """No hash is printed; the line that is printed starts a new run from the LoRA."""
    with pytest.raises(script.UserError) as caught:
        quick(*SIX, *RESUME, "--instance_prompt", "a photo of zzz toy")
    message = str(caught.value)
    assert "instance captions: was ['a photo of sks toy'], is ['a photo of zzz toy']" in message
    assert not re.search("[0-9a-f]{32}", message)
    line = shlex.split(message.splitlines()[-1])
    assert line[:2] == ["--init_lora_from", str(finished / "checkpoint-6" / LORA)] and line[2] == "--output_dir"
    quick("--max_train_steps", "1", "--instance_prompt", "a photo of zzz toy", *line)
    folder = Path(f"{finished}-2")
    assert column(folder, "step") == [1] and column(folder, "lora_norm")[0] > column(finished, "lora_norm")[0]


def test_settings_that_a_lora_cannot_change_are_told_without_that_way(script, quick, finished):
    """A LoRA of another rank would be refused as a start."""
    with pytest.raises(script.UserError) as caught:
        quick(*SIX, *RESUME, "--rank", "8")
    assert "rank: was 4, is 8" in str(caught.value) and "--init_lora_from" not in str(caught.value)


def test_a_finished_run_can_be_resumed_to_export_its_lora_anew(quick):
    """The checkpoint stays as it is; the LoRA has the precision that is asked for."""
    flags = ("--mixed_precision", "bf16", "--max_train_steps", "1")
    folder = quick(*flags)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "checkpoint-1").iterdir()}
    assert {tensor.dtype for tensor in lora(folder).values()} == {torch.bfloat16}
    quick(*flags, *RESUME, "--upcast_before_saving")
    assert {tensor.dtype for tensor in lora(folder).values()} == {torch.float32}
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "checkpoint-1").iterdir()} == before


def test_several_changed_settings_and_other_images_are_named_together(script, quick, finished, tmp_path):
    """One error lists them all, with old and new value."""
    flags = ("--rank", "8", "--random_flip", "--instance_data_dir", draw_photos(tmp_path / "others", 3, seed=40))
    with pytest.raises(script.UserError) as caught:
        quick(*SIX, *RESUME, *flags)
    message = str(caught.value)
    assert "rank: was 4, is 8" in message and "random_flip: was False, is True" in message
    assert "instance data: has changed" in message


@pytest.mark.scripts("i2i")
def test_another_dropout_of_references_and_other_references_are_refused_by_name(
    script, quick, finished, square_references
):
    """What is trained on are pairs: the same targets with other references are other data."""
    with pytest.raises(script.UserError) as caught:
        quick(*SIX, *RESUME, "--cond_dropout", "0.5", "--cond_data_dir", square_references)
    assert "cond_dropout: was 0.0, is 0.5" in str(caught.value) and "instance data: has changed" in str(caught.value)


# -------------------------------------------------------------------------------------------------- rotation and disks


@pytest.mark.parametrize("limit", [2, 4])
def test_rotation_keeps_the_limit_and_the_newest(quick, limit):
    """Every step is saved, so many checkpoints stay, also while there are fewer."""
    folder = quick("--max_train_steps", "5", "--checkpointing_steps", "1", "--checkpoints_total_limit", limit)
    assert checkpoints(folder) == [1, 2, 3, 4, 5][-limit:]
    assert nothing_temporary_in(folder)


def test_rotation_never_removes_the_only_good_checkpoint_for_a_damaged_newer_one(script, quick, finished, monkeypatch):
    """After a resume below a damaged checkpoint 6, what was just written stays although 6 has the higher number."""
    truncate(finished / "checkpoint-6" / "training_state.safetensors")

    def stop_after_five(run, training, batches, original=script.train_step):
        if training.step == 5:
            raise RuntimeError("killed")
        return original(run, training, batches)

    monkeypatch.setattr(script, "train_step", stop_after_five)
    with pytest.raises(RuntimeError, match="killed"):
        limits = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "1")
        quick("--max_train_steps", "6", *limits, *RESUME)
    good = [step for step in checkpoints(finished) if script.verify_checkpoint(finished / f"checkpoint-{step}") is None]
    assert good, f"no good checkpoint is left, only {checkpoints(finished)}"


def full_disk(script, monkeypatch, when: int, how: str) -> None:
    """The save of step `when` fails: at fsync, or really, because files may not grow over 20 kB."""

    def save(run, training, original=script.save_checkpoint):
        if training.step != when:
            return original(run, training)
        with monkeypatch.context() as patch:
            if how == "fsync":

                def refuse(*_):
                    raise OSError(28, "No space left on device")

                patch.setattr(script, "flush_to_disk", refuse)
                return original(run, training)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            try:
                return original(run, training)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(script, "save_checkpoint", save)


@pytest.mark.parametrize("how", ["fsync", "write"])
def test_a_save_that_fails_keeps_the_old_checkpoint_and_the_run_goes_on(
    script, quick, six_steps, monkeypatch, capsys, how
):
    """Step 4 cannot be saved: a warning, nothing half-written, and the run ends as if nothing had been."""
    full_disk(script, monkeypatch, 4, how)
    folder = quick(*SIX)
    assert checkpoints(folder) == [2, 6]
    assert script.verify_checkpoint(folder / "checkpoint-2") is None
    assert "step 4 was not saved" in capsys.readouterr().err
    assert nothing_temporary_in(folder)
    assert_same_run(six_steps, folder)


@pytest.mark.parametrize("how", ["fsync", "write"])
def test_a_last_save_that_fails_is_said_with_its_own_error_and_keeps_the_checkpoint_and_the_lora(
    script, quick, monkeypatch, tmp_path, how
):
    """SaveFailed (exit code 4) says what is kept: checkpoint 2 is still good, and the LoRA alone has room."""
    quiet = quick(output="quiet")
    full_disk(script, monkeypatch, 3, how)
    with pytest.raises(script.SaveFailed) as caught:
        quick("--checkpointing_steps", "2")
    folder = tmp_path / "out"
    assert checkpoints(folder) == [2] and script.verify_checkpoint(folder / "checkpoint-2") is None
    assert nothing_temporary_in(folder)
    assert all(str(folder / name) in str(caught.value) for name in (LORA, "checkpoint-2"))
    assert sha256(folder / LORA) == sha256(quiet / LORA)


# ------------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_the_resumed_run_is_exact(
    script, quick, six_steps, monkeypatch, tmp_path, capsys, number, code
):
    """SystemExit carries 128 + the signal, the resume line is printed, no final LoRA pretends that the run is done."""

    def signalled(run, training, batches, original=script.train_step):
        if training.step == 2:
            os.kill(os.getpid(), number)
        return original(run, training, batches)

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", signalled)
        with pytest.raises(SystemExit) as caught:
            quick("--max_train_steps", "6")
    folder = tmp_path / "out"
    assert caught.value.code == code
    assert checkpoints(folder) == [3] and not (folder / LORA).exists()
    line = f"main(parse_args(['@{folder / 'config.args'}', '--resume_from_checkpoint', 'latest']))"
    assert f"Continue with\n    {line}\n" in capsys.readouterr().err
    quick("--max_train_steps", "6", *RESUME)
    assert_same_run(six_steps, folder)


def test_the_time_limit_saves_and_stops_like_a_signal(script, quick, six_steps, tmp_path):
    """One step is always done, and without the limit the run goes on exactly."""
    with pytest.raises(SystemExit) as caught:
        quick("--max_train_steps", "6", "--max_train_minutes", "1e-6")
    folder = tmp_path / "out"
    assert caught.value.code == 143 and checkpoints(folder) == [1] and len(metrics(folder)) == 1
    quick("--max_train_steps", "6", *RESUME)
    assert_same_run(six_steps, folder)


# ------------------------------------------------------------------------------------------------------ an earlier run


def test_a_folder_with_an_earlier_run_is_refused_with_both_ways_out(script, tiny, photos, finished, capsys):
    """Exit code 2 while parsing; the message holds the line to resume and the line to overwrite."""
    before = files_of(finished)
    with pytest.raises(SystemExit) as caught:
        script.parse_args(command_line(tiny, photos, finished))
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "--resume_from_checkpoint latest" in said and "--overwrite_output_dir" in said and "checkpoint-2" in said
    assert files_of(finished) == before


def test_overwriting_removes_our_files_and_never_the_cache_or_what_is_not_ours(script, train, six_steps, monkeypatch):
    """Afterwards the folder is that of a fresh run, plus the user's files, and the cache was used again."""
    flags = ("--cache_latents", "--report_to", "tensorboard")
    folder = train(*flags, "--max_train_steps", "4", "--checkpointing_steps", "2", "--lora_alpha", "2")
    foreign = ["notes.txt", "checkpoint-best/keep.txt", "checkpoint-2.zip", "images/a.png", "my.safetensors"]
    for name in foreign:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    cached = {name: (folder / name).stat().st_mtime_ns for name in files_of(folder) if name.startswith("cache/")}
    events = {name for name in files_of(folder) if "tfevents" in name}
    forbid(monkeypatch, script, "load_text_encoder", "load_vae")
    train(*flags, "--max_train_steps", "3", "--overwrite_output_dir", "--no-comfyui_lora")
    assert all((folder / name).read_text() == "mine" for name in foreign)
    assert checkpoints_of_ours(folder) == [3] and column(folder, "step") == [1, 2, 3]
    assert not (folder / "comfyui_lora.safetensors").exists()
    assert not events & files_of(folder)
    kept = {name: (folder / name).stat().st_mtime_ns for name in cached if name != "cache/checked_images.json"}
    assert kept == {name: stamp for name, stamp in cached.items() if name != "cache/checked_images.json"}


def checkpoints_of_ours(folder: Path) -> list[int]:
    """Steps of the folders whose name is exactly checkpoint-N."""
    return sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit())


def test_overwriting_keeps_the_users_files_among_the_samples(quick, six_steps):
    """Also inside samples/ only images that we wrote go."""
    draw = ("--validation_prompt", "a toy", "--num_validation_images", "1", "--num_inference_steps", "1")
    folder = quick(*draw, "--max_train_steps", "1", "--skip_final_inference")
    (folder / "samples" / "favourites.txt").write_text("mine")
    quick("--max_train_steps", "1", "--overwrite_output_dir")
    assert (folder / "samples" / "favourites.txt").read_text() == "mine"
    assert not (folder / "samples" / "step-000000").exists()


def test_an_export_of_a_resumed_run_is_that_of_its_last_checkpoint(quick, finished):
    """The final file has the tensors of checkpoint 6."""
    cut_back(finished, 4)
    quick(*SIX, *RESUME)
    inside = load_file(finished / "checkpoint-6" / LORA)
    assert all(torch.equal(tensor, inside[name]) for name, tensor in lora(finished).items())


def test_a_resumed_run_loads_no_encoder(script, quick, finished, monkeypatch):
    """Prompts and latents come from the cache."""
    cut_back(finished, 4)
    forbid(monkeypatch, script, "load_text_encoder", "load_vae")
    steps = spy(monkeypatch, script, "train_step")
    quick(*SIX, *RESUME)
    assert len(steps) == 2


def test_a_resume_with_nothing_left_to_train_says_so(script, train, capsys):
    """With fewer steps than there are, the steps that were asked for are not those of the LoRA."""
    train("--max_train_steps", "2")
    capsys.readouterr()
    train("--resume_from_checkpoint", "latest", "--max_train_steps", "1", "--dry_run")
    assert (
        "WARNING plan: checkpoint-2 is already at step 2 of 1, there is nothing left to train"
        in capsys.readouterr().err
    )
    train("--resume_from_checkpoint", "latest", "--max_train_steps", "3", "--dry_run")
    assert "nothing left" not in capsys.readouterr().err
