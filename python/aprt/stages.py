"""The stage table: the names, shapes and order of everything that a forward pass computes.

Knows no framework. Selecting a stage or a layer that the model does not have is an error that lists
what there is, never an empty capture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from .errors import AprtError

NOTHING: Mapping[str, str] = MappingProxyType({})
ROW_CHANNEL = ("row", "channel")
ROW_HEAD_CHANNEL = ("row", "head", "channel")
HEAD_ROW_KEY = ("head", "row", "key")

# Those whose stages are known to be the ones of the table.
ARCHITECTURES = ("qwen2", "qwen3", "llama")


def check_architecture(name: str | None, where: object) -> None:
    if name not in ARCHITECTURES:
        raise AprtError(
            f"{where}: architecture {name!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )


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

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class Stage:
    name: str
    per_layer: bool
    axes: tuple[str, ...]
    shape: Callable[[Dims, int, int], tuple[int, ...]]  # (dims, rows, keys)
    present: Callable[[Dims], bool] = lambda _: True


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


# In the order of computation.
STAGES: tuple[Stage, ...] = (
    _rows("embedding", lambda d: d.hidden, per_layer=False),
    _rows("attn_norm", lambda d: d.hidden),
    _rows("qkv_matmul", lambda d: d.qkv),
    _rows("qkv_bias", lambda d: d.qkv, present=lambda d: d.qkv_bias),
    _heads("q_norm", lambda d: d.heads, present=lambda d: d.qk_norm),
    _heads("k_norm", lambda d: d.kv_heads, present=lambda d: d.qk_norm),
    _heads("q_post_rope", lambda d: d.heads),
    _heads("k_post_rope", lambda d: d.kv_heads),
    _keys("attn_scores"),
    _keys("attn_softmax"),
    _rows("attention", lambda d: d.heads * d.head_dim),
    _rows("attn_out", lambda d: d.hidden),
    _rows("post_attn_residual", lambda d: d.hidden),
    _rows("ffn_norm", lambda d: d.hidden),
    _rows("ffn_gate", lambda d: d.ffn),
    _rows("ffn_up", lambda d: d.ffn),
    _rows("ffn_silu", lambda d: d.ffn),
    _rows("ffn_swigl", lambda d: d.ffn),
    _rows("ffn_out", lambda d: d.hidden),
    _rows("post_ffn_residual", lambda d: d.hidden),
    _rows("final_norm", lambda d: d.hidden, per_layer=False),
    _rows("lm_head", lambda d: d.vocab, per_layer=False),
)

ALIASES = {
    "ffn_swiglu": "ffn_swigl",
    "layer_output": "post_ffn_residual",
    "logits": "lm_head",
}


def all_sites(dims: Dims) -> list[Site]:
    """Every site of the model, in the order of computation."""
    present = [s for s in STAGES if s.present(dims)]
    first_layer = next(i for i, s in enumerate(present) if s.per_layer)
    after_layers = [s for s in present[first_layer:] if not s.per_layer]
    return [
        *(Site(s, None) for s in present[:first_layer]),
        *(Site(s, i) for i in range(dims.layers) for s in present if s.per_layer),
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
    return [
        site
        for site in all_sites(dims)
        if site.stage.name in wanted and (site.layer is None or site.layer in chosen)
    ]


def _parse_stages(dims: Dims, text: str, hidden: Mapping[str, str]) -> set[str]:
    have = [s.name for s in STAGES if s.present(dims) and s.name not in hidden]
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
