"""Loss masks: which file is whose mask, what a token weighs, and that only what is white is learned."""

import logging

import pytest
import torch
from datasets import Dataset
from datasets import Image as DatasetImage
from PIL import Image, ImageOps
from runs import column, metrics, trajectory
from unit_parts import log_lines, start_run, training_set

pytestmark = pytest.mark.e2e

MASKS = ("--mask_suffix=-mask",)


@pytest.fixture
def masked(photos, tmp_path):
    """The photos with masks whose left half is white; `masked(name=image)` replaces one."""
    folder = tmp_path / "masked"
    folder.mkdir()
    for path in sorted(path for path in photos.glob("*.*") if path.is_file()):
        (folder / path.name).write_bytes(path.read_bytes())
        if path.suffix in (".jpg", ".png"):
            with Image.open(path) as image:
                mask = Image.new("L", ImageOps.exif_transpose(image).size, 0)
            mask.paste(255, (0, 0, mask.width // 2, mask.height))
            mask.save(folder / f"{path.stem}-mask.png")
    return folder


def visits(script, tiny, tmp_path, folder, *flags, count=6):
    """The first visits of the training set over the folder."""
    run = start_run(script, tiny, tmp_path, "--instance_data_dir", folder, *MASKS, *flags)
    samples, _ = script.check_data(run)
    return [training_set(script, run, samples)[position % len(samples), position] for position in range(count)]


def test_a_token_weighs_its_share_of_the_mask_and_the_mean_is_one(script, tiny, masked, tmp_path):
    """64 x 64 pixels are 4 x 4 tokens: two white columns, two black ones."""
    for visit in visits(script, tiny, tmp_path, masked, "--resolution", "64", "--center_crop"):
        assert torch.allclose(visit["weights"].view(4, 4), torch.tensor([2.0, 2.0, 0.0, 0.0]).expand(4, 4), atol=0.08)
    for visit in visits(script, tiny, tmp_path, masked, "--resolution", "64", "--unmasked_weight", "0.5"):
        row = visit["weights"].view(4, 4)[0]
        assert visit["weights"].mean() == pytest.approx(1.0) and row[0] / row[3] == pytest.approx(2.0, rel=0.02)


def test_the_mask_follows_crop_and_flip_of_its_image(script, tiny, tmp_path):
    """An image that is its own mask: the weights are the brightness of each token's pixels."""
    folder = tmp_path / "own"
    folder.mkdir()
    image = Image.effect_noise((160, 96), 80).resize((10, 6)).resize((160, 96), Image.Resampling.NEAREST)
    for name in ("a.png", "a-mask.png"):
        image.save(folder / name)
    shown = visits(script, tiny, tmp_path, folder, "--resolution", "64", "--random_flip", count=12)
    for visit in shown:
        brightness = torch.nn.functional.avg_pool2d(visit["pixels"][None, 0] / 2 + 0.5, 16).flatten()
        assert torch.allclose(visit["weights"], brightness / brightness.mean(), atol=1e-5)
    assert len({tuple(visit["weights"].tolist()) for visit in shown}) > 6


def test_only_errors_under_the_mask_count(script, tiny, masked, train):
    """With all of the weight on the left half, the loss is twice the mean over the left tokens' share."""
    seen = []

    def batch_losses(run, training, batch, original=script.batch_losses):
        losses, sigmas = original(run, training, batch)
        plain = original(run, training, {key: value for key, value in batch.items() if key != "weights"})[0]
        mirrored = original(run, training, {**batch, "weights": 2 - batch["weights"]})[0]
        seen.append((losses.item() + mirrored.item(), 2 * plain.item()))
        return losses, sigmas

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "batch_losses", batch_losses)
        train("--instance_data_dir", masked, *MASKS, "--max_train_steps", "3", "--lora_dropout", "0")
    assert len(seen) == 3 and all(both == pytest.approx(whole, rel=1e-4) for both, whole in seen)


def test_cached_latents_have_the_weights_of_their_centre_crop(train, masked):
    flags = ("--instance_data_dir", masked, *MASKS, "--max_train_steps", "3", "--seed", "1")
    folders = train(*flags, "--center_crop", output="plain"), train(*flags, "--cache_latents", output="cached")
    plain, cached = (column(folder, "loss") for folder in folders)
    assert plain == pytest.approx(cached, rel=1e-5)
    assert plain != pytest.approx(column(train(*flags[:2], *flags[3:], "--center_crop", output="no"), "loss"), rel=1e-3)


def test_masks_are_no_images_and_an_image_without_one_counts_as_a_whole(script, tiny, masked, tmp_path):
    sorted(masked.glob("*-mask.png"))[0].unlink()
    run = start_run(script, tiny, tmp_path, "--instance_data_dir", masked, *MASKS, "--resolution", "64")
    with log_lines() as lines:
        samples, _ = script.check_data(run)
    count = len(samples)
    assert not any("mask" in sample.image.name for sample in samples)
    assert any(f"{count - 1} of {count} images have a mask" in line for line in lines)
    assert not any("not used" in line or "look like masks" in line for line in lines)
    bare = next(index for index, sample in enumerate(samples) if sample.image.mask is None)
    assert torch.equal(training_set(script, run, samples)[bare, 0]["weights"], torch.ones(16))


@pytest.fixture
def cut_out(photos, tmp_path):
    """The first three photos as PNG: two whose right half is transparent, one opaque; and the same with mask files."""
    alpha, masks = tmp_path / "alpha", tmp_path / "masks"
    alpha.mkdir(), masks.mkdir()
    for number, path in enumerate(sorted(photos.glob("*.jpg"))[:3]):
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
        mask = Image.new("L", image.size, 255)
        mask.paste(0 if number < 2 else 255, (image.width // 2, 0, image.width, image.height))
        clear = image.copy()
        clear.putalpha(mask)
        (clear if number < 2 else image).save(alpha / f"{path.stem}.png")
        Image.composite(image, Image.new("RGB", image.size, "white"), mask).save(masks / f"{path.stem}.png")
        mask.save(masks / f"{path.stem}-mask.png")
    return alpha, masks


@pytest.mark.parametrize("cached", [(), ("--cache_latents",)])
def test_transparency_as_the_mask_trains_like_the_same_mask_in_files(train, cut_out, cached):
    alpha, masks = cut_out
    more = ("--random_flip", "--max_train_steps", "6", *cached)
    with log_lines() as lines:
        first = train("--instance_data_dir", alpha, "--alpha_as_mask", *more, output="first")
    assert any("2 of 3 images have a mask" in line for line in lines)
    assert trajectory(first) == trajectory(train("--instance_data_dir", masks, *MASKS, *more, output="second"))
    plain = train("--instance_data_dir", alpha, *more, output="third")
    assert column(plain, "loss") != pytest.approx(column(first, "loss"), rel=1e-3)


def test_transparency_is_read_from_a_data_set_too(script, tiny, cut_out, tmp_path):
    data = Dataset.from_dict({"image": [str(path) for path in sorted(cut_out[0].iterdir())]})
    data.cast_column("image", DatasetImage()).save_to_disk(tmp_path / "set")
    run = start_run(script, tiny, tmp_path, "--dataset_name", tmp_path / "set", "--alpha_as_mask")
    samples, _ = script.check_data(run)
    weights = [training_set(script, run, samples)[index, index]["weights"] for index in range(3)]
    assert weights[0].std() > 0.1 and torch.equal(weights[2], torch.ones(16))


def test_an_image_that_is_clear_all_over_is_refused_by_name(script, tiny, tmp_path):
    Image.new("RGBA", (80, 64), (200, 10, 10, 0)).save((tmp_path / "no-data").mkdir() or tmp_path / "no-data/ghost.png")
    run = start_run(script, tiny, tmp_path, "--alpha_as_mask")
    with pytest.raises(
        script.UserError, match=r"1 mask\(s\) are black or clear all over: ghost\.png; change or remove them"
    ):
        script.check_data(run)
    assert script.check_data(start_run(script, tiny, tmp_path, "--alpha_as_mask", "--unmasked_weight", "0.1"))


def test_a_mask_file_and_transparency_are_not_mixed(script, tiny, photos, capsys):
    words = ("--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, *MASKS, "--alpha_as_mask")
    with pytest.raises(SystemExit):
        script.parse_args([*map(str, words)])
    assert "--mask_suffix and --alpha_as_mask: give only one of them" in capsys.readouterr().err


@pytest.mark.scripts("i2i")
@pytest.mark.parametrize("fault", ["black", "size", "damaged"])
def test_a_mask_that_cannot_be_meant_is_refused_by_name(script, tiny, masked, tmp_path, fault):
    path = sorted(masked.glob("*-mask.png"))[1]
    with Image.open(path) as mask:
        width, height = mask.size
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:60])
    else:
        Image.new("L", (width + (fault == "size"), height), 0).save(path)
    words = {
        "black": "black or clear all over",
        "size": f"is {width + 1} x {height}, the image",
        "damaged": "truncated",
    }[fault]
    run = start_run(script, tiny, tmp_path, "--instance_data_dir", masked, *MASKS)
    with pytest.raises(script.UserError, match=words) as refusal:
        script.check_data(run)
    assert path.stem.removesuffix("-mask") in str(refusal.value)


@pytest.mark.parametrize("flags", [("--center_crop",), ("--cache_latents",), ()])
@pytest.mark.parametrize(
    ("shape", "left", "shown"), [((128, 64), 0, False), ((128, 64), 40, True), ((64, 128), 0, False)]
)
def test_a_mask_that_the_centre_crop_leaves_out_is_refused_by_name(script, tiny, tmp_path, flags, shape, left, shown):
    """Nothing would be learned from the image, in silence; a random crop meets the mask now and then."""
    folder = tmp_path / "no-data"
    folder.mkdir()
    Image.new("RGB", shape, "red").save(folder / "dog.png")
    mask = Image.new("L", shape, 0)
    mask.paste(255, (left, left, left + 24, left + 24))
    mask.save(folder / "dog-mask.png")
    run = start_run(script, tiny, tmp_path, *MASKS, "--resolution", "64", *flags)
    if shown or not flags:
        assert script.check_data(run)[0][0].image.shows_mask(bool(flags))
        return
    with pytest.raises(script.UserError, match=r"1 mask\(s\) are black or clear in the centre crop: dog\.png"):
        script.check_data(run)
    assert script.check_data(start_run(script, tiny, tmp_path, *MASKS, *flags, "--unmasked_weight", "0.1"))


def test_of_two_masks_the_same_one_is_taken_at_every_start_and_the_other_is_named(script, tiny, masked, tmp_path):
    path = sorted(masked.glob("*-mask.png"))[0]
    Image.open(path).save(path.with_suffix(".webp"))
    with log_lines() as lines:
        samples, _ = script.check_data(start_run(script, tiny, tmp_path, "--instance_data_dir", masked, *MASKS))
    assert samples[0].image.mask.path.suffix == ".webp" and any("1 .png file(s) not used" in line for line in lines)


def test_a_mask_is_found_by_a_name_of_another_case_or_unicode_form(script, tiny, masked, tmp_path):
    """As captions are: archives from other systems change both."""
    first, second = sorted(masked.glob("*-mask.png"))[:2]
    first.rename(first.with_stem(f"{first.stem.removesuffix('-mask').upper()}-mask"))
    image = next(path for path in masked.glob(f"{second.stem.removesuffix('-mask')}.*") if path.suffix != ".txt")
    image.rename(image.with_stem("caf\u00e9"))
    second.rename(second.with_stem("cafe\u0301-mask"))
    samples, _ = script.check_data(start_run(script, tiny, tmp_path, "--instance_data_dir", masked, *MASKS))
    assert all(sample.image.mask for sample in samples)


def test_a_suffix_that_is_a_whole_name_makes_no_mask(script, tiny, masked, tmp_path):
    flags = ("--instance_data_dir", masked, "--mask_suffix=-mask")
    (masked / "-mask.png").write_bytes(sorted(masked.glob("*-mask.png"))[0].read_bytes())
    samples, _ = script.check_data(start_run(script, tiny, tmp_path, *flags))
    assert sum(sample.image.mask is None for sample in samples) == 1


def test_a_suffix_without_any_mask_is_a_warning(script, tiny, photos, tmp_path):
    run = start_run(script, tiny, tmp_path, "--instance_data_dir", photos, "--mask_suffix=-none")
    with log_lines(logging.WARNING) as lines:
        script.check_data(run)
    assert any("0 of 5 images have a mask" in line for line in lines)


@pytest.mark.scripts("i2i")
def test_another_mask_is_another_run(script, train, masked):
    flags = ("--instance_data_dir", masked, *MASKS, "--checkpointing_steps", "1")
    folder = train(*flags, "--max_train_steps", "1")
    path = sorted(masked.glob("*-mask.png"))[0]
    with Image.open(path) as mask:
        Image.new("L", mask.size, 255).save(path)
    with pytest.raises(script.UserError, match="instance"):
        train(*flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert len(metrics(folder)) == 1
