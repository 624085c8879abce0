"""Runs a model file through Hugging Face transformers and captures it: what `apr-oracle hf` does.

Loads (a directory here, a GGUF in `gguf_model`), makes token ids of the prompt, then prefills and
decodes with the model's own cache. The hooks are in `hf`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from . import gguf_model
from .errors import AprtError
from .hf import DTYPES, Provenance, capture, check_architecture, model_dims
from .stages import Rows, select_sites
from .store import read_manifest
from .taps import step_layout

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Prompt:
    """Token ids to prefill, then ids to decode one by one, or a number of greedy steps."""

    ids: list[int]
    forced: list[int] = field(default_factory=list)
    greedy: int = 0
    mode: str = "tokens"
    text: str | None = None
    token_text: Callable[[int], str | None] | None = None


@dataclass(frozen=True)
class Selection:
    stages: str = "all"
    layers: str = "all"
    rows: str = "all"


# Models


def load(
    path: Path, dtype: str, hf_config: Path | None = None
) -> tuple[torch.nn.Module, Provenance]:
    """A model for eager attention in `dtype`, and where it came from."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if path.is_dir():
        if hf_config is not None:
            raise AprtError(
                f"{path}: --hf-config is for GGUF files; a directory has its own config.json"
            )
        model, provenance = _load_directory(path, DTYPES[dtype])
    elif path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise AprtError(
                f"{path}: neither a GGUF file nor a directory with config.json and safetensors"
            )
        model, index = gguf_model.load(path, DTYPES[dtype], hf_config)
        provenance = Provenance(str(path), "gguf", index_sha256(index.tensors), index.weight_types)
    else:
        raise AprtError(f"{path}: no such file or directory")
    return model.eval(), provenance


def _load_directory(path: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, Provenance]:
    config = _read_json(path / "config.json")
    check_architecture(config.get("model_type"), path)
    if "quantization_config" in config:
        raise AprtError(
            f"{path}: quantised checkpoints are not supported; give the unquantised one or a GGUF"
        )
    index = _safetensors_index(path)
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by name
    )
    problems = {
        "are missing from the files": info["missing_keys"],
        "have another shape than config.json says": {name for name, *_ in info["mismatched_keys"]},
        "belong to no parameter of the model": info["unexpected_keys"],
    }
    for problem, names in problems.items():
        if names:
            raise AprtError(f"{path}: tensors {problem}: {', '.join(sorted(names))}")
    types = {name: dtype for name, dtype, _ in index}
    return model, Provenance(str(path), "safetensors", index_sha256(index), types)


def _safetensors_index(path: Path) -> list[tuple[str, str, Sequence[int]]]:
    """Name, dtype and shape of every tensor, from the headers."""
    if (path / SINGLE).is_file():
        files = [SINGLE]
    elif (path / INDEX).is_file():
        files = sorted(set(_read_json(path / INDEX)["weight_map"].values()))
    else:
        raise AprtError(f"{path}: no {SINGLE} and no {INDEX}; other weight formats are not read")
    entries = []
    for name in files:
        try:
            with safe_open(path / name, framework="np") as file:
                slices = ((key, file.get_slice(key)) for key in file.keys())
                entries += [(key, s.get_dtype(), s.get_shape()) for key, s in slices]
        except (OSError, SafetensorError) as error:
            raise AprtError(f"{path / name}: not a readable safetensors file: {error}") from None
    return entries


