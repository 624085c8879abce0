"""The hooks of a capture: which module or function shows which stage, and the step being written.

The values inside attention have no module, so the model file's eager attention function is wrapped,
and the input of its softmax observed. Everything is taken off again when the capture ends.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .errors import AprtError
from .expert_taps import ExpertLoop
from .layout import step_layout
from .stages import Dims, Rows, Site, site_name
from .store import CaptureWriter, StepInfo, StepWriter


class _SoftmaxInput(TorchFunctionMode):
    """Observes what the attention function gives to softmax: the scaled scores plus the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.value: torch.Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.softmax:
            self.value = args[0]
        return func(*args, **(kwargs or {}))


class Taps:
    """The hooks of one capture, and the step that is being written."""

    def __init__(
        self,
        model: torch.nn.Module,
        dims: Dims,
        sites: Sequence[Site],
        rows: Rows,
        writer: CaptureWriter,
        token_ids: Sequence[int] | None,
        token_text: Callable[[int], str | None] | None,
    ):
        self._model, self._dims, self._sites, self._rows = model, dims, sites, rows
        self._writer, self._token_ids, self._token_text = writer, token_ids, token_text
        self._signature = inspect.signature(model.forward)
        self._step: StepWriter | None = None
        self._picked: list[int] = []  # rows of the step to keep
        self._picked_logits: list[int] = []  # the same, as rows of the lm_head's input
        self._past = 0
        self._chunk = -1
        self._slot = -1

    # Steps

    def _begin(self, _module, args, kwargs) -> None:
        if self._step is not None:
            raise AprtError("the forward before this one failed; start a new capture")
        call = self._signature.bind(*args, **kwargs).arguments
        call.update(call.pop("kwargs", {}))
        n = _row_count(call)
        cache = call.get("past_key_values")
        self._past = 0 if cache is None else int(cache.get_seq_length())
        positions = list(range(self._past, self._past + n))
        _refuse_unfaithful(call, positions)

        self._picked = self._rows.pick(positions)
        keep = call.get("logits_to_keep", 0)
        first_logit = max(n - keep, 0) if keep else 0
        self._picked_logits = [i - first_logit for i in self._picked if i >= first_logit]

        decode = self._past > 0 and n == 1
        if self._past == 0:
            self._chunk, self._slot = 0, self._slot + 1
        elif not decode:
            self._chunk += 1
        ids = self._ids(call.get("input_ids"), n)
        info = StepInfo(
            phase="decode" if decode else "prefill",
            token_ids=ids,
            positions=positions,
            chunk=0 if decode else self._chunk,
            slot=self._slot,
            tokens_text=self._texts(ids),
        )
        kept = {"lm_head": [i + first_logit for i in self._picked_logits]}
        specs = step_layout(self._dims, self._sites, positions, self._picked, kept)
        self._step = self._writer.step(info, specs)

    def _ids(self, given: torch.Tensor | None, n: int) -> list[int]:
        """The token ids of a call: its own, which the declared ones must agree with."""
        ids = None if given is None else given[0].tolist()
        if self._token_ids is None:
            if ids is None:
                raise AprtError("called with inputs_embeds: give the capture token_ids")
            return ids
        declared = list(self._token_ids[self._past : self._past + n])
        if len(declared) != n:
            have, need = len(self._token_ids), self._past + n
            raise AprtError(f"token_ids has {have} ids, and the model reads {need} positions")
        if ids is not None and ids != declared:
            raise AprtError(f"token_ids and the model's input differ from position {self._past} on")
        return declared

    def _texts(self, ids: Sequence[int]) -> list[str] | None:
        texts = [self._token_text(i) for i in ids] if self._token_text else [None]
        return None if None in texts else texts

    def _end(self, _module, _args, _output) -> None:
        step, self._step = self._step, None
        step.close()

    @property
    def unfinished(self) -> bool:
        """Whether a forward began and did not end."""
        return self._step is not None

    def abandon(self) -> None:
        if self._step is not None:
            self._step.abandon()

    # Values

    def _wants(self, stage: str, layer: int | None) -> bool:
        return self._step is not None and self._step.wants(site_name(stage, layer))

    def _put(self, stage: str, layer: int | None, value: torch.Tensor, row_axis: int = 0) -> None:
        """Stores the chosen rows of a value without its batch axis."""
        if not self._wants(stage, layer):
            return
        picked = self._picked_logits if stage == "lm_head" else self._picked
        value = value.detach()
        if len(picked) != value.shape[row_axis]:
            value = value.index_select(row_axis, torch.tensor(picked, device=value.device))
        kept_as = torch.float32 if value.is_floating_point() else torch.int32
        self._step.put(site_name(stage, layer), value.to("cpu", kept_as).contiguous().numpy())

    # Hooks

    @contextmanager
    def attached(self):
        """Attaches every hook, and takes every one off again."""
        with ExitStack() as stack:
            hook = functools.partial(_hook, stack)
            pre_hook = functools.partial(_pre_hook, stack)
            handle = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(handle.remove)

            inner = self._model.model
            pre_hook(inner.layers[0], lambda x: self._put("embedding", None, x[0]))
            for index, layer in enumerate(inner.layers):
                self._attach_layer(hook, pre_hook, index, layer)
                if self._dims.sparse(index):
                    router = functools.partial(self._routed, index)
                    stack.callback(layer.mlp.gate.register_forward_hook(router).remove)
                    stack.enter_context(self._experts_wrapped(index, layer.mlp.experts))
            stack.enter_context(self._attention_wrapped())
            hook(inner.norm, lambda _, y: self._put("final_norm", None, y[0]))
            hook(self._model.lm_head, lambda _, y: self._put("lm_head", None, y[0]))

            stack.callback(self._model.register_forward_hook(self._end).remove)
            yield

    def _attach_layer(self, hook, pre_hook, index: int, layer: torch.nn.Module) -> None:
        def put(stage):
            return lambda _, y: self._put(stage, index, y[0])

        def put_input(stage):
            return lambda x: self._put(stage, index, x[0])

        attention, mlp = layer.self_attn, layer.mlp
        hook(layer.input_layernorm, put("attn_norm"))
        projections = _Projections(self, index)
        for name in ("q", "k", "v"):
            linear = getattr(attention, f"{name}_proj")
            hook(linear, functools.partial(projections.computed, name, linear))
        if self._dims.qk_norm:
            hook(attention.q_norm, put("q_norm"))
            hook(attention.k_norm, put("k_norm"))
        pre_hook(attention.o_proj, put_input("attention"))
        hook(attention.o_proj, put("attn_out"))
        pre_hook(layer.post_attention_layernorm, put_input("post_attn_residual"))
        hook(layer.post_attention_layernorm, put("ffn_norm"))
        if not self._dims.sparse(index):
            hook(mlp.gate_proj, put("ffn_gate"))
            hook(mlp.up_proj, put("ffn_up"))
            hook(mlp.act_fn, put("ffn_silu"))
            pre_hook(mlp.down_proj, put_input("ffn_swigl"))
        hook(mlp, put("ffn_out"))
        hook(layer, put("post_ffn_residual"))

    def _routed(self, layer: int, _module, _args, output) -> None:
        logits, weights, indices = output
        self._put("moe_router", layer, logits)
        self._put("moe_router_indices", layer, indices)
        self._put("moe_router_weights", layer, weights)

    @contextmanager
    def _experts_wrapped(self, layer: int, experts: torch.nn.Module):
        """Wraps the forward of a layer's experts, inside of which there are no modules."""
        own = vars(experts).get("forward")  # none, but where another library has wrapped it
        original = experts.forward

        @functools.wraps(original)
        def watched(hidden_states, indices, weights):
            if not any(self._wants(stage, layer) for stage in ExpertLoop.STAGES):
                return original(hidden_states, indices, weights)
            with ExpertLoop() as loop:
                output = original(hidden_states, indices, weights)
            for stage, value in loop.by_slot(indices.shape):
                self._put(stage, layer, value)
            return output

        experts.forward = watched
        try:
            yield
        finally:
            if own is None:
                del experts.forward
            else:
                experts.forward = own

    @contextmanager
    def _attention_wrapped(self):
        """Wraps the eager attention of the model's source file; other models pass through."""
        layers = {layer.self_attn: i for i, layer in enumerate(self._model.model.layers)}
        source = sys.modules[type(self._model.model.layers[0].self_attn).__module__]
        original = source.eager_attention_forward

        @functools.wraps(original)
        def watched(module, query, key, value, attention_mask, *args, **kwargs):
            if module not in layers or self._step is None:
                return original(module, query, key, value, attention_mask, *args, **kwargs)
            with _SoftmaxInput() as softmax:
                output, weights = original(
                    module, query, key, value, attention_mask, *args, **kwargs
                )
            self._attention(layers[module], query, key, attention_mask, softmax.value, weights)
            return output, weights

        source.eager_attention_forward = watched
        try:
            yield
        finally:
            source.eager_attention_forward = original

    def _attention(self, layer, query, key, mask, softmax_input, weights) -> None:
        seen, expected = key.shape[2], self._past + query.shape[2]
        if seen != expected:
            raise AprtError(
                f"layer {layer}: attention sees {seen} positions, not {expected}; use DynamicCache"
            )
        self._put("q_post_rope", layer, query[0].transpose(0, 1))
        self._put("k_post_rope", layer, key[0, :, self._past :].transpose(0, 1))
        if mask is not None:  # adding the mask's zeros left the visible scores as they were
            hidden = mask[0] != 0
            softmax_input = softmax_input.masked_fill(hidden, 0.0)
            weights = weights.masked_fill(hidden, 0.0)
        self._put("attn_scores", layer, softmax_input[0], row_axis=1)
        self._put("attn_softmax", layer, weights[0], row_axis=1)


