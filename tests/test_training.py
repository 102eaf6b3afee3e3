"""Whole training runs on the tiny model, in this process: files, numbers, determinism, data, optimizers, guards.

`python tests/test_training.py --update` rewrites the stored trajectories after a change that is meant to move it.
"""

import functools
import importlib.metadata
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, draw_photo, draw_references, load_script, of_edits
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from runs import (
    LORA,
    around_updates,
    assert_close_runs,
    assert_same_run,
    column,
    command_line,
    files_of,
    forbid,
    lora,
    metrics,
    sha256,
    spy,
)
from safetensors.torch import load_file
from unit_parts import predict

pytestmark = [pytest.mark.e2e, pytest.mark.scripts("t2i")]

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT_FILES = {"manifest.json", LORA, "state.json", "training_state.safetensors"}
BUCKETS = "64,96;96,64;64,64"
# Adam divides by the gradient's size, so rounding in a gradient of 1e-7 would move a weight by the learning rate.
CALM = ("--adam_epsilon", "1e-3", "--learning_rate", "1e-3")
# So small that every step sees the weights of the first one.
STANDSTILL = ("--learning_rate", "1e-30")
DRAW_LITTLE = ("--num_validation_images", "1", "--num_inference_steps", "1")


@pytest.fixture
def quick(train, cache):
    """`train` with the shared cache."""
    return functools.partial(train, "--latents_cache_dir", cache)


