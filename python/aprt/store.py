"""Reading and writing captures (docs/capture.md).

A capture is written under a temporary name beside its final one and renamed when it is complete, so
that a killed run leaves nothing that looks like a capture. Knows no model and no framework.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np
import safetensors
from blake3 import blake3

from .errors import AprtError

SCHEMA = "apr-capture/1"
MANIFEST = "manifest.json"
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a step, known before the step runs."""

    name: str
    stage: str
    layer: int | None
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    positions: tuple[int, ...]
    dtype: str = "F32"

    @property
    def nbytes(self) -> int:
        return np.dtype(_NUMPY[self.dtype]).itemsize * prod(self.shape)


@dataclass(frozen=True)
class StepInfo:
    """What a forward step is given."""

    phase: str  # "prefill" or "decode"
    token_ids: Sequence[int]
    positions: Sequence[int]
    chunk: int = 0
    slot: int = 0
    tokens_text: Sequence[str] | None = None

    def to_manifest(self) -> dict:
        head = {
            "phase": self.phase,
            "chunk": self.chunk,
            "slot": self.slot,
            "token_ids": [int(t) for t in self.token_ids],
            "positions": [int(p) for p in self.positions],
        }
        if self.tokens_text is not None:
            head["tokens_text"] = list(self.tokens_text)
        return head


