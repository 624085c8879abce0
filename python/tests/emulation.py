"""The arithmetic that llama.cpp's manifest declares, in numpy: what is rounded, and to what.

Everything else is in float64, so that what a captured stage is away from its emulation is what the
declaration does not explain.
"""

import numpy as np
from recompute import Recomputation

from aprt.gguf_file import ROPE_FREQS, dequantise, hf_name, open_file, settings, unpermute


def round_q8_0(x):
    """Blocks of 32: the values, and beside them the error of ggml's sums of a Q8_1 block."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        quants = np.rint(np.nan_to_num(blocks * (np.float32(127) / largest)))
    scale = largest / np.float32(127)
    stored = scale.astype(np.float16).astype(np.float64)
    sums = quants.sum(axis=-1, keepdims=True, dtype=np.float32)
    stored_sums = (scale * sums).astype(np.float16).astype(np.float64)
    return (stored * quants).reshape(x.shape), (stored_sums - stored * sums)[..., 0]


def round_q8_k(x):
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 256)
    where = np.abs(blocks).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(blocks, where, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.float32(-127) / largest
        quants = np.minimum(np.rint(np.nan_to_num(blocks * inverse)), 127)
        scale = np.where(largest == 0, 0, 1 / inverse).astype(np.float64)
    return (scale * quants).reshape(x.shape)


def round_bf16(x):
    bits = x.astype(np.float32).view(np.uint32)
    even = (bits >> 16) & 1
    return ((bits + 0x7FFF + even) & 0xFFFF0000).view(np.float32).astype(np.float64)


def round_f16(x):
    return x.astype(np.float16).astype(np.float64)


ROUND = {
    "F32": lambda x: x,
    "F16": round_f16,
    "BF16": round_bf16,
    "Q8_0": lambda x: round_q8_0(x)[0],
    "Q8_1": lambda x: round_q8_0(x)[0],
    "Q8_K": round_q8_k,
}


# Bytes of a block, of the types whose blocks have a minimum in f16 after the scale.
MINIMUM = {"Q4_1": 20, "Q5_1": 24}
# How many heads the rows of a projection are of.
ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def block_minima(tensor):
    """The minimum of each block, which ggml multiplies with the sum of a block of Q8_1."""
    blocks = tensor.data.reshape(*tensor.data.shape[:-1], -1, MINIMUM[tensor.tensor_type.name])
    return np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float64)


class LlamaCpp(Recomputation):
    """Recomputes a capture of a GGUF file in the arithmetic that its manifest declares."""

    def __init__(self, path, manifest):
        self.steps = 0
        self.threads = manifest["backend"]["threads"]
        self.kv = manifest["kv"].upper()
        self.ops = manifest["plan"]["ops"]
        file = open_file(path)
        self.types = {hf_name(name): kind for name, kind, _ in file.tensors}
        self.minima = {}
        config = manifest["model"]["config"]
        weights, factors = {}, 1.0
        for tensor in file.reader.tensors:
            values = dequantise(path, tensor).astype(np.float64)
            if tensor.name == ROPE_FREQS:
                factors = values
                continue
            name = hf_name(tensor.name)
            heads = config.get(ROTATED.get(name.split(".")[-2]))
            in_halves = file.architecture != "llama" or heads is None
            weights[name] = values if in_halves else unpermute(values, heads)
            if tensor.tensor_type.name in MINIMUM:
                minima = block_minima(tensor)
                self.minima[name] = minima if in_halves else unpermute(minima, heads)
        super().__init__(weights, config, settings(file)["rope_parameters"])
        self.frequencies = self.frequencies / factors

    def step(self, step):
        attention = [op for op in self.ops if "layers.0.attention" in op["sites"]]
        (self.attention,) = (op for op in attention if self.steps in op.get("steps", [self.steps]))
        yield from super().step(step)
        self.steps += 1

    def linear(self, x, *names):
        return np.concatenate([self._product(x, f"{name}.weight") for name in names], axis=-1)

    def _product(self, x, name):
        product = ROUND[self._activations("linear", self.types[name])](x) @ self.weights[name].T
        if name in self.minima:
            product += round_q8_0(x)[1] @ self.minima[name].T
        return product

    def expert_linear(self, x, chosen, name):
        weight = f"{name}.weight"
        rounded = ROUND[self._activations("expert_linear", self.types[weight])](x)
        product = super().expert_linear(rounded, chosen, name)
        if weight in self.minima:
            errors = round_q8_0(x)[1]
            for row, slot in np.ndindex(chosen.shape):
                own = errors[row] if errors.ndim == 2 else errors[row, slot]
                product[row, slot] += self.minima[weight][chosen[row, slot]] @ own
        return product

    def _activations(self, kind, weight):
        """What the manifest says of the ops of a kind that read weights of a type."""
        op = next(op for op in self.ops if op["op"] == kind and weight in op["weights"])
        if isinstance(op["activations"], str):
            return op["activations"]
        return op["activations"][op["weights"].index(weight)]

    def cached(self, x):
        return ROUND[self.kv](x)

    def operand(self, x):
        return ROUND[self.attention["activations"]](x)

    def fused_attention(self, q, keys, values, visible):
        if self.attention["accumulation"] != "f16":
            return super().fused_attention(q, keys, values, visible)
        result = np.empty(q.shape)
        for row, head in np.ndindex(q.shape[:2]):
            seen = visible[row]
            result[row, head] = self._online(q[row, head], keys[seen, head], values[seen, head])
        return result

    def _online(self, q, keys, values):
        """One head of one row, in as many parts of the (padded) cache as the kernel makes."""
        scores = (keys @ self.operand(q)).astype(np.float32)
        scores *= np.float32(1 / np.sqrt(len(q)))
        parts = self.threads if "/split" in self.attention["kernel"] else 1
        length = -(-(-(-len(keys) // 256) * 256) // parts)
        spans = [slice(i, i + length) for i in range(0, len(keys), length)]
        sums = [self._sum(scores[span], values[span]) for span in spans]
        largest = max(part[0] for part in sums)
        total = sum(np.exp(top - largest) * total for top, total, _ in sums)
        return sum(np.exp(top - largest) * result for top, _, result in sums) / total

    def _sum(self, scores, values):
        """The largest score, the sum of the shares against it, and that of their products in f16.

        The maximum is the one so far: where a larger one comes, the sums shrink.
        """
        channels = values.shape[-1]
        in_f16 = channels // 128 * 128 if self.attention["kernel"].endswith("-f16") else 0
        half = np.arange(channels) < in_f16

        def factor(share):
            return np.where(half, share.astype(np.float16), share).astype(np.float64)

        def rounded(sums):
            return np.where(half, sums, sums.astype(np.float32)).astype(np.float16)

        one = np.float32(1)
        total, largest, result = np.float32(0), np.float32(-np.inf), np.zeros(channels, np.float16)
        for score, value in zip(scores, values, strict=True):
            shrink, share = one, one
            if score > largest:
                shrink, largest = np.exp(largest - score), score
                result = rounded(result * factor(shrink))
            else:
                share = np.exp(score - largest)
            result = rounded(result + value * factor(share))
            total = total * shrink + share
        return largest, np.float64(total), result.astype(np.float64)
