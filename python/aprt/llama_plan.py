"""What the manifest says about the arithmetic of llama.cpp on a CPU.

The graph is computed in F32; its kernels round one operand of a product to what the other is stored
in. Read off the sources of llama.cpp as of llama-cpp-python 0.3.36, and measured on x86-64 by the
tests, which recompute every stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .stages import Dims

# The type that activations are rounded to, by that of the weight.
_ROUNDED = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4"), "Q8_0"),
    **dict.fromkeys(("Q4_1", "Q5_1"), "Q8_1"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"), "Q8_K"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "Q8_K"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "Q8_K"),
}

# Flash attention's kernel, the type that it rounds queries to, and the one of its sums.
_FLASH = {
    "tiled": ("F32", "f32"),
    "vector": ("F16", "f16"),
    "split": ("F16", "f16"),
}
_TILE_ROWS = 64
_SPLIT_KEYS = 512
_CACHE_PADDING = 256


def rounded_to(weight: str) -> str | None:
    """What activations are rounded to before they meet a weight of this type."""
    return _ROUNDED.get(weight)


def flash_kernel(rows: int, keys: int) -> str:
    """Which kernel computes a step of so many rows that sees so many positions.

    `split` is `vector` on as many parts of the cache as there are threads, joined in F32.
    """
    padded = -(-keys // _CACHE_PADDING) * _CACHE_PADDING
    if rows >= _TILE_ROWS:
        return "tiled"
    return "split" if rows == 1 and padded >= _SPLIT_KEYS else "vector"


class Plan:
    """The ops of a file's graph. `types` are the stored types of its tensors, `kv` of the cache.

    `f16_shares`: flash attention rounds its shares to F16 (`flash_probe`).
    """

    def __init__(
        self, dims: Dims, types: Mapping[str, str], *, flash: bool, kv: str, f16_shares: bool
    ):
        self._dims, self._types, self._flash, self._kv = dims, types, flash, kv
        self._f16_shares = f16_shares

    def ops(self, shown: set[str], steps: Sequence[tuple[int, int]]) -> list[dict]:
        """The manifest's `plan.ops`, of the stages `shown`; `steps` are rows and positions seen.

        A run that uses several kernels of flash attention has an op of each, with its `steps`.
        """
        return [
            op | {"sites": sites}
            for op in self._ops(steps)
            if (sites := [s for s in op["sites"] if s.rpartition(".")[2] in shown])
        ]

    def _ops(self, steps: Sequence[tuple[int, int]]) -> Iterator[dict]:
        yield self._op("embedding", ["embedding"], "ggml_get_rows", ["token_embd.weight"])
        for layer in range(self._dims.layers):
            yield from self._layer(layer, steps)
        yield self._norm("final_norm", "output_norm")
        tied = "output.weight" not in self._types
        yield self._linear("lm_head", "token_embd" if tied else "output")

    def _layer(self, layer: int, steps: Sequence[tuple[int, int]]) -> Iterator[dict]:
        site, tensor = f"layers.{layer}.{{}}".format, f"blk.{layer}.{{}}".format
        yield self._norm(site("attn_norm"), tensor("attn_norm"))
        qkv = [tensor(f"attn_{part}") for part in "qkv"]
        yield self._linear(site("qkv_matmul"), *qkv)
        if self._dims.qkv_bias:
            biases = [f"{name}.bias" for name in qkv]
            yield self._op("add_bias", [site("qkv_bias")], "ggml_add", biases)
        if self._dims.qk_norm:
            for part in "qk":
                yield self._norm(site(f"{part}_norm"), tensor(f"attn_{part}_norm"))
        for part in "qk":
            yield self._op("rope", [site(f"{part}_post_rope")], "ggml_rope_ext")
        yield from self._attention(site, steps)
        yield self._linear(site("attn_out"), tensor("attn_output"))
        yield self._op("add", [site("post_attn_residual")], "ggml_add")
        yield self._norm(site("ffn_norm"), tensor("ffn_norm"))
        yield from (self._experts if self._dims.sparse(layer) else self._dense)(site, tensor)
        yield self._op("add", [site("post_ffn_residual")], "ggml_add")

    def _dense(self, site, tensor) -> Iterator[dict]:
        yield self._linear(site("ffn_gate"), tensor("ffn_gate"))
        yield self._linear(site("ffn_up"), tensor("ffn_up"))
        yield self._op("swiglu", [site("ffn_silu"), site("ffn_swigl")], "ggml_swiglu_split")
        yield self._linear(site("ffn_out"), tensor("ffn_down"))

    def _experts(self, site, tensor) -> Iterator[dict]:
        def product(stage: str, part: str) -> dict:
            weight = tensor(f"ffn_{part}_exps")
            return self._linear(site(stage), weight, op="expert_linear", kernel="ggml_mul_mat_id")

        yield self._linear(site("moe_router"), tensor("ffn_gate_inp"))
        indices = self._op("top_k", [site("moe_router_indices")], "ggml_argsort_top_k")
        yield indices | {"output": "I32"}
        yield self._op("route_weights", [site("moe_router_weights")], "ggml_soft_max/ggml_div")
        yield product("moe_expert_gate", "gate")
        yield product("moe_expert_up", "up")
        swiglu = [site("moe_expert_silu"), site("moe_expert_swigl")]
        yield self._op("swiglu", swiglu, "ggml_swiglu_split")
        yield product("moe_expert_out", "down")
        yield self._op("weighted_sum", [site("ffn_out")], "ggml_mul/ggml_add")

    def _attention(self, site, steps: Sequence[tuple[int, int]]) -> Iterator[dict]:
        if not self._flash:
            # ggml_mul_mat rounds queries and probabilities to the type of the cache.
            kv = self._kv
            yield self._op("attn_scores", [site("attn_scores")], "ggml_mul_mat", activations=kv)
            yield self._op("softmax", [site("attn_softmax")], "ggml_soft_max_ext")
            yield self._op("attn_values", [site("attention")], "ggml_mul_mat", activations=kv)
            return
        kernels = [flash_kernel(rows, keys) for rows, keys in steps]
        for kernel in dict.fromkeys(kernels):
            activations, accumulation = _FLASH[kernel]
            suffix = "-f16" if self._f16_shares and accumulation == "f16" else ""
            op = self._op(
                "flash_attention",
                [site("attention")],
                f"ggml_flash_attn_ext/{kernel}{suffix}",
                activations=activations,
                accumulation=accumulation,
            )
            own = [i for i, other in enumerate(kernels) if other == kernel]
            yield op if len(own) == len(kernels) else op | {"steps": own}

    def _norm(self, site: str, tensor: str) -> dict:
        return self._op(
            "rms_norm", [site], "ggml_rms_norm", [f"{tensor}.weight"], accumulation="f64"
        )

    def _linear(
        self, site: str, *tensors: str, op: str = "linear", kernel: str = "ggml_mul_mat"
    ) -> dict:
        weights = [f"{tensor}.weight" for tensor in tensors]
        rounded = [rounded_to(self._types[weight]) for weight in weights]
        activations = rounded[0] if len(set(rounded)) == 1 else rounded
        return self._op(op, [site], kernel, weights, activations=activations)

    def _op(
        self,
        op: str,
        sites: list[str],
        kernel: str,
        weights: Sequence[str] = (),
        *,
        activations: str | list[str] = "F32",
        accumulation: str = "f32",
    ) -> dict:
        return {
            "op": op,
            "sites": sites,
            "kernel": kernel,
            "weights": [self._types[weight] for weight in weights],
            "activations": activations,
            "accumulation": accumulation,
            "output": "F32",
        }
