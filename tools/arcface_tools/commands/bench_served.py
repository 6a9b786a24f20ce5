"""`python -m arcface_tools bench-served`: what keys, the two extra outputs and a bounded queue cost, in turns."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, repository_at
from arcface_build.commands.options.numbers import POSITIVE
from arcface_build.commands.options.output import hand_over, json_option, report_option

EPILOG = """\b
Examples:
  python -m arcface_tools bench-served --report docs/measured/served.json
  python -m arcface_tools bench-served --each --batch 1          keys and outputs one by one
"""


@click.command("bench-served", epilog=EPILOG, context_settings={"show_default": True})
@model_repository_option
@click.option("--batch", "batches", multiple=True, default=(1, 8, 32), type=click.IntRange(1), help="Repeatable.")
@click.option("--each", is_flag=True, help="Measure keys and outputs one by one as well.")
@click.option("--shared-memory", is_flag=True, help="Faces go through shared memory instead of gRPC.")
@click.option("--rounds", default=10, type=click.IntRange(1))
@click.option("--sample-s", default=3.0, type=POSITIVE)
@json_option
@report_option
def command(
    model_repository: Path | None,
    batches: tuple[int, ...],
    each: bool,
    shared_memory: bool,
    rounds: int,
    sample_s: float,
    as_json: bool,
    report: Path | None,
) -> None:
    """Measure `arcface` as served against the same model without keys, norm and contract, and with a bounded queue."""
    from arcface_build.reports.bench_text import bench_text
    from arcface_tools.served import SETUPS, run

    samples = (len(SETUPS) if each else 2) * len(batches) * (rounds + 1)
    with terminal.round_bar(samples) as advance:
        result = run(
            repository_at(model_repository),
            batches=batches,
            each=each,
            shared_memory=shared_memory,
            rounds=rounds,
            sample_s=sample_s,
            on_sample=advance,
        )
    hand_over(result, lambda: bench_text(result), as_json, report)
