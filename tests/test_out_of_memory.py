"""Out of memory, on the device or the CPU, is told with its phase and what helps; what was learned is kept."""

import ast
import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import run_python
from runs import assert_same_run, column, command_line, lora
from unit_parts import start_run

pytestmark = pytest.mark.scripts("t2i")

DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore of it")
HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to ..."
)
ERRORS = {"device": DEVICE, "host": HOST, "python": MemoryError(), "driver": RuntimeError("CUDA error: out of memory")}
DRAW = ("--num_inference_steps", "1", "--num_validation_images", "1")


def fail(monkeypatch, script, name: str, error: Exception, call: int = 1) -> None:
    """Makes this call of the function, counted from 1, raise the error."""
    original, calls = getattr(script, name), []

    @functools.wraps(original)
    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(script, name, counted)


# ---- the phase ----


@pytest.mark.e2e
@pytest.mark.parametrize(
    "phase, name, error",
    [
        ("check data", "make_samples", "python"),
        ("encode prompts", "load_text_encoder", "device"),
        ("encode prompts", "encode_prompt", "host"),
        ("encode images", "encode_pixels", "python"),
        ("prepare training", "load_transformer", "device"),
        ("prepare training", "place_transformer", "driver"),
        ("train", "batch_losses", "host"),
        ("save results", "save_checkpoint", "device"),
    ],
)
def test_the_message_names_the_phase_the_memory_and_two_flags(script, train, monkeypatch, phase, name, error):
    """Whatever kind of error it is, with exit code 6."""
    fail(monkeypatch, script, name, ERRORS[error])
    with pytest.raises(script.OutOfMemory) as caught:
        train("--cache_latents")
    told = str(caught.value).splitlines()
    said = str(ERRORS[error]).splitlines()
    assert told[0].startswith(f"out of memory in phase '{phase}' ({said[0] if said else 'MemoryError'})")
    assert "peak " in told[0] and "GB, free now " in told[0] and "nan" not in told[0]
    assert told[1].startswith("  what would help, most first: ") and told[1].count("--") in (1, 2)
    assert told[2:] == []
    assert [code for known, code in script.EXIT_CODES.items() if isinstance(caught.value, known)] == [6]


@pytest.mark.e2e
def test_class_images_are_a_phase_of_their_own(t2i, tiny, photos, tmp_path, monkeypatch):
    """They need the transformer before training does."""
    fail(monkeypatch, t2i, "generate", DEVICE)
    flags = ["--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a toy"]
    flags += ["--num_class_images", "1", "--num_inference_steps", "1", "--max_train_steps", "1"]
    with pytest.raises(t2i.OutOfMemory, match="in phase 'make streams'"):
        t2i.main(t2i.parse_args(command_line(tiny, photos, tmp_path / "out", *flags)))


@pytest.mark.e2e
@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("memory")])
def test_another_failure_stays_what_it_was(script, train, monkeypatch, error):
    """Nothing is taken for a lack of memory that is not one."""
    fail(monkeypatch, script, "load_transformer", error)
    with pytest.raises(type(error)) as caught:
        train("--cache_latents")
    assert caught.value is error


# ---- the flags ----


FOUR_BIT = ("--text_encoder_bnb_config_path", ROOT / "configs" / "quantization" / "nf4.json")


@pytest.mark.parametrize(
    "phase, flags, expected",
    [
        ("train", (), ["--gradient_checkpointing", "--stream_blocks"]),
        ("train", ("--gradient_checkpointing",), ["--stream_blocks", "--bnb_quantization_config_path"]),
        ("train", ("--stream_blocks",), ["--do_fp8_training", "--cache_latents"]),
        ("train", ("--stream_blocks", "0.5"), ["--stream_blocks", "--do_fp8_training"]),
        ("train", ("--stream_blocks", "--do_fp8_training"), ["--cache_latents", "--offload"]),
        ("train", ("--do_fp8_training", "--gradient_checkpointing"), ["--stream_blocks", "--cache_latents"]),
        ("train", ("--gradient_checkpointing", "0.5"), ["--gradient_checkpointing", "--stream_blocks"]),
        ("prepare training", (), ["--stream_blocks", "--bnb_quantization_config_path"]),
        ("encode prompts", (), ["--offload", "--text_encoder_bnb_config_path", "--remote_text_encoder"]),
        ("encode prompts", (*FOUR_BIT, "--offload"), ["--remote_text_encoder", "a smaller --max_sequence_length"]),
        ("encode images", (), ["a smaller --resolution"]),
    ],
)
def test_the_flags_are_those_that_help_there_and_are_not_on(script, tiny, tmp_path, phase, flags, expected):
    """What helps most first, on a GPU."""
    run = replace(start_run(script, tiny, tmp_path, *flags), device=torch.device("cuda"))
    assert script.memory_flags(run, phase)[: len(expected)] == expected


def test_everything_that_is_on_is_not_said_again(bnb_on_cpu, script, tiny, tmp_path):
    """The quantised base too; something is always left to say."""
    four_bit = ("--bnb_quantization_config_path", ROOT / "configs" / "quantization" / "nf4.json", "--cache_latents")
    run = start_run(script, tiny, tmp_path, *four_bit, "--gradient_checkpointing", "--use_8bit_adam", "--offload")
    assert script.memory_flags(run, "train") == ["a smaller --resolution", "a smaller --rank"]


