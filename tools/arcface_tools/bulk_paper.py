"""docs/measured/bulk-on-paper.md: what a bulk job of any size needs, computed from the reports of bench-bulk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from arcface_clients.contract import FACE_BYTES

SIZES = {100_000_000: 2_048, 10_000_000_000: 16_384}  # faces: unit_rows
RATES = (1_000, 10_000, 30_000, 100_000)  # faces/s of all GPUs together
PER_GPU = (1_000, 5_000, 20_000)  # assumed: no report has a GPU's figure
LINK_GBIT = 10
ONE_REQUEST_BYTES = 10 << 20  # pyarrow uploads more than this in pieces of this size
READ_BYTES = 1 << 20  # bulk/files.py reads a shard in pieces of this size
# Requests/s of one prefix of a bucket, S3 User Guide, "Best practices design patterns"; more prefixes give more.
GETS_PER_S, PUTS_PER_S = 5_500, 3_500


PAGE = """# Bulk jobs on paper

<!-- made by python -m arcface_tools measured-table from bulk-scale.json and bulk-listing.json -->

What 10⁸ and 10¹⁰ faces need, computed from two reports: [bulk-scale](bulk-scale.json) (`scripts/bench bulk --only
growth --only client`) and [bulk-listing](bulk-listing.json) (`scripts/bench bulk --only listing`), both on two cores.
**Not measured: a GPU, a link between machines, a store outside this host.** What a GPU gives is assumed below.

## What any such job needs

{needs}

The driver lists beside the work, in a thread. Other sources need more or less CPU: see the reports.

## Hours, clients, network and GPUs by rate

A client's pod has one core and is one actor.

{rates}

## The first bottleneck

Faces/s at which each part of a job is full:

{limits}

With the GPUs of your job below these, the GPUs are first. Above:

{firsts}

The store's figures are S3's for one prefix of a bucket ({gets} GETs and {puts} PUTs a second); more prefixes give more.
The driver's is a lower bound: it shared two cores with its actors.

## Cost

With g faces/s of a GPU (their number does not matter) and the prices of an hour of a GPU and of a core, of a thousand
PUTs, of a thousand GETs and HEADs, and of a GB kept for a month; reading shards:

{costs}

Reading single images, the GETs and HEADs are those of the first table.

## Actors and servers, measured

Ray actors that read one shard of JPEGs, and tritonservers of a model that costs next to nothing, all on two cores:

{growth}

