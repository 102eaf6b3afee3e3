"""torch.compile, as the flag or the accelerate config asks for it: for all shapes at once, exact, never in part."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import column, lora
from torch._dynamo.utils import counters
from unit_parts import log_lines

SHAPES = "64,64;64,96;96,64;96,96"


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.scripts("t2i")  # what is compiled is the same in both
@pytest.mark.parametrize("checkpointing", [(), ("--gradient_checkpointing",)], ids=["kept", "checkpointed"])
def test_compiled_blocks_train_alike_and_another_shape_does_not_compile_for_ever(
    t2i, train, monkeypatch, checkpointing
):
    """Graphs: one for each kind of block; a second shape makes the first graph dynamic, later ones add nothing."""
    flags = ("--aspect_ratio_buckets", SHAPES, "--max_train_steps", "8", "--upcast_before_saving", *checkpointing)
    eager = train(*flags, output="eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    torch._dynamo.reset()
    counters.clear()
    compiled = train(*flags, output="compiled")
    graphs, recompiled = counters["stats"]["unique_graphs"], sum(counters["recompile_limit"].values())
    torch._dynamo.reset()
    assert 2 <= graphs <= 4 and recompiled == 0
    assert not counters["graph_break"], dict(counters["graph_break"])
    torch.testing.assert_close(
        torch.tensor(column(compiled, "loss")), torch.tensor(column(eager, "loss")), rtol=1e-4, atol=0
    )
    assert lora(compiled).keys() == lora(eager).keys()
    for name, tensor in lora(eager).items():
        torch.testing.assert_close(lora(compiled)[name], tensor, rtol=0, atol=1e-4)


def compile_with(monkeypatch, backend) -> list[str]:
    """Another backend than Inductor, which takes a minute; returns what it was asked for."""
    asked, original = [], torch.nn.Module.compile

    def compile_by(module, backend, _instead=backend, **options):
        asked.append(backend)
        original(module, backend=_instead, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_by)
    return asked


def broken_backend(*_):
    raise RuntimeError("no such target")


def stored_choice(folder, step: int) -> bool:
    return json.loads((folder / f"checkpoint-{step}" / "state.json").read_text())["compiled"]


@pytest.mark.e2e
@pytest.mark.scripts("t2i")  # what is compiled is the same in both
def test_the_flag_compiles_and_a_resumed_run_does_as_its_checkpoint_did(script, quick, monkeypatch, capsys):
    """Compiled as asked; when the trial fails after that, eager, which is said and kept."""
    eager = quick("--max_train_steps", "2", output="eager")
    with monkeypatch.context() as patch:
        asked = compile_with(patch, "aot_eager")
        folder = quick("--compile_blocks", "--max_train_steps", "2", output="out")
    assert set(asked) == {"inductor"} and stored_choice(folder, 2) and not stored_choice(eager, 2)
    assert column(folder, "compiled_blocks") == [len(asked)] * 2 and column(eager, "compiled_blocks") == [0, 0]
    losses = [torch.tensor(column(run, "loss")) for run in (folder, eager)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    resume = ("--resume_from_checkpoint", "latest", "--max_train_steps")
    with monkeypatch.context() as patch:
        compile_with(patch, broken_backend)
        quick(*resume, "3", output="out")
    assert re.search(r"the trial failed .*no such target\); this run is not compiled", capsys.readouterr().err)
    assert not stored_choice(folder, 3)
    with monkeypatch.context() as patch:
        asked = compile_with(patch, broken_backend)
        quick(*resume, "4", output="out")
    assert not asked and column(folder, "compiled_blocks")[2:] == [0, 0]


@pytest.mark.e2e
@pytest.mark.scripts("t2i")
def test_a_failure_of_what_was_asked_for_is_an_error(script, quick, monkeypatch):
    compile_with(monkeypatch, broken_backend)
    with pytest.raises(script.UserError, match="--compile_blocks: the trial failed .*no such target"):
        quick("--compile_blocks", "--max_train_steps", "2", output="out")


@pytest.mark.e2e
@pytest.mark.scripts("t2i")
def test_the_trial_comes_before_the_first_validation_which_is_eager_if_it_fails(script, quick, monkeypatch):
    """Else the images of the base model would be lost, and the first LoRA would be the one to beat."""
    original = script.compile_blocks

    def compile_as_on_a_gpu(run, *rest):
        return original(replace(run, args=script.Args(**vars(run.args) | {"compile_blocks": True})), *rest)

    monkeypatch.setattr(script, "compile_blocks", compile_as_on_a_gpu)
    compile_with(monkeypatch, broken_backend)
    flags = ("--validation_prompt", "a toy", "--num_validation_images", "1", "--num_inference_steps", "1")
    folder = quick("--max_train_steps", "2", "--validation_split", "1", *flags, output="out")
    assert (folder / "samples" / "step-000000").is_dir() and column(folder, "compiled_blocks") == [0, 0]


def test_the_accelerate_config_can_ask_for_dynamic_shapes(script, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Linear, "compile", lambda module, **options: asked.append(options["dynamic"]))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    for value in ("false", "true"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", value)
        with pytest.raises(AssertionError):  # nothing is compiled here
            compiled_blocks(script, device="cpu")
    assert asked == [None] * 3 + [True] * 3


def compiled_blocks(
    script, steps=500, device="cuda", dtype=torch.bfloat16, flag=None, stored=None, bits8=False, fp8=False, sizes=1
) -> int:
    """How many of three blocks `compile_blocks` compiles for such a run."""
    resume = None if stored is None else SimpleNamespace(state={"compiled": stored, "step": 0})
    run = SimpleNamespace(
        args=SimpleNamespace(compile_blocks=flag, do_fp8_training=fp8), quantization={"load_in_8bit": bits8},
        resume=resume, device=torch.device(device), dtype=dtype,
    )  # fmt: skip
    blocks = [torch.nn.Linear(2, 2) for _ in range(3)]
    transformer = SimpleNamespace(transformer_blocks=blocks[:1], single_transformer_blocks=blocks[1:])
    found = script.compile_blocks(run, transformer, sizes > 1, steps)
    assert sum(block._compiled_call_impl is not None for block in blocks) == found
    return found


CHOICES = [
    ({}, 3), ({"steps": 499}, 0), ({"device": "cpu"}, 0), ({"device": "mps"}, 0), ({"dtype": torch.float32}, 0),
    ({"flag": False}, 0), ({"flag": True, "device": "cpu", "steps": 1}, 3), ({"stored": False}, 0),
    ({"stored": True, "steps": 1}, 3), ({"stored": False, "flag": True}, 3), ({"bits8": True}, 0),
    ({"fp8": True}, 3), ({"sizes": 2}, 3), ({"fp8": True, "sizes": 2}, 0), ({"fp8": True, "sizes": 2, "flag": True}, 3),
]  # fmt: skip


@pytest.mark.parametrize(("case", "number"), CHOICES)
def test_unset_the_blocks_are_compiled_where_it_pays(script, case, number):
    assert compiled_blocks(script, **case) == number


def test_what_cannot_compile_is_told_and_is_an_error_where_it_was_asked_for(script, monkeypatch):
    with pytest.raises(script.UserError, match="--compile_blocks: bitsandbytes' int8 stays eager"):
        compiled_blocks(script, flag=True, bits8=True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(script.shutil, "which", lambda _: None)
    with pytest.raises(script.UserError, match="torch.compile needs a C compiler.*; remove the flag, or dynamo_config"):
        compiled_blocks(script, flag=True)
    with monkeypatch.context() as patch, pytest.raises(script.UserError, match="or dynamo_config from the accelerate"):
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
        compiled_blocks(script)
    with log_lines() as lines:
        assert compiled_blocks(script) == 0
    assert any("needs a C compiler" in line and "this run is not compiled" in line for line in lines)


def test_beyond_the_recompile_limit_nothing_runs_eager_in_silence(script, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled_blocks(script, device="cpu")
    block = torch.nn.Linear(2, 2)
    block.compile(backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(Exception, match="recompile_limit"):
        for rows in 2, 3, 4:
            block(torch.ones(rows, 2))
