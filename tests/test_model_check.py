"""The model is checked before anything is loaded: each part's files are whole and hold what the run reads of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import spy
from safetensors.torch import load_file, save_file
from unit_parts import start_run

pytestmark = pytest.mark.scripts("t2i")

FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 9876543210\n"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def models(tiny, tiny_klein, tmp_path) -> Callable[[str], Path]:
    """A copy of the tiny model of a family, to break."""
    return lambda family: Path(shutil.copytree({"dev": tiny, "klein": tiny_klein}[family], tmp_path / "model"))


@pytest.fixture
def message(script, tmp_path) -> Callable[..., str]:
    """The error with which a run of the model ends before anything is loaded."""

    def check(model: Path, *flags: str) -> str:
        with pytest.raises(script.UserError) as error:
            check_model(script, model, tmp_path, *flags)
        return str(error.value)

    return check


def check_model(script, model: Path, folder: Path, *flags: str) -> None:
    """What a run checks of its model, with --dry_run too."""
    run = start_run(script, model, folder, *flags)
    if not run.args.remote_text_encoder:
        script.load_tokenizer(run)
    script.check_parts(run)


def rewrite(model: Path, part: str, change: Callable[[Weights], Weights]) -> None:
    """Saves a part with other weights."""
    path = model / part / FILES[part]
    weights = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})


def without(text: str) -> Callable[[Weights], Weights]:
    """A change that leaves out the weights with this in their names."""
    return lambda weights: {name: tensor for name, tensor in weights.items() if text not in name}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    """A change of names."""
    return lambda weights: {name.replace(old, new, 1): tensor for name, tensor in weights.items()}


def cut(text: str) -> Callable[[Weights], Weights]:
    """A change that takes the last row of these weights."""
    return lambda weights: {name: tensor[:-1] if text in name else tensor for name, tensor in weights.items()}


def in_float8(scales: str | None) -> Callable[[Weights], Weights]:
    """A change to FP8 matrices, with scales of this name beside them."""

    def change(weights: Weights) -> Weights:
        matrices = {name: tensor for name, tensor in weights.items() if tensor.dim() == 2 and "proj" in name}
        changed = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in matrices.items()}
        if scales:
            changed |= {name.removesuffix("weight") + scales: torch.full([1], 0.5) for name in matrices}
        return weights | changed

    return change


MISFITS = [
    ("dev", "text_encoder", renamed("language_model.", ""), ("281 missing", "281 unexpected", "layers.0.input_layer")),
    ("dev", "text_encoder", without("layers.7."), ("9 missing", "layers.7.input_layernorm.weight and ")),
    ("dev", "text_encoder", cut("layers.2.mlp.up"), ("1 misshapen", "(31, 32) for (32, 32)")),
    ("dev", "text_encoder", in_float8("weight_scale"), ("unexpected", "weight_scale and ", "quantised format")),
    ("klein", "text_encoder", renamed("model.", "encoder.model."), ("310 missing", "model.embed_tokens.weight")),
    ("klein", "text_encoder", without("layers.0.self_attn.q_norm"), ("1 missing", "layers.0.self_attn.q_norm.weight")),
    (
        "klein",
        "text_encoder",
        in_float8("weight_scale_inv"),
        ("unexpected", "weight_scale_inv and ", "quantised format"),
    ),
    ("dev", "transformer", without("x_embedder"), ("1 missing", "x_embedder.weight")),
    ("dev", "transformer", renamed("", "model.diffusion_model."), ("missing", "unexpected", "model.diffusion_model.")),
    ("dev", "transformer", cut("x_embedder"), ("1 misshapen", "x_embedder.weight (127, 32) for (128, 32)")),
    ("klein", "transformer", in_float8("input_scale"), ("unexpected", "input_scale and ", "quantised format")),
    ("dev", "vae", without("bn.running"), ("2 missing", "bn.running_mean and bn.running_var")),  # FLUX.1's
    ("klein", "vae", renamed("encoder.", "first_stage.encoder."), ("missing", "unexpected", "first_stage.encoder.")),
    ("klein", "vae", lambda weights: weights | {"extra": torch.zeros(1)}, ("(1 unexpected, such as extra)",)),
]


@pytest.mark.parametrize(("family", "part", "change", "told"), MISFITS)
def test_weights_that_do_not_fit_are_told_by_part_number_and_examples(message, models, family, part, change, told):
    """transformers would draw the missing ones at random, and neither library would use the unexpected ones."""
    model = models(family)
    rewrite(model, part, change)
    text = message(model)
    assert text.startswith(f"{model}/{part}: the weights do not fit the model (") and "\n" not in text
    assert [words for words in told if words not in text] == [], text


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dev", "klein"])
@pytest.mark.parametrize("text", ["nothing", "layers.31.", "lm_head", "vision_tower", "multi_modal_projector"])
def test_a_model_may_lack_what_is_not_read_of_it(script, models, tmp_path, family, text):
    """The layers above the last hidden state, the head, and what would see images."""
    model = models(family)
    layers = ("--text_encoder_out_layers", "5", "10", "30") if family == "klein" else ()
    rewrite(model, "text_encoder", without(text))
    check_model(script, model, tmp_path, *layers)


def test_a_layer_that_a_flag_asks_for_is_needed(message, models):
    model = models("dev")
    rewrite(model, "text_encoder", without("layers.31."))
    assert "layers.31." in message(model, "--text_encoder_out_layers", "10", "20", "31")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_float8_weights_without_scales_are_taken_as_they_are(script, models, tmp_path, part):
    """Their values are what they say: a plain cast, as some checkpoints are stored."""
    model = models("dev")
    rewrite(model, part, in_float8(None))
    check_model(script, model, tmp_path)
    run = start_run(script, model, tmp_path)
    loaded = script.load_transformer(run) if part == "transformer" else script.load_text_encoder(run)
    stored = load_file(model / part / FILES[part])
    name = next(name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn)
    there = name.replace("language_model.model.", "model.language_model.")
    assert torch.equal(loaded.get_parameter(there), stored[name].to(run.dtype))


# ----------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("damage", ["cut short", "pointer", "empty", "gone"])
def test_a_file_that_is_not_whole_is_named_with_what_to_do(message, models, part, damage):
    model = models("dev")
    path = model / part / FILES[part]
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "gone":
        path.rename(path.with_name("consolidated.safetensors"))
    else:
        path.write_text(POINTER if damage == "pointer" else "")
    text = message(model)
    assert part in text and path.name in text and "\n" not in text
    assert ("No such file" if damage == "gone" else "git lfs pull") in text


def split(model: Path, part: str, variant: str = "") -> Path:
    """Stores a part in three shards with an index, as large ones are; returns the index."""
    weights, stem = load_file(model / part / FILES[part]), FILES[part].removesuffix(".safetensors")
    (model / part / FILES[part]).unlink()
    names = [f"{stem}{variant}-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    shards = dict(zip(names, [dict(list(weights.items())[start::3]) for start in range(3)], strict=True))
    for name, tensors in shards.items():
        save_file(tensors, model / part / name, {"format": "pt"})
    index = model / part / f"{stem}.safetensors.index{variant}.json"
    places = {weight: name for name, tensors in shards.items() for weight in tensors}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", ".bf16"])
def test_a_model_in_shards_passes_and_loads(script, models, tmp_path, variant):
    """As the libraries name the shards of a variant, too."""
    model = models("dev")
    for part in FILES:
        split(model, part, variant)
    flags = ("--variant", "bf16") if variant else ()
    check_model(script, model, tmp_path, *flags)
    run = start_run(script, model, tmp_path, *flags)
    assert script.LatentCodec(run).channels == 32
    for load in (script.load_text_encoder, script.load_vae, script.load_transformer):
        assert not any(parameter.is_meta for parameter in load(run).parameters())


@pytest.mark.parametrize("part", FILES)
def test_a_missing_shard_is_named(message, models, part):
    model = models("dev")
    split(model, part)
    shard = next((model / part).glob("*-00002-of-*"))
    shard.unlink()
    text = message(model)
    assert f"{shard}: missing" in text


def test_an_index_that_is_a_pointer_and_a_hole_in_a_shard_are_told(message, models):
    model = models("dev")
    index = split(model, "transformer")
    shard = next((model / "transformer").glob("*-00002-of-*"))
    weights = load_file(shard)
    name = weights.popitem()[0]
    save_file(weights, shard)
    assert f"transformer: the weights do not fit the model (1 missing, such as {name})" in message(model)
    index.write_text(POINTER)
    assert f"{index}: not a JSON object" in message(model)


def test_a_variant_that_is_not_there_is_told(message, models):
    text = message(models("dev"), "--variant", "fp16")
    assert "diffusion_pytorch_model.fp16.safetensors: missing" in text and "another --variant" in text


# ------------------------------------------------------------------------------------- the text encoder, its tokenizer


def test_a_text_encoder_of_the_other_family_is_told(message, models, tiny_klein):
    model = models("dev")
    shutil.rmtree(model / "text_encoder")
    shutil.copytree(tiny_klein / "text_encoder", model / "text_encoder")
    assert "text_encoder: cannot be read as Mistral3ForConditionalGeneration" in message(model)


def test_a_text_encoder_that_the_check_let_pass_is_refused_by_the_librarys_own_report(
    script, models, tmp_path, monkeypatch
):
    """As of formats that the check leaves to transformers: what it had to guess is an error, never trained on."""
    model = models("dev")
    rewrite(model, "text_encoder", without("layers.7."))
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "another"}
    (model / "text_encoder" / "config.json").write_text(json.dumps(config))
    run = start_run(script, model, tmp_path)
    script.check_parts(run)
    del config["quantization_config"]
    (model / "text_encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(script.UserError, match="text_encoder: the weights do not fit the model .9 missing"):
        script.load_text_encoder(run)


@pytest.mark.parametrize("family", ["dev", "klein"])
@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("damage", ["gone", "pointer"])
def test_a_tokenizer_that_loses_the_prompt_is_told(message, models, family, file, damage):
    """transformers takes a pointer for a template, and where klein's vocabulary is missing makes an empty one."""
    model = models(family)
    path = model / "tokenizer" / file
    path.unlink()
    if damage == "pointer":
        path.write_text(POINTER)
    text = message(model)
    assert text.startswith(f"{model}/tokenizer: ") and "download it again" in text and "\n" not in text


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_told(script, models, message):
    """On a GPU the lookup would end in an assertion of the device."""
    model = models("dev")
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    config["text_config"]["vocab_size"] = 100
    (model / "text_encoder" / "config.json").write_text(json.dumps(config))
    assert "tokenizer: does not fit the text encoder" in message(model) and "of 100 tokens" in message(model)


