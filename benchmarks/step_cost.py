"""Count the kernels of a training step on a machine without a GPU, and predict their time with a roofline model.

    python benchmarks/step_cost.py               adds missing rows to benchmarks/step_cost.json
    python benchmarks/step_cost.py --only dev    only the rows of one model; --again recounts all rows

The script's own step runs on the fake GPU of tests/fake_gpu.py. Each operator that runs on the GPU counts as one kernel
with its operations and bytes. `compiled` rows count the kernels that Inductor schedules for a GPU instead: graphs are
lowered and fused, but no code is generated. Blocks of a kind are alike, so only a few are counted and multiplied.

A kernel takes the longest of three times: the time for its operations, the time for its bytes, and 3 microseconds. It
reaches the FRACTIONS of the data sheets' peaks; these were measured on single kernels on an H200, and none was fitted
to a row. Launch overhead on the host is not predicted. It is the limit where the GPU would be faster (FP8 or small
models at 512 px).
"""

import argparse
import contextlib
import copy
import functools
import json
import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from results import HERE, ROOT, read_result, write_result
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "tests"))
import bare_training
from fake_gpu import MAIN_STREAM, pretended_gpu, really

import train_dreambooth_lora_flux2 as script

MODELS, BASES, SIZES = ("dev", "klein-9B", "klein-4B"), {"bf16": (), "fp8": ("--do_fp8_training",)}, (1024, 512)
RANKS = {"dev": 16, "klein-9B": 32, "klein-4B": 16}  # the same as in benchmarks/gpu.json


@dataclass(frozen=True)
class Card:
    """The data sheet of a GPU: dense TFLOP/s with fp32 accumulation, TB/s and GB."""

    bf16: float
    fp8: float
    bandwidth: float
    memory: float


CARDS = {
    "H200": Card(989.5, 1979.0, 4.8, 141),  # NVIDIA H200 data sheet, SXM; without sparsity
    "H100": Card(989.5, 1979.0, 3.35, 80),  # NVIDIA H100 data sheet, SXM; without sparsity
    "4090": Card(165.2, 330.3, 1.008, 24),  # NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090
}
# Shares of those peaks, from single kernels on an H200. A matmul of 4608 x 6144 x 55296 ran at 770 TFLOP/s in bf16,
# 1,562 in FP8, and 1,408 in FP8 without fast accumulation; attention with 48 heads at 666 forward and 537 backward. A
# byte matrix is transposed at 0.3 TB/s. Eager kernels reach 3.0 TB/s on average; quantising 4608 x 55296 values takes
# 1.37 ms, which leaves 0.46 TB/s for its row norms. Not measured: 0.8 for fused kernels.
FRACTIONS = {"bf16": 0.78, "fp8": 0.79, "fp8 exact": 0.71, "attention": 0.67, "attention backward": 0.54,
             "eager": 0.62, "norm of rows": 0.095, "transposed": 0.063, "fused": 0.8}  # fmt: skip
LAUNCH = 3e-6
CLASSES = ("matmul", "attention", "elementwise")
NO_KERNEL = ("empty", "new_empty", "detach", "lift", "_local_scalar", "set_", "resize_", "record_stream")


@dataclass(frozen=True)
class Kernel:
    """One kernel: its class, floating point operations, and bytes read and written."""

    kind: str
    rate: str  # its entry in FRACTIONS
    flop: float
    bytes: float
    name: str = ""

    def seconds(self, card: Card) -> float:
        """The time that the roofline model predicts."""
        peak = card.fp8 if self.rate.startswith("fp8") else card.bf16
        memory = FRACTIONS.get(self.rate if self.kind == "elementwise" else "fused", 0.0) * card.bandwidth * 1e12
        compute = self.flop / (FRACTIONS[self.rate] * peak * 1e12) if self.flop else 0.0
        return max(LAUNCH, compute, self.bytes / memory)


