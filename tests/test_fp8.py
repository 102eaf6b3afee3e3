"""--do_fp8_training: frozen weights in FP8 alone, one scaled matmul each way, training that follows fp32."""

import pytest
import torch
from runs import assert_same_run, column, lora, needs_fp8, spy
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from unit_parts import start_run

FP8 = ("--do_fp8_training",)
pytestmark = [needs_fp8, pytest.mark.scripts("t2i")]
# Row-wise e4m3 of 3 bits of mantissa; 3.3 to 3.7 % were seen at these widths.
FORMAT_ERROR = 0.045


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((actual.float() - expected).norm() / expected.norm()).item()


def outlier_linear(inputs: int, outputs: int) -> torch.nn.Linear:
    """A Linear without bias, a few of whose rows and columns are much larger than the rest."""
    linear = torch.nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) / inputs**0.5)
    linear.weight[::17] *= 30
    linear.weight[:, ::29] *= 10
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 384), (512, 512), (1024, 3072)])
def test_output_and_input_gradient_are_within_the_error_of_the_format(script, inputs, outputs, dtype):
    """Against fp32, with outliers in rows and columns; the dtype of the input comes back."""
    linear = outlier_linear(inputs, outputs)
    quantized = script.FP8Linear(linear, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    hidden, gradient = torch.randn(2, 50, inputs, generator=generator), torch.randn(2, 50, outputs, generator=generator)
    given = hidden.to(dtype).requires_grad_(True)
    output = quantized(given)
    output.backward(gradient.to(dtype))
    assert output.dtype == given.grad.dtype == dtype and output.shape == (2, 50, outputs)
    errors = relative_error(output, hidden @ linear.weight.T), relative_error(given.grad, gradient @ linear.weight)
    assert all(0.01 < error < FORMAT_ERROR for error in errors), errors


def test_the_weight_is_kept_in_fp8_with_a_scale_per_row_and_nothing_else(script):
    """One byte per number; an outlier row does not cost the others their precision."""
    linear = outlier_linear(512, 256)
    quantized = script.FP8Linear(linear, torch.device("cpu"))
    tensors = {**dict(quantized.named_parameters()), **dict(quantized.named_buffers())}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "weight": (torch.float8_e4m3fn, (256, 512)),
        "scales": (torch.float32, (256, 1)),
    }
    assert not any(p.requires_grad for p in quantized.parameters())
    back = quantized.weight.float() * quantized.scales
    assert ((back - linear.weight).norm(dim=1) / linear.weight.norm(dim=1)).max() < FORMAT_ERROR


def test_a_large_weight_is_quantised_in_pieces_to_the_same_bits(script, monkeypatch):
    """[dev]'s largest, in fp32 or in bf16, would need a gigabyte of the device beside what stays there."""
    linear = torch.nn.Linear(64, 2500, bias=False)
    values, scales = script.to_fp8(linear.weight.detach())
    pieces = spy(monkeypatch, script, "to_fp8")
    quantized = script.FP8Linear(linear, torch.device("cpu"))
    assert quantized.weight.view(torch.uint8).equal(values.view(torch.uint8)) and quantized.scales.equal(scales)
    sizes = [call.args[0].numel() for call in pieces]
    assert sum(sizes) == linear.weight.numel() and max(sizes) <= 1024 * 64


