"""tools/convert_transformer.py: one file of a transformer, in anybody's names, becomes a folder that trains."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_comfyui import bfl_shapes

import convert_transformer  # isort: skip  (tools/, which conftest puts on the path)
from bare_training import read_architecture  # isort: skip

BFL_NAMES = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
SINGLE |= {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
FUSED = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


def in_bfls_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a diffusers transformer as BFL's own model has them."""
    renamed = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        block, number, rest = re.fullmatch(r"(?:(\w*transformer_blocks)\.(\d+)\.)?(.*)", module).groups()
        if block is None:
            tensor = torch.cat(tensor.chunk(2)[::-1]) if module == "norm_out.linear" else tensor  # shift before scale
            renamed[BFL_NAMES[module] + ".weight"] = tensor
        elif block == "single_transformer_blocks":
            renamed[f"single_blocks.{number}.{SINGLE[rest]}.{'scale' if 'norm' in rest else 'weight'}"] = tensor
        elif rest in DOUBLE:
            renamed[f"double_blocks.{number}.{DOUBLE[rest]}.{'scale' if 'norm' in rest else 'weight'}"] = tensor
    for number in {name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")}:
        for fused, parts in FUSED.items():
            pieces = [weights[f"transformer_blocks.{number}.attn.{part}.weight"] for part in parts]
            renamed[f"double_blocks.{number}.{fused}.weight"] = torch.cat(pieces)
    return renamed


def in_fp8(weights: dict[str, torch.Tensor], scale_name: str, by_row: bool = False) -> dict[str, torch.Tensor]:
    """Every matrix as float8_e4m3fn with its scale beside it; norms as they are."""
    stored = {}
    for name, tensor in weights.items():
        if tensor.ndim < 2:
            stored[name] = tensor
            continue
        most = tensor.abs().amax(dim=1, keepdim=True) if by_row else tensor.abs().max()
        stored[name] = (tensor / (most / 448)).to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + scale_name] = most / 448
    return stored


@pytest.fixture(scope="module")
def base(tiny) -> dict[str, torch.Tensor]:
    """The tiny model's transformer by diffusers' names."""
    return load_file(tiny / "transformer" / "diffusion_pytorch_model.safetensors")


