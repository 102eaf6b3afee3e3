"""Counts the bytes of all live tensor storages, on real tensors and on fake ones that have a shape and no memory.

`LiveStorages` sees every operator below autograd: a storage counts from the operator that makes it until Python and
autograd have let it go. That is what a caching allocator is asked for; what it adds by itself (fragments, workspaces of
libraries, the CUDA context) is not seen.
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
    """Bytes alive now and at most, among the storages that operators made while the mode was on."""

    def __init__(self, grain: int = GRAIN) -> None:
        """`grain` is what sizes are rounded up to."""
        super().__init__()
        self.grain, self.sizes, self.now, self.peak = grain, {}, 0, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the operator and counts what it made."""
        result = operator(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.add(value.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage until it is gone; views share theirs and count once."""
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // self.grain) * self.grain
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key).atexit = False

    def drop(self, key: int) -> None:
        """A storage is gone."""
        self.now -= self.sizes.pop(key)

    def restart(self) -> None:
        """The peak from now on."""
        self.peak = self.now


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """What scaled_dot_product_attention is on a GPU; without one PyTorch would choose another kernel."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def fused_rms_norm(hidden: torch.Tensor, shape: Any, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
    """What rms_norm is on a GPU: one kernel, where the CPU makes six temporaries."""
    return torch.ops.aten._fused_rms_norm(hidden, list(shape), weight, eps)[0]


def fake_item(tensor: torch.Tensor) -> float:
    """A number where a fake tensor has none: 1.0, and 0 where it may be an index."""
    return 1.0 if tensor.is_floating_point() else 0


def fake_list(tensor: torch.Tensor) -> Any:
    """Nested lists of such numbers."""
    return [fake_list(row) for row in tensor.unbind()] if tensor.dim() else fake_item(tensor)


@contextlib.contextmanager
def planned(counter: LiveStorages) -> Iterator[None]:
    """Inside, tensors are fake, the kernels are those of a GPU, and `counter` counts.

    Everything is on the fake CPU: PyTorch runs no backward pass on a GPU that is not there. Modules stay where they
    are, because moving the parameters of one does not work on fake tensors.
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