def index_sha256(entries: Iterable[tuple[str, str, Sequence[int]]]) -> str:
    lines = (
        f"{name} {dtype} {','.join(map(str, shape))}\n" for name, dtype, shape in sorted(entries)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AprtError(f"{path}: missing") from None
    except ValueError as error:
        raise AprtError(f"{path}: not JSON: {error}") from None


# Prompts


def parse_tokens(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise AprtError(f"--tokens {text!r}: expected token ids like 1,2,3") from None


def prompt_from_capture(directory: Path) -> Prompt:
    """The token ids of a capture: its prefill chunks as one prompt, its decode steps one by one."""
    steps = read_manifest(directory)["steps"]
    if any(step.get("slot", 0) != 0 for step in steps):
        raise AprtError(f"{directory}: holds several sequences (slots); only one can be replayed")
    ids: list[int] = []
    texts: dict[int, str] = {}
    for step in steps:
        expected = list(range(len(ids), len(ids) + len(step["token_ids"])))
        if step["positions"] != expected:
            raise AprtError(
                f"{directory}: {step['file']} does not continue the sequence at position {len(ids)}"
            )
        ids += step["token_ids"]
        texts.update(zip(step["token_ids"], step.get("tokens_text", ()), strict=False))
    decodes = [step["phase"] == "decode" for step in steps]
    lengths = {len(step["token_ids"]) for step in steps if step["phase"] == "decode"}
    if decodes != sorted(decodes) or not lengths <= {1}:
        raise AprtError(f"{directory}: expected prefill steps, then decode steps of one token each")
    split = len(ids) - sum(decodes)
    return Prompt(ids[:split], ids[split:], token_text=texts.get)


def prompt_from_text(model_path: Path, text: str, chat: bool) -> Prompt:
    """Token ids of a text, by the directory's tokenizer.json and, for `chat`, its chat template."""
    tokenizer = _tokenizer(model_path)
    if tokenizer is None:
        raise AprtError(
            f"{model_path}: -p needs a Hugging Face directory with tokenizer.json; "
            "give --tokens or --tokens-from"
        )
    if chat:
        templates = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
        if not templates.chat_template:
            raise AprtError(f"{model_path}: has no chat template; drop --chat")
        messages = [{"role": "user", "content": text}]
        rendered = templates.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(rendered, add_special_tokens=False).ids
    else:
        ids = tokenizer.encode(text).ids
    return Prompt(ids, mode="chat" if chat else "text", text=text)


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)


def _tokenizer(model_path: Path) -> Tokenizer | None:
    path = model_path / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.is_file() else None


# Runs


def run(
    path: Path,
    model: torch.nn.Module,
    provenance: Provenance,
    prompt: Prompt,
    out: Path,
    selection: Selection,
    *,
    force: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> dict:
    """Captures a prefill and the decode steps of `prompt`; returns a summary."""
    _check_ids(model, prompt.ids + prompt.forced)
    count = len(prompt.forced) or prompt.greedy
    size = estimate(model, len(prompt.ids), count, selection)
    note(f"{1 + count} steps, {size / 1e6:.1f} MB of tensors, to {out}")

    tokenizer = _tokenizer(path)
    if tokenizer is None:
        token_text = prompt.token_text
    else:
        token_text = partial(_token_text, tokenizer)
    with capture(
        model,
        out,
        stages=selection.stages,
        layers=selection.layers,
        rows=selection.rows,
        force=force,
        prompt={"mode": prompt.mode, "text": prompt.text},
        token_text=token_text,
        provenance=provenance,
    ):
        decoded = _forward(model, prompt)
    manifest = read_manifest(out)
    tensors = [tensor for step in manifest["steps"] for tensor in step["tensors"]]
    return {
        "schema": "apr-oracle/1",
        "output": os.fspath(out),
        "model": manifest["model"],
        "token_ids": prompt.ids,
        "decoded_ids": decoded,
        "steps": len(manifest["steps"]),
        "tensors": len(tensors),
        "bytes": size,
    }


@torch.no_grad()
def _forward(model: torch.nn.Module, prompt: Prompt) -> list[int]:
    """Runs all steps; returns the greedy choice after each."""
    cache = DynamicCache(config=model.config)
    chosen: list[int] = []

    def step(ids: list[int]) -> None:
        inputs = torch.tensor([ids], device=model.device)
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits
        chosen.append(int(logits[0, -1].argmax()))

    step(prompt.ids)
    for token in prompt.forced:
        step([token])
    for _ in range(prompt.greedy):
        step([chosen[-1]])
    return chosen


def _check_ids(model: torch.nn.Module, ids: Sequence[int]) -> None:
    vocab = model.model.embed_tokens.num_embeddings
    if not ids:
        raise AprtError("the prompt is empty: it has no token")
    wrong = [i for i in ids if not 0 <= i < vocab]
    if wrong:
        raise AprtError(f"token id {wrong[0]}: the model's vocabulary has ids 0..{vocab}")


def estimate(model: torch.nn.Module, prompt: int, decode: int, selection: Selection) -> int:
    """Bytes of all tensors that a run will write."""
    dims, rows = model_dims(model), Rows(selection.rows)
    sites = select_sites(dims, selection.stages, selection.layers)
    steps = [range(prompt), *([position] for position in range(prompt, prompt + decode))]
    layouts = (step_layout(dims, sites, list(s), rows.pick(list(s))) for s in steps)
    return sum(spec.nbytes for layout in layouts for spec in layout)