@pytest.fixture
def captioned(photos, tmp_path):
    """A copy of the photographs with a caption file beside two of them, one of them with [trigger]."""
    folder = tmp_path / "captioned"
    shutil.copytree(photos, folder)
    (folder / "00.txt").write_text("a [trigger] on a table\n", encoding="utf-8")
    (folder / "03.caption").write_text("a landscape", encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize("draws", [False, True])
def test_a_run_writes_exactly_the_files_of_the_contract(train, draws):
    """Weights in two forms, card, settings, metrics, checkpoint, logs, cache; images where they are asked for."""
    flags = ["--report_to", "tensorboard"] + (["--validation_prompt", "a toy", *DRAW_LITTLE] if draws else [])
    folder = train(*flags)
    written = files_of(folder)
    outside = {name for name in written if not name.startswith(("cache/", "logs/"))}
    expected = {LORA, "comfyui_lora.safetensors", "README.md", "config.args", "metrics.jsonl"}
    expected |= {f"checkpoint-3/{name}" for name in CHECKPOINT_FILES}
    if draws:
        expected |= {"samples/contact_sheet.png", "samples/step-000000/prompt-0_image-0.png"}
        expected |= {"samples/final/contact_sheet.png", "samples/final/prompt-0_image-0.png"}
    assert outside == expected
    assert any(name.startswith("logs/") and "tfevents" in name for name in written)
    assert {name.split("/")[1] for name in written if name.startswith("cache/")} <= {
        "checked_images.json",
        "prompts",
        "latents",
    }
    assert not [path for path in folder.rglob("*") if path.name.startswith(".tmp")]


@pytest.mark.scripts("t2i", "i2i")
def test_metrics_hold_every_field_once_per_optimizer_step_and_read_back_exactly(script, quick, monkeypatch):
    """Floats in the file equal the floats in the run; two micro-batches make one line."""
    calls = spy(monkeypatch, script, "write_metrics")
    folder = quick("--gradient_accumulation_steps", "2", "--max_train_steps", "4", "--checkpointing_steps", "1")
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines == [call.args[1] for call in calls]
    for line in lines:
        assert {"step", "loss", "grad_norm", "lr", "seconds", "lora_norm", "update_ratio"} <= line.keys()
        assert any(key.startswith("peak_") and line[key] > 0 for key in line)
        tenths = {key: line[key] for key in line if key.startswith("loss_sigma_")}
        assert tenths and set(tenths) <= {f"loss_sigma_{tenth / 10}" for tenth in range(10)}
        assert min(tenths.values()) <= line["loss"] <= max(tenths.values())
        assert all(math.isfinite(value) for value in line.values())
    assert lines[0]["lora_norm"] == lines[0]["update_ratio"] == 0.0  # lora_B starts from zero
    assert lines[1]["update_ratio"] == 1.0
    stored = load_file(folder / "checkpoint-3" / LORA)
    norm = math.sqrt(sum(float(t.double().square().sum()) for name, t in stored.items() if "lora_B" in name))
    assert lines[-1]["lora_norm"] == pytest.approx(norm, rel=1e-5), "of the weights that gave the loss of this line"


@pytest.mark.scripts("t2i", "i2i")
def test_the_host_waits_for_the_device_once_per_optimizer_step(script, quick, monkeypatch):
    """Every way to read a number off a tensor is counted, within the step; two micro-batches, one wait."""
    reads, real = [], script.train_step

    def counted(name):
        original = getattr(torch.Tensor, name)
        return lambda self, *args: reads.append(name) or original(self, *args)

    def step(run, training, batches):
        ready = [next(batches) for _ in range(2)]  # the loader's work is its workers'
        with pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
                patch.setattr(torch.Tensor, name, counted(name))
            return real(run, training, iter(ready))

    monkeypatch.setattr(script, "train_step", step)
    quick("--gradient_accumulation_steps", "2", "--max_train_steps", "3")
    # AdamW reads its step counts, which are on the CPU
    assert [name for name in reads if name != "item"] == ["tolist"] * 3


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_only_the_fp32_adapter_is_trained_and_the_base_stays_bit_identical(script, quick, tiny, monkeypatch, precision):
    """Every base tensor equals the checkpoint's file after training; adapter, gradients and moments are fp32."""
    calls, gradients = spy(monkeypatch, script, "train"), []

    def note(training):
        gradients.append({parameter.grad.dtype for parameter in training.parameters.values()})

    around_updates(monkeypatch, script, before=note)
    folder = quick("--mixed_precision", precision, "--learning_rate", "1e-2")
    run, training = calls[0].args
    assert run.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    stored = load_file(tiny / "transformer" / "diffusion_pytorch_model.safetensors")
    present = training.transformer.state_dict()
    base = {name.replace(".base_layer", ""): tensor for name, tensor in present.items() if ".lora_" not in name}
    assert base.keys() == stored.keys()
    for name, tensor in base.items():
        assert tensor.dtype == run.dtype and torch.equal(tensor, stored[name].to(run.dtype)), name
    trained = {id(p) for p in training.transformer.parameters() if p.requires_grad}
    adapter = {id(p) for name, p in training.transformer.named_parameters() if ".lora_" in name}
    optimized = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert trained == adapter == optimized == {id(p) for p in training.parameters.values()}
    assert {p.dtype for p in training.parameters.values()} == {torch.float32}
    moments = [slot[key] for slot in training.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert moments and {tensor.dtype for tensor in moments} == {torch.float32}
    assert gradients == [{torch.float32}] * 3
    assert all(p.abs().max() > 0 for p in training.parameters.values())
    assert {tensor.dtype for tensor in lora(folder).values()} == {run.dtype}


def test_upcast_before_saving_writes_the_lora_as_it_was_trained(script, quick, monkeypatch):
    """Under bf16 the fp32 export equals the parameters bit for bit."""
    calls = spy(monkeypatch, script, "train")
    stored = lora(quick("--mixed_precision", "bf16", "--upcast_before_saving"))
    for name, parameter in calls[0].args[1].parameters.items():
        assert torch.equal(stored[f"transformer.{name}"], parameter.detach()), name


# --------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.scripts("t2i", "i2i")
def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(quick, reference_dropout):
    """The LoRA is a function of the command line and the data."""
    flags = ("--random_flip", "--lora_dropout", "0.1", "--caption_dropout", "0.3", *reference_dropout)
    first, second = quick(*flags, output="a"), quick(*flags, output="b")
    assert_same_run(first, second)
    assert sha256(first / LORA) == sha256(second / LORA)
    other = quick(*flags, "--seed", "1", output="c")
    assert sha256(other / LORA) != sha256(first / LORA)
    assert column(other, "loss") != column(first, "loss")


@pytest.mark.scripts("t2i", "i2i")
def test_four_accumulated_batches_of_one_equal_one_batch_of_four(quick, one_group, reference_dropout):
    """With one geometry the samples, the loss and the update of a step do not depend on how it is cut up."""
    calm = (*CALM, *one_group, *reference_dropout)
    one = quick(*calm, "--train_batch_size", "4", output="batch")
    four = quick(*calm, "--gradient_accumulation_steps", "4", output="accumulation")
    two = quick(*calm, "--train_batch_size", "2", "--gradient_accumulation_steps", "2", output="both")
    assert_close_runs(one, four)
    assert_close_runs(one, two)


@pytest.mark.scripts("t2i", "i2i")
def test_two_loader_workers_give_the_same_bits_as_none(quick, reference_dropout):
    """Everything random is keyed by the position in the stream, not by the process that draws it."""
    flags = ("--aspect_ratio_buckets", BUCKETS, "--random_flip", "--caption_dropout", "0.5", *reference_dropout)
    assert_same_run(quick(*flags, output="a"), quick(*flags, "--dataloader_num_workers", "2", output="b"))


@pytest.mark.scripts("t2i", "i2i")
@pytest.mark.parametrize("mode", ["mode", "sample"])
def test_cached_latents_train_like_uncached_ones(quick, reference_dropout, mode):
    """With the centre crop, mirrored or not, the cache changes where latents come from and nothing else."""
    flags = ("--center_crop", "--random_flip", "--vae_encode_mode", mode, "--aspect_ratio_buckets", BUCKETS)
    flags += ("--train_batch_size", "2", "--max_train_steps", "5", *CALM, *reference_dropout)
    assert_close_runs(quick(*flags, output="a"), quick(*flags, "--cache_latents", output="b"))


@pytest.mark.scripts("t2i", "i2i")
def test_random_flip_with_the_cache_uses_both_orientations(script, quick, monkeypatch):
    """The cache holds the mirrored twin of every image, and visits read either."""
    calls = spy(monkeypatch, script.LatentCodec, "key")
    flags = ("--cache_latents", "--max_train_steps", "6", *STANDSTILL)
    plain = quick(*flags, output="a")
    assert {call.args[2] for call in calls} == {False}
    calls.clear()
    flipped = quick(*flags, "--random_flip", output="b")
    reference = getattr(script, "Reference", ())
    asked = [call.args[2] for call in calls if not isinstance(call.args[1], reference)]
    visits = asked[10:]  # the first ten list the files of five images
    assert len(asked) == 16 and set(visits) == {False, True}
    others = [call.args[2] for call in calls if isinstance(call.args[1], reference)]
    assert others[10:] == list(of_edits(script, *visits))  # a reference is mirrored when its image is
    same = [a == b for a, b in zip(column(plain, "loss"), column(flipped, "loss"), strict=True)]
    assert same == [not flip for flip in visits]


@pytest.mark.scripts("t2i", "i2i")
def test_sampling_the_vae_differs_from_its_mean_and_repeats(quick):
    """--vae_encode_mode sample adds the posterior's noise, drawn from the seed."""
    mean = quick("--cache_latents", output="a")
    first = quick("--cache_latents", "--vae_encode_mode", "sample", output="b")
    second = quick("--cache_latents", "--vae_encode_mode", "sample", output="c")
    assert_same_run(first, second)
    assert column(mean, "loss") != column(first, "loss")


def test_two_runs_in_one_process_agree_and_leave_handlers_as_they_were(script, tiny, photos, reference_flags, tmp_path):
    """The notebook route: main(parse_args([...])) twice, without a trace in signals or logging."""
    log = logging.getLogger("flux2_lora")
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    root_handlers = list(logging.getLogger().handlers)
    after = []
    for name in ("a", "b"):
        flags = command_line(tiny, photos, tmp_path / name, *reference_flags, "--seed", "3", "--max_train_steps", "2")
        script.main(script.parse_args(flags))
        after.append([handler for handler in log.handlers if type(handler).__name__ == "LogHandler"])
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == signals
    assert logging.getLogger().handlers == root_handlers
    assert after[0] == after[1] and len(after[0]) == 1


def test_signal_handlers_are_put_back_after_a_failure(script, quick, monkeypatch):
    """Also an exception in the middle of training leaves Ctrl-C as it was."""
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def fail(*_):
        assert signal.getsignal(signal.SIGINT) != signals[0]
        raise RuntimeError("on purpose")

    monkeypatch.setattr(script, "train_step", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        quick()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == signals


@pytest.mark.parametrize(
    "flags",
    [
        ("--random_flip", "--caption_dropout", "0.2", "--lora_dropout", "0.1", "--lora_alpha", "2", "--no-hub_private"),
        ("--cache_latents", "--gradient_checkpointing", "0.5", "--text_encoder_out_layers", "5", "10", "15"),
    ],
)
def test_the_saved_command_line_reproduces_the_lora_byte_for_byte(script, quick, reference_dropout, tmp_path, flags):
    """`@config.args` with another output folder is the same run."""
    flags += reference_dropout
    first = quick(*flags, "--validation_prompt", "it's # one", 'a "second"', "--num_validation_images", "0")
    words = [f"@{first / 'config.args'}", "--output_dir", str(tmp_path / "again")]
    args = script.parse_args(words)
    assert args.validation_prompt == ["it's # one", 'a "second"']
    script.main(args)
    assert_same_run(first, tmp_path / "again")


def test_the_saved_command_line_keeps_prompts_that_begin_with_a_dash(script, quick):
    """No prompt is lost on the way into config.args."""
    prompts = ["a toy", "- a list item", "-5 degrees"]
    folder = quick("--validation_prompt", *prompts, "--num_validation_images", "0", "--max_train_steps", "1")
    args = script.parse_args([f"@{folder / 'config.args'}", "--output_dir", str(folder / "elsewhere")])
    assert args.validation_prompt == prompts


def test_a_run_without_a_seed_writes_the_one_it_drew(script, tiny, photos, reference_flags, tmp_path, cache):
    """Two runs differ, and the saved command line of one of them reproduces it."""
    for name in ("a", "b"):
        flags = (*reference_flags, "--latents_cache_dir", cache, "--max_train_steps", "2")
        script.main(script.parse_args(command_line(tiny, photos, tmp_path / name, *flags)))
    assert column(tmp_path / "a", "loss") != column(tmp_path / "b", "loss")
    script.main(script.parse_args([f"@{tmp_path / 'a' / 'config.args'}", "--output_dir", str(tmp_path / "again")]))
    assert_same_run(tmp_path / "a", tmp_path / "again")


def test_no_file_of_the_output_holds_the_hub_token(train):
    """The token is used and never written."""
    folder = train("--hub_token", "hf_SECRETSECRET", "--report_to", "tensorboard", "--max_train_steps", "1")
    holders = [name for name in files_of(folder) if b"SECRETSECRET" in (folder / name).read_bytes()]
    assert holders == [] and "hub_token" not in (folder / "config.args").read_text()


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("extra", [(), ("--cache_latents",)])
def test_buckets_hold_every_image_at_its_nearest_shape_and_no_batch_mixes_shapes(script, quick, monkeypatch, extra):
    """Five images, EXIF orientation applied: two tall, one square, two wide; a round visits each once."""
    calls = spy(monkeypatch, script, "batch_losses")
    quick("--aspect_ratio_buckets", BUCKETS, "--max_train_steps", "5", *extra)
    seen = {
        name: target for call in calls for name, target in zip(*map(call.args[2].get, ("name", "target")), strict=True)
    }
    tall, wide, square = (96, 64), (64, 96), (64, 64)
    assert seen == {"00.jpg": tall, "01.jpg": tall, "02.jpg": square, "03.jpg": wide, "04.jpg": wide}
    assert len(calls) == 5
    for call in calls:
        batch = call.args[2]
        rows, columns = (side // 16 for side in batch["target"][0])
        assert batch["noise"].shape[1] == rows * columns
        assert "moments" in batch or batch["pixels"].shape[2:] == tuple(batch["target"][0])


def geometries(batch: dict) -> list[tuple]:
    """(height, width) of each sample's target, with the shapes of its references."""
    views = batch.get("references", [[]] * len(batch["target"]))
    return [(target, *(view.shape for view in given)) for target, given in zip(batch["target"], views, strict=True)]


def test_a_batch_in_buckets_has_one_geometry_and_an_epoch_still_visits_all(script, quick, monkeypatch):
    """Batches of two reach into the next round instead of dropping the odd image."""
    calls = spy(monkeypatch, script, "batch_losses")
    quick("--use_aspect_ratio_buckets", "--train_batch_size", "2", "--max_train_steps", "5")
    batches = [call.args[2] for call in calls]
    assert all(len({*geometries(batch)}) == 1 for batch in batches)
    assert len({target for batch in batches for target in batch["target"]}) > 1
    assert all(height % 16 == 0 and width % 16 == 0 for batch in batches for height, width in batch["target"])
    visits = sorted(name for batch in batches for name in batch["name"])
    assert visits == sorted([f"0{number}.jpg" for number in range(5)] * 2)


@pytest.mark.scripts("t2i", "i2i")
def test_captions_come_from_files_and_the_prompt_fills_in(script, quick, captioned, reference_flags, monkeypatch):
    """NAME.txt and NAME.caption are used, [trigger] is replaced, other images get --instance_prompt."""
    calls, embedded = spy(monkeypatch, script, "batch_losses"), spy(monkeypatch, script.TensorCache, "get")
    quick("--instance_data_dir", captioned, *reference_flags, "--max_train_steps", "5")
    batches = [call.args[2] for call in calls]
    captions = {
        name: caption for batch in batches for name, caption in zip(*map(batch.get, ("name", "caption")), strict=True)
    }
    prompt = "a photo of sks toy"
    assert captions == {
        "00.jpg": f"a {prompt} on a table",
        "01.jpg": prompt,
        "02.jpg": prompt,
        "03.jpg": "a landscape",
        "04.jpg": prompt,
    }
    assert [call.args[1] for call in embedded] == [caption for batch in batches for caption in batch["caption"]]
    for load, batch in zip(embedded, batches, strict=True):
        assert batch["prompt_embeds"][0].equal(load.result)


@pytest.mark.scripts("t2i", "i2i")
def test_full_caption_dropout_trains_on_the_empty_prompt_only(script, quick, monkeypatch):
    """What reaches the transformer is the embedding of "" at every step."""
    embedded = spy(monkeypatch, script.TensorCache, "get")
    dropped = quick("--caption_dropout", "1.0", output="a")
    assert [call.args[1] for call in embedded] == [""] * 3
    kept = quick(output="b")
    assert column(dropped, "loss") != column(kept, "loss")


def test_a_second_start_encodes_and_decodes_nothing_and_loads_only_the_transformer(
    script, train, photos, reference_flags, tmp_path, monkeypatch
):
    """With the same cache neither encoder nor VAE is loaded; of changed files only the changed ones are encoded."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    flags = ("--instance_data_dir", folder, *reference_flags)
    flags += ("--latents_cache_dir", tmp_path / "cache", "--cache_latents")
    flags += ("--random_flip", "--aspect_ratio_buckets", BUCKETS, "--caption_dropout", "0.5")
    first = train(*flags, output="first")
    with monkeypatch.context() as patch:
        forbid(patch, script, "load_text_encoder", "load_vae", "encode_pixels", "encode_prompt", "decode_image")
        second = train(*flags, output="second")
    assert_same_run(first, second)
    draw_photo(folder / "02.jpg", (128, 128), seed=99)
    decoded, encoded = spy(monkeypatch, script, "decode_image"), spy(monkeypatch, script, "encode_pixels")
    forbid(monkeypatch, script, "load_text_encoder")
    train(*flags, output="third")
    assert len(decoded) == 3 and len(encoded) == 2  # the new image: checked, encoded, and its mirror image


def test_dry_run_prints_the_plan_loads_no_weights_and_writes_none(script, train, monkeypatch, capsys):
    """Everything up to loading: buckets, tokens, modules and steps are said, the index is the only file."""
    forbid(monkeypatch, script, "load_text_encoder", "load_vae", "load_transformer", "save_checkpoint")
    flags = ("--dry_run", "--aspect_ratio_buckets", BUCKETS, "--cache_latents", "--validation_prompt", "a toy")
    folder = train(*flags)
    assert files_of(folder) == {"cache/checked_images.json"}
    said = capsys.readouterr().err
    assert all(text in said for text in ("64 x 96", "96 x 64", "tokens", "3 steps", "24 modules"))


def test_epochs_count_images_times_repeats_and_validation_follows_them(
    script, tiny, photos, reference_flags, tmp_path, cache
):
    """5 images x 2 repeats x 3 epochs at 4 samples per step are 8 steps; an epoch is 2.5, rounded up."""
    flags = (*reference_flags, "--seed", "0", "--latents_cache_dir", cache, "--repeats", "2", "--num_train_epochs", "3")
    flags += ("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--skip_final_inference")
    flags += ("--validation_prompt", "a toy", "--validation_epochs", "1", *DRAW_LITTLE)
    folder = tmp_path / "out"
    script.main(script.parse_args(command_line(tiny, photos, folder, *flags)))
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert sorted(path.name for path in (folder / "samples").glob("step-*")) == [
        f"step-{step:06d}" for step in (0, 3, 6)
    ]


# ------------------------------------------------------------------------------------------------------- flow matching


@pytest.mark.parametrize(
    ("scheme", "shift"),
    [("none", "none"), ("logit_normal", "linear"), ("mode", "empirical"), ("cosmap", "2.5"), ("sigma_sqrt", "linear")],
)
def test_every_density_and_shift_trains_with_its_own_sigmas_and_weights(script, quick, monkeypatch, scheme, shift):
    """sigma = shift(1 - u), and the loss is the plain one times the scheme's weight."""
    batches = spy(monkeypatch, script, "batch_losses")
    flags = ("--weighting_scheme", scheme, "--timestep_shift", shift, "--train_batch_size", "4")
    folder = quick("--cache_latents", *flags, "--max_train_steps", "1")
    factor = {
        "none": 1.0,
        "linear": math.exp(0.5 + 0.65 * (16 - 256) / (4096 - 256)),
        "empirical": math.exp(compute_empirical_mu(16, 28)),
        "2.5": 2.5,
    }[shift]
    run, training, batch = batches[0].args
    u, given = batch["u"].double(), batches[0].result[1]
    sigmas = factor * (1 - u) / (1 + (factor - 1) * (1 - u))
    assert given == pytest.approx(sigmas.tolist(), abs=1e-6) and given.dtype == torch.float32 and len(batches) == 1
    clean, noise = script.tokens_from_moments(training.codec, batch["moments"]), batch["noise"]
    mixed = (1 - given.view(-1, 1, 1)) * clean + given.view(-1, 1, 1) * noise
    for name, parameter in training.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # back to the weights of the first step
    prompts = batch["prompt_embeds"]
    references = script.encode_references(run, training, batch["references"]) if "references" in batch else []
    velocity = predict(script, run.args, training.transformer, mixed, given, prompts, 4, 4, references)
    plain = (velocity - (noise - clean)).square().mean(dim=(1, 2)).double()
    weight = {"cosmap": 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)), "sigma_sqrt": (1 / sigmas**2).clamp(max=100)}
    expected = plain * weight.get(scheme, torch.ones(4).double())
    torch.testing.assert_close(batches[0].result[0].detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert column(folder, "loss")[0] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_other_hidden_states_of_the_encoder_give_another_run_and_wrong_ones_are_refused(script, quick, monkeypatch):
    """--text_encoder_out_layers changes the embedding; a list that cannot fit is an error before anything is loaded."""
    other = quick("--text_encoder_out_layers", "5", "10", "15", output="a")
    assert column(other, "loss") != column(quick(output="b"), "loss")
    forbid(monkeypatch, script, "load_text_encoder", "check_data")
    for wrong in (("5", "10"), ("5", "10", "33")):
        with pytest.raises(script.UserError, match="--text_encoder_out_layers"):
            quick("--text_encoder_out_layers", *wrong, output="c")


@pytest.mark.scripts("t2i", "i2i")
def test_klein_trains_and_validates_with_its_own_encoder_and_pipeline(script, train, tiny_klein, monkeypatch):
    """Qwen3 layers 9, 18, 27, no guidance embedding, the empty prompt for its guidance, Flux2KleinPipeline."""
    encoded, calls = spy(monkeypatch, script, "encode_prompt"), spy(monkeypatch, script, "train")
    folder = train(
        "--pretrained_model_name_or_path",
        tiny_klein,
        *("--validation_prompt", "a toy", "--validation_steps", "2", *DRAW_LITTLE),
    )
    run, training = calls[0].args
    assert run.family.pipeline == "Flux2KleinPipeline" and run.text_layers == (9, 18, 27)
    assert not training.transformer.config.guidance_embeds
    assert {call.args[3] for call in encoded} == {"a photo of sks toy", "a toy", ""}
    assert all(math.isfinite(loss) for loss in column(folder, "loss"))
    assert (folder / "samples" / "step-000002" / "prompt-0_image-0.png").is_file()
    assert (folder / "samples" / "final" / "prompt-0_image-0.png").is_file()
    assert "Flux2KleinPipeline.from_pretrained" in (folder / "README.md").read_text()


# ----------------------------------------------------------------------------------------------- optimizer and schedule


def test_prodigy_trains_at_rate_one_and_its_estimate_grows(script, quick, monkeypatch):
    """The default learning rate with Prodigy is 1.0, and the estimate of the step size rises from zero."""
    estimates = []

    def watch(training):
        estimates.append(training.optimizer.param_groups[0]["d_hat"])

    around_updates(monkeypatch, script, after=watch)
    folder = quick("--optimizer", "prodigy", "--cache_latents", "--max_train_steps", "6")
    assert column(folder, "lr") == [1.0] * 6
    assert estimates == sorted(estimates) and len(set(estimates)) == 6
    norms = column(folder, "lora_norm")
    assert norms[0] == 0 < norms[1] and norms == sorted(norms)


@pytest.mark.parametrize("switch", ["decouple", "use_bias_correction", "safeguard_warmup"])
def test_each_switch_of_prodigy_can_be_turned_off_and_reaches_it(script, quick, monkeypatch, switch):
    """All are on by default; off, Prodigy's estimate of the step size is another one."""
    calls = spy(monkeypatch, script, "make_optimizer")
    flags = ("--optimizer", "prodigy", "--cache_latents", "--max_train_steps", "4")
    # what each is about must be there: weight decay, moments that are still biased, a warm-up
    flags += ("--adam_weight_decay", "0.1", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "3")
    quick(*flags, output="a")
    quick(*flags, f"--no-prodigy_{switch}", output="b")
    (first,), (second,) = (call.result.param_groups for call in calls)
    assert first[switch] is True and second[switch] is False
    others = ("decouple", "use_bias_correction", "safeguard_warmup", "lr", "betas", "beta3", "weight_decay", "eps")
    assert all(first[name] == second[name] for name in others if name != switch)
    assert first["d_hat"] != second["d_hat"]


def test_prodigy_s_own_numbers_reach_it(script, quick, monkeypatch):
    """--prodigy_beta3 and what it shares with Adam."""
    calls = spy(monkeypatch, script, "make_optimizer")
    flags = ("--prodigy_beta3", "0.9", "--adam_beta1", "0.8", "--adam_beta2", "0.95", "--adam_epsilon", "1e-6")
    quick("--optimizer", "prodigy", *flags, "--adam_weight_decay", "0.5", "--max_train_steps", "1", "--cache_latents")
    (group,) = calls[0].result.param_groups
    assert (group["beta3"], group["betas"], group["eps"], group["weight_decay"]) == (0.9, (0.8, 0.95), 1e-6, 0.5)


def test_eight_bit_adam_keeps_eight_bit_moments_and_learns_like_adam(script, quick, monkeypatch):
    """At rank 32 the moments are uint8, a quarter of the memory, and the LoRA points where full AdamW's does."""
    calls = spy(monkeypatch, script, "train")
    flags = ("--rank", "32", "--cache_latents", "--max_train_steps", "4")
    small, full = quick("--use_8bit_adam", *flags, output="a"), quick(*flags, output="b")
    training = calls[0].args[1]
    kinds = {slot[key].dtype for slot in training.optimizer.state.values() for key in ("state1", "state2")}
    assert kinds == {torch.uint8}
    sizes = []
    for call in calls:
        slots = [slot for slot in call.args[1].optimizer.state.values()]
        kept = [value for slot in slots for key, value in slot.items() if torch.is_tensor(value) and "qmap" not in key]
        sizes.append(sum(value.numel() * value.element_size() for value in kept))
    assert 0.25 < sizes[0] / sizes[1] < 0.28
    assert column(small, "loss")[0] == column(full, "loss")[0]
    one, other = lora(small), lora(full)
    lora_B = [name for name in one if "lora_B" in name]
    first, second = (torch.cat([tensors[name].flatten() for name in lora_B]) for tensors in (one, other))
    assert torch.cosine_similarity(first, second, dim=0) > 0.9


@pytest.mark.parametrize(("share", "blocks"), [((), 6), (("0.5",), 3)])
def test_gradient_checkpointing_recomputes_its_share_and_changes_no_number(quick, monkeypatch, share, blocks):
    """Alone every block, 0.5 half of the six; losses and LoRA stay."""
    plain = quick("--cache_latents", "--lora_dropout", "0.1", output="a")
    calls = spy(monkeypatch, torch.utils.checkpoint, "checkpoint")
    saving = quick("--cache_latents", "--lora_dropout", "0.1", "--gradient_checkpointing", *share, output="b")
    assert len(calls) == 3 * blocks
    assert_close_runs(plain, saving)


def test_gradient_checkpointing_keeps_fewer_activations(script, quick, monkeypatch):
    """What autograd saves in a micro-step: a checkpointed block leaves only its inputs."""
    kept = []

    def measure(*args, original=script.batch_losses):
        sizes = {}
        watch = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (
                sizes.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}) or tensor
            ),
            lambda tensor: tensor,
        )
        with watch:
            result = original(*args)
        kept.append(sum(sizes.values()))
        return result

    monkeypatch.setattr(script, "batch_losses", measure)
    for share in ("0", "0.5", "1"):
        quick("--cache_latents", "--gradient_checkpointing", share, "--max_train_steps", "1", output=f"share{share}")
    none, half, all_blocks = kept
    assert all_blocks < 0.5 * none and all_blocks < half < none, kept


