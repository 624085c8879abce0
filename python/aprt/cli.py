"""The `apr-oracle` command: one subcommand per engine that captures are taken from.

Data go to stdout, notes to stderr. On an error the exit code is 2, and one line says what to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
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
    return parser


def _add_hf(engines) -> None:
    hf = engines.add_parser(
        "hf",
        help="Hugging Face transformers (torch, eager attention)",
        description="Capture Hugging Face transformers.",
    )
    hf.set_defaults(run=_run_hf)
    hf.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face directory, or GGUF file"
    )
    prompt = hf.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--tokens", metavar="IDS", help="token ids: 1,2,3")
    prompt.add_argument(
        "--tokens-from",
        type=Path,
        metavar="CAPTURE",
        help="token ids and decode steps of a capture, replayed",
    )
    prompt.add_argument(
        "-p", "--prompt", metavar="TEXT", help="text, by the directory's tokenizer.json"
    )
    hf.add_argument("--chat", action="store_true", help="put TEXT in the model's chat template")
    hf.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the capture to write"
    )
    hf.add_argument("--force", action="store_true", help="replace the capture that DIR holds")
    hf.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="type to compute in (default: %(default)s)",
    )
    hf.add_argument(
        "--decode",
        type=int,
        default=0,
        metavar="N",
        help="greedy steps after the prefill, each captured",
    )
    hf.add_argument(
        "--stages",
        default="all",
        metavar="LIST",
        help="stages to keep, comma separated (default: all)",
    )
    hf.add_argument(
        "--layers", default="all", metavar="LIST", help="layers to keep: 0..4,7,last (default: all)"
    )
    hf.add_argument(
        "--rows", default="all", help="token positions to keep: all, last or A..B (default: all)"
    )
    hf.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="config.json to use instead of a GGUF's metadata",
    )
    hf.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    hf.add_argument("--json", action="store_true", help="print a summary as JSON")
    hf.add_argument(
        "--traceback", action="store_true", help="show the Python traceback of unexpected errors"
    )


def _run_hf(arguments: argparse.Namespace) -> int:
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
    try:
        import torch

        from . import oracle
    except ImportError as error:
        raise AprtError(f"{error}; install the extra: pip install 'apr-oracle[hf]'") from None

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    check_target(arguments.output, arguments.force)  # before the model is loaded
    prompt = _prompt(arguments, oracle)
    model, provenance = oracle.load(arguments.model, arguments.dtype, arguments.hf_config)
    summary = oracle.run(
        arguments.model,
        model,
        provenance,
        prompt,
        arguments.output,
        Selection(arguments.stages, arguments.layers, arguments.rows),
        force=arguments.force,
        note=lambda text: print(text, file=sys.stderr),
    )
    if arguments.json:
        print(json.dumps(summary))
    else:
        print(f"{summary['output']}: {summary['steps']} steps, {summary['tensors']} tensors")
    return 0


def _prompt(arguments: argparse.Namespace, oracle):
    if arguments.tokens_from is not None:
        return prompt_from_capture(arguments.tokens_from)
    if arguments.tokens is not None:
        prompt = Prompt(parse_tokens(arguments.tokens))
    else:
        prompt = oracle.prompt_from_text(arguments.model, arguments.prompt, arguments.chat)
    return replace(prompt, greedy=arguments.decode)


if __name__ == "__main__":
    sys.exit(main())
