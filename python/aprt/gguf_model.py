"""A GGUF file as a Hugging Face model: the same stored weights, dequantised exactly to float32.

The configuration is built from the file's metadata, by a list of the keys that are understood: a
key of the architecture that is not on it may change the numbers, so the file is refused. Every
tensor of the file must find its parameter, and every parameter its tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .errors import AprtError
from .hf import check_architecture

ROPE_FREQS = "rope_freqs.weight"

_WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Keys of the architecture's namespace that make up the configuration.
_CONFIG_KEYS = {
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "vocab_size",
}
# Keys that do not change a forward pass.
_INERT_KEYS = {"context_length", "tensor_data_layout", "rope.scaling.original_context_length"}
# Keys that change nothing at these values.
_NEUTRAL = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (False,),
    "use_parallel_residual": (False,),
}


@dataclass(frozen=True)
class Index:
    """The file's tensors as the container names them, and the stored type of each parameter."""

    tensors: list[tuple[str, str, list[int]]]
    weight_types: dict[str, str]


def load(
    path: Path, dtype: torch.dtype, hf_config: Path | None = None
) -> tuple[torch.nn.Module, Index]:
    """The file's model, with eager attention, in `dtype` (float32 is exact)."""
    reader = _open(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    check_architecture(architecture, path)
    shapes = {t.name: t.shape.tolist() for t in reader.tensors}
    if hf_config is None:
        config = build_config(path, metadata, shapes)
    else:
        config = AutoConfig.from_pretrained(hf_config, local_files_only=True)
        if config.model_type != architecture:
            raise AprtError(
                f"{hf_config}: is of {config.model_type!r}, and {path} of {architecture!r}"
            )

    state, types, factors = {}, {}, None
    for tensor in reader.tensors:
        if tensor.name == ROPE_FREQS:
            factors = torch.from_numpy(_dequantise(path, tensor).copy())
            continue
        name = hf_name(tensor.name)
        if name is None:
            raise AprtError(f"{path}: tensor {tensor.name} is not one of a {architecture} model")
        values = _dequantise(path, tensor)
        if architecture == "llama" and (heads := _rotary_heads(tensor.name, config)):
            values = unpermute(values, heads)
        state[name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype)
        types[name] = tensor.tensor_type.name
    if config.tie_word_embeddings:
        _drop_tied_output(path, state)
        types["lm_head.weight"] = types.get("model.embed_tokens.weight")
    model = _build(path, config, state, dtype)
    if factors is not None:
        _apply_rope_factors(path, model, factors)
    tensors = [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors]
    return model, Index(tensors, types)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader checks no bounds: damage shows as errors of many kinds
        raise AprtError(
            f"{path}: not a readable GGUF file (damaged or truncated): {error}"
        ) from None


def _dequantise(path: Path, tensor: gguf.ReaderTensor) -> np.ndarray:
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise AprtError(f"{path}: tensor {tensor.name}: {error}") from None


def hf_name(name: str) -> str | None:
    """The parameter that a GGUF tensor holds."""
    if name in _WHOLE_MODEL:
        return _WHOLE_MODEL[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _PER_LAYER:
        return None
    return f"model.layers.{match[1]}.{_PER_LAYER[match[2]]}.{match[3]}"


# Configuration


def build_config(
    path: Path, metadata: Mapping, shapes: Mapping[str, list[int]]
) -> PreTrainedConfig:
    """The Hugging Face configuration that the metadata describe. `shapes` are in file order."""
    architecture = metadata["general.architecture"]
    _refuse_unknown(path, architecture, metadata)

    def need(key: str):
        value = metadata.get(f"{architecture}.{key}")
        if value is None:
            raise AprtError(f"{path}: metadata {architecture}.{key} is missing")
        return value

    def optional(key: str, default):
        return metadata.get(f"{architecture}.{key}", default)

    heads = need("attention.head_count")
    kv_heads = optional("attention.head_count_kv", heads)
    ffn = need("feed_forward_length")
    for key, value in (
        ("head_count", heads),
        ("head_count_kv", kv_heads),
        ("feed_forward_length", ffn),
    ):
        if not isinstance(value, int):
            raise AprtError(f"{path}: {key} differs between layers, which is not supported")
    head_dim = optional("attention.key_length", need("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if optional(key, head_dim) != head_dim:
            raise AprtError(
                f"{path}: {key} is {optional(key, None)}, the head size {head_dim}: not supported"
            )
    if "token_embd.weight" not in shapes:
        raise AprtError(f"{path}: tensor token_embd.weight is missing")
    settings = {
        "vocab_size": shapes["token_embd.weight"][-1],
        "hidden_size": need("embedding_length"),
        "intermediate_size": ffn,
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": optional("context_length", 2048),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": optional("rope.freq_base", 10000.0),
        },
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
    }
    if architecture != "qwen2":  # Qwen2 has it always, and no key for it
        settings["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if architecture == "llama":
        settings["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    return AutoConfig.for_model(architecture, **settings)


def _refuse_unknown(path: Path, architecture: str, metadata: Mapping) -> None:
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise AprtError(f"{path}: holds a {kind}, not a model (general.type)")
    if metadata.get("split.count", 0) > 1:
        raise AprtError(f"{path}: one of several parts; merge them first (gguf-split --merge)")
    for key, value in metadata.items():
        if not key.startswith(f"{architecture}."):
            continue
        short = key.removeprefix(f"{architecture}.")
        if short in _CONFIG_KEYS or short in _INERT_KEYS or value in _NEUTRAL.get(short, ()):
            continue
        raise AprtError(
            f"{path}: metadata {key} = {value!r} may change the numbers and is not supported; "
            "--hf-config DIR gives a configuration to use instead of the metadata"
        )


# Weights


def _rotary_heads(name: str, config: PreTrainedConfig) -> int | None:
    """How many heads a query or key projection has; None for another tensor."""
    if re.fullmatch(r"blk\.\d+\.attn_q\.(weight|bias)", name):
        return config.num_attention_heads
    if re.fullmatch(r"blk\.\d+\.attn_k\.(weight|bias)", name):
        return config.num_key_value_heads
    return None


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order of llama files, for interleaved RoPE: (pair, half) to (half, pair)."""
    rows = values.shape[0]
    paired = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return paired.swapaxes(1, 2).reshape(values.shape)


def _drop_tied_output(path: Path, state: dict[str, torch.Tensor]) -> None:
    output, embedding = state.pop("lm_head.weight", None), state.get("model.embed_tokens.weight")
    if output is not None and embedding is not None and not torch.equal(output, embedding):
        raise AprtError(
            f"{path}: output.weight is not token_embd.weight, and the configuration ties them"
        )


def _build(
    path: Path, config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    expected = {name: p.shape for name, p in model.named_parameters()}
    problems = {
        "the file lacks": expected.keys() - state.keys(),
        "the configuration has no place for": state.keys() - expected.keys(),
        "of another shape than the configuration says:": {
            name for name in expected.keys() & state.keys() if expected[name] != state[name].shape
        },
    }
    for problem, names in problems.items():
        if names:
            raise AprtError(f"{path}: {problem} {', '.join(sorted(names))}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    # The rotary frequencies are computed, not stored: a module on the meta device has none.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.requires_grad_(False)
    return model


def _apply_rope_factors(path: Path, model: torch.nn.Module, factors: torch.Tensor) -> None:
    """Divides the unscaled rotary frequencies by the file's factors, as llama.cpp does."""
    rotary = model.model.rotary_emb
    unscaled, _ = rotary.compute_default_rope_parameters(model.config)
    if factors.shape != unscaled.shape:
        raise AprtError(
            f"{path}: {ROPE_FREQS} has shape {list(factors.shape)}, expected {list(unscaled.shape)}"
        )
    if rotary.rope_type in ("dynamic", "longrope"):
        raise AprtError(
            f"{path}: {ROPE_FREQS} and rope_type {rotary.rope_type!r} contradict each other"
        )
    scaled = unscaled / factors
    if rotary.rope_type != "default" and not torch.allclose(
        scaled, rotary.inv_freq, rtol=1e-4, atol=0
    ):
        raise AprtError(
            f"{path}: {ROPE_FREQS} and the configuration's {rotary.rope_type!r} scaling differ"
        )
    rotary.inv_freq.copy_(scaled)
    rotary.original_inv_freq.copy_(scaled)
