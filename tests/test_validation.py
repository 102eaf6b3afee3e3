"""Images, sheets, losses, trackers and the model card of runs on the tiny model, in this process."""

import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import draw_photo, draw_photos
from diffusers import Flux2Pipeline
from huggingface_hub import ModelCard
from PIL import Image
from runs import LORA, assert_same_run, column, files_of, lora, metrics, spy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from unit_parts import log_lines

pytestmark = [pytest.mark.e2e, pytest.mark.scripts("t2i")]

DRAW = ("--num_validation_images", "1", "--num_inference_steps", "2")
EVERY_STEP = ("--validation_prompt", "a toy", "--validation_steps", "1", *DRAW)


def card_of(folder: Path) -> ModelCard:
    """The parsed model card."""
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def python_of(card: ModelCard) -> tuple[str, str]:
    """The two snippets in the card: the short one, and the one that loads part by part."""
    short, long = re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.S | re.M)
    return short, long


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of an image."""
    with Image.open(path) as image:
        return image.size


def pixels(path: Path) -> np.ndarray:
    """An image as signed integers."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# ------------------------------------------------------------------------------------------------------- while training


@pytest.mark.scripts("t2i", "i2i")
def test_images_of_every_prompt_lie_in_a_folder_per_step_with_a_sheet_over_all(quick):
    """Baseline at step 0, every second step, two prompts with two images each; rows are prompts, columns steps."""
    flags = ("--validation_prompt", "a toy", "a red toy on grass", "--validation_steps", "2", "--max_train_steps", "4")
    flags += ("--num_validation_images", "2", "--num_inference_steps", "1", "--validation_size", "64,96")
    folder = quick(*flags, "--skip_final_inference")
    images = {f"prompt-{row}_image-{number}.png" for row in (0, 1) for number in (0, 1)}
    expected = {f"step-{step:06d}/{name}" for step in (0, 2, 4) for name in images}
    assert files_of(folder / "samples") == expected | {"contact_sheet.png"}
    sizes = {size_of(folder / "samples" / name) for name in expected}
    assert sizes == {(96, 64)}
    hashes = {(folder / "samples" / "step-000000" / name).read_bytes() for name in images}
    assert len(hashes) == 4
    sheet = pixels(folder / "samples" / "contact_sheet.png")
    high = round(64 * 256 / 96)  # in a square of 256 pixels, in which the image fills the longer side
    assert sheet.shape == (2 * 284 + 24, 3 * 264 + 8, 3)
    for x, step in enumerate((0, 2, 4)):
        for row in (0, 1):
            top, left = 24 + row * 284, 8 + x * 264
            shown = sheet[top : top + high, left : left + 256].mean(axis=(0, 1))
            image = pixels(folder / "samples" / f"step-{step:06d}" / f"prompt-{row}_image-0.png").mean(axis=(0, 1))
            assert np.abs(shown - image).max() < 2
    assert [line["step"] for line in metrics(folder) if "validation_loss" in line] == [2, 4]


def test_images_change_with_training_and_start_from_the_base_model(quick, tiny, script, monkeypatch):
    """Step 0 is what the untouched pipeline draws from the same noise; later steps differ from it."""
    calls = spy(monkeypatch, script, "train")
    folder = quick(*EVERY_STEP, "--learning_rate", "3e-2", "--skip_final_inference")
    run, training = calls[0].args
    pipeline = Flux2Pipeline.from_pretrained(tiny, torch_dtype=torch.float32)
    expected = draw(script, run, pipeline, "a toy")
    shown = [pixels(folder / "samples" / f"step-00000{step}" / "prompt-0_image-0.png") for step in (0, 1, 3)]
    assert np.abs(shown[0] - expected).max() <= 1
    assert np.abs(shown[1] - shown[0]).max() > 1 and np.abs(shown[2] - shown[1]).max() > 1