def index_sha256(entries: Iterable[tuple[str, str, Sequence[int]]]) -> str:
    """The manifest's `index_sha256`, of the name, dtype and shape of each tensor."""
    lines = (
        f"{name} {dtype} {','.join(map(str, shape))}\n" for name, dtype, shape in sorted(entries)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_target(out: Path, force: bool) -> None:
    """Refuses a directory that holds something, unless it is a capture and `force` is set."""
    if not out.exists():
        return
    if not out.is_dir():
        raise AprtError(f"{out}: exists and is not a directory")
    if not any(out.iterdir()):
        return
    if not force:
        raise AprtError(f"{out}: not empty; give another output, or --force to replace a capture")
    if not (out / MANIFEST).is_file():
        raise AprtError(f"{out}: --force replaces captures only, and this has no {MANIFEST}")


class CaptureWriter:
    """Writes one capture; `finish` makes it appear under its final name, `abandon` removes it."""

    def __init__(self, out: str | os.PathLike, *, force: bool = False):
        self.out = Path(os.path.abspath(out))
        check_target(self.out, force)
        self.partial = self.out.with_name(f"{self.out.name}.partial-{os.getpid()}")
        try:
            self.partial.mkdir(parents=True)
        except FileExistsError:
            raise AprtError(
                f"{self.partial}: exists already; another capture is being written"
            ) from None
        self.steps: list[dict] = []

    def step(self, info: StepInfo, tensors: Sequence[TensorSpec]) -> StepWriter:
        path = self.partial / f"step-{len(self.steps):04}.safetensors"
        return StepWriter(path, info, tensors, self.steps)

    def finish(self, head: Mapping) -> None:
        """Writes the manifest (`head`, then the steps) and renames the directory."""
        manifest = {"schema": SCHEMA, **head, "steps": self.steps, "complete": True}
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (self.partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
        if self.out.exists():
            old = self.out.with_name(f"{self.out.name}.old-{os.getpid()}")
            self.out.rename(old)
            self.partial.rename(self.out)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.out)

    def abandon(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


class StepWriter:
    """Streams the tensors of one step to their places in a safetensors file, in any order."""

    def __init__(self, path: Path, info: StepInfo, tensors: Sequence[TensorSpec], done: list[dict]):
        self._path, self._info, self._done = path, info, done
        self._specs = {spec.name: spec for spec in tensors}
        self._entries: dict[str, dict] = {}
        header, self._offsets = _layout(tensors)
        self._file = open(path, "wb")
        self._file.write(header)

    def wants(self, name: str) -> bool:
        return name in self._specs

    def put(self, name: str, value: np.ndarray) -> None:
        """Stores one tensor. Its shape is the one announced, and it comes once."""
        spec = self._specs[name]
        if value.shape != spec.shape:
            raise AprtError(
                f"{name}: the model computed shape {value.shape}, expected {spec.shape}"
            )
        if name in self._entries:
            raise AprtError(f"{name}: computed twice in one step")
        data = np.ascontiguousarray(value, dtype=_NUMPY[spec.dtype]).tobytes()
        self._file.seek(self._offsets[name])
        self._file.write(data)
        self._entries[name] = {
            "name": name,
            "stage": spec.stage,
            "layer": spec.layer,
            "shape": list(spec.shape),
            "axes": list(spec.axes),
            "dtype": spec.dtype,
            "positions": list(spec.positions),
            "blake3": blake3(data).hexdigest(),
        }

    def close(self) -> None:
        """Ends the step; a tensor that never came is an error, not a gap."""
        self._file.close()
        missing = [name for name in self._specs if name not in self._entries]
        if missing:
            raise AprtError(f"{self._path.name}: the model did not compute {', '.join(missing)}")
        tensors = [self._entries[name] for name in self._specs]
        self._done.append({"file": self._path.name, **self._info.to_manifest(), "tensors": tensors})

    def abandon(self) -> None:
        self._file.close()


def _layout(tensors: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The safetensors header, and the place of each tensor in the file."""
    entries, end = {}, 0
    for spec in tensors:
        start, end = end, end + spec.nbytes
        place = {"shape": spec.shape, "data_offsets": [start, end]}
        entries[spec.name] = {"dtype": spec.dtype, **place}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + e["data_offsets"][0] for name, e in entries.items()}


@dataclass(frozen=True, eq=False)
class Step(Mapping):
    """One step of a capture: a mapping from tensor names to arrays, and its manifest entry."""

    manifest: Mapping
    tensors: Mapping[str, np.ndarray] = field(repr=False)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True)
class Capture:
    """A capture that was read and verified."""

    path: Path
    manifest: Mapping
    steps: Sequence[Step] = field(repr=False)


def read_manifest(directory: str | os.PathLike) -> dict:
    """The manifest of a complete capture."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AprtError(f"{path}: missing; not a capture, or one that was interrupted") from None
    except (OSError, ValueError) as error:
        raise AprtError(f"{path}: not a readable manifest: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise AprtError(f"{path}: not a capture of schema {SCHEMA}")
    if manifest.get("complete") is not True:
        raise AprtError(f"{path}: the capture is incomplete (interrupted); write it again")
    return manifest


def read(directory: str | os.PathLike) -> Capture:
    """Reads a capture and verifies the hash and the shape of every tensor."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    steps = [_read_step(directory, step) for step in manifest["steps"]]
    return Capture(directory, manifest, steps)


def _read_step(directory: Path, entry: Mapping) -> Step:
    path = directory / entry["file"]
    try:
        stored = dict(safetensors.deserialize(path.read_bytes()))
    except (OSError, safetensors.SafetensorError) as error:
        raise AprtError(f"{path}: not a readable step: {error}") from None
    tensors = {}
    for described in entry["tensors"]:
        name = described["name"]
        if name not in stored:
            raise AprtError(f"{path}: {name} is in the manifest and not in the file")
        raw = stored.pop(name)
        if [raw["dtype"], list(raw["shape"])] != [described["dtype"], described["shape"]]:
            raise AprtError(f"{path}: {name} is not of the dtype and shape that the manifest says")
        if blake3(raw["data"]).hexdigest() != described["blake3"]:
            raise AprtError(f"{path}: {name} was changed after it was written (blake3 differs)")
        tensors[name] = _to_numpy(raw)
    if stored:
        raise AprtError(f"{path}: {', '.join(stored)} is in the file and not in the manifest")
    return Step(entry, MappingProxyType(tensors))


def _to_numpy(raw: Mapping) -> np.ndarray:
    if raw["dtype"] == "BF16":  # numpy has no bfloat16; widening to float32 is exact
        bits = np.frombuffer(raw["data"], "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(raw["shape"])
    if raw["dtype"] not in _NUMPY:
        raise AprtError(f"dtype {raw['dtype']} does not occur in captures")
    return np.frombuffer(raw["data"], _NUMPY[raw["dtype"]]).reshape(raw["shape"])
