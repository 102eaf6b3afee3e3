"""The GPU path of both scripts, rehearsed on a GPU that is not there: see `fake_gpu.py`.

The scripts' own functions run on the real architectures of [dev] and [klein], narrower and with fewer blocks, from
`start_accelerator` to `train_step`. Each step stays on one device, multiplies one dtype, waits for the device once, and
brings nothing there by a copy that blocks. What the numbers are is for the tests on the CPU and on a GPU.
"""

import contextlib
import functools
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from fake_gpu import Watch, pretended_gpu
from torch._subclasses.fake_tensor import unset_fake_temporarily

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import bare_training  # noqa: E402

FP8, CHECKPOINTING = ("--do_fp8_training",), ("--gradient_checkpointing",)
NF4 = ("--bnb_quantization_config_path", ROOT / "configs/quantization/nf4.json")
SIZES = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 4}


def really(function: Any) -> Any:
    """The function outside of the pretence: what is on the disk is read and written as it is."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


@pytest.fixture
def rehearse(script, tmp_path, monkeypatch):
    """`rehearse(flags, model=..., references=..., streams=...)`: two steps; the Watch of the second one."""
    monkeypatch.setattr(bare_training, "write_checkpoint", really(bare_training.write_checkpoint))
    monkeypatch.setattr(script, "open_latent_space", really(script.open_latent_space))
    return functools.partial(rehearse_steps, script, tmp_path)


@contextlib.contextmanager
def started(script: ModuleType, folder: Path, *flags: Any, model: str = "dev") -> Any:
    """The script's Run on the pretended GPU."""
    import accelerate.state

    architecture = json.loads(json.dumps(bare_training.read_architecture(model)))
    architecture["transformer"] |= SIZES
    try:
        with pretended_gpu():
            accelerate.state.AcceleratorState._reset_state(True)
            base = ("--resolution", 256, "--max_sequence_length", 64, *flags)
            run = bare_training.start_run(script, architecture, folder / "run", *base)
            assert run.device.type == "cuda"
            yield run
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def rehearse_steps(script: ModuleType, folder: Path, *flags: Any, model: str = "dev", streams: int = 1) -> Watch:
    """Two steps of training; what the second one did."""
    references = int(script.TASK == "image-to-image")
    with started(script, folder, *flags, model=model) as run:
        (space, learned), loaded = bare_training.make_streams(script, run, references), None
        if streams == 2:
            learned.append(script.Stream("class", learned[0].samples, 0.5))
        if "false" in flags:
            vae = script.AutoencoderKLFlux2.from_config(run.model.config("vae"))
            with mock.patch.object(script.AutoencoderKLFlux2, "from_pretrained", lambda *_, **__: vae):
                loaded = script.load_vae(run)
        quantise = quantise_nf4 if NF4[1] in flags else bare_training.quantise_by_script
        training = bare_training.set_up(script, run, (space, learned), quantise, loaded)
        for home in training.transformer.stream.homes:
            home.pinned = True
        batches = bare_training.make_batches(script, run, training)
        script.train_step(run, training, batches)
        with Watch() as watch:
            script.train_step(run, training, batches)
        training.transformer.stream.homes.clear()  # which would be given back to a GPU
        weights = (*training.transformer.parameters(), *training.transformer.buffers())
        where = Counter(str(tensor.device) for tensor in weights)
        assert set(where) == {"cuda:0"}, where
        return watch


def quantise_nf4(script: ModuleType, run: Any, block: torch.nn.Module) -> None:
    """bitsandbytes' layers in one block; plain parameters stand in for its own class, which fake ones cannot be."""
    import bitsandbytes

    for name, linear in [(name, part) for name, part in block.named_modules() if isinstance(part, torch.nn.Linear)]:
        with unset_fake_temporarily():
            layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, False, run.dtype, device="meta")
        values, state = bitsandbytes.functional.quantize_4bit(linear.weight.data, quant_type="nf4", blocksize=64)
        weight = torch.nn.Parameter(values, requires_grad=False)
        weight.quant_state, weight.bnb_quantized, weight.quant_storage = state, True, torch.uint8
        weight.compress_statistics, weight.quant_type = False, "nf4"
        layer.weight, layer.quant_state = weight, state
        block.set_submodule(name, layer)


def check(watch: Watch) -> None:
    """What every step promises."""
    assert not watch.heavy, watch.heavy
    assert sum(watch.waits.values()) == 1, watch.waits
    copies = {(place, size) for place, size in watch.blocking if not place.startswith("vae_on_device")}  # --offload's
    assert not copies, copies


STEPS = {
    "bf16": (), "checkpointing": CHECKPOINTING, "fp8": FP8, "fp8 checkpointing": (*FP8, *CHECKPOINTING),
    "fp32": ("--mixed_precision", "no"), "accumulation": ("--gradient_accumulation_steps", 2),
    "dropout": ("--lora_layers", "ai-toolkit", "--lora_dropout", 0.1), "batch of two": ("--train_batch_size", 2),
    "sample": ("--vae_encode_mode", "sample"), "uncached": ("--cache_latents", "false",), "nf4": (*NF4, *CHECKPOINTING),
    "uncached, offloaded": ("--cache_latents", "false", "--offload"), "streamed": (*FP8, "--stream_blocks"),
    "a compiled timestep": ("--weighting_scheme", "cosmap", "--timestep_shift", "empirical"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step_stays_on_the_gpu_and_waits_for_it_once(rehearse, name):
    check(rehearse(*STEPS[name]))


def test_a_step_of_klein_does_too(rehearse):
    check(rehearse(*FP8, model="klein-9B"))


@pytest.mark.parametrize("script", ["t2i"], indirect=True)
def test_a_step_with_class_images_does_too(rehearse):
    check(rehearse(streams=2))


def read_a_number(losses: torch.Tensor) -> None:
    losses.sum().item()


def copy_pageable_memory(losses: torch.Tensor) -> None:
    losses + torch.ones(losses.shape[0]).to(losses.device)


def multiply_on_the_host(_: torch.Tensor) -> None:
    torch.randn(8, 8) @ torch.randn(8, 8)


def ask_for_indices(losses: torch.Tensor) -> None:
    losses[torch.zeros(1, dtype=torch.int64, device=losses.device)] + losses.cpu().numpy().sum()


def meet_a_cpu_tensor(losses: torch.Tensor) -> None:
    losses + torch.ones(4, losses.shape[0])


def multiply_two_dtypes(losses: torch.Tensor) -> None:
    losses[:, None].bfloat16() @ losses[None]


FAULTS = (read_a_number, copy_pageable_memory, multiply_on_the_host, ask_for_indices, meet_a_cpu_tensor,
          multiply_two_dtypes)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(script, rehearse, monkeypatch, fault):
    """Each of them in the loss: what would cost time on a GPU fails the check, what would break there raises."""
    loss = script.batch_losses

    def broken(*args: Any) -> Any:
        result = loss(*args)
        fault(result[0].detach())
        return result

    monkeypatch.setattr(script, "batch_losses", broken)
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        check(rehearse())
