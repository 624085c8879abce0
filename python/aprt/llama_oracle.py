"""Runs a GGUF file through llama.cpp and captures it: what `apr-oracle llama-cpp` does.

llama.cpp runs as its users run it, on the CPU: with its own kernels, repacked weights and threads.
The only differences are that the logits of every row are asked for (otherwise the last layer
computes the last row alone) and that a prompt is one batch, however long. Looking at nodes splits
the graph between them, and changes no value.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import llama_cpp
import numpy as np

from . import flash_probe, ggml, gguf_file
from .errors import AprtError
from .gguf_file import GgufFile
from .layout import run_bytes, step_layout
from .llama_nodes import FLASH, NodeTable
from .llama_plan import Plan, rounded_to
from .llama_taps import Taps
from .prompts import Prompt, Selection, check_ids, summary
from .stages import EXPERT_CONFIG, STAGES, Dims, Experts, Rows, select_sites
from .store import CaptureWriter, StepInfo, index_sha256

FLASH_ATTENTION = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
CACHE_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32}
_LOG_ERROR = 4  # enum ggml_log_level
_BATCH = 512  # tokens in a batch that llama.cpp allows without being asked


@dataclass(frozen=True)
class Settings:
    """How to run the model; the names are those of the command's options."""

    flash_attention: str = "auto"
    kv: str = "f16"
    threads: int = os.cpu_count() or 1


# Models


class Model:
    """A loaded model, and what its file says about it."""

    def __init__(self, file: GgufFile, handle, config: dict, dims: Dims):
        self.file, self.handle, self.config, self.dims = file, handle, config, dims
        self.vocab = llama_cpp.llama_model_get_vocab(handle)
        self.interleaved = llama_cpp.llama_model_rope_type(handle) == llama_cpp.LLAMA_ROPE_TYPE_NORM

    @property
    def has_tokenizer(self) -> bool:
        return llama_cpp.llama_vocab_type(self.vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids of a text; `special` adds what the file's tokenizer adds to a prompt."""
        if not self.has_tokenizer:
            raise AprtError(f"{self.file.path}: holds no tokenizer; give --tokens or --tokens-from")
        raw = text.encode()
        ids = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), special, True)
        if count < 0:
            raise AprtError(f"{self.file.path}: llama.cpp cannot tokenize the text")
        return list(ids[:count])

    def token_text(self, token: int) -> str:
        buffer = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(count, 0)].decode(errors="replace")


@contextmanager
def load(path: Path):
    """The model of a GGUF file, on the CPU."""
    if not path.exists():
        raise AprtError(f"{path}: no such file")
    if path.is_dir() or _magic(path) != gguf_file.MAGIC:
        raise AprtError(f"{path}: not a GGUF file; llama.cpp runs no other")
    file = gguf_file.open_file(path)
    config, dims = _describe(file)
    with _errors() as errors:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        no_devices = (ctypes.c_void_p * 1)()
        parameters.devices = ctypes.cast(no_devices, ctypes.c_void_p)
        handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not handle:
            raise AprtError(f"{path}: llama.cpp cannot load it: {_reason(errors)}")
        try:
            yield Model(file, handle, config, dims)
        finally:
            llama_cpp.llama_model_free(handle)


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(gguf_file.MAGIC))


def _describe(file: GgufFile) -> tuple[dict, Dims]:
    """The manifest's `config`, and the numbers that shapes are made of."""
    settings, names = gguf_file.settings(file), {name for name, *_ in file.tensors}
    dims = Dims(
        layers=settings["num_hidden_layers"],
        hidden=settings["hidden_size"],
        heads=settings["num_attention_heads"],
        kv_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        ffn=settings["intermediate_size"],
        vocab=settings["vocab_size"],
        qkv_bias="blk.0.attn_q.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        experts=_experts(file, settings),
    )
    kept = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    config = {key: settings[key] for key in kept}
    config |= {
        "attention_bias": dims.qkv_bias,
        "qk_norm": dims.qk_norm,
        "rope_theta": settings["rope_parameters"]["rope_theta"],
    }
    if dims.experts is not None:
        config |= {key: settings[key] for key in EXPERT_CONFIG}
    return config, dims


def _experts(file: GgufFile, settings: dict) -> Experts | None:
    if "num_experts" not in settings:
        return None
    if not settings["norm_topk_prob"] or settings["mlp_only_layers"]:
        raise AprtError(
            f"{file.path}: llama.cpp has experts in every layer and always divides their weights "
            "by the sum; this file says otherwise"
        )
    return Experts(
        count=settings["num_experts"],
        used=settings["num_experts_per_tok"],
        ffn=settings["moe_intermediate_size"],
        layers=frozenset(range(settings["num_hidden_layers"])),
    )