def draw(script, run, pipeline, prompt: str) -> np.ndarray:
    """What the installed pipeline draws with its own encoder and decoder from the noise of the first image."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 4.0, "max_sequence_length": 64}
    options["generator"] = [script.make_generator(run.seed, "validation", 0, 0)]
    return np.asarray(pipeline(prompt=prompt, **options).images[0]).astype(int)


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize("flags", [("--cache_latents",), ("--random_flip", "--caption_dropout", "0.3")])
def test_training_with_validation_is_bit_identical_to_training_without(
    train, cache, flags, reference_dropout, validation_reference
):
    """Drawing images shifts no random number, neither in the data nor in the dropout."""
    flags = ("--latents_cache_dir", cache, "--lora_dropout", "0.3", *reference_dropout, *flags)
    images = (*EVERY_STEP, *validation_reference)
    assert_same_run(train(*flags, output="without"), train(*flags, *images, output="with"))


@pytest.mark.scripts("t2i", "i2i")
def test_validation_moves_and_casts_nothing_and_leaves_training_mode_on(
    script, quick, validation_reference, monkeypatch
):
    """Dtypes, devices, values, requires_grad, optimizer and schedule are as before; eval mode while drawing."""
    modes, states = [], []

    def generate(run, codec, pipeline, *rest, original=script.generate, **inputs):
        modes.append(pipeline.transformer.training)
        return original(run, codec, pipeline, *rest, **inputs)

    def snapshot(training):
        models = {"transformer": training.transformer, "vae": training.vae}
        tensors = {
            f"{key}.{name}": tensor for key, model in models.items() for name, tensor in model.state_dict().items()
        }
        facts = {name: (t.dtype, t.device, t.requires_grad, t.double().sum().item()) for name, t in tensors.items()}
        trained = [name for name, parameter in training.transformer.named_parameters() if parameter.requires_grad]
        moments = [slot["exp_avg"].double().sum().item() for slot in training.optimizer.state.values()]
        hooks = [len(module._forward_pre_hooks) for module in training.transformer.modules()]
        scaling = [layer.scaling["default"] for layer in training.transformer.modules() if hasattr(layer, "scaling")]
        return facts, trained, moments, training.schedule.state_dict()["_last_lr"], hooks, scaling

    def validate(run, training, original=script.validate):
        before = snapshot(training)
        values = original(run, training)
        states.append((before, snapshot(training), training.transformer.training))
        return values

    monkeypatch.setattr(script, "generate", generate)
    monkeypatch.setattr(script, "validate", validate)
    flags = ("--lora_dropout", "0.1", "--skip_final_inference", "--lr_scheduler", "cosine")
    quick(*EVERY_STEP, *validation_reference, *flags)
    assert modes == [False] * 4 and len(states) == 4
    for before, after, training in states:
        assert before == after and training


def test_the_scheduler_on_disk_is_used_and_not_the_training_schedule(script, quick, monkeypatch):
    """Each validation makes a scheduler of its own, so no inference steps leak into the next."""
    calls = spy(monkeypatch, script, "make_pipeline")
    quick(*EVERY_STEP, "--skip_final_inference", "--max_train_steps", "2")
    schedulers = [call.result.scheduler for call in calls]
    assert len({id(scheduler) for scheduler in schedulers}) == 3
    assert all(scheduler.config.use_dynamic_shifting for scheduler in schedulers)


@pytest.mark.scripts("t2i", "i2i")
def test_the_fixed_noise_loss_repeats_for_the_same_weights_and_falls_while_learning(script, quick, monkeypatch):
    """The same number twice at step 0, logged afterwards, and lower after steps on the same images."""
    starts = []

    def train(run, training, original=script.train):
        training.transformer.eval()
        starts.append(script.validation_loss(run, training))
        torch.manual_seed(123)
        starts.append(script.validation_loss(run, training))
        return original(run, training)

    monkeypatch.setattr(script, "train", train)
    flags = ("--max_train_steps", "16", "--learning_rate", "3e-3", "--validation_steps", "8", "--lora_dropout", "0.1")
    folder = quick("--validation_prompt", "a toy", *DRAW, *flags, "--skip_final_inference")
    assert starts[0] == starts[1]
    logged = [line["validation_loss"] for line in metrics(folder) if "validation_loss" in line]
    assert len(logged) == 2 and starts[0]["validation_loss"] > logged[0] > logged[1]


# -------------------------------------------------------------------------------------------------------- held-out loss


@pytest.mark.scripts("t2i", "i2i")
def test_held_out_images_are_measured_at_all_sigmas_and_never_trained_on(script, quick, monkeypatch):
    """Without any prompt; the run is that of a folder without them."""
    flags = ("--validation_split", "2", "--validation_steps", "2", "--max_train_steps", "6", "--seed", "3")
    names = {True: set(), False: set()}

    def batch_losses(run, training, batch, original=script.batch_losses):
        names[torch.is_grad_enabled()] |= {*batch["name"]}
        return original(run, training, batch)

    monkeypatch.setattr(script, "batch_losses", batch_losses)
    with log_lines() as lines:
        folder = quick(*flags)
    (told,) = (line for line in lines if "held out" in line)
    assert len(names[False]) == 2 and len(names[True]) == 3 and not names[True] & names[False]
    assert all(name in told for name in names[False])
    found = [line for line in metrics(folder) if "validation_loss" in line]
    assert [line["step"] for line in found] == [2, 4, 6]
    assert {f"validation_loss_sigma_{tenth / 10}" for tenth in (5, 7, 9)} <= found[0].keys()
    assert any("validation loss" in line and "after step" in line for line in lines[-1].splitlines())


@pytest.mark.scripts("t2i", "i2i")
def test_a_run_that_holds_images_out_is_the_run_without_them(quick, photos, tmp_path):
    flags = ("--max_train_steps", "4", "--seed", "3")
    with log_lines() as lines:
        folder = quick("--instance_data_dir", photos, "--validation_split", "2", "--validation_steps", "2", *flags)
    (told,) = (line for line in lines if "held out" in line)
    shutil.copytree(photos, fewer := tmp_path / "fewer")
    for path in [path for path in fewer.rglob("*") if path.name in told]:
        path.unlink()
    assert column(folder, "loss") == column(quick("--instance_data_dir", fewer, *flags, output="again"), "loss")


@pytest.mark.scripts("t2i", "i2i")
def test_images_of_a_folder_of_their_own_are_measured_and_leave_the_run_as_it_is(script, quick, photos, tmp_path):
    """Their captions count too; `--validation_split` may hold out others beside them."""
    other = draw_photos(tmp_path / "other", 2, seed=50)
    (other / "00.txt").write_text("a caption of its own")
    flags = ("--instance_data_dir", photos, "--validation_steps", "2", "--max_train_steps", "4", "--seed", "3")
    plain = quick(*flags, output="plain")
    with log_lines() as lines:
        folder = quick(*flags, "--validation_data_dir", other, output="held")
    assert_same_run(plain, folder)
    assert any("2 image(s) are held out: 00.jpg, 01.jpg" in line for line in lines)
    assert any("00.jpg: a caption of its own" in line for line in lines)
    assert sum("validation_loss" in line for line in metrics(folder)) == 2
    with log_lines() as lines:
        quick(*flags, "--validation_data_dir", other, "--validation_split", "1", output="split")
    assert any("3 image(s) are held out" in line for line in lines) and not any("also trained" in one for one in lines)


def test_the_validation_folder_has_columns_of_its_own(script, quick, photos, tmp_path):
    """The flags for columns are about the data that are trained on."""
    shutil.copytree(photos, data := tmp_path / "data")
    names = sorted(path.name for path in data.glob("*.jpg"))
    rows = [json.dumps({"output": name, "words": f"caption {name}"}) for name in names]
    (data / "metadata.jsonl").write_text("\n".join(rows))
    flags = ("--instance_data_dir", data, "--image_column", "output", "--caption_column", "words")
    other = draw_photos(tmp_path / "others", 2, seed=50)
    with log_lines() as lines:
        quick(*flags, "--validation_data_dir", other, "--max_train_steps", "1")
    assert any("2 image(s) are held out" in line for line in lines)


def test_dropouts_do_not_change_the_validation_loss(quick):
    flags = ("--validation_split", "2", "--validation_steps", "1", "--max_train_steps", "1", "--learning_rate", "1e-9")
    plain, dropped = quick(*flags, output="plain"), quick(*flags, "--caption_dropout", "1", output="dropped")
    values = [column(folder, "validation_loss")[0] for folder in (plain, dropped)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_run_too_short_for_a_validation_says_so(quick):
    with log_lines() as lines:
        quick("--validation_split", "1", "--max_train_steps", "2")
    assert any("runs every 200 steps, but this run has only 2" in line for line in lines)


def test_other_held_out_images_begin_a_new_search_for_the_lowest(script, quick, tmp_path, monkeypatch):
    """The first value after that is the one to beat, as the base's is at the start."""
    values = iter([0.9, 0.2, 0.8, 0.7])
    monkeypatch.setattr(script, "validation_loss", lambda *_: {"validation_loss": next(values)})
    folders = [draw_photos(tmp_path / name, 1, seed=seed) for seed, name in ((50, "one"), (60, "two"))]
    flags = ("--validation_steps", "1", "--checkpointing_steps", "1", "--validation_data_dir")
    folder = quick(*flags, folders[0], "--max_train_steps", "1")
    with log_lines() as lines:
        quick(*flags, folders[1], "--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert "lowest 0.7000, after step 3" in lines[-1]
    assert json.loads((folder / "best" / "validation.json").read_text()) == {"step": 3, "validation_loss": 0.7}


def test_a_best_lora_of_a_later_step_than_the_one_resumed_from_is_set_aside(script, quick, monkeypatch):
    values = iter([0.9, 0.8, 0.7, 0.75])
    monkeypatch.setattr(script, "validation_loss", lambda *_: {"validation_loss": next(values)})
    flags = (
        "--validation_split",
        "1",
        "--validation_steps",
        "1",
        "--checkpointing_steps",
        "1",
        "--max_train_steps",
        "2",
    )
    folder = quick(*flags)
    lora = (folder / "best" / LORA).read_bytes()
    with log_lines() as lines:
        quick(*flags, "--resume_from_checkpoint", "checkpoint-1")
    assert (folder / "abandoned-best" / LORA).read_bytes() == lora
    assert "lowest 0.7500, after step 2" in lines[-1] and (folder / "best" / LORA).is_file()


def test_a_low_that_could_not_be_saved_is_no_low(script, quick, monkeypatch):
    values = iter([0.9, 0.8, 0.8])
    monkeypatch.setattr(script, "validation_loss", lambda *_: {"validation_loss": next(values)})
    failed = []

    def write_atomically(path, data, original=script.write_atomically):
        if path.parent.name == "best" and not failed:
            failed.append(path)
            raise script.CannotWrite("no space")
        original(path, data)

    monkeypatch.setattr(script, "write_atomically", write_atomically)
    folder = quick("--validation_split", "1", "--validation_steps", "1", "--max_train_steps", "2")
    assert failed and json.loads((folder / "best" / "validation.json").read_text())["step"] == 2


def test_a_checkpoint_older_than_a_flag_is_resumed(script, quick):
    """A flag that its fingerprint does not know had the default's effect."""
    flags = ("--checkpointing_steps", "1")
    older = quick(*flags, "--max_train_steps", "1") / "checkpoint-1"
    state = json.loads((older / "state.json").read_text())
    del state["fingerprint"]["alpha_as_mask"], state["fingerprint"]["validation_split"]
    (older / "state.json").write_text(json.dumps(state))
    stamps = {path.name: script.file_stamp(path) for path in older.iterdir() if path.name != "manifest.json"}
    (older / "manifest.json").write_text(json.dumps(stamps))
    quick(*flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    with pytest.raises(script.UserError, match="validation_split: was 0, is 1"):
        quick(*flags, "--max_train_steps", "3", "--resume_from_checkpoint", "latest", "--validation_split", "1")


def test_a_held_out_image_that_is_trained_on_is_named(script, quick, photos):
    with log_lines() as lines:
        quick("--validation_data_dir", photos, "--max_train_steps", "1")
    assert any(
        "5 image(s) of --validation_data_dir are also trained on, so they are not held out: 00.jpg" in line
        for line in lines
    )


def test_two_copies_of_an_image_are_held_out_together(script, quick, photos, tmp_path):
    """Else the validation loss would be of an image that is trained on."""
    shutil.copytree(photos, twice := tmp_path / "twice")
    for path in sorted(twice.glob("*.jpg")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    with log_lines() as lines:
        quick("--instance_data_dir", twice, "--validation_split", "2", "--max_train_steps", "1")
    (told,) = (line for line in lines if "held out" in line)
    names = told.partition("held out: ")[2].split(", ")
    assert len(names) == 4 and {name.removeprefix("copy-") for name in names} == {*names} - {f"copy-{n}" for n in names}


@pytest.mark.scripts("i2i")
def test_held_out_edits_name_their_references_in_metadata(script, quick, photos, references, capsys, tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    for folder, numbers in ((data, range(2, 5)), (other, range(2))):
        shutil.copytree(photos, folder)
        shutil.copytree(references, folder / "references")
        rows = (
            {"file_name": f"{n:02d}.jpg", "cond_file_name": f"references/{n:02d}.png", "text": "t"} for n in numbers
        )
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--validation_data_dir", other, "--validation_steps", "1", "--max_train_steps", "1")
    with log_lines() as lines:
        folder = quick("--instance_data_dir", data, *flags)
    assert "validation_loss" in metrics(folder)[0] and not any("have no reference" in line for line in lines)
    with pytest.raises(SystemExit):
        quick(*flags, output="by-stem")
    assert "--validation_data_dir: name its references in metadata" in capsys.readouterr().err


def test_the_lowest_held_out_loss_keeps_its_lora_and_a_resumed_run_knows_it(script, quick, monkeypatch):
    """best/ is of a new low only."""
    values = iter([float("nan"), 0.8, 0.5, 0.9, 0.6, 0.4])  # what is not a number is no low
    monkeypatch.setattr(script, "validation_loss", lambda *_: {"validation_loss": next(values)})
    flags = ("--validation_split", "1", "--validation_steps", "1", "--checkpointing_steps", "1")
    folder = quick(*flags, "--max_train_steps", "3")
    lora = folder / "best" / "pytorch_lora_weights.safetensors"
    assert lora.read_bytes() == (folder / "checkpoint-2" / lora.name).read_bytes()
    with log_lines() as lines:
        quick(*flags, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert lora.read_bytes() == (folder / "checkpoint-2" / lora.name).read_bytes()
    assert "lowest 0.5000, after step 2" in lines[-1]
    quick(*flags, "--max_train_steps", "5", "--resume_from_checkpoint", "latest")
    assert lora.read_bytes() == (folder / "checkpoint-5" / lora.name).read_bytes()


def test_no_image_is_left_to_train_on(script, quick):
    with pytest.raises(script.UserError, match=r"--validation_split 5: there are only 5 images"):
        quick("--validation_split", "5", "--max_train_steps", "1")


# ------------------------------------------------------------------------------------------------------- final images


def test_final_images_come_from_the_saved_file(script, quick, tiny, monkeypatch):
    """They equal what a fresh pipeline draws with the LoRA file."""
    calls, reads = spy(monkeypatch, script, "train"), spy(monkeypatch, script, "load_lora")
    flags = (
        "--final_validation_prompt",
        "a toy",
        "--learning_rate",
        "3e-2",
        "--lora_alpha",
        "8",
        "--lora_dropout",
        "0.5",
    )
    folder = quick(*flags, *DRAW)
    run, training = calls[0].args
    assert [call.args[1] for call in reads] == [folder / LORA]
    final = folder / "samples" / "final"
    assert files_of(final) == {"contact_sheet.png", "prompt-0_image-0.png"}
    assert size_of(final / "contact_sheet.png") == (256 + 8 + 8, 256 + 28 + 24)
    pipeline = Flux2Pipeline.from_pretrained(tiny, torch_dtype=torch.float32)
    base = draw(script, run, pipeline, "a toy")
    pipeline.load_lora_weights(folder, weight_name=LORA, adapter_name="lora")
    shown = pixels(final / "prompt-0_image-0.png")
    assert np.abs(shown - draw(script, run, pipeline, "a toy")).max() <= 1
    assert np.abs(shown - base).mean() > 0


def test_a_final_prompt_alone_draws_at_the_end_only(quick):
    """--final_validation_prompt needs no --validation_prompt; nothing is drawn while training."""
    folder = quick("--final_validation_prompt", "a blue toy", *DRAW)
    assert [path.name for path in (folder / "samples").iterdir()] == ["final"]
    assert not [line for line in metrics(folder) if "validation_loss" in line]
    assert [widget["text"] for widget in card_of(folder).data.widget] == ["a blue toy"]


def test_skipping_the_final_images_keeps_those_of_training(quick):
    """--skip_final_inference draws nothing at the end, and the card has no gallery."""
    folder = quick(*EVERY_STEP, "--skip_final_inference", "--max_train_steps", "1")
    assert not (folder / "samples" / "final").exists() and (folder / "samples" / "step-000001").is_dir()
    assert not card_of(folder).data.to_dict().get("widget")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), TypeError("a new diffusers"), KeyError("part")])
def test_final_images_that_fail_are_a_warning_and_the_lora_stays(script, quick, monkeypatch, capsys, error):
    """Whatever goes wrong after the save: exit without an error, LoRA and card are there."""

    def fail(*_):
        raise error

    monkeypatch.setattr(script, "generate", fail)
    folder = quick("--final_validation_prompt", "a toy", *DRAW)
    said = capsys.readouterr().err
    assert "final images: failed" in said and type(error).__name__ in said
    assert lora(folder) and card_of(folder).data.library_name == "diffusers"


# ------------------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_holds_the_numbers_of_the_metrics_file_and_the_images(quick):
    """Every step's loss and learning rate, the fixed-noise loss also of step 0, one image entry per validation."""
    folder = quick("--report_to", "tensorboard", *EVERY_STEP, "--skip_final_inference")
    (events,) = {
        path.parent for path in (folder / "logs").rglob("*tfevents*") if "loss" in tags(path.parent)["scalars"]
    }
    board = EventAccumulator(str(events), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    for key in ("loss", "lr", "grad_norm", "lora_norm"):
        assert [event.step for event in board.Scalars(key)] == [1, 2, 3]
        assert [event.value for event in board.Scalars(key)] == pytest.approx(column(folder, key), rel=1e-6)
    assert [event.step for event in board.Scalars("validation_loss")] == [0, 1, 2, 3]
    (name,) = [tag for tag in board.Tags()["images"] if tag.startswith("validation")]
    assert [image.step for image in board.Images(name)] == [0, 1, 2, 3]
    assert (board.Images(name)[0].width, board.Images(name)[0].height) == (64, 64)
    texts = board.Tensors("validation/0/prompt/text_summary")
    assert [text.tensor_proto.string_val[0].decode() for text in texts] == ["a toy"] * 4


def tags(folder: Path) -> dict[str, list[str]]:
    """Tags of a TensorBoard folder."""
    board = EventAccumulator(str(folder))
    board.Reload()
    return board.Tags()


def test_a_tracker_that_fails_is_a_warning_and_training_goes_on(quick, monkeypatch, capsys):
    """The numbers are still in metrics.jsonl."""
    from accelerate.tracking import TensorBoardTracker

    def fail(*_args, **_kwargs):
        raise ConnectionError("no route to the board")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    monkeypatch.setattr(TensorBoardTracker, "log_images", fail)
    folder = quick("--report_to", "tensorboard", *EVERY_STEP, "--skip_final_inference")
    assert column(folder, "step") == [1, 2, 3]
    assert all(value > 0 for value in column(folder, "validation_loss"))
    assert capsys.readouterr().err.count("no route to the board") == 1


class Recorder(GeneralTracker):
    """A tracker in memory: one with numbers only, and one that fails while running."""

    name, requires_logging_directory, calls, broken = "recorder", False, None, False

    def __init__(self, *_: Any, **options: Any) -> None:
        """Nothing was called yet."""
        super().__init__()
        self.calls = [("start", options)]

    @property
    def tracker(self) -> None:
        """There is no run behind it."""

    def start(self) -> None:
        """Nothing to connect to."""

    def store_init_configuration(self, values: dict) -> None:
        """The settings of the run."""
        self.calls.append(("settings", values))

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        """Numbers of a step."""
        if self.broken:
            raise ConnectionError("no route to the recorder")
        self.calls.append((step, values))

    def finish(self) -> None:
        """The run is over."""
        self.calls.append(("finish", None))


class Broken(Recorder):
    """The one that fails."""

    name, broken = "broken", True


@pytest.fixture
def recorders(script, monkeypatch):
    """Runs get a broken and a good tracker instead of TensorBoard; the list of those that were made."""
    made = []

    def init_trackers(accelerator, _project, settings, options):
        made.append(options)
        accelerator.trackers = [Broken(), Recorder()]
        for tracker in accelerator.trackers:
            tracker.store_init_configuration(settings)
        made.extend(accelerator.trackers)

    monkeypatch.setattr(script.accelerate.Accelerator, "init_trackers", init_trackers)
    return made


def test_a_tracker_that_fails_costs_the_others_nothing_and_is_told_once(quick, recorders, capsys):
    """Every number arrives at the other one, to the end; what gets no images is said."""
    folder = quick(*EVERY_STEP, "--skip_final_inference")
    _, broken, good = recorders
    assert [step for step, _ in good.calls] == ["start", "settings", 0, 1, 2, 3, "finish"]
    assert [values["loss"] for step, values in good.calls if step in (1, 2, 3)] == column(folder, "loss")
    assert [step for step, _ in broken.calls] == ["start", "settings", "finish"]
    said = capsys.readouterr().err
    assert said.count("tracker broken: failed (ConnectionError: no route to the recorder)") == 1
    assert "trackers: broken, recorder only get numbers; images are in" in said


def test_trackers_show_the_run_by_the_name_of_its_folder(quick, recorders):
    """In the words of each tracker."""
    quick("--max_train_steps", "1", output="blue-toy")
    assert recorders[0]["wandb"] == {"name": "blue-toy"} and recorders[0]["mlflow"] == {"run_name": "blue-toy"}


def test_wandb_gets_every_image_with_its_prompt(script, tmp_path, monkeypatch):
    """As the caption below it."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "Image", lambda image, caption: (image.shape, caption))
    calls = []
    tracker = SimpleNamespace(name="wandb", log=lambda values, step: calls.append((values, step)))
    for row in range(2):
        draw_photo(tmp_path / f"prompt-{row}_image-0.png", (96, 64), row)
    script.send_images(["a toy", "a red toy"], tmp_path, 7, tracker)
    names = {"validation/0": ((64, 96, 3), "a toy")}, {"validation/1": ((64, 96, 3), "a red toy")}
    assert calls == [(values, 7) for values in names]


def test_a_tracker_that_cannot_start_ends_the_run_before_anything_is_encoded(script, train, monkeypatch, tmp_path):
    """A missing login, for instance: better now than a night without curves."""
    from accelerate.tracking import TensorBoardTracker

    def fail(*_args, **_kwargs):
        raise ConnectionError("no route to the board")

    monkeypatch.setattr(TensorBoardTracker, "store_init_configuration", fail)
    monkeypatch.setattr(script, "load_text_encoder", fail)
    with pytest.raises(script.UserError, match=r"--report_to tensorboard: cannot start \(no route to the board\)"):
        train("--report_to", "tensorboard", "--latents_cache_dir", tmp_path / "cache")


# ----------------------------------------------------------------------------------------------------------------- card


@pytest.mark.scripts("t2i", "i2i")
def test_the_card_parses_and_its_gallery_shows_images_that_exist(script, quick):
    """Tags, trigger, one widget per final image with a path in the folder."""
    flags = ("--validation_prompt", "a toy", "a red toy", "--num_validation_images", "2", "--num_inference_steps", "1")
    folder = quick(*flags, "--max_train_steps", "1")
    data = card_of(folder).data.to_dict()
    assert data["pipeline_tag"] == script.TASK
    assert {script.TASK, "lora", "diffusers", "flux2", "template:sd-lora"} <= set(data["tags"])
    assert data["instance_prompt"] == "a photo of sks toy"
    assert [widget["text"] for widget in data["widget"]] == ["a toy", "a toy", "a red toy", "a red toy"]
    for widget in data["widget"]:
        assert (folder / widget["output"]["url"]).is_file()
    assert "<Gallery />" in card_of(folder).text


def test_the_licence_is_that_of_the_models_family(quick):
    """FLUX.2 [dev] has a licence of its own, and what is derived from it keeps that."""
    data = card_of(quick("--max_train_steps", "1")).data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "flux-non-commercial-license"
    assert data["license_link"].startswith("https://huggingface.co/black-forest-labs/")


@pytest.mark.scripts("t2i", "i2i")
def test_the_cards_snippets_run_as_they_stand_and_draw_the_same(quick, tiny, tmp_path, monkeypatch):
    """Images of the right size with the LoRA on, whatever the prompt; every rung: `test_bnb.py`."""
    folder = quick("--final_validation_prompt", 'it\'s a "toy"', "--validation_size", "64,96", *DRAW)
    snippets, images = python_of(card_of(folder)), []
    lines = [line for line in snippets[0].splitlines() if line and "import load_image" not in line]
    assert len(lines) == 5
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / tiny.name).symlink_to(tiny)
    (tmp_path / "desk" / folder.name).symlink_to(folder)
    draw_photo(tmp_path / "desk" / "reference.png", (96, 64), seed=1)  # what a snippet for edits asks for
    monkeypatch.chdir(tmp_path / "desk")
    for code in snippets:
        names = {}
        *loading, drawing = code.splitlines()
        exec(compile("\n".join([*loading, "torch.manual_seed(0)", drawing]), "snippet", "exec"), names)
        assert size_of(Path("image.png")) == (96, 64)
        assert names["pipeline"].get_active_adapters()
        images.append(pixels(Path("image.png")))
    assert np.abs(images[0] - images[1]).max() <= 1 and images[0].std() > 1


def test_the_card_says_how_the_lora_is_got_and_used(script, quick):
    """Trigger words, both files by links that exist, ComfyUI's folder."""
    card = card_of(quick("--max_train_steps", "1"))
    assert 'Write "a photo of sks toy" in the prompt.' in card.text
    assert f"For ComfyUI put [{script.COMFYUI_FILE}]({script.COMFYUI_FILE}) into `models/loras`" in card.text
    without = card_of(quick("--max_train_steps", "1", "--no-comfyui_lora", output="without"))
    assert f"[{LORA}]({LORA})" in without.text and script.COMFYUI_FILE not in without.text


HOSTILE = "a \"toy\": [x]\n---\nlicense: mit\n---\n``` | <script>alert(1)</script> # {0} {prompt} \\ %s '''"


@pytest.mark.scripts("t2i", "i2i")
def test_a_hostile_prompt_leaves_a_card_that_parses(quick):
    """Quotes, YAML, Markdown, HTML and format braces in prompts stay text."""
    flags = ("--instance_prompt", HOSTILE, "--final_validation_prompt", HOSTILE, *DRAW, "--max_train_steps", "1")
    folder = quick(*flags)
    card = card_of(folder)
    assert card.data.license != "mit" and card.data.instance_prompt == HOSTILE
    assert card.data.widget[0]["text"] == HOSTILE
    prose = card.text
    for code in python_of(card):
        compile(code, "snippet", "exec")
        assert repr(HOSTILE) in code
        prose = prose.replace(code, "")
    assert "<script>" not in prose
    assert not [line for line in prose.splitlines() if line.strip() in ("---", "license: mit")]


def test_no_file_that_is_shared_names_a_folder_of_this_machine(quick, tiny):
    """Card and LoRA header carry names, not paths."""
    from safetensors import safe_open

    folder = quick("--max_train_steps", "1")
    with safe_open(folder / LORA, "pt") as file:
        header = str(file.metadata())
    for text in ((folder / "README.md").read_text(), header):
        assert str(tiny.parent) not in text and str(folder.parent) not in text
        assert tiny.name in text


# -------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("family", ["tiny", "tiny_klein"])
def test_a_run_that_does_not_push_opens_no_connection(train, request, tmp_path, monkeypatch, family):
    """Not even with the Hub switched on and the model given as a relative path that reads like a hub id."""
    model = request.getfixturevalue(family)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    attempts = []

    def refuse(*args, **_):
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    flags = ("--pretrained_model_name_or_path", "models/base", "--final_validation_prompt", "a toy", *DRAW)
    folder = train(*flags, "--report_to", "tensorboard")
    assert attempts == [] and (folder / "samples" / "final" / "contact_sheet.png").is_file()
