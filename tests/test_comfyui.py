"""comfyui_lora.safetensors: the same LoRA under the names of BFL's own model, for every program that knows those."""

import functools
import re
import shutil
import sys

import diffusers
import pytest
import torch
from helpers import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from unit_parts import start_run

sys.path.insert(0, str(ROOT / "tools"))

import convert_lora
from bare_training import read_architecture

pytestmark = [pytest.mark.scripts("t2i"), pytest.mark.slow]

PRESETS = (None, "attention", "fal", "ai-toolkit")


@functools.cache
def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """(out, in) of every Linear module of a real architecture, by diffusers' names."""
    with torch.device("meta"):
        model = diffusers.Flux2Transformer2DModel.from_config(read_architecture(name)["transformer"])
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def bfl_shapes(name: str) -> dict[str, tuple[int, int]]:
    """(out, in) of the modules of BFL's own implementation, by its names."""
    double, single, width, text = {"dev": (8, 48, 6144, 15360), "klein-9B": (8, 24, 4096, 12288),
                                   "klein-4B": (5, 20, 3072, 7680)}[name]  # fmt: skip
    shapes = {"img_in": (width, 128), "txt_in": (width, text), "time_in.in_layer": (width, 256)}
    shapes |= {"time_in.out_layer": (width, width), "final_layer.linear": (128, width)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * width, width), "single_stream_modulation.lin": (3 * width, width)}
    shapes |= {f"double_stream_modulation_{stream}.lin": (6 * width, width) for stream in ("img", "txt")}
    if name == "dev":
        shapes |= {"guidance_in.in_layer": (width, 256), "guidance_in.out_layer": (width, width)}
    for number in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            shapes |= {f"{block}_attn.qkv": (3 * width, width), f"{block}_attn.proj": (width, width)}
            shapes |= {f"{block}_mlp.0": (6 * width, width), f"{block}_mlp.2": (width, 3 * width)}
    for number in range(single):
        shapes |= {f"single_blocks.{number}.linear1": (9 * width, width)}
        shapes |= {f"single_blocks.{number}.linear2": (width, 4 * width)}
    return shapes


def random_lora(shapes: dict[str, tuple[int, int]], rank: int, **options) -> dict[str, torch.Tensor]:
    """A LoRA on these modules by the names of the adapter's parameters."""
    matrices = {}
    for name, (height, width) in shapes.items():
        matrices[f"{name}.lora_A.weight"] = torch.randn(rank, width, **options)
        matrices[f"{name}.lora_B.weight"] = torch.randn(height, rank, **options)
    return matrices


@pytest.mark.parametrize("model", ["dev", "klein-9B", "klein-4B"])
@pytest.mark.parametrize("preset", [*PRESETS, "every Linear module"])
def test_every_module_has_the_name_and_shape_of_bfls_own_model(script, model, preset):
    linears = shapes_of(model)
    asked = ",".join(name if name != "proj_out" else "final:proj_out" for name in linears)
    targets = script.resolve_lora_layers([*linears], asked if preset == "every Linear module" else preset)
    matrices = random_lora({name: linears[name] for name in targets}, 1, device="meta")
    known, found = bfl_shapes(model), script.bfl_lora(matrices, 1.0)
    modules = {re.sub(r"\.lora_[AB]\.weight$", "", name).removeprefix("diffusion_model.") for name in found}
    for module in modules:
        down, up = (found[f"diffusion_model.{module}.lora_{part}.weight"].shape for part in "AB")
        assert (up[0], down[1]) == known[module] and up[1] == down[0], module
    if preset == "every Linear module":
        assert modules == {*known}
    back = diffusers.Flux2Pipeline.lora_state_dict(
        {name: torch.zeros(tensor.shape[0], 1) for name, tensor in found.items()}
    )
    assert {name.removeprefix("transformer.") for name in back} == {*matrices}


def merged(tiny, model, weights) -> dict[str, torch.Tensor]:
    """The transformer's weights after diffusers has loaded and fused a LoRA."""
    transformer = diffusers.Flux2Transformer2DModel.from_pretrained(tiny / "transformer")
    pipeline = model.from_pretrained(tiny, transformer=transformer, text_encoder=None, tokenizer=None, vae=None)
    pipeline.load_lora_weights(weights)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.transformer.state_dict()


