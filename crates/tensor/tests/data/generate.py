"""Writes golden dequantisations by the `gguf` Python package, one file per block type.

    pip install gguf && python crates/tensor/tests/data/generate.py

`TYPE.bin` holds n blocks as a GGUF file would, then the f32 that `gguf.quants.dequantize` makes of
them, little-endian; n follows from the length of the file. The first blocks are edge cases: the
scales of EDGES, with random quants, all-zero bits and all-one bits in turn.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

# Byte offsets of the f16 scales in a block. MXFP4 has an exponent of one byte instead.
SCALES = {
    "BF16": [],
    "F16": [],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "TQ1_0": [52],
    "TQ2_0": [64],
    "MXFP4": [],
}
# 0, -0, subnormals, 1, -1, the greatest finite ones, infinities, a quiet and a signalling NaN.
EDGE_SCALES = [
    0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x3C00, 0xBC00,
    0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7C01,
]  # fmt: skip
# First and second scale of a block; signs of zero need pairs of their own.
EDGES = [*zip(EDGE_SCALES, reversed(EDGE_SCALES)), (0, 0), (0x8000, 0), (0x8000, 0x8000)]


MXFP4_EXPONENTS = [0, 1, 2, 3, 126, 127, 128, 253, 254, 255]


def blocks(rng: np.random.Generator, size: int, scales: list[int], count: int) -> np.ndarray:
    out = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for i, block in enumerate(out):
        edge = i < len(EDGES)
        if edge and i % 3 != 0:
            block[:] = (None, 0x00, 0xFF)[i % 3]
        for k, at in enumerate(scales):
            bits = EDGES[i][k] if edge else int(np.float16(rng.normal(0, 0.1)).view(np.uint16))
            block[at], block[at + 1] = bits & 0xFF, bits >> 8
    return out


def main() -> None:
    rng = np.random.default_rng(1)
    for name, scales in SCALES.items():
        dtype = GGMLQuantizationType[name]
        length, size = GGML_QUANT_SIZES[dtype]
        count = {1: 1024, 32: 48, 256: 22}[length]
        stored = blocks(rng, size, scales, count)
        if name == "MXFP4":
            stored[-len(MXFP4_EXPONENTS) :, 0] = MXFP4_EXPONENTS
        with np.errstate(all="ignore"):
            # Types of one element per block are rows of 1024 of them to the package.
            values = dequantize(stored.reshape(1, -1) if length == 1 else stored, dtype)
        assert values.dtype == np.float32 and values.size == count * length, name
        path = Path(__file__).with_name(f"{name}.bin")
        path.write_bytes(stored.tobytes() + values.astype("<f4").tobytes())


if __name__ == "__main__":
    main()
