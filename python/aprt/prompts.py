"""What a run is asked for, whatever the engine: the tokens, what to keep of them, the summary."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import AprtError
from .store import read_manifest


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


def check_ids(vocab: int, ids: Sequence[int]) -> None:
    if not ids:
        raise AprtError("the prompt is empty: it has no token")
    wrong = [i for i in ids if not 0 <= i < vocab]
    if wrong:
        raise AprtError(f"token id {wrong[0]}: the model's vocabulary has ids 0..{vocab}")


def summary(out: Path, prompt: Prompt, decoded: list[int], size: int) -> dict:
    """What a finished run reports; `decoded` are the greedy choices after each step."""
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