def test_what_several_processes_can_do_is_said_to_them(script, tiny, tmp_path):
    """The encoder and FP8 weights are split, those of bitsandbytes are not."""
    run = start_run(script, tiny, tmp_path)
    two = replace(run, sharding=True, processes=2)
    assert "--fsdp_text_encoder" in script.memory_flags(two, "encode prompts")
    assert script.memory_flags(two, "prepare training")[0] == "--do_fp8_training"


# ---- what was learned ----


@pytest.mark.e2e
def test_the_last_step_is_kept_and_the_line_that_is_printed_goes_on_from_it(
    script, tiny, photos, reference_flags, tmp_path, monkeypatch
):
    """With the flag that helps in it; the end is that of a run that never lacked memory."""
    flags = ["--seed", "0", "--max_train_steps", "4", "--latents_cache_dir", tmp_path / "cache", *reference_flags]
    words = command_line(tiny, photos, tmp_path / "out", *flags)
    script.main(script.parse_args([*words, "--output_dir", str(tmp_path / "quiet")]))
    with monkeypatch.context() as patch:
        fail(patch, script, "batch_losses", HOST, call=4)
        with pytest.raises(script.OutOfMemory) as caught:
            script.main(script.parse_args([*words, "--overwrite_output_dir"]))
    line = str(caught.value).splitlines()[-1]
    assert script.verify_checkpoint(tmp_path / "out" / "checkpoint-3") is None
    settings = tmp_path / "out" / "config.args"
    call = re.fullmatch(r"main\(parse_args\((.*)\)\)", line.strip())
    typed = ast.literal_eval(call[1])
    assert typed == [f"@{settings}", "--resume_from_checkpoint", "latest", "--gradient_checkpointing"]
    script.main(script.parse_args(typed))
    assert_same_run(tmp_path / "quiet", tmp_path / "out")


@pytest.mark.e2e
@pytest.mark.parametrize("error", ["device", "host", "python"])
def test_a_validation_without_memory_is_a_warning_and_training_goes_on(script, train, monkeypatch, capsys, error):
    """Its memory is given back, and the weights are those of a run that drew nothing."""
    fail(monkeypatch, script, "generate", ERRORS[error], call=2)  # the first one draws before step 1
    drawn = train("--validation_prompt", "a toy", "--validation_steps", "1", *DRAW, "--skip_final_inference")
    said = capsys.readouterr().err
    assert said.count("validation: failed at step 1") == 1 and "training goes on" in said
    assert column(drawn, "step") == [1, 2, 3]
    plain = lora(train(output="plain"))
    assert all(tensor.equal(plain[name]) for name, tensor in lora(drawn).items())


@pytest.mark.e2e
def test_after_a_validation_without_memory_the_vae_rests_and_memory_is_released(script, train, monkeypatch):
    """With --offload it would else stay on the device until the next image."""
    events = []
    fail(monkeypatch, script, "generate", DEVICE, call=2)
    for owner, name in (
        (script.training_utils, "free_memory"), (script.Training, "rest_vae"), (script, "train_step")
    ):  # fmt: skip
        original = getattr(owner, name)
        note = functools.partial(lambda label, call, *args: (events.append(label), call(*args))[1], name, original)
        monkeypatch.setattr(owner, name, functools.partialmethod(note) if owner is script.Training else note)
    train("--validation_prompt", "a toy", "--validation_steps", "1", *DRAW, "--skip_final_inference", "--cache_latents")
    first = events.index("train_step")
    assert events[first + 1 : first + 4] == ["rest_vae", "free_memory", "train_step"]


@pytest.mark.e2e
@pytest.mark.parametrize("error", ["device", "python"])
def test_final_images_without_memory_are_a_warning_and_the_lora_stays(script, train, monkeypatch, capsys, error):
    """The run ends well: it is saved before."""
    fail(monkeypatch, script, "generate", ERRORS[error])
    folder = train("--final_validation_prompt", "a toy", *DRAW)
    said = capsys.readouterr().err
    assert "final images: failed" in said and "the LoRA is saved" in said
    assert lora(folder) and (folder / "README.md").is_file()


# ---- a real one ----

LIMITED = """
import re, resource, runpy, sys
import accelerate, diffusers, peft, torch, transformers
from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
torch.set_num_threads(1)
now = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + 500_000_000,) * 2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the limit is set from /proc")
def test_a_program_that_gets_no_more_memory_ends_with_exit_code_6(t2i, tiny, photos, tmp_path):
    """A real limit of 500 MB over what the libraries need, and images of 2048 px."""
    words = command_line(tiny, photos, tmp_path / "out", "--resolution", "2048", "--cache_latents")
    ended = run_python("-c", LIMITED, ROOT / Path(t2i.__file__).name, *words, timeout=120)
    assert ended.returncode == 6, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "error: out of memory in phase 'encode images'" in ended.stderr, ended.stderr
    assert "what would help, most first: a smaller --resolution" in ended.stderr