def test_lora_dropout_repeats_and_has_an_effect(quick):
    """Dropout is a function of seed and step."""
    flags = ("--cache_latents", "--max_train_steps", "4")
    first, second = (
        quick(*flags, "--lora_dropout", "0.5", output="a"),
        quick(*flags, "--lora_dropout", "0.5", output="b"),
    )
    assert_same_run(first, second)
    assert column(quick(*flags, output="c"), "loss") != column(first, "loss")


@pytest.mark.parametrize("limit", ["0.5", "1000"])
def test_the_gradient_is_clipped_to_its_limit_and_logged_before(script, quick, monkeypatch, limit):
    """The optimizer sees at most --max_grad_norm; a gradient below it is left alone."""
    seen = []

    def measure(training):
        seen.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in training.parameters.values())))

    around_updates(monkeypatch, script, before=measure)
    folder = quick("--cache_latents", "--max_grad_norm", limit)
    expected = [min(norm, float(limit)) for norm in column(folder, "grad_norm")]
    assert seen == pytest.approx(expected, rel=1e-4)
    assert all(norm > 0.5 for norm in column(folder, "grad_norm"))


def test_scale_lr_multiplies_the_rate_by_the_samples_of_a_step(quick):
    """2 x 3 samples make six times the rate."""
    flags = ("--cache_latents", "--scale_lr", "--learning_rate", "1e-4", "--max_train_steps", "1")
    folder = quick(*flags, "--train_batch_size", "2", "--gradient_accumulation_steps", "3")
    assert column(folder, "lr") == pytest.approx([6e-4])


