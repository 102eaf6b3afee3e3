"""What the end-to-end tests share: watching a run from inside, and reading back what it wrote."""

import functools
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

LORA = "pytorch_lora_weights.safetensors"


def has_fp8_kernel() -> bool:
    """Whether the CPU multiplies FP8 matrices with a scale per row."""
    values, scales = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(values, values.t(), scales, scales.t(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


NO_KERNEL = (
    f"PyTorch {torch.__version__} has no CPU kernel for FP8 products with a scale per row; its GPU kernels are there"
)
needs_fp8 = pytest.mark.skipif(not has_fp8_kernel(), reason=NO_KERNEL)


def around_updates(monkeypatch, script: Any, before: Any = None, after: Any = None) -> None:
    """Has `before(training)` and `after(training)` called around every step of the optimizer."""

    def prepare(*given: Any, original: Any = script.prepare_training) -> Any:
        training = original(*given)
        step = training.optimizer.step

        @functools.wraps(step)
        def stepped(*arguments: Any, **named: Any) -> Any:
            if before:
                before(training)
            result = step(*arguments, **named)
            if after:
                after(training)
            return result

        training.optimizer.step = stepped
        return training

    monkeypatch.setattr(script, "prepare_training", prepare)


def spy(monkeypatch, owner: Any, name: str) -> list[SimpleNamespace]:
    """Records every call of `owner.name` as (args, kwargs, result) and lets it through."""
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def recorded(*args, **kwargs):
        call = SimpleNamespace(args=args, kwargs=kwargs, result=None)
        calls.append(call)
        call.result = original(*args, **kwargs)
        return call.result

    monkeypatch.setattr(owner, name, recorded)
    return calls


def forbid(monkeypatch, owner: Any, *names: str) -> None:
    """Makes every call of these functions a failure."""
    for name in names:

        def refuse(*_args, _name=name, **_kwargs):
            raise AssertionError(f"{_name} was called")

        monkeypatch.setattr(owner, name, refuse)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def column(folder: Path, key: str) -> list[Any]:
    """One field of every line of metrics.jsonl."""
    return [line[key] for line in metrics(folder)]


def lora(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the final LoRA."""
    return load_file(folder / LORA)


def sha256(path: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(folder: Path) -> set[str]:
    """Every file below `folder`, as relative paths with slashes."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def trajectory(folder: Path) -> list[tuple[int, str, str]]:
    """(step, loss, gradient norm) of every step, floats in hexadecimal: equal means equal to the last bit."""
    return [(line["step"], line["loss"].hex(), line["grad_norm"].hex()) for line in metrics(folder)]


def assert_same_run(first: Path, second: Path) -> None:
    """Losses, gradient norms and LoRA weights agree to the last bit, and so does the LoRA's metadata."""
    assert trajectory(first) == trajectory(second)
    one, other = lora(first), lora(second)
    assert one.keys() == other.keys()
    assert [
        name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    ] == []
    assert lora_header(first) == lora_header(second)


def lora_header(folder: Path) -> dict[str, str]:
    """The metadata of the final LoRA."""
    with safe_open(folder / LORA, "pt") as file:
        return file.metadata()


def assert_close_runs(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    """Losses agree to a relative, LoRA weights to an absolute tolerance."""
    torch.testing.assert_close(
        torch.tensor(column(first, "loss")), torch.tensor(column(second, "loss")), rtol=tolerance, atol=tolerance
    )
    one, other = lora(first), lora(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def command_line(model: Path, photos: Path, output: Path, *flags: Any) -> list[str]:
    """The smallest quick command line, without --seed and --max_train_steps."""
    words = ["--pretrained_model_name_or_path", model, "--instance_data_dir", photos, "--output_dir", output]
    words += ["--instance_prompt", "a photo of sks toy", "--resolution", "64", "--rank", "4"]
    words += ["--max_sequence_length", "64", "--report_to", "none", "--dataloader_num_workers", "0", *flags]
    return [str(word) for word in words]
