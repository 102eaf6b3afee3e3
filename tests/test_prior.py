"""Prior preservation on the tiny model, in this process: the class images and the two-mean loss."""

import shutil

import numpy as np
import pytest
import torch
from conftest import draw_photo
from PIL import Image
from runs import (
    LORA,
    around_updates,
    assert_close_runs,
    assert_same_run,
    column,
    files_of,
    forbid,
    lora,
    metrics,
    sha256,
    spy,
)

# Class images are the text-to-image script's alone.
pytestmark = [pytest.mark.e2e, pytest.mark.scripts("t2i")]

COUNT = 4


@pytest.fixture
def quick(train, cache):
    """`train` with the shared cache; `class_dir` switches prior preservation on."""

    def start(*flags, class_dir=None, output="out"):
        prior = ()
        if class_dir:
            prior = ("--with_prior_preservation", "--class_data_dir", class_dir, "--class_prompt", "a photo of a toy")
            prior += ("--num_class_images", COUNT, "--sample_batch_size", "3", "--num_inference_steps", "2")
        return train("--latents_cache_dir", cache, "--max_train_steps", "2", *prior, *flags, output=output)

    return start


@pytest.fixture(scope="module")
def ready(script, tiny, photos, cache, tmp_path_factory):
    """Four class images that a run has generated. Read-only: copy them to change them."""
    from runs import command_line

    folder = tmp_path_factory.mktemp("prior")
    flags = ("--seed", "0", "--max_train_steps", "1", "--latents_cache_dir", cache, "--with_prior_preservation")
    flags += ("--class_data_dir", folder / "class", "--class_prompt", "a photo of a toy", "--num_class_images", COUNT)
    flags += ("--sample_batch_size", "3", "--num_inference_steps", "2")
    script.main(script.parse_args(command_line(tiny, photos, folder / "out", *flags)))
    return folder / "class"


@pytest.fixture
def class_dir(ready, tmp_path):
    """A copy of the generated class images."""
    return shutil.copytree(ready, tmp_path / "class")


def pixels(path) -> np.ndarray:
    """The RGB values of an image, (H, W, 3); nothing of its header."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def instance_and_class(calls) -> tuple[list, list]:
    """The recorded `batch_losses` calls, which alternate between an instance and a class batch."""
    batches = [(call.args[2], call.result[0]) for call in calls]
    return batches[0::2], batches[1::2]


def test_class_images_are_generated_the_same_way_every_time(quick, ready, tmp_path):
    """As many as asked, at the training size, different from each other, the same bytes from the same seed."""
    quick(class_dir=tmp_path / "again")
    names = [f"class-{number:05d}.png" for number in range(COUNT)]
    assert sorted(path.name for path in ready.iterdir()) == names == sorted(files_of(tmp_path / "again"))
    assert [sha256(ready / name) for name in names] == [sha256(tmp_path / "again" / name) for name in names]
    assert len({sha256(ready / name) for name in names}) == COUNT
    assert {pixels(ready / name).shape for name in names} == {(64, 64, 3)}


@pytest.mark.parametrize("flags", [("--dry_run",), ()])
def test_class_images_that_were_drawn_from_another_prompt_are_refused_at_the_start(script, quick, class_dir, flags):
    """They would be trained on as what they do not show; your own images know no prompt."""
    with pytest.raises(
        script.UserError, match="class-00000.png was generated from 'a photo of a toy', not from .* '一 cat'"
    ):
        quick("--class_prompt", "一 cat", *flags, class_dir=class_dir)
    for path in class_dir.glob("*.png"):
        Image.fromarray(pixels(path)).save(path)
    quick("--class_prompt", "一 cat", "--dry_run", class_dir=class_dir)


def test_only_missing_class_images_are_generated_again(script, quick, class_dir, ready, monkeypatch):
    """Two deleted images come back as they were; the others are not touched, and a full folder loads no pipeline."""
    gone = ["class-00001.png", "class-00003.png"]
    for name in gone:
        (class_dir / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in class_dir.iterdir()}
    calls = spy(monkeypatch, script, "generate")
    quick(class_dir=class_dir)
    assert [seed for call in calls for seed in call.args[4]] == [("class picture", 1), ("class picture", 3)]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in gone:
        before, after = (pixels(folder / name).astype(int) for folder in (ready, class_dir))
        assert np.abs(before - after).max() <= 1  # another batch size may round differently
    calls.clear()
    loads = spy(monkeypatch, script, "load_transformer")
    quick(class_dir=class_dir, output="full")
    assert calls == [] and len(loads) == 1


def test_generation_that_was_cut_short_goes_on_where_it_stopped(script, quick, ready, tmp_path, monkeypatch):
    """Whole images only are left behind, and the next start draws the rest."""
    folder, done = tmp_path / "class", []

    def fail_late(*args, original=script.generate):
        done.append(args[4])
        if len(done) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "generate", fail_late)
        with pytest.raises(KeyboardInterrupt):
            quick(class_dir=folder)
    assert files_of(folder) == {f"class-{number:05d}.png" for number in range(3)}
    calls = spy(monkeypatch, script, "generate")
    quick(class_dir=folder, output="second")
    assert [seed for call in calls for seed in call.args[4]] == [("class picture", 3)]
    for number in range(3):
        assert sha256(folder / f"class-{number:05d}.png") == sha256(ready / f"class-{number:05d}.png")


def test_own_class_images_are_used_and_only_the_rest_is_generated(script, quick, tmp_path, monkeypatch):
    """Three photographs of the user's and one generated image make four, each seen once in four steps."""
    folder = tmp_path / "class"
    for number in range(3):
        draw_photo(folder / f"mine-{number}.jpg", (80, 80), seed=50 + number)
    before = {path.name: sha256(path) for path in folder.iterdir()}
    generated, calls = spy(monkeypatch, script, "generate"), spy(monkeypatch, script, "batch_losses")
    quick("--max_train_steps", "4", class_dir=folder)
    assert sum(len(call.args[4]) for call in generated) == 1
    assert {name: sha256(folder / name) for name in before} == before
    _, class_batches = instance_and_class(calls)
    seen = sorted(name for batch, _ in class_batches for name in batch["name"])
    assert seen == ["class-00000.png", "mine-0.jpg", "mine-1.jpg", "mine-2.jpg"]