class _Projections:
    """Concatenates a layer's q, k and v projections, which the model computes one by one."""

    def __init__(self, taps: Taps, layer: int):
        self._taps, self._layer = taps, layer
        self._products: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}

    def computed(
        self, name: str, linear: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor
    ) -> None:
        if self._taps._wants("qkv_matmul", self._layer):
            # The fused product-and-bias has no product of its own to observe.
            with torch.no_grad():
                self._products[name] = y if linear.bias is None else F.linear(x, linear.weight)
        self._outputs[name] = y
        if len(self._outputs) == 3:
            self._flush()

    def _flush(self) -> None:
        for stage, parts in (("qkv_matmul", self._products), ("qkv_bias", self._outputs)):
            if self._taps._wants(stage, self._layer):
                self._taps._put(stage, self._layer, torch.cat([parts[p][0] for p in "qkv"], dim=-1))
            parts.clear()


def _row_count(call: Mapping) -> int:
    inputs = call.get("input_ids")
    if inputs is None:
        inputs = call.get("inputs_embeds")
    if inputs is None:
        raise AprtError("the model was called with neither input_ids nor inputs_embeds")
    if inputs.shape[0] != 1:
        raise AprtError(f"batch of {inputs.shape[0]} sequences: call with one, a capture holds one")
    return inputs.shape[1]


def _refuse_unfaithful(call: Mapping, positions: Sequence[int]) -> None:
    """Refuses arguments that change what is computed and have no place in a capture."""
    declared = call.get("position_ids")
    if declared is not None and declared.reshape(-1).tolist() != list(positions):
        raise AprtError(f"position_ids: only consecutive ones are supported, from {positions[0]}")
    mask = call.get("attention_mask")
    plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.all())
    if not plain:
        raise AprtError("attention_mask: padding and custom masks are not supported")
    if not isinstance(call.get("logits_to_keep", 0), int):
        raise AprtError("logits_to_keep: only a number of rows is supported, not indices")


def _hook(stack: ExitStack, module: torch.nn.Module, see) -> None:
    """Calls `see(input, output)` after a module's forward."""

    def hook(_module, args, output):
        see(args[0] if args else None, output[0] if isinstance(output, tuple) else output)

    stack.callback(module.register_forward_hook(hook).remove)


def _pre_hook(stack: ExitStack, module: torch.nn.Module, see) -> None:
    """Calls `see(input)` before a module's forward."""

    def hook(_module, args, kwargs):
        see(args[0] if args else kwargs["hidden_states"])

    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
