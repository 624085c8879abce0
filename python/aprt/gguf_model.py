"""A GGUF file as a Hugging Face model: the same stored weights, dequantised exactly to float32.

The configuration is built from the file's metadata. Every tensor of the file must find its
parameter, and every parameter its tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .errors import AprtError
from .gguf_file import ROPE_FREQS, dequantise, hf_name, open_file, settings, unpermute
from .hf import EAGER

_REMEDY = "; --hf-config DIR gives a configuration to use instead of the metadata"


@dataclass(frozen=True)
class Index:
    """The file's tensors as the container names them, and the stored type of each parameter."""

    tensors: Sequence[tuple[str, str, list[int]]]
    weight_types: dict[str, str]


def load(
    path: Path, dtype: torch.dtype, hf_config: Path | None = None
) -> tuple[torch.nn.Module, Index]:
    """The file's model, with eager attention, in `dtype` (float32 is exact)."""
    file = open_file(path)
    if hf_config is None:
        config = AutoConfig.for_model(file.model_type, **settings(file, _REMEDY))
    else:
        config = AutoConfig.from_pretrained(hf_config, local_files_only=True)
        if config.model_type != file.model_type:
            raise AprtError(
                f"{hf_config}: is of {config.model_type!r}, and {path} of {file.model_type!r}"
            )

    state, types, factors = {}, {}, None
    for tensor in file.reader.tensors:
        if tensor.name == ROPE_FREQS:
            factors = torch.from_numpy(dequantise(path, tensor).copy())
            continue
        name = hf_name(tensor.name)
        values = dequantise(path, tensor)
        if file.architecture == "llama" and (heads := _rotary_heads(tensor.name, config)):
            values = unpermute(values, heads)
        state[name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype)
        types[name] = tensor.tensor_type.name
    if config.tie_word_embeddings:
        _drop_tied_output(path, state)
        types["lm_head.weight"] = types.get("model.embed_tokens.weight")
    _fuse_experts(path, state)
    model = _build(path, config, state, dtype)
    if factors is not None:
        _apply_rope_factors(path, model, factors)
    return model, Index(file.tensors, types)


# Weights


def _rotary_heads(name: str, config: PreTrainedConfig) -> int | None:
    """How many heads a query or key projection has; None for another tensor."""
    if re.fullmatch(r"blk\.\d+\.attn_q\.(weight|bias)", name):
        return config.num_attention_heads
    if re.fullmatch(r"blk\.\d+\.attn_k\.(weight|bias)", name):
        return config.num_key_value_heads
    return None


def _drop_tied_output(path: Path, state: dict[str, torch.Tensor]) -> None:
    output, embedding = state.pop("lm_head.weight", None), state.get("model.embed_tokens.weight")
    if output is not None and embedding is not None and not torch.equal(output, embedding):
        raise AprtError(
            f"{path}: output.weight is not token_embd.weight, and the configuration ties them"
        )


def _fuse_experts(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Joins the gate and up projections of experts, which are one parameter in the model."""
    for name in [name for name in state if name.endswith(".experts.gate_proj.weight")]:
        experts = name.removesuffix(".gate_proj.weight")
        gate, up = state.pop(name), state.pop(f"{experts}.up_proj.weight", None)
        if up is None or up.shape != gate.shape:
            raise AprtError(f"{path}: {experts}: gate_proj has no up_proj of its shape")
        state[f"{experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
    for name in [name for name in state if name.endswith(".experts.down_proj.weight")]:
        state[name.removesuffix(".weight")] = state.pop(name)


def _build(
    path: Path, config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **EAGER)
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
