"""References of the image-to-image script: prepared, encoded and placed as the installed pipelines do at inference."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import draw_photo, draw_photos
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image, ImageDraw, ImageOps
from unit_parts import caption_of, log_lines, losses_of, predict, start_run, training_set

FAMILIES = ("dev", "klein")
# (width, height) of references: odd, at the limits of the pipelines, above 1 MP, exactly 1 MP.
ODD_SIZES = {
    "square": (64, 64),
    "eight to one": (512, 64),
    "one to eight": (64, 512),
    "odd": (777, 333),
    "exactly one megapixel": (1024, 1024),
    "a little above": (1025, 1024),
    "a photograph": (4000, 3000),
}


@pytest.fixture(scope="module")
def models(tiny, tiny_klein) -> dict:
    """The model folders by family."""
    return {"dev": tiny, "klein": tiny_klein}


def noise_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image of (width, height) with detail everywhere: any shift or second resize shows."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(1, size[1] // 4), max(1, size[0] // 4), 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def reference_of(i2i, run, path: Path):
    """The `Reference` that the script makes of a file."""
    image = i2i.Image(path.name, path)
    return i2i.as_reference(i2i.inspect_images([image], run.cache_dir)[0][image], run.token_size, None)


def arguments(i2i, *flags):
    """The parsed command line without its checks."""
    return i2i.build_parser().parse_args([str(word) for word in flags])


# -------------------------------------------------------------------------------------------- parity with the pipelines


def pipeline_inputs(i2i, run, vae, images: list[Image.Image], family: str) -> list[dict]:
    """Every input that the installed pipeline gives the transformer for these reference images, size 48 x 80."""
    calls = []
    transformer = i2i.load_transformer(run).eval()
    transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True)
    pipeline = i2i.make_pipeline(run, transformer, vae)
    generator = torch.Generator().manual_seed(0)
    options = {"negative_prompt_embeds": torch.zeros(1, 8, 96, dtype=run.dtype)} if family == "klein" else {}
    pipeline(
        image=images,
        prompt_embeds=torch.randn(1, 8, 96, generator=generator).to(run.dtype),
        height=48,
        width=80,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
        **options,
    )
    return calls


def check_parity(i2i, run, paths: list[Path], family: str) -> None:
    """Tokens and ids of the references are those that the pipeline feeds the transformer, with a difference of 0."""
    codec, vae = i2i.LatentCodec(run), i2i.load_vae(run)
    training = SimpleNamespace(codec=codec, vae_on_device=lambda run: vae, rest_vae=lambda args: None)
    references = [reference_of(i2i, run, path) for path in paths]
    ours = i2i.encode_references(run, training, [[reference.pixels() for reference in references]])
    images = [i2i.decode_image(path.read_bytes()) for path in paths]
    (theirs,) = pipeline_inputs(i2i, run, vae, images, family)
    tokens, ids = (torch.cat(part, dim=1) for part in zip(*ours, strict=True))
    assert torch.equal(ids[0], theirs["img_ids"][0, 15:])
    difference = (tokens.to(run.dtype) - theirs["hidden_states"][:, 15:]).abs().max()
    assert tokens.shape == theirs["hidden_states"][:, 15:].shape and difference == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD_SIZES)
def test_a_reference_of_any_size_gives_the_pipelines_tokens_and_ids(i2i, tiny, tmp_path, name):
    """From the decoded image on: area cap, floor to whole tokens, centre crop, encoding, normalisation, packing."""
    path = tmp_path / "reference.png"
    noise_image(ODD_SIZES[name]).save(path)
    check_parity(i2i, start_run(i2i, tiny, tmp_path), [path], "dev")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_references_of_different_sizes_give_the_pipelines_tokens_and_ids(
    i2i, models, family, precision, tmp_path
):
    """T is 10, 20, 30, each with rows and columns of its own from 0."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, size in zip(paths, ((96, 64), (70, 140), (200, 90)), strict=True):
        noise_image(size).save(path)
    check_parity(i2i, start_run(i2i, models[family], tmp_path, "--mixed_precision", precision), paths, family)


@pytest.mark.parametrize("kind", ["grey", "turned by EXIF", "transparent", "palette"])
def test_a_reference_is_decoded_by_us_before_the_pipelines_rules_apply(i2i, tiny, tmp_path, kind):
    """Upright, in RGB, on white: the pipeline alone would resize first and ignore EXIF."""
    path, image = tmp_path / "reference.png", noise_image((300, 180))
    if kind == "turned by EXIF":
        path = draw_photo(tmp_path / "reference.jpg", (300, 180), 0, exif_orientation=6)
        assert i2i.decode_image(path.read_bytes()).size == (180, 300)
    elif kind == "transparent":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    else:
        image.convert("L" if kind == "grey" else "P").save(path)
    check_parity(i2i, start_run(i2i, tiny, tmp_path), [path], "dev")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prediction_with_references_is_what_the_denoising_call_computes(i2i, models, family, precision, tmp_path):
    """Same noise, sigma, prompt and two references: the velocity of the target's tokens differs by exactly 0."""
    run = start_run(i2i, models[family], tmp_path, "--mixed_precision", precision)
    codec, vae, outputs = i2i.LatentCodec(run), i2i.load_vae(run), []
    transformer = i2i.load_transformer(run).eval()
    hook = transformer.register_forward_hook(
        lambda _, args, kwargs, output: outputs.append((dict(kwargs), output[0])), with_kwargs=True
    )
    images = [noise_image((96, 64), 1), noise_image((64, 128), 2)]
    pipeline = i2i.make_pipeline(run, transformer, vae)
    options = {"negative_prompt_embeds": torch.zeros(1, 8, 96, dtype=run.dtype)} if family == "klein" else {}
    embeds = torch.randn(1, 8, 96, generator=torch.Generator().manual_seed(0)).to(run.dtype)
    pipeline(image=images, prompt_embeds=embeds, height=48, width=80, num_inference_steps=2, output_type="latent",
             guidance_scale=1.0, **options)  # fmt: skip
    hook.remove()
    training = SimpleNamespace(codec=codec, vae_on_device=lambda run: vae, rest_vae=lambda args: None)
    views = [i2i.image_to_pixels(image, (image.height, image.width), None, False) for image in images]
    references = i2i.encode_references(run, training, [views])
    assert len(outputs) == 2
    for (inputs, output), sigma in zip(outputs, pipeline.scheduler.sigmas, strict=False):
        noisy = inputs["hidden_states"][:, :15]
        velocity = predict(i2i, run.args, transformer, noisy, sigma.expand(1), embeds, 3, 5, references)
        assert velocity.shape == (1, 15, 32) and (velocity - output[:, :15]).abs().max() == 0