def converted(weights, tiny, folder, **options) -> dict[str, torch.Tensor]:
    """What the tool makes of a file with these tensors."""
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "one.safetensors")
    count = convert_transformer.convert(folder / "one.safetensors", tiny, folder / "made", **options)
    found = {}
    for path in (folder / "made" / "transformer").glob("*.safetensors"):
        found |= load_file(path)
    assert count == len(found)
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("renamed", [dict, in_bfls_names])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anybodys_names_come_back_as_diffusers_names_with_the_same_numbers(
    base, tiny, tmp_path, prefix, renamed, dtype
):
    asked = {name: tensor.to(dtype) for name, tensor in base.items()}
    found = converted({prefix + name: tensor for name, tensor in renamed(asked).items()}, tiny, tmp_path)
    assert found.keys() == asked.keys()
    assert [name for name in found if not torch.equal(found[name], asked[name]) or found[name].dtype != dtype] == []


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("scale_name", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("renamed", [dict, in_bfls_names])
def test_the_scales_of_fp8_weights_are_applied(base, tiny, tmp_path, prefix, scale_name, by_row, renamed):
    stored = {prefix + name: tensor for name, tensor in in_fp8(renamed(base), scale_name, by_row).items()}
    stored[prefix + "scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)  # how ComfyUI marks such a file
    matrix = next(name for name in stored if name.endswith("to_out.weight") or name.endswith("linear2.weight"))
    module = matrix.removesuffix(".weight")
    stored[f"{module}.input_scale"] = torch.ones(())
    stored[f"{module}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    found = converted(stored, tiny, tmp_path)
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        if tensor.ndim < 2:
            assert torch.equal(found[name], tensor)
            continue
        assert found[name].dtype == torch.bfloat16
        # three bits of mantissa: half a step is a sixteenth; below the smallest normal number the steps are equal
        floor = tensor.abs().max() / 448 * 2**-9
        bound = tensor.abs() * (1 / 16 + 1 / 128) + floor
        assert ((found[name].float() - tensor).abs() <= bound).all(), name


def test_fp8_without_scales_is_only_cast(base, tiny, tmp_path):
    found = converted({n: t.to(torch.float8_e4m3fn) for n, t in in_bfls_names(base).items()}, tiny, tmp_path)
    name = "transformer_blocks.1.attn.to_k.weight"
    assert torch.equal(found[name], base[name].to(torch.float8_e4m3fn).to(torch.bfloat16))


def test_a_large_file_becomes_shards_that_diffusers_reads(base, tiny, tmp_path, monkeypatch):
    from diffusers import Flux2Transformer2DModel

    monkeypatch.setattr(convert_transformer, "SHARD_SIZE", "1MB")
    found = converted(in_bfls_names(base), tiny, tmp_path)
    assert len(list((tmp_path / "made" / "transformer").glob("*.safetensors"))) > 3 and found.keys() == base.keys()
    model = Flux2Transformer2DModel.from_pretrained(tmp_path / "made" / "transformer")
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


@pytest.mark.e2e
def test_both_scripts_train_on_the_folder(script, base, tiny, train, tmp_path):
    """The losses are those of the base itself, whose numbers the file has."""
    from runs import trajectory

    converted({"model.diffusion_model." + name: t for name, t in in_bfls_names(base).items()}, tiny, tmp_path)
    own = train("--max_train_steps", "2", output="own")
    made = train("--max_train_steps", "2", "--pretrained_model_name_or_path", tmp_path / "made", output="out")
    assert trajectory(made) == trajectory(own)


@pytest.mark.parametrize("model", ["dev", "klein-9B", "klein-4B"])
def test_bfls_own_models_have_all_the_tensors_of_diffusers_ones(model):
    """By names and shapes; dev alone has a guidance embedder, and no other model's config takes its file."""
    weights = {f"{module}.weight": (module, "BF16", shape) for module, shape in bfl_shapes(model).items()}
    for name in list(weights):
        block = re.match(r"(double_blocks\.\d+\.(?:img|txt)_attn)\.qkv|(single_blocks\.\d+)\.linear1", name)
        for norm in ("query_norm", "key_norm") if block else ():
            weights[f"{block[1] or block[2]}.norm.{norm}.scale"] = (norm, "BF16", (128,))
    found = convert_transformer.check(Path("one"), weights, Path(model), read_architecture(model)["transformer"])
    assert {source for source, _ in found.values()} == {*weights}
    with pytest.raises(ValueError, match="does not match the transformer of"):
        other = read_architecture("klein-4B" if model == "dev" else "dev")["transformer"]
        convert_transformer.check(Path("one"), weights, Path("other"), other)


def test_the_other_parts_are_linked_or_copied(base, tiny, tmp_path):
    parts = {path.name for path in tiny.iterdir()}
    for name, copy in (("linked", False), ("copied", True)):
        (tmp_path / name).mkdir()
        converted(base, tiny, tmp_path / name, copy=copy)
        made = tmp_path / name / "made"
        assert {path.name for path in made.iterdir()} == parts
        assert {path.name for path in made.iterdir() if path.is_symlink()} == (
            set() if copy else parts - {"transformer"}
        )
        vae = "vae/diffusion_pytorch_model.safetensors"
        assert (made / vae).read_bytes() == (tiny / vae).read_bytes()


def test_a_base_in_four_bits_gives_a_config_without_them(base, tiny, tmp_path):
    (tmp_path / "base" / "transformer").mkdir(parents=True)
    (tmp_path / "base" / "model_index.json").write_text("{}")
    config = json.loads((tiny / "transformer" / "config.json").read_text())
    quantised = json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    (tmp_path / "base" / "transformer" / "config.json").write_text(quantised)
    converted(base, tmp_path / "base", tmp_path)
    assert json.loads((tmp_path / "made" / "transformer" / "config.json").read_text()) == config


def broken(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that must be refused."""
    name = "single_blocks.1.linear2.weight"
    if how == "missing":
        return {other: tensor for other, tensor in weights.items() if other != name}
    if how == "unexpected":
        return weights | {"double_blocks.0.img_attn.gate.weight": torch.zeros(2), "vae.conv.weight": torch.zeros(1)}
    if how == "misshapen":
        return weights | {name: weights[name][:, 1:]}
    if how == "int8":
        return weights | {name: weights[name].to(torch.int8)}
    scaled = in_fp8(weights, "weight_scale")
    if how == "scale missing":
        return {other: tensor for other, tensor in scaled.items() if other != "single_blocks.1.linear2.weight_scale"}
    return scaled | {"single_blocks.1.linear2.weight_scale": torch.ones(4, 4)}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", r"1 missing, such as single_transformer_blocks\.1\.attn\.to_out\.weight\)"),
        ("unexpected", r"2 unexpected, such as double_blocks\.0\.img_attn\.gate\.weight\)"),
        ("misshapen", r"1 misshapen, such as single_transformer_blocks\.1\.attn\.to_out\.weight \(128, 511\) for \("),
        ("int8", r"holds I8; use a file in bf16"),
        ("scale missing", r"1 weights or scales have no counterpart, such as single_blocks\.1\.linear2\.weight;"),
        ("blocks", r"holds scales of \(4, 4\); use a file"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(base, tiny, tmp_path, how, words):
    with pytest.raises(ValueError, match=words):
        converted(broken(in_bfls_names(base), how), tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_another_models_file_and_a_failed_write_leave_nothing(base, tiny, tiny_klein, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"does not match the transformer of .*tiny_klein .*unexpected, such as"):
        converted(in_bfls_names(base), tiny_klein, tmp_path)

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_transformer, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        converted(base, tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_the_command_says_what_it_did_and_each_mistake_in_one_line(base, tiny, tmp_path, monkeypatch, capsys):
    file, made, again = tmp_path / "one.safetensors", tmp_path / "made", tmp_path / "again"
    save_file(in_bfls_names(base), file)

    def start(base: Path, out: Path) -> None:
        words = ["convert_transformer.py", file, "--base", base, "--out", out]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        convert_transformer.main()

    start(tiny, made)
    told = capsys.readouterr().out
    assert "BFL's names: 51 tensors, 0 with a scale" in told and f"{made}: {len(base)} tensors; train on it" in told
    with pytest.raises(SystemExit, match=f"^error: --out {made}: already exists; choose another name$"):
        start(tiny, made)
    with pytest.raises(
        SystemExit, match="^error: --base docs: has no model_index.json; give a folder in diffusers format"
    ):
        start(Path("docs"), again)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        SystemExit, match=r"^error: \S*/one\.safetensors: is not a complete \.safetensors file \(.*\); down"
    ):
        start(tiny, again)
    assert not again.exists()
