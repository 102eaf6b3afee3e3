"""Predict before a download what FLUX.2 LoRA training needs, which settings fit a GPU, and the command line for them.

    python tools/plan_memory.py --model dev --gpu_gb 24          what fits 24 GB, with command lines and host memory
    python tools/plan_memory.py --gpu_gb 24 --host_gb 16         the same, within 16 GB of host memory
    python tools/plan_memory.py --model klein-4B                 every rung, resolution and number of references
    python tools/plan_memory.py --model dev --processes 8        per GPU, sharded over 8 (FSDP2); --nodes 2: twice that
    python tools/plan_memory.py --all                            benchmarks/plan_memory.json, tables of docs/memory.md

`--model` is dev, klein-9B, klein-4B, a diffusers folder, or a hub id, of which only JSON files are downloaded. The
script's own training step runs on fake tensors, and all live storages are counted (memory_counter.py). The numbers are
predictions, for batch 1, rank 16, AdamW and cached latents unless flags after `--` say otherwise:
    python tools/plan_memory.py --model dev -- --rank 64 --train_batch_size 2

NF4 and int8: bitsandbytes' kernels do not run on fake tensors. Their layers are replaced by layers of the same storage
(bytes per weight by arithmetic, the temporary bf16 copy of one weight, the input that int8 keeps even where blocks are
recomputed); the rest is the real step.

A GPU of N GB is assumed to have N x 10^9 bytes for tensors. Its actual size (80 GB: 85.5 x 10^9) leaves about 7 % for
the CUDA context, library workspaces and fragmentation, which are not counted.
"""

import argparse
import itertools
import json
import logging
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bare_training
import torch
import transformers
from bare_training import ROOT, read_architecture
from memory_counter import LiveStorages, planned
from torch import nn

sys.path.insert(0, str(ROOT))
import train_dreambooth_lora_flux2 as text_to_image
import train_dreambooth_lora_flux2_img2img as image_to_image

GB = 1e9
RESULT, MEASURED = ROOT / "benchmarks" / "plan_memory.json", ROOT / "benchmarks" / "gpu.json"
HOST = ROOT / "benchmarks" / "host_memory.json"
CHECKPOINTING, FP8, STREAM = "--gradient_checkpointing", "--do_fp8_training", "--stream_blocks"
ENCODER_NF4 = ("--text_encoder_bnb_config_path", str(ROOT / "configs" / "quantization" / "nf4.json"))


# ---------------------------------------------------------------------------------------------------------------- Rungs
@dataclass(frozen=True)
class Rung:
    """One way to keep the frozen blocks: `flags` for the command line, `bits` of a weight with its scales."""

    name: str
    base: str  # bf16, fp8, nf4 or int8
    flags: tuple[str, ...]
    checkpointing: bool

    @property
    def share(self) -> float:
        """--gradient_checkpointing."""
        return float(self.checkpointing)

    @property
    def title(self) -> str:
        """The name in the tables."""
        return f"{self.name} + checkpointing" if self.checkpointing else self.name


BASES = {
    "bf16": ("bf16", ()),
    "fp8": ("FP8", (FP8,)),
    "int8": ("int8", ("--bnb_quantization_config_path", "configs/quantization/int8.json")),
    "nf4": ("NF4", ("--bnb_quantization_config_path", "configs/quantization/nf4.json")),
}
RUNGS = [
    Rung(BASES[base][0], base, BASES[base][1], checkpointing)
    for base, checkpointing in (
        ("bf16", False), ("bf16", True), ("fp8", False), ("fp8", True), ("int8", True), ("nf4", True)
    )
]  # fmt: skip


class FrozenProduct(torch.autograd.Function):
    """x W^T with the allocations of bitsandbytes; the values are meaningless."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """(..., in) -> (..., out) in the dtype of `hidden`."""
        context.layer, rows = layer, hidden.flatten(0, -2)
        shape = (len(rows), layer.out_features)
        if layer.kind == "int8":  # fp16 copy, int8 values and their scales, a product in int32
            context.hidden = hidden  # not by save_for_backward: recomputation does not drop it (`MatMul8bitLt.forward`)
            half = rows.to(torch.float16)
            values, scales = half.to(torch.int8), half.new_empty(len(rows), dtype=torch.float32)
            del half
            product = torch.empty(shape, dtype=torch.int32, device=hidden.device).to(hidden.dtype)
            del values, scales
        else:
            product = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        return product.unflatten(0, hidden.shape[:-1])

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of `hidden`; the bf16 weight exists only during the matmul."""
        layer = context.layer
        weight = torch.empty(layer.out_features, layer.in_features, dtype=gradient.dtype, device=gradient.device)
        return gradient @ weight, None


