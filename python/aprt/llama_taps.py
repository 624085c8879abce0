"""The callback of a capture: takes the wanted values off llama.cpp's graph while it is computed.

The scheduler asks before each node whether it is wanted, and calls again when it is computed. What
is not wanted is not copied. Values are brought into the form of the table of stages: projections
concatenated, scores scaled and cut to the positions that exist, masked entries zero, and the
channels of query and key heads in the order of halves.
"""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp
import numpy as np

from . import ggml
from .errors import AprtError
from .llama_nodes import FLASH, Node, NodeTable
from .stages import Dims, site_name
from .store import StepWriter


class Taps:
    """The callback, and the step that is being written. `interleaved`: RoPE turns neighbours."""

    def __init__(self, table: NodeTable, dims: Dims, interleaved: bool):
        self._table, self._dims, self._interleaved = table, dims, interleaved
        self._step: StepWriter | None = None
        self._positions: Sequence[int] = ()
        self._picked: Sequence[int] = ()
        self._parts: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self._products: dict[int, np.ndarray] = {}  # of queries and keys, by layer
        self._error: BaseException | None = None
        self._checked = False
        self.seen: set[str] = set()
        """Stages of the graph, and `FLASH` where attention is fused."""
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._called)

    def begin(self, step: StepWriter, positions: Sequence[int], picked: Sequence[int]) -> None:
        self._step, self._positions, self._picked = step, positions, picked

    def end(self) -> None:
        """Ends the step; raises what the callback could not."""
        if self._error is not None:
            self.abandon()
            raise self._error
        self._step, step = None, self._step
        if step is not None:
            step.close()

    def abandon(self) -> None:
        self._step, step = None, self._step
        if step is not None:
            step.abandon()

    def _called(self, address: int, ask: bool, _user) -> bool:
        # An exception cannot pass through the library: it is kept, and raised by `end`.
        try:
            if not self._checked:
                ggml.check_layout(address)
                self._checked = True
            tensor = ggml.tensor_at(address)
            node = self._table.find(tensor)
            if ask:
                return self._error is None and self._asked(tensor, node)
            self._computed(tensor, node)
            return True
        except BaseException as error:
            self._error = self._error or error
            return False

    def _asked(self, tensor: ggml.Tensor, node: Node | None) -> bool:
        if node is None:
            if ggml.op(tensor) == FLASH:
                self.seen.add(FLASH)
            return False
        self.seen.add(node.stage)
        if self._step is None:
            return False
        # The softmax knows the scale of the scores, and their mask.
        by_softmax = node.stage == "attn_softmax" and self._wants("attn_scores", node.layer)
        return by_softmax or self._wants(node.stage, node.layer)

    def _wants(self, stage: str, layer: int | None) -> bool:
        return self._step.wants(site_name(stage, layer))

    def _computed(self, tensor: ggml.Tensor, node: Node) -> None:
        value = ggml.values(tensor)[0]
        if node.stage == "attn_scores":
            self._products[node.layer] = self._keys(value).copy()
        elif node.stage == "attn_softmax":
            self._softmax(tensor, node.layer, value)
        elif node.part is not None:
            self._projection(node, value[0])
        elif node.stage.startswith("moe_expert"):
            self._put(node, value[self._picked])
        elif node.stage in ("q_norm", "k_norm", "q_post_rope", "k_post_rope"):
            self._put(node, self._in_halves(value[self._picked]))
        else:
            self._put(node, value[0, self._picked])

    def _put(self, node: Node, value: np.ndarray) -> None:
        self._step.put(site_name(node.stage, node.layer), value)

    def _projection(self, node: Node, value: np.ndarray) -> None:
        """Collects the query, key and value projections: one stage."""
        value = value[self._picked]
        if node.part in "qk":
            heads = value.reshape(len(value), -1, self._dims.head_dim)
            value = self._in_halves(heads).reshape(value.shape)
        parts = self._parts.setdefault((node.stage, node.layer), {})
        parts[node.part] = value
        if len(parts) == 3:
            del self._parts[node.stage, node.layer]
            self._put(node, np.concatenate([parts[part] for part in "qkv"], axis=-1))

    def _in_halves(self, heads: np.ndarray) -> np.ndarray:
        """[row, head, channel]: from pairs of neighbours to pairs of halves."""
        if not self._interleaved:
            return heads
        return np.concatenate([heads[..., 0::2], heads[..., 1::2]], axis=-1)

    def _keys(self, scores: np.ndarray) -> np.ndarray:
        """[head, row, key]: the chosen rows, and of the padded cache the positions that exist."""
        return scores[:, self._picked, : self._positions[-1] + 1]

    def _softmax(self, tensor: ggml.Tensor, layer: int, shares: np.ndarray) -> None:
        visible = self._visible(ggml.values(tensor.src[1].contents)[0])
        if self._wants("attn_scores", layer):
            scaled = self._products.pop(layer) * ggml.float_param(tensor, 0)
            self._put(Node("attn_scores", layer), np.where(visible, scaled, np.float32(0)))
        if self._wants("attn_softmax", layer):
            shares = np.where(visible, self._keys(shares), np.float32(0))
            self._put(Node("attn_softmax", layer), shares)

    def _visible(self, mask: np.ndarray) -> np.ndarray:
        """Which key a row sees, [1, row, key]; refuses a cache in another order than positions."""
        keys = np.arange(self._positions[-1] + 1)
        visible = keys <= np.array(self._positions)[:, None]
        expected = np.where(visible, 0.0, -np.inf)
        rows = mask[:, : len(self._positions)]
        if (rows[:, :, : len(keys)] != expected).any() or (rows[:, :, len(keys) :] == 0).any():
            raise AprtError("the engine's mask is not causal over consecutive positions")
        return visible[None, self._picked]