def warm(step: int, then) -> float:
    """Two steps of linear warm-up, then a function of the progress over the other four."""
    return step / 2 if step < 2 else then((step - 2) / 4)


@pytest.mark.parametrize(
    ("name", "flags", "factor"),
    [
        ("constant", (), lambda step: 1.0),
        ("constant_with_warmup", (), lambda step: warm(step, lambda _: 1.0)),
        ("linear", (), lambda step: warm(step, lambda done: 1 - done)),
        ("cosine", (), lambda step: warm(step, lambda done: 0.5 * (1 + math.cos(math.pi * done)))),
        (
            "cosine_with_restarts",
            ("--lr_num_cycles", "2"),
            lambda step: warm(step, lambda done: 0.5 * (1 + math.cos(math.pi * (2 * done % 1)))),
        ),
        (
            "polynomial",
            ("--lr_power", "2"),
            lambda step: warm(step, lambda done: (1 - 1e-4) * (1 - done) ** 2 + 1e-4),  # it ends at 1e-7
        ),
    ],
)
def test_the_schedule_counts_optimizer_steps_and_is_what_the_lr_column_says(quick, name, flags, factor):
    """Six steps of two micro-batches follow the formula over six steps, not over twelve."""
    flags += ("--cache_latents", "--learning_rate", "1e-3", "--lr_warmup_steps", "2", "--max_train_steps", "6")
    folder = quick("--lr_scheduler", name, "--gradient_accumulation_steps", "2", *flags)
    assert column(folder, "lr") == pytest.approx([1e-3 * factor(step) for step in range(6)], abs=1e-12)
    if name != "constant":
        assert column(folder, "lora_norm")[1] == 0.0  # the rate of the first step is 0