@contextmanager
def _errors():
    """Silences llama.cpp, and collects the errors that it would have printed."""
    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level, text, _user):
        if level == _LOG_ERROR:
            errors.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(log, None)
    try:
        yield errors
    finally:
        # A callback that Python has freed must not stay; None would restore printing.
        llama_cpp.llama_log_set(_SILENT, None)


_SILENT = llama_cpp.llama_log_callback(lambda _level, _text, _user: None)


def _reason(errors: Sequence[str]) -> str:
    """The first error that was logged: the others say that something failed because of it."""
    return errors[0] if errors else "it says no reason"


# Prompts


def prompt_from_text(model: Model, text: str, chat: bool) -> Prompt:
    """Token ids of a text, by the file's own tokenizer and, for `chat`, its chat template."""
    if not chat:
        return Prompt(model.tokenize(text, special=True), mode="text", text=text)
    template = model.file.metadata.get("tokenizer.chat_template")
    if not template:
        raise AprtError(f"{model.file.path}: has no chat template; drop --chat")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    bos, eos = llama_cpp.llama_vocab_bos(model.vocab), llama_cpp.llama_vocab_eos(model.vocab)
    formatter = Jinja2ChatFormatter(
        template,
        eos_token=model.token_text(eos) if eos >= 0 else "",
        bos_token=model.token_text(bos) if bos >= 0 else "",
    )
    rendered = formatter(messages=[{"role": "user", "content": text}]).prompt
    return Prompt(model.tokenize(rendered, special=False), mode="chat", text=text)


# Runs


