"""The tensors of a forward step, known before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .stages import Dims, Rows, Site
from .store import TensorSpec


def step_layout(
    dims: Dims,
    sites: Sequence[Site],
    positions: Sequence[int],
    picked: Sequence[int],
    kept: Mapping[str, Sequence[int]] | None = None,
) -> list[TensorSpec]:
    """The tensors of a step at `positions`, of the rows `picked`.

    `kept` overrides the rows of single stages.
    """
    specs = []
    for site in sites:
        rows = (kept or {}).get(site.stage.name, picked)
        if rows:
            shape = site.stage.shape(dims, len(rows), positions[-1] + 1)
            own = tuple(positions[i] for i in rows)
            specs.append(
                TensorSpec(
                    site.name,
                    site.stage.name,
                    site.layer,
                    shape,
                    site.stage.axes,
                    own,
                    site.stage.dtype,
                )
            )
    return specs


def run_bytes(dims: Dims, sites: Sequence[Site], rows: Rows, prompt: int, decode: int) -> int:
    """Bytes of all tensors of a run: a prefill of `prompt` tokens, then `decode` single ones."""
    steps: Iterable[list[int]] = (
        list(range(prompt)),
        *([position] for position in range(prompt, prompt + decode)),
    )
    layouts = (step_layout(dims, sites, step, rows.pick(step)) for step in steps)
    return sum(spec.nbytes for layout in layouts for spec in layout)