# -------------------------------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_named_and_never_reaches_the_weights(script, quick, monkeypatch, capsys, number):
    """The poisoned step leaves weights and moments as they were; the next one trains again."""
    snapshots, batches = [], []

    def poison(run, training, batch, original=script.batch_losses):
        losses, sigmas = original(run, training, batch)
        batches.append(batch["name"])
        return (losses * number if len(batches) == 2 else losses), sigmas

    def watch(run, training, stream, original=script.train_step):
        values = original(run, training, stream)
        moments = [slot["exp_avg"] for slot in training.optimizer.state.values()]
        snapshots.append([tensor.detach().clone() for tensor in [*training.parameters.values(), *moments]])
        return values

    monkeypatch.setattr(script, "batch_losses", poison)
    monkeypatch.setattr(script, "train_step", watch)
    folder = quick()
    one, two, three = snapshots
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(two, three, strict=True))
    assert all(tensor.isfinite().all() for tensor in lora(folder).values())
    warning = next(line for line in capsys.readouterr().err.splitlines() if "not finite" in line)
    assert "step 2" in warning and batches[1][0] in warning
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3] and not math.isfinite(metrics(folder)[1]["loss"])


def test_a_gradient_that_is_not_finite_is_caught_although_the_loss_is_finite(script, quick, monkeypatch):
    """The guard looks at the gradient as well."""
    norms = []

    def poison(gradients, limit, original=torch.nn.utils.clip_grad_norm_):
        norms.append(original(gradients, limit))
        return norms[-1] * (math.nan if len(norms) == 1 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poison)
    folder = quick("--max_train_steps", "1")
    assert all(tensor.abs().max() == 0 for name, tensor in lora(folder).items() if "lora_B" in name)


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run(script, quick, monkeypatch):
    """Nine and a good one go on; ten raise NotFinite, and no final LoRA is written."""
    count = 0

    def poison(run, training, batch, original=script.batch_losses):
        nonlocal count
        count += 1
        losses, sigmas = original(run, training, batch)
        return (losses if count == 10 else losses * math.nan), sigmas

    monkeypatch.setattr(script, "batch_losses", poison)
    with pytest.raises(script.NotFinite, match="step 20: ten steps in a row"):
        quick("--cache_latents", "--max_train_steps", "25", "--checkpointing_steps", "10", output="out")
    assert count == 20


