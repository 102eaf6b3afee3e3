"""Loss masks: which file is whose mask, what a token weighs, and that only what is white is learned."""

import pytest
import torch
from PIL import Image, ImageOps
from runs import column, metrics
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
    words = {"black": "black all over", "size": f"is {width + 1} x {height}, the image", "damaged": "truncated"}[fault]
    run = start_run(script, tiny, tmp_path, "--instance_data_dir", masked, *MASKS)
    with pytest.raises(script.UserError, match=words) as refusal:
        script.check_data(run)
    assert path.stem.removesuffix("-mask") in str(refusal.value)


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
