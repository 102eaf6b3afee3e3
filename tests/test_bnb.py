"""--bnb_quantization_config_path and checkpoints stored quantised: frozen weights in NF4 or 8 bit, the adapter in fp32.

bitsandbytes computes both formats on the CPU, forward and backward: nothing here is pretended.
"""

import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import bitsandbytes.nn as bnb
import diffusers
import pytest
import torch
import transformers
from conftest import draw_photo
from helpers import bitsandbytes_on_cpu
from PIL import Image
from runs import assert_same_run, column, lora, spy
from test_fp8 import lora_gradients, relative_error, run_transformer
from unit_parts import start_run

CONFIGS = Path(__file__).parent.parent / "configs" / "quantization"
KINDS = ("nf4", "int8")
pytestmark = [pytest.mark.usefixtures("bnb_on_cpu"), pytest.mark.scripts("t2i"), pytest.mark.slow]
# Relative error of a layer's output and input gradient against fp32. Seen: NF4 0.09; 8 bit 0.0074 to 0.0108,
# the most where an image is drawn and activations are 8 bit too.
ERRORS = {"nf4": (0.08, 0.1), "int8": (0.005, 0.012)}


def flags_of(kind: str) -> tuple[str, str]:
    """The flag with the shipped file of this format."""
    return "--bnb_quantization_config_path", str(CONFIGS / f"{kind}.json")


def settings_of(kind: str) -> dict:
    """What the shipped file holds."""
    return json.loads((CONFIGS / f"{kind}.json").read_text())


def frozen_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The Linear modules that are not the adapter's, by the names of the plain model."""
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name.replace(".base_layer", ""): module for name, module in linears.items() if ".lora_" not in name}