def size_of(tensor: torch.Tensor) -> int:
    """Bytes that a kernel reads or writes for the tensor; an expanded tensor is in memory only once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def kernel_of(operator: Any, args: tuple, kwargs: dict, result: Any) -> Kernel | None:
    """The kernel that an operator launches; None for a view, a new empty tensor, or work on the host."""
    inputs, outputs = ([t for t in tree_leaves(tree) if torch.is_tensor(t)] for tree in ((args, kwargs), result))
    name = operator._schema.name.removeprefix("aten::")
    if not any(tensor.device.type == "cuda" for tensor in (*inputs, *outputs)) or name.startswith(NO_KERNEL):
        return None
    input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    if not operator._schema.is_mutable and all(t.untyped_storage()._cdata in input_storages for t in outputs):
        return None
    moved = sum(map(size_of, {id(tensor): tensor for tensor in (*inputs, *outputs)}.values()))
    count = flop_registry.get(operator.overloadpacket)
    if count is None:
        transposed = name in ("clone", "copy_") and inputs[-1].element_size() == 1 and inputs[-1].stride(-1) != 1
        rate = "transposed" if transposed else "norm of rows" if name == "linalg_vector_norm" else "eager"
        return Kernel("elementwise", rate, 0, moved, name)
    flop = count(*args, **kwargs, out_val=result)
    if "attention" in name:
        return Kernel("attention", "attention backward" if "backward" in name else "attention", flop, moved, name)
    rate = "bf16" if "scaled" not in name else "fp8" if kwargs.get("use_fast_accum") else "fp8 exact"
    return Kernel("matmul", rate, flop, moved, name)


class Counter(TorchDispatchMode):
    """Collects the kernels of all operators; the kernels of each compiled graph are one entry of `graphs`."""

    current: "Counter | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.graphs: list[list[Kernel]] = []  # in the order of execution
        self.paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Keeps torch.compile active, which is disabled under a dispatch mode by default."""
        return True

    def __enter__(self) -> "Counter":
        Counter.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Counter.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        kernel = None if self.paused else kernel_of(operator, args, kwargs or {}, result)
        if kernel:
            self.kernels.append(kernel)
        return result


# ----------------------------------------------------------------------------------------------------------- Compiled
# The GPU properties that Inductor reads while it schedules; none of them changes which kernels are fused.
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, max_threads_per_block=1024,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=62914560,
    total_memory=150754820096, gcnArchName="", is_integrated=False, clock_rate=1980000, memory_clock_rate=3201000,
    memory_bus_width=6144, pci_bus_id=0, uuid="0",
)  # fmt: skip


