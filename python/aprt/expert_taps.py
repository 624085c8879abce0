"""What the experts of a layer compute, observed in the very run.

The eager experts are a loop over those that some row chose. It has no modules to hook, so the calls
of torch that it makes are observed: `where` says which rows chose an expert, and in which of their
slots; a product computes gate and up of these rows together, `silu` follows, and another product
ends it. A loop of other calls is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .errors import AprtError


class ExpertLoop(TorchFunctionMode):
    """Observes one run of a layer's experts."""

    STAGES = (
        "moe_expert_gate",
        "moe_expert_up",
        "moe_expert_silu",
        "moe_expert_swigl",
        "moe_expert_out",
    )
    _PER_EXPERT = (torch.where, F.linear, F.silu, F.linear)

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple] = []  # function, first argument, result

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in self._PER_EXPERT:
            self._calls.append((func, args[0], result))
        return result

    def by_slot(self, slots: Sequence[int]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each stage and its values [row, slot, channel]; `slots` are the numbers of both."""
        values: dict[str, torch.Tensor] = {}
        seen = 0
        for rows_and_slots, parts in self._experts():
            seen += len(rows_and_slots[0])
            for stage, part in zip(self.STAGES, parts, strict=True):
                if stage not in values:
                    values[stage] = part.new_empty((*slots, part.shape[-1]))
                values[stage][rows_and_slots] = part
        if seen != slots[0] * slots[1]:
            raise AprtError(f"the experts computed {seen} rows of {slots[0]} x {slots[1]}")
        yield from values.items()

    def _experts(self) -> Iterator[tuple[tuple, tuple]]:
        """Of each expert the rows that chose it and their slots, and its values of them."""
        count = len(self._PER_EXPERT)
        functions = tuple(func for func, *_ in self._calls)
        if functions != self._PER_EXPERT * (len(functions) // count):
            raise AprtError("this version of transformers computes experts in an unknown way")
        for i in range(0, len(self._calls), count):
            where, gate_up, silu, down = self._calls[i : i + count]
            slots, rows = where[2]
            gate, up = gate_up[2].chunk(2, dim=-1)
            yield (rows, slots), (gate, up, silu[2], down[1], down[2])
