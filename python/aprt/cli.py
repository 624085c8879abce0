"""The `apr-oracle` command: one subcommand per engine that captures are taken from.

Data go to stdout, notes to stderr. On an error the exit code is 2, and one line says what to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from .errors import AprtError
from .prompts import Prompt, Selection, parse_tokens, prompt_from_capture
from .store import check_target


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted")
    except AprtError as error:
        return _fail(str(error))
    except Exception as error:
        if arguments.traceback:
            raise
        return _fail(f"{type(error).__name__}: {error} (--traceback shows where)")


def _fail(message: str) -> int:
    print(f"apr-oracle: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apr-oracle", description="Capture every stage of a reference engine."
    )
    engines = parser.add_subparsers(metavar="ENGINE", required=True)
    _add_hf(engines)
    _add_llama_cpp(engines)
    return parser


def _add_hf(engines) -> None:
    hf = _add_engine(
        engines,
        "hf",
        help="Hugging Face transformers (torch, eager attention)",
        description="Capture Hugging Face transformers.",
        model="Hugging Face directory, or GGUF file",
        text="text, by the directory's tokenizer.json",
    )
    hf.set_defaults(run=_run_hf)
    hf.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="type to compute in (default: %(default)s)",
    )
    hf.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="config.json to use instead of a GGUF's metadata",
    )


def _add_llama_cpp(engines) -> None:
    llama = _add_engine(
        engines,
        "llama-cpp",
        help="llama.cpp (llama-cpp-python, on the CPU)",
        description="Capture llama.cpp, node by node.",
        model="GGUF file",
        text="text, by the file's own tokenizer",
    )
    llama.set_defaults(run=_run_llama_cpp)
    llama.add_argument(
        "--flash-attention",
        choices=("auto", "on", "off"),
        default="auto",
        help="fused attention, which has no attn_scores and no attn_softmax (default: %(default)s)",
    )
    llama.add_argument(
        "--kv",
        choices=("f16", "f32"),
        default="f16",
        help="type of the cached keys and values (default: %(default)s)",
    )


def _add_engine(
    engines, name: str, *, help: str, description: str, model: str, text: str
) -> argparse.ArgumentParser:
    """A subcommand with the options that all engines have."""
    engine = engines.add_parser(name, help=help, description=description)
    engine.add_argument("model", type=Path, metavar="MODEL", help=model)
    prompt = engine.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--tokens", metavar="IDS", help="token ids: 1,2,3")
    prompt.add_argument(
        "--tokens-from",
        type=Path,
        metavar="CAPTURE",
        help="token ids and decode steps of a capture, replayed",
    )
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help=text)
    engine.add_argument("--chat", action="store_true", help="put TEXT in the model's chat template")
    engine.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the capture to write"
    )
    engine.add_argument("--force", action="store_true", help="replace the capture that DIR holds")
    engine.add_argument(
        "--decode",
        type=int,
        default=0,
        metavar="N",
        help="greedy steps after the prefill, each captured",
    )
    engine.add_argument(
        "--stages",
        default="all",
        metavar="LIST",
        help="stages to keep, comma separated (default: all)",
    )
    engine.add_argument(
        "--layers", default="all", metavar="LIST", help="layers to keep: 0..4,7,last (default: all)"
    )
    engine.add_argument(
        "--rows", default="all", help="token positions to keep: all, last or A..B (default: all)"
    )
    engine.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    engine.add_argument("--json", action="store_true", help="print a summary as JSON")
    engine.add_argument(
        "--traceback", action="store_true", help="show the Python traceback of unexpected errors"
    )
    return engine


def _run_hf(arguments: argparse.Namespace) -> int:
    _check(arguments)
    try:
        import torch

        from . import oracle
    except ImportError as error:
        raise _missing_extra(error, "hf") from None

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    check_target(arguments.output, arguments.force)  # before the model is loaded
    prompt = _prompt(arguments, partial(oracle.prompt_from_text, arguments.model))
    model, provenance = oracle.load(arguments.model, arguments.dtype, arguments.hf_config)
    summary = oracle.run(
        arguments.model,
        model,
        provenance,
        prompt,
        arguments.output,
        _selection(arguments),
        force=arguments.force,
        note=_note,
    )
    return _report(arguments, summary)


def _run_llama_cpp(arguments: argparse.Namespace) -> int:
    _check(arguments)
    try:
        from . import llama_oracle
    except ImportError as error:
        raise _missing_extra(error, "llama-cpp") from None

    check_target(arguments.output, arguments.force)  # before the model is loaded
    settings = llama_oracle.Settings(arguments.flash_attention, arguments.kv)
    if arguments.threads is not None:
        settings = replace(settings, threads=arguments.threads)
    with llama_oracle.load(arguments.model) as model:
        prompt = _prompt(arguments, partial(llama_oracle.prompt_from_text, model))
        summary = llama_oracle.run(
            model,
            prompt,
            arguments.output,
            _selection(arguments),
            settings,
            force=arguments.force,
            note=_note,
        )
    return _report(arguments, summary)


def _check(arguments: argparse.Namespace) -> None:
    """Refuses options that contradict each other."""
    if arguments.chat and arguments.prompt is None:
        raise AprtError("--chat goes with -p TEXT")
    if arguments.decode < 0:
        raise AprtError(f"--decode {arguments.decode}: expected a number of steps")
    if arguments.decode and arguments.tokens_from is not None:
        raise AprtError(
            "--decode: --tokens-from replays the decode steps of its capture; give one of the two"
        )
    if arguments.threads is not None and arguments.threads < 1:
        raise AprtError(f"--threads {arguments.threads}: expected at least 1")


def _missing_extra(error: ImportError, extra: str) -> AprtError:
    return AprtError(f"{error}; install the extra: pip install 'apr-oracle[{extra}]'")


def _prompt(arguments: argparse.Namespace, from_text: Callable[[str, bool], Prompt]) -> Prompt:
    if arguments.tokens_from is not None:
        return prompt_from_capture(arguments.tokens_from)
    if arguments.tokens is not None:
        prompt = Prompt(parse_tokens(arguments.tokens))
    else:
        prompt = from_text(arguments.prompt, arguments.chat)
    return replace(prompt, greedy=arguments.decode)


def _selection(arguments: argparse.Namespace) -> Selection:
    return Selection(arguments.stages, arguments.layers, arguments.rows)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _report(arguments: argparse.Namespace, summary: dict) -> int:
    if arguments.json:
        print(json.dumps(summary))
    else:
        print(f"{summary['output']}: {summary['steps']} steps, {summary['tensors']} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