The two cores are what is full: what an actor, its server and Ray spend on a face is spent there, so more of them do not
help on one machine, and the figure is no limit of a cluster.
"""


@dataclass(frozen=True)
class Measured:
    """What the reports say of one client and of the driver."""

    cpu_us: dict[str, float]  # of a client a face, through gRPC, by kind of source
    read: dict[str, float]  # bytes a face
    written: float  # bytes a face
    names_per_s: float  # that the driver lists
    units_per_s: float  # that the driver hands out
    growth: list[dict[str, float]]  # actors, servers, faces_per_s, cores_busy

    @classmethod
    def of(cls, folder: Path) -> Measured:
        """From bulk-scale.json and bulk-listing.json."""
        scale, listing = (json.loads((folder / f"bulk-{name}.json").read_text()) for name in ("scale", "listing"))
        clients = {each["source"]: each for each in scale["client"] if each["through"] == "grpc"}
        return cls(
            {kind: each["cpu_us_per_face"] for kind, each in clients.items()},
            {kind: each["bytes_read_per_face"] for kind, each in clients.items()},
            clients["tar"]["bytes_written_per_face"],
            listing["listing"]["entries_per_s"],
            scale["handing_out"]["units_per_s"],
            scale["growth"],
        )


@dataclass(frozen=True)
class Needs:
    """What a job of `faces` in units of `unit_rows` needs, whatever does it; single images are the other source."""

    parts: int
    part_mb: float
    puts: int
    shard_gets: int
    image_gets: int
    output_gb: float
    core_hours: float
    listing_hours: float

    @classmethod
    def of(cls, measured: Measured, faces: int, unit_rows: int) -> Needs:
        """By the measured bytes, CPU and names/s."""
        parts, part_bytes = math.ceil(faces / unit_rows), unit_rows * measured.written
        pieces = math.ceil(part_bytes / ONE_REQUEST_BYTES)
        return cls(
            parts=parts,
            part_mb=part_bytes / 1e6,
            puts=parts * (1 if pieces == 1 else pieces + 2),  # an upload in pieces is begun and completed
            shard_gets=math.ceil(faces * measured.read["tar"] / READ_BYTES),
            image_gets=2 * faces,  # a HEAD and a GET
            output_gb=faces * measured.written / 1e9,
            core_hours=faces * measured.cpu_us["tar"] / 3.6e9,
            listing_hours=faces / measured.names_per_s / 3600,
        )


def limits(measured: Measured, unit_rows: int) -> dict[str, float]:
    """Faces/s at which each part of a job is full, besides the GPUs."""
    pieces = math.ceil(unit_rows * measured.written / ONE_REQUEST_BYTES)
    return {
        "single images, one prefix of the store": GETS_PER_S / 2,
        f"{LINK_GBIT} Gbit/s to the servers": LINK_GBIT * 1e9 / 8 / FACE_BYTES,
        "the driver hands out units": measured.units_per_s * unit_rows,
        "the driver lists single images": measured.names_per_s,
        "shards, one prefix of the store": GETS_PER_S * READ_BYTES / measured.read["tar"],
        "parts, one prefix of the store": PUTS_PER_S / (1 if pieces == 1 else pieces + 2) * unit_rows,
    }


def paper(folder: Path) -> str:
    """The whole page, from the reports in `folder`."""
    measured = Measured.of(folder)
    sizes = [(_power(faces), faces, rows, Needs.of(measured, faces, rows)) for faces, rows in SIZES.items()]
    columns = [f"{power} faces, --unit-rows {rows:,}" for power, _, rows, _ in sizes]
    needs = [
        ["parts", *(f"{n.parts:,} of {n.part_mb:.1f} MB" for *_, n in sizes)],
        ["output", *(f"{n.output_gb:,.0f} GB" for *_, n in sizes)],
        ["requests to write; and a HEAD a part", *(f"{n.puts:,}" for *_, n in sizes)],
        ["requests to read shards", *(f"{n.shard_gets:,}" for *_, n in sizes)],
        ["requests to read single images", *(f"{n.image_gets:,}" for *_, n in sizes)],
        ["clients, reading shards", *(f"{n.core_hours:,.0f} core hours" for *_, n in sizes)],
        ["pixels to the servers", *(f"{faces * FACE_BYTES / 1e12:,.1f} TB" for _, faces, _, _ in sizes)],
        ["the driver lists single images in", *(f"{n.listing_hours:,.1f} h" for *_, n in sizes)],
    ]
    rates = [
        [
            f"{rate:,}",
            *(f"{faces / rate / 3600:,.1f}" for faces in SIZES),
            f"{math.ceil(rate * measured.cpu_us['tar'] / 1e6):,}",
            f"{rate * FACE_BYTES * 8 / 1e9:.1f} Gbit/s",
            *(f"{math.ceil(rate / each):,}" for each in PER_GPU),
        ]
        for rate in RATES
    ]
    rate_columns = [
        "faces/s in all",
        *(f"hours for {power}" for power, *_ in sizes),
        "pods of clients",
        "to the servers",
    ]
    full = [limits(measured, rows) for rows in SIZES.values()]
    firsts = [
        f"- {_power(faces)} faces from {source}: {name}, at {rate:,.0f} faces/s."
        for faces, rows in SIZES.items()
        for source in ("single images", "shards")
        for name, rate in [first_bottleneck(measured, rows, source)]
    ]
    costs = [
        f"    {power:5} {faces / 3600:,.0f} / g · p_gpu + {n.core_hours:,.0f} · p_core + {n.puts / 1000:,.0f} · p_put "
        f"+ {(n.shard_gets + n.parts) / 1000:,.0f} · p_get + {n.output_gb:,.0f} · p_month"
        for power, faces, _, n in sizes
    ]
    return PAGE.format(
        needs=_table(["", *columns], needs),
        rates=_table([*rate_columns, *(f"GPUs of {each:,} faces/s" for each in PER_GPU)], rates),
        limits=_table(["", *columns], [[name, *(f"{each[name]:,.0f}" for each in full)] for name in full[0]]),
        firsts="\n".join(firsts),
        costs="\n".join(costs),
        gets=f"{GETS_PER_S:,}",
        puts=f"{PUTS_PER_S:,}",
        growth=_table(
            ["actors", "servers", "faces/s", "cores busy"],
            [
                [f"{each['actors']}", f"{each['servers']}", f"{each['faces_per_s']:,.0f}", f"{each['cores_busy']:.1f}"]
                for each in measured.growth
            ],
        ),
    )


def first_bottleneck(measured: Measured, unit_rows: int, source: str) -> tuple[str, float]:
    """The lowest of the limits that concern a job from `source`: "single images" or "shards"."""
    other = {"single images": "shards", "shards": "single images"}[source]
    found = {name: rate for name, rate in limits(measured, unit_rows).items() if other not in name}
    return min(found.items(), key=lambda each: each[1])


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def _power(faces: int) -> str:
    return "10" + str(len(str(faces)) - 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
