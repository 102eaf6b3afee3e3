"""--stream_blocks: frozen blocks that visit the device one by one train exactly as blocks that stay there."""

from types import SimpleNamespace

import pytest
import torch
from helpers import MINIMAL_ARGUMENTS
from runs import assert_same_run, spy
from torch._dynamo.utils import counters

pytestmark = pytest.mark.e2e

CHECKPOINTING = ("--gradient_checkpointing",)


@pytest.mark.parametrize("base", [("--mixed_precision", "bf16"), ("--do_fp8_training",)], ids=["bf16", "fp8"])
def test_streamed_blocks_train_to_the_bit_as_blocks_that_stay(script, quick, one_group, reference_dropout, base):
    """Accumulated, and in the editing script with two forwards before one backward, where references are dropped."""
    flags = ("--gradient_accumulation_steps", "2", "--train_batch_size", "2", "--max_train_steps", "2", *base)
    flags += (*one_group, *reference_dropout)
    stay = quick(*flags, *CHECKPOINTING, output="stay")
    for share in (), ("0.5",):
        assert_same_run(stay, quick(*flags, "--stream_blocks", *share, output=f"streamed{len(share)}"))


@pytest.mark.scripts("i2i")
def test_a_streamed_run_resumes_and_draws_as_one_that_stays(script, quick, validation_reference):
    draw = ("--validation_prompt", "a toy", "--num_validation_images", "1", "--num_inference_steps", "2")
    draw += ("--validation_steps", "2", "--validation_size", "64,64", "--skip_final_inference", *validation_reference)
    stay = quick(*CHECKPOINTING, *draw, output="stay")
    quick("--stream_blocks", *draw, "--max_train_steps", "1", output="streamed")
    streamed = quick("--stream_blocks", *draw, "--resume_from_checkpoint", "latest", output="streamed")
    assert_same_run(stay, streamed)
    images = [folder / "samples" / "step-000002" for folder in (stay, streamed)]
    names = sorted(path.name for path in images[0].glob("*.png"))
    assert names and all((images[0] / name).read_bytes() == (images[1] / name).read_bytes() for name in names)


@pytest.mark.scripts("t2i")
def test_class_images_are_drawn_by_streamed_blocks_too(t2i, quick, tmp_path):
    prior = ("--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", "2")
    prior += ("--num_inference_steps", "2", "--max_train_steps", "1", "--class_data_dir")
    runs = [
        quick(*flags, *prior, tmp_path / name, output=f"run-{name}")
        for name, flags in (("stay", CHECKPOINTING), ("streamed", ("--stream_blocks",)))
    ]
    assert_same_run(*runs)


@pytest.mark.scripts("t2i")
@pytest.mark.slow
@pytest.mark.parametrize("base", [(), ("--do_fp8_training",)], ids=["fp32", "fp8"])
def test_compiled_blocks_stream_too(t2i, quick, monkeypatch, base):
    """What torch.compile saves of a forward must not outlive the visit: a stale buffer would show in the losses."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    runs = []
    for flags in (CHECKPOINTING, ("--stream_blocks",)):
        torch._dynamo.reset()
        counters.clear()
        runs.append(quick(*base, *flags, output=flags[0].strip("-")))
        assert not counters["graph_break"] and not counters["recompile_limit"]
    torch._dynamo.reset()
    assert_same_run(*runs)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.34])
def test_the_share_of_blocks_that_streams_is_spread_evenly(script, share):
    run = SimpleNamespace(args=SimpleNamespace(stream_blocks=share))
    streamed = [number for number in range(56) if script.is_streamed(run, number)]
    assert len(streamed) == int(56 * share)
    gaps = [later - earlier for earlier, later in zip(streamed, streamed[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_the_next_block_is_on_its_way_before_a_block_computes(script, quick, monkeypatch):
    """Order of copies and computations of one step: the copy of a block comes before the one that computes first."""
    events, copies, real = [], spy(monkeypatch, script.BlockStream, "copy"), script.BlockStream.visit

    def visit(self, number, call, *inputs, **named):
        def computed(*inputs, **named):
            events.append((number, len(copies)))
            return call(*inputs, **named)

        return real(self, number, computed, *inputs, **named)

    monkeypatch.setattr(script.BlockStream, "visit", visit)
    quick("--stream_blocks", "--max_train_steps", "1", output="order")
    order = [call.args[1] for call in copies]
    blocks = max(order) + 1
    assert order == [*range(blocks), *reversed(range(blocks - 2))], "forward, and back without what is still there"
    assert len(events) == blocks
    assert all(number + 1 in order[:copied] for number, copied in events if number < blocks - 1)


def test_what_cannot_stream_is_refused_before_anything_is_loaded(script, capsys, monkeypatch):
    flags = (*MINIMAL_ARGUMENTS, "--stream_blocks")
    with pytest.raises(SystemExit):
        script.parse_args([*flags, "--bnb_quantization_config_path", "configs/quantization/nf4.json"])
    assert "--stream_blocks: bitsandbytes' weights cannot be streamed" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        script.parse_args(list(flags))
    assert "fsdp_offload_params" in capsys.readouterr().err


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("flags", [("1", "--mixed_precision", "bf16"), ("0.3",), ("1", "--do_fp8_training")])
@pytest.mark.parametrize("processes", [1, 2])
def test_blocks_that_host_memory_cannot_hold_are_refused_before_the_model_is_loaded(
    script, quick, monkeypatch, flags, processes
):
    """Just below what is pinned they are refused, just above the run goes on; each process pins its own."""
    stream = ("--stream_blocks", *flags, "--max_train_steps", "1")
    loads = spy(monkeypatch, script, "load_transformer")
    quick(*stream)
    pinned = processes * sum(home.nbytes for home in loads.pop().result.stream.pinned_blocks)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(script.psutil, "virtual_memory", lambda: SimpleNamespace(available=0.85 * pinned))
    with pytest.raises(
        script.UserError, match=r"--stream_blocks: pins 0\.0 GB of host memory, 0\.0 GB are free; stream"
    ) as refusal:
        quick(*stream, output="refused")
    assert not loads and ("use --do_fp8_training" in str(refusal.value)) != ("--do_fp8_training" in flags)
    monkeypatch.setattr(script.psutil, "virtual_memory", lambda: SimpleNamespace(available=1.05 * pinned))
    quick(*stream, output="fits")
    assert loads
