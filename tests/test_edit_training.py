"""Whole runs of the image-to-image script on references: every form of data, exact resume, batches, images, card."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_photo
from diffusers import Flux2Pipeline
from PIL import Image
from runs import LORA, assert_close_runs, assert_same_run, column, forbid, lora, metrics, spy

pytestmark = pytest.mark.e2e

DRAW = ("--num_validation_images", "1", "--num_inference_steps", "2")
CALM = ("--adam_epsilon", "1e-3", "--learning_rate", "1e-3")  # see test_training.py
PROMPTS = ("make it night", "make it day", "a plain image")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Ten rows in metadata.jsonl: four with one reference, four with two, two without; two target shapes."""
    data = tmp_path_factory.mktemp("mixed") / "data"
    rows = []
    for number in range(10):
        draw_photo(data / f"target{number}.jpg", (96, 64) if number % 2 else (64, 64), number)
        row = {"file_name": f"target{number}.jpg", "text": PROMPTS[number % 3]}
        for place, seed in zip(("first", "second"), (20, 40), strict=True):
            if number < 8 and (place == "first" or number >= 4):
                size = (80, 64) if place == "first" else (64, 96)
                draw_photo(data / "references" / f"{place}{number}.jpg", size, number + seed)
                row[f"{place}_file_name"] = f"references/{place}{number}.jpg"
        rows.append(json.dumps(row))
    (data / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return data


@pytest.fixture
def edit(i2i, tiny, mixed, cache, tmp_path):
    """Runs the script: `edit("--rank", "4", ...)` returns the output folder; quick steps on the mixed rows."""

    def start(*flags: object, output: str = "out") -> Path:
        folder = tmp_path / output
        words = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", mixed, "--output_dir", folder]
        words += ["--aspect_ratio_buckets", "64,64;64,96", "--max_train_steps", "4", "--seed", "0", "--rank", "4"]
        words += ["--max_sequence_length", "64", "--report_to", "none", "--dataloader_num_workers", "0"]
        i2i.main(i2i.parse_args([str(word) for word in [*words, "--latents_cache_dir", cache, *flags]]))
        return folder

    return start


# ----------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("extra", [(), ("--cache_latents",)])
def test_rows_with_two_one_and_no_reference_train_in_one_run_each_equally_often(i2i, edit, monkeypatch, extra):
    """Ten steps of batch one are a round of all ten rows; a batch has as many references as its row."""
    calls = spy(monkeypatch, i2i, "batch_losses")
    folder = edit("--max_train_steps", "10", *extra)
    batches = [call.args[2] for call in calls]
    assert sorted(name for batch in batches for name in batch["name"]) == [f"target{n}.jpg" for n in range(10)]
    counts = {batch["name"][0]: len(batch["references"][0]) for batch in batches}
    assert counts == {f"target{n}.jpg": 1 if n < 4 else 2 if n < 8 else 0 for n in range(10)}
    assert all(np.isfinite(column(folder, "loss"))) and all(tensor.abs().max() > 0 for tensor in lora(folder).values())


def test_two_folders_matched_by_stem_train_like_the_same_rows_in_metadata(i2i, edit, tmp_path):
    """Another way to say the same data is the same run, to the last bit."""
    for number in range(3):
        draw_photo(tmp_path / "t" / f"{number}.jpg", (64, 64), number)
        draw_photo(tmp_path / "r" / f"{number}.jpg", (80, 64), number + 9)
    shutil.copytree(tmp_path / "t", tmp_path / "both")
    shutil.copytree(tmp_path / "r", tmp_path / "both" / "r")
    rows = [json.dumps({"file_name": f"{n}.jpg", "cond_file_name": f"r/{n}.jpg", "text": "x"}) for n in range(3)]
    (tmp_path / "both" / "metadata.jsonl").write_text("\n".join(rows))
    flags = ("--instance_prompt", "x")
    first = edit("--instance_data_dir", tmp_path / "t", "--cond_data_dir", tmp_path / "r", *flags, output="a")
    assert_same_run(first, edit("--instance_data_dir", tmp_path / "both", *flags, output="b"))


def test_references_change_what_is_learned(edit, mixed, tmp_path):
    """The same targets, prompts, noise and sigma without their references have other losses."""
    plain = tmp_path / "plain"
    shutil.copytree(mixed, plain)
    rows = [json.loads(line) for line in (mixed / "metadata.jsonl").read_text().splitlines()]
    only = [json.dumps({key: row[key] for key in ("file_name", "text")}) for row in rows[:2]]
    (plain / "metadata.jsonl").write_text("\n".join(only))
    shutil.rmtree(plain / "references")
    for path in plain.glob("target[2-9].jpg"):
        path.unlink()
    (tmp_path / "with").mkdir()
    shutil.copytree(mixed, tmp_path / "with", dirs_exist_ok=True)
    (tmp_path / "with" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    with_references = edit("--instance_data_dir", tmp_path / "with", output="a")
    without = edit("--instance_data_dir", plain, output="b")
    assert all(abs(a - b) > 1e-4 for a, b in zip(*(column(f, "loss") for f in (with_references, without)), strict=True))
    dropped = edit("--instance_data_dir", tmp_path / "with", "--cond_dropout", "1", output="c")
    assert column(dropped, "loss")[0] == column(without, "loss")[0]


def test_four_accumulated_rows_equal_a_batch_of_four_with_some_references_dropped(edit, mixed, tmp_path):
    """One geometry, half of the references dropped: losses, and the LoRA, to 1e-5."""
    rows = [json.loads(line) for line in (mixed / "metadata.jsonl").read_text().splitlines()]
    data = tmp_path / "data"
    shutil.copytree(mixed, data)
    same = [rows[number] | {"second_file_name": None} for number in (0, 2, 4, 6)]  # targets of 64 x 64
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, same)))
    flags = ("--instance_data_dir", data, "--cond_dropout", "0.5", "--cache_latents", *CALM)
    batch = edit(*flags, "--train_batch_size", "4", output="a")
    accumulated = edit(*flags, "--gradient_accumulation_steps", "4", output="b")
    assert_close_runs(batch, accumulated)


