"""Prompts and images become exactly what the installed pipelines make of them, and are kept under honest names."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from safetensors.torch import load_file, save_file
from unit_parts import log_lines, start_run

pytestmark = pytest.mark.scripts("t2i")

PROMPTS = {
    "empty": "",
    "short": "a photo of sks toy on the beach",
    "cut at the limit": "a red circle on a blue background, " * 40,
    "with an image token": "a [IMG] photo of [IMG] sks toy",
    "not English": "ein Hündchen – 犬 🐶\nin two lines",
}
FAMILIES = {"dev": Flux2Pipeline, "klein": Flux2KleinPipeline}


@pytest.fixture(scope="module")
def models(tiny, tiny_klein) -> dict[str, Path]:
    """The model folders by family."""
    return {"dev": tiny, "klein": tiny_klein}


@pytest.fixture(scope="module")
def pipelines(models) -> dict[str, object]:
    """The installed pipelines in fp32, whole."""
    return {name: FAMILIES[name].from_pretrained(folder, torch_dtype=torch.float32) for name, folder in models.items()}


@pytest.fixture(scope="module")
def runs(script, models, tmp_path_factory) -> dict[str, object]:
    """A run of each family."""
    return {name: start_run(script, folder, tmp_path_factory.mktemp(name)) for name, folder in models.items()}


@pytest.fixture(scope="module")
def vae(script, runs) -> object:
    """Our VAE of the [dev] model."""
    return script.load_vae(runs["dev"])


# ---- prompts ----


@pytest.fixture(scope="module")
def encoders(script, runs) -> dict[str, tuple]:
    """(tokenizer, cut encoder) of each family."""
    return {name: (script.load_tokenizer(run), script.load_text_encoder(run)) for name, run in runs.items()}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_embedding_is_exactly_the_pipelines(script, runs, pipelines, encoders, family, prompt):
    """With the encoder cut to the layers that are read: the difference is 0, not small."""
    expected = pipelines[family].encode_prompt(prompt, max_sequence_length=64)[0][0]
    actual = script.encode_prompt(runs[family], *encoders[family], prompt)
    assert actual.shape == expected.shape == (64, 96)
    assert (actual - expected).abs().max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_a_prompt_embedding_is_exactly_the_pipelines(script, models, tmp_path, family):
    """In the dtype of a GPU run."""
    run = start_run(script, models[family], tmp_path, "--mixed_precision", "bf16")
    pipeline = FAMILIES[family].from_pretrained(models[family], torch_dtype=torch.bfloat16, transformer=None, vae=None)
    expected = pipeline.encode_prompt("a photo of sks toy", max_sequence_length=64)[0][0]
    actual = script.encode_prompt(run, script.load_tokenizer(run), script.load_text_encoder(run), "a photo of sks toy")
    assert actual.dtype == expected.dtype == torch.bfloat16 and actual.equal(expected)


@pytest.mark.parametrize("length", [64, 100, 512])
def test_the_tokens_are_padded_to_the_length_that_is_asked_for(script, runs, pipelines, encoders, length):
    """Up to 512, and equal to the pipeline's there too."""
    run = replace(
        runs["dev"], args=script.argparse.Namespace(**{**vars(runs["dev"].args), "max_sequence_length": length})
    )
    expected = pipelines["dev"].encode_prompt("a cat", max_sequence_length=length)[0][0]
    assert script.encode_prompt(run, *encoders["dev"], "a cat").equal(expected) and len(expected) == length


