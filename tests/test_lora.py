"""The adapter: which modules get one, how it computes, and that its file gives the training model's output."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from unit_parts import log_lines, start_run

pytestmark = pytest.mark.scripts("t2i")

# The transformer of FLUX.2 [dev].
DEV = {
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "attention_head_dim": 128,
    "joint_attention_dim": 15360,
    "in_channels": 128,
}
# The lists of the README, character by character.
PUBLISHED = {
    "attention": "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0",
    "fal": "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,"
    "attn.to_add_out,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2",
    "ai-toolkit": "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,"
    "attn.to_add_out,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2,norm1_context.linear, norm1.linear,"
    "norm.linear,proj_mlp,proj_out",
}


@pytest.fixture(scope="module")
def dev() -> Flux2Transformer2DModel:
    """The real [dev] architecture, without memory."""
    with torch.device("meta"):
        return Flux2Transformer2DModel.from_config(DEV)


@pytest.fixture(scope="module")
def linears(dev) -> list[str]:
    """Names of its Linear modules."""
    return [name for name, module in dev.named_modules() if isinstance(module, torch.nn.Linear)]


def members(linears: list[str], *patterns: str) -> set[str]:
    """Linear modules whose whole name matches one of the patterns."""
    return {name for name in linears for pattern in patterns if re.fullmatch(pattern, name)}


DOUBLE, SINGLE = r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"
IMAGE_ATTENTION = rf"{DOUBLE}\.attn\.(to_q|to_k|to_v|to_out\.0)"
TEXT_ATTENTION = rf"{DOUBLE}\.attn\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)"
FEED_FORWARD = rf"{DOUBLE}\.(ff|ff_context)\.(linear_in|linear_out)"
FUSED = rf"{SINGLE}\.attn\.(to_qkv_mlp_proj|to_out)"
MODULATION = r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear"


# ---- names ----


def test_the_script_lists_the_linear_modules_from_the_config_alone(script, linears):
    """203 of them, with no memory used."""
    assert list(script.linear_modules(DEV)) == linears and len(linears) == 203


def test_the_default_is_every_attention_projection_and_the_fused_ones(script, dev, linears):
    """8 per double block, 2 per single block: to_out of a double block is a list of modules and not meant."""
    chosen = script.resolve_lora_layers(linears, None)
    assert set(chosen) == members(linears, IMAGE_ATTENTION, TEXT_ATTENTION, FUSED)
    assert len(chosen) == 8 * len(dev.transformer_blocks) + 2 * len(dev.single_transformer_blocks) == 160
    assert chosen == [name for name in linears if name in set(chosen)]  # in the order of the model, each once


EXPECTED = {
    "attention": [IMAGE_ATTENTION],
    "fal": [IMAGE_ATTENTION, TEXT_ATTENTION, FEED_FORWARD],
    "ai-toolkit": [IMAGE_ATTENTION, TEXT_ATTENTION, FEED_FORWARD, MODULATION, FUSED],
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_lists_choose_what_they_mean_in_flux2(script, linears, preset):
    """Every block of each kind; the shared modulation layers once."""
    chosen = script.resolve_lora_layers(linears, PUBLISHED[preset])
    assert set(chosen) == members(linears, *EXPECTED[preset]) and len(chosen) == len(set(chosen))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("spelling", [str, str.upper, "  {} ".format])
def test_a_preset_is_its_published_list(script, linears, name, spelling):
    """By name, whatever the case."""
    assert script.resolve_lora_layers(linears, spelling(name)) == script.resolve_lora_layers(linears, PUBLISHED[name])


def test_lora_blocks_is_another_name_of_lora_layers(script):
    """The README's third list is passed with it."""
    args = script.build_parser().parse_args(["--lora_blocks", PUBLISHED["ai-toolkit"]])
    assert args.lora_layers == PUBLISHED["ai-toolkit"]


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("transformer_blocks.3.attn.to_k", ["transformer_blocks.3.attn.to_k"]),
        ("single_transformer_blocks.3.attn.to_k", ["single_transformer_blocks.3.attn.to_qkv_mlp_proj"]),
        ("single_transformer_blocks.40.attn.to_out", ["single_transformer_blocks.40.attn.to_out"]),
        ("transformer_blocks.1.attn.to_q,transformer_blocks.1.attn.to_q", ["transformer_blocks.1.attn.to_q"]),
    ],
)
def test_a_block_prefix_chooses_one_block(script, linears, asked, expected):
    """`transformer_blocks.3` must not choose `single_transformer_blocks.3` too, nor 1 choose 11."""
    assert script.resolve_lora_layers(linears, asked) == expected


