"""Reference captures: every stage of a model's forward pass, as another engine computes it.

`capture` wraps a Hugging Face module, `read` opens a capture. Writing one needs the `hf` extra
(torch, transformers); reading needs neither, so torch is imported on the first use of `capture`.
"""

from .errors import AprtError
from .store import Capture, Step, read

__all__ = ["AprtError", "Capture", "Step", "capture", "read"]


def __getattr__(name: str):
    if name == "capture":
        from .hf import capture

        return capture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
