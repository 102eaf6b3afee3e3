"""The GPU path of both scripts, rehearsed on a GPU that is not there: see `fake_gpu.py`.

The scripts' own functions run on the real architectures of [dev] and [klein], narrower and with fewer blocks, from
`start_accelerator` to `train_step`. Each step stays on one device, multiplies one dtype, waits for the device once, and
brings nothing there by a copy that blocks. Prompts, images and what a checkpoint brings back stay there too, as far as
they can. What the numbers are is for the tests on the CPU and on a GPU.
"""

import contextlib
import functools
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import fake_gpu
import PIL.Image
import pytest
import torch
import transformers
from fake_gpu import Watch, pretended_gpu, really
from torch._subclasses.fake_tensor import unset_fake_temporarily

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import bare_training  # noqa: E402
import plan_memory  # noqa: E402

pytestmark = pytest.mark.slow

FP8, CHECKPOINTING = ("--do_fp8_training",), ("--gradient_checkpointing",)
NF4 = ("--bnb_quantization_config_path", ROOT / "configs/quantization/nf4.json")
INT8 = ("--bnb_quantization_config_path", ROOT / "configs/quantization/int8.json")
SIZES = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def disk(script, monkeypatch):
    """Files of the run are real ones."""
    monkeypatch.setattr(bare_training, "write_checkpoint", really(bare_training.write_checkpoint))
    monkeypatch.setattr(script.LatentCodec, "__init__", really(script.LatentCodec.__init__))


@pytest.fixture
def rehearse(script, tmp_path):
    """`rehearse(flags, model=..., references=..., streams=...)`: two steps; the Watch of the second one."""
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
        codec, learned = bare_training.make_streams(script, run, references)
        if streams == 2:
            learned.append(script.Stream("class", learned[0].samples, 0.5))
        training = set_up(script, run, (codec, learned), flags, load_vae(script, run) if "false" in flags else None)
        batches = bare_training.make_batches(script, run, training)
        script.train_step(run, training, batches)
        with Watch() as watch:
            script.train_step(run, training, batches)
        training.transformer.stream.pinned_blocks.clear()  # which would be given back to a GPU
        weights = (*training.transformer.parameters(), *training.transformer.buffers())
        where = Counter(str(tensor.device) for tensor in weights)
        assert set(where) == {"cuda:0"}, where
        return watch


def load_vae(script: ModuleType, run: Any) -> torch.nn.Module:
    """The script's VAE, made instead of read."""
    vae = script.AutoencoderKLFlux2.from_config(run.model.config("vae"))
    with mock.patch.object(script.AutoencoderKLFlux2, "from_pretrained", lambda *_, **__: vae):
        return script.load_vae(run)


def set_up(script: ModuleType, run: Any, given: tuple, flags: tuple = (), vae: Any = None) -> Any:
    """The script's Training; memory that it pinned by the driver says so, and which block lives there."""
    quantise = {NF4[1]: quantise_nf4, INT8[1]: quantise_int8}.get(flags[1] if len(flags) > 1 else None)
    training = bare_training.set_up(script, run, given, quantise or bare_training.quantise_by_script, vae)
    for number, home in enumerate(training.transformer.stream.pinned_blocks):
        home.pinned, home.block = True, number
    return training


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


def quantise_int8(script: ModuleType, run: Any, block: torch.nn.Module) -> None:
    """As `quantise_nf4`, with the layers of 8 bits."""
    import bitsandbytes

    for name, linear in [(name, part) for name, part in block.named_modules() if isinstance(part, torch.nn.Linear)]:
        options = {"has_fp16_weights": False, "threshold": 6.0, "device": "meta"}
        with unset_fake_temporarily():
            layer = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, False, **options)
        values, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(linear.weight.data.half())
        layer.weight = torch.nn.Parameter(values, requires_grad=False)
        layer.weight.CB, layer.weight.SCB = values, scales
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