@pytest.mark.parametrize(
    "flux1, flux2",
    [
        ("ff.net.0.proj", [rf"{DOUBLE}\.ff\.linear_in"]),
        ("ff.net.2", [rf"{DOUBLE}\.ff\.linear_out"]),
        ("ff_context.net.0.proj", [rf"{DOUBLE}\.ff_context\.linear_in"]),
        ("ff_context.net.2", [rf"{DOUBLE}\.ff_context\.linear_out"]),
        ("transformer_blocks.5.ff.net.2", [r"transformer_blocks\.5\.ff\.linear_out"]),
        ("norm1.linear", [r"double_stream_modulation_img\.linear"]),
        ("transformer_blocks.5.norm1.linear", [r"double_stream_modulation_img\.linear"]),
        ("norm1_context.linear", [r"double_stream_modulation_txt\.linear"]),
        ("norm.linear", [r"single_stream_modulation\.linear"]),
        ("single_transformer_blocks.5.norm.linear", [r"single_stream_modulation\.linear"]),
        ("proj_mlp", [rf"{SINGLE}\.attn\.to_qkv_mlp_proj"]),
        ("single_transformer_blocks.5.proj_mlp", [r"single_transformer_blocks\.5\.attn\.to_qkv_mlp_proj"]),
        ("proj_out", [rf"{SINGLE}\.attn\.to_out"]),
        ("single_transformer_blocks.5.proj_out", [r"single_transformer_blocks\.5\.attn\.to_out"]),
    ],
)
def test_a_flux1_name_is_translated_and_the_log_says_so(script, linears, flux1, flux2):
    """Lists in circulation were written for FLUX.1."""
    with log_lines() as lines:
        assert set(script.resolve_lora_layers(linears, flux1)) == members(linears, *flux2)
    assert any(flux1 in line and "FLUX.2" in line for line in lines)


def test_final_proj_out_is_the_last_layer_and_only_that(script, linears):
    """`proj_out` alone means the single blocks, as in FLUX.1's lists."""
    assert script.resolve_lora_layers(linears, "final:proj_out") == ["proj_out"]
    with log_lines() as lines:
        both = script.resolve_lora_layers(linears, "proj_out, final:proj_out")
    assert set(both) == members(linears, rf"{SINGLE}\.attn\.to_out", "proj_out") and len(lines) == 1


def test_blanks_and_empty_entries_do_not_matter(script, linears):
    """As in the README's third list."""
    plain = script.resolve_lora_layers(linears, "attn.to_q,attn.to_k")
    assert script.resolve_lora_layers(linears, " attn.to_q ,\n attn.to_k,, ") == plain


