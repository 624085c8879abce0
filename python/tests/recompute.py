"""Every stage recomputed in float64 numpy from the captured values it is made of.

Written from the formulas, not from the model's source: a stage under a wrong name, of a wrong layer
or in a wrong layout does not agree with its captured inputs.
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


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
    """Checks the steps of one sequence; `weights` are float64, by parameter name."""

    def __init__(self, weights, config, rope):
        self.weights, self.config = weights, config
        self.eps = config["rms_norm_eps"]
        self.frequencies = rope_frequencies(config["head_dim"], rope)
        self.keys = [[] for _ in range(config["num_hidden_layers"])]
        self.values = [[] for _ in range(config["num_hidden_layers"])]

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
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        yield "lm_head", got["final_norm"] @ head.T

    def _layer(self, i, residual, got, positions):
        c = self.config
        heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        n = len(positions)

        def weight(name):
            return self.weights[f"model.layers.{i}.{name}"]

        yield "attn_norm", rms_norm(residual, weight("input_layernorm.weight"), self.eps)
        projections = [weight(f"self_attn.{p}_proj.weight") for p in "qkv"]
        yield "qkv_matmul", got["attn_norm"] @ np.concatenate(projections).T
        qkv = got["qkv_matmul"]
        if c["attention_bias"]:
            bias = np.concatenate([weight(f"self_attn.{p}_proj.bias") for p in "qkv"])
            yield "qkv_bias", qkv + bias
            qkv = got["qkv_bias"]
        q, k, v = np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=-1)
        q, k = q.reshape(n, heads, dim), k.reshape(n, kv_heads, dim)
        if c["qk_norm"]:
            yield "q_norm", rms_norm(q, weight("self_attn.q_norm.weight"), self.eps)
            yield "k_norm", rms_norm(k, weight("self_attn.k_norm.weight"), self.eps)
            q, k = got["q_norm"], got["k_norm"]
        yield "q_post_rope", rotate(q, positions, self.frequencies)
        yield "k_post_rope", rotate(k, positions, self.frequencies)

        self.keys[i].append(got["k_post_rope"])
        self.values[i].append(v.reshape(n, kv_heads, dim))
        group = heads // kv_heads
        keys = np.repeat(np.concatenate(self.keys[i]), group, axis=1)
        values = np.repeat(np.concatenate(self.values[i]), group, axis=1)
        visible = np.arange(len(keys))[None, :] <= positions[:, None]
        scores = np.einsum("rhc,khc->hrk", got["q_post_rope"], keys) / np.sqrt(dim)
        yield "attn_scores", np.where(visible, scores, 0)
        shares = np.exp(got["attn_scores"]) * visible
        yield "attn_softmax", shares / shares.sum(axis=-1, keepdims=True)
        yield "attention", np.einsum("hrk,khc->rhc", got["attn_softmax"], values).reshape(n, -1)
        yield "attn_out", got["attention"] @ weight("self_attn.o_proj.weight").T + self._bias(i)
        yield "post_attn_residual", residual + got["attn_out"]

        yield (
            "ffn_norm",
            rms_norm(
                got["post_attn_residual"], weight("post_attention_layernorm.weight"), self.eps
            ),
        )
        yield "ffn_gate", got["ffn_norm"] @ weight("mlp.gate_proj.weight").T
        yield "ffn_up", got["ffn_norm"] @ weight("mlp.up_proj.weight").T
        yield "ffn_silu", silu(got["ffn_gate"])
        yield "ffn_swigl", got["ffn_silu"] * got["ffn_up"]
        yield "ffn_out", got["ffn_swigl"] @ weight("mlp.down_proj.weight").T
        yield "post_ffn_residual", got["post_attn_residual"] + got["ffn_out"]

    def _bias(self, i):
        return self.weights.get(f"model.layers.{i}.self_attn.o_proj.bias", 0.0)