def test_every_sample_of_a_batch_has_the_same_position_ids(i2i, tiny, tmp_path):
    """T counts the references of one sample, not the samples of a batch."""
    run = start_run(i2i, tiny, tmp_path)
    vae = i2i.load_vae(run)
    training = SimpleNamespace(codec=i2i.LatentCodec(run), vae_on_device=lambda run: vae, rest_vae=lambda args: None)
    views = [[torch.rand(3, 64, 64), torch.rand(3, 32, 96)] for _ in range(3)]
    (first, first_ids), (second, second_ids) = i2i.encode_references(run, training, views)
    assert first.shape == (3, 16, 32) and second.shape == (3, 12, 32)
    assert first_ids.shape == (1, 16, 4) and set(first_ids[0, :, 0].tolist()) == {10}
    assert second_ids.shape == (1, 12, 4) and set(second_ids[0, :, 0].tolist()) == {20}
    assert first_ids[0, :, 1].max() == 3 and second_ids[0, -1].tolist() == [20, 1, 5, 0]


def test_references_are_the_mean_of_the_distribution_even_when_targets_are_sampled(i2i, tiny, tmp_path):
    """As at inference: --vae_encode_mode sample is about targets."""
    codec = i2i.LatentCodec(start_run(i2i, tiny, tmp_path))
    pixels = torch.rand(3, 64, 64) * 2 - 1
    tokens = []
    for mode in ("mode", "sample"):
        run = start_run(i2i, tiny, tmp_path, "--vae_encode_mode", mode)
        vae = i2i.load_vae(run)
        training = SimpleNamespace(codec=codec, vae_on_device=lambda run, vae=vae: vae, rest_vae=lambda args: None)
        tokens.append(i2i.encode_references(run, training, [[pixels]])[0][0])
    assert torch.equal(*tokens)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "size", [(63, 63), (64, 64), (64, 63), (512, 64), (513, 64), (64, 513), (800, 100), (801, 100), (2000, 1000)]
)
def test_the_data_check_refuses_what_the_pipeline_refuses(i2i, size):
    """A side under 64 pixels, a shape beyond 8:1; the name and the size are in the reason."""
    problem = i2i.reference_problem(size[::-1])
    try:
        Flux2ImageProcessor.check_image_input(Image.new("RGB", size))
        assert problem is None
    except ValueError:
        assert f"{size[0]} x {size[1]}" in problem


def test_a_target_may_be_smaller_than_a_reference_may(i2i, tiny, folders, tmp_path):
    target, first, _ = folders
    noise_image((300, 8)).save(target / "a.jpg")
    _, samples, _ = checked(i2i, tiny, tmp_path, "--instance_data_dir", target, "--cond_data_dir", first)
    assert (8, 300) in [sample.image.size for sample in samples]


# -------------------------------------------------------------------------------------------------------- aligned pairs


