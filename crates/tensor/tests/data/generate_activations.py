"""Writes activations rounded by ggml's own CPU backend, x86 build.

    pip install llama-cpp-python && python crates/tensor/tests/data/generate_activations.py

`activations.bin` holds, little-endian: 16 rows of 256 f32; the rows as Q8_0, as Q8_1 and as Q8_K blocks; for
each row the f32 dot product of its Q8_1 blocks with blocks 24 to 31 of Q4_1.bin, then of Q5_1.bin.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

HERE = Path(__file__).parent
GGML = ctypes.CDLL(str(Path(llama_cpp.__file__).with_name("lib") / "libggml-cpu.so"))
ROWS, COLS = 16, 256


def rows() -> np.ndarray:
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (ROWS, COLS))
    x[2] *= 10.0 ** rng.uniform(-6, 6, COLS)
    x[3] = rng.integers(-254, 255, COLS) / 2  # ties ...
    x[3, ::32] = 127  # ... in every block of 32 and in the one of 256
    x[4] = -x[3]
    x[5] = 0
    x[6, :96] = 0
    x[7] *= 1e-5  # scales that are subnormal in f16
    x[8] *= 1e-8  # and zero
    x[9] *= 1e7  # and infinite
    x[10, 17] = 1000  # one massive channel
    x[11] = rng.choice([-3.0, 3.0], COLS)  # the largest magnitude in both signs
    x[12] *= 1e-30
    x[13] = rng.normal(0, 1, COLS) ** 5
    x[14] = np.abs(x[14])
    x[15] = -np.abs(x[15])
    return x.astype(np.float32)


def quantize(x: np.ndarray, name: str, size: int) -> bytes:
    out = (ctypes.c_uint8 * size)()
    GGML[f"quantize_row_{name}"](x.ctypes.data_as(ctypes.c_void_p), out, ctypes.c_int64(x.size))
    return bytes(out)


def dot(name: str, weights: bytes, x: bytes) -> np.float32:
    out, zero = ctypes.c_float(), ctypes.c_size_t(0)
    GGML[f"ggml_vec_dot_{name}_q8_1"](
        ctypes.c_int(COLS), ctypes.byref(out), zero, weights, zero, x, zero, ctypes.c_int(1)
    )
    return np.float32(out.value)


def main() -> None:
    GGML.ggml_cpu_init()
    x = rows()
    q8_1 = [quantize(row, "q8_1", COLS // 32 * 36) for row in x]
    parts = [x.astype("<f4").tobytes()]
    parts += [quantize(row, "q8_0", COLS // 32 * 34) for row in x]
    parts += q8_1
    parts += [quantize(row, "q8_K", 292) for row in x]
    for name, size in (("q4_1", 20), ("q5_1", 24)):
        weights = (HERE / f"{name.upper()}.bin").read_bytes()[24 * size : 32 * size]
        parts += [dot(name, weights, row).astype("<f4").tobytes() for row in q8_1]
    (HERE / "activations.bin").write_bytes(b"".join(parts))


if __name__ == "__main__":
    main()