def test_a_round_uses_every_class_image_once_with_the_class_prompt(script, quick, class_dir, monkeypatch):
    """Four class images in batches of two: two steps, beside instance batches on their own stream."""
    calls = spy(monkeypatch, script, "batch_losses")
    quick("--train_batch_size", "2", class_dir=class_dir)
    instance, classes = instance_and_class(calls)
    assert sorted(name for batch, _ in classes for name in batch["name"]) == sorted(p.name for p in class_dir.iterdir())
    assert {caption for batch, _ in classes for caption in batch["caption"]} == {"a photo of a toy"}
    assert {caption for batch, _ in instance for caption in batch["caption"]} == {"a photo of sks toy"}
    for (ours, _), (theirs, _) in zip(instance, classes, strict=True):
        assert not torch.equal(ours["noise"], theirs["noise"])


def test_the_loss_is_the_instance_mean_plus_the_weighted_class_mean(script, quick, class_dir, monkeypatch):
    """What is logged and what is differentiated equals the two-mean formula, also over accumulated batches."""
    calls = spy(monkeypatch, script, "batch_losses")
    flags = ("--cache_latents", "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    folder = quick(*flags, "--prior_loss_weight", "2.5", class_dir=class_dir)
    instance, classes = instance_and_class(calls)
    for step, line in enumerate(metrics(folder)):
        ours, theirs = (
            torch.cat([losses.detach() for _, losses in side[2 * step : 2 * step + 2]]) for side in (instance, classes)
        )
        assert len(ours) == len(theirs) == 4
        assert line["loss"] == pytest.approx((ours.mean() + 2.5 * theirs.mean()).item(), rel=1e-6)


def test_loss_and_gradient_are_linear_in_the_prior_weight(script, quick, class_dir, monkeypatch):
    """Weight w adds w times the class part to what a run without prior preservation has."""
    gradients = {}

    def keep(training):
        flat = torch.cat([p.grad.flatten() for name, p in training.parameters.items() if "lora_B" in name])
        gradients.setdefault(current, flat.clone())

    around_updates(monkeypatch, script, before=keep)
    runs = {}
    for weight in (1.0, 3.0):
        current = weight
        flags = ("--cache_latents", "--max_grad_norm", "1e9", "--prior_loss_weight", weight)
        runs[weight] = quick(*flags, class_dir=class_dir, output=f"weight-{weight}")
    current = 0.0
    runs[0.0] = quick("--cache_latents", "--max_grad_norm", "1e9", output="alone")
    base, one, three = (column(runs[weight], "loss")[0] for weight in (0.0, 1.0, 3.0))
    assert one > base and three - base == pytest.approx(3 * (one - base), rel=1e-5)
    torch.testing.assert_close(
        gradients[3.0] - gradients[0.0], 3 * (gradients[1.0] - gradients[0.0]), rtol=1e-4, atol=1e-5
    )
    assert gradients[1.0].sub(gradients[0.0]).norm() > 0.1 * gradients[0.0].norm()


def test_a_resumed_run_with_prior_preservation_equals_an_uninterrupted_one(quick, class_dir, tmp_path):
    """The stream of class images goes on where it was."""
    flags = ("--cache_latents", "--max_train_steps", "4", "--checkpointing_steps", "2")
    whole = quick(*flags, class_dir=class_dir, output="whole")
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / LORA).unlink()
    quick(*flags, "--resume_from_checkpoint", "latest", class_dir=class_dir, output="resumed")
    assert_same_run(whole, resumed)


