"""Finds out how llama.cpp's flash attention was compiled, by having it compute one row.

Built for a processor with arithmetic in f16 (AVX512-FP16), its sums of 128 channels are one
instruction, which takes the share of a key rounded to f16. The library does not say which it is.
"""

from __future__ import annotations

import ctypes

import numpy as np
from llama_cpp import GGML_TYPE_F16, GGML_TYPE_F32, _ggml
from llama_cpp._ctypes_extensions import load_shared_library

from . import ggml

CHANNELS = 128
"""The whole multiples of this many channels of a head are affected."""

_MEMORY = 1 << 22
_Pointer = ctypes.c_void_p


class _Parameters(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", _Pointer), ("no_alloc", ctypes.c_bool)]


def rounds_shares() -> bool | None:
    """Whether the shares are rounded to f16; `None` where the library cannot be asked."""
    try:
        base = load_shared_library("ggml-base", _ggml.libggml_base_path)
        cpu = load_shared_library("ggml-cpu", _ggml.libggml_base_path)
    except (OSError, RuntimeError):  # built for several processors, one library each
        return None
    # Two keys of the scores 0 and -1. The first has the value zero, so the sum is one product.
    query, keys = np.zeros((1, CHANNELS)), np.zeros((2, CHANNELS))
    query[0, 0], keys[1, 0] = 1, -1
    values = np.stack([np.zeros(CHANNELS), np.arange(1, CHANNELS + 1)])
    found = _flash_attention(base, cpu, query, keys, values)
    share = np.exp(np.float32(-1))
    exact = (values[1] * np.float64(share)).astype(np.float16)
    half = (values[1] * np.float64(share.astype(np.float16))).astype(np.float16)
    distances = [np.abs(found * (1 + share) - sums).sum() for sums in (exact, half)]
    return bool(distances[1] < distances[0])


def _flash_attention(base, cpu, query, keys, values) -> np.ndarray:
    for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_flash_attn_ext", "ggml_new_graph"):
        getattr(base, name).restype = _Pointer
    context = _Pointer(base.ggml_init(_Parameters(_MEMORY, None, False)))
    try:

        def tensor(value: np.ndarray, kind: int, dtype: str) -> _Pointer:
            rows, channels = (ctypes.c_int64(n) for n in value.shape)
            address = base.ggml_new_tensor_2d(context, kind, channels, rows)
            ggml.values(ggml.tensor_at(address))[0, 0] = value.astype(dtype)
            return _Pointer(address)

        result = _Pointer(
            base.ggml_flash_attn_ext(
                context,
                tensor(query, GGML_TYPE_F32, "<f4"),
                tensor(keys, GGML_TYPE_F16, "<f2"),
                tensor(values, GGML_TYPE_F16, "<f2"),
                None,
                ctypes.c_float(1),
                ctypes.c_float(0),
                ctypes.c_float(0),
            )
        )
        graph = _Pointer(base.ggml_new_graph(context))
        base.ggml_build_forward_expand(graph, result)
        cpu.ggml_graph_compute_with_ctx(context, graph, 1)
        return ggml.values(ggml.tensor_at(result.value)).reshape(-1).astype(np.float64)
    finally:
        base.ggml_free(context)
