"""`scripts/bench bulk`: what a bulk job of hundreds of millions of faces costs besides the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from arcface_build.commands.options.output import hand_over, json_option, report_option

PARTS = ("listing", "client", "growth")
EPILOG = """\b
Examples:
  scripts/bench bulk                          the driver of a job of 100,000,000 names, and what its workers cost
  scripts/bench bulk --only listing --entries 1000000
  scripts/bench bulk --only client --only growth
"""


@click.command("bench-bulk", epilog=EPILOG)
@click.option(
    "--only", multiple=True, type=click.Choice(PARTS), help="Of these parts; may be repeated.  [default: all]"
)
@click.option("--entries", default=100_000_000, show_default=True, type=click.IntRange(1), help="Generated names.")
@click.option("--faces", default=4096, show_default=True, type=click.IntRange(64), help="Faces of each kind of source.")
@json_option
@report_option
def command(only: tuple[str, ...], entries: int, faces: int, as_json: bool, report: Path | None) -> None:
    """Measure the driver of a job (listing, memory, handing out), a client's CPU and bytes a face, and how it grows."""
    from arcface_build.bench.host import describe_host
    from arcface_tools import bulk_scale

    result: dict[str, Any] = {"kind": "bulk-scale", "host": describe_host()}
    chosen = only or PARTS
    if "client" in chosen:
        result["client"] = bulk_scale.client(faces)
    if "growth" in chosen:
        result["growth"] = bulk_scale.growth(4 * faces)
        result["handing_out"] = bulk_scale.handing_out(faces)
    if "listing" in chosen:
        result["listing"] = bulk_scale.listing(entries)
    hand_over(result, lambda: _table(result), as_json, report)


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"client, {each['source']} through {each['through']}: {each['cpu_us_per_face']:.0f} µs CPU a face, "
        f"{each['bytes_read_per_face']:,.0f} bytes read and {each['bytes_written_per_face']:,.0f} written"
        for each in result.get("client", ())
    ]
    lines += [
        f"{each['actors']} actors, {each['servers']} servers: {each['faces_per_s']:,.0f} faces/s, "
        f"{each['cores_busy']:.1f} cores busy"
        for each in result.get("growth", ())
    ]
    if handing := result.get("handing_out"):
        rate, cpu_us = handing["units_per_s"], handing["driver_cpu_us_per_unit"]
        lines.append(f"driver: {rate:,.0f} units/s handed out, {cpu_us:.0f} µs CPU each")
    if listing := result.get("listing"):
        lines.append(
            f"driver: {listing['entries']:,} names in {listing['seconds']:.0f} s, {listing['entries_per_s']:,.0f}/s, "
            f"peak {listing['peak_mb']:.0f} MB, list {listing['list_mb']:.0f} MB"
        )
    return "\n".join(lines)