@pytest.mark.parametrize(
    "asked, near",
    [
        ("attn.to_qq", "attn.to_q"),
        ("attn.to_q,attn.ad_k_proj", "attn.add_k_proj"),
        ("transformer_blocks.8.attn.to_q", r"transformer_blocks\.\d\.attn\.to_q"),
        ("single_transformer_blocks.48.attn.to_out", r"single_transformer_blocks\.\d+\.attn\.to_out"),
        ("final:proj_in", "proj_out"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_with_the_nearest_names(script, linears, asked, near):
    """Never a LoRA on less than was asked for."""
    with pytest.raises(
        script.UserError, match=f"'{re.escape(asked.split(',')[-1])}' is not a Linear module; nearest: .*{near}"
    ):
        script.resolve_lora_layers(linears, asked)


NO_LINEAR_MODULES = ["attn", "transformer_blocks.0", "attn.norm_q", "attn.to_out.1", "to_qkv_mlp", "linear_", "q_proj"]
# the last layer alone is named in full; to_out of a double block is a list of modules, and 3 is no single block here
NO_LINEAR_MODULES += ["final:attn.to_q", "transformer_blocks.3.attn.to_out"]


@pytest.mark.parametrize("name", NO_LINEAR_MODULES)
def test_only_whole_names_of_linear_modules_match(script, linears, name):
    """Neither a container nor a norm nor a part of a name: PEFT would raise on the first and match the last."""
    with pytest.raises(script.UserError, match="is not a Linear module"):
        script.resolve_lora_layers(linears, name)


@pytest.mark.parametrize("asked", [",", " , "])
def test_a_list_without_a_name_is_an_error(script, linears, asked):
    """Not a run that trains nothing."""
    with pytest.raises(script.UserError, match="--lora_layers"):
        script.resolve_lora_layers(linears, asked)


# ---- the adapter ----

EVERYTHING = PUBLISHED["ai-toolkit"] + ",x_embedder,context_embedder,norm_out.linear,final:proj_out"


def inputs(dtype: torch.dtype = torch.float32, guidance: bool = True, rows: int = 4, seed: int = 1) -> dict:
    """Arguments of a forward of two samples of rows x 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(4), torch.arange(1))[None]
    text = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(64))[None]
    return {
        "hidden_states": torch.randn(2, rows * 4, 32, generator=generator).to(dtype),
        "timestep": torch.tensor([0.3, 0.8], dtype=dtype),
        "guidance": torch.full([2], 3.5) if guidance else None,
        "encoder_hidden_states": torch.randn(2, 64, 96, generator=generator).to(dtype),
        "txt_ids": text,
        "img_ids": ids,
        "return_dict": False,
    }


def randomise(parameters: dict[str, torch.nn.Parameter], std: float = 0.2) -> None:
    """Gives every matrix of the adapter random values, so that it changes the output."""
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters.values():
        parameter.data.normal_(std=std, generator=generator)


@pytest.mark.parametrize("precision, base", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_exactly_the_adapter_is_trained_and_in_fp32(script, tiny, tmp_path, precision, base):
    """Two matrices per module, whatever the dtype of the frozen base."""
    run = start_run(script, tiny, tmp_path, "--mixed_precision", precision)
    transformer = script.load_transformer(run)
    targets = script.resolve_lora_layers(list(script.linear_modules(run.model.config("transformer"))), None)
    parameters = script.add_lora(run, transformer)
    trainable = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{part}.default.weight" for name in targets for part in "AB"}
    assert set(parameters) == {f"{name}.lora_{part}.weight" for name in targets for part in "AB"}
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    frozen = [parameter for parameter in transformer.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {base}
    for name in targets:
        layer = transformer.get_submodule(name)
        assert parameters[f"{name}.lora_A.weight"].shape == (4, layer.in_features)
        assert parameters[f"{name}.lora_B.weight"].shape == (layer.out_features, 4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_starts_from_the_base_models_output_exactly(script, tiny, tmp_path, precision):
    """lora_B is 0; one that is not changes the output."""
    run = start_run(script, tiny, tmp_path, "--mixed_precision", precision, "--lora_layers", EVERYTHING)
    transformer = script.load_transformer(run)
    with torch.no_grad():
        base = transformer(**inputs(run.dtype))[0]
        parameters = script.add_lora(run, transformer)
        assert transformer(**inputs(run.dtype))[0].equal(base)
        randomise(parameters)
        assert not transformer(**inputs(run.dtype))[0].allclose(base, atol=0.01)


def test_the_start_of_a_matrix_depends_on_the_seed_and_its_name_only(script, tiny, tmp_path):
    """Not on the other modules, nor on the global generator; lora_A is N(0, 1/rank)."""

    def start(*flags: str) -> dict[str, torch.Tensor]:
        run = start_run(script, tiny, tmp_path, *flags)
        return {name: p.detach() for name, p in script.add_lora(run, script.load_transformer(run)).items()}

    torch.manual_seed(1)
    whole = start()
    torch.manual_seed(2)
    few, other = start("--lora_layers", "attn.to_k"), start("--seed", "1")
    assert 0 < len(few) < len(whole) and all(few[name].equal(whole[name]) for name in few)
    for name, tensor in whole.items():
        if ".lora_B." in name:
            assert (tensor == 0).all()
        else:
            assert not tensor.equal(other[name]) and tensor.std().item() == pytest.approx(1 / 4, rel=0.2)
    starts = [tensor.sum().item() for name, tensor in whole.items() if ".lora_A." in name]
    assert len(set(starts)) == len(starts)


def test_a_lora_matrix_answers_in_the_dtype_of_its_input_and_learns_in_fp32(script):
    """The weight is cast, not the input."""
    layer, hidden = script.LoraLinear(8, 4, bias=False), torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    output = layer(hidden)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    assert layer(hidden.float()).dtype == torch.float32


class RecordFp32(TorchDispatchMode):
    """Remembers the shape of every fp32 tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if torch.is_tensor(tensor) and tensor.dtype == torch.float32:
                self.shapes.append(tuple(tensor.shape))
        return output


def test_under_bf16_no_fp32_copy_of_an_activation_is_made(script, tiny, tmp_path):
    """In a wrapped layer, forwards and backwards: what is fp32 is the adapter's weights and their gradients."""
    run = start_run(script, tiny, tmp_path, "--mixed_precision", "bf16", "--lora_alpha", "8", "--lora_dropout", "0.1")
    transformer = script.load_transformer(run)
    parameters = script.add_lora(run, transformer)
    randomise(parameters)
    layer = transformer.get_submodule("single_transformer_blocks.0.attn.to_qkv_mlp_proj").train()
    hidden = torch.randn(2, 50, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with RecordFp32() as record:
        output = layer(hidden)
        output.backward(torch.ones_like(output))
    assert output.dtype == torch.bfloat16 and hidden.grad.dtype == torch.bfloat16
    weights = {tuple(parameter.shape) for parameter in parameters.values()}
    weights |= {shape[::-1] for shape in weights}  # F.linear transposes
    assert record.shapes, "the adapter's gradients must have been seen"
    assert set(record.shapes) <= weights


# ---- checkpointing ----


def set_up(script, model: Path, folder: Path, *flags: str) -> tuple:
    """(transformer, parameters) as the training loop gets them."""
    run = start_run(script, model, folder, "--max_train_steps", "1", *flags)
    streams = [script.Stream("instance", [])]
    training = script.prepare_training(run, script.LatentCodec(run), streams, None)
    return training.transformer.train(), training.parameters


def gradients(transformer: torch.nn.Module, parameters: dict) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(gradients of a fixed loss, names of the blocks whose forward ran once more in the backward pass)."""
    runs: dict[str, int] = {}
    for name, block in transformer.named_modules():
        if re.fullmatch(rf"{DOUBLE}|{SINGLE}", name):
            block.attn.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1}))
    randomise(parameters)
    transformer(**inputs())[0].square().mean().backward()
    return {name: p.grad for name, p in parameters.items()}, [name for name, count in runs.items() if count == 2]


@pytest.mark.slow
@pytest.mark.parametrize("flags, recomputed", [(["1"], 6), (["0.5"], 3), (["0.1"], 1), ([], 6)])
def test_checkpointing_recomputes_the_share_of_blocks_and_keeps_the_gradients(
    script, tiny, tmp_path, flags, recomputed
):
    """2 double and 4 single blocks, double ones first; with the shared modulation layers trainable too."""
    layers = ("--lora_layers", EVERYTHING)
    plain, none = gradients(*set_up(script, tiny, tmp_path, *layers))
    actual, names = gradients(*set_up(script, tiny, tmp_path, *layers, "--gradient_checkpointing", *flags))
    order = [f"transformer_blocks.{i}" for i in range(2)] + [f"single_transformer_blocks.{i}" for i in range(4)]
    assert not none and sorted(names) == sorted(order[:recomputed])
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert (actual[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max().clamp(min=1), name


def test_checkpointing_repeats_the_same_dropout(script, tiny, tmp_path):
    """Otherwise the gradient would belong to another forward pass."""
    collected = []
    for flags in ([], ["--gradient_checkpointing"]):
        transformer, parameters = set_up(script, tiny, tmp_path, "--lora_dropout", "0.5", *flags)
        torch.manual_seed(3)
        collected.append(gradients(transformer, parameters)[0])
    for name, gradient in collected[0].items():
        assert collected[1][name].allclose(gradient, atol=1e-6), name


# ---- files ----


@pytest.fixture(scope="module")
def models(tiny, tiny_klein) -> dict:
    """(folder, pipeline class) by family."""
    return {"dev": (tiny, Flux2Pipeline), "klein": (tiny_klein, Flux2KleinPipeline)}


def trained(script, model: Path, folder: Path, *flags: str) -> tuple:
    """(run, transformer, parameters) with a random LoRA whose file lies in `folder`."""
    run = start_run(script, model, folder / "run", "--upcast_before_saving", *flags)
    transformer = script.load_transformer(run).eval()
    parameters = script.add_lora(run, transformer)
    randomise(parameters)
    script.save_lora(run, parameters, folder)
    return run, transformer, parameters


def fresh(model: Path, pipeline: type, file: Path) -> torch.nn.Module:
    """The transformer of a fresh pipeline with the file loaded as a user does it."""
    loaded = pipeline.from_pretrained(model, torch_dtype=torch.float32, vae=None, text_encoder=None, tokenizer=None)
    loaded.load_lora_weights(file)
    return loaded.transformer


def header(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(file, "pt") as stream:
        return stream.metadata()


def adapter_config(file: Path) -> dict:
    """The PEFT configuration in the header, without the prefix."""
    stored = json.loads(header(file)["lora_adapter_metadata"])
    assert all(key.startswith("transformer.") for key in stored)
    return {key.removeprefix("transformer."): value for key, value in stored.items()}


@pytest.mark.parametrize("alpha", ["4", "8", "1.5"])
@pytest.mark.parametrize("family", ["dev", "klein"])
def test_the_saved_file_gives_the_training_models_output_in_a_fresh_pipeline(script, models, tmp_path, family, alpha):
    """Maximum difference 0 for an fp32 export, alpha equal to the rank or not: diffusers reads it from the header."""
    model, pipeline = models[family]
    run, transformer, _ = trained(script, model, tmp_path, "--lora_alpha", alpha)
    batch = inputs(guidance=family == "dev")
    with torch.no_grad():
        expected = transformer(**batch)[0]
        actual = fresh(model, pipeline, tmp_path / script.LORA_FILE)(**batch)[0]
        transformer.disable_adapters()
        assert not transformer(**batch)[0].allclose(expected, atol=0.01)
    assert (actual - expected).abs().max() == 0


@pytest.mark.slow
def test_every_published_list_reloads_in_diffusers(script, tiny, tmp_path):
    """Modulation layers and the last layer included."""
    _, transformer, _ = trained(script, tiny, tmp_path, "--lora_layers", EVERYTHING, "--lora_alpha", "2")
    with torch.no_grad():
        actual = fresh(tiny, Flux2Pipeline, tmp_path / script.LORA_FILE)(**inputs())[0]
        assert (actual - transformer(**inputs())[0]).abs().max() == 0


def test_the_header_carries_rank_alpha_and_modules_as_given(script, tiny, tmp_path):
    """What diffusers builds the adapter from; nothing of this machine is in it."""
    _, _, parameters = trained(
        script, tiny, tmp_path, "--lora_alpha", "1.5", "--lora_layers", "attn.to_q,attn.to_qkv_mlp_proj"
    )
    config = adapter_config(tmp_path / script.LORA_FILE)
    assert (config["r"], config["lora_alpha"]) == (4, 1.5)
    assert set(config["target_modules"]) == {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in parameters}
    metadata = header(tmp_path / script.LORA_FILE)
    assert metadata["format"] == "pt" and "Flux.2-dev" in metadata["modelspec.architecture"]
    assert str(tiny.parent) not in json.dumps(metadata) and str(tmp_path) not in json.dumps(metadata)


def older_diffusers(header: dict[str, str]) -> LoraConfig:
    """The adapter that diffusers 0.36 to 0.39 makes of a header, by their rules.

    They take the keys of `transformer.` for arguments of LoraConfig, after a look at `rank_pattern` and
    `target_modules` that does not ask whether these are there, and refuse a name that PEFT does not know.
    """
    stored = json.loads(header["lora_adapter_metadata"])
    config = {
        key.removeprefix("transformer."): value for key, value in stored.items() if key.startswith("transformer.")
    }
    for key in list(config["rank_pattern"].copy()):
        assert [name for name in config["target_modules"] if name == key or key not in name], key
    return LoraConfig(**config)


@pytest.mark.parametrize("alpha", ["4", "8", "1.5"])
def test_the_file_loads_by_the_header_rules_of_diffusers_before_0_40(script, tiny, tmp_path, alpha):
    """Rank and alpha as trained."""
    trained(script, tiny, tmp_path, "--lora_alpha", alpha)
    config = older_diffusers(header(tmp_path / script.LORA_FILE))
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (4, float(alpha), {}, {})
    names = {
        re.sub(r"^transformer\.|\.lora_[AB]\.weight$", "", name) for name in load_file(tmp_path / script.LORA_FILE)
    }
    assert set(config.target_modules) == names


def test_the_names_in_the_file_are_those_of_diffusers(script, tiny, tmp_path):
    """`transformer.`, the module, `.lora_A.weight` or `.lora_B.weight`; no alpha tensors."""
    _, _, parameters = trained(script, tiny, tmp_path)
    stored = load_file(tmp_path / script.LORA_FILE)
    assert set(stored) == {f"transformer.{name}" for name in parameters}
    for name, parameter in parameters.items():
        assert stored[f"transformer.{name}"].equal(parameter.data)


def test_the_export_is_in_the_compute_dtype_unless_it_is_upcast(script, tiny, tmp_path):
    """--upcast_before_saving means fp32 also in a bf16 run."""
    for flags, dtype in (([], torch.bfloat16), (["--upcast_before_saving"], torch.float32)):
        folder = tmp_path / str(dtype)
        run = start_run(script, tiny, folder, "--mixed_precision", "bf16", "--lora_alpha", "3", *flags)
        parameters = script.add_lora(run, script.load_transformer(run))
        script.save_lora(run, parameters, tmp_path)
        script.save_lora(run, parameters, tmp_path, for_comfyui=True)
        for path in (tmp_path / script.LORA_FILE, tmp_path / script.COMFYUI_FILE):
            assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
        assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


# ---- starting from a file ----


def test_a_lora_can_be_started_from(script, tiny, tmp_path):
    """--init_lora_from: the training model begins with the file's output, exactly."""
    _, before, _ = trained(script, tiny, tmp_path, "--lora_alpha", "8")
    flags = ("--lora_alpha", "8", "--seed", "5", "--init_lora_from", str(tmp_path / script.LORA_FILE))
    after, parameters = set_up(script, tiny, tmp_path / "second", *flags)
    with torch.no_grad():
        assert after.eval()(**inputs())[0].equal(before(**inputs())[0])
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters.values())


def test_a_bf16_lora_can_be_started_from_too(script, tiny, tmp_path):
    """The usual export; the adapter stays fp32."""
    run = start_run(script, tiny, tmp_path, "--mixed_precision", "bf16")
    parameters = script.add_lora(run, script.load_transformer(run))
    randomise(parameters)
    script.save_lora(run, parameters, tmp_path)
    _, loaded = set_up(script, tiny, tmp_path / "second", "--init_lora_from", str(tmp_path / script.LORA_FILE))
    for name, parameter in loaded.items():
        assert parameter.dtype == torch.float32 and parameter.equal(parameters[name].data.bfloat16().float())


@pytest.fixture
def start_from(script, tiny, photos, tmp_path, monkeypatch):
    """Dry run of a start from a file: `start_from(path, *flags)`, without weights."""

    def start(path: Path, *flags: str) -> None:
        for name in ("load_text_encoder", "load_vae", "load_transformer"):
            monkeypatch.setattr(script, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
        words = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, "--instance_prompt", "a toy"]
        words += ["--resolution", "64", "--output_dir", tmp_path / "dry", "--report_to", "none"]
        words += ["--init_lora_from", path, "--dry_run", *flags]
        script.main(script.parse_args([str(word) for word in words]))

    return start


FLAGS_OF_FILES = [
    ("--rank", "2"), ("--lora_alpha", "1.5"), ("--lora_layers", "attention"), ("--lora_layers", EVERYTHING),
    ("--lora_layers", "transformer_blocks.0.attn.to_q,single_transformer_blocks.1.attn.to_out,final:proj_out"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS_OF_FILES, ids=" ".join)
def test_rank_alpha_and_modules_come_from_the_file(script, tiny, tmp_path, start_from, flags):
    """Without a flag, and with those that say the same."""
    run, _, parameters = trained(script, tiny, tmp_path, *flags)
    file = tmp_path / script.LORA_FILE
    start_from(file)
    start_from(file, *flags)
    again = start_run(script, tiny, tmp_path / "second", "--init_lora_from", str(file))
    assert again.lora == run.lora and len(run.lora.targets) == len(parameters) // 2
    assert {**script.fingerprint(again, []), "x": 0} == {**script.fingerprint(run, []), "x": 0}


@pytest.mark.parametrize(("flags", "message"), [
    (("--rank", "8"), "--rank: it is 4 in --init_lora_from {file}; leave the flag out"),
    (("--lora_alpha", "1.5"), "--lora_alpha: it is 2.0 in --init_lora_from {file}; leave the flag out"),
    (("--lora_layers", "fal"), "--lora_layers: it is 8 modules, such as transformer_blocks.0.attn.to_q, in"),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")  # fmt: skip
def test_a_flag_that_differs_from_the_file_is_refused_by_name(script, tiny, tmp_path, start_from, flags, message):
    """Before anything is loaded: the numbers of the file mean nothing under another alpha, rank or module."""
    trained(script, tiny, tmp_path, "--lora_alpha", "2", "--lora_layers", "attention")
    file = tmp_path / script.LORA_FILE
    with pytest.raises(script.UserError, match=re.escape(message.format(file=file))):
        start_from(file, *flags)


def test_without_a_file_the_rank_is_16_and_alpha_the_rank(script, tiny, tmp_path):
    (tmp_path / "data").mkdir()
    args = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", tmp_path / "data", "--instance_prompt", "x"]
    run = script.start_accelerator(script.parse_args([str(word) for word in [*args, "--output_dir", tmp_path / "out"]]))
    assert (run.lora.rank, run.lora.alpha) == (16, 16)


BFL_NAMES = {"to_qkv_mlp_proj": "linear1", "to_out": "linear2", "to_out.0": "img_attn.proj"}
BFL_NAMES |= dict.fromkeys(("to_q", "to_k", "to_v"), "img_attn.qkv")


def as_ai_toolkit(file: Path) -> dict[str, torch.Tensor]:
    """The matrices of our file under BFL's names; q, k, v of a block share lora_A there."""
    stored, result = load_file(file), {}
    for name in sorted(stored, key=lambda name: name.replace("to_q", "to_a")):  # q before k before v
        single, block, module, part = re.fullmatch(
            r"transformer\.(single_)?transformer_blocks\.(\d+)\.attn\.(.+)\.(lora_[AB]\.weight)", name
        ).groups()
        key = f"diffusion_model.{'single' if single else 'double'}_blocks.{block}.{BFL_NAMES[module]}.{part}"
        joined = key in result and "lora_B" in part
        result[key] = torch.cat([result[key], stored[name]]) if joined else stored[name]
    return result


FOREIGN_LAYERS = "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.to_qkv_mlp_proj,attn.to_out"


@pytest.fixture
def foreign(script, tiny, tmp_path) -> Path:
    """A LoRA file of ours that other trainers could have written: q, k and v share lora_A."""
    run, _, parameters = trained(script, tiny, tmp_path, "--lora_layers", FOREIGN_LAYERS)
    for name, parameter in parameters.items():
        if re.search(r"\.attn\.to_[kv]\.lora_A", name):
            parameter.data.copy_(parameters[re.sub("to_[kv]", "to_q", name)])
    script.save_lora(run, parameters, tmp_path)
    return tmp_path / script.LORA_FILE


FORMS = ["ai-toolkit", "kohya", "peft"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_lora_of_another_trainer_is_started_from_with_the_same_numbers(
    script, tiny, tmp_path, foreign, start_from, form
):
    """Names as ai-toolkit, kohya and musubi, or PEFT write them; alpha is the rank where the file does not say it."""
    tensors, alpha = as_ai_toolkit(foreign), "4"
    if form == "kohya":
        words = {"diffusion_model.": "lora_unet_", ".lora_A.": "!lora_down.", ".lora_B.": "!lora_up."}
        for old, new in words.items():
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        tensors = {re.sub(r"\.(?=.*!)", "_", n).replace("!", "."): t for n, t in tensors.items()}
        tensors |= {name[:-17] + ".alpha": torch.tensor(4.0) for name in list(tensors) if "lora_down" in name}
    if form == "peft":
        tensors = {name.replace("diffusion_model.", "base_model.model."): tensor for name, tensor in tensors.items()}
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "alpha_pattern": {}}))
        alpha = "2"
    file = tmp_path / f"{form}.safetensors"
    save_file(tensors, file)
    start_from(file)
    start_from(file, "--lora_layers", FOREIGN_LAYERS, "--lora_alpha", alpha)
    matrices, found = script.read_lora(file)
    ours = load_file(foreign)
    assert found == float(alpha) and {f"transformer.{name}" for name in matrices} == ours.keys()
    assert all(matrix.equal(ours[f"transformer.{name}"]) for name, matrix in matrices.items())
    with pytest.raises(script.UserError, match=f"--lora_alpha: it is {alpha}.0 in --init_lora_from"):
        start_from(file, "--lora_alpha", "3")


BAD_STARTS = {
    "a page that was downloaded instead": (lambda t: None, "not a plain FLUX.2 LoRA"),
    "a LoRA of FLUX.1": (
        lambda t: {"transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": torch.ones(4, 32),
                   "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": torch.ones(32, 4)},
        "is for another model; its single_transformer_blocks.0.proj_mlp",
    ),
    "a LoRA of a larger model": (
        lambda t: {name: torch.cat([m, m], dim=1 if "lora_A" in name else 0) for name, m in t.items()},
        "is for another model",
    ),
    "two ranks": (
        lambda t: {name: m[:2] if name.endswith("0.attn.to_q.lora_A.weight") else m for name, m in t.items()},
        r"ranks of its modules are \[2, 4\]",
    ),
    "a DoRA": (lambda t: {**t, "transformer.x.dora_scale": torch.ones(1)}, "DoRA"),
    "no lora_B": (lambda t: {n: m for n, m in t.items() if "lora_A" in n}, "is for another model"),
    "LoKr": (lambda t: {"diffusion_model.single_blocks.0.linear1.lokr_w1": torch.ones(2, 2),
                        "diffusion_model.single_blocks.0.linear1.lokr_w2": torch.ones(2, 2)}, "not a plain FLUX"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_file_that_is_no_plain_lora_of_this_model_is_refused_with_its_name(script, tiny, tmp_path, start_from, case):
    """Before anything is loaded."""
    trained(script, tiny, tmp_path)
    change, reason = BAD_STARTS[case]
    file, tensors = tmp_path / "bad.safetensors", change(load_file(tmp_path / script.LORA_FILE))
    file.write_text("<html>404</html>")
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    with pytest.raises(script.UserError, match=rf"bad\.safetensors: .*{reason}"):
        start_from(file)
