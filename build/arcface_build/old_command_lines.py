"""Translates old command lines (`arcface build`, `--mode build --onnx-path X`) to current ones."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from arcface_clients.errors import WrongUse

MODES = {  # old name or --mode → current command
    "build": ("plan", "build"),
    "compare": ("compare",),
    "benchmark": ("bench",),
    "info": ("plan", "show"),
    "upload": ("plan", "push"),
}
_STILL = ("compare",)  # also a current name: its options are translated only after --mode

Words = Callable[[str], list[str]]


def _argument(value: str) -> list[str]:
    return [value]


def _option(name: str, form: str = "{}") -> Words:
    return lambda value: [name, form.format(value)]


def _refused(why: str) -> Words:
    def refuse(value: str) -> list[str]:
        raise WrongUse(why)

    return refuse


_SIZES = {
    "--min-batch-size": _option("--min-batch"),
    "--opt-batch-size": _option("--opt-batch"),
    "--max-batch-size": _option("--max-batch"),
    "--batch-size": _option("--max-batch"),
    "--workspace-gb": _option("--workspace", "{}GB"),
    "--workspace-size-mb": _option("--workspace", "{}MB"),
}
_STORE = {"--s3-bucket": _option("--store", "s3://{}/plans")}
_WITH_VALUE: dict[str, dict[str, Words]] = {  # mode → old option → current words
    "build": {
        "--onnx": _argument,
        "--onnx-path": _argument,
        "--engine-path": lambda value: ["--output", str(Path(value).parent)],  # the plan's name follows from its spec
        "--output-dir": _option("--output"),
        **_SIZES,
        **_STORE,
    },
    "compare": {
        "--onnx": _argument,
        "--onnx-path": _argument,
        "--engine": _argument,
        "--engine-path": _argument,
        "--num-samples": _option("--n-samples"),
    },
    "benchmark": {
        "--onnx-path": _option("--onnx"),
        "--batch-size": _option("--batch"),
        "--engine-path": _refused(
            "--engine-path: a benchmark measures the served model. Next: arcface assemble NAME --plan FILE, "
            "then arcface bench --config-name tensorrt"
        ),
        "--num-iterations": _refused("--num-iterations is now --rounds and --sample-s: arcface bench --help"),
    },
    "info": {"--engine": _argument, "--engine-path": _argument, **_STORE},
    "upload": {"--engine": _argument, "--engine-path": _argument, **_STORE},
}
_FLAGS = {
    "build": {
        **{f"--{precision}": ["--precision", precision] for precision in ("fp32", "fp16", "bf16", "int8")},
        "--upload": ["--push"],
    }
}


def translated(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Translate an old command line, with a notice if it changed; current ones are returned unchanged.

    Raises:
        WrongUse: an unknown mode, an option without its value, or one without a successor.
    """
    mode, rest = _mode_of(list(argv))
    if mode is None:
        return list(argv), None
    if mode not in MODES:
        raise WrongUse(f"--mode {mode}: expected one of {', '.join(MODES)}. Current commands: arcface --help")
    words = [*MODES[mode]]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in _WITH_VALUE[mode]:
            if not equals:
                if not rest:
                    raise WrongUse(f"{name} needs a value. Current options: arcface {' '.join(MODES[mode])} --help")
                value = rest.pop(0)
            words += _WITH_VALUE[mode][name](value)
        else:
            words += _FLAGS.get(mode, {}).get(word, [word])
    return words, f"an old name; use: arcface {shlex.join(words)}"


def _mode_of(argv: list[str]) -> tuple[str | None, list[str]]:
    """The old mode that a command line names, and its other words; None if the command line is current."""
    if argv and argv[0] in MODES and argv[0] not in _STILL:
        return argv[0], argv[1:]
    if not argv or not argv[0].startswith("-"):
        return None, argv
    for position, word in enumerate(argv):
        if word == "--mode":
            if position + 1 == len(argv):
                raise WrongUse(f"--mode needs a value: expected one of {', '.join(MODES)}.")
            return argv[position + 1], argv[:position] + argv[position + 2 :]
        if word.startswith("--mode="):
            return word.partition("=")[2], argv[:position] + argv[position + 1 :]
    return None, argv
