"""tools/preview.py: the sheet shows what the training sees, in its order, and nothing is loaded for it."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from PIL import Image, ImageOps
from runs import forbid, spy

import preview  # isort: skip  (tools/, which conftest puts on the path)

FLAGS = ("--random_flip", "--use_aspect_ratio_buckets", "--caption_dropout", "0.3", "--train_batch_size", "2")


@pytest.fixture
def words(script, tiny, photos, reference_flags, reference_dropout, tmp_path, monkeypatch) -> list[str]:
    """A training's flags; the tool's change to the script is undone after the test."""
    monkeypatch.setattr(script.TensorCache, "get", script.TensorCache.get)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, *reference_flags, *FLAGS]
    words += ["--output_dir", tmp_path / "out", "--instance_prompt", "a photo of sks toy", "--resolution", "64"]
    return [str(word) for word in [*words, *reference_dropout, "--seed", "0"]]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--cache_latents",)])
def test_the_visits_are_those_of_the_training_to_the_pixel(script, train, words, reference_dropout, flags, monkeypatch):
    get, calls = script.TensorCache.get, spy(monkeypatch, script, "batch_losses")
    encoded = spy(monkeypatch, script, "encode_pixels")
    train(*FLAGS, *reference_dropout, *flags, "--max_train_steps", "4")
    trained = [{key: value[row] for key, value in call.args[2].items()} for call in calls for row in range(2)]
    forbid(monkeypatch, script, "load_vae", "load_text_encoder", "load_transformer")
    run, shown, listed = preview.visits(script, [*words, *flags], len(trained))
    monkeypatch.setattr(script.TensorCache, "get", get)
    assert len(shown) == 8 and len({visit["name"] for visit in shown}) > 2 and len(listed) == 5
    for visit, real in zip(shown, trained, strict=True):
        assert all(visit[key] == real[key] for key in ("name", "position", "caption", "target"))
        assert len(visit.get("references", [])) == len(real.get("references", []))
        for own, other in zip(
            [visit["pixels"], *visit.get("references", [])],
            [real.get("pixels", real.get("moments")), *real.get("references", [])],
            strict=True,
        ):
            if flags:  # cached: these pixels are among those that were encoded
                assert any(torch.equal(own, one) for call in encoded for one in call.args[1] if one.shape == own.shape)
            else:
                assert torch.equal(own, other)


def test_the_command_writes_the_sheet_with_everything_that_a_row_has(script, words, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    name = str(ROOT / f"{script.__name__}.py")
    preview.main([name, *words, "--out", str(out), "--count", "3", "--side", "64"])
    assert f"{out}: 3 visits of 5 images" in capsys.readouterr().out
    images = 3 if script.TASK == "image-to-image" else 2
    with Image.open(out) as sheet:
        assert sheet.width == preview.TEXT_WIDTH * 8 + 2 * preview.GAP + images * (64 + preview.GAP)
    assert not (tmp_path / "out" / "metrics.jsonl").exists() and not (tmp_path / "out" / "config.args").exists()


def test_masks_go_with_crop_and_mirroring(script, words, photos, tmp_path, monkeypatch):
    """The left half of each image is learned: in the sheet what is pale is its left half, wherever that went."""
    folder = Path(shutil.copytree(photos, tmp_path / "masked"))
    for path in folder.glob("*.jpg"):
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
        half = Image.new("RGB", upright.size, "blue")
        half.paste("red", (0, 0, upright.width // 2, upright.height))
        mask = Image.new("L", upright.size)
        mask.paste(255, (0, 0, upright.width // 2, upright.height))
        half.save(path, quality=95)
        mask.save(path.with_name(f"{path.stem}-mask.png"))
    words[words.index("--instance_data_dir") + 1] = str(folder)
    run, shown, listed = preview.visits(script, [*words, "--mask_suffix=-mask"], 8)
    for visit in shown:
        trained, (title, image) = preview.to_image(visit["pixels"]), preview.cells(run, visit, listed)[2]
        assert title == "weight of the loss"
        for x in range(8, trained.width, 16):
            row = [trained.getpixel((place, 8)) for place in (x - 8, x + 7)]
            if all(red > 200 for red, _, _ in row):
                assert image.getpixel((x, 8))[0] > 200 and image.getpixel((x, 8))[2] < 60
            elif all(blue > 200 for *_, blue in row):
                assert image.getpixel((x, 8)) == (255, 0, 255)


def test_the_weight_of_a_token_is_shown_in_the_place_of_its_pixels():
    class Run:
        token_size = 16

    listed = {"x": type("Listed", (), {"decoded": lambda self: Image.new("RGB", (40, 40))})()}
    visit = {"name": "x", "pixels": torch.zeros(3, 32, 48), "weights": torch.tensor([1.0, 0, 0, 0, 0, 2.0])}
    title, shown = preview.cells(Run, visit, listed)[2]
    colours = [shown.getpixel((16 * column + 8, 16 * row + 8)) for row in range(2) for column in range(3)]
    assert title == "weight of the loss" and shown.size == (48, 32)
    assert colours[5] == (128, 128, 128) and colours[1:5] == [(255, 0, 255)] * 4 and colours[0] not in colours[1:]


def test_mistakes_are_told_in_one_line(script, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        preview.main(["--count", "3"])
    assert "error: give the training script first, such as train_dream" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    place = words.index("--instance_data_dir") + 1
    words[place] = str(tmp_path / "empty")
    with pytest.raises(SystemExit, match=r"^error: .*empty"):
        preview.main([str(ROOT / f"{script.__name__}.py"), *words, "--out", str(tmp_path / "sheet.png")])
    assert not (tmp_path / "sheet.png").exists()
