"""What the manifest says about the arithmetic: the ops of a torch forward, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version

import torch

from .stages import Dims

# Op, the stages it computes, the modules whose weights it reads. Torch fuses projection and bias.
_ATTENTION_OPS = (
    ("rms_norm", ("attn_norm",), ("input_layernorm",)),
    ("linear", ("qkv_matmul", "qkv_bias"), tuple(f"self_attn.{p}_proj" for p in "qkv")),
    ("rms_norm", ("q_norm",), ("self_attn.q_norm",)),
    ("rms_norm", ("k_norm",), ("self_attn.k_norm",)),
    ("rope", ("q_post_rope",), ()),
    ("rope", ("k_post_rope",), ()),
    ("attn_scores", ("attn_scores",), ()),
    ("softmax", ("attn_softmax",), ()),
    ("attn_values", ("attention",), ()),
    ("linear", ("attn_out",), ("self_attn.o_proj",)),
    ("add", ("post_attn_residual",), ()),
    ("rms_norm", ("ffn_norm",), ("post_attention_layernorm",)),
)
_DENSE_OPS = (
    ("linear", ("ffn_gate",), ("mlp.gate_proj",)),
    ("linear", ("ffn_up",), ("mlp.up_proj",)),
    ("silu", ("ffn_silu",), ()),
    ("mul", ("ffn_swigl",), ()),
    ("linear", ("ffn_out",), ("mlp.down_proj",)),
)
_EXPERT_OPS = (
    ("linear", ("moe_router",), ("mlp.gate",)),
    ("top_k", ("moe_router_indices",), ()),
    ("route_weights", ("moe_router_weights",), ()),
    ("expert_linear", ("moe_expert_gate",), ("mlp.experts.gate_proj",)),
    ("expert_linear", ("moe_expert_up",), ("mlp.experts.up_proj",)),
    ("silu", ("moe_expert_silu",), ()),
    ("mul", ("moe_expert_swigl",), ()),
    ("expert_linear", ("moe_expert_out",), ("mlp.experts.down_proj",)),
    ("weighted_sum", ("ffn_out",), ()),
)
_END_OPS = (("add", ("post_ffn_residual",), ()),)


def tool() -> dict:
    engine = f"torch {torch.__version__}, transformers {version('transformers')}"
    return {"name": "apr-oracle", "version": f"{version('apr-oracle')} ({engine})"}


def plan_ops(model: torch.nn.Module, dims: Dims, weight_types: Mapping[str, str]) -> list[dict]:
    """The manifest's `plan.ops`. `weight_types` are the stored types of the parameters, by name."""
    run = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[model.dtype]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # The projections of all experts are one or two parameters; they are stored, and named, apart.
    experts = [name.rpartition(".")[0] for name in parameters if name.endswith(".gate_up_proj")]
    parameters |= {f"{e}.{p}_proj.weight" for e in experts for p in ("gate", "up", "down")}

    def weights(modules: tuple[str, ...]) -> list[str]:
        """Stored types: float32 holds each exactly; another type rounds them, so names itself."""
        names = (f"{m}.{kind}" for m in modules for kind in ("weight", "bias"))
        used = [n for n in names if n in parameters]
        stored = [weight_types.get(n, run) if run == "F32" else run for n in used]
        return list(dict.fromkeys(stored))

    return [
        {
            "op": op,
            "sites": sites,
            "kernel": "torch",
            "weights": weights(modules),
            "activations": run,
            "accumulation": "f32",
            "output": "I32" if op == "top_k" else run,
        }
        for op, sites, modules in _ops(dims)
    ]


def _ops(dims: Dims) -> Iterator[tuple[str, list[str], tuple[str, ...]]]:
    absent = set()
    if not dims.qkv_bias:
        absent.add("qkv_bias")
    if not dims.qk_norm:
        absent.update(("q_norm", "k_norm"))
    yield "embedding", ["embedding"], ("model.embed_tokens",)
    for i in range(dims.layers):
        feed_forward = _EXPERT_OPS if dims.sparse(i) else _DENSE_OPS
        for op, stages, modules in (*_ATTENTION_OPS, *feed_forward, *_END_OPS):
            sites = [f"layers.{i}.{s}" for s in stages if s not in absent]
            if sites:
                yield op, sites, tuple(f"model.layers.{i}.{m}" for m in modules)
    yield "rms_norm", ["final_norm"], ("model.norm",)
    yield "linear", ["lm_head"], ("lm_head",)