def run(
    model: Model,
    prompt: Prompt,
    out: Path,
    selection: Selection,
    settings: Settings,
    *,
    force: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> dict:
    """Captures a prefill and the decode steps of `prompt`; returns a summary."""
    check_ids(model.dims.vocab, prompt.ids + prompt.forced)
    steps = len(prompt.forced) or prompt.greedy
    rows = Rows(selection.rows)
    taps = Taps(_node_table(model), model.dims, model.interleaved)
    with _context(model, settings, len(prompt.ids), steps, taps.callback) as context:
        shown = _probe(context, taps)
        flash = FLASH in shown
        hidden = _hidden(model.dims, shown)
        sites = select_sites(model.dims, selection.stages, selection.layers, hidden)
        size = run_bytes(model.dims, sites, rows, len(prompt.ids), steps)
        note(f"{1 + steps} steps, {size / 1e6:.1f} MB of tensors, to {out}")
        accelerators = ggml.accelerators()
        if accelerators:
            note(f"the arithmetic is not declared: {', '.join(accelerators)} computes parts of it")
        texts = model.token_text if model.has_tokenizer else prompt.token_text
        writer = CaptureWriter(out, force=force)
        try:
            decoded = _forward(context, prompt, _Recorder(taps, writer, model, sites, rows, texts))
            if not any(step["tensors"] for step in writer.steps):
                raise AprtError(
                    f"{out}: no step computed any of the rows {rows.spec!r}; nothing to capture"
                )
            plan = Plan(
                model.dims,
                _types(model),
                flash=flash,
                kv=settings.kv.upper(),
                f16_shares=flash and _f16_shares(model.dims),
            )
            extents = [(len(s["positions"]), s["positions"][-1] + 1) for s in writer.steps]
            writer.finish(
                {
                    "tool": _tool(),
                    "model": _identity(model),
                    "prompt": {"mode": prompt.mode, "text": prompt.text},
                    "backend": _backend(model, settings),
                    "plan": None
                    if accelerators
                    else {"fingerprint": None, "ops": plan.ops(shown, extents)},
                    # Flash attention reads a cache of F32 through F16.
                    "kv": "f16" if flash else settings.kv,
                }
            )
        except BaseException:
            writer.abandon()
            raise
    return summary(out, prompt, decoded, size)


class _Context:
    """A context of one sequence."""

    def __init__(self, handle, vocab: int, path: Path):
        self._handle, self._vocab, self._path = handle, vocab, path

    def decode(self, ids: Sequence[int], first: int) -> np.ndarray:
        """Runs the tokens at the positions from `first` on; the logits of each."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, first + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = True
            code = llama_cpp.llama_decode(self._handle, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if code:
            raise AprtError(f"{self._path}: llama_decode failed with code {code}")
        logits = llama_cpp.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(logits, (len(ids), self._vocab)).copy()

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._handle), True)


@contextmanager
def _context(model: Model, settings: Settings, prompt: int, steps: int, callback):
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = prompt + steps
    parameters.n_batch = parameters.n_ubatch = max(prompt, _BATCH)
    parameters.n_threads = parameters.n_threads_batch = settings.threads
    parameters.flash_attn_type = FLASH_ATTENTION[settings.flash_attention]
    parameters.type_k = parameters.type_v = CACHE_TYPES[settings.kv]
    parameters.offload_kqv = parameters.op_offload = False
    parameters.cb_eval = callback
    with _errors() as errors, ExitStack() as stack:
        handle = llama_cpp.llama_init_from_model(model.handle, parameters)
        if not handle:
            raise AprtError(
                f"{model.file.path}: llama.cpp cannot make a context: {_reason(errors)}"
            )
        stack.callback(llama_cpp.llama_free, handle)
        yield _Context(handle, model.dims.vocab, model.file.path)


def _probe(context: _Context, taps: Taps) -> set[str]:
    """The stages that the graph has, seen in a run of one token that is forgotten again."""
    context.decode([0], 0)
    taps.end()
    context.forget()
    return taps.seen


def _hidden(dims: Dims, shown: set[str]) -> dict[str, str]:
    """Stages of the model that the graph does not have, and why."""
    reasons = {
        "attn_scores": "flash attention never has the scores; give --flash-attention off",
        "attn_softmax": "flash attention never has the shares; give --flash-attention off",
        "ffn_silu": "llama.cpp computes it together with ffn_swigl, and never has it alone",
        "moe_expert_silu": "llama.cpp computes it together with moe_expert_swigl",
    }
    return {
        stage.name: reasons.get(stage.name, "llama.cpp's graph of this model has no such node")
        for stage in STAGES
        if stage.layers(dims) and stage.name not in shown
    }


@dataclass(frozen=True)
class _Recorder:
    """Opens and closes the steps of a capture around what the engine computes."""

    taps: Taps
    writer: CaptureWriter
    model: Model
    sites: Sequence
    rows: Rows
    token_text: Callable[[int], str | None] | None

    @contextmanager
    def step(self, phase: str, ids: Sequence[int], first: int):
        positions = list(range(first, first + len(ids)))
        picked = self.rows.pick(positions)
        texts = [self.token_text(token) for token in ids] if self.token_text else [None]
        info = StepInfo(phase, ids, positions, tokens_text=None if None in texts else texts)
        layout = step_layout(self.model.dims, self.sites, positions, picked)
        self.taps.begin(self.writer.step(info, layout), positions, picked)
        try:
            yield
        except BaseException:
            self.taps.abandon()
            raise
        self.taps.end()


def _forward(context: _Context, prompt: Prompt, recorder: _Recorder) -> list[int]:
    """Runs all steps; returns the greedy choice after each."""
    chosen: list[int] = []
    position = 0

    def step(phase: str, ids: Sequence[int]) -> None:
        nonlocal position
        with recorder.step(phase, ids, position):
            logits = context.decode(ids, position)
        chosen.append(int(logits[-1].argmax()))
        position += len(ids)

    step("prefill", prompt.ids)
    for token in prompt.forced:
        step("decode", [token])
    for _ in range(prompt.greedy):
        step("decode", [chosen[-1]])
    return chosen


# What the manifest says


def _types(model: Model) -> dict[str, str]:
    return {name: kind for name, kind, _ in model.file.tensors}


def _node_table(model: Model) -> NodeTable:
    unknown = {kind for kind in _types(model).values() if rounded_to(kind) is None}
    if unknown:
        raise AprtError(
            f"{model.file.path}: the arithmetic of {', '.join(sorted(unknown))} is not known"
        )
    return NodeTable(_types(model))


def _f16_shares(dims: Dims) -> bool:
    return dims.head_dim >= flash_probe.CHANNELS and flash_probe.rounds_shares() is True


def _tool() -> dict:
    engine = f"llama-cpp-python {llama_cpp.__version__}"
    return {"name": "apr-oracle", "version": f"{version('apr-oracle')} ({engine})"}


def _identity(model: Model) -> dict:
    return {
        "path": str(model.file.path),
        "format": "gguf",
        "architecture": model.file.model_type,
        "index_sha256": index_sha256(model.file.tensors),
        "file_sha256": None,
        "config": model.config,
    }


def _backend(model: Model, settings: Settings) -> dict:
    features = llama_cpp.llama_print_system_info().decode()
    enabled = [
        word.split("=")[0].strip().rpartition(" ")[2]
        for word in features.split("|")
        if word.strip().endswith("= 1")
    ]
    backend = {
        "name": "llama.cpp",
        "isa": " ".join([platform.machine(), *enabled]),
        "threads": settings.threads,
    }
    if model.interleaved:
        # Query and key heads are captured in the order of halves all the same.
        backend["rope_pairs"] = "neighbours"
    return backend
