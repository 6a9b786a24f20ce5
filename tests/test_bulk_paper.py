"""The page on paper: what a bulk job needs follows from the reports by plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcface_tools.bulk_paper import Measured, Needs, first_bottleneck, limits

KINDS = ("npy", "jpeg", "tar")


@pytest.fixture
def measured(tmp_path: Path) -> Measured:
    """100 µs, 4,096 bytes read and 1,024 written a face; 100,000 names/s and 50 units/s of the driver."""
    figures = {"cpu_us_per_face": 100.0, "bytes_read_per_face": 4096.0, "bytes_written_per_face": 1024.0}
    client = [{"source": kind, "through": through, **figures} for kind in KINDS for through in ("nothing", "grpc")]
    scale = {"client": client, "growth": [], "handing_out": {"units_per_s": 50.0}}
    (tmp_path / "bulk-scale.json").write_text(json.dumps(scale))
    (tmp_path / "bulk-listing.json").write_text(json.dumps({"listing": {"entries_per_s": 1e5}}))
    return Measured.of(tmp_path)


def test_a_part_is_one_request_up_to_ten_megabytes_and_else_begun_uploaded_and_completed(measured: Measured) -> None:
    small, large = (Needs.of(measured, 1 << 20, rows) for rows in (10 << 10, 10 << 11))
    assert (small.parts, small.puts) == (103, 103)
    assert (large.parts, large.puts) == (52, 52 * 4)


def test_needs_grow_with_the_faces(measured: Measured) -> None:
    needs = Needs.of(measured, 36_000_000, 1000)
    assert (needs.core_hours, needs.listing_hours, needs.image_gets) == (1.0, 0.1, 72_000_000)
    assert needs.shard_gets == 140_625


def test_the_first_bottleneck_is_the_lowest_limit_of_its_kind_of_source(measured: Measured) -> None:
    assert first_bottleneck(measured, 256, "single images") == ("single images, one prefix of the store", 2750)
    assert first_bottleneck(measured, 256, "shards") == ("the driver hands out units", 12_800)
    assert first_bottleneck(measured, 4096, "shards")[0] == "10 Gbit/s to the servers"


def test_larger_units_lift_the_limit_of_the_driver(measured: Measured) -> None:
    small, large = (limits(measured, rows)["the driver hands out units"] for rows in (1000, 2000))
    assert (small, large) == (50_000, 100_000)