def test_a_token_does_not_depend_on_its_neighbours(script):
    """Scales belong to tokens: alone or in a batch beside a giant, output and gradient are the same to rounding."""
    quantized = script.FP8Linear(outlier_linear(128, 64), torch.device("cpu"))
    hidden, gradient = torch.randn(6, 128), torch.randn(6, 64)
    hidden[3], gradient[4] = 1e4, 1e4
    batch = hidden.clone().requires_grad_(True)
    output = quantized(batch[None])
    output.backward(gradient[None])
    for row in range(6):
        alone = hidden[row : row + 1].clone().requires_grad_(True)
        single = quantized(alone)
        single.backward(gradient[row : row + 1])
        torch.testing.assert_close(single, output[0, row : row + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.grad, batch.grad[row : row + 1], rtol=1e-4, atol=1e-5)


class MatmulCounter(TorchDispatchMode):
    """Counts the matrix products of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "_scaled_mm", "_scaled_mm_v2"):
            kind = "scaled" if name.startswith("_scaled") else "plain"
            self.counts[kind] = self.counts.get(kind, 0) + 1
        return func(*args, **(kwargs or {}))


def test_each_direction_of_a_frozen_layer_is_one_scaled_matmul(script):
    """No gradient of the weight, and nothing at all when the input needs none."""
    quantized = script.FP8Linear(outlier_linear(128, 128), torch.device("cpu"))
    hidden = torch.randn(10, 128, requires_grad=True)
    with MatmulCounter() as forward:
        output = quantized(hidden)
    with MatmulCounter() as backward:
        output.sum().backward()
    assert forward.counts == backward.counts == {"scaled": 1}
    assert quantized.weight.grad is None
    assert quantized(hidden.detach()).requires_grad is False


def test_only_the_weight_is_saved_for_the_backward_pass(script):
    """Not the input: that is what makes training need memory."""
    quantized, saved = script.FP8Linear(outlier_linear(128, 64), torch.device("cpu")), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quantized(torch.randn(1000, 128, requires_grad=True))
    assert sorted(tuple(t.shape) for t in saved) == [(64, 1), (64, 128)]


@pytest.fixture
def transformers_of(script, tiny, tmp_path):
    """(plain, quantised) transformer with the same random LoRA on both, in eval mode, and the run of the second."""
    runs = [start_run(script, tiny, tmp_path / name, *flags) for name, flags in (("a", ()), ("b", FP8))]
    models = []
    for run in runs:
        models.append(script.load_transformer(run).eval())
        for name, parameter in script.add_lora(run, models[-1]).items():
            parameter.data.normal_(std=0.05, generator=script.make_generator(0, name))
    return *models, runs[1]


def test_the_blocks_are_in_fp8_and_everything_else_keeps_its_precision(script, transformers_of):
    """Embedders, modulation and the last layer; the adapter stays fp32 and is all that is trained."""
    plain, quantized, _ = transformers_of
    kinds = {name: type(module) for name, module in quantized.named_modules() if isinstance(module, torch.nn.Linear)}
    frozen = {name: kind for name, kind in kinds.items() if ".lora_" not in name}
    inside = {name for name in frozen if name.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    assert len(inside) == 2 * 12 + 4 * 2
    assert {frozen[name] for name in inside} == {script.FP8Linear}
    assert {kind for name, kind in frozen.items() if name not in inside} == {torch.nn.Linear} and len(frozen) > len(
        inside
    )
    trained = {name: p.dtype for name, p in quantized.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32} and all(".lora_" in name for name in trained)
    assert trained.keys() == {name for name, p in plain.named_parameters() if p.requires_grad}


def test_frozen_blocks_take_half_the_memory_of_bf16(script, tiny, tmp_path):
    """Weights and scales together, a quarter of fp32's."""
    sizes = []
    for flags in ((), FP8):
        transformer = script.load_transformer(start_run(script, tiny, tmp_path, "--mixed_precision", "bf16", *flags))
        blocks = torch.nn.ModuleList([*transformer.transformer_blocks, *transformer.single_transformer_blocks])
        tensors = [*blocks.parameters(), *blocks.buffers()]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    assert 0.49 < sizes[1] / sizes[0] < 0.54  # scales are 4 bytes per row of 128 here, of thousands in the real models


def run_transformer(model: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    """The output for drawn inputs."""
    generator = torch.Generator().manual_seed(0)
    return model(
        hidden_states=torch.randn(batch, 16, 32, generator=generator),
        encoder_hidden_states=torch.randn(batch, 8, 96, generator=generator),
        timestep=torch.rand(batch, generator=generator),
        guidance=torch.ones(batch),
        txt_ids=torch.zeros(1, 8, 4),
        img_ids=torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4), torch.arange(1))[None],
        return_dict=False,
    )[0]


def lora_gradients(model: torch.nn.Module) -> torch.Tensor:
    """All gradients of the adapter in one row."""
    model.zero_grad(set_to_none=True)
    run_transformer(model).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_the_whole_model_is_near_the_unquantised_one_in_output_and_lora_gradient(transformers_of):
    """Errors of six blocks add up; directions agree."""
    plain, quantized, _ = transformers_of
    with torch.no_grad():
        error = relative_error(run_transformer(quantized), run_transformer(plain))
    first, second = lora_gradients(plain), lora_gradients(quantized)
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=0).item()
    assert 0 < error < 0.25 and cosine > 0.9, (error, cosine)


def test_checkpointing_recomputes_the_same_products(transformers_of):
    """Gradients to rounding, with one more forward product per layer."""
    _, quantized, _ = transformers_of
    quantized.train()
    with MatmulCounter() as plain:
        first = lora_gradients(quantized)
    quantized.enable_gradient_checkpointing()
    with MatmulCounter() as recomputed:
        second = lora_gradients(quantized)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)
    # 32 frozen layers: forward and backward, though the first block's first layers need no gradient of their input
    assert 2 * 32 - 8 <= plain.counts["scaled"] <= 2 * 32
    assert recomputed.counts["scaled"] == plain.counts["scaled"] + 32


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("row_wise", [True, False])
def test_both_kinds_of_product_compile_to_one_graph(script, monkeypatch, row_wise, needs_gradient):
    """Forward and backward, with the values of the eager ones; the first layers' inputs need no gradient."""
    monkeypatch.setattr(script.FP8Linear, "row_wise", row_wise)
    layer = script.FP8Linear(outlier_linear(128, 64), torch.device("cpu"))
    seeds = [torch.Generator().manual_seed(0) for _ in "ab"]
    inputs = [torch.randn(1, 6, 128, generator=seed).requires_grad_(needs_gradient) for seed in seeds]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outputs = [layer(inputs[0]), compiled(inputs[1])]
    for output in outputs if needs_gradient else ():
        output.square().sum().backward()
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch.testing.assert_close(*outputs)
    if needs_gradient:
        torch.testing.assert_close(*(given.grad for given in inputs))