def base_bytes(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that is saved of the base: weights, scales, quantisation tables."""
    state = transformer.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if ".lora_" not in name}


# ------------------------------------------------------------------------------------------------------- single layers


LAYER = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_output_and_input_gradient_are_within_the_error_of_the_format(
    script, tiny, tmp_path, kind, precision, training
):
    """Against fp32, while training and while drawing; the dtype of the input comes back. Frozen, without bias."""
    weight = script.load_transformer(start_run(script, tiny, tmp_path)).get_submodule(LAYER).weight
    run = start_run(script, tiny, tmp_path, "--mixed_precision", precision, *flags_of(kind))
    quantized = script.load_transformer(run).get_submodule(LAYER).train(training)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 50, weight.shape[1], generator=generator)
    gradient = torch.randn(2, 50, weight.shape[0], generator=generator)
    given = hidden.to(run.dtype).requires_grad_(True)
    output = quantized(given)
    output.backward(gradient.to(run.dtype))
    assert output.dtype == given.grad.dtype == run.dtype and output.shape == gradient.shape
    assert [name for name, _ in quantized.named_parameters()] == ["weight"] and not quantized.weight.requires_grad
    errors = relative_error(output, hidden @ weight.T), relative_error(given.grad, gradient @ weight)
    low, high = ERRORS[kind]
    assert all(low < error < high for error in errors), errors


def test_the_settings_are_the_files_and_products_are_in_the_compute_dtype(script, tiny, tmp_path):
    """NF4 with nested scales as in the shipped file; what a file leaves out is as in bitsandbytes: FP4, flat scales."""
    layer = script.load_transformer(start_run(script, tiny, tmp_path, *flags_of("nf4"))).get_submodule(LAYER)
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    eight = script.load_transformer(start_run(script, tiny, tmp_path, *flags_of("int8"))).get_submodule(LAYER)
    assert eight.state.threshold == 6.0 and not eight.state.has_fp16_weights
    path = tmp_path / "settings.json"
    for dtype in (None, "bfloat16"):
        path.write_text(json.dumps({"load_in_4bit": True} | ({"bnb_4bit_compute_dtype": dtype} if dtype else {})))
        run = start_run(script, tiny, tmp_path, "--bnb_quantization_config_path", path)
        layer = script.load_transformer(run).get_submodule(LAYER)
        assert layer.weight.quant_state.quant_type == "fp4" and not layer.weight.quant_state.nested
        assert layer.compute_dtype == (torch.bfloat16 if dtype else torch.float32)


# ------------------------------------------------------------------------------------------------------ the transformer


def with_random_lora(script, run) -> torch.nn.Module:
    """The run's transformer in eval mode, with an adapter that has an effect."""
    transformer = script.load_transformer(run).eval()
    for name, parameter in script.add_lora(run, transformer).items():
        parameter.data.normal_(std=0.05, generator=script.make_generator(0, name))
    return transformer


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_are_quantised_and_everything_else_keeps_its_precision(script, tiny, tmp_path, kind):
    """Embedders, modulation and the last layer; the adapter stays fp32 and is all that is trained."""
    run = start_run(script, tiny, tmp_path, "--mixed_precision", "bf16", *flags_of(kind))
    transformer = with_random_lora(script, run)
    kinds = {name: type(module) for name, module in frozen_layers(transformer).items()}
    inside = {name for name in kinds if name.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    assert len(inside) == 2 * 12 + 4 * 2 and len(kinds) > len(inside)
    assert {kinds[name] for name in inside} == {bnb.Linear4bit if kind == "nf4" else bnb.Linear8bitLt}
    assert {cls for name, cls in kinds.items() if name not in inside} == {torch.nn.Linear}
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and len(trained) == 48
    assert all(".lora_" in name for name in trained)
    stored = {p.dtype for name, p in transformer.named_parameters() if name not in trained}
    assert stored == {torch.bfloat16, torch.uint8 if kind == "nf4" else torch.int8}


@pytest.mark.parametrize(("kind", "low", "high"), [("nf4", 0.25, 0.30), ("int8", 0.50, 0.54)])
def test_frozen_blocks_take_the_share_of_bf16_that_the_format_promises(script, tiny, tmp_path, kind, low, high):
    """Weights, scales and tables together. The tables are shared out over small layers here."""
    sizes = []
    for flags in ((), flags_of(kind)):
        transformer = script.load_transformer(start_run(script, tiny, tmp_path, "--mixed_precision", "bf16", *flags))
        blocks = torch.nn.ModuleList([*transformer.transformer_blocks, *transformer.single_transformer_blocks])
        tables = ("quant_map", "quant_state", "weight_format")
        tensors = [tensor for name, tensor in blocks.state_dict().items() if not any(word in name for word in tables)]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    assert low < sizes[1] / sizes[0] < high


@pytest.mark.parametrize(("kind", "worst", "cosine"), [("nf4", 0.12, 0.95), ("int8", 0.02, 0.999)])
def test_the_whole_model_is_near_the_unquantised_one_in_output_and_lora_gradient(
    script, tiny, tmp_path, kind, worst, cosine
):
    """Seen: 0.085 and 0.011 in the output, cosines 0.966 and 0.9996. Checkpointing changes nothing."""
    plain, quantized = (with_random_lora(script, start_run(script, tiny, tmp_path, *f)) for f in ((), flags_of(kind)))
    with torch.no_grad():
        error = relative_error(run_transformer(quantized), run_transformer(plain))
    first, second = lora_gradients(plain), lora_gradients(quantized.train())
    quantized.enable_gradient_checkpointing()
    torch.testing.assert_close(lora_gradients(quantized), second, rtol=1e-5, atol=1e-7)
    similarity = torch.nn.functional.cosine_similarity(first, second, dim=0).item()
    assert 0 < error < worst and similarity > cosine, (error, similarity)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.e2e
@pytest.mark.parametrize(("kind", "distance"), [("nf4", 0.06), ("int8", 0.012)])
def test_training_follows_the_unquantised_run_and_leaves_the_base_as_it_was(
    script, train, monkeypatch, kind, distance, validation_reference
):
    """Losses within a few per cent, with accumulation, checkpointing and images on the way; no bit of the base."""
    flags = ("--max_train_steps", "6", "--learning_rate", "1e-3", "--gradient_accumulation_steps", "2")
    plain, before = train(*flags, output="a"), []
    loaded = spy(monkeypatch, script, "load_transformer")

    def watch(run, transformer, original=script.add_lora):
        before.append(base_bytes(transformer))
        return original(run, transformer)

    monkeypatch.setattr(script, "add_lora", watch)
    draw = ("--validation_prompt", "a toy", *validation_reference, "--validation_steps", "2")
    draw += ("--num_validation_images", "1", "--num_inference_steps", "2", "--gradient_checkpointing")
    quantized = train(*flags, *flags_of(kind), *draw, output="b")
    ratios = [b / a for a, b in zip(column(plain, "loss"), column(quantized, "loss"), strict=True)]
    assert all(abs(ratio - 1) < distance for ratio in ratios) and ratios != [1.0] * 6, ratios
    assert all(tensor.abs().max() > 0 for tensor in lora(quantized).values())
    after = base_bytes(loaded[0].result)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items()}
    assert len(before) == len(loaded) == 1 and before[0].keys() == after.keys()
    assert [name for name, tensor in after.items() if not torch.equal(tensor, before[0][name])] == []
    assert (quantized / "samples" / "final").is_dir()


@pytest.mark.e2e
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_that_was_never_stopped(script, train, tmp_path, kind):
    """To the last bit. Another content of the file is another run, and so is going on without it."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings_of(kind)))
    quantized = ("--bnb_quantization_config_path", path)
    flags = ("--gradient_checkpointing", "--checkpointing_steps", "2", "--max_train_steps", "4")
    whole = train(*quantized, *flags, output="whole")
    train(*quantized, *flags, "--max_train_steps", "2", output="cut")
    resume = ("--resume_from_checkpoint", "latest")
    assert_same_run(whole, train(*quantized, *flags, *resume, output="cut"))
    changed = {"bnb_4bit_quant_type": "fp4"} if kind == "nf4" else {"llm_int8_threshold": 0.0}
    path.write_text(json.dumps(settings_of(kind) | changed))
    with pytest.raises(script.UserError, match="bnb_quantization_config: was"):
        train(*quantized, *flags, *resume, output="cut")
    with pytest.raises(script.UserError, match=r"bnb_quantization_config: was .*, is None"):
        train(*flags, *resume, output="cut")


# ------------------------------------------------------------------------------------------------- the settings' file


UNUSABLE = {
    "no such file": (None, "No such file"),
    "no JSON": ("load_in_4bit", "Expecting value"),
    "a list": ("[1]", "'list' object"),
    "nothing chosen": ("{}", 'one of "load_in_4bit" and "load_in_8bit" must be true'),
    "both": ('{"load_in_4bit": true, "load_in_8bit": true}', "must be true"),
    "a word for a truth": ('{"load_in_4bit": "true"}', "must be true"),
    "a number for a truth": ('{"load_in_4bit": 1}', "must be true"),
}
WRONG = {
    "a misspelt key": ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, 'quant_typ is "nf4"; use one of '),
    "an unknown format": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, 'is "nf5"; use "nf4" or "fp4"'),
    "fp16": ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}, 'use "bfloat16" or "float32"'),
    "no dtype": ({"load_in_4bit": True, "bnb_4bit_quant_storage": "float31"}, 'use "uint8"'),
    "no number": ({"load_in_8bit": True, "llm_int8_threshold": "6"}, "llm_int8_threshold must be a float"),
    "a truth as threshold": ({"load_in_8bit": True, "llm_int8_threshold": True}, "llm_int8_threshold must be a float"),
    "a word": ({"load_in_4bit": True, "bnb_4bit_use_double_quant": "yes"}, "use_double_quant must be a boolean"),
    "modules left out": ({"load_in_8bit": True, "llm_int8_skip_modules": ["x"]}, "llm_int8_skip_modules is"),
}


def refused(script, capsys, *flags: str) -> str:
    """What parse_args says when it refuses."""
    words = ["--pretrained_model_name_or_path", "a/b", "--dataset_name", "a/b", "--instance_prompt", "x", *flags]
    with pytest.raises(SystemExit) as stop:
        script.parse_args(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--bnb_quantization_config_path", "--text_encoder_bnb_config_path"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_says_no_format_is_refused_at_start(script, tiny, tmp_path, flag, name):
    content, expected = UNUSABLE[name]
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(script.UserError) as error:
        start_run(script, tiny, tmp_path, flag, path)
    assert f"{flag} {path}: cannot be used" in str(error.value) and expected in str(error.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_refused_by_name_and_value_before_anything_is_loaded(script, tiny, tmp_path, name):
    settings, expected = WRONG[name]
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(script.UserError, match=f"--bnb_quantization_config_path {path}: .*{re.escape(expected)}"):
        start_run(script, tiny, tmp_path, "--bnb_quantization_config_path", path)


def test_without_a_gpu_a_base_of_bitsandbytes_is_refused_at_start(script, tiny, stored_models, tmp_path, monkeypatch):
    """In one sentence, whether the flag asks for it or the checkpoint is stored so."""
    monkeypatch.undo()
    with pytest.raises(script.UserError, match=r"nf4\.json: No GPU found\. A GPU is needed for quantization"):
        start_run(script, tiny, tmp_path, *flags_of("nf4"))
    with pytest.raises(script.UserError, match="is stored quantised: No GPU found"):
        start_run(script, stored_models["int8"], tmp_path)


def test_two_quantisations_are_one_too_many(script, capsys):
    assert "give only one" in refused(script, capsys, *flags_of("nf4"), "--do_fp8_training")


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_files_and_what_diffusers_saves_of_them_are_accepted(script, tmp_path, capsys, kind):
    """The same file serves diffusers and the scripts."""
    saved = diffusers.BitsAndBytesConfig(**settings_of(kind)).to_dict()
    (tmp_path / "saved.json").write_text(json.dumps({**saved, "quant_method": "bitsandbytes"}, default=str))
    for path in (flags_of(kind)[1], str(tmp_path / "saved.json")):
        text = refused(script, capsys, "--bnb_quantization_config_path", path, "--resolution", "500")
        assert "1 problem(s)" in text and "--bnb" not in text


# ----------------------------------------------------------------------------------------- checkpoints stored quantised


@pytest.fixture(scope="module")
def stored_models(tiny, tmp_path_factory) -> dict[str, Path]:
    """The tiny model with transformer and text encoder saved quantised, by the libraries' own loaders.

    That of diffusers wants a GPU; its check is left out here, the rest of it works without one.
    """
    models = {}
    with pytest.MonkeyPatch.context() as patch:
        bitsandbytes_on_cpu(patch.setattr)
        for kind in KINDS:
            folder = models[kind] = tmp_path_factory.mktemp("stored") / kind
            shutil.copytree(tiny, folder)
            for part, library, name in (
                ("transformer", diffusers, "Flux2Transformer2DModel"),
                ("text_encoder", transformers, "Mistral3ForConditionalGeneration"),
            ):
                config = library.BitsAndBytesConfig(**settings_of(kind))
                dtype = {"torch_dtype" if library is diffusers else "dtype": torch.bfloat16}
                model = getattr(library, name).from_pretrained(tiny / part, quantization_config=config, **dtype)
                shutil.rmtree(folder / part)
                model.save_pretrained(folder / part)
    return models


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_transformer_is_read_as_diffusers_reads_it(script, stored_models, tmp_path, monkeypatch, kind):
    """No flag; every tensor, also the scales, and the output are the same to the last bit."""
    run = start_run(script, stored_models[kind], tmp_path)
    ours = script.load_transformer(run).eval()
    folder = stored_models[kind] / "transformer"
    theirs = diffusers.Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=run.dtype)
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
    with torch.no_grad():
        assert torch.equal(run_transformer(ours), run_transformer(theirs.eval()))
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.e2e
@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_checkpoint_trains_without_a_flag_and_its_encoder_is_used_as_it_is(
    script, train, stored_models, tmp_path, monkeypatch, kind
):
    """Encoder layers stay quantised, its embeddings are those of the whole encoder; the losses repeat bit for bit."""
    model = ("--pretrained_model_name_or_path", stored_models[kind])
    encoders, transformers_ = (
        spy(monkeypatch, script, "load_text_encoder"),
        spy(monkeypatch, script, "load_transformer"),
    )
    first, second = train(*model, output="a"), train(*model, output="b")
    assert_same_run(first, second)
    layer = bnb.Linear4bit if kind == "nf4" else bnb.Linear8bitLt
    language = encoders[0].result.model.language_model
    assert {type(module) for module in language.layers.modules() if isinstance(module, torch.nn.Linear)} == {layer}
    assert len(language.layers) == 31
    kinds = {type(module) for module in frozen_layers(transformers_[0].result).values()}
    assert kinds == {layer}
    run = start_run(script, stored_models[kind], tmp_path / "other")
    whole = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        stored_models[kind] / "text_encoder", dtype=run.dtype
    )
    prompt = "a photo of sks toy"
    embedding = script.encode_prompt(run, script.load_tokenizer(run), whole.eval(), prompt)
    used = script.open_prompts(script.replace(run, cache_dir=first / "cache")).get(prompt)
    assert torch.equal(embedding, used)


@pytest.mark.e2e
def test_an_encoder_that_is_stored_quantised_goes_with_a_transformer_that_is_not(
    script, train, tiny, stored_models, tmp_path, monkeypatch
):
    """Each part is taken as it is; the flag speaks of the transformer."""
    model = shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("text_encoder"))
    shutil.copytree(stored_models["nf4"] / "text_encoder", model / "text_encoder")
    encoders, bases = spy(monkeypatch, script, "load_text_encoder"), spy(monkeypatch, script, "load_transformer")
    train("--pretrained_model_name_or_path", model, *flags_of("int8"), "--max_train_steps", "1")
    assert any(isinstance(module, bnb.Linear4bit) for module in encoders[0].result.modules())
    assert any(isinstance(module, bnb.Linear8bitLt) for module in bases[0].result.modules())


@pytest.mark.parametrize("flags", [flags_of("nf4"), ("--do_fp8_training",)])
def test_a_stored_checkpoint_is_not_quantised_again(script, stored_models, tmp_path, flags):
    with pytest.raises(script.UserError, match=f"{flags[0]}: leave it out.*stored quantised"):
        start_run(script, stored_models["nf4"], tmp_path, *flags)


def test_another_format_of_storage_is_refused_by_name(script, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gguf"}
    (model / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(script.UserError, match="stored quantised by gguf"):
        start_run(script, model, tmp_path)


@pytest.mark.parametrize(
    ("kind", "part", "hole", "told"),
    [
        ("nf4", "transformer", r"^proj_out\.", r"\d+ missing, such as proj_out\.weight"),
        ("nf4", "text_encoder", r"layers\.2\.mlp", r"3 missing, .*layers\.2\.mlp"),
    ],
)
def test_a_stored_checkpoint_with_a_hole_is_refused(script, stored_models, tmp_path, kind, part, hole, told):
    """A weight that no file has is named before anything is loaded."""
    model = shutil.copytree(stored_models[kind], tmp_path / "model")
    path = next((model / part).glob("*.safetensors"))
    tensors = {name: tensor for name, tensor in script.load_file(path).items() if not re.search(hole, name)}
    path.write_bytes(script.safetensors_bytes(tensors, {"format": "pt"}))
    with pytest.raises(script.UserError, match=rf"{part}: the weights do not fit the model .{told}"):
        script.check_parts(start_run(script, model, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_quantised_weights_whose_config_does_not_say_so_are_refused(script, stored_models, tmp_path, kind, part):
    """Integers without their scales would be taken for weights."""
    model = shutil.copytree(stored_models[kind], tmp_path / "model")
    config = json.loads((model / part / "config.json").read_text())
    del config["quantization_config"]
    (model / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(script.UserError, match=rf"{part}: the weights do not fit the model .* unexpected"):
        script.check_parts(start_run(script, model, tmp_path))


# ----------------------------------------------------------------------------------------------------- the text encoder


def encoder_flag(kind: str) -> tuple[str, str]:
    """The flag of the text encoder with the shipped file of this format."""
    return "--text_encoder_bnb_config_path", str(CONFIGS / f"{kind}.json")


# Relative error of an embedding against bf16. Seen with the trained encoder of the embedded model, whose layers are 32
# wide: NF4 0.07 to 0.28, 8 bits 0.010 to 0.014; with [klein]'s, whose weights are random here: 0.30 to 0.81, 0.03.
# NF4's depends on which kernel bitsandbytes has for the CPU.
EMBEDDING_ERRORS = {
    ("tiny", "nf4"): (0.03, 0.35),
    ("tiny", "int8"): (0.005, 0.02),
    ("tiny_klein", "nf4"): (0.15, 0.9),
    ("tiny_klein", "int8"): (0.01, 0.05),
}


@pytest.mark.parametrize("model, kind", EMBEDDING_ERRORS)
def test_embeddings_of_a_quantised_encoder_are_within_the_error_of_the_format(script, request, tmp_path, kind, model):
    """Every layer that is read is quantised, the head is gone, nothing is trained; the error is printed (pytest -s)."""
    folder, bf16 = request.getfixturevalue(model), ("--mixed_precision", "bf16")
    plain = start_run(script, folder, tmp_path, *bf16)
    run = start_run(script, folder, tmp_path, *bf16, *encoder_flag(kind))
    tokenizer, encoder = script.load_tokenizer(run), script.load_text_encoder(run)
    layers = getattr(encoder.model, "language_model", encoder.model).layers
    linears = {type(module) for module in layers.modules() if isinstance(module, torch.nn.Linear)}
    assert linears == {bnb.Linear4bit if kind == "nf4" else bnb.Linear8bitLt}
    assert isinstance(encoder.lm_head, torch.nn.Identity)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    exact, (low, high) = script.load_text_encoder(plain), EMBEDDING_ERRORS[model, kind]
    for prompt in ("", "a photo of sks toy", "two green squares at dawn"):
        expected, actual = (script.encode_prompt(run, tokenizer, one, prompt) for one in (exact, encoder))
        error = relative_error(actual.float(), expected.float())
        print(f"{model} {kind} {prompt!r}: relative error of the embedding {error:.4f}")
        assert actual.dtype == torch.bfloat16 and low < error < high


def test_embeddings_of_a_quantised_encoder_are_never_taken_for_others(script, tiny, tmp_path):
    """The name of a cached embedding holds the settings, not the path of their file nor their order."""
    settings, other = settings_of("nf4"), tmp_path / "reversed.json"
    other.write_text(json.dumps(dict(reversed(settings.items()))))
    flags = {kind: encoder_flag(kind) for kind in KINDS} | {"none": (), "base": flags_of("nf4")}
    flags["reversed"] = ("--text_encoder_bnb_config_path", other)
    names = {name: script.open_prompts(start_run(script, tiny, tmp_path, *words)).key for name, words in flags.items()}
    assert names["reversed"] == names["nf4"] and names["none"] == names["base"]
    assert len({names["none"], names["nf4"], names["int8"]}) == 3


@pytest.mark.e2e
def test_a_run_with_a_quantised_encoder_trains_a_plain_base_and_is_not_resumed_without_it(
    script, train, tiny, tmp_path, monkeypatch
):
    encoders, bases = spy(monkeypatch, script, "load_text_encoder"), spy(monkeypatch, script, "load_transformer")
    flags = ("--cache_latents", "--max_train_steps", "2", "--checkpointing_steps", "1")
    folder = train(*flags, *encoder_flag("nf4"), output="a")
    assert any(isinstance(module, bnb.Linear4bit) for module in encoders[0].result.modules())
    assert {type(module) for module in frozen_layers(bases[0].result).values()} == {torch.nn.Linear}
    assert column(folder, "loss") != column(train(*flags, output="b"), "loss")
    again = ("--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    with pytest.raises(script.UserError, match=r"text encoder and tokenizer: has changed($|\n)"):
        train(*flags[:1], *again, output="a")
    train(*flags[:1], *again, *encoder_flag("nf4"), output="a")


def test_an_encoder_that_is_stored_quantised_is_not_quantised_again(script, stored_models, tmp_path):
    with pytest.raises(script.UserError, match="--text_encoder_bnb_config_path: leave it out.*stored quantised"):
        start_run(script, stored_models["nf4"], tmp_path, *encoder_flag("nf4"))


def test_a_setting_of_the_encoder_that_bitsandbytes_does_not_know_is_refused(script, tiny, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"load_in_4bit": True, "bits": 4}))
    with pytest.raises(script.UserError, match="--text_encoder_bnb_config_path .*: bits is 4; use one of"):
        start_run(script, tiny, tmp_path, "--text_encoder_bnb_config_path", path)


@pytest.mark.parametrize("other", ["--remote_text_encoder", "--fsdp_text_encoder"])
def test_no_encoder_is_quantised_that_is_sharded_or_somewhere_else(script, tiny, tmp_path, capsys, monkeypatch, other):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        start_run(script, tiny, tmp_path, *encoder_flag("nf4"), other)
    assert "--text_encoder_bnb_config_path: cannot be used with" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the card


RUNGS = {
    "plain": (),
    "bf16": ("--mixed_precision", "bf16"),
    "offload": ("--offload",),
    "fp8": ("--do_fp8_training",),
    "nf4": flags_of("nf4"),
    "int8": flags_of("int8"),
    "stored nf4": ("--mixed_precision", "bf16"),
    "stored int8": ("--mixed_precision", "bf16"),
    "klein nf4": flags_of("nf4"),
}


def python_of(folder: Path) -> str:
    """The second snippet of the model card, with the base as it was trained on."""
    _, code = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), flags=re.S | re.M)
    return code


@pytest.mark.e2e
@pytest.mark.parametrize("rung", RUNGS)
def test_the_cards_snippet_draws_with_the_base_that_was_trained_on(
    script, train, tiny, tiny_klein, stored_models, tmp_path, monkeypatch, rung
):
    """As it stands, from start to image.png; on the CPU only diffusers' demand for a GPU is left out.

    The encoder is gone before the transformer is loaded, and every frozen weight is the trained run's to the last bit;
    in FP8, which torchao rounds from other scales, to a tenth of the format's own error.
    """
    model = {"stored nf4": stored_models["nf4"], "stored int8": stored_models["int8"], "klein nf4": tiny_klein}.get(
        rung
    )
    model = model or tiny
    encoder_class = getattr(
        transformers, "Qwen3ForCausalLM" if model == tiny_klein else "Mistral3ForConditionalGeneration"
    )
    trained, drawn = spy(monkeypatch, script, "load_transformer"), []
    draw = ("--validation_size", "64,96", "--num_inference_steps", "2", "--max_train_steps", "2")
    folder = train(*RUNGS[rung], *draw, "--pretrained_model_name_or_path", model, output="lora")
    desk = tmp_path / "desk"
    desk.mkdir()
    for path in (model, folder):
        (desk / path.name).symlink_to(path)
    draw_photo(desk / "reference.png", (96, 64), seed=1)  # what a snippet for edits asks for
    monkeypatch.chdir(desk)

    def load(cls, *args, original=diffusers.Flux2Transformer2DModel.from_pretrained.__func__, **kwargs):
        assert encoder() is None
        transformer = original(cls, *args, **kwargs)
        drawn.append(base_bytes(transformer) if rung != "fp8" else {})
        return transformer

    def load_encoder(cls, *args, original=encoder_class.from_pretrained.__func__, **kwargs):
        nonlocal encoder
        result = original(cls, *args, **kwargs)
        encoder = weakref.ref(result)
        return result

    encoder = None
    monkeypatch.setattr(diffusers.Flux2Transformer2DModel, "from_pretrained", classmethod(load))
    monkeypatch.setattr(encoder_class, "from_pretrained", classmethod(load_encoder))
    names = {}
    exec(compile(python_of(folder), "snippet", "exec"), names)
    with Image.open("image.png") as image:
        assert image.width >= 64 and image.height >= 64
    assert encoder is not None and names["pipeline"].get_active_adapters()
    ours = {name.replace(".base_layer", ""): value for name, value in base_bytes(trained[0].result).items()}
    if rung == "fp8":
        theirs, worst = frozen_layers(names["pipeline"].transformer), []
        for name, module in frozen_layers(trained[0].result).items():
            if isinstance(module, script.FP8Linear):
                expected = module.weight.float() * module.scales
                worst.append(relative_error(theirs[name].weight.dequantize(), expected))
        assert len(worst) == 32 and max(worst) < 0.0045, max(worst)
        return
    assert drawn[0].keys() == ours.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, drawn[0][name])] == []


# ------------------------------------------------------------------------------------------------------------ its noise


def test_importing_a_script_prints_nothing(t2i):
    """bitsandbytes, torchao and diffusers have news for their own maintainers at import; both scripts share it."""
    command = [sys.executable, "-c", f"import {t2i.__name__}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent.parent, check=True)
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_in_bf16_logs_nothing(script, tiny, tmp_path, kind, caplog):
    """bitsandbytes says at every product that 8 bit computes from fp16."""
    run = start_run(script, tiny, tmp_path, "--mixed_precision", "bf16", *flags_of(kind))
    layer = script.load_transformer(run).get_submodule(LAYER).eval()
    with torch.no_grad():
        layer(torch.randn(2, 10, layer.in_features, dtype=torch.bfloat16))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("bitsandbytes")] == []
