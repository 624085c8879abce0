"""Which node of llama.cpp's graph shows which stage.

Names of nodes repeat (`Qcur-0` is up to four of them) and some have none, so a node that reads a
weight is known by its operation and the weight; only the others are known by operation and name.
Knows nothing of values.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from . import ggml

FLASH = "FLASH_ATTN_EXT"


@dataclass(frozen=True)
class Node:
    """The stage that a node shows, or `part` of it: one of the projections `q`, `k`, `v`."""

    stage: str
    layer: int | None
    part: str | None = None


_BY_NAME = {
    ("ROPE", "Qcur"): "q_post_rope",
    ("ROPE", "Kcur"): "k_post_rope",
    ("MUL_MAT", "kq"): "attn_scores",  # not scaled yet: the softmax does that
    ("SOFT_MAX", "kq_soft_max"): "attn_softmax",
    ("CONT", "kqv_out"): "attention",
    ("RESHAPE", "kqv_out"): "attention",  # of flash attention
    ("ADD", "ffn_inp"): "post_attn_residual",
    ("SILU", "ffn_silu"): "ffn_silu",
    ("SWIGLU", "ffn_swiglu"): "ffn_swigl",
    ("MUL", "ffn_gate_par"): "ffn_swigl",
    ("ADD", "l_out"): "post_ffn_residual",
    ("VIEW", "ffn_moe_topk"): "moe_router_indices",  # the first of the sorted ids of all experts
    ("DIV", "ffn_moe_weights_norm"): "moe_router_weights",
    ("SWIGLU", "ffn_moe_swiglu"): "moe_expert_swigl",
    ("ADD", "ffn_moe_out"): "ffn_out",
    ("CONT", "ffn_moe_out"): "ffn_out",  # of one expert there is nothing to add
}
_BY_WEIGHT = {
    ("GET_ROWS", "token_embd.weight"): "embedding",
    ("MUL", "attn_norm.weight"): "attn_norm",
    ("MUL", "attn_q_norm.weight"): "q_norm",
    ("MUL", "attn_k_norm.weight"): "k_norm",
    ("MUL", "ffn_norm.weight"): "ffn_norm",
    ("MUL_MAT", "ffn_gate_inp.weight"): "moe_router",
    ("MUL_MAT_ID", "ffn_gate_exps.weight"): "moe_expert_gate",
    ("MUL_MAT_ID", "ffn_up_exps.weight"): "moe_expert_up",
    ("MUL_MAT_ID", "ffn_down_exps.weight"): "moe_expert_out",
    ("MUL", "output_norm.weight"): "final_norm",
    ("MUL_MAT", "output.weight"): "lm_head",
    ("MUL_MAT", "token_embd.weight"): "lm_head",
}
# The linear stages that have their bias in them.
_LINEAR = {
    "attn_output": "attn_out",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_down": "ffn_out",
}


class NodeTable:
    """Tells nodes apart in the graph of a file with the tensors `names`."""

    def __init__(self, names: Collection[str]):
        self._by_weight = {key: (stage, None) for key, stage in _BY_WEIGHT.items()}
        for tensor, stage in _LINEAR.items():
            bias = f"blk.0.{tensor}.bias" in names
            key = ("ADD", f"{tensor}.bias") if bias else ("MUL_MAT", f"{tensor}.weight")
            self._by_weight[key] = (stage, None)
        for part in "qkv":
            self._by_weight["MUL_MAT", f"attn_{part}.weight"] = ("qkv_matmul", part)
            self._by_weight["ADD", f"attn_{part}.bias"] = ("qkv_bias", part)

    def find(self, tensor: ggml.Tensor) -> Node | None:
        """What a node shows; `None` for one that is not in the table of stages."""
        op = ggml.op(tensor)
        for source in ggml.sources(tensor):
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)", ggml.name(source))
            if match and (op, match[2]) in self._by_weight:
                stage, part = self._by_weight[op, match[2]]
                return Node(stage, None if match[1] is None else int(match[1]), part)
        match = re.fullmatch(r"(\w+)-(\d+)", ggml.name(tensor))
        if match and (op, match[1]) in _BY_NAME:
            return Node(_BY_NAME[op, match[1]], int(match[2]))
        return None
