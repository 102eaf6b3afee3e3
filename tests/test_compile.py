"""torch.compile, as the accelerate config asks for it: really compiled, for all bucket shapes at once, and exact."""

import pytest
import torch
from runs import column, lora
from torch._dynamo.utils import counters

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SHAPES = "64,64;64,96;96,64;96,96"


@pytest.mark.parametrize("script", ["t2i"], indirect=True)  # what is compiled is the same in both
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