def test_cached_references_train_like_uncached_ones(edit):
    """With the centre crop, mirrored or not."""
    flags = ("--center_crop", "--random_flip", "--cond_dropout", "0.3", *CALM)
    assert_close_runs(edit(*flags, output="a"), edit(*flags, "--cache_latents", output="b"))


def test_the_second_start_encodes_no_reference(i2i, edit, monkeypatch):
    """Neither images nor prompts: nothing but the transformer is loaded."""
    edit("--cache_latents", output="a")
    forbid(monkeypatch, i2i, "load_vae", "load_text_encoder")
    edit("--cache_latents", output="b")


@pytest.mark.parametrize("extra", [(), ("--cache_latents", "--align_cond_image")])
def test_a_resumed_run_with_references_is_the_run_that_was_never_stopped(i2i, edit, mixed, tmp_path, extra):
    """To the last bit, with dropped references, flips, caption dropout and LoRA dropout."""
    flags = ("--cond_dropout", "0.4", "--random_flip", "--caption_dropout", "0.2", "--lora_dropout", "0.1", *extra)
    if "--align_cond_image" in extra:
        rows = [{"file_name": f"target{n}.jpg", "text": "x", "cond_file_name": f"target{n}.jpg"} for n in range(10)]
        data = tmp_path / "data"
        shutil.copytree(mixed, data)
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags += ("--instance_data_dir", data)
    whole = edit(*flags, "--checkpointing_steps", "2", output="whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-4")
    (cut / LORA).unlink()
    resumed = edit(*flags, "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest", output="cut")
    assert_same_run(whole, resumed)
    with pytest.raises(i2i.UserError, match="cond_dropout: was 0.4, is 0.0"):
        edit(*flags, "--cond_dropout", "0", "--resume_from_checkpoint", "latest", output="cut")


# ----------------------------------------------------------------------------------------------------------- validation


