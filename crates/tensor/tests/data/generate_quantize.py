"""Writes how well ggml's own quantisers do.

    pip install llama-cpp-python gguf && python crates/tensor/tests/data/generate_quantize.py

`quantize.txt` has a line for each type, with and without importance, and kind of input: the root mean square of the error of ggml's blocks,
weighted as ggml weighs it for that type (`weights` below), and the FNV-1a hash of the blocks.
Inputs are made by `../quantize/inputs.rs` in the same way, except for `quantize_trained.bin`: rows of fixtures/pycoder-3m, in bf16.
"""

import ctypes
import json
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

HERE = Path(__file__).parent
GGML = ctypes.CDLL(str(Path(llama_cpp.__file__).with_name("lib") / "libggml-base.so"))
GGML.ggml_quantize_chunk.restype = ctypes.c_size_t
ROWS, COLS = 8, 512
MASK = (1 << 64) - 1
TYPES = "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()
TRAINED = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]


class Rng:
    """SplitMix64."""

    def __init__(self, seed: int):
        self.state = seed

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def normal(self) -> float:
        """Nearly: the sum of twelve uniform numbers, which is the same on every machine."""
        return sum(self.next() >> 40 for _ in range(12)) / 2.0**24 - 6.0


def normals(seed: int, count: int = ROWS * COLS) -> np.ndarray:
    rng = Rng(seed)
    return np.array([rng.normal() for _ in range(count)])


def trained() -> np.ndarray:
    """Parts of two matrices, as bf16 bits."""
    file = (HERE / "../../../../fixtures/pycoder-3m/model.safetensors").read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    header, parts = json.loads(file[8:start]), []
    for name in TRAINED:
        begin = start + header[name]["data_offsets"][0]
        parts.append(np.frombuffer(file, "<u2", ROWS * COLS // 2, begin))
    return np.concatenate(parts)


def inputs() -> dict[str, np.ndarray]:
    x = {
        "gaussian": normals(1),
        "heavy_tailed": normals(2) ** 3,
        "one_sided": np.abs(normals(3)) + 0.5,
        "outliers": np.where(np.arange(ROWS * COLS) % 256 == 77, 40.0, normals(4)),
        "uneven": normals(5) * 2.0 ** (np.arange(ROWS * COLS) // 16 % 8 - 3.0),
        "small": normals(6) * 1e-4,
        "tiny": normals(7) * 1e-6,
        "constant": np.full(ROWS * COLS, 0.1),
        "zeros": np.zeros(ROWS * COLS),
    }
    rows = (trained().astype(np.uint32) << 16).view(np.float32).reshape(ROWS, COLS)
    return {k: v.astype(np.float32).reshape(ROWS, COLS) for k, v in x.items()} | {"trained": rows}


def importance() -> np.ndarray:
    return (normals(8, COLS) ** 4 + 1e-3).astype(np.float32)


def quantize(name: str, x: np.ndarray, imatrix: np.ndarray | None) -> np.ndarray:
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    out = np.zeros((ROWS, COLS // block * size), np.uint8)
    pointer = lambda a: a.ctypes.data_as(ctypes.c_void_p) if a is not None else None
    rows, cols = ctypes.c_int64(ROWS), ctypes.c_int64(COLS)
    GGML.ggml_quantize_chunk(int(kind), pointer(x), pointer(out), ctypes.c_int64(0), rows, cols, pointer(imatrix))
    return out


def weights(name: str, x: np.ndarray, imatrix: np.ndarray | None) -> np.ndarray:
    """What ggml minimises the square error with."""

    def mean_square(n: int) -> np.ndarray:
        return np.repeat((x.reshape(-1, n) ** 2).mean(1), n).reshape(x.shape)

    if imatrix is not None:
        match name:
            case "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1":
                return imatrix * np.sqrt(mean_square(COLS) + x**2)
            case "IQ4_NL":
                return imatrix * np.sqrt(2 * mean_square(32) + x**2)
            case "Q3_K" | "Q4_K" | "Q5_K" | "IQ4_XS":
                return imatrix * np.sqrt(2 * mean_square(256) + x**2)
            case "Q2_K":
                return imatrix * np.sqrt(mean_square(256) + x**2)
            case _:
                return np.broadcast_to(imatrix, x.shape)
    match name:
        case "Q3_K" | "Q6_K" | "IQ4_NL" | "IQ4_XS":
            return x**2
        case "Q2_K":
            return np.abs(x)
        case "Q4_K" | "Q5_K":
            return np.sqrt(mean_square(32)) + np.abs(x)
        case _:
            return np.ones_like(x)


def fnv(data: bytes) -> int:
    hash = 0xCBF29CE484222325
    for byte in data:
        hash = ((hash ^ byte) * 0x100000001B3) & MASK
    return hash


def main() -> None:
    trained().tofile(HERE / "quantize_trained.bin")
    lines = []
    for name in TYPES:
        for imatrix in (None, importance()):
            for kind, x in inputs().items():
                blocks = quantize(name, x, imatrix)
                exact = x.astype(np.float64)
                error = (dequantize(blocks, GGMLQuantizationType[name]).astype(np.float64) - exact) ** 2
                weight = weights(name, exact, None if imatrix is None else imatrix.astype(np.float64))
                weighted = np.sqrt((weight * error).sum() / max(weight.sum(), 1e-300))
                which = "none" if imatrix is None else "importance"
                lines.append(f"{name} {kind} {which} {weighted:.6e} {fnv(blocks.tobytes()):016x}")
    (HERE / "quantize.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
