"""Runs a model file through Hugging Face transformers and captures it: what `apr-oracle hf` does.

Loads (a directory here, a GGUF in `gguf_model`), makes token ids of the prompt, then prefills and
decodes with the model's own cache. The hooks are in `hf`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from . import gguf_model
from .errors import AprtError
from .hf import DTYPES, EAGER, Provenance, capture, model_dims
from .layout import run_bytes
from .prompts import Prompt, Selection, check_ids, summary
from .stages import Rows, check_architecture, select_sites
from .store import index_sha256

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
    _check_experts(path, config, {name for name, *_ in index})
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        **EAGER,
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
    types = {_without_expert(name): dtype for name, dtype, _ in index}
    return model, Provenance(str(path), "safetensors", index_sha256(index), types)


_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def _check_experts(path: Path, config: dict, names: set[str]) -> None:
    """Names the tensors that experts lack; transformers only says that it cannot fuse them."""
    count = config.get("num_experts", config.get("num_local_experts", 0))
    mixtures = {match[1] for name in names if (match := _EXPERT.fullmatch(name))}
    expected = {
        f"{experts}.{i}.{part}_proj.weight"
        for experts in mixtures
        for i in range(count)
        for part in ("gate", "up", "down")
    }
    if missing := expected - names:
        raise AprtError(f"{path}: tensors are missing from the files: {', '.join(sorted(missing))}")


def _without_expert(name: str) -> str:
    """The name of a tensor of one expert as that of all experts, which are of one type."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


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


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AprtError(f"{path}: missing") from None
    except ValueError as error:
        raise AprtError(f"{path}: not JSON: {error}") from None


# Prompts


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
    dims = model_dims(model)
    check_ids(dims.vocab, prompt.ids + prompt.forced)
    count = len(prompt.forced) or prompt.greedy
    sites = select_sites(dims, selection.stages, selection.layers)
    size = run_bytes(dims, sites, Rows(selection.rows), len(prompt.ids), count)
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
    return summary(out, prompt, decoded, size)


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