def pixels(path: Path) -> np.ndarray:
    """An image as signed integers."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def drawn(i2i, edit, mixed, monkeypatch):
    """(folder, run, parts) of a run with two validation prompts: one reference, two references of a training row."""
    calls = spy(monkeypatch, i2i, "train")
    references = mixed / "references"
    images = references / "first1.jpg", f"{references / 'first4.jpg'},{references / 'second4.jpg'}"
    flags = ("--validation_prompt", "make it snow", PROMPTS[4 % 3], "a plain image", "--validation_image", *images)
    folder = edit(*flags, *DRAW, "--validation_steps", "2", "--learning_rate", "3e-2")
    return folder, *calls[0].args[:2]


def test_images_are_what_the_users_pipeline_draws_from_the_same_references(i2i, drawn, tiny, mixed):
    """Before training and with the saved LoRA, for one reference, two, and none."""
    folder, run, _ = drawn
    pipeline = Flux2Pipeline.from_pretrained(tiny, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    given = [
        [mixed / "references" / "first1.jpg"],
        [mixed / "references" / f"{name}4.jpg" for name in ("first", "second")],
    ]
    sizes = [(64, 96), (64, 96), (64, 64)]
    for step, final in (("step-000000", False), ("final", True)):
        if final:
            pipeline.load_lora_weights(folder)
        for row, prompt in enumerate(run.args.validation_prompt):
            image = [i2i.decode_image(path.read_bytes()) for path in given[row]] if row < 2 else None
            generator = [i2i.make_generator(0, "validation", row, 0)]
            options = {"height": sizes[row][0], "width": sizes[row][1], "num_inference_steps": 2, "guidance_scale": 4.0}
            expected = pipeline(prompt=prompt, image=image, generator=generator, max_sequence_length=64, **options)
            shown = pixels(folder / "samples" / step / f"prompt-{row}_image-0.png")
            assert np.abs(shown - np.asarray(expected.images[0]).astype(int)).max() <= 1


def test_the_sheet_shows_references_and_steps(drawn):
    """Columns: reference 1, reference 2, steps 0, 2, 4; the third row has no reference."""
    folder, _, _ = drawn
    sheet = Image.open(folder / "samples" / "contact_sheet.png")
    width = (sheet.width - 8) // 5 - 8
    assert (sheet.width - 8) % 5 == 0 and width >= 200
    array = np.asarray(sheet).astype(int)
    cell_height = (sheet.height - 24) // 3
    corners = [[(24 + y * cell_height, 8 + x * (width + 8)) for x in range(5)] for y in range(3)]
    blank = [[(array[top : top + 100, left : left + 100] == 255).all() for top, left in row] for row in corners]
    assert blank == [
        [False, True, False, False, False],
        [False, False, False, False, False],
        [True, True, False, False, False],
    ]


def test_training_with_validation_references_is_bit_identical_to_training_without(edit, mixed):
    flags = ("--cond_dropout", "0.3", "--lora_dropout", "0.2", "--skip_final_inference")
    image = mixed / "references" / "first1.jpg"
    images = ("--validation_prompt", "x", "--validation_image", image, "--validation_steps", "1", *DRAW)
    assert_same_run(edit(*flags, output="a"), edit(*flags, *images, output="b"))


def test_the_validation_loss_counts_references(edit):
    """A number on a few training rows, with their references."""
    flags = ("--validation_prompt", "x", "--validation_steps", "2", *DRAW, "--skip_final_inference")
    kept, dropped = edit(*flags, output="a"), edit(*flags, "--cond_dropout", "1", output="b")
    values = [[line["validation_loss"] for line in metrics(f) if "validation_loss" in line] for f in (kept, dropped)]
    assert len(values[0]) == 2 and abs(values[0][0] - values[1][0]) > 1e-4


def test_a_validation_image_that_vanishes_costs_images_and_nothing_else(i2i, edit, mixed, tmp_path, monkeypatch):
    """Deleted while training: the LoRA and its card are written all the same."""
    image = shutil.copy(mixed / "references" / "first1.jpg", tmp_path / "v.jpg")
    monkeypatch.setattr(i2i, "save_results", lambda *given, go_on=i2i.save_results: (image.unlink(), go_on(*given)))
    folder = edit("--validation_prompt", "x", "--validation_image", image, *DRAW)
    assert (folder / LORA).is_file() and "load_image" in (folder / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------------- card


@pytest.mark.parametrize("extra", [(), ("--align_cond_image", "--validation_size", "64,96")])
def test_the_snippet_of_the_card_edits_a_image(edit, mixed, tiny, tmp_path, monkeypatch, extra):
    """The code runs as it stands, beside a reference.png; the task is image-to-image."""
    data = tmp_path / "one"
    draw_photo(data / "a.jpg", (96, 64), 0)
    draw_photo(data / "r" / "a.jpg", (96, 64), 1)
    flags = ("--instance_data_dir", data, "--cond_data_dir", data / "r", "--instance_prompt", "make it night")
    folder = edit(*flags, "--max_train_steps", "1", "--num_inference_steps", "2", *extra)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-to-image" in card
    snippets = re.findall(r"^```python\n(.*?)^```$", card, flags=re.S | re.M)
    monkeypatch.chdir(folder.parent)
    shutil.copy(mixed / "references" / "first1.jpg", "reference.png")
    for code in snippets:
        assert "image=[load_image" in code
        exec(compile(code.replace(repr(tiny.name), repr(str(tiny))), "card", "exec"), {})
        with Image.open("image.png") as image:
            assert image.size == ((96, 64) if extra else (80, 64))
        Path("image.png").unlink()
    assert len(snippets) == 2


def test_the_saved_command_line_repeats_the_run_and_leaves_paths_out_of_the_upload(i2i, edit, mixed, tmp_path):
    image = mixed / "references" / "first1.jpg"
    pair = f"{image},{mixed / 'references' / 'second4.jpg'}"
    flags = ("--validation_prompt", "x", "y", "--validation_image", image, pair, "--num_validation_images", "0")
    folder = edit(*flags, "--cond_dropout", "0.3")
    i2i.main(i2i.parse_args([f"@{folder / 'config.args'}", "--output_dir", str(tmp_path / "again")]))
    assert_same_run(folder, tmp_path / "again")
    run = i2i.start_accelerator(i2i.parse_args([f"@{folder / 'config.args'}", "--overwrite_output_dir"]))
    uploaded = i2i.write_config(run, basenames=True)
    assert "--validation_image first1.jpg first1.jpg,second4.jpg\n" in uploaded
    assert str(tmp_path) not in uploaded and str(mixed.parent) not in uploaded
