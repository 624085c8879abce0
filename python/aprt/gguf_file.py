"""What a GGUF file says about its model, without a framework to run it in.

The settings are read by a list of the keys that are understood: a key of the architecture that is
not on it may change the numbers, so the file is refused, and so is one with an unknown tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from .errors import AprtError
from .stages import check_architecture

MAGIC = b"GGUF"
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
    "ffn_gate_inp": "mlp.gate",
    # Of all experts, one behind the other.
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
# Architectures that Hugging Face spells otherwise.
_MODEL_TYPES = {"qwen3moe": "qwen3_moe"}

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
# Those of a mixture of experts.
_EXPERT_KEYS = {
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_weights_norm",
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
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
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
class GgufFile:
    """An opened file: its metadata, and name, type and shape (outermost first) of each tensor."""

    path: Path
    reader: gguf.GGUFReader
    metadata: Mapping
    tensors: Sequence[tuple[str, str, list[int]]]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def model_type(self) -> str:
        """The architecture as `config.json` names it."""
        return _model_type(self.architecture)


def open_file(path: Path) -> GgufFile:
    """Opens a file of a supported architecture all of whose tensors are known."""
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader checks no bounds: damage shows as errors of many kinds
        raise AprtError(
            f"{path}: not a readable GGUF file (damaged or truncated): {error}"
        ) from None
    architecture = metadata.get("general.architecture")
    check_architecture(_model_type(architecture), path)
    tensors = [(t.name, t.tensor_type.name, t.shape.tolist()[::-1]) for t in reader.tensors]
    for name, *_ in tensors:
        if name != ROPE_FREQS and hf_name(name) is None:
            raise AprtError(f"{path}: tensor {name} is not one of a {architecture} model")
    return GgufFile(path, reader, metadata, tensors)


def _model_type(architecture: str | None) -> str | None:
    return _MODEL_TYPES.get(architecture, architecture)


def dequantise(path: Path, tensor: gguf.ReaderTensor) -> np.ndarray:
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise AprtError(f"{path}: tensor {tensor.name}: {error}") from None


def hf_name(name: str) -> str | None:
    """The parameter that a GGUF tensor holds, of experts the parameters of all."""
    if name in _WHOLE_MODEL:
        return _WHOLE_MODEL[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _PER_LAYER:
        return None
    return f"model.layers.{match[1]}.{_PER_LAYER[match[2]]}.{match[3]}"


def settings(file: GgufFile, remedy: str = "") -> dict:
    """The settings of `config.json` that the metadata describe.

    A key that is not understood is refused; `remedy` says what to do about it.
    """
    path, architecture, metadata = file.path, file.architecture, file.metadata
    shapes = {name: shape for name, _, shape in file.tensors}
    _refuse_unknown(path, architecture, metadata, remedy)

    def need(key: str):
        value = metadata.get(f"{architecture}.{key}")
        if value is None:
            raise AprtError(f"{path}: metadata {architecture}.{key} is missing")
        return value

    def optional(key: str, default):
        return metadata.get(f"{architecture}.{key}", default)

    heads = need("attention.head_count")
    kv_heads = optional("attention.head_count_kv", heads)
    experts = _experts(need, optional, shapes) if file.model_type == "qwen3_moe" else {}
    # Where every layer has experts, nothing has this length.
    ffn = optional("feed_forward_length", experts.get("moe_intermediate_size"))
    ffn = need("feed_forward_length") if ffn is None else ffn
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
    described = {
        "vocab_size": shapes["token_embd.weight"][0],
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
        described["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if architecture == "llama":
        described["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    return described | experts


def _experts(need, optional, shapes: Mapping) -> dict:
    """The settings of a mixture of experts; a layer without a router is a dense one."""
    layers = range(need("block_count"))
    return {
        "num_experts": need("expert_count"),
        "num_experts_per_tok": need("expert_used_count"),
        "moe_intermediate_size": need("expert_feed_forward_length"),
        "norm_topk_prob": optional("expert_weights_norm", True),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in shapes],
    }


def _refuse_unknown(path: Path, architecture: str, metadata: Mapping, remedy: str) -> None:
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise AprtError(f"{path}: holds a {kind}, not a model (general.type)")
    if metadata.get("split.count", 0) > 1:
        raise AprtError(f"{path}: one of several parts; merge them first (gguf-split --merge)")
    understood = _CONFIG_KEYS | _INERT_KEYS
    if _model_type(architecture) == "qwen3_moe":
        understood |= _EXPERT_KEYS
    for key, value in metadata.items():
        if not key.startswith(f"{architecture}."):
            continue
        short = key.removeprefix(f"{architecture}.")
        if short in understood or value in _NEUTRAL.get(short, ()):
            continue
        raise AprtError(
            f"{path}: metadata {key} = {value!r} may change the numbers and is not supported"
            + remedy
        )


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order of llama files, for interleaved RoPE: (pair, half) to (half, pair)."""
    rows = values.shape[0]
    paired = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return paired.swapaxes(1, 2).reshape(values.shape)