@pytest.mark.parametrize("family, kept", [("dev", 31), ("klein", 28)])
def test_the_encoder_keeps_one_layer_more_than_the_last_hidden_state(encoders, family, kept):
    """And no more: a quarter of the encoder's memory."""
    model = encoders[family][1].model
    assert len(getattr(model, "language_model", model).layers) == kept


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_less_would_change_the_last_third_of_the_embedding(script, runs, encoders, family):
    """transformers puts the final norm on the last hidden state: the reason for the layer more."""
    run = runs[family]
    tokenizer, encoder = encoders[family]
    too_short = script.load_text_encoder(replace(run, text_layers=tuple(layer - 1 for layer in run.text_layers)))
    right, wrong = (script.encode_prompt(run, tokenizer, model, "a cat") for model in (encoder, too_short))
    assert right[:, :64].equal(wrong[:, :64])
    assert (right[:, 64:] - wrong[:, 64:]).abs().max() > 0.01


def test_the_last_layer_of_the_encoder_can_be_chosen_too(script, tiny, pipelines, tmp_path):
    """--text_encoder_out_layers with the normed state: nothing is cut, as in the pipeline."""
    run = start_run(script, tiny, tmp_path, "--text_encoder_out_layers", "1", "16", "32")
    expected = pipelines["dev"].encode_prompt("a cat", max_sequence_length=64, text_encoder_out_layers=(1, 16, 32))[0]
    actual = script.encode_prompt(run, script.load_tokenizer(run), script.load_text_encoder(run), "a cat")
    assert actual.equal(expected[0])


class Seen(Exception):
    """The encoder has been called."""


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_counted_uncut_with_the_template(script, runs, encoders, family):
    """They are those that the pipeline gives the encoder, without the padding and what it cuts off."""
    run, (tokenizer, encoder) = runs[family], encoders[family]
    for prompt in PROMPTS.values():
        with mock.patch.object(type(encoder), "forward", side_effect=Seen) as forward, pytest.raises(Seen):
            script.encode_prompt(run, tokenizer, encoder, prompt)
        given = forward.call_args.kwargs
        seen = given["input_ids"][given["attention_mask"].bool()].tolist()
        counted = script.token_ids(run.family, tokenizer, prompt)
        assert counted[: len(seen)] == seen and (len(counted) == len(seen)) == (prompt != PROMPTS["cut at the limit"])


def test_captions_that_are_cut_are_named(script, tiny, photos, tmp_path):
    """At the data check, with the length of the longest."""
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "03.txt").write_text(PROMPTS["cut at the limit"])
    with log_lines() as lines:
        script.check_data(start_run(script, tiny, tmp_path, "--instance_data_dir", data))
    assert any("1 captions are cut at 64 tokens: 03.jpg" in line for line in lines)


# ---- tokens and coordinates ----


def test_latents_become_the_pipelines_tokens(script, runs):
    """Patches of 2 x 2, row by row; and back again, in `decode_tokens` below."""
    latents = torch.randn(2, 8, 6, 10)
    codec = script.LatentCodec(runs["dev"])
    codec.mean_C, codec.std_C = torch.zeros(32), torch.ones(32)
    expected = Flux2Pipeline._pack_latents(Flux2Pipeline._patchify_latents(latents))
    assert script.tokens_from_moments(codec, torch.stack([latents, latents], 1)).equal(expected)


@pytest.mark.parametrize("rows, columns", [(1, 1), (4, 4), (3, 7), (84, 196)])
def test_position_ids_are_the_pipelines(script, rows, columns):
    """(0, row, column, 0) of every token, row by row, as integers."""
    expected = Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 8, rows, columns))
    actual = script.position_ids(rows, columns)
    assert actual.equal(expected) and actual.dtype == expected.dtype


