"""`arcface doctor` checks this host and the configuration, and lists problems with their fixes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.settings import config_file, settings
from arcface_clients.errors import ConfigError

if TYPE_CHECKING:
    from arcface_clients.checks.diagnostics import Check
    from arcface_clients.config.schema import EmbeddingConfig

EPILOG = """\b
Examples:
  arcface doctor                             what is present and what is wrong, with a fix for each problem
  arcface doctor localhost:8001              that server instead of the configured one: a face, contract, restrictions
  arcface doctor --json | jq .problems
  arcface doctor --measure                   also load, validate and time the configured engine
  ARCFACE_BACKEND=onnx arcface doctor --measure --faces 64 --batch-size 8

Exit code 0: no problem; 2: the configuration is wrong; 3: something needed is missing.
"""
_MARKS = {"ok": ("ok      ", "green"), "absent": ("absent  ", "yellow"), "problem": ("PROBLEM ", "red")}


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_DOCTOR", "show_default": True})
@click.argument("url", required=False)
@click.option("--measure", is_flag=True, help="Load the configured engine, validate it and time it.")
@click.option("--faces", default=128, type=click.IntRange(1), help="Faces to time with --measure.")
@click.option("--batch-size", default=32, type=click.IntRange(1), help="Faces per call with --measure.")
@json_option
def command(url: str | None, measure: bool, faces: int, batch_size: int, as_json: bool) -> int:
    """Check driver, GPU, runtimes, server, plans, store and configuration; say what is wrong and how to fix it."""
    from arcface_build.serving.host_checks import build_checks
    from arcface_clients.checks.diagnostics import Check, client_checks, guarded
    from arcface_clients.checks.tls import check_tls
    from arcface_clients.config.schema import EmbeddingConfig
    from arcface_clients.config.sources import config_file as file_of

    try:
        config = settings()
        if url is not None:
            config = config.model_copy(update={"triton": config.triton.towards(url), "backend": "triton"})
        origin = file_of(config_file(), os.environ) or "defaults (no config/embedding.yaml here)"
        found = f"{origin}: backend {config.backend}, precision {config.precision}"
        configuration = Check("configuration", "ok", found)
    except ConfigError as exc:
        config = EmbeddingConfig()
        configuration = Check("configuration", "problem", str(exc), "docs/configuration.md lists every key")
    encryption = guarded("encryption", lambda: check_tls(config))
    checks = [configuration, *client_checks(config), encryption, *build_checks(config)]
    engine: dict[str, Any] | None = None
    if measure and configuration.status == "ok":
        engine, check = _measured(config, faces, batch_size)
        checks.append(check)
    problems = [check for check in checks if check.status == "problem"]
    result = {
        "ok": not problems,
        "problems": [check.to_json() for check in problems],
        "checks": [check.to_json() for check in checks],
        "engine": engine,
    }
    hand_over(result, lambda: _told(checks, engine, len(problems)), as_json)
    if configuration.status == "problem":
        return 2
    return 3 if problems else 0


def _told(checks: Sequence[Check], engine: dict[str, Any] | None, problems: int) -> str:
    lines = []
    for check in checks:
        mark, color = _MARKS[check.status]
        lines.append(f"{click.style(mark, fg=color)} {check.name:<14} {check.found}")
        if check.fix and check.status != "ok":
            lines.append(f"{'':<24}→ {check.fix}")
    if engine:
        lines.append(json.dumps(engine, indent=2))
    return "\n".join([*lines, f"{problems or 'no'} problem{'s' * (problems != 1)}"])


def _measured(config: EmbeddingConfig, faces: int, batch_size: int) -> tuple[dict[str, Any] | None, Check]:
    """The diagnostics of the engine in use, and the outcome as a check."""
    from arcface_clients.checks.benchmark import benchmark_embedder
    from arcface_clients.checks.diagnostics import Check, engine_diagnostics
    from arcface_clients.errors import ArcFaceError
    from arcface_clients.pipeline import get_embedding_backend

    try:
        with get_embedding_backend(config=config) as backend:
            backend.ensure_ready()
            figures = benchmark_embedder(backend, faces, batch_size)
            engine = engine_diagnostics(backend, config, figures)
    except ArcFaceError as exc:
        return None, Check("engine", "problem", f"{type(exc).__name__}: {exc}", "see the checks above")
    found = f"{engine['backend']} answers: {figures.faces_per_s:.1f} faces/s at batch {batch_size}"
    if engine["backend"] != config.backend:
        fix = "see the checks above; the fallback chain is in config/embedding.yaml"
        return engine, Check("engine", "problem", f"{found}, not {config.backend} ({engine['reason']})", fix)
    return engine, Check("engine", "ok", found)
