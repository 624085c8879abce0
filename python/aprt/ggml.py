"""Looks at tensors of ggml in memory: what a graph node is made of, and its values.

The library has no function that gives strides and sources, so the struct is declared here. It is
compared with the library's own idea of it before the first value is read; another layout is
refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import llama_cpp
import numpy as np
from llama_cpp import _ggml
from llama_cpp._ctypes_extensions import load_shared_library

from .errors import AprtError

_OBJECT_BYTES = 32  # what a ggml context keeps beside each tensor (GGML_OBJECT_SIZE)
_CPU, _ACCELERATOR = 0, 3  # enum ggml_backend_dev_type
_NUMPY = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "i32": np.dtype("<i4")}


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`. Dimensions and strides are innermost first, strides in bytes."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]

_base = load_shared_library("ggml-base", _ggml.libggml_base_path)
_registry = _ggml.libggml


def _declare(library, name: str, result, *arguments):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


_op_desc = _declare(_base, "ggml_op_desc", ctypes.c_char_p, ctypes.c_void_p)
_type_name = _declare(_base, "ggml_type_name", ctypes.c_char_p, ctypes.c_int)
_get_name = _declare(_base, "ggml_get_name", ctypes.c_void_p, ctypes.c_void_p)
_overhead = _declare(_base, "ggml_tensor_overhead", ctypes.c_size_t)
_is_host = _declare(_base, "ggml_backend_buffer_is_host", ctypes.c_bool, ctypes.c_void_p)
_device_count = _declare(_registry, "ggml_backend_dev_count", ctypes.c_size_t)
_device = _declare(_registry, "ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_device_name = _declare(_base, "ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
_device_type = _declare(_base, "ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)


def tensor_at(address: int) -> Tensor:
    return Tensor.from_address(address)


def check_layout(address: int) -> None:
    """Refuses a library whose tensors are laid out otherwise; `address` is one of its tensors."""
    named = _get_name(address) - address == Tensor.name.offset
    if not named or _overhead() != ctypes.sizeof(Tensor) + _OBJECT_BYTES:
        raise AprtError(
            f"llama-cpp-python {llama_cpp.__version__}: its tensors have another memory layout "
            "than this version of apr-oracle reads; 0.3.36 is known to work"
        )


def accelerators() -> list[str]:
    """Devices that take part in a computation on the CPU, such as BLAS: another arithmetic."""
    devices = [_device(i) for i in range(_device_count())]
    return [_device_name(d).decode() for d in devices if _device_type(d) == _ACCELERATOR]


def op(tensor: Tensor) -> str:
    """The operation, of unary and gated ones the function: `MUL_MAT`, `SWIGLU`."""
    return _op_desc(ctypes.addressof(tensor)).decode()


def name(tensor: Tensor) -> str:
    return tensor.name.decode(errors="replace")


def sources(tensor: Tensor) -> Iterator[Tensor]:
    return (source.contents for source in tensor.src if source)


def float_param(tensor: Tensor, index: int) -> np.float32:
    return np.frombuffer(tensor.op_params, "<f4")[index]


def values(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array of its four dimensions, outermost first; not a copy."""
    kind = _type_name(tensor.type).decode()
    if kind not in _NUMPY:
        raise AprtError(f"{name(tensor)}: computed as {kind}, which is not read")
    buffer = tensor.view_src.contents.buffer if tensor.view_src else tensor.buffer
    # A tensor without a buffer lies in the memory of its context, as the CPU's do.
    if not tensor.data or (buffer and not _is_host(buffer)):
        raise AprtError(f"{name(tensor)}: is not in the memory of the CPU")
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    extent = _NUMPY[kind].itemsize + sum(
        (n - 1) * stride for n, stride in zip(shape, strides, strict=True)
    )
    memory = (ctypes.c_char * extent).from_address(tensor.data)
    return np.ndarray(shape, _NUMPY[kind], memory, 0, strides)
