"""`scripts/bench bulk`: what a bulk job of hundreds of millions of faces costs besides the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from arcface_build.commands.options.output import hand_over, json_option, report_option

EPILOG = """\b
Examples:
  scripts/bench bulk                          the driver of a job of 100,000,000 names, and a client's CPU a face
  scripts/bench bulk --entries 1000000        in seconds
"""


@click.command("bench-bulk", epilog=EPILOG)
@click.option("--entries", default=100_000_000, show_default=True, type=click.IntRange(1), help="Generated names.")
@click.option("--faces", default=4096, show_default=True, type=click.IntRange(64), help="Faces of each kind of source.")
@json_option
@report_option
def command(entries: int, faces: int, as_json: bool, report: Path | None) -> None:
    """Measure listing and memory of a job's driver, and a client's CPU and bytes for each face."""
    from arcface_build.bench.host import describe_host
    from arcface_tools import bulk_scale

    result = {"kind": "bulk-scale", "host": describe_host(), "client": bulk_scale.client(faces)}
    result["listing"] = bulk_scale.listing(entries)
    hand_over(result, lambda: _table(result), as_json, report)


def _table(result: dict[str, Any]) -> str:
    listing = result["listing"]
    lines = [
        f"driver: {listing['entries']:,} names in {listing['seconds']:.0f} s, {listing['entries_per_s']:,.0f}/s, "
        f"peak {listing['peak_mb']:.0f} MB, list {listing['list_mb']:.0f} MB"
    ]
    lines += [
        f"client, {each['source']} through {each['through']}: {each['cpu_us_per_face']:.0f} µs CPU a face, "
        f"{each['bytes_read_per_face']:,.0f} bytes read and {each['bytes_written_per_face']:,.0f} written"
        for each in result["client"]
    ]
    return "\n".join(lines)
