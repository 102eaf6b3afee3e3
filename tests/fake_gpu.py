"""A GPU that is not there: tensors that say `cuda:0`, have a shape and no memory; and what would make the host wait.

Inside `pretended_gpu()` this process has one GPU by name. Tensors made there are fake ones (`FakeTensorMode`), so every
operator checks shapes and devices, and nothing is computed: a CPU tensor that meets a CUDA tensor is an error, as on a
real GPU. The scripts are not patched. `Watch` notes what the operators below autograd do. Works with PyTorch's CPU and
CUDA builds, with and without a driver.
"""

import atexit
import contextlib
import ctypes
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "convolution",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention",
}  # fmt: skip
DATA_DEPENDENT = {"nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive"}  # of their size

STAGED = 65536  # bytes of pageable memory that the driver puts aside at once, without waiting for the device


class Watch(TorchDispatchMode):
    """Counts by place in the script: `waits` of the host for the device, `blocking` copies to it, `heavy` CPU work."""

    current: "Watch | None" = None

    def __init__(self) -> None:
        """Nothing has been seen yet."""
        super().__init__()
        self.waits, self.blocking, self.heavy, self.events = Counter(), Counter(), Counter(), []

    def __enter__(self) -> "Watch":
        """Reads of numbers, which are no operators of fake tensors, are noted here too."""
        Watch.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """From here on nothing is noted."""
        Watch.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the operator and notes what a GPU would object to. Raises TypeError for products of two dtypes."""
        kwargs = kwargs or {}
        name = operator._schema.name.removeprefix("aten::")
        result = operator(*args, **kwargs)
        inputs, outputs = ([t for t in tree_leaves(tree) if torch.is_tensor(t)] for tree in ((args, kwargs), result))
        devices = {tensor.device.type for tensor in inputs + outputs}
        if name in PRODUCTS and len({tensor.dtype for tensor in inputs if tensor.dim() > 1}) > 1:
            raise TypeError(f"{name} of {[str(tensor.dtype) for tensor in inputs]}: a GPU wants one dtype")
        if name in PRODUCTS:
            self.events.append(name)
        if devices == {"cpu"} and name in PRODUCTS:
            self.heavy[name, place()] += 1
        if "cuda" in devices and name in DATA_DEPENDENT:
            self.waits[name, place()] += 1
        if name == "bitsandbytes::int8_vectorwise_quant" and len(args) + len(kwargs) > 1:
            self.waits["int8 looks for outliers", place()] += 2  # whether there are any, and which
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], outputs[0])
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if target.device.type == "cpu":
                self.waits["copy to the host", place()] += 1
            elif hasattr(source, "block"):
                self.events.append(("copied", source.block))
            size = source.numel() * source.element_size()
            pageable = size > STAGED and not getattr(source, "pinned", False)
            if target.device.type == "cuda" and (waits or pageable) and source.dim():
                self.blocking[place(), size] += 1
        return result


def place() -> str:
    """The innermost line of a training script that leads here."""
    frame = sys._getframe(1)
    while frame is not None:
        if Path(frame.f_code.co_filename).name.startswith("train_dreambooth"):
            return f"{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the script"


def read_number(tensor: torch.Tensor) -> Any:
    """What `.item()` gives: true, one or zero. On a GPU the host waits for it."""
    if tensor.device.type == "cuda" and Watch.current:
        Watch.current.waits["a number is read", place()] += 1
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 0


def read_list(tensor: torch.Tensor) -> Any:
    """What `.tolist()` gives; one wait however long it is."""
    value = read_number(tensor.reshape(-1)[0] if tensor.numel() else tensor.new_zeros(()))
    for size in reversed(tensor.shape):
        value = [value] * size
    return value


def read_array(tensor: torch.Tensor, *_: Any, **__: Any) -> Any:
    """What `.numpy()` gives; on a GPU it is an error."""
    import numpy

    if tensor.device.type == "cuda":
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return numpy.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def pin(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """A copy in pinned memory, by its word."""
    copy = tensor.clone()
    copy.pinned = True
    return copy


def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
              scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip
    """The operator that PyTorch takes for attention on an H200: cuDNN's, in fp32 the memory-efficient one."""
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    grad = torch.is_grad_enabled() and query.requires_grad
    inputs = (query, key, value, attn_mask, grad, dropout_p, is_causal)
    if query.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_cudnn_attention(*inputs, False, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(*inputs, scale=scale)[0]


def move(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """`Module.to` for fake tensors, whose data cannot be swapped: new parameters where device or dtype changes."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in [(name, tensor) for name, tensor in table.items() if tensor is not None]:
                new = old.detach().to(device or old.device, dtype if dtype and old.is_floating_point() else old.dtype)
                if new.device != old.device or new.dtype != old.dtype:
                    table[name] = torch.nn.Parameter(new, old.requires_grad) if table is part._parameters else new
    return module


class Stream:
    """A stream on which nothing runs. `WAITS`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Any arguments will do."""

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, other: "Stream") -> None:
        """Noted as an event; what is not the main stream is the one that the script made."""
        if Watch.current:
            Watch.current.events.append("compute waits" if self is MAIN_STREAM else "side waits")


MAIN_STREAM = Stream()


class Runtime:
    """The two calls of the CUDA runtime that the scripts make."""

    def cudaHostRegister(self, *_: Any) -> int:
        return 0

    cudaHostUnregister = cudaHostRegister


@contextlib.contextmanager
def pretended_gpu() -> Iterator[FakeTensorMode]:
    """Inside, this process has an H200 by name, without memory or arithmetic."""
    let_backward_run()
    free, total = 149_000_000_000, 150_754_820_096
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": False,
               "get_device_capability": (9, 0), "get_device_name": "NVIDIA H200", "mem_get_info": (free, total),
               "is_bf16_supported": True, "is_current_stream_capturing": False, "max_memory_allocated": 0,
               "max_memory_reserved": 0, "empty_cache": None, "set_device": None, "ipc_collect": None,
               "reset_peak_memory_stats": None}  # fmt: skip
    numbers = {"item": read_number, "tolist": read_list, "numpy": read_array}
    casts = {"__int__": int, "__float__": float, "__bool__": bool, "__index__": int}
    numbers |= {name: (lambda tensor, cast=cast: cast(read_number(tensor))) for name, cast in casts.items()}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        for name, function in numbers.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, function, create=True))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", wait_for_device))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", lambda *_: wait_for_device()))
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", lambda: True))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        stack.enter_context(mock.patch.object(torch, "Stream", Stream))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", lambda *_: MAIN_STREAM))
        stack.enter_context(mock.patch.object(torch.cuda, "cudart", Runtime))
        stack.enter_context(mock.patch.object(torch.cuda, "check_error", lambda _: None))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", move))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda _: True)))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None))
        sizes = {"shape_env": ShapeEnv(), "static_shapes": True}  # int8's outliers have a size that no shape tells
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True, **sizes))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield mode


def wait_for_device(*_: Any) -> None:
    """What `torch.cuda.synchronize` does."""
    if Watch.current:
        Watch.current.waits["synchronize", place()] += 1


KEPT: list[Any] = []  # what C++ points to
HAS_PRIMARY_CONTEXT = 4  # its place among the virtual functions of AcceleratorHooksInterface, after two destructors


def let_backward_run() -> None:
    """Once per process: without a driver the autograd engine refuses the gradient of a CUDA tensor.

    It asks PyTorch's CUDA hooks whether the GPU has a context, and they fail ("hasPrimaryContext expects a valid device
    index"). Here they get a table of functions in which that one answers no; all else in it stays.
    """
    if KEPT or not torch.backends.cuda.is_built() or torch._C._cuda_getDeviceCount() > 0:
        return
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda _this, _device: False)
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library._ZN2at6detail12getCUDAHooksEv.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(library._ZN2at6detail12getCUDAHooksEv())
    size = ctypes.sizeof(ctypes.c_void_p)
    table = (ctypes.c_void_p * 128)()
    ctypes.memmove(table, hooks.value - 2 * size, ctypes.sizeof(table))  # two entries stand before the functions
    table[2 + HAS_PRIMARY_CONTEXT] = ctypes.cast(answer, ctypes.c_void_p).value
    before, hooks.value = hooks.value, ctypes.addressof(table) + 2 * size
    KEPT.extend([answer, table])
    atexit.register(lambda: setattr(hooks, "value", before))  # C++ still uses them when Python is gone


def really(function: Any) -> Any:
    """The function outside of the pretence: what is on the disk is read and written as it is."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call