def test_with_a_remote_encoder_neither_is_looked_at(script, models, tmp_path):
    model = models("dev")
    shutil.rmtree(model / "text_encoder")
    shutil.rmtree(model / "tokenizer")
    url = ("--remote_text_encoder", "--remote_text_encoder_url", "http://127.0.0.1:9/")
    check_model(script, model, tmp_path, *url)


# -------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "transformer/config.json"])
def test_a_config_that_is_missing_or_no_json_is_named(message, models, file):
    model = models("dev")
    for content in '{"_class_name": ', "[1]":
        (model / file).write_text(content)
        assert f"{model / file}: not a JSON object" in message(model)
    if file != "model_index.json":  # that one is looked for on the command line
        (model / file).unlink()
        assert f"{model / file}: missing" in message(model)


# ------------------------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("flags", [("--dry_run",), ()])
def test_the_check_comes_before_anything_is_loaded_and_the_output_folder_is_left_alone(
    script, train, models, tmp_path, monkeypatch, part, flags
):
    model = models("dev")
    rewrite(model, part, lambda weights: dict(list(weights.items())[3:]))
    loads = [spy(monkeypatch, script, name) for name in ("load_text_encoder", "load_vae", "load_transformer")]
    with pytest.raises(script.UserError, match=f"{part}: the weights do not fit the model .3 missing"):
        train("--pretrained_model_name_or_path", model, *flags)
    assert loads == [[], [], []] and not (tmp_path / "out").exists()
