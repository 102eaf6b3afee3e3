"""Count the bytes of all live tensor storages, on real and on fake tensors.

`LiveStorages` sees every operator below autograd: a storage counts from the operator that creates it until Python and
autograd release it. This is what the caching allocator is asked for, without its own overhead (fragmentation, library
workspaces, the CUDA context).
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRAIN = 512  # bytes: PyTorch's CUDA allocator rounds up to this


class LiveStorages(TorchDispatchMode):
    """Current and peak bytes of the storages that operators created while the mode was on."""

    def __init__(self, grain: int = GRAIN) -> None:
        """Sizes are rounded up to multiples of `grain`."""
        super().__init__()
        self.grain, self.sizes, self.now, self.peak = grain, {}, 0, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the operator and counts its outputs."""
        result = operator(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.add(value.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage until it is freed; views share a storage and count once."""
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // self.grain) * self.grain
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key).atexit = False

    def drop(self, key: int) -> None:
        """Subtracts a freed storage."""
        self.now -= self.sizes.pop(key)

    def restart(self) -> None:
        """Resets the peak."""
        self.peak = self.now


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """The GPU kernel of scaled_dot_product_attention; without a GPU PyTorch would choose another one."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def fused_rms_norm(hidden: torch.Tensor, shape: Any, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
    """The GPU kernel of rms_norm: a single one, where the CPU makes six temporaries."""
    return torch.ops.aten._fused_rms_norm(hidden, list(shape), weight, eps)[0]


def fake_item(tensor: torch.Tensor) -> float:
    """Stands for a fake tensor's missing value: 1.0, or 0 for integers, which may be indices."""
    return 1.0 if tensor.is_floating_point() else 0


def fake_list(tensor: torch.Tensor) -> Any:
    """Nested lists of `fake_item`."""
    return [fake_list(row) for row in tensor.unbind()] if tensor.dim() else fake_item(tensor)


@contextlib.contextmanager
def planned(counter: LiveStorages) -> Iterator[None]:
    """Inside this context tensors are fake, GPU kernels are used, and `counter` counts.

    Everything is on the fake CPU, because PyTorch cannot run a backward pass on a missing GPU. `Module.to` is a no-op,
    because moving parameters does not work on fake tensors.
    """
    numbers = {"item": fake_item, "tolist": fake_list}
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counter)
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", flash_attention))
        stack.enter_context(mock.patch.object(F, "rms_norm", fused_rms_norm))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module))
        for name, function in numbers.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, function, create=True))
        yield