class StandIn(nn.Linear):
    """A frozen Linear with the storage of a bitsandbytes layer."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        """NF4, nested scales: half a byte per weight, a byte per 64, fp32 per 64 x 256. int8: a byte, fp32 per row."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.kind, count, device = kind, linear.weight.numel(), linear.weight.device
        shape = (count // 2, 1) if kind == "nf4" else tuple(linear.weight.shape)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)
        if kind == "nf4":
            self.register_buffer("absmax", torch.empty(count // 64, dtype=torch.uint8, device=device))
            self.register_buffer("nested", torch.empty(-(-count // 64 // 256), device=device))
        else:
            self.register_buffer("scales", torch.empty(linear.out_features, device=device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return FrozenProduct.apply(hidden, self)


def stand_in(kind: str, block: nn.Module) -> None:
    """Replaces the Linear layers of a block, as the script does."""
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, StandIn(module, kind))


def quantise(base: str, script: ModuleType, run: Any, block: nn.Module) -> None:
    """Installs the script's FP8 layers, stand-ins for those of bitsandbytes, or nothing."""
    if base in ("nf4", "int8"):
        stand_in(base, block)
    bare_training.quantise_by_script(script, run, block)


# ------------------------------------------------------------------------------------------------- Counting, per phase
@dataclass(frozen=True)
class Job:
    """A training job: architecture, pixels per side, 1 MP references per sample, the user's flags."""

    model: str
    resolution: int
    references: int = 0
    flags: tuple[str, ...] = ()

    @property
    def script(self) -> ModuleType:
        """The script for this job."""
        return image_to_image if self.references else text_to_image

    def run(self, folder: str, *flags: Any) -> Any:
        """The script's `Run` on this machine's device."""
        words = ("--resolution", self.resolution, *flags, *self.flags)
        return bare_training.start_run(self.script, read_architecture(self.model), Path(folder, "run"), *words)

    def plan(self, folder: str, *flags: Any) -> Any:
        """The script's `Run` on the CPU: the plan must not depend on a GPU in this machine."""
        with bare_training.mock.patch.object(torch.accelerator, "is_available", lambda: False):
            return self.run(folder, *flags)


@dataclass(frozen=True)
class Training:
    """Device memory of one step, in bytes."""

    peak: int
    resident: int  # between steps: frozen weights, adapter, optimizer, cached prompts
    sizes: tuple[
        int, ...
    ]  # of `resident`: frozen weights of each block, which FSDP2 shards and --stream_blocks streams
    lora_parameters: int
    tokens: int

    @property
    def blocks(self) -> int:
        """Frozen weights of all blocks."""
        return sum(self.sizes)

    @property
    def largest_block(self) -> int:
        """Frozen weights of the largest block."""
        return max(self.sizes)


@cache
def count_training(job: Job, base: str, share: float) -> Training:
    """Counts the script's setup and one step with `share` of the blocks recomputed."""
    flags = [FP8] * (base == "fp8") + [CHECKPOINTING, share] * (share > 0)
    counter = LiveStorages()
    with tempfile.TemporaryDirectory() as folder:
        run = job.plan(folder, *flags)
        given = bare_training.make_streams(job.script, run, job.references)
        with planned(counter):
            training = bare_training.set_up(job.script, run, given, base_quantiser(base))
            batches = bare_training.make_batches(job.script, run, training)
            counter.restart()
            job.script.train_step(run, training, batches)
            sizes = tuple(frozen_bytes(block) for block in blocks_of(training.transformer))
            count = sum(parameter.numel() for parameter in training.parameters.values())
            tokens = run.args.max_sequence_length + sum(target_tokens(size) for size in sequence(job))
            return Training(counter.peak, counter.now, sizes, count, tokens)


def base_quantiser(base: str) -> Any:
    """`quantise` of one kind, as `bare_training` calls it."""
    return lambda script, run, block: quantise(base, script, run, block)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """All blocks, in the order in which --gradient_checkpointing counts them."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def frozen_bytes(block: nn.Module) -> int:
    """Bytes of a block's frozen tensors."""
    tensors = [*block.buffers(), *(parameter for parameter in block.parameters() if not parameter.requires_grad)]
    return sum(tensor.nbytes for tensor in tensors)


def sequence(job: Job) -> list[int]:
    """Pixels per side of each image in the sequence."""
    return [job.resolution, *[1024] * job.references]


def target_tokens(side: int) -> int:
    """Tokens of a square image."""
    return (side // 16) ** 2


@cache
def count_encoder(job: Job) -> dict[str, float]:
    """bf16 weights and peak of the text encoder's phase, in bytes, with only the layers that are used."""
    script, counter = text_to_image, LiveStorages()
    with tempfile.TemporaryDirectory() as folder:
        run = job.plan(folder)
        config = encoder_config(run)
        with planned(counter):
            encoder = getattr(transformers, run.family.text_encoder)._from_config(config, dtype=run.dtype).eval()
            encoder.lm_head = torch.nn.Identity()
            if hasattr(encoder.model, "vision_tower"):
                encoder.model.vision_tower = encoder.model.multi_modal_projector = None
            weights = counter.now
            if run.text_quantization:
                layers = getattr(encoder.model, "language_model", encoder.model).layers
                stand_in("nf4" if run.text_quantization.get("load_in_4bit") else "int8", layers)
            counter.restart()
            ids = torch.ones(1, run.args.max_sequence_length, dtype=torch.int64)
            tokens = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            tokenizer = bare_training.mock.Mock(return_value=tokens)
            tokenizer.apply_chat_template.return_value = tokens
            script.encode_prompt(run, tokenizer, encoder, "a photo")
    return {"weights": weights, "peak": counter.peak}


def encoder_config(run: Any) -> Any:
    """The encoder's config cut to the layers that `load_text_encoder` keeps."""
    config = transformers.AutoConfig.from_pretrained(run.model.part("text_encoder"))
    text = getattr(config, "text_config", config)
    text.num_hidden_layers = min(max(run.text_layers) + 1, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return config


@cache
def count_vae(job: Job) -> int:
    """Peak bytes of encoding one image of the largest size with the script's fp32 VAE."""
    counter, side = LiveStorages(), max(sequence(job))
    with tempfile.TemporaryDirectory() as folder:
        run = job.plan(folder)
        with planned(counter):
            vae = job.script.AutoencoderKLFlux2.from_config(run.model.config("vae")).eval().requires_grad_(False)
            counter.restart()
            job.script.encode_pixels(vae, torch.zeros(1, 3, side, side))
    return counter.peak


# ------------------------------------------------------------------------------------------------ Everything around it
def step_tflop(job: Job, share: float) -> float:
    """TFLOP of one step: Linear layers and attention, including recomputation.

    A block of width h has 26 h^2 weights for each of its tokens, and attention 4 h S^2; the backward pass has no weight
    gradients, so it costs the Linears once more and attention twice.
    """
    config = read_architecture(job.model)["transformer"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers, tokens = config["num_layers"] + config["num_single_layers"], 512 + sum(map(target_tokens, sequence(job)))
    linears, attention = 26 * width**2 * layers * tokens, 4 * width * layers * tokens**2
    return ((2 + share) * linears + (3 + share) * attention) / 1e12


def measured_rates() -> dict[str, dict[str, float]]:
    """Median TFLOP/s by GPU and base of the rows in benchmarks/gpu.json."""
    result = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {"rows": []}
    rates: dict[str, dict[str, list[float]]] = {}
    for row in result["rows"]:
        if row.get("tflops") and not (row["compiled"] or row["streamed"]):
            rates.setdefault(row["gpu"], {}).setdefault(row["base"], []).append(row["tflops"])
    return {gpu: {base: statistics.median(found) for base, found in bases.items()} for gpu, bases in rates.items()}


def transformer_bytes(job: Job) -> int:
    """Bytes of the transformer in bf16: the most host memory that loading it takes."""
    with torch.device("meta"):
        transformer = text_to_image.Flux2Transformer2DModel.from_config(read_architecture(job.model)["transformer"])
    return 2 * sum(parameter.numel() for parameter in transformer.parameters())


def disk(job: Job, lora_parameters: int) -> dict[str, float]:
    """GB on disk: the model download, one cached prompt, one cached sample, one training checkpoint."""
    architecture = read_architecture(job.model)
    prompt = 2 * 512 * architecture["transformer"]["joint_attention_dim"]
    latent = 4 * 2 * 4 * architecture["vae"]["latent_channels"] * sum(map(target_tokens, sequence(job)))
    sizes = {"prompt": prompt, "sample": latent, "checkpoint": (3 * 4 + 2) * lora_parameters}
    return {name: value / GB for name, value in sizes.items()}


@cache
def host_figures() -> dict[str, float]:
    """What benchmarks/host_memory.py measured: GB of the main process and of a worker, bytes per saved parameter."""
    found = json.loads(HOST.read_text(encoding="utf-8"))
    largest = {name: max(row[name] for row in found["workers"]) for name in ("main_anonymous_gb", "worker_private_gb")}
    saved = found["saving"]["bytes_per_parameter"]
    return {"process": largest["main_anonymous_gb"], "worker": largest["worker_private_gb"], "saved": saved}


@cache
def loader_and_lora(job: Job) -> tuple[int, int]:
    """The loader's workers, and the parameters of the adapter."""
    default = text_to_image.build_parser().get_default("dataloader_num_workers")
    with tempfile.TemporaryDirectory() as folder:
        run = job.plan(folder, "--dataloader_num_workers", default)
    linears = text_to_image.linear_modules(read_architecture(job.model)["transformer"])
    sides = sum(linears[name].in_features + linears[name].out_features for name in run.lora.targets)
    return run.args.dataloader_num_workers, run.lora.rank * sides


def host(job: Job, pinned_gb: float = 0.0, encoder_gb: float = 0.0) -> dict[str, float]:
    """GB of host memory of one process on a GPU, by part; `peak` is what must be there, `mapped` what may go.

    Loading makes no copy: weights go from the mapped files to the GPU, or into the pinned memory of the blocks that
    stream; FP8 is quantised on the GPU (benchmarks/host_memory.json). The `encoder_gb` that --offload leaves on the
    host are mapped too, but read for each prompt, so that they count; they are gone before training. While the last
    checkpoint is saved, adapter and moments are there several times. Not counted: what CUDA takes, which was not
    measured, and a VAE that waits (0.3 GB).
    """
    figures, (workers, parameters) = host_figures(), loader_and_lora(job)
    encoder, sizes = count_encoder(replace(job, resolution=512, references=0))["weights"], disk(job, parameters)
    parts = {
        "process": figures["process"],
        "workers": workers * (figures["worker"] + 2 * (sizes["prompt"] + sizes["sample"])),  # each prepares two batches
        "pinned": pinned_gb,
        "saving": figures["saved"] * parameters / GB,
        "encoder": encoder_gb,
        "mapped": max(encoder, transformer_bytes(job)) / GB,
    }
    training = sum(parts[name] for name in ("workers", "pinned", "saving"))
    return {"peak": parts["process"] + max(training, encoder_gb), **parts}


def host_words(parts: dict[str, float]) -> str:
    """The parts of `host` for the reader."""
    names = {"pinned": "pinned blocks", "saving": "saving", "workers": "loader's workers", "process": "process"}
    shown = [f"{parts[key]:.1f} GB {name}" for key, name in names.items() if parts[key]]
    offloaded = f", before that {parts['encoder']:.0f} GB of the text encoder" if parts["encoder"] else ""
    mapped = f"up to {parts['mapped']:.0f} GB of mapped files, which may go"
    return f"host {parts['peak']:.1f} GB ({', '.join(shown)}{offloaded}) and {mapped}"


def plan(job: Job, base: str, share: float) -> dict[str, Any]:
    """Returns one row: peak GB of each phase, host, disk, TFLOP, and seconds where rates were measured."""
    training, encoder = count_training(job, base, share), count_encoder(job)
    encoder_nf4 = count_encoder(replace(job, flags=(*job.flags, *ENCODER_NF4)))
    step = {gpu: step_tflop(job, share) / rates[base] for gpu, rates in measured_rates().items() if base in rates}
    return {
        "model": job.model, "base": base, "share": share, "resolution": job.resolution, "references": job.references,
        "training_gb": training.peak / GB, "resident_gb": training.resident / GB,
        "encoder_gb": encoder["peak"] / GB, "encoder_nf4_gb": encoder_nf4["peak"] / GB, "vae_gb": count_vae(job) / GB,
        "host": host(job),
        "disk_gb": disk(job, training.lora_parameters), "tflop": step_tflop(job, share), "seconds": step,
        "lora_parameters": training.lora_parameters,
    }  # fmt: skip


def largest_share_kept(job: Job, base: str, gpu_gb: float) -> float | None:
    """Returns the smallest --gradient_checkpointing that fits (recomputing costs time), or None."""
    config, limit = read_architecture(job.model)["transformer"], gpu_gb * GB
    blocks = config["num_layers"] + config["num_single_layers"]
    low = count_training(job, base, 1.0).peak
    if low > limit:
        return None
    high = count_training(job, base, 0.0).peak
    if high <= limit:
        return 0.0
    fits, fails = blocks, 0  # numbers of recomputed blocks; the peak falls almost linearly with them
    while fits - fails > 1:
        guess = fits - math.floor((fits - fails) * (limit - low) / (high - low))
        middle = min(max(guess, fails + 1), fits - 1)
        peak = count_training(job, base, share_of(middle, blocks)).peak
        fits, low = (middle, peak) if peak <= limit else (fits, low)
        fails, high = (middle, peak) if peak > limit else (fails, high)
    return share_of(fits, blocks)


def streamed(job: Job, base: str, share: float) -> dict[str, float]:
    """GB of a step with --stream_blocks `share`: on the device, pinned on the host, copied to the device per step.

    Two buffers of the largest block's size replace the streamed blocks. Weights are copied for the forward and again
    for the backward pass, except for two that are still there.
    """
    training = count_training(job, base, 1.0)
    run = SimpleNamespace(args=SimpleNamespace(stream_blocks=share))
    sizes = [size for number, size in enumerate(training.sizes) if text_to_image.is_streamed(run, number)]
    device = training.peak - sum(sizes) + 2 * max(sizes, default=0)
    return {"gpu": device / GB, "pinned": sum(sizes) / GB, "copied": (2 * sum(sizes) - sum(sizes[-2:])) / GB}


def least_share_streamed(job: Job, base: str, gpu_gb: float) -> float | None:
    """Returns the smallest --stream_blocks that fits, in hundredths, or None."""
    shares = (hundredth / 100 for hundredth in range(1, 101))
    return next((share for share in shares if streamed(job, base, share)["gpu"] <= gpu_gb), None)


def share_of(count: int, blocks: int) -> float:
    """Returns the flag's value for `count` blocks; the script rounds up to whole blocks."""
    return (1000 * count - 1) // blocks / 1000 if 0 < count < blocks else count / blocks


def sharded(job: Job, base: str, share: float, processes: int, nodes: int) -> dict[str, Any]:
    """Memory per GPU and bytes sent per step and GPU, with the blocks sharded over the `processes` of each node.

    FSDP2: each GPU keeps its shard of the blocks, the gathered current block and the prefetched next one. The forward
    and the backward pass each gather every block once; recomputation needs no extra gather. The LoRA is not sharded;
    its fp32 gradient is all-reduced over all GPUs of all nodes (HYBRID_SHARD), the only traffic between nodes.
    """
    training = count_training(job, base, share)
    others = (processes - 1) / processes
    gathered = 0 if base in ("nf4", "int8") else training.blocks  # bitsandbytes' weights stay whole on each GPU
    kept = training.blocks - others * gathered + (2 * training.largest_block if gathered else 0)
    parts = host(job)  # a block is quantised right before it is split, so nothing else peaks while loading
    each = parts["process"] + parts["workers"]
    total, gradient = processes * nodes, 4 * training.lora_parameters
    return {
        "model": job.model, "base": base, "share": share, "resolution": job.resolution, "references": job.references,
        "gpus_per_node": processes, "nodes": nodes,
        "per_gpu_gb": (training.peak - training.blocks + kept) / GB,
        "unsharded_gb": training.peak / GB,
        "host_gb_per_node": processes * each + parts["saving"],
        "gathered_gb_per_step": 2 * others * gathered / GB,
        "all_reduced_gb_per_step": 2 * gradient * (total - 1) / total / GB,
        "tflop": step_tflop(job, share),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- Output
def encoder_places(job: Job, gpu_gb: float) -> Iterator[tuple[tuple[str, ...], float]]:
    """(flags, GB left on the host) of the text encoder: on the GPU, else spread by --offload, else in NF4 there."""
    left = count_encoder(job)["peak"] / GB - gpu_gb
    if left <= 0:
        yield (), 0.0
        return
    yield ("--offload",), left
    if count_encoder(replace(job, flags=(*job.flags, *ENCODER_NF4)))["peak"] <= gpu_gb * GB:
        yield ENCODER_NF4, 0.0


def command_line(job: Job, base: str, share: float, stream: float = 0.0, encoder: tuple[str, ...] = ()) -> str:
    """The launch line of a plan; `encoder` are the flags that place the text encoder."""
    words = [f"accelerate launch {Path(job.script.__file__).name}"]
    words.append(f"--pretrained_model_name_or_path {read_architecture(job.model)['hub_id']}")
    data = "--dataset_name DATA --cond_image_column source" if job.references else "--instance_data_dir dog"
    words += [data, '--instance_prompt "a photo of sks dog"', f"--resolution {job.resolution} --cache_latents"]
    words += [" ".join(BASES[base][1])] * (base != "bf16")
    words += [f"{CHECKPOINTING}{f' {share:g}' if share < 1 else ''}"] * (share > 0 and not stream)
    words += [f"{STREAM}{f' {stream:g}' if stream < 1 else ''}"] * (stream > 0)
    words += [" ".join(encoder).replace(f"{ROOT}/", "")] * bool(encoder)
    return " \\\n  ".join([*words, *[" ".join(job.flags)] * bool(job.flags)])


def find_line(job: Job, base: str, gpu_gb: float, host_gb: float = math.inf) -> dict[str, Any] | str:
    """The command line for a base that fits GPU and host, and what it needs; or why there is none.

    Streams blocks only if it must, and as few as possible, to pin the least host memory.
    """
    share, stream, pinned = largest_share_kept(job, base, gpu_gb), 0.0, 0.0
    if share is not None:
        training_gb = count_training(job, base, share).peak / GB
    else:
        stream = least_share_streamed(job, base, gpu_gb) if base in ("bf16", "fp8") else None
        if stream is None:
            return f"does not fit {gpu_gb:g} GB ({count_training(job, base, 1.0).peak / GB:.1f} GB)"
        found = streamed(job, base, stream)
        share, training_gb, pinned = 1.0, found["gpu"], found["pinned"]
    for encoder, left in encoder_places(job, gpu_gb):
        parts = host(job, pinned, left)
        if parts["peak"] <= host_gb:
            line = command_line(job, base, share, stream, encoder)
            row = {"base": base, "share": share, "stream": stream, "training_gb": training_gb}
            return row | {"host": parts, "command": line}
    return f"fits {gpu_gb:g} GB, but not {host_gb:g} GB of host memory: it takes {host_words(parts)}"


def tell_what_fits(job: Job, gpu_gb: float, host_gb: float = math.inf) -> bool:
    """Prints for each base the command line that fits, or why there is none; returns whether there is one."""
    found = {}
    for base, (name, _) in BASES.items():
        line, where = find_line(job, base, gpu_gb, host_gb), f"{job.model} {job.resolution} px"
        where += f", {job.references} reference(s), {name}"
        if isinstance(line, str):
            print(f"{where}: {line}")
            continue
        found[base], row = line, plan(job, base, line["share"])
        copied = streamed(job, base, line["stream"])["copied"]
        how = f", by {STREAM} {line['stream']:g}, {copied:.0f} GB copied per step" if line["stream"] else ""
        print(f"{where}: fits {gpu_gb:g} GB, predicted {line['training_gb']:.1f} GB{how}; text encoder first "
              f"{row['encoder_gb']:.1f} GB ({row['encoder_nf4_gb']:.1f} GB in NF4), VAE {row['vae_gb']:.1f} GB; "
              f"{host_words(line['host'])}; {time_words(row)}\n\n{line['command']}\n")  # fmt: skip
    print(*(note for base, note in NOTES.items() if base in found), sep="", end="")
    return bool(found)


NOTES = {
    "fp8": "FP8 needs compute capability 8.9 (Ada, Hopper and later); NF4 runs on older GPUs too.\n",
    "int8": "int8: prefer FP8, or NF4 on older GPUs. bitsandbytes keeps the input of each 8-bit layer, even in\n"
            "recomputed blocks, waits for the GPU twice in each matmul, and does not compile.\n",
}  # fmt: skip


def time_words(row: dict[str, Any]) -> str:
    """TFLOP per step, and seconds where the GPU's rate was measured."""
    seconds = [f"{value:.1f} s per step on {gpu}" for gpu, value in row["seconds"].items()]
    return ", ".join([*seconds, f"{row['tflop']:.0f} TFLOP per step"] + ["seconds not measured"] * (not seconds))


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines: predicted GB while training, by model, rung and size."""
    columns = sorted({(row["resolution"], row["references"]) for row in rows}, key=lambda column: column[::-1])
    heads = [f"{size} px" + (f" + {count} ref." if count else "") for size, count in columns]
    yield f"| predicted GB while training | {' | '.join(heads)} | measured |"
    yield "|---" * (len(columns) + 2) + "|"
    for model in dict.fromkeys(row["model"] for row in rows):
        for rung in RUNGS:
            own = [row for row in rows if (row["model"], row["base"], row["share"]) == (model, rung.base, rung.share)]
            peaks = {(row["resolution"], row["references"]): f"{row['training_gb']:.1f}" for row in own}
            if peaks:
                cells = " | ".join(peaks.get(column, "-") for column in columns)
                yield f"| {model}, {rung.title} | {cells} | {measured_cell(model, rung)} |"


def measured_cell(model: str, rung: Rung) -> str:
    """Measured peaks of a rung from benchmarks/gpu.json, or 'not measured'."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"] if MEASURED.is_file() else []
    found = [row for row in rows if (row["model"], row["base"], row["share"]) == (model, rung.base, rung.share)]
    found = [row for row in found if row.get("peak_gb") and not (row["compiled"] or row["streamed"])]
    cells = {}
    for row in found:
        flags = f" (`{' '.join(row['flags'])}`)" if row.get("flags") else ""
        cells[f"{row['resolution']} px" + " + 1 ref." * row["references"] + flags] = row["peak_gb"]
    return ", ".join(f"{size}: {peak:.1f}" for size, peak in sorted(cells.items())) or "not measured"


def speed_lines() -> Iterator[str]:
    """Markdown lines: seconds per step of the rows in benchmarks/gpu.json."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"] if MEASURED.is_file() else []
    yield "| measured, batch 1 | eager | compiled | `--stream_blocks` | peak GB: eager, compiled, streamed |"
    yield "|---|---|---|---|---|"
    kinds = {(False, 0.0): "eager", (True, 0.0): "compiled", (False, 1.0): "streamed"}
    places: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        kind = kinds.get((row["compiled"], row["streamed"]))
        if kind and row.get("seconds_per_step") and row["share"] == 1.0:
            place = (row["model"], row["base"], row["resolution"], row["references"])
            places.setdefault(place, {})[kind] = row
    for (model, base, size, references), found in sorted(places.items()):
        what = f"{model}, {BASES[base][0]}, {size} px" + " + 1 ref." * references
        seconds = [f"{found[kind]['seconds_per_step']:.2f} s" if kind in found else "-" for kind in kinds.values()]
        peaks = [f"{found[kind]['peak_gb']:.1f}" if kind in found else "-" for kind in kinds.values()]
        yield f"| {what} | {' | '.join(seconds)} | {', '.join(peaks)} |"


def phase_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines: what comes before training, for each model."""
    heads = "text encoder | the same in NF4 | VAE, 1 MP | host | mapped files | a prompt / 1 MP image on disk"
    yield f"| predicted GB before training | {heads} |"
    yield "|---|---|---|---|---|---|---|"
    for model in dict.fromkeys(row["model"] for row in rows):
        row = max(
            (row for row in rows if row["model"] == model and not row["references"]), key=lambda row: row["vae_gb"]
        )
        disk_cell = f"{1000 * row['disk_gb']['prompt']:.1f} / {1000 * row['disk_gb']['sample']:.1f} MB"
        host_cell = f"{row['host']['peak']:.1f} | {row['host']['mapped']:.0f}"
        encoders = f"{row['encoder_gb']:.1f} | {row['encoder_nf4_gb']:.1f}"
        yield f"| {model} | {encoders} | {row['vae_gb']:.1f} | {host_cell} | {disk_cell} |"


def write(result: dict[str, Any]) -> None:
    """Writes benchmarks/plan_memory.json."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, text_to_image.diffusers)}
    content = {"command": "python tools/plan_memory.py --all", "predicted": True, "versions": versions, **result}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


MODELS, CARDS = ("dev", "klein-9B", "klein-4B"), (8, 12, 16, 24, 32, 48, 80, 141)
GPUS = (8, 12, 16, 24, 48, 80, 141)  # GB, of the README's table


def card(model: str, base: str, gpu_gb: int) -> dict[str, Any]:
    """A row of `stream_lines`: the smallest share of blocks to stream at 1024 px on a GPU, 0 if it fits without."""
    job = Job(model, 1024)
    fits = count_training(job, base, 1.0).peak <= gpu_gb * GB
    share = 0.0 if fits else least_share_streamed(job, base, gpu_gb)
    row = {"model": model, "base": base, "gpu_gb": gpu_gb, "share": share}
    return row | (streamed(job, base, share) if share is not None else {})


def best_line(model: str, gpu_gb: int) -> dict[str, Any]:
    """The best command line of a GPU: prefers 1024 px to 512, bf16 to FP8, and not streaming."""
    for job in (Job(model, 1024), Job(model, 512)):
        lines = [line for base in ("bf16", "fp8") if isinstance(line := find_line(job, base, gpu_gb), dict)]
        if line := min(lines, key=lambda line: (line["stream"] > 0, line["host"]["pinned"]), default=None):
            return {"model": model, "gpu_gb": gpu_gb, "resolution": job.resolution, **line}
    raise ValueError(f"{model} does not fit {gpu_gb} GB")


def gpu_lines() -> Iterator[str]:
    """Markdown lines: flags and predicted GB, a row per GPU and a column per model."""
    rows = {(row["model"], row["gpu_gb"]): row for row in json.loads(RESULT.read_text(encoding="utf-8"))["fits"]}
    yield f"| GPU | {' | '.join(MODELS)} |"
    yield "|---" * (len(MODELS) + 1) + "|"
    for gpu_gb in GPUS:
        cells = []
        for model in MODELS:
            row = rows[model, gpu_gb]
            flags = row["command"].replace("\\\n", "").partition("--resolution")[2].replace("--cache_latents", "")
            figures = f"{row['training_gb']:.1f} GB, host {row['host']['peak']:.0f} GB"
            cells.append(f"`--resolution {' '.join(flags.split())}` ({figures})")
        yield f"| {gpu_gb} GB | {' | '.join(cells)} |"


def stream_lines() -> Iterator[str]:
    """Markdown lines: what to stream on each GPU; what streaming all blocks pins and copies; what hides the copies."""
    rows = json.loads(RESULT.read_text(encoding="utf-8")).get("streamed", [])
    found = {(row["model"], row["base"], row["gpu_gb"]): row for row in rows}
    columns = list(dict.fromkeys((row["model"], row["base"]) for row in rows))
    yield f"| predicted, 1024 px | {' | '.join(f'{model}, {BASES[base][0]}' for model, base in columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for gpu_gb in CARDS:
        cells = []
        for row in (found[*column, gpu_gb] for column in columns):
            flags = {None: "does not fit", 0.0: "fits without", 1.0: f"`{STREAM}`"}
            flag = flags.get(row["share"], f"`{STREAM} {row['share']:g}`" if row["share"] else "")
            cells.append(f"{flag}: {row['gpu']:.1f} GB" if row["share"] else flag)
        yield f"| {gpu_gb} GB | {' | '.join(cells)} |"
    whole = [found[*column, None] for column in columns]
    seconds = [measured_step(*column) for column in columns]
    speeds = [f"{row['copied'] / time:.0f} GB/s" if time else "-" for row, time in zip(whole, seconds, strict=True)]
    pinned, copied = ([f"{row[name]:.0f} GB" for row in whole] for name in ("pinned", "copied"))
    yield f"| all blocks: pinned | {' | '.join(pinned)} |"
    yield f"| all blocks: copied per step | {' | '.join(copied)} |"
    yield f"| bandwidth that hides it behind the eager step of an H200 (measured) | {' | '.join(speeds)} |"


def measured_step(model: str, base: str) -> float | None:
    """Seconds of the eager step at 1024 px in benchmarks/gpu.json, all blocks recomputed; None if not measured."""
    place = {"model": model, "base": base, "share": 1.0, "resolution": 1024, "references": 0}
    place |= {"compiled": False, "streamed": 0.0}
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"] if MEASURED.is_file() else []
    return next((row["seconds_per_step"] for row in rows if place.items() <= row.items()), None)


def everything() -> None:
    """Computes all rungs, common GPUs and several processes; continues an interrupted call."""
    stored = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    result = {name: stored.get(name, []) for name in ("rows", "fits", "processes")}
    known = {(row["model"], row["base"], row["share"], row["resolution"], row["references"]) for row in result["rows"]}
    for references, resolution in ((0, 1024), (0, 512), (1, 1024), (1, 512)):
        for model in MODELS:
            for rung in RUNGS:
                if (model, rung.base, rung.share, resolution, references) not in known:
                    result["rows"].append(plan(Job(model, resolution, references), rung.base, rung.share))
                    write(result)
    known = {(row["model"], row["gpu_gb"]) for row in result["fits"]}
    for model, gpu_gb in itertools.product(MODELS, GPUS):
        if (model, gpu_gb) not in known:
            result["fits"].append(best_line(model, gpu_gb))
            write(result)
    for row in result["rows"]:  # these are quick to count anew
        row["host"] = host(Job(row["model"], row["resolution"], row["references"]))
    for row in result["fits"]:
        row["host"] = host(Job(row["model"], row["resolution"]), row["host"]["pinned"], row["host"]["encoder"])
    result["streamed"] = []
    for model, base in itertools.product(MODELS, ("fp8", "bf16")):
        whole = {"model": model, "base": base, "gpu_gb": None, "share": 1.0}
        result["streamed"] += [card(model, base, gpu_gb) for gpu_gb in CARDS]
        result["streamed"].append(whole | streamed(Job(model, 1024), base, 1.0))
    jobs = [(Job("dev", 1024), base, nodes) for base in ("bf16", "fp8", "nf4") for nodes in (1, 2)]
    jobs.append((Job("dev", 512), "bf16", 1))
    result["processes"] = [sharded(job, base, 1.0, 8, nodes) for job, base, nodes in jobs]
    write(result)


def readme_tables() -> str:
    """Returns the tables of docs/memory.md from benchmarks/plan_memory.json."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    return "\n".join([*table(rows), "", *speed_lines(), "", *stream_lines(), "", *phase_lines(rows)])


def parse_words(words: list[str] | None) -> argparse.Namespace:
    """Parses the tool's command line; flags after `--` are the script's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dev", help="dev, klein-9B, klein-4B, a folder or a hub id (default: dev)")
    parser.add_argument("--gpu_gb", type=float, help="print what fits this many GB, with command lines")
    parser.add_argument("--host_gb", type=float, help="with --gpu_gb: GB of host memory available for training")
    parser.add_argument("--resolution", type=int, nargs="+", default=[512, 768, 1024], help="pixels per side")
    parser.add_argument("--references", type=int, nargs="+", default=[0, 1], help="1 MP references per sample")
    parser.add_argument("--processes", type=int, default=0, help="shard the blocks over this many GPUs per node")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument(
        "--all", action="store_true", help="write benchmarks/plan_memory.json, print the tables of docs/memory.md"
    )
    parser.add_argument("flags", nargs="*", help="flags of the training script, after --")
    args = parser.parse_args(words)
    if "--train_resolutions" in args.flags:
        parser.error("memory is that of the largest size: give it as --resolution instead of --train_resolutions")
    return args


def main(words: list[str] | None = None) -> None:
    """Prints the requested plan."""
    args = parse_words(words)
    if args.all:
        everything()
        print(readme_tables())
        return
    jobs = [Job(args.model, size, count, tuple(args.flags)) for count in args.references for size in args.resolution]
    if args.gpu_gb:
        for job in jobs:
            while not tell_what_fits(job, args.gpu_gb, args.host_gb or math.inf) and args.host_gb:
                job = replace(job, resolution=job.resolution - 256)
                if job.resolution < 256 or job in jobs:  # asked for itself
                    break
    elif args.processes:
        rows = [sharded(job, base, 1.0, args.processes, args.nodes) for job in jobs for base in BASES]
        print(json.dumps(rows, indent=1))
    else:
        rows = [plan(job, rung.base, rung.share) for job in jobs for rung in RUNGS]
        print("\n".join([*table(rows), "", *phase_lines(rows)]))


if __name__ == "__main__":  # importers keep the scripts' log
    logging.getLogger("flux2_lora").setLevel(logging.ERROR)
    text_to_image.set_up_logging = image_to_image.set_up_logging = lambda: None  # no run log
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    main()