def test_another_weight_of_the_class_is_refused_by_name_on_resuming(script, quick, class_dir):
    """What bends the rest of the run is part of the run's fingerprint."""
    quick("--checkpointing_steps", "1", class_dir=class_dir)
    with pytest.raises(script.UserError, match="prior_loss_weight"):
        quick("--prior_loss_weight", "0.5", "--resume_from_checkpoint", "checkpoint-1", class_dir=class_dir)


def test_a_run_with_class_images_is_not_resumed_without_them(script, quick, class_dir):
    quick("--checkpointing_steps", "1", class_dir=class_dir)
    with pytest.raises(script.UserError, match="with_prior_preservation: was True, is False"):
        quick("--resume_from_checkpoint", "checkpoint-1")


def test_a_bad_class_image_is_refused_before_anything_is_encoded(script, quick, class_dir, monkeypatch):
    (class_dir / "mine.png").write_bytes(b"no image")
    forbid(monkeypatch, script, "begin_output")
    with pytest.raises(script.UserError, match=r"mine\.png: not an image"):
        quick(class_dir=class_dir)


def test_the_class_folder_cannot_hold_the_instance_images(script, photos, tmp_path, capsys):
    """They would be trained on as images of the class."""
    data = shutil.copytree(photos, tmp_path / "data" / "dog")
    words = f"--pretrained_model_name_or_path tiny_flux2 --instance_prompt x --instance_data_dir {data}".split()
    words += f"--with_prior_preservation --class_prompt dog --class_data_dir {data.parent}".split()
    with pytest.raises(SystemExit):
        script.parse_args(words)
    assert "in or above a data folder" in capsys.readouterr().err


def test_class_images_have_the_most_square_of_the_buckets(quick, tmp_path):
    flags = ("--aspect_ratio_buckets", "32,96;64,64;96,32", "--num_inference_steps", "1")
    quick(*flags, class_dir=tmp_path / "new")
    assert {pixels(path).shape for path in (tmp_path / "new").glob("*.png")} == {(64, 64, 3)}


def test_cached_class_images_train_like_uncached_ones(quick, class_dir):
    """--cache_latents covers the class images as well."""
    flags = ("--center_crop", "--adam_epsilon", "1e-3")
    plain = quick(*flags, class_dir=class_dir, output="plain")
    assert_close_runs(plain, quick(*flags, "--cache_latents", class_dir=class_dir, output="cached"))


def test_class_images_can_be_generated_in_another_precision_than_training(script, quick, tmp_path, monkeypatch):
    """--prior_generation_precision bf16 draws with a bf16 base and trains on the fp32 one."""
    loads = spy(monkeypatch, script, "load_transformer")
    folder = quick("--prior_generation_precision", "bf16", class_dir=tmp_path / "class")
    assert [call.result.dtype for call in loads] == [torch.bfloat16, torch.float32]
    assert len(files_of(tmp_path / "class")) == COUNT
    assert {tensor.dtype for tensor in lora(folder).values()} == {torch.float32}


def test_the_bare_base_model_draws_the_class_images(script, quick, ready, tmp_path, monkeypatch):
    """Images drawn for a run with --init_lora_from are those of the base model, in evaluation mode."""
    modes = []

    def look(run, codec, pipeline, *rest, original=script.generate):
        names = [name for name, _ in pipeline.transformer.named_modules()]
        modes.append((pipeline.transformer.training, any("lora" in name for name in names)))
        return original(run, codec, pipeline, *rest)

    first = quick("--learning_rate", "1e-1", output="first")
    monkeypatch.setattr(script, "generate", look)
    quick("--init_lora_from", first / "pytorch_lora_weights.safetensors", class_dir=tmp_path / "class", output="second")
    assert modes == [(False, False)] * 2
    assert sha256(tmp_path / "class" / "class-00000.png") == sha256(ready / "class-00000.png")


def test_the_loss_by_sigma_is_that_of_the_samples_without_the_weight_of_their_class(script):
    """A class sample of weight 0.5 counts in full, one of weight 0 was not trained on and counts not at all."""
    found = script.loss_by_sigma([2.0, 1.0, 0.0], [0.31, 0.35, 0.39], [1.0, 0.5, 0.0])
    assert found == {"loss_sigma_0.3": 2.0}
    assert script.loss_by_sigma([0.0], [0.99], [0.0]) == {}
