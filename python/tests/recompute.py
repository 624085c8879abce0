"""Every stage recomputed in float64 numpy from the captured values it is made of.

Written from the formulas, not from the model's source: a stage under a wrong name, of a wrong layer
or in a wrong layout does not agree with its captured inputs.
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    shares = np.exp(x - x.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def rope_frequencies(head_dim, rope):
    """Angular frequency of each pair; `llama3` slows the long wavelengths down."""
    frequencies = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope["rope_type"] == "default":
        return frequencies
    assert rope["rope_type"] == "llama3"
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (keep + (1 - keep) / rope["factor"])


def rotate(x, positions, frequencies):
    """RoPE on the halves of each head: pair i is channels (i, i + half). x: [row, head, channel]"""
    pairs = x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]
    turned = pairs * np.exp(1j * np.multiply.outer(positions, frequencies))[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


class Recomputation:
    """Checks the steps of one sequence; `weights` are float64, by parameter name.

    A stage that the engine fuses away is recomputed with the one that it is fused into. Subclasses
    round what their engine rounds, in `linear`, `cached` and `operand`.
    """

    def __init__(self, weights, config, rope):
        self.weights, self.config = weights, config
        self.eps = config["rms_norm_eps"]
        self.frequencies = rope_frequencies(config["head_dim"], rope)
        self.keys = [[] for _ in range(config["num_hidden_layers"])]
        self.values = [[] for _ in range(config["num_hidden_layers"])]

    def linear(self, x, *names):
        """The product with the weights of some modules, concatenated."""
        return np.concatenate([x @ self.weights[f"{name}.weight"].T for name in names], axis=-1)

    def expert_linear(self, x, chosen, name):
        """The product of each row with the weights of each expert that it is sent to.

        x: [row, channel], or [row, slot, channel] where the experts have an input each.
        """
        weights = self.weights[f"{name}.weight"]
        result = np.empty((*chosen.shape, weights.shape[1]))
        for row, slot in np.ndindex(chosen.shape):
            own = x[row] if x.ndim == 2 else x[row, slot]
            result[row, slot] = weights[chosen[row, slot]] @ own
        return result

    def cached(self, x):
        """Keys or values, as they are in the cache."""
        return x

    def operand(self, x):
        """Queries or shares, as they are multiplied with what is in the cache."""
        return x

    def fused_attention(self, q, keys, values, visible):
        """softmax(q k) v of each head, [row, head, channel], where only the result is known."""
        scores = np.einsum("rhc,khc->hrk", self.operand(q), keys) / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True)) * visible
        shares /= shares.sum(axis=-1, keepdims=True)
        return np.einsum("hrk,khc->rhc", shares, values)

    def step(self, step):
        """Yields the name and the recomputed value of every tensor of a step."""
        got = {name: value.astype(np.float64) for name, value in step.items()}
        weights, positions = self.weights, np.array(step.manifest["positions"])
        residual = got["embedding"]
        yield "embedding", weights["model.embed_tokens.weight"][step.manifest["token_ids"]]
        for i in range(self.config["num_hidden_layers"]):
            layer = {
                name.removeprefix(f"layers.{i}."): value
                for name, value in got.items()
                if name.startswith(f"layers.{i}.")
            }
            for stage, value in self._layer(i, residual, layer, positions):
                yield f"layers.{i}.{stage}", value
            residual = layer["post_ffn_residual"]
        yield "final_norm", rms_norm(residual, weights["model.norm.weight"], self.eps)
        head = "lm_head" if "lm_head.weight" in weights else "model.embed_tokens"
        yield "lm_head", self.linear(got["final_norm"], head)

    def _layer(self, i, residual, got, positions):
        c = self.config
        heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        n = len(positions)

        def module(name):
            return f"model.layers.{i}.{name}"

        def norm(x, name):
            return rms_norm(x, self.weights[module(f"{name}.weight")], self.eps)

        yield "attn_norm", norm(residual, "input_layernorm")
        projections = [module(f"self_attn.{p}_proj") for p in "qkv"]
        yield "qkv_matmul", self.linear(got["attn_norm"], *projections)
        qkv = got["qkv_matmul"]
        if c["attention_bias"]:
            bias = np.concatenate([self.weights[f"{name}.bias"] for name in projections])
            yield "qkv_bias", qkv + bias
            qkv = got["qkv_bias"]
        q, k, v = np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=-1)
        q, k = q.reshape(n, heads, dim), k.reshape(n, kv_heads, dim)
        if c["qk_norm"]:
            yield "q_norm", norm(q, "self_attn.q_norm")
            yield "k_norm", norm(k, "self_attn.k_norm")
            q, k = got["q_norm"], got["k_norm"]
        yield "q_post_rope", rotate(q, positions, self.frequencies)
        yield "k_post_rope", rotate(k, positions, self.frequencies)
        yield from self._attention(i, got, v.reshape(n, kv_heads, dim), positions)

        def biased(x, name):
            bias = self.weights.get(module(f"{name}.bias"), 0.0)
            return self.linear(x, module(name)) + bias

        yield "attn_out", biased(got["attention"], "self_attn.o_proj")
        yield "post_attn_residual", residual + got["attn_out"]
        yield "ffn_norm", norm(got["post_attn_residual"], "post_attention_layernorm")
        if "moe_router" in got:
            yield from self._experts(got, module)
        else:
            yield "ffn_gate", biased(got["ffn_norm"], "mlp.gate_proj")
            yield "ffn_up", biased(got["ffn_norm"], "mlp.up_proj")
            yield from self._swiglu(got, "ffn")
            yield "ffn_out", biased(got["ffn_swigl"], "mlp.down_proj")
        yield "post_ffn_residual", got["post_attn_residual"] + got["ffn_out"]

    def _swiglu(self, got, prefix):
        activated = silu(got[f"{prefix}_gate"])
        if f"{prefix}_silu" in got:
            yield f"{prefix}_silu", activated
        yield f"{prefix}_swigl", got.get(f"{prefix}_silu", activated) * got[f"{prefix}_up"]

    def _experts(self, got, module):
        x, chosen = got["ffn_norm"], got["moe_router_indices"].astype(int)
        yield "moe_router", self.linear(x, module("mlp.gate"))
        shares = softmax(got["moe_router"])
        order = np.argsort(-shares, axis=-1)
        yield "moe_router_indices", order[:, : self.config["num_experts_per_tok"]]
        weights = np.take_along_axis(shares, chosen, axis=-1)
        if self.config["norm_topk_prob"]:
            weights /= weights.sum(axis=-1, keepdims=True)
        yield "moe_router_weights", weights

        def projection(x, name):
            return self.expert_linear(x, chosen, module(f"mlp.experts.{name}"))

        yield "moe_expert_gate", projection(x, "gate_proj")
        yield "moe_expert_up", projection(x, "up_proj")
        yield from self._swiglu(got, "moe_expert")
        yield "moe_expert_out", projection(got["moe_expert_swigl"], "down_proj")
        yield "ffn_out", np.einsum("rs,rsc->rc", got["moe_router_weights"], got["moe_expert_out"])

    def _attention(self, i, got, v, positions):
        q = got["q_post_rope"]
        self.keys[i].append(self.cached(got["k_post_rope"]))
        self.values[i].append(self.cached(v))
        group = q.shape[1] // v.shape[1]
        keys = np.repeat(np.concatenate(self.keys[i]), group, axis=1)
        values = np.repeat(np.concatenate(self.values[i]), group, axis=1)
        visible = np.arange(len(keys))[None, :] <= positions[:, None]
        if "attn_scores" in got:
            scores = np.einsum("rhc,khc->hrk", self.operand(q), keys) / np.sqrt(q.shape[-1])
            yield "attn_scores", np.where(visible, scores, 0)
            shares = np.exp(got["attn_scores"]) * visible
            yield "attn_softmax", shares / shares.sum(axis=-1, keepdims=True)
            attention = np.einsum("hrk,khc->rhc", self.operand(got["attn_softmax"]), values)
        else:
            attention = self.fused_attention(q, keys, values, visible)
        yield "attention", attention.reshape(len(q), -1)
