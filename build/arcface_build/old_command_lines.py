"""Command lines of old (`arcface build`, `--mode build --onnx-path X`) and what they are called today."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from arcface_clients.errors import WrongUse

MODES = {  # name or --mode of old → today's command
    "build": ("plan", "build"),
    "compare": ("compare",),
    "benchmark": ("bench",),
    "info": ("plan", "show"),
    "upload": ("plan", "push"),
}
_STILL = ("compare",)  # today's name too: its options are left alone unless --mode says it

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
_WITH_VALUE: dict[str, dict[str, Words]] = {  # mode → option of old → words of today
    "build": {
        "--onnx-path": _argument,
        "--engine-path": lambda value: ["--output", str(Path(value).parent)],  # plans are named by what they are
        "--output-dir": _option("--output"),
        **_SIZES,
        **_STORE,
    },
    "compare": {
        "--onnx-path": _argument,
        "--engine-path": _argument,
        "--num-samples": _option("--n-samples"),
    },
    "benchmark": {
        "--onnx-path": _option("--onnx"),
        "--batch-size": _option("--batch"),
        "--engine-path": _refused(
            "--engine-path: a benchmark measures what is served. Next: arcface assemble NAME --plan FILE, "
            "then arcface bench --config-name tensorrt"
        ),
        "--num-iterations": _refused("--num-iterations is now --rounds and --sample-s: arcface bench --help"),
    },
    "info": {"--engine-path": _argument, **_STORE},
    "upload": {"--engine-path": _argument, **_STORE},
}
_FLAGS = {
    "build": {
        **{f"--{precision}": ["--precision", precision] for precision in ("fp32", "fp16", "bf16", "int8")},
        "--upload": ["--push"],
    }
}


def translated(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Today's words for a command line, and a notice where they are others; those of today come back as they are.

    Raises:
        WrongUse: an unknown mode, an option without its value, or one that has no successor.
    """
    mode, rest = _mode_of(list(argv))
    if mode is None:
        return list(argv), None
    if mode not in MODES:
        raise WrongUse(f"--mode {mode}: expected one of {', '.join(MODES)}. Today's commands: arcface --help")
    words = [*MODES[mode]]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in _WITH_VALUE[mode]:
            if not equals:
                if not rest:
                    raise WrongUse(f"{name} needs a value. Today's options: arcface {' '.join(MODES[mode])} --help")
                value = rest.pop(0)
            words += _WITH_VALUE[mode][name](value)
        else:
            words += _FLAGS.get(mode, {}).get(word, [word])
    return words, f"an old name; today: arcface {shlex.join(words)}"


def _mode_of(argv: list[str]) -> tuple[str | None, list[str]]:
    """The mode of old that a command line names, and its other words; None where it is one of today."""
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
