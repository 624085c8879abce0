"""The stage table: the names, shapes and order of everything that a forward pass computes.

Knows no framework. Selecting a stage or a layer that the model does not have is an error that lists
what there is, never an empty capture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType

from .errors import AprtError

NOTHING: Mapping[str, str] = MappingProxyType({})
ROW_CHANNEL = ("row", "channel")
ROW_HEAD_CHANNEL = ("row", "head", "channel")
HEAD_ROW_KEY = ("head", "row", "key")
ROW_SLOT = ("row", "slot")
ROW_SLOT_CHANNEL = ("row", "slot", "channel")

# Those whose stages are known to be the ones of the table.
ARCHITECTURES = ("qwen2", "qwen3", "qwen3_moe", "llama")


# What `config.json` says of a mixture of experts, all of it in the manifest.
EXPERT_CONFIG = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)


def check_architecture(name: str | None, where: object) -> None:
    if name not in ARCHITECTURES:
        raise AprtError(
            f"{where}: architecture {name!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, `used` of which each row is sent to, and the layers they are in."""

    count: int
    used: int
    ffn: int
    layers: frozenset[int]


@dataclass(frozen=True)
class Dims:
    """The numbers that stage shapes are made of."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    qkv_bias: bool
    qk_norm: bool
    experts: Experts | None = None

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def sparse(self, layer: int | None) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.experts is not None and layer in self.experts.layers


@dataclass(frozen=True)
class Stage:
    name: str
    per_layer: bool
    axes: tuple[str, ...]
    shape: Callable[[Dims, int, int], tuple[int, ...]]  # (dims, rows, keys)
    present: Callable[[Dims, int | None], bool] = lambda _dims, _layer: True
    dtype: str = "F32"

    def layers(self, dims: Dims) -> list[int | None]:
        """The layers that have the stage; `[None]` for one of the whole model."""
        all_layers = range(dims.layers) if self.per_layer else [None]
        return [layer for layer in all_layers if self.present(dims, layer)]


@dataclass(frozen=True)
class Site:
    """One value of the forward pass: a stage, of one layer or of the whole model."""

    stage: Stage
    layer: int | None

    @property
    def name(self) -> str:
        return site_name(self.stage.name, self.layer)


def site_name(stage: str, layer: int | None) -> str:
    return stage if layer is None else f"layers.{layer}.{stage}"


def _rows(name: str, width: Callable[[Dims], int], *, per_layer: bool = True, **kwargs) -> Stage:
    return Stage(name, per_layer, ROW_CHANNEL, lambda d, n, _: (n, width(d)), **kwargs)


def _heads(name: str, heads: Callable[[Dims], int], **kwargs) -> Stage:
    return Stage(name, True, ROW_HEAD_CHANNEL, lambda d, n, _: (n, heads(d), d.head_dim), **kwargs)


def _keys(name: str) -> Stage:
    return Stage(name, True, HEAD_ROW_KEY, lambda d, n, kv: (d.heads, n, kv))


def _dense(name: str) -> Stage:
    """Of the one feed-forward of a layer without experts."""
    return _rows(name, lambda d: d.ffn, present=lambda d, layer: not d.sparse(layer))


def _slots(name: str, **kwargs) -> Stage:
    """One number for each expert that a row is sent to."""
    return Stage(name, True, ROW_SLOT, lambda d, n, _: (n, d.experts.used), Dims.sparse, **kwargs)


def _experts(name: str, width: Callable[[Dims], int]) -> Stage:
    """What each expert that a row is sent to computes of it."""
    return Stage(
        name, True, ROW_SLOT_CHANNEL, lambda d, n, _: (n, d.experts.used, width(d)), Dims.sparse
    )


# In the order of computation.
STAGES: tuple[Stage, ...] = (
    _rows("embedding", lambda d: d.hidden, per_layer=False),
    _rows("attn_norm", lambda d: d.hidden),
    _rows("qkv_matmul", lambda d: d.qkv),
    _rows("qkv_bias", lambda d: d.qkv, present=lambda d, _: d.qkv_bias),
    _heads("q_norm", lambda d: d.heads, present=lambda d, _: d.qk_norm),
    _heads("k_norm", lambda d: d.kv_heads, present=lambda d, _: d.qk_norm),
    _heads("q_post_rope", lambda d: d.heads),
    _heads("k_post_rope", lambda d: d.kv_heads),
    _keys("attn_scores"),
    _keys("attn_softmax"),
    _rows("attention", lambda d: d.heads * d.head_dim),
    _rows("attn_out", lambda d: d.hidden),
    _rows("post_attn_residual", lambda d: d.hidden),
    _rows("ffn_norm", lambda d: d.hidden),
    _dense("ffn_gate"),
    _dense("ffn_up"),
    _dense("ffn_silu"),
    _dense("ffn_swigl"),
    _rows("moe_router", lambda d: d.experts.count, present=Dims.sparse),
    _slots("moe_router_indices", dtype="I32"),
    _slots("moe_router_weights"),
    _experts("moe_expert_gate", lambda d: d.experts.ffn),
    _experts("moe_expert_up", lambda d: d.experts.ffn),
    _experts("moe_expert_silu", lambda d: d.experts.ffn),
    _experts("moe_expert_swigl", lambda d: d.experts.ffn),
    _experts("moe_expert_out", lambda d: d.hidden),
    _rows("ffn_out", lambda d: d.hidden),
    _rows("post_ffn_residual", lambda d: d.hidden),
    _rows("final_norm", lambda d: d.hidden, per_layer=False),
    _rows("lm_head", lambda d: d.vocab, per_layer=False),
)

ALIASES = {
    "ffn_swiglu": "ffn_swigl",
    "moe_expert_swiglu": "moe_expert_swigl",
    "layer_output": "post_ffn_residual",
    "logits": "lm_head",
    "moe_ffn_out": "ffn_out",
}


def all_sites(dims: Dims) -> list[Site]:
    """Every site of the model, in the order of computation."""
    first_layer = next(i for i, s in enumerate(STAGES) if s.per_layer)
    in_layers = [s for s in STAGES if s.per_layer]
    after_layers = [s for s in STAGES[first_layer:] if not s.per_layer]
    return [
        *(Site(s, None) for s in STAGES[:first_layer]),
        *(Site(s, i) for i in range(dims.layers) for s in in_layers if s.present(dims, i)),
        *(Site(s, None) for s in after_layers),
    ]


def select_sites(
    dims: Dims, stages: str = "all", layers: str = "all", hidden: Mapping[str, str] = NOTHING
) -> list[Site]:
    """The sites named by a comma list of stages and one of layers (`0..4,7,last`, 4 excluded).

    Stages of the whole model are not affected by `layers`. `hidden` are stages that the engine
    does not show, each with the reason.
    """
    wanted = _parse_stages(dims, stages, hidden)
    chosen = _parse_layers(dims.layers, layers)
    if stages.strip() != "all":
        _check_layers_have(dims, wanted, chosen)
    return [
        site
        for site in all_sites(dims)
        if site.stage.name in wanted and (site.layer is None or site.layer in chosen)
    ]


def _parse_stages(dims: Dims, text: str, hidden: Mapping[str, str]) -> set[str]:
    have = [s.name for s in STAGES if s.layers(dims) and s.name not in hidden]
    if text.strip() == "all":
        return set(have)
    wanted = set()
    for word in text.split(","):
        name = ALIASES.get(word.strip(), word.strip())
        if name in hidden:
            raise AprtError(f"stage {word.strip()!r}: {hidden[name]}")
        if name not in have:
            raise AprtError(
                f"stage {word.strip()!r}: this model has none; it has {', '.join(have)}"
            )
        wanted.add(name)
    return wanted


def _check_layers_have(dims: Dims, wanted: Set[str], chosen: Set[int]) -> None:
    """Refuses stages that none of the chosen layers has: not all layers have experts."""
    for stage in STAGES:
        layers = stage.layers(dims)
        if stage.name in wanted and stage.per_layer and not chosen & set(layers):
            have = ", ".join(map(str, layers))
            raise AprtError(f"stage {stage.name!r}: only layers {have} of this model have it")


def _parse_layers(count: int, text: str) -> set[int]:
    if text.strip() == "all":
        return set(range(count))
    chosen: set[int] = set()
    for word in text.split(","):
        word = word.strip()
        layers = [count - 1] if word == "last" else _parse_range(word, "layers")
        if not all(0 <= layer < count for layer in layers):
            raise AprtError(f"layers {word!r}: this model has layers 0..{count} (numbered from 0)")
        chosen.update(layers)
    return chosen


def _parse_range(text: str, what: str) -> Sequence[int]:
    first, dots, end = text.partition("..")
    try:
        if not dots:
            return [int(text)]
        inclusive = end.startswith("=")
        numbers = range(int(first), int(end.removeprefix("=")) + inclusive)
    except ValueError:
        raise AprtError(f"{what} {text!r}: expected a number or a range like 0..4") from None
    if not numbers:
        raise AprtError(
            f"{what} {text!r}: the range is empty (its end is excluded; 0..=4 includes it)"
        )
    return numbers


@dataclass(frozen=True)
class Rows:
    """Which rows of a step to keep: all, the last of each step, or a range of token positions."""

    spec: str = "all"

    def __post_init__(self) -> None:
        if self.spec not in ("all", "last"):
            _parse_range(self.spec, "rows")

    def pick(self, positions: Sequence[int]) -> list[int]:
        """Indices into `positions` of the rows to keep."""
        if self.spec == "all":
            return list(range(len(positions)))
        if self.spec == "last":
            return [len(positions) - 1]
        wanted = _parse_range(self.spec, "rows")
        return [i for i, position in enumerate(positions) if position in wanted]