def test_a_run_stopped_for_numbers_keeps_its_last_checkpoint_and_writes_no_result(script, quick, monkeypatch, tmp_path):
    """NotFinite leaves the good checkpoint and no LoRA that looks finished."""

    def poison(run, training, batch, original=script.batch_losses):
        losses, sigmas = original(run, training, batch)
        return (losses * math.nan if batch["position"][0] >= 2 else losses), sigmas

    monkeypatch.setattr(script, "batch_losses", poison)
    with pytest.raises(script.NotFinite):
        quick("--cache_latents", "--max_train_steps", "25", "--checkpointing_steps", "2")
    folder = tmp_path / "out"
    assert script.verify_checkpoint(folder / "checkpoint-2") is None
    assert not (folder / LORA).exists()
    stored = load_file(folder / "checkpoint-2" / LORA)
    assert all(tensor.isfinite().all() for tensor in stored.values())


# ----------------------------------------------------------------------------------------------------------- trajectory


def golden_flags(script) -> list[str]:
    """The fixed command line of the stored trajectory, beside model, data and output."""
    flags = "--seed 7 --max_train_steps 10 --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 2"
    flags += f" --aspect_ratio_buckets {BUCKETS} --random_flip --caption_dropout 0.3 --lora_dropout 0.1"
    flags += " --train_batch_size 2 --gradient_accumulation_steps 2 --weighting_scheme logit_normal"
    return [*flags.split(), *of_edits(script, "--cond_dropout", "0.3")]