# What the editing script does otherwise: references, cached or encoded in the step, dropped ones, and their blocks.
EDITS = ("bf16", "fp8 checkpointing", "dropout", "batch of two", "uncached, offloaded", "streamed")
RUNS = [*(("t2i", name) for name in STEPS), *(("i2i", name) for name in EDITS)]


@pytest.mark.parametrize(("script", "name"), RUNS, indirect=["script"])
def test_a_step_stays_on_the_gpu_and_waits_for_it_once(rehearse, name):
    check(rehearse(*STEPS[name]))


def test_a_step_of_klein_does_too(rehearse):
    check(rehearse(*FP8, model="klein-9B"))


@pytest.mark.scripts("t2i")
def test_a_step_with_class_images_does_too(rehearse):
    check(rehearse(streams=2))


@pytest.mark.scripts("t2i")
def test_int8_stays_on_the_gpu_but_waits_twice_for_each_product(rehearse):
    """bitsandbytes asks the device whether a layer's input has outliers, and which: 16 layers, once more recomputed."""
    watch = rehearse(*INT8, *CHECKPOINTING)
    asked = [key for key in watch.waits if key[0] == "int8 looks for outliers"]
    assert sum(watch.waits.pop(key) for key in asked) == 2 * 2 * 16
    check(watch)


# ------------------------------------------------------------------------------------------------ Blocks that stream
BLOCKS = 5


def order_of_a_step(script: ModuleType, folder: Path) -> list[tuple[str, int]]:
    """Copies of blocks and computations of blocks in a step, as they are launched.

    Asserts that the side stream waits before it overwrites a buffer, and the computation until its block has come.
    """
    sizes = {**SIZES, "num_single_layers": BLOCKS - 1}
    with mock.patch.dict(SIZES, sizes), started(script, folder, "--stream_blocks") as run:
        training = set_up(script, run, bare_training.make_streams(script, run, int(script.TASK == "image-to-image")))
        for number, block in enumerate(script.blocks_of(training.transformer)):
            # recomputation calls it too; nothing is multiplied before it
            block.attn.register_forward_pre_hook(lambda *_, number=number: watch.events.append(("computed", number)))
        batches = bare_training.make_batches(script, run, training)
        for _ in range(2):
            with Watch() as watch:
                script.train_step(run, training, batches)
        training.transformer.stream.pinned_blocks.clear()
    events, arrived = watch.events, {0, 1}  # the last backward pass has left the first two
    for place, event in enumerate(events):
        kind, number = event if isinstance(event, tuple) else (event, None)
        if kind == "copied":
            assert events[place - 1] == "side waits", "a buffer is overwritten while it may be read"
            arrived.discard(number)
        if kind == "compute waits":
            arrived |= {event[1] for event in events[:place] if event[0] == "copied"}
        assert kind != "computed" or number in arrived, f"block {number} is computed before it is there"
    return [event for event in events if isinstance(event, tuple)]


def test_the_copy_of_the_next_block_is_launched_before_a_block_computes(script, tmp_path):
    """Forward the block after it, backward the block before it; the two at each end are still there."""
    forward = [("computed", 0)]
    for number in range(1, BLOCKS - 1):
        forward += [("copied", number + 1), ("computed", number)]
    backward = [(kind, BLOCKS - 1 - number) for kind, number in forward]
    assert order_of_a_step(script, tmp_path) == [*forward, ("computed", BLOCKS - 1), *backward, ("computed", 0)]


def fetch_late(script: ModuleType, monkeypatch: Any) -> None:
    fetch = script.BlockStream.fetch
    monkeypatch.setattr(script.BlockStream, "fetch", lambda stream, number, _: fetch(stream, number, -1))


def wait_for_nothing(script: ModuleType, monkeypatch: Any) -> None:
    monkeypatch.setattr(fake_gpu.Stream, "wait_stream", lambda *_: None)


