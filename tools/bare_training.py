"""Run the training step of either script from an architecture alone: no weights, no images, no text encoder.

The configs are written to a folder that looks like a checkpoint. From `start_accelerator` to `train_step` the script's
own code runs, except that weights, prompts and images are not read from disk but are tensors of the right shape.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch._guards import detect_fake_mode

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ROOT / "tools" / "architectures.json"
PARTS = ("transformer", "vae", "text_encoder")
BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def read_architecture(name: str) -> dict[str, Any]:
    """Returns the configs of dev, klein-9B, klein-4B, a diffusers folder, or a Hub repository (JSON files only)."""
    known = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))
    if name in known:
        return known[name]
    folder = Path(name)
    if not folder.is_dir():
        import huggingface_hub

        patterns = ["model_index.json", *(f"{part}/config.json" for part in PARTS)]
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    configs = {part: json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in PARTS}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {"hub_id": name, "pipeline": index["_class_name"], **configs}


def write_checkpoint(architecture: dict[str, Any], folder: Path) -> Path:
    """Writes a folder with the configs, latent statistics, and empty files in place of the weights."""
    for part in (*PARTS, "tokenizer", "scheduler"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(architecture.get(part, {})), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": architecture["pipeline"]}), encoding="utf-8")
    for part in PARTS:
        (folder / part / "diffusion_pytorch_model.safetensors").touch()
    channels = 4 * architecture["vae"]["latent_channels"]
    statistics = {"bn.running_mean": torch.zeros(channels), "bn.running_var": torch.ones(channels)}
    save_file(statistics, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def start_run(script: ModuleType, architecture: dict[str, Any], folder: Path, *flags: Any) -> Any:
    """Returns the script's `Run` on the architecture; later flags override earlier ones. `folder` is new and empty."""
    (folder / "data").mkdir(parents=True)
    words = ["--pretrained_model_name_or_path", write_checkpoint(architecture, folder / "model")]
    words += ["--output_dir", folder / "out", "--instance_data_dir", folder / "data", "--instance_prompt", "a photo"]
    words += ["--mixed_precision", "bf16", "--cache_latents", "--report_to", "none", "--dataloader_num_workers", 0]
    words += ["--seed", 0, "--max_train_steps", 1000, "--no-compile_blocks", *flags]
    run = script.start_accelerator(script.parse_args([str(word) for word in words]))
    if detect_fake_mode() is not None:  # a pretended GPU has no time to measure: as an H200 chooses
        script.FP8Linear.row_wise = True
    return run


def make_streams(script: ModuleType, run: Any, references: int = 0) -> tuple:
    """(latent codec, streams) for one encoded sample of --resolution with `references` references of 1024 x 1024."""
    size = (run.args.resolution, run.args.resolution)
    extra = {}
    if references:
        extra = {"references": (script.Image("image.png", size=(1024, 1024), target=(1024, 1024)),) * references}
    sample = script.Sample(script.Image("image.png", size=size, target=size), ("a photo",), **extra)
    return script.LatentCodec(run), [script.Stream("instance", [sample])]


def fill(module: torch.nn.Module, run: Any) -> None:
    """Moves a module's parameters from the meta device to the run's device, with random values."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=run.dtype, device=run.device)
            value = value.normal_(std=0.02) if value.dim() > 1 else value.fill_(1.0)
            setattr(part, name, torch.nn.Parameter(value, requires_grad=False))


def quantise_by_script(script: ModuleType, run: Any, block: torch.nn.Module) -> None:
    """Quantises one block as the run asks: the script's FP8 layers, or bitsandbytes' as diffusers' loader makes them.

    Weights are quantised while they move from the CPU; on the device an 8-bit layer would keep the originals.
    """
    if run.args.do_fp8_training:
        script.quantize_block(run, block)
    elif run.quantization:
        from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

        weights = {name: part.weight.data for name, part in block.named_modules() if isinstance(part, torch.nn.Linear)}
        config = script.diffusers.BitsAndBytesConfig(**run.quantization)
        replace_with_bnb_linear(block, [], quantization_config=config)
        for name, weight in weights.items():
            empty = block.get_submodule(name).weight
            quantised = type(empty)(weight.cpu(), requires_grad=False, **vars(empty)).to(run.device)
            block.get_submodule(name).weight = quantised


def build_transformer(script: ModuleType, run: Any, quantise: Callable[..., None]) -> torch.nn.Module:
    """Builds the frozen transformer with random weights on the run's device.

    It works block by block, so the bf16 model never has to fit there when the blocks are quantised.
    """
    with torch.device("meta"):
        transformer = script.Flux2Transformer2DModel.from_config(run.model.config("transformer"))
    for name, module in transformer.named_children():
        if name not in BLOCKS:
            fill(module, run)
    for bits in ("4bit", "8bit"):  # PEFT reads these attributes
        setattr(transformer, f"is_loaded_in_{bits}", bool((run.quantization or {}).get(f"load_in_{bits}")))
    transformer.stream = script.BlockStream(run.device)
    for number, block in enumerate(script.blocks_of(transformer)):
        fill(block, run)
        quantise(script, run, block)
        if script.is_streamed(run, number):
            transformer.stream.keep(block)
    return transformer


def set_up(
    script: ModuleType, run: Any, given: tuple, quantise: Callable[..., None] = quantise_by_script, vae: Any = None
) -> Any:
    """Returns the script's Training for what `make_streams` gave; its optimizer has state, as after a first step."""
    with mock.patch.object(script, "load_transformer", lambda _: build_transformer(script, run, quantise)):
        training = script.prepare_training(run, *given, vae)
    training.transformer.train()
    for group in training.optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = True  # as on a GPU
    for parameter in training.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return training


@contextlib.contextmanager
def unencoded(script: ModuleType, run: Any, codec: Any) -> Iterator[None]:
    """Patches the script so that latents, pixels and prompts are random instead of encoded."""
    shape = (run.args.max_sequence_length, run.model.config("transformer")["joint_attention_dim"])
    prompt, channels = torch.randn(shape, dtype=run.dtype), codec.channels // 4

    def cached(_: Any, what: Any) -> torch.Tensor:  # a prompt, or an image: mean and log-variance (2, C, H, W)
        sides = () if isinstance(what, str) else [2 * side // run.token_size for side in what.target]
        return torch.randn(2, channels, *sides) if sides else prompt

    with (
        mock.patch.object(script.LatentCodec, "key", lambda _, image, flip: (image,)),
        mock.patch.object(script.TensorCache, "get", cached),
        mock.patch.object(script.Image, "pixels", lambda image, *_: torch.randn(3, *image.target)),
    ):
        yield


def make_batches(script: ModuleType, run: Any, training: Any) -> Iterator[tuple[dict, ...]]:
    """Runs the script's own loader on random latents and a random prompt."""
    with unencoded(script, run, training.codec):
        yield from script.make_loaders(run, training)
