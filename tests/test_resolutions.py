"""Several sizes in one run: each image at every size that does not enlarge it, each visited equally often."""

from collections import Counter

import pytest
from conftest import draw_photo
from PIL import Image
from runs import assert_same_run, spy
from unit_parts import log_lines, start_run

SIZES = ("--train_resolutions", "96", "32", "64", "64")


@pytest.fixture
def mixed(tmp_path):
    """Three images, whose short sides are 100, 70 and 20 pixels."""
    folder = tmp_path / "mixed"
    for name, size in (("large", (140, 100)), ("middle", (70, 90)), ("small", (20, 30))):
        draw_photo(folder / f"{name}.jpg", size, len(name))
    return folder


def targets(script, tiny, tmp_path, folder, *flags) -> dict[str, list]:
    """The sizes that each image is trained at."""
    samples, _ = script.check_data(start_run(script, tiny, tmp_path, "--instance_data_dir", folder, *flags))
    found: dict[str, list] = {}
    for sample in samples:
        found.setdefault(sample.image.name, []).append(sample.image.target)
    return found


def test_an_image_is_trained_at_each_size_that_does_not_enlarge_it(script, tiny, mixed, tmp_path):
    """One that every size enlarges is trained at the smallest."""
    assert targets(script, tiny, tmp_path, mixed, *SIZES) == {
        "large.jpg": [(32, 32), (64, 64), (96, 96)], "middle.jpg": [(32, 32), (64, 64)], "small.jpg": [(32, 32)]
    }  # fmt: skip


def test_each_size_has_buckets_of_its_own(script, tiny, tmp_path, mixed):
    found = targets(script, tiny, tmp_path, mixed, *SIZES, "--use_aspect_ratio_buckets")["large.jpg"]
    areas = [height * width for height, width in found]
    assert len(found) == 3 and all(height < width for height, width in found) and areas == sorted(areas)


@pytest.mark.e2e
def test_one_size_is_the_run_of_its_resolution(train):
    """And --resolution is then only the size of what is generated."""
    one = train("--train_resolutions", "64", output="one")
    assert_same_run(one, train(output="plain"))


@pytest.mark.parametrize("batch", [1, 2])
def test_every_image_at_every_size_is_visited_equally_often(script, tiny, mixed, tmp_path, batch):
    run = start_run(script, tiny, tmp_path, "--instance_data_dir", mixed, *SIZES)
    samples, _ = script.check_data(run)
    assert script.total_steps(run, len(samples)) == 6
    stream = script.SampleStream([sample.geometry for sample in samples], batch, 0, "instance")
    visits = Counter(index for step in range(60) for index, _ in stream.micro_batch(step))
    assert visits == dict.fromkeys(range(6), 10 * batch)


@pytest.mark.slow
@pytest.mark.scripts("t2i")
def test_class_images_are_generated_at_the_largest_size_and_trained_at_all(t2i, train, mixed, tmp_path, monkeypatch):
    sizes = spy(monkeypatch, t2i, "generate")
    flags = ("--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a toy")
    made = spy(monkeypatch, t2i, "make_streams")
    train("--instance_data_dir", mixed, *SIZES, *flags, "--num_class_images", "1", "--num_inference_steps", "1")
    assert [call.args[5] for call in sizes] == [(96, 96)]
    assert [sample.image.target for sample in made[0].result[0][1].samples] == [(32, 32), (64, 64), (96, 96)]


@pytest.mark.e2e
@pytest.mark.parametrize("cached", [(), ("--cache_latents",)])
def test_a_run_over_several_sizes_learns_at_each_and_resumes_exactly(script, train, mixed, monkeypatch, cached):
    flags = ("--instance_data_dir", mixed, *SIZES, "--seed", "5", "--random_flip", *cached)
    sizes = Counter()

    def batch_losses(run, training, batch, original=script.batch_losses):
        sizes.update(batch["target"])
        assert batch["noise"].shape[1] == batch["target"][0][0] * batch["target"][0][1] // 256
        return original(run, training, batch)

    with monkeypatch.context() as patch, log_lines() as lines:
        patch.setattr(script, "batch_losses", batch_losses)
        whole = train(*flags, "--max_train_steps", "6", output="whole")
    assert sizes == {(32, 32): 3, (64, 64): 2, (96, 96): 1}
    assert any("96 x 96" in line and "1 image(s)" in line for line in lines)
    assert any("6 pairs of image and size x 1 repeats = 6 samples per epoch" in line for line in lines)
    parts = train(*flags, "--max_train_steps", "3", output="parts")
    train(*flags, "--max_train_steps", "6", "--resume_from_checkpoint", "latest", output="parts")
    assert_same_run(whole, parts)
    with pytest.raises(script.UserError, match=r"instance data: has changed \(images, .*sizes\)"):
        more = (*flags, "--train_resolutions", "32", "--max_train_steps", "9")
        train(*more, "--resume_from_checkpoint", "latest", output="parts")


@pytest.mark.e2e
@pytest.mark.scripts("i2i")
def test_an_aligned_reference_has_the_size_of_its_target(script, tiny, mixed, tmp_path):
    """A reference of its own shape keeps it at every size."""
    references = mixed.with_name("references")
    references.mkdir()
    for path in mixed.glob("*.jpg"):
        with Image.open(path) as image:
            image.resize((image.width * 4, image.height * 4)).save(references / path.name)
    flags = ("--instance_data_dir", mixed, "--cond_data_dir", references, *SIZES)
    aligned, _ = script.check_data(start_run(script, tiny, tmp_path, *flags, "--align_cond_image"))
    assert all(sample.references[0].target == sample.image.target for sample in aligned) and len(aligned) == 6
    free, _ = script.check_data(start_run(script, tiny, tmp_path, *flags))
    assert len({(sample.image.name, sample.references[0].target) for sample in free}) == 3


@pytest.mark.e2e
def test_an_image_is_held_out_at_all_of_its_sizes(script, tiny, mixed, tmp_path):
    flags = ("--instance_data_dir", mixed, *SIZES, "--validation_split", "1")
    for seed in range(4):
        samples, held_out = script.check_data(start_run(script, tiny, tmp_path, *flags, "--seed", str(seed)))
        names = [{sample.image.name for sample in part} for part in (samples, held_out)]
        assert len(names[1]) == 1 and not names[0] & names[1] and len(samples) + len(held_out) == 6


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train_resolutions", "64", "100"), "--train_resolutions 100: must be a multiple of 16"),
        (("--resolution", "100"), "--resolution 100: must be a multiple of 16"),
        ((*SIZES, "--aspect_ratio_buckets", "64,64"), "--train_resolutions and --aspect_ratio_buckets: give only one"),
    ],
)
def test_sizes_that_cannot_be_meant_are_refused(script, tiny, mixed, capsys, flags, said):
    words = ("--pretrained_model_name_or_path", tiny, "--instance_data_dir", mixed, *flags)
    with pytest.raises(SystemExit):
        script.parse_args([*map(str, words)])
    assert said in capsys.readouterr().err