@pytest.mark.parametrize("length", [1, 64, 512])
def test_text_ids_are_the_pipelines(script, length):
    """(0, 0, 0, l), pads included."""
    expected = Flux2Pipeline._prepare_text_ids(torch.zeros(1, length, 8))
    actual = script.position_ids(1, 1, length=length)
    assert actual.equal(expected) and actual.dtype == expected.dtype


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_normalised_tokens_are_exactly_the_pipelines(script, runs, pipelines, family, size):
    """From the mode of the VAE's distribution, as references are encoded at inference."""
    pipeline = pipelines[family]
    pixels = torch.rand(2, 3, *size) * 2 - 1
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # as the pipeline's image processor hands them over
    with torch.no_grad():
        expected = pipeline._pack_latents(pipeline._encode_vae_image(pixels, None))
    codec = script.LatentCodec(runs[family])
    actual = script.tokens_from_moments(codec, script.encode_pixels(pipeline.vae, pixels))
    assert actual.shape == (2, size[0] * size[1] // 256, 32) == (2, size[0] * size[1] // 256, codec.channels)
    assert (actual - expected).abs().max() == 0


def test_sampled_latents_are_mean_plus_deviation_times_noise(script, runs, vae):
    """--vae_encode_mode sample, as diffusers draws it."""
    posterior = vae.encode(torch.rand(1, 3, 64, 64)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    plain, moments = script.LatentCodec(runs["dev"]), torch.stack([posterior.mean, posterior.logvar], 1)
    plain.mean_C, plain.std_C = torch.zeros(32), torch.ones(32)
    sampled = posterior.sample(torch.Generator().manual_seed(5))
    expected = Flux2Pipeline._pack_latents(Flux2Pipeline._patchify_latents(sampled))
    assert torch.allclose(script.tokens_from_moments(plain, moments, noise), expected, atol=1e-6)
    assert not torch.allclose(script.tokens_from_moments(plain, moments), expected, atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_decoded_tokens_are_the_pipelines_image(script, runs, pipelines, size):
    """At most one level of 255 apart; a transposed image would be far away."""
    pipeline = pipelines["dev"]
    pipeline.set_progress_bar_config(disable=True)
    rows, columns = size[0] // 16, size[1] // 16
    noise = torch.randn(2, 32, rows, columns, generator=torch.Generator().manual_seed(0))
    call = {"prompt_embeds": pipeline.encode_prompt(["a cat", "a dog"], max_sequence_length=64)[0]}
    call |= {"latents": noise, "num_inference_steps": 1, "height": size[0], "width": size[1]}
    expected = pipeline(**call).images
    tokens = pipeline(**call, output_type="latent").images
    actual = script.decode_tokens(script.LatentCodec(runs["dev"]), pipeline.vae, tokens, rows, columns)
    assert [image.size for image in actual] == [(size[1], size[0])] * 2
    for one, other in zip(actual, expected, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
        assert np.asarray(other).std() > 1  # a flat image would agree with any flat image


@pytest.mark.parametrize("family", FAMILIES)
def test_a_validation_image_is_what_the_users_pipeline_draws(script, runs, pipelines, family):
    """Same prompt, seed, size, steps and guidance: embedded for [dev], against the empty prompt for [klein]."""
    run = replace(runs[family], args=script.argparse.Namespace(**{**vars(runs[family].args), "num_inference_steps": 2}))
    script.encode_prompts(run, ["a cat", ""])
    codec = script.LatentCodec(run)
    pipeline = script.make_pipeline(run, pipelines[family].transformer, pipelines[family].vae)
    actual = script.generate(run, codec, pipeline, "a cat", [("validation", 0, 0)], (48, 80))
    pipelines[family].set_progress_bar_config(disable=True)
    expected = pipelines[family](
        prompt="a cat",
        height=48,
        width=80,
        num_inference_steps=2,
        guidance_scale=run.args.validation_guidance_scale,
        generator=script.make_generator(run.seed, "validation", 0, 0),
        max_sequence_length=64,
    ).images
    assert actual[0].size == (80, 48) and np.asarray(expected[0]).std() > 1
    assert np.abs(np.asarray(actual[0], int) - np.asarray(expected[0], int)).max() <= 1


# ---- the VAE's statistics ----


def test_the_latent_space_is_opened_without_loading_the_vae(script, runs, vae, monkeypatch):
    """Its statistics are read from the weight file, and are those of the loaded VAE."""

    def refuse(*_, **__):
        raise AssertionError("the VAE was loaded")

    monkeypatch.setattr(script.AutoencoderKLFlux2, "from_pretrained", refuse)
    codec = script.LatentCodec(runs["dev"])
    assert codec.mean_C.equal(vae.bn.running_mean)
    assert codec.std_C.equal(torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps))
    assert codec.channels == 32


def test_the_vae_computes_in_fp32_in_a_bf16_run_too(script, tiny, tmp_path):
    """bf16 statistics would be wrong by up to 0.4 %."""
    loaded = script.load_vae(start_run(script, tiny, tmp_path, "--mixed_precision", "bf16"))
    assert {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


def test_a_vae_that_goes_to_rest_gets_the_weights_that_it_was_loaded_with_and_copies_none(script, tiny, tmp_path):
    """They are frozen: coming back from the device would copy 336 MB at every step of an --offload run."""
    vae, pixels = script.load_vae(start_run(script, tiny, tmp_path)), torch.rand(1, 3, 32, 32)
    loaded, before = (
        {name: tensor.data_ptr() for name, tensor in vae.state_dict().items()},
        script.encode_pixels(vae, pixels),
    )
    assert vae.to("meta").device.type == "meta"
    rested = script.rest_vae(vae)
    assert {name: tensor.data_ptr() for name, tensor in rested.state_dict().items()} == loaded
    assert script.encode_pixels(rested, pixels).equal(before)
    assert not any(parameter.requires_grad for parameter in rested.parameters())


def test_another_variant_beside_the_weights_is_not_read(script, tiny, tmp_path):
    """Neither for the statistics: diffusers would not load it either."""
    model = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    shifted = {**weights, "bn.running_mean": weights["bn.running_mean"] + 1}
    save_file(shifted, model / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    plain = script.LatentCodec(start_run(script, model, tmp_path / "a"))
    assert plain.mean_C.equal(weights["bn.running_mean"].float())
    variant = script.LatentCodec(start_run(script, model, tmp_path / "b", "--variant", "fp16"))
    assert variant.mean_C.equal(shifted["bn.running_mean"].float())


# ---- cached prompts ----


def touch(path: Path) -> None:
    """Another modification time, as after a download of other weights of the same size."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_the_name_of_an_embedding_changes_with_everything_that_it_depends_on(script, tiny, tiny_klein, tmp_path):
    """Prompt, layers, length, dtype, model, encoder weights, tokenizer and template."""
    model = shutil.copytree(tiny, tmp_path / "model")
    names = {}

    def remember(reason: str, *flags: str, prompt: str = "a cat", folder: Path = model) -> None:
        run = start_run(script, folder, tmp_path / "run", *flags)
        names[reason] = script.open_prompts(run).path(prompt).name

    remember("as it is")
    remember("prompt", prompt="a cat ")
    remember("layers", "--text_encoder_out_layers", "10", "20", "29")
    remember("order of layers", "--text_encoder_out_layers", "20", "10", "30")
    remember("length", "--max_sequence_length", "65")
    remember("dtype", "--mixed_precision", "bf16")
    remember("model", folder=tiny_klein)
    remember("remote", "--remote_text_encoder", "--remote_text_encoder_url", "http://localhost:1/predict")
    touch(model / "text_encoder" / "model.safetensors")
    remember("encoder weights")
    template = model / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    remember("chat template")
    tokenizer = json.loads((model / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["truncation"] = None if tokenizer.get("truncation") else {"max_length": 7, "strategy": "LongestFirst"}
    (model / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    remember("tokenizer")
    twins = [reason for reason in names if list(names.values()).count(names[reason]) > 1]
    assert not twins, f"the same name in spite of another {twins}"


def test_the_name_of_an_embedding_does_not_change_with_anything_else(script, tiny, tmp_path):
    """Training flags, the VAE and the transformer: a second run encodes nothing."""
    model = shutil.copytree(tiny, tmp_path / "model")
    first = script.open_prompts(start_run(script, model, tmp_path / "a")).path("a cat").name
    touch(model / "vae" / "diffusion_pytorch_model.safetensors")
    touch(model / "transformer" / "diffusion_pytorch_model.safetensors")
    flags = ("--seed", "5", "--rank", "8", "--resolution", "128", "--learning_rate", "1", "--caption_dropout", "0.1")
    assert script.open_prompts(start_run(script, model, tmp_path / "b", *flags)).path("a cat").name == first
    assert "cat" not in first


def test_each_different_prompt_is_encoded_once_and_the_second_start_loads_no_encoder(
    script, tiny, tmp_path, monkeypatch
):
    """And what comes back from the cache is what the encoder gave."""
    run = start_run(script, tiny, tmp_path)
    encoded, encode = [], script.encode_prompt

    def remembering(run, tokenizer, encoder, prompt):
        encoded.append((prompt, encode(run, tokenizer, encoder, prompt)))
        return encoded[-1][1]

    monkeypatch.setattr(script, "encode_prompt", remembering)
    cache = script.encode_prompts(run, ["a cat", "", "a cat", "a dog"])
    assert [prompt for prompt, _ in encoded] == ["a cat", "", "a dog"]
    monkeypatch.setattr(script, "load_text_encoder", None)
    again = script.encode_prompts(start_run(script, tiny, tmp_path), ["a dog", "a cat"])
    assert len(encoded) == 3
    for prompt, embedding in encoded:
        assert cache.get(prompt).equal(embedding) and again.get(prompt).equal(embedding)


def test_the_empty_prompt_is_encoded_where_it_is_needed(script, runs, tiny, tmp_path):
    """For caption dropout, and as [klein]'s negative prompt; not otherwise."""
    assert "" not in script.all_prompts(runs["dev"], [])
    assert "" in script.all_prompts(start_run(script, tiny, tmp_path, "--caption_dropout", "0.1"), [])
    assert "" in script.all_prompts(runs["klein"], [])


# ---- cached latents ----


@pytest.fixture
def image(script, photos) -> object:
    """The second photograph, lying on its side, as a checked image of 64 x 64."""
    path = photos / "01.jpg"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return script.Image(path.name, path, sha256=sha256, size=(128, 96), target=(64, 64))


def latent_file(codec: object, image: object, flip: bool = False) -> Path:
    """Where the latent of an image is kept."""
    return codec.cache.path(*codec.key(image, flip))


def test_the_name_of_a_latent_changes_with_everything_that_it_depends_on(script, tiny, tmp_path, image, monkeypatch):
    """Content, target, flip, VAE, decode policy."""
    model = shutil.copytree(tiny, tmp_path / "model")
    run = start_run(script, model, tmp_path / "run")
    codec = script.LatentCodec(run)
    paths = [latent_file(codec, image), latent_file(codec, image, flip=True)]
    paths += [latent_file(codec, replace(image, sha256="0")), latent_file(codec, replace(image, target=(64, 80)))]
    paths += [latent_file(codec, replace(image, target=(80, 64)))]
    monkeypatch.setattr(script, "DECODE_POLICY", script.DECODE_POLICY + 1)
    paths.append(latent_file(codec, image))
    monkeypatch.undo()
    touch(model / "vae" / "diffusion_pytorch_model.safetensors")
    paths.append(latent_file(script.LatentCodec(run), image))
    assert len(set(paths)) == len(paths)


def test_the_name_of_a_latent_does_not_change_with_anything_else(script, tiny, tmp_path, image):
    """Its file name and size in pixels, the training flags, the encoder and the transformer."""
    model = shutil.copytree(tiny, tmp_path / "model")
    first = latent_file(script.LatentCodec(start_run(script, model, tmp_path / "a")), image).name
    touch(model / "text_encoder" / "model.safetensors")
    touch(model / "transformer" / "diffusion_pytorch_model.safetensors")
    flags = ("--seed", "5", "--rank", "8", "--mixed_precision", "bf16", "--vae_encode_mode", "sample")
    codec = script.LatentCodec(start_run(script, model, tmp_path / "b", *flags))
    other = replace(image, name="other.jpg", path=None, size=(1, 1))
    assert latent_file(codec, other).name == first


def test_cached_latents_equal_uncached_ones(script, tiny, tmp_path, image, vae, monkeypatch):
    """The file holds what a visit with the centre crop would encode, bit for bit, and its mirror image beside it."""
    flags = ("--cache_latents", "--skip_final_inference", "--random_flip", "--instance_data_dir", image.path.parent)
    run = start_run(script, tiny, tmp_path, *flags)
    codec = script.LatentCodec(run)
    monkeypatch.setattr(script, "load_vae", lambda _: vae)
    script.encode_images(run, codec, [image])
    for flip in (False, True):
        pixels = script.image_to_pixels(script.decode_image(image.read()), image.target, None, flip)
        cached = codec.cache.get(*codec.key(image, flip))
        assert cached.dtype == torch.float32 and cached.shape == (2, 8, 8, 8)
        assert cached.equal(script.encode_pixels(vae, pixels[None])[0])
    assert len(list(codec.cache.folder.iterdir())) == 2


def test_the_second_start_encodes_no_image_and_loads_no_vae(script, tiny, tmp_path, image, vae, monkeypatch):
    """Two samples with the same image are one latent."""
    run = start_run(script, tiny, tmp_path, "--cache_latents", "--skip_final_inference")
    codec, encoded, encode = script.LatentCodec(run), [], script.encode_pixels

    def counting(vae, pixels):
        encoded.append(1)
        return encode(vae, pixels)

    monkeypatch.setattr(script, "encode_pixels", counting)
    monkeypatch.setattr(script, "load_vae", lambda _: vae)
    script.encode_images(run, codec, [image, replace(image, name="a copy.jpg")])
    assert len(encoded) == 1
    monkeypatch.setattr(script, "load_vae", None)
    assert script.encode_images(run, codec, [image]) is None
    assert len(encoded) == 1


def test_a_full_disk_is_an_error_before_anything_is_encoded(script, tiny, tmp_path, image, monkeypatch):
    """With what is needed, what is free and the flag that helps."""
    run = start_run(script, tiny, tmp_path, "--cache_latents")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(script.UserError, match="latent cache needs .* are free; see --latents_cache_dir"):
        script.encode_images(run, script.LatentCodec(run), [image])


def test_the_size_of_the_latent_cache_is_estimated_rightly(script, tiny, tmp_path, image, vae, monkeypatch):
    """Within the few bytes of a header per file: too small an estimate would fill the disk."""
    run = start_run(script, tiny, tmp_path, "--cache_latents", "--random_flip", "--skip_final_inference")
    codec, needs = script.LatentCodec(run), []
    monkeypatch.setattr(script, "check_space", lambda folder, need, *_: needs.append(need))
    monkeypatch.setattr(script, "load_vae", lambda _: vae)
    script.encode_images(run, codec, [replace(image, target=(160, 96))])
    written = sum(path.stat().st_size for path in codec.cache.folder.iterdir())
    assert needs and needs[0] <= written <= needs[0] + 2 * 200


def test_an_interrupted_write_leaves_no_half_file_under_the_real_name(script, tmp_path, monkeypatch):
    """The cache is shared and believed: a file is there whole or not at all."""

    def half(path, data):
        with path.open("wb") as stream:
            stream.write(data[:2])
        raise OSError("disk full")

    (tmp_path / "cache").mkdir()
    script.write_atomically(tmp_path / "cache" / "a", b"old content")
    monkeypatch.setattr(Path, "write_bytes", half)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="disk full"):
            script.write_atomically(tmp_path / "cache" / name, b"new content")
    assert (tmp_path / "cache" / "a").read_bytes() == b"old content" and not (tmp_path / "cache" / "b").exists()
