"""Captures the forwards of a Hugging Face causal language model, stage by stage.

Looking changes nothing: hooks (`taps`) read values that the model computes anyway. One value is not
the model's own: `qkv_matmul` of a projection with bias. Torch fuses product and bias, so the
product alone is computed beside it, and `qkv_bias`, which is the model's own value, need not be
`qkv_matmul + bias` to the bit.

Refuses what a capture could not describe faithfully: batches, padding, sliding windows, other
implementations of attention and experts than eager, and architectures whose stages nobody has
checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .errors import AprtError
from .plan import plan_ops, tool
from .stages import EXPERT_CONFIG, Dims, Experts, Rows, select_sites
from .store import CaptureWriter
from .taps import Taps

SUPPORTED = (
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "LlamaForCausalLM",
)
# How a model is loaded whose values can be seen; models without experts ignore theirs.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def model_dims(model: torch.nn.Module) -> Dims:
    """The dimensions of a supported model, read off its modules."""
    config, attention = model.config, model.model.layers[0].self_attn
    return Dims(
        layers=len(model.model.layers),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        ffn=config.intermediate_size,
        vocab=model.lm_head.out_features,
        qkv_bias=attention.q_proj.bias is not None,
        qk_norm=hasattr(attention, "q_norm"),
        experts=_experts(model),
    )


def _experts(model: torch.nn.Module) -> Experts | None:
    layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    if not layers:
        return None
    config = model.config
    return Experts(
        count=config.num_experts,
        used=config.num_experts_per_tok,
        ffn=config.moe_intermediate_size,
        layers=frozenset(layers),
    )


def model_config(model: torch.nn.Module, dims: Dims) -> dict:
    """The manifest's `config`, in the spellings of `config.json`."""
    rope = model.config.rope_parameters
    config = {
        "num_hidden_layers": dims.layers,
        "hidden_size": dims.hidden,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "intermediate_size": dims.ffn,
        "vocab_size": dims.vocab,
        "attention_bias": dims.qkv_bias,
        "qk_norm": dims.qk_norm,
        "rms_norm_eps": model.config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": model.lm_head.weight is model.model.embed_tokens.weight,
    }
    if rope["rope_type"] != "default":
        config["rope_scaling"] = dict(rope)
    if dims.experts is not None:
        config |= {key: getattr(model.config, key) for key in EXPERT_CONFIG}
    return config


@dataclass(frozen=True)
class Provenance:
    """Where a model's weights come from. The default is a module that only exists in memory."""

    path: str | None = None
    format: str = "huggingface"
    index_sha256: str | None = None
    weight_types: Mapping[str, str] | None = None  # stored type of each parameter, by its name


@contextmanager
def capture(
    model: torch.nn.Module,
    out: str | os.PathLike,
    token_ids: Sequence[int] | None = None,
    *,
    stages: str = "all",
    layers: str = "all",
    rows: str = "all",
    force: bool = False,
    prompt: Mapping | None = None,
    token_text: Callable[[int], str | None] | None = None,
    provenance: Provenance = Provenance(),
) -> Iterator[None]:
    """Captures every forward of `model` in the `with` block into the directory `out`, a step each.

    The capture appears under its name when the block ends; after an exception nothing is left.
    `token_ids` are those of the whole sequence, by position. They are needed only where the model
    is called with `inputs_embeds`; otherwise the ids are those of the call. `token_text` gives the
    text of a token id, for readers of the capture.
    """
    _check_model(model)
    dims = model_dims(model)
    sites = select_sites(dims, stages, layers)
    ops = plan_ops(model, dims, provenance.weight_types or {})
    writer = CaptureWriter(out, force=force)
    taps = Taps(model, dims, sites, Rows(rows), writer, token_ids, token_text)
    try:
        with taps.attached():
            yield
        if taps.unfinished:
            raise AprtError(f"{out}: a forward failed; nothing is captured")
        if not any(step["tensors"] for step in writer.steps):
            raise AprtError(
                f"{out}: no forward computed any of the rows {rows!r}; nothing to capture"
            )
        dtype = _type_name(model.dtype)
        writer.finish(
            {
                "tool": tool(),
                "model": {
                    # A module that came from no file is named by what it is.
                    "path": provenance.path or model.name_or_path or type(model).__name__,
                    "format": provenance.format,
                    "architecture": model.config.model_type,
                    "index_sha256": provenance.index_sha256,
                    "file_sha256": None,
                    "config": model_config(model, dims),
                },
                "prompt": dict(prompt or {"mode": "tokens", "text": None}),
                "backend": {
                    "name": "torch",
                    "isa": torch.backends.cpu.get_cpu_capability().lower(),
                    "threads": torch.get_num_threads(),
                },
                "plan": {"fingerprint": None, "ops": ops},
                "kv": dtype.lower(),
            }
        )
    except BaseException:
        taps.abandon()
        writer.abandon()
        raise


def _type_name(dtype: torch.dtype) -> str:
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if dtype not in names:
        raise AprtError(f"{dtype}: the model runs in this type; supported: {', '.join(DTYPES)}")
    return names[dtype]


def _check_model(model: torch.nn.Module) -> None:
    name = type(model).__name__
    if name not in SUPPORTED:
        raise AprtError(f"{name}: not supported; supported: {', '.join(SUPPORTED)}")
    implementation = model.config._attn_implementation
    if implementation != "eager":
        raise AprtError(
            f"{name}: attention {implementation!r} hides its scores; "
            "load with attn_implementation='eager'"
        )
    implementation = model.config._experts_implementation
    if implementation != "eager" and _experts(model) is not None:
        raise AprtError(
            f"{name}: experts {implementation!r} compute their rows at once and hide them; "
            "load with experts_implementation='eager'"
        )
    if model.training:
        raise AprtError(f"{name}: the model is in training mode; call model.eval() first")
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise AprtError(f"{name}: sliding window attention is not supported")
    _type_name(model.dtype)