@pytest.mark.parametrize("preset", [*PRESETS, "to_k,add_q_proj"])
@pytest.mark.parametrize("klein", [False, True], ids=["dev", "klein"])
def test_it_merges_to_the_same_weights_as_the_main_file(script, tiny, tiny_klein, preset, klein, tmp_path):
    """q, k and v become one module of three times the rank; alpha / rank is in lora_B."""
    folder, pipeline = (tiny_klein, diffusers.Flux2KleinPipeline) if klein else (tiny, diffusers.Flux2Pipeline)
    base = diffusers.Flux2Transformer2DModel.from_pretrained(folder / "transformer")
    linears = {name: tuple(m.weight.shape) for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = script.resolve_lora_layers([*linears], preset)
    torch.manual_seed(0)
    matrices = random_lora({name: linears[name] for name in targets}, 4)
    found = merged(folder, pipeline, script.bfl_lora(matrices, 0.5))
    for name, weight in base.state_dict().items():
        module = name.removesuffix(".weight")
        if module in targets:
            weight = weight + 0.5 * matrices[f"{module}.lora_B.weight"] @ matrices[f"{module}.lora_A.weight"]
        assert torch.allclose(found[name], weight, rtol=1e-5, atol=1e-5), name


def test_a_run_writes_it_beside_the_main_file_unless_it_is_not_wanted(script, quick):
    """Checkpoints have the main file only."""
    folder = quick("--max_train_steps", "1", "--lora_alpha", "6")
    stored, main = load_file(folder / script.COMFYUI_FILE), load_file(folder / script.LORA_FILE)
    expected = script.bfl_lora({name.removeprefix("transformer."): tensor for name, tensor in main.items()}, 1.5)
    assert stored.keys() == expected.keys() and all(stored[name].equal(expected[name]) for name in stored)
    assert not any(name.endswith(".alpha") for name in stored)
    assert not list(folder.glob(f"checkpoint-*/{script.COMFYUI_FILE}"))
    assert not (quick("--max_train_steps", "1", "--no-comfyui_lora", output="without") / script.COMFYUI_FILE).exists()


def test_the_header_names_the_size_of_klein_and_what_the_lora_is_of(script, tiny, tiny_klein, tmp_path):
    """Ids as SwarmUI knows them; equal runs in other folders have equal headers."""
    for model, expected in ((tiny, "Flux.2-dev/lora"), (tiny_klein, "Flux.2-klein-4b/lora")):
        facts = script.describe_lora(start_run(script, model, tmp_path / expected.replace("/", "-")))
        assert facts["modelspec.architecture"] == expected
        assert facts["modelspec.trigger_phrase"] in facts["modelspec.title"] != ""
        assert facts["modelspec.implementation"] == "diffusers" and facts["modelspec.resolution"] == "64x64"
        assert str(tmp_path) not in str(facts)
    assert [family.architecture for family in script.FAMILIES if family.text_width == 12288] == ["Flux.2-klein-9b"]


def test_a_prompt_that_no_caption_contains_is_no_trigger(script, quick, tmp_path, photos):
    """Every image has a caption of its own."""
    data = shutil.copytree(photos, tmp_path / "data")
    for path in [path for path in data.iterdir() if path.suffix != ".txt"]:
        path.with_suffix(".txt").write_text("a red cube of sks", encoding="utf-8")
    for prompt, known in (("unused words", False), ("sks", True)):
        flags = ("--instance_data_dir", data, "--instance_prompt", prompt, "--max_train_steps", "1")
        folder = quick(*flags, output=prompt)
        with safe_open(folder / script.LORA_FILE, "pt") as file:
            header = file.metadata()
        assert (header["modelspec.trigger_phrase"] == prompt) == known == (prompt in header["modelspec.title"])
        assert (f'Write "{prompt}" in the prompt.' in (folder / "README.md").read_text(encoding="utf-8")) == known


def test_the_tool_converts_the_lora_of_a_checkpoint(script, quick):
    folder = quick("--max_train_steps", "1", "--lora_alpha", "6", "--seed", "3")
    [checkpoint] = folder.glob("checkpoint-*")
    target = folder / "converted.safetensors"
    modules = convert_lora.convert(checkpoint / script.LORA_FILE, target)
    found, expected = load_file(target), load_file(folder / script.COMFYUI_FILE)
    assert found.keys() == expected.keys() and len(found) == 2 * modules
    assert all(found[name].equal(expected[name]) for name in found)
    with safe_open(target, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "Flux.2-dev/lora"


def test_the_tool_says_what_it_cannot_convert(script, tmp_path):
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(convert_lora.script.UserError, match=r"other\.safetensors: not a plain FLUX.2 LoRA"):
        convert_lora.convert(tmp_path / "other.safetensors", tmp_path / "converted.safetensors")