NONE = float("inf")  # seconds of a product that this GPU or PyTorch does not have


@pytest.mark.parametrize(
    ("device", "dtype", "seconds", "row_wise"),
    [
        ("cuda", torch.bfloat16, {False: 1.0, True: 1.2}, True),
        ("cuda", torch.bfloat16, {False: 1.0, True: 3.0}, False),
        ("cuda", torch.bfloat16, {False: 1.0, True: NONE}, False),
        ("cuda", torch.bfloat16, {False: NONE, True: 1.0}, True),
        ("cuda", torch.bfloat16, {False: NONE, True: NONE}, None),
        ("cuda", torch.float32, {False: 1.0, True: 1.0}, None),
        ("mps", torch.bfloat16, {}, None),
        ("cpu", torch.float32, {}, True),
    ],
)
def test_the_faster_product_is_chosen_and_a_gpu_without_any_is_refused(
    script, monkeypatch, device, dtype, seconds, row_wise
):
    """With the alternatives."""
    monkeypatch.setattr(script.FP8Linear, "row_wise", None)
    monkeypatch.setattr(script, "time_fp8", lambda _, kind: seconds[kind])
    if row_wise is not None:
        script.check_fp8(torch.device(device), dtype)
        assert script.FP8Linear.row_wise is row_wise
        return
    with pytest.raises(script.UserError, match=r"8\.9 or higher") as error:
        script.check_fp8(torch.device(device), dtype)
    assert "--bnb_quantization_config_path" in str(error.value)


@pytest.mark.parametrize("row_wise", [True, False])
def test_a_product_is_timed_and_one_that_fails_takes_for_ever(script, monkeypatch, row_wise):
    """Row-wise kernels are not built everywhere."""

    def multiply(*_, **__):
        if script.FP8Linear.row_wise:
            raise RuntimeError("not built")

    monkeypatch.setattr(script.FP8Linear, "row_wise", True)
    monkeypatch.setattr(script, "fp8_matmul", multiply)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    found = script.time_fp8(torch.device("cpu"), row_wise)
    assert found == NONE if row_wise else 0 < found < 1


def test_scales_after_the_product_give_the_same_to_rounding(script, monkeypatch):
    """Forward and backward, with outliers; in fp32, where the product is not rounded before it is scaled."""
    linear = outlier_linear(128, 384)
    hidden, gradient = torch.randn(2, 50, 128), torch.randn(2, 50, 384)
    found = []
    for row_wise in (True, False):
        monkeypatch.setattr(script.FP8Linear, "row_wise", row_wise)
        given = hidden.clone().requires_grad_(True)
        output = script.FP8Linear(linear, torch.device("cpu"))(given)
        output.backward(gradient)
        found.append((output.detach(), given.grad))
    assert all(0 <= relative_error(a, b) < 1e-6 for a, b in zip(*found, strict=True))
    assert not all(a.equal(b) for a, b in zip(*found, strict=True)), "the second way was not taken"


@pytest.mark.e2e
def test_training_in_fp8_follows_training_in_fp32(train):
    """The same noise and data: losses within a few per cent, and another LoRA."""
    flags = ("--max_train_steps", "6", "--learning_rate", "1e-3")
    plain, quantized = train(*flags, output="a"), train(*flags, *FP8, output="b")
    ratios = [b / a for a, b in zip(column(plain, "loss"), column(quantized, "loss"), strict=True)]
    assert all(abs(ratio - 1) < 0.08 for ratio in ratios) and ratios != [1.0] * 6, ratios
    assert all(tensor.abs().max() > 0 for tensor in lora(quantized).values())


@pytest.mark.e2e
def test_a_resumed_fp8_run_is_the_run_that_was_never_stopped(script, train, monkeypatch):
    """To the last bit; going on without FP8 is another run."""
    flags = (*FP8, "--gradient_checkpointing", "--checkpointing_steps", "2", "--max_train_steps", "4")
    whole = train(*flags, output="whole")
    calls = spy(monkeypatch, script, "train_step")
    cut = train(*flags, "--max_train_steps", "2", output="cut")
    resume = ("--resume_from_checkpoint", "latest")
    assert_same_run(whole, train(*flags, *resume, output="cut"))
    assert len(calls) == 4
    with pytest.raises(script.UserError, match="do_fp8_training: was True, is False"):
        train(*flags[1:], *resume, output=cut.name)