def coordinates(size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) whose colours tell where a pixel was: red is the column, green the row, blue a checkerboard."""
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    return np.stack([columns % 256, rows % 256, 255 * ((rows // 8 + columns // 8) % 2)], axis=2).astype(np.uint8)


def aligned_pair(i2i, folder: Path, size: tuple, reference_size: tuple, target: tuple) -> tuple:
    """target.png and reference.png with --align_cond_image, at the size `target`."""
    image = i2i.Image("t", folder / "target.png", size=size, target=target)
    return image, i2i.as_reference(i2i.Image("r", folder / "reference.png", size=reference_size), 16, image)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [None, (0.0, 0.0), (0.37, 0.81), (0.999, 0.999)])
def test_an_aligned_pair_stays_aligned_to_the_pixel(i2i, tmp_path, crop, flip):
    """The reference is the target's negative: after crop and flip it still is, pixel by pixel."""
    target = coordinates((200, 120))
    for name, array in (("target", target), ("reference", 255 - target)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    image, pair = aligned_pair(i2i, tmp_path, (120, 200), (120, 200), (120, 112))  # not enlarged or reduced
    pixels, reference = image.pixels(crop, flip), pair.pixels(crop, flip)
    assert pixels.shape == reference.shape == (3, 120, 112) and pixels.std() > 0.3
    assert torch.allclose(pixels, -reference, atol=1e-6)


def test_an_aligned_pair_that_is_resized_stays_aligned_within_rounding(i2i, tmp_path):
    """Both go through the same resize: one level of 255 at most."""
    target = np.asarray(noise_image((300, 200)))
    for name, array in (("target", target), ("reference", 255 - target)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    image, pair = aligned_pair(i2i, tmp_path, (200, 300), (200, 300), (128, 144))
    pixels, reference = image.pixels((0.5, 0.9), True), pair.pixels((0.5, 0.9), True)
    assert (pixels + reference).abs().max() <= 1.01 * 2 / 255


def test_an_aligned_reference_of_another_size_shows_the_same_place(i2i, tmp_path):
    """Half as large as its target: a mark stays within one pixel of where the target has it."""
    for name, scale in (("target", 2), ("reference", 1)):
        image = Image.new("RGB", (150 * scale, 100 * scale))
        ImageDraw.Draw(image).ellipse([88 * scale, 48 * scale, 112 * scale, 72 * scale], fill="white")
        image.save(tmp_path / f"{name}.png")
    image, pair = aligned_pair(i2i, tmp_path, (200, 300), (100, 150), (160, 160))
    centers = []
    for pixels in (image.pixels((0.2, 0.9), False), pair.pixels((0.2, 0.9), False)):
        mask = pixels.mean(dim=0) > 0
        centers.append(mask.nonzero().float().mean(dim=0))
    assert (centers[0] - centers[1]).abs().max() < 1


def test_without_align_a_reference_keeps_its_own_frame_but_is_mirrored_with_its_target(i2i, tmp_path):
    """The crop of the target is none of its business; an edit must not have to mirror."""
    noise_image((130, 100)).save(tmp_path / "r.png")
    reference = i2i.as_reference(i2i.Image("r", tmp_path / "r.png", size=(100, 130)), 16, None)
    assert reference.target == (96, 128)
    plain = reference.pixels()
    assert torch.equal(reference.pixels((0.9, 0.1), False), plain)
    assert torch.equal(reference.pixels((0.9, 0.1), True), plain.flip(-1))
    array = torch.from_numpy(np.asarray(Image.open(tmp_path / "r.png"), dtype=np.float32))
    assert torch.allclose(plain, array[2:98, 1:129].permute(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_a_pair_of_other_shapes_cannot_be_aligned_and_is_refused_by_name(i2i, tiny, folders, tmp_path):
    target, first, _ = folders
    for name, size in (("a", (300, 200)), ("b", (100, 150))):
        noise_image((150, 100)).save(first / f"{name}.jpeg")
        noise_image(size).save(target / f"{name}.jpg")
    noise_image((100, 100)).save(first / "sub" / "c.jpeg")
    noise_image((200, 200)).save(target / "sub" / "c.jpg")
    flags = ("--instance_data_dir", target, "--cond_data_dir", first, "--align_cond_image")
    with pytest.raises(i2i.UserError, match=r"b\.jpeg: 150 x 100 is not the shape of its target, 100 x 150") as error:
        checked(i2i, tiny, tmp_path, *flags)
    assert "1 image(s)" in str(error.value)


# -------------------------------------------------------------------------------------------------------------- listing


@pytest.fixture
def pairs(tmp_path) -> Path:
    """A folder with targets t0, t1, t2 and references a0, a1, a2, b0."""
    data = tmp_path / "pairs"
    for seed, name in enumerate(("t0", "t1", "t2", "a0", "a1", "a2", "b0")):
        draw_photo(data / f"{name}.jpg", (96, 80), seed)
    return data


def write_metadata(folder: Path, *rows: dict) -> None:
    """metadata.jsonl with these rows."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def listed(i2i, folder: Path, *flags) -> list[tuple]:
    """(target, caption, references) of the rows, by name."""
    rows = i2i.list_samples(arguments(i2i, "--instance_data_dir", folder, *flags))
    shown = str(folder.parent) + os.sep  # references in folders of their own are named by their path
    return [(r.image.name, caption_of(r), [source.name.removeprefix(shown) for source in r.references]) for r in rows]


def test_metadata_with_file_name_columns_gives_rows_with_several_one_and_no_reference(i2i, pairs):
    """`file_name` is the target; other *_file_name columns but the mask's are references, an empty cell is none."""
    both = {"first_file_name": "a0.jpg", "second_file_name": "b0.jpg", "mask_file_name": "a1.jpg", "text": "both"}
    write_metadata(
        pairs,
        {"file_name": "t0.jpg", **both},
        {"file_name": "t1.jpg", "first_file_name": "a1.jpg", "second_file_name": None, "text": "one"},
        {"file_name": "t2.jpg", "text": "plain"},
    )
    with log_lines() as lines:
        rows = listed(i2i, pairs)
    assert rows == [("t0.jpg", "both", ["a0.jpg", "b0.jpg"]), ("t1.jpg", "one", ["a1.jpg"]), ("t2.jpg", "plain", [])]
    assert any("1 of 3 rows have no reference and train as text-to-image" in line for line in lines)
    assert any("columns not used: mask_file_name" in line for line in lines)


def test_metadata_columns_can_be_named_and_hold_lists(i2i, pairs):
    """As in the relighting data set; with or without the ending _file_name."""
    write_metadata(
        pairs,
        {"output": "t0.jpg", "file_name": ["a0.jpg", "b0.jpg"], "instruction": "x", "other_file_name": "a1.jpg"},
        {"output": "t1.jpg", "file_name": [], "instruction": "y", "other_file_name": "a2.jpg"},
    )
    flags = ("--image_column", "output", "--caption_column", "instruction")
    assert listed(i2i, pairs, *flags, "--cond_image_column", "file_name") == [
        ("t0.jpg", "x", ["a0.jpg", "b0.jpg"]), ("t1.jpg", "y", []),
    ]  # fmt: skip
    assert listed(i2i, pairs, *flags, "--cond_image_column", "other", "file_name") == [
        ("t0.jpg", "x", ["a1.jpg", "a0.jpg", "b0.jpg"]), ("t1.jpg", "y", ["a2.jpg"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"file_name": "a0.jpg", "output_file_name": "t0.jpg"}, ()),
        ({"target_file_name": "t0.jpg", "file_name": "a0.jpg"}, ()),
        ({"target_file_name": "t0.jpg", "output_file_name": "a0.jpg"}, ()),
    ],
)
def test_two_columns_that_could_be_the_target_are_a_question_and_no_guess(i2i, pairs, row, flags):
    """A guess would train the edit backwards; naming either side answers it."""
    write_metadata(pairs, {**row, "text": "x"})
    with pytest.raises(i2i.UserError, match=r"_file_name the target\? Give --image_column|file_name or .* the target"):
        listed(i2i, pairs, *flags)
    target, reference = (next(name for name, file in row.items() if file == wanted) for wanted in ("t0.jpg", "a0.jpg"))
    assert listed(i2i, pairs, "--cond_image_column", reference) == [("t0.jpg", "x", ["a0.jpg"])]
    assert listed(i2i, pairs, "--image_column", target) == [("t0.jpg", "x", ["a0.jpg"])]


def test_a_column_called_image_is_no_image_of_a_metadata_file(i2i, pairs):
    """file_name is; the other column may hold a description, as the text-to-image script takes it."""
    write_metadata(pairs, {"file_name": "t0.jpg", "image": "some description", "text": "x"})
    assert ("t0.jpg", "x", []) in listed(i2i, pairs)


def test_rows_without_references_have_their_target_where_the_flag_says(i2i, pairs):
    write_metadata(pairs, {"output": "t0.jpg", "text": "x"})
    with log_lines() as lines:
        assert listed(i2i, pairs, "--image_column", "output") == [("t0.jpg", "x", [])]
    assert any("6 .jpg file(s) not used" in line and "t1.jpg" in line for line in lines)


def test_the_numbers_of_references_per_row_are_told(i2i, pairs):
    """A row with a gap has fewer; the next reference takes its place."""
    rows = [{"file_name": f"t{n}.jpg", "text": "x", "a_file_name": f"a{n}.jpg" if n else None, "b_file_name": "b0.jpg"}
            for n in range(3)]  # fmt: skip
    write_metadata(pairs, *rows)
    with log_lines() as lines:
        assert [len(references) for _, _, references in listed(i2i, pairs)] == [1, 2, 2]
    assert any("references per row: 1: 1 rows, 2: 2 rows" in line for line in lines)


def test_a_csv_row_with_an_unquoted_comma_is_an_error_that_names_its_line(i2i, pairs):
    """Otherwise half of the caption would be lost without a word."""
    (pairs / "metadata.csv").write_text("file_name,cond_file_name,text\nt0.jpg,a0.jpg,make it, night\n")
    with pytest.raises(i2i.UserError, match=r"metadata\.csv: line 2 has more cells than columns"):
        listed(i2i, pairs)


@pytest.mark.parametrize("column", ["image_file_name", "target_file_name", "output_file_name", "edited_file_name"])
def test_metadata_without_a_plain_file_name_has_its_target_under_a_usual_name(i2i, pairs, column):
    write_metadata(pairs, {"source_file_name": "a0.jpg", column: "t0.jpg", "text": "x"})
    assert listed(i2i, pairs) == [("t0.jpg", "x", ["a0.jpg"])]


def test_metadata_may_be_csv(i2i, pairs):
    (pairs / "metadata.csv").write_text("file_name,cond_file_name,text\nt0.jpg,a0.jpg,x\nt1.jpg,,y\n")
    assert listed(i2i, pairs) == [("t0.jpg", "x", ["a0.jpg"]), ("t1.jpg", "y", [])]


def test_metadata_about_single_images_trains_all_rows_as_text_to_image_and_says_so(i2i, pairs):
    write_metadata(pairs, {"file_name": "t0.jpg", "text": "x"})
    with log_lines() as lines:
        rows = listed(i2i, pairs)
    assert ("t0.jpg", "x", []) in rows and len(rows) == 7
    assert any("7 of 7 rows have no reference" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--cond_image_column", "before"), "--cond_image_column before"),
        (("--image_column", "after"), "--image_column after"),
    ],
)
def test_a_column_that_metadata_lacks_is_an_error_with_those_there_are(i2i, pairs, flags, named):
    write_metadata(pairs, {"file_name": "t0.jpg", "cond_file_name": "a0.jpg", "text": "x"})
    with pytest.raises(i2i.UserError, match=named) as error:
        listed(i2i, pairs, *flags)
    assert "columns: file_name, cond_file_name, text" in str(error.value)
    assert "metadata.jsonl" in str(error.value)


def test_a_reference_column_without_metadata_is_an_error(i2i, pairs):
    with pytest.raises(i2i.UserError, match=r"--cond_image_column: .*pairs has no metadata"):
        listed(i2i, pairs, "--cond_image_column", "cond")


def test_every_row_whose_reference_is_missing_is_listed(i2i, pairs):
    """All of them at once, with the row and the file; also names that lead out of the folder."""
    write_metadata(
        pairs,
        {"file_name": "t0.jpg", "cond_file_name": "gone.jpg"},
        {"file_name": "t1.jpg", "cond_file_name": "a1.jpg"},
        {"file_name": "t2.jpg", "cond_file_name": "../secret.jpg"},
    )
    shutil.copy(pairs / "a0.jpg", pairs.parent / "secret.jpg")
    with pytest.raises(i2i.UserError) as error:
        listed(i2i, pairs)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and "line 1" in lines[1] and "gone.jpg" in lines[1]
    assert "line 3" in lines[2] and "leads out" in lines[2]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path, Path]:
    """Folders of targets and of two kinds of references with the same stems, one of them in a subfolder."""
    target, first, second = (tmp_path / name for name in ("target", "first", "second"))
    for seed, stem in enumerate(("a", "b", "sub/c")):
        draw_photo(target / f"{stem}.jpg", (96, 80), seed)
        draw_photo(first / f"{stem}.jpeg", (80, 96), seed + 10)
    draw_photo(second / "b.jpg", (64, 64), 30)
    (target / "a.txt").write_text("make it night")
    return target, first, second


def test_two_folders_are_matched_by_stem_whatever_the_ending(i2i, folders):
    target, first, _ = folders
    assert listed(i2i, target, "--cond_data_dir", first) == [
        ("a.jpg", "make it night", ["first/a.jpeg"]), ("b.jpg", None, ["first/b.jpeg"]),
        (str(Path("sub/c.jpg")), None, ["first/sub/c.jpeg"]),
    ]  # fmt: skip


def test_several_reference_folders_give_different_numbers_of_references(i2i, folders):
    target, first, second = folders
    with log_lines(logging.WARNING) as lines:
        rows = listed(i2i, target, "--cond_data_dir", first, second)
    assert [references for _, _, references in rows] == [
        ["first/a.jpeg"],
        ["first/b.jpeg", "second/b.jpg"],
        ["first/sub/c.jpeg"],
    ]
    [told] = [line for line in lines if "its place" in line]
    assert "second: 2 targets have no reference there" in told and told.endswith("a.jpg, c.jpg")


def test_each_row_of_metadata_keeps_its_caption_beside_reference_folders(i2i, folders):
    """Two rows for one target; a column other than file_name gives rows, not captions of the folder's images."""
    target, first, _ = folders
    rows = [{"image": "a.jpg", "text": text} for text in ("one", "two")]
    write_metadata(target, *rows, {"image": "b.jpg", "text": "x"}, {"image": "sub/c.jpg", "text": "y"})
    found = listed(i2i, target, "--cond_data_dir", first)
    assert [(caption, references) for _, caption, references in found] == [
        ("one", ["first/a.jpeg"]), ("two", ["first/a.jpeg"]), ("x", ["first/b.jpeg"]), ("y", ["first/sub/c.jpeg"]),
    ]  # fmt: skip


def test_references_inside_the_data_folder_are_no_targets(i2i, folders):
    target, first, _ = folders
    shutil.move(first, target / "references")
    rows = listed(i2i, target, "--cond_data_dir", target / "references")
    assert [name for name, _, _ in rows] == ["a.jpg", "b.jpg", str(Path("sub/c.jpg"))]


def test_every_unmatched_stem_is_listed_on_either_side(i2i, folders):
    target, first, _ = folders
    draw_photo(target / "alone.jpg", (80, 80), 40)
    draw_photo(first / "lonely.jpg", (80, 80), 41)
    with pytest.raises(i2i.UserError, match=r"2 file\(s\) without a partner") as error:
        listed(i2i, target, "--cond_data_dir", first)
    assert str(target / "alone.jpg") in str(error.value) and str(first / "lonely.jpg") in str(error.value)


def test_a_reference_with_one_character_more_in_its_name_has_no_partner(i2i, folders):
    """Nor is it left out in silence where another folder has a reference for the target."""
    target, first, second = folders
    next(second.glob("b.*")).rename(second / "b_.jpg")
    with pytest.raises(i2i.UserError, match=r"1 file\(s\) without a partner(.|\n)*b_\.jpg"):
        listed(i2i, target, "--cond_data_dir", first, second)


def test_two_files_of_one_stem_are_an_error(i2i, folders):
    target, first, _ = folders
    shutil.copy(first / "a.jpeg", first / "a.png")
    with pytest.raises(i2i.UserError, match=r"a\.jpeg and a\.png have the same stem"):
        listed(i2i, target, "--cond_data_dir", first)


@pytest.mark.parametrize(
    "column", ["input_image", "source", "Control_Image", "before_image_1", " conditioning_image", "edit_image"]
)
def test_usual_names_of_reference_columns_are_found_in_metadata_as_in_data_sets(i2i, pairs, column):
    write_metadata(pairs, {"file_name": "t0.jpg", column: "a0.jpg", "text": "x"}, {"file_name": "t1.jpg", "text": "y"})
    with log_lines() as lines:
        assert listed(i2i, pairs) == [("t0.jpg", "x", ["a0.jpg"]), ("t1.jpg", "y", [])]
    assert any(f"images from file_name, references from {column}, captions from text" in line for line in lines)
    assert any("4 .jpg file(s) not used" in line and "'a1.jpg'" in line for line in lines)


@pytest.mark.parametrize("cell", ["somewhere", "https://example.org/a.jpg", 5, None, []])
def test_a_usual_reference_column_without_names_of_images_is_told_as_not_used(i2i, pairs, cell):
    write_metadata(pairs, {"file_name": "t0.jpg", "source": cell, "text": "x"})
    with log_lines() as lines:
        assert ("t0.jpg", "x", []) in listed(i2i, pairs)
    assert any("columns not used: source" in line for line in lines)


@pytest.mark.parametrize("flags", [(), ("--image_column", "image"), ("--cond_image_column", "edit_image")])
def test_a_csv_with_the_columns_image_prompt_edit_image_gives_pairs(i2i, pairs, flags):
    """The default of --image_column can be chosen too."""
    (pairs / "metadata.csv").write_text("image,prompt,edit_image\nt0.jpg,x,a0.jpg\n")
    assert listed(i2i, pairs, *flags) == [("t0.jpg", "x", ["a0.jpg"])]


def test_image_is_the_column_file_name_of_metadata_for_references_too(i2i, pairs):
    """As `datasets` calls it."""
    write_metadata(pairs, {"output": "t0.jpg", "file_name": "a0.jpg", "text": "x"})
    flags = ("--image_column", "output", "--cond_image_column", "image")
    assert listed(i2i, pairs, *flags) == [("t0.jpg", "x", ["a0.jpg"])]


def test_two_columns_image_and_file_name_with_images_are_a_question(i2i, pairs):
    write_metadata(pairs, {"image": "t0.jpg", "file_name": "a0.jpg", "text": "x"})
    with pytest.raises(i2i.UserError, match="is file_name or image the target"):
        listed(i2i, pairs)
    assert listed(i2i, pairs, "--cond_image_column", "file_name") == [("t0.jpg", "x", ["a0.jpg"])]


def test_a_column_cannot_be_target_and_reference(i2i, pairs, tmp_path, photo_paths):
    write_metadata(pairs, {"output": "t0.jpg", "text": "x"})
    with pytest.raises(i2i.UserError, match="is output the target"):
        listed(i2i, pairs, "--image_column", "output", "--cond_image_column", "output")
    name = as_parquet(tmp_path / "d", {"image": photo_paths[:1]}, {"image": datasets.Image()})
    with pytest.raises(i2i.UserError, match="is image the target"):
        rows_of(i2i, name, tmp_path, "--cond_image_column", "image")


def test_metadata_in_a_subfolder_gives_its_pairs(i2i, pairs):
    """Before and after would both be plain targets otherwise."""
    folder = pairs.parent / "above"
    shutil.move(pairs, folder / "a")
    write_metadata(folder / "a", {"file_name": "t0.jpg", "before_file_name": "a0.jpg", "text": "x"})
    assert listed(i2i, folder) == [("a/t0.jpg", "x", ["a/a0.jpg"])]


def test_several_rows_of_one_target_stay_rows_and_lists_are_several_instructions(i2i, pairs):
    write_metadata(
        pairs,
        {"file_name": "t0.jpg", "before_file_name": "a0.jpg", "text": ["x", "y"]},
        {"file_name": "t0.jpg", "before_file_name": "b0.jpg", "text": "z"},
    )
    assert listed(i2i, pairs) == [("t0.jpg", ("x", "y"), ["a0.jpg"]), ("t0.jpg", "z", ["b0.jpg"])]


def test_pairs_without_a_caption_take_the_prompt_unless_a_column_is_missed(i2i, pairs):
    row = {"file_name": "t0.jpg", "before_file_name": "a0.jpg"}
    write_metadata(pairs, row)
    assert listed(i2i, pairs) == [("t0.jpg", None, ["a0.jpg"])]
    write_metadata(pairs, {**row, "anweisung": "x"})
    with pytest.raises(i2i.UserError, match="--caption_column.*(.|\n)*file_name, before_file_name, anweisung"):
        listed(i2i, pairs)


def test_captions_beside_references_are_told(i2i, folders):
    """The target's are read."""
    target, first, _ = folders
    (first / "b.txt").write_text("make it day")
    with log_lines() as lines:
        listed(i2i, target, "--cond_data_dir", first)
    assert any("1 .txt file(s) not used, see docs/data.md: 'b.txt'" in line for line in lines)


def test_folders_are_matched_in_any_case_and_unicode_form(i2i, tmp_path):
    draw_photo(tmp_path / "t" / "E\u0301.jpg", (96, 80), 0)
    draw_photo(tmp_path / "r" / "\u00c9.JPG", (96, 80), 1)
    assert [len(references) for *_, references in listed(i2i, tmp_path / "t", "--cond_data_dir", tmp_path / "r")] == [1]


def test_references_from_metadata_and_from_folders_at_once_are_refused(i2i, folders):
    target, first, _ = folders
    write_metadata(target, {"file_name": "a.jpg", "before_file_name": "b.jpg", "text": "x"})
    with pytest.raises(i2i.UserError, match="--cond_data_dir: the metadata name references, too"):
        listed(i2i, target, "--cond_data_dir", first)


# ------------------------------------------------------------------------------------------------------------ data sets


def as_parquet(folder: Path, columns: dict, features: dict) -> Path:
    """A local data set as one parquet file, as the Hub shows it."""
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def photo_paths(tmp_path_factory) -> list[str]:
    """Files of five drawn photographs."""
    return sorted(map(str, draw_photos(tmp_path_factory.mktemp("photos") / "p").glob("*.jpg")))


def rows_of(i2i, name: Path, tmp_path: Path, *flags) -> list:
    """The rows of a data set, with a cache of this test's own."""
    return i2i.list_samples(arguments(i2i, "--dataset_name", name, "--cache_dir", tmp_path / "cache", *flags))


RELIGHTING = ("--image_column", "output", "--cond_image_column", "file_name", "--caption_column", "instruction")


def test_the_columns_of_the_relighting_data_set_give_triplets(i2i, tmp_path, photo_paths):
    """Bytes as they are; a cell without an image is a row of plain text-to-image."""
    image = datasets.Image()
    photos = [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in photo_paths]
    columns = {"output": photos[:3], "file_name": [*photos[3:], None], "instruction": ["x", "y", "z"]}
    features = {"output": image, "file_name": image, "instruction": datasets.Value("string")}
    name = as_parquet(tmp_path / "d", columns, features)
    rows = rows_of(i2i, name, tmp_path, *RELIGHTING)
    assert [caption_of(row) for row in rows] == ["x", "y", "z"]
    assert [row.image.read() for row in rows] == [Path(path).read_bytes() for path in photo_paths[:3]]
    assert [[source.read() for source in row.references] for row in rows] == [
        [Path(photo_paths[3]).read_bytes()], [Path(photo_paths[4]).read_bytes()], [],
    ]  # fmt: skip
    assert rows[0].references[0].name == "row 0, file_name"


def test_columns_with_lists_and_several_columns_add_up(i2i, tmp_path, photo_paths):
    image = datasets.Image()
    columns = {"image": photo_paths[:2], "many": [photo_paths[2:5], []], "one": [None, photo_paths[4]]}
    name = as_parquet(tmp_path / "d", columns, {"image": image, "many": datasets.List(image), "one": image})
    rows = rows_of(i2i, name, tmp_path, "--cond_image_column", "one", "many")
    found = [[source.read() for source in row.references] for row in rows]
    assert found == [[Path(path).read_bytes() for path in photo_paths[2:5]], [Path(photo_paths[4]).read_bytes()]]
    assert [source.name for source in rows[0].references] == [f"row 0, many {item}" for item in range(3)]


def test_a_struct_of_nulls_is_no_image(i2i, tmp_path, photo_paths):
    """As writers other than `datasets` leave an empty cell."""
    photo = {"bytes": Path(photo_paths[0]).read_bytes(), "path": None}
    table = datasets.Dataset.from_dict({"image": [photo, photo], "cond_image": [{"bytes": None, "path": None}, photo]})
    (tmp_path / "d").mkdir()
    table.to_parquet(tmp_path / "d" / "train.parquet")
    rows = rows_of(i2i, tmp_path / "d", tmp_path, "--cond_image_column", "cond_image")
    assert [len(row.references) for row in rows] == [0, 1]
    assert i2i.read_cell([{"image": {"bytes": None, "path": None}}], "image", Path(), [], 0) == b""


def test_reference_columns_are_found_by_usual_names_only_where_they_hold_images(i2i, tmp_path, photo_paths):
    """A column `source` with a web address is no reference."""
    image, text = datasets.Image(), datasets.Value("string")
    columns = dict(zip(("image", "cond_image", "mask"), ([path] for path in photo_paths), strict=False))
    features = {"image": image, "source": text, "cond_image": image, "mask": image}
    name = as_parquet(tmp_path / "d", {**columns, "source": ["somewhere"]}, features)
    with log_lines() as lines:
        rows = rows_of(i2i, name, tmp_path)
    assert [source.name for source in rows[0].references] == ["row 0, cond_image"]
    assert any(
        "images from image, references from cond_image" in line and "not used: mask, source" in line for line in lines
    )


def test_a_missing_reference_column_of_a_data_set_names_those_there_are(i2i, tmp_path, photo_paths):
    name = as_parquet(tmp_path / "d", {"image": photo_paths[:1]}, {"image": datasets.Image()})
    with pytest.raises(i2i.UserError, match=r"--cond_image_column before: not in .*columns: image"):
        rows_of(i2i, name, tmp_path, "--cond_image_column", "before")


# -------------------------------------------------------------------------------------------- checks, groups and visits


def checked(i2i, tiny, tmp_path: Path, *flags) -> tuple:
    """(run, samples, log lines) after the data check."""
    run = start_run(i2i, tiny, tmp_path, *flags)
    with log_lines() as lines:
        samples, _ = i2i.check_data(run)
    return run, samples, lines


def test_a_row_whose_target_is_its_own_reference_is_told(i2i, tiny, folders, tmp_path):
    """By content: the folders before and after may be copies of one another."""
    target, first, _ = folders
    shutil.copy(target / "a.jpg", first / "a.jpeg")
    _, _, lines = checked(i2i, tiny, tmp_path, "--instance_data_dir", target, "--cond_data_dir", first)
    assert any("1 rows have their own target as a reference and teach nothing: a.jpg" in line for line in lines)


def test_an_empty_reference_is_named_and_its_row_can_be_skipped(i2i, tiny, folders, tmp_path):
    target, first, _ = folders
    (first / "b.jpeg").write_bytes(b"")
    flags = ("--instance_data_dir", target, "--cond_data_dir", first)
    with pytest.raises(i2i.UserError, match=r"first/b\.jpeg: empty file \(0 bytes\)"):
        checked(i2i, tiny, tmp_path, *flags)
    _, samples, lines = checked(i2i, tiny, tmp_path, *flags, "--on_bad_image", "skip")
    assert [sample.image.name for sample in samples] == ["a.jpg", str(Path("sub/c.jpg"))]
    assert any("1 image(s) are skipped, and with them 1 of 3 rows" in line for line in lines)


def test_all_bad_references_are_in_one_list_with_the_bad_targets(i2i, tiny, folders, tmp_path):
    target, first, _ = folders
    noise_image((40, 200)).save(first / "a.jpeg")
    noise_image((900, 100)).save(first / "b.jpeg")
    (target / "sub" / "c.jpg").write_bytes(b"no image")
    with pytest.raises(i2i.UserError) as error:
        checked(i2i, tiny, tmp_path, "--instance_data_dir", target, "--cond_data_dir", first)
    text = str(error.value)
    assert (
        "3 image(s)" in text
        and "64 pixels a side and 8:1 at most, it has 40 x 200" in text
        and "it has 900 x 100" in text
    )
    assert "c.jpg: not an image" in text


def test_one_reference_of_many_rows_is_decoded_once(i2i, tiny, pairs, tmp_path, monkeypatch):
    rows = [{"file_name": f"t{number}.jpg", "cond_file_name": "a0.jpg", "text": "x"} for number in range(3)]
    write_metadata(pairs, *rows)
    decoded = []
    monkeypatch.setattr(
        i2i, "decode_image", lambda *given, original=i2i.decode_image: decoded.append(1) or original(*given)
    )
    _, samples, _ = checked(i2i, tiny, tmp_path, "--instance_data_dir", pairs)
    assert len(decoded) == 4 and len({sample.references[0].sha256 for sample in samples}) == 1


def test_the_log_tells_the_groups_the_longest_sequence_and_groups_smaller_than_the_batch(i2i, tiny, folders, tmp_path):
    target, first, second = folders
    flags = ("--instance_data_dir", target, "--cond_data_dir", first, second, "--train_batch_size", "2")
    _, samples, lines = checked(i2i, tiny, tmp_path, *flags)
    assert len({sample.geometry for sample in samples}) == 2
    assert any("2 groups of equal geometry" in line for line in lines)
    assert any("16 target + 46 reference tokens" in line for line in lines)  # 80 x 96 and 64 x 64
    assert any("1 groups have fewer than 2 rows" in line for line in lines)


def test_a_crop_that_only_the_target_gets_is_a_warning_unless_the_pair_is_aligned(i2i, tiny, tmp_path):
    """Otherwise the LoRA learns to crop, and nobody said so."""
    draw_photo(tmp_path / "t" / "a.jpg", (160, 80), 0)
    draw_photo(tmp_path / "r" / "a.jpg", (160, 80), 1)
    flags = ("--instance_data_dir", tmp_path / "t", "--cond_data_dir", tmp_path / "r")
    said = [any("learn to crop" in line for line in checked(i2i, tiny, tmp_path, *flags, *more)[2])
            for more in ((), ("--align_cond_image",), ("--aspect_ratio_buckets", "64,128"))]  # fmt: skip
    assert said == [True, False, False]


def test_a_batch_holds_rows_of_one_geometry_and_nothing_is_dropped(i2i):
    """Ten rows in four groups, one without references: after as many rounds every row was seen equally often."""
    sizes = [(64, 64), (64, 96)]
    geometries = [((64, 64), sizes[n % 2]) for n in range(6)] + [((64, 64),)] * 3 + [((64, 64), *sizes)]
    stream = i2i.SampleStream(geometries, 3, 0, "instance")
    visits = [[index for index, _ in stream.micro_batch(step)] for step in range(10)]
    assert all(len({geometries[index] for index in batch}) == 1 for batch in visits)
    counts = [sum(batch.count(index) for batch in visits) for index in range(10)]
    assert counts == [3] * 10


def visit_set(i2i, tiny, folders, tmp_path, *flags):
    """A TrainingSet over the two folders."""
    target, first, _ = folders
    run, samples, _ = checked(i2i, tiny, tmp_path, "--instance_data_dir", target, "--cond_data_dir", first, *flags)
    codec = i2i.LatentCodec(run)
    if run.args.cache_latents:
        i2i.encode_images(run, codec, [image for sample in samples for image in sample.images])
    return training_set(i2i, run, samples)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_visit_gives_an_aligned_reference_the_crop_and_the_flip_of_its_target(i2i, tiny, tmp_path, scale):
    """Through the listing, the check and the visit: a reference that is its target stays it, at every random crop."""
    draw_photo(tmp_path / "t" / "a.png", (170, 90), 0)
    image = Image.open(tmp_path / "t" / "a.png")
    (tmp_path / "r").mkdir()
    image.resize((170 * scale, 90 * scale), Image.Resampling.NEAREST).save(tmp_path / "r" / "a.png")
    flags = ("--instance_data_dir", tmp_path / "t", "--cond_data_dir", tmp_path / "r", "--align_cond_image")
    run, samples, _ = checked(i2i, tiny, tmp_path, *flags, "--random_flip")
    assert samples[0].references[0].pair_size == (90, 170)
    data, seen = training_set(i2i, run, samples), set()
    for position in range(6):
        visit = data[0, position]
        (reference,) = visit["references"]
        seen.add(visit["pixels"].sum().item())
        difference = (reference - visit["pixels"]).abs()
        assert difference.max() == 0 if scale == 1 else difference.mean() < 0.05
    assert len(seen) == 6


def test_captions_and_references_are_dropped_independently(i2i, tiny, folders, tmp_path):
    """All four combinations come up."""
    data = visit_set(i2i, tiny, folders, tmp_path, "--cond_dropout", "0.5", "--caption_dropout", "0.5")
    visits = [data[position % 3, position] for position in range(40)]
    assert len({(bool(visit["references"]), bool(visit["caption"])) for visit in visits}) == 4


def test_aligned_pairs_above_a_megapixel_are_refused(i2i, tiny, tmp_path):
    """The pipelines would bring the reference down, and nothing would be aligned any more."""
    for name in ("t", "r"):
        draw_photo(tmp_path / name / "a.jpg", (166, 100), 0)
    flags = ("--instance_data_dir", tmp_path / "t", "--cond_data_dir", tmp_path / "r", "--align_cond_image")
    checked(i2i, tiny, tmp_path, *flags, "--aspect_ratio_buckets", "784,1312")
    with pytest.raises(i2i.UserError, match=r"--align_cond_image: 1 targets .*\(800, 1328\)"):
        checked(i2i, tiny, tmp_path, *flags, "--aspect_ratio_buckets", "800,1328")


@pytest.mark.slow
def test_references_are_dropped_with_the_probability_asked_for_and_by_the_position_alone(i2i, tiny, folders, tmp_path):
    """0 never, 1 always; a visit is the same whenever it is made."""
    counts = {}
    for share in ("0", "0.3", "1"):
        data = visit_set(i2i, tiny, folders, tmp_path, "--cond_dropout", share, "--seed", "5")
        counts[share] = [not data[position % 3, position]["references"] for position in range(60)]
    assert sum(counts["0"]) == 0 and sum(counts["1"]) == 60 and 8 <= sum(counts["0.3"]) <= 28
    again = visit_set(i2i, tiny, folders, tmp_path, "--cond_dropout", "0.3", "--seed", "5")
    assert [not again[position % 3, position]["references"] for position in range(60)] == counts["0.3"]


def test_a_dropped_reference_leaves_noise_sigma_and_caption_as_they_are(i2i, tiny, folders, tmp_path):
    kept = visit_set(i2i, tiny, folders, tmp_path)[0, 7]
    dropped = visit_set(i2i, tiny, folders, tmp_path, "--cond_dropout", "1")[0, 7]
    assert kept["references"] and dropped["references"] == [] and kept["caption"] == dropped["caption"]
    for name in ("noise", "u", "pixels"):
        assert torch.equal(kept[name], dropped[name])


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--align_cond_image",)])
def test_cached_references_are_those_that_are_encoded_on_the_way(i2i, tiny, folders, tmp_path, extra):
    """Both orientations; the target's too."""
    target, first, _ = folders
    for path in first.rglob("*.jpeg"):  # an aligned pair needs one shape
        draw_photo(path, (192, 160), 3)
    flags = ("--random_flip", "--center_crop", *extra)
    cached = visit_set(i2i, tiny, folders, tmp_path / "a", *flags, "--cache_latents")
    plain = visit_set(i2i, tiny, folders, tmp_path / "b", *flags)
    vae = i2i.load_vae(plain.run)
    flips = set()
    for position in range(8):
        one, other = cached[position % 3, position], plain[position % 3, position]
        generator = i2i.make_generator(plain.run.seed, "instance", "flip", position)
        flips.add(torch.rand(1, generator=generator).item() < 0.5)
        for moments, pixels in zip(one["references"], other["references"], strict=True):
            assert torch.allclose(moments, i2i.encode_pixels(vae, pixels[None])[0], atol=1e-5)
        assert torch.allclose(one["moments"], i2i.encode_pixels(vae, other["pixels"][None])[0], atol=1e-5)
    assert flips == {True, False}


def test_target_and_reference_of_the_same_file_have_cache_files_of_their_own(i2i, tiny, folders, tmp_path):
    """Cropped to the bucket and prepared as a reference are two things, even at one size."""
    codec = i2i.LatentCodec(start_run(i2i, tiny, tmp_path))
    image = i2i.Image("x", sha256="0", size=(70, 70), target=(64, 64))
    others = [i2i.as_reference(image, 16, pair) for pair in (None, image, replace(image, size=(140, 140)))]
    assert len({codec.key(one, False) for one in [image, *others]}) == 4


def test_a_changed_reference_makes_it_another_run(i2i, tiny, folders, tmp_path):
    """Content, number, order and preparation of the references are part of what a resumed run must find."""
    target, first, _ = folders
    flags = ("--instance_data_dir", target, "--cond_data_dir", first)
    run, samples, _ = checked(i2i, tiny, tmp_path, *flags)
    key = "instance data"
    before = i2i.fingerprint(run, [i2i.Stream("instance", samples)])[key]
    assert i2i.fingerprint(run, [i2i.Stream("instance", list(samples))])[key] == before
    reference = samples[0].references[0]
    for other in (
        (),
        (reference, reference),
        (replace(reference, sha256="0"),),
        (replace(reference, resize_key="aligned (1, 1)"),),
    ):
        changed = [replace(samples[0], references=other), *samples[1:]]
        assert i2i.fingerprint(run, [i2i.Stream("instance", changed)])[key] != before


# ------------------------------------------------------------------------------------------------------------- the loss


class Answers(torch.nn.Module):
    """A transformer that predicts the target's tokens perfectly and writes `rubbish` behind them."""

    config = SimpleNamespace(guidance_embeds=False)

    def __init__(self, velocity: torch.Tensor, rubbish: float) -> None:
        super().__init__()
        self.velocity, self.rubbish = velocity, rubbish

    def forward(self, hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor]:
        rest = torch.full_like(hidden_states[:, self.velocity.shape[1] :], self.rubbish)
        return (torch.cat([self.velocity, rest], dim=1),)


@pytest.mark.parametrize("reference_tokens", [10, 4, 30])
def test_the_loss_is_on_the_targets_tokens_only(i2i, reference_tokens):
    """Whatever stands at the references; a slice from the other end, or none, would see the rubbish."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 10, 32, generator=generator) for _ in range(2))
    references = [(torch.randn(2, reference_tokens, 32), i2i.position_ids(1, reference_tokens, time=10))]
    model = Answers(noise - clean, rubbish=100.0)
    inputs = clean, noise, torch.tensor([0.3, 0.8]), 2, 5
    assert losses_of(i2i, arguments(i2i), model, *inputs, references).tolist() == [0.0, 0.0]
    model.velocity = torch.zeros_like(clean)
    losses = losses_of(i2i, arguments(i2i), model, *inputs, references)
    assert torch.allclose(losses, (noise - clean).square().mean(dim=(1, 2)))


def test_references_and_their_order_reach_the_prediction(i2i, tiny, tmp_path):
    """Without this the parity could hold between constants."""
    run = start_run(i2i, tiny, tmp_path)
    transformer = i2i.load_transformer(run).eval()
    first, second, noisy = (torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(n)) for n in range(3))
    ids = [i2i.position_ids(2, 2, time=time) for time in (10, 20)]

    def velocity(*references):
        embeds = torch.ones(1, 8, 96)
        return predict(i2i, run.args, transformer, noisy, torch.tensor([0.5]), embeds, 2, 2, list(references))

    plain, one = velocity(), velocity((first, ids[0]))
    both, swapped = velocity((first, ids[0]), (second, ids[1])), velocity((second, ids[0]), (first, ids[1]))
    for a, b in ((plain, one), (one, both), (both, swapped)):
        assert (a - b).abs().max() > 1e-3


def test_the_loss_of_a_batch_is_the_mean_of_its_rows_alone_with_kept_and_dropped_references(i2i, tiny, tmp_path):
    """Four rows of one geometry, two of them without their references: two forwards, the order of the rows kept."""
    run = start_run(i2i, tiny, tmp_path)
    codec, vae, transformer = i2i.LatentCodec(run), i2i.load_vae(run), i2i.load_transformer(run)
    generator = torch.Generator().manual_seed(1)
    embeds = {name: torch.randn(64, 96, generator=generator) for name in "abcd"}
    rests = []
    training = SimpleNamespace(
        codec=codec, transformer=transformer, vae_on_device=lambda run: vae, rest_vae=rests.append
    )
    rows = []
    for number, caption in enumerate("abcd"):
        references = [torch.rand(3, 64, 80, generator=generator) * 2 - 1, torch.rand(3, 64, 64, generator=generator)]
        rows.append({"target": (32, 48), "prompt_embeds": embeds[caption], "u": torch.rand((), generator=generator),
                     "noise": torch.randn(6, 32, generator=generator),
                     "pixels": torch.rand(3, 32, 48, generator=generator) * 2 - 1,
                     "references": references if number in (0, 3) else []})  # fmt: skip
    together, sigmas = i2i.batch_losses(run, training, i2i.collate(rows))
    assert len(rests) == 1  # with --offload the VAE moves once for targets and references
    alone = [i2i.batch_losses(run, training, i2i.collate([row])) for row in rows]
    torch.testing.assert_close(together, torch.cat([losses for losses, _ in alone]), rtol=1e-5, atol=1e-5)
    assert sigmas.tolist() == [sigma.item() for _, (sigma,) in alone] and together.std() > 1e-3
    for number in (0, 3):  # the references do count
        bare = i2i.batch_losses(run, training, i2i.collate([{**rows[number], "references": []}]))[0]
        assert abs(bare - together[number]) > 1e-3


# ----------------------------------------------------------------------------------------------------------- validation


def test_a_validation_reference_belongs_to_the_prompt_of_its_place(i2i, tiny, folders, tmp_path):
    """The k-th to the k-th prompt; commas join references of one prompt; a prompt beyond has none."""
    target, first, second = folders
    flags = ("--instance_data_dir", target, "--validation_prompt", "x", "y", "z", "--validation_image")
    images = first / "a.jpeg", f"{second / 'b.jpg'},{first / 'b.jpeg'}"
    run = start_run(i2i, tiny, tmp_path, *flags, *images)
    sizes = [[image.size for image in i2i.validation_references(run.args, row)] for row in range(3)]
    assert sizes == [[(80, 96)], [(64, 64), (80, 96)], []]


def test_the_size_of_a_validation_image_is_the_trained_one_nearest_to_its_reference(i2i, tiny, folders, tmp_path):
    """Or the one that was asked for; an aligned reference is brought to it."""
    target, first, _ = folders
    flags = ("--instance_data_dir", target, "--validation_prompt", "x", "--validation_image", first / "a.jpeg")
    flags = (*flags, "--aspect_ratio_buckets", "64,96;96,80;96,64")
    size, inputs = i2i.validation_inputs(start_run(i2i, tiny, tmp_path, *flags), 0)
    assert size == (96, 80) and [image.size for image in inputs["image"]] == [(80, 96)]
    run = start_run(i2i, tiny, tmp_path, *flags, "--validation_size", "32,64")
    assert i2i.validation_inputs(run, 0)[0] == (32, 64)
    run = start_run(i2i, tiny, tmp_path, *flags, "--validation_size", "32,64", "--align_cond_image")
    assert [image.size for image in i2i.validation_inputs(run, 0)[1]["image"]] == [(64, 32)]
    bare = start_run(i2i, tiny, tmp_path, "--instance_data_dir", target, "--validation_prompt", "x", *flags[-2:])
    assert i2i.validation_inputs(bare, 0) == ((64, 96), {})


@pytest.mark.parametrize(("size", "reason"), [((63, 100), "64 pixels a side"), ((900, 100), "8:1 at most")])
def test_a_validation_reference_that_the_pipeline_would_refuse_ends_the_check(
    i2i, tiny, folders, tmp_path, size, reason
):
    """Before a model is loaded, not at the first validation."""
    target, _, _ = folders
    noise_image(size).save(tmp_path / "v.png")
    flags = ("--instance_data_dir", target, "--validation_prompt", "x", "y", "--final_validation_prompt", "z")
    with pytest.raises(i2i.UserError, match=reason) as error:
        checked(i2i, tiny, tmp_path, *flags, "--validation_image", "", tmp_path / "v.png")
    assert f"--validation_image {tmp_path / 'v.png'}" in str(error.value)


def test_pixels_of_images_are_exactly_the_image_processors(i2i, tiny, tmp_path):
    """The same operations in the same order, so that the parity of tokens can be exact."""
    image = noise_image((64, 48))
    theirs = Flux2ImageProcessor(vae_scale_factor=16).preprocess(image, height=48, width=64, resize_mode="crop")
    assert torch.equal(i2i.image_to_pixels(image, (48, 64), None, False)[None], theirs)
    assert torch.equal(i2i.image_to_pixels(image, (48, 64), None, True), theirs[0].flip(-1))
    assert ImageOps.mirror(image).size == image.size