@contextlib.contextmanager
def compilable() -> Iterator[None]:
    """On the fake GPU, gives Dynamo and Inductor the device properties that they query."""
    import torch._inductor.config
    from torch._dynamo.device_interface import CudaInterface

    stream = {"device": torch.device("cuda", 0), "device_index": 0, "device_type": 1, "stream_id": 0}
    answers = {"get_device_properties": H200, "_get_device_properties": H200, "_lazy_init": None, "set_rng_state": None}
    # Inductor must not compute anything or start worker processes
    settings = {"shape_padding": False, "joint_graph_constant_folding": False, "compile_threads": 1}
    answers |= {"get_rng_state": torch.zeros(16, dtype=torch.uint8), "_exchange_device": 0, "_maybe_exchange_device": 0}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, a=answer, **__: a, create=True))
        for name, value in stream.items():
            stack.enter_context(mock.patch.object(MAIN_STREAM, name, value, create=True))
        for name, answer in {"get_device_properties": H200, "get_compute_capability": 90}.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(lambda *_, a=answer: a)))
        for place in ("torch.utils._triton.has_triton", "torch._inductor.scheduler.has_triton"):
            stack.enter_context(mock.patch(place, lambda *_, **__: True))
        stack.enter_context(torch._inductor.config.patch(settings))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def schedule(graph: torch.fx.GraphModule, inputs: list[Any], backward: bool) -> list[Kernel]:
    """The kernels of a graph: matmuls and attention as in the graph, all others as fused by Inductor."""
    from torch._inductor import scheduler
    from torch._inductor.compile_fx import fake_tensor_prop, record_original_output_strides, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode, kernels = torch._guards.detect_fake_mode(inputs), []
    with V.set_fake_mode(mode):
        view_to_reshape(graph)
        fake_tensor_prop(graph, inputs)
        record_original_output_strides(graph)
        post_grad_passes(graph, False)
        for node in graph.graph.nodes:
            if getattr(node.target, "overloadpacket", None) in flop_registry:
                args, kwargs = tree_map_only(torch.fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
                kernels.append(kernel_of(node.target, args, kwargs, node.meta["val"]))
        lowering = GraphLowering(graph, inputs, shape_env=mode.shape_env, is_inference=False, is_backward=backward)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering._update_scheduler()
            for node in lowering.scheduler.nodes:
                origins = {getattr(n.target, "overloadpacket", None) for n in node.node.origins} if node.node else set()
                counted = isinstance(node, scheduler.ExternKernelSchedulerNode) and origins & flop_registry.keys()
                moved = 0 if isinstance(node, scheduler.NopKernelSchedulerNode) else node.get_read_write_buffers_sizes()
                if moved and not counted:
                    kernels.append(Kernel("elementwise", "fused", 0, moved, type(node).__name__))
    return kernels


def count_graph(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
    """Replaces Inductor's compiler: returns the graph uncompiled; running it adds its kernels to the counter."""
    kernels = schedule(copy.deepcopy(graph), inputs, options.get("is_backward", False))

    def run(args: list[Any]) -> Any:
        counter = Counter.current
        if counter:
            counter.graphs.append(kernels)
            counter.paused = True
        try:
            return graph(*args)
        finally:
            args.clear()
            if counter:
                counter.paused = False

    run._boxed_call = True
    return run


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Backend for torch.compile: Inductor without code generation."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, inner_compile=count_graph)


# --------------------------------------------------------------------------------------------------------------- Steps
def count_blocks(
    architecture: dict, blocks: tuple[int, int], resolution: int, flags: Iterable, compiled: bool
) -> Counter:
    """Counts the second step of a transformer with these numbers of double and single blocks.

    With gradient checkpointing, batch size 1 and cached latents.
    """
    import accelerate.state

    architecture = copy.deepcopy(architecture)
    architecture["transformer"] |= dict(zip(("num_layers", "num_single_layers"), blocks, strict=True))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for owner, name in ((bare_training, "write_checkpoint"), (script.LatentCodec, "__init__")):
            stack.enter_context(mock.patch.object(owner, name, really(getattr(owner, name))))
        stack.enter_context(mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True))
        stack.enter_context(pretended_gpu())
        accelerate.state.AcceleratorState._reset_state(True)  # otherwise it keeps the device of an earlier run
        stack.callback(accelerate.state.AcceleratorState._reset_state, True)
        words = ("--resolution", resolution, "--gradient_checkpointing", *flags)
        run = bare_training.start_run(script, architecture, Path(folder, "run"), *words)
        assert run.device.type == "cuda", run.device
        training = bare_training.set_up(script, run, bare_training.make_streams(script, run))
        if compiled:
            stack.enter_context(compilable())
            for block in script.blocks_of(training.transformer):
                block.compile(backend=inductor, dynamic=False, fullgraph=True)
        batches = bare_training.make_batches(script, run, training)
        script.train_step(run, training, batches)
        with Counter() as counter:
            script.train_step(run, training, batches)
    return counter


def add_up(parts: Iterable[tuple[float, list[Kernel]]]) -> dict[str, Any]:
    """Sums of (times, kernels) pairs: kernels, TFLOP and GB by class, and seconds by GPU."""
    classes = {kind: {"kernels": 0, "tflop": 0.0, "gb": 0.0} for kind in CLASSES}
    seconds = defaultdict(float)
    for times, kernels in parts:
        for kernel in kernels:
            row = classes[kernel.kind]
            row["kernels"] += times
            row["tflop"] += times * kernel.flop / 1e12
            row["gb"] += times * kernel.bytes / 1e9
            for card, values in CARDS.items():
                seconds[card] += times * kernel.seconds(values)
    for row in classes.values():
        row["kernels"] = round(row["kernels"])
    return {"classes": classes, "predicted_seconds": dict(seconds)}


def count_step(architecture: dict, resolution: int, flags: Iterable, compiled: bool) -> dict[str, Any]:
    """Counts the step of the whole transformer from a few blocks.

    The first block computes no gradient of its input, so it differs from the others. In eager mode, counts two double
    blocks and one single block, then one more of each. Compiled, each block has its own graphs; kernels outside the
    graphs are counted once, and the optimizer's are scaled to all blocks.
    """
    double, single = (architecture["transformer"][name] for name in ("num_layers", "num_single_layers"))
    count = functools.partial(count_blocks, architecture, resolution=resolution, flags=flags, compiled=compiled)
    if not compiled:
        few, another_double, another_single = (count(blocks).kernels for blocks in ((2, 1), (3, 1), (2, 2)))
        times = double - 2, single - 1
        return add_up([(1 - sum(times), few), (times[0], another_double), (times[1], another_single)])
    counter = count((2, 1))
    times = (1, double - 1, single)  # first double block, other double blocks, single blocks
    assert len(counter.graphs) == 6, f"{len(counter.graphs)} graphs, not one forward and one backward for each block"
    blocks = zip((*times, *reversed(times)), counter.graphs, strict=True)
    foreach = [kernel for kernel in counter.kernels if kernel.name.startswith("_foreach")]
    others = [kernel for kernel in counter.kernels if not kernel.name.startswith("_foreach")]
    return add_up([(1, others), ((double + single) / 3, foreach), *blocks])


def fits(row: dict[str, Any], card: Card) -> bool:
    """Whether the row fits the GPU's memory according to the planner; assumes that compiling makes no difference."""
    keys = {"model": row["model"], "base": row["base"], "share": 1.0, "resolution": row["resolution"], "references": 0}
    known = read_result("plan_memory") or {"rows": []}
    peaks = [plan["training_gb"] for plan in known["rows"] if all(plan[key] == value for key, value in keys.items())]
    return not peaks or peaks[0] < card.memory


def measured(row: dict[str, Any]) -> float | None:
    """The row's seconds per step on an H200 in benchmarks/gpu.json, or None if it was not measured."""
    wanted = {"model": row["model"], "base": row["base"], "resolution": row["resolution"], "compiled": row["compiled"]}
    wanted |= {"share": 1.0, "references": 0, "streamed": 0.0}
    rows = (read_result("gpu") or {"rows": []})["rows"]
    found = [known for known in rows if all(known[key] == value for key, value in wanted.items())]
    return found[0].get("seconds_per_step") if found else None


def count_row(model: str, base: str, resolution: int, compiled: bool) -> dict[str, Any]:
    """Counts and predicts one row of the result."""
    row = {"model": model, "base": base, "resolution": resolution, "rank": RANKS[model], "compiled": compiled}
    flags = ("--rank", RANKS[model], *BASES[base])
    row |= count_step(bare_training.read_architecture(model), resolution, flags, compiled)
    row["predicted_seconds"] = {
        name: seconds if fits(row, CARDS[name]) else None for name, seconds in row["predicted_seconds"].items()
    }
    return row


def main(args: argparse.Namespace) -> None:
    """Counts the missing rows and writes the result after each."""
    logging.disable(logging.WARNING)
    rows = [] if args.again else (read_result("step_cost") or {"rows": []})["rows"]
    keys = ("model", "base", "resolution", "compiled")
    wanted = [(m, b, s, c) for c in (False, True) for s in SIZES for m in MODELS for b in BASES]
    for row in [row for row in wanted if args.only in (None, row[0])]:
        if row in [tuple(known[key] for key in keys) for known in rows]:
            continue
        rows.append(count_row(*row))
        rows.sort(key=lambda known: wanted.index(tuple(known[key] for key in keys)))
        for known in rows:
            known["measured_seconds_h200"], known["measured_by_predicted"] = measured(known), None
            if known["measured_seconds_h200"]:
                known["measured_by_predicted"] = known["measured_seconds_h200"] / known["predicted_seconds"]["H200"]
        peaks = {name: vars(card) for name, card in CARDS.items()}
        write_result("step_cost", {"peaks": peaks, "fractions": FRACTIONS, "launch_seconds": LAUNCH, "rows": rows})
        print(*row, json.dumps(rows[-1]["predicted_seconds"]), flush=True)
    print(f"{len(rows)} rows in {HERE / 'step_cost.json'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Counts the GPU kernels of a training step and predicts their time.")
    parser.add_argument("--only", choices=MODELS, help="count only the rows of this model")
    parser.add_argument("--again", action="store_true", help="discard the stored rows and count all again")
    main(parser.parse_args())