def copy_without_waiting(script: ModuleType, monkeypatch: Any) -> None:
    wait = fake_gpu.Stream.wait_stream
    monkeypatch.setattr(
        fake_gpu.Stream, "wait_stream", lambda stream, other: stream is fake_gpu.MAIN_STREAM and wait(stream, other)
    )


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("fault", [fetch_late, wait_for_nothing, copy_without_waiting])
def test_blocks_that_come_late_or_are_not_waited_for_are_found(script, tmp_path, monkeypatch, fault):
    fault(script, monkeypatch)
    with pytest.raises(AssertionError):
        test_the_copy_of_the_next_block_is_launched_before_a_block_computes(script, tmp_path)


# --------------------------------------------------------------------------------------- Prompts, images, checkpoints
class Tokenizer:
    """Both families': as many tokens as are asked for, on the CPU."""

    def apply_chat_template(self, messages: list, tokenize: bool = True, **options: Any) -> Any:
        return self(messages, **options) if tokenize else "text"

    def __call__(self, _text: Any, max_length: int = 1, **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.ones(1, max_length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encode(script: ModuleType, folder: Path, model: str) -> Watch:
    """A prompt by the family's encoder, cut to four layers, as the script loads and asks it."""
    with started(script, folder, "--text_encoder_out_layers", 1, 2, 3, model=model) as run:
        config = plan_memory.encoder_config(run)
        encoder = getattr(transformers, run.family.text_encoder)._from_config(config, dtype=run.dtype)
        nothing = {"missing": [], "unexpected": [], "misshapen": []}
        with mock.patch.object(script, "read_text_encoder", lambda *_, **__: (encoder, nothing)):
            encoder = script.load_text_encoder(run)
        with Watch() as watch:
            embedding = script.encode_prompt(run, Tokenizer(), encoder, "a photo")
        assert (embedding.device.type, embedding.dtype) == ("cuda", torch.bfloat16)
        assert embedding.shape == (64, run.model.config("transformer")["joint_attention_dim"])
    return watch


@pytest.mark.scripts("t2i")  # what encodes is shared
@pytest.mark.parametrize("model", ["dev", "klein-9B"])
def test_a_prompt_is_encoded_on_the_gpu(script, tmp_path, model):
    watch = encode(script, tmp_path, model)
    assert not watch.heavy
    assert all(size <= 2048 for _, size in watch.blocking), "token ids and such only"


@pytest.mark.scripts("t2i")
def test_an_encoder_that_is_left_on_the_cpu_is_found(script, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.Mistral3ForConditionalGeneration, "to", lambda encoder, *_: encoder)
    with pytest.raises((RuntimeError, AssertionError)):
        test_a_prompt_is_encoded_on_the_gpu(script, tmp_path, "dev")


SCHEDULER = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0,
             "num_train_timesteps": 1000, "use_dynamic_shifting": True}  # fmt: skip


def draw(script: ModuleType, folder: Path, steps: int, *flags: Any, model: str = "dev") -> Watch:
    """An image by the pipeline, decoded, from references in the editing script; then the fixed-noise loss."""
    inputs = {"image": [PIL.Image.new("RGB", (300, 200))] * 2} if script.TASK == "image-to-image" else {}
    with started(script, folder, "--num_inference_steps", steps, *flags, model=model) as run:
        (run.model.folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
        training = set_up(script, run, bare_training.make_streams(script, run, len(inputs)))
        training.vae = script.rest_vae(load_vae(script, run))
        training.transformer.eval()
        with Watch() as watch, bare_training.unencoded(script, run, training.codec):
            pipeline = script.make_pipeline(run, training.transformer, training.vae_on_device(run))
            seeds = [("validation", 0, 0)]
            (image,) = script.generate(run, training.codec, pipeline, "a photo", seeds, (256, 320), **inputs)
            training.rest_vae(run.args)
            script.validation_loss(run, training)
        where = {tensor.device.type for tensor in training.vae.parameters()}
        assert image.size == (320, 256) and where == {"cpu" if "--offload" in flags else "cuda"}
        return watch


def check_drawing(script: ModuleType, folder: Path, *flags: Any, model: str = "dev") -> None:
    """The host waits for an image, not for each of its steps."""
    few, more = (draw(script, folder / str(steps), steps, *flags, model=model) for steps in (1, 2))
    assert not few.heavy and not more.heavy
    assert few.waits == more.waits


DRAWN = [("t2i", "dev", FP8), ("t2i", "klein-9B", ("--offload",)), ("i2i", "dev", FP8)]


@pytest.mark.parametrize(("script", "model", "flags"), DRAWN, indirect=["script"])
def test_an_image_is_drawn_on_the_gpu_without_a_wait_per_step(script, tmp_path, model, flags):
    check_drawing(script, tmp_path, *flags, model=model)


def leave_the_vae(script: ModuleType, monkeypatch: Any) -> None:
    monkeypatch.setattr(script.Training, "vae_on_device", lambda training, _run: training.vae)


def wait_in_each_step(script: ModuleType, monkeypatch: Any) -> None:
    forward = script.Flux2Transformer2DModel.forward

    def slow(model: Any, hidden_states: torch.Tensor, *inputs: Any, **named: Any) -> Any:
        hidden_states.sum().item()
        return forward(model, hidden_states, *inputs, **named)

    monkeypatch.setattr(script.Flux2Transformer2DModel, "forward", slow)


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("fault", [leave_the_vae, wait_in_each_step])
def test_a_fault_of_drawing_is_found(script, tmp_path, monkeypatch, fault):
    fault(script, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_drawing(script, tmp_path)


def resume(script: ModuleType, folder: Path, *flags: Any) -> Watch:
    """A step after the optimizer's state went into a checkpoint and came back into a state of its own."""
    files = {}
    with started(script, folder, *flags) as run:
        training = set_up(script, run, bare_training.make_streams(script, run, int(script.TASK == "image-to-image")))
        batches = bare_training.make_batches(script, run, training)
        script.train_step(run, training, batches)
        with mock.patch.object(
            script, "safetensors_bytes", lambda tensors, *_: files.update({} if files else tensors) or b"file"
        ):
            run.output_dir.mkdir(exist_ok=True)
            saved = script.save_checkpoint(run, training)
        assert {tensor.device.type for tensor in files.values()} == {"cpu"}
        checkpoint = script.Checkpoint(saved, json.loads((saved / "state.json").read_text()))
        parameters = list(training.parameters.values())
        again = replace(training, optimizer=script.make_optimizer(run, parameters), step=0)
        with mock.patch.object(script, "load_file", lambda _: dict(files)):
            script.restore(replace(run, resume=checkpoint), again)
        assert again.step == 1
        with Watch() as watch:
            script.train_step(run, again, batches)
    return watch


# not 8-bit Adam, which copies what it loads by pointers that pretended tensors do not have
OPTIMIZERS = {"adamw": (), "prodigy": ("--optimizer", "prodigy")}


@pytest.mark.scripts("t2i")  # checkpoints are shared
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_checkpoint_brings_back_is_on_the_gpu(script, tmp_path, name):
    """The step after it is as any other; Prodigy has waits of its own."""
    watch = resume(script, tmp_path, *OPTIMIZERS[name])
    lines = Path(script.__file__).read_text(encoding="utf-8").splitlines()
    update = f"train_step:{1 + lines.index('        training.optimizer.step()')}"
    own = Counter({key: count for key, count in watch.waits.items() if key[1] == update})
    assert bool(own) == (name != "adamw")
    watch.waits -= own
    check(watch)


@pytest.mark.scripts("t2i")
def test_moments_that_stay_on_the_cpu_are_found(script, tmp_path, monkeypatch):
    def put_back(optimizer: Any, stored: dict) -> None:
        for parameter, values in zip(optimizer.param_groups[0]["params"], stored["state"].values(), strict=True):
            optimizer.state[parameter] = values

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", put_back)
    with pytest.raises((AssertionError, RuntimeError)):
        test_what_a_checkpoint_brings_back_is_on_the_gpu(script, tmp_path, "adamw")


# ------------------------------------------------------------------------------------------------ Faults of a step
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


@pytest.mark.scripts("t2i")
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
