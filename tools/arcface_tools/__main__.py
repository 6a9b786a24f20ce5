"""The tools' command line: python -m arcface_tools COMMAND, from a checkout."""

from __future__ import annotations

import click

from arcface_build.cli import run
from arcface_build.lazy_group import LazyGroup
from arcface_build.terminal import quiet_option

COMMANDS = {  # name -> (module under arcface_tools.commands, one line for --help)
    "bench-bulk": ("bench_bulk", "Measure the driver of a job of 100,000,000 faces, and the CPU of its clients."),
    "bench-clients": ("bench_clients", "Measure our client on every transport against the bare runtime."),
    "bench-detector": ("bench_detector", "Measure the detector as a served model against the session in photo_faces."),
    "bench-served": ("bench_served", "Measure what keys, the extra outputs and a bounded queue cost a server."),
    "bench-vectors": ("bench_vectors", "Measure distances, neighbours and gallery search against naive code."),
    "consensus-demo": ("consensus_demo", "Mix strangers into people's faces; measure who is found, and how fast."),
    "first-ten-minutes": ("first_ten_minutes", "Record what a newcomer sees, with times and sizes."),
    "photos": ("photos", "Measure what looking again at a face buys, and accuracy and recall from photos."),
    "measured-table": ("measured_table", "Generate the pages of measured figures from the reports."),
}


@click.group(
    cls=LazyGroup,
    package="arcface_tools.commands",
    table=COMMANDS,
    common=(quiet_option,),
    context_settings={"help_option_names": ["-h", "--help"]},
)
def cli() -> None:
    """Measurements of this project itself; the exit codes are those of `arcface`."""


if __name__ == "__main__":
    run(cli, "python -m arcface_tools")