def golden_run(script, folder: Path) -> dict:
    """Runs the fixed command line on drawn PNGs; returns what is stored."""
    for number, size in enumerate([(96, 128), (128, 96), (128, 128), (200, 120), (90, 160)]):
        draw_photo(folder / "photos" / f"{number:02d}.png", size, seed=number)
    given, output = of_edits(script, "--cond_data_dir", draw_references(folder / "references")), folder / "out"
    words = command_line(ROOT / "tiny_flux2", folder / "photos", output, *given, *golden_flags(script))
    script.main(script.parse_args(words))
    weights = sorted((ROOT / "tiny_flux2").glob("*/*.safetensors"))
    return {
        "command": "python tests/test_training.py --update",
        "flags": golden_flags(script),
        "model": {path.parent.name: sha256(path) for path in weights},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")},
        "loss": column(output, "loss"),
        "grad_norm": column(output, "grad_norm"),
    }


@pytest.mark.parametrize(("script", "name"), [(name, name) for name in SCRIPTS], indirect=["script"], ids=SCRIPTS)
def test_ten_steps_follow_the_stored_trajectory(script, name, tmp_path):
    """Losses and gradient norms of a fixed run agree with the file to 1e-4."""
    stored, now = json.loads((GOLDEN / f"{name}.json").read_text()), golden_run(script, tmp_path)
    assert now["model"] == stored["model"], f"the embedded model changed: {stored['command']}"
    assert now["flags"] == stored["flags"], f"the command line changed: {stored['command']}"
    for key in ("loss", "grad_norm"):
        assert now[key] == pytest.approx(stored[key], rel=1e-4), f"{key}; stored with {stored['versions']}"


def update_golden() -> None:
    """Rewrites the stored trajectories."""
    GOLDEN.mkdir(exist_ok=True)
    for name in SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            content = golden_run(load_script(name), Path(folder))
        (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {os.path.relpath(GOLDEN / f'{name}.json')}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    update_golden()
