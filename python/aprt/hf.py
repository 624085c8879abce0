"""Hooks on a Hugging Face causal language model that write every stage of its forwards to a capture.

Looking changes nothing: hooks read values that the model computes anyway. The values inside attention
have no module, so the model file's eager attention function is wrapped, and the input of its softmax
observed. One value is not the model's own: `qkv_matmul` of a projection with bias. Torch fuses product
and bias, so the product alone is computed beside it, and `qkv_bias`, which is the model's own value,
need not be `qkv_matmul + bias` to the bit.

Refuses what a capture could not describe faithfully: batches, padding, sliding windows, another
attention implementation than eager, and architectures whose stages nobody has checked.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .errors import AprtError
from .plan import plan_ops, tool
from .stages import Dims, Rows, Site, select_sites
from .store import CaptureWriter, StepInfo, StepWriter, TensorSpec

SUPPORTED = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_architecture(model_type: str | None, where: object) -> None:
    if model_type not in SUPPORTED:
        raise AprtError(
            f"{where}: architecture {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}"
        )


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
    )


def model_config(model: torch.nn.Module, dims: Dims) -> dict:
    """The manifest's `config`, in the spellings of `config.json`."""
    rope = model.config.rope_parameters
    return {
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
    tokens_text: Sequence[str] | None = None,
    provenance: Provenance = Provenance(),
):
    """Captures every forward of `model` inside the `with` block, one step each, into the directory `out`.

    The capture appears under its name when the block ends; after an exception nothing is left.
    `token_ids` (and `tokens_text`) are those of the whole sequence, by position. They are needed only
    where the model is called with `inputs_embeds`; otherwise the ids are those of the call.
    """
    _check_model(model)
    dims = model_dims(model)
    sites = select_sites(dims, stages, layers)
    ops = plan_ops(model, dims, provenance.weight_types or {})
    writer = CaptureWriter(out, force=force)
    taps = _Taps(model, dims, sites, Rows(rows), writer, token_ids, tokens_text)
    try:
        with taps.attached():
            yield
        if not any(step["tensors"] for step in writer.steps):
            raise AprtError(f"{out}: no forward computed any of the rows {rows!r}; nothing to capture")
        dtype = _type_name(model.dtype)
        writer.finish(
            {
                "tool": tool(),
                "model": {
                    "path": provenance.path,
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
    if name not in SUPPORTED.values():
        raise AprtError(f"{name}: not supported; supported: {', '.join(SUPPORTED.values())}")
    implementation = model.config._attn_implementation
    if implementation != "eager":
        raise AprtError(
            f"{name}: attention {implementation!r} hides its scores; load with attn_implementation='eager'"
        )
    if model.training:
        raise AprtError(f"{name}: the model is in training mode; call model.eval() first")
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise AprtError(f"{name}: sliding window attention is not supported")
    _type_name(model.dtype)


class _SoftmaxInput(TorchFunctionMode):
    """Observes what the attention function gives to softmax: the scaled scores plus the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.value: torch.Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.softmax:
            self.value = args[0]
        return func(*args, **(kwargs or {}))


class _Taps:
    """The hooks of one capture, and the step that is being written."""

    def __init__(
        self,
        model: torch.nn.Module,
        dims: Dims,
        sites: Sequence[Site],
        rows: Rows,
        writer: CaptureWriter,
        token_ids: Sequence[int] | None,
        tokens_text: Sequence[str] | None,
    ):
        self._model, self._dims, self._sites, self._rows = model, dims, sites, rows
        self._writer, self._token_ids, self._tokens_text = writer, token_ids, tokens_text
        self._signature = inspect.signature(model.forward)
        self._step: StepWriter | None = None
        self._picked: list[int] = []  # rows of the step to keep
        self._picked_logits: list[int] = []  # the same, as rows of the lm_head's input
        self._past = 0
        self._chunk = -1
        self._slot = -1

    # Steps

    def _begin(self, _module, args, kwargs) -> None:
        call = self._signature.bind(*args, **kwargs).arguments
        call.update(call.pop("kwargs", {}))
        positions, ids = self._inputs(call)
        self._picked = self._rows.pick(positions)
        keep = call.get("logits_to_keep", 0)
        if not isinstance(keep, int):
            raise AprtError("logits_to_keep: only a number of rows is supported, not a tensor of indices")
        first_logit = max(len(positions) - keep, 0) if keep else 0
        self._picked_logits = [i - first_logit for i in self._picked if i >= first_logit]

        decode = self._past > 0 and len(positions) == 1
        if self._past == 0:
            self._chunk, self._slot = 0, self._slot + 1
        elif not decode:
            self._chunk += 1
        text = self._tokens_text
        info = StepInfo(
            phase="decode" if decode else "prefill",
            token_ids=ids,
            positions=positions,
            chunk=0 if decode else self._chunk,
            slot=self._slot,
            tokens_text=[text[p] for p in positions] if text and positions[-1] < len(text) else None,
        )
        kept = {"lm_head": [i + first_logit for i in self._picked_logits]}
        specs = step_layout(self._dims, self._sites, positions, self._picked, kept)
        self._step = self._writer.step(info, specs)

    def _inputs(self, call: Mapping) -> tuple[list[int], list[int]]:
        """Positions and token ids of a call, refusing what one slot cannot hold."""
        given = call.get("input_ids")
        shaped = given if given is not None else call.get("inputs_embeds")
        if shaped is None:
            raise AprtError("the model was called with neither input_ids nor inputs_embeds")
        if shaped.shape[0] != 1:
            raise AprtError(f"batch of {shaped.shape[0]} sequences: a capture holds one; call with one")
        cache, n = call.get("past_key_values"), shaped.shape[1]
        self._past = 0 if cache is None else int(cache.get_seq_length())
        positions = list(range(self._past, self._past + n))
        declared = call.get("position_ids")
        if declared is not None and declared.reshape(-1).tolist() != positions:
            raise AprtError(f"position_ids other than {positions[0]}..{positions[-1] + 1} are not supported")
        mask = call.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.all()):
            raise AprtError("attention_mask: padding and custom masks are not supported")

        known = None if self._token_ids is None else list(self._token_ids)[self._past : self._past + n]
        if known is not None and len(known) != n:
            raise AprtError(f"token_ids has {len(self._token_ids)} ids, and the model reads position {positions[-1]}")
        if given is None:
            if known is None:
                raise AprtError("the model was called with inputs_embeds: give token_ids to the capture")
            return positions, known
        ids = given[0].tolist()
        if known is not None and known != ids:
            raise AprtError(f"token_ids and the model's input differ at positions {positions[0]}..{positions[-1] + 1}")
        return positions, ids

    def _end(self, _module, _args, _output) -> None:
        step, self._step = self._step, None
        step.close()

    def abandon(self) -> None:
        if self._step is not None:
            self._step.abandon()

    # Values

    def _wants(self, stage: str, layer: int | None) -> bool:
        return self._step is not None and self._step.wants(_site_name(stage, layer))

    def _put(self, stage: str, layer: int | None, value: torch.Tensor, row_axis: int = 0) -> None:
        """Stores the chosen rows of a value without its batch axis."""
        if not self._wants(stage, layer):
            return
        picked = self._picked_logits if stage == "lm_head" else self._picked
        value = value.detach()
        if len(picked) != value.shape[row_axis]:
            value = value.index_select(row_axis, torch.tensor(picked, device=value.device))
        self._step.put(_site_name(stage, layer), value.to("cpu", torch.float32).contiguous().numpy())

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
        hook(mlp.gate_proj, put("ffn_gate"))
        hook(mlp.up_proj, put("ffn_up"))
        hook(mlp.act_fn, put("ffn_silu"))
        pre_hook(mlp.down_proj, put_input("ffn_swigl"))
        hook(mlp.down_proj, put("ffn_out"))
        hook(layer, put("post_ffn_residual"))

    @contextmanager
    def _attention_wrapped(self):
        """Wraps the eager attention function of the model's source file; other models pass through."""
        layers = {layer.self_attn: i for i, layer in enumerate(self._model.model.layers)}
        source = sys.modules[type(self._model.model.layers[0].self_attn).__module__]
        original = source.eager_attention_forward

        @functools.wraps(original)
        def watched(module, query, key, value, attention_mask, *args, **kwargs):
            if module not in layers or self._step is None:
                return original(module, query, key, value, attention_mask, *args, **kwargs)
            with _SoftmaxInput() as softmax:
                output, weights = original(module, query, key, value, attention_mask, *args, **kwargs)
            self._attention(layers[module], query, key, attention_mask, softmax.value, weights)
            return output, weights

        source.eager_attention_forward = watched
        try:
            yield
        finally:
            source.eager_attention_forward = original

    def _attention(self, layer, query, key, mask, softmax_input, weights) -> None:
        rows = query.shape[2]
        if key.shape[2] != self._past + rows:
            raise AprtError(
                f"layer {layer}: attention sees {key.shape[2]} cached positions of {self._past + rows}; "
                "use a DynamicCache"
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

    def __init__(self, taps: _Taps, layer: int):
        self._taps, self._layer = taps, layer
        self._products: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}

    def computed(self, name: str, linear: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor) -> None:
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


def step_layout(
    dims: Dims,
    sites: Sequence[Site],
    positions: Sequence[int],
    picked: Sequence[int],
    kept: Mapping[str, Sequence[int]] | None = None,
) -> list[TensorSpec]:
    """The tensors of a step, known before it runs. `kept` overrides the rows of single stages."""
    specs = []
    for site in sites:
        rows = (kept or {}).get(site.stage.name, picked)
        if rows:
            shape = site.stage.shape(dims, len(rows), positions[-1] + 1)
            own = tuple(positions[i] for i in rows)
            specs.append(TensorSpec(site.name, site.stage.name, site.layer, shape, site.stage.axes, own))
    return specs


def _site_name(stage: str, layer: int | None) -> str:
    return stage if layer is None else f"layers.{layer}.{stage}"


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
