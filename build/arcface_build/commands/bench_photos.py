"""`arcface bench-photos` measures photos a second through the server, beside the same work in one process."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, repository_at
from arcface_build.commands.options.numbers import NOT_NEGATIVE
from arcface_build.commands.options.output import hand_over, json_option, report_option

EPILOG = """\b
Examples:
  arcface bench-photos photos/
  arcface bench-photos photos/ --single-face --callers 4 --rounds 7 --sample-s 5 --report bench-photos.json
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@click.argument("sources", nargs=-1, required=True, metavar="FOLDER_OR_FILES...")
@click.option("--callers", multiple=True, type=click.IntRange(1, 256), default=(1, 4, 16), help="Callers; repeatable.")
@click.option("--rounds", default=5, type=click.IntRange(1), help="Undisturbed rounds; each measures everything once.")
@click.option("--sample-s", default=4.0, type=NOT_NEGATIVE, help="Approximate length of a sample in seconds.")
@click.option("--limit", default=200, type=click.IntRange(1), help="Photos to take from the sources.")
@click.option("--single-face", is_flag=True, help="Only photos that show exactly one face.")
@model_repository_option
@click.option("--config-name", default="onnx", help="Backend of the server: onnx, tensorrt, reference, tuned.")
@json_option
@report_option
def command(
    sources: tuple[str, ...],
    callers: tuple[int, ...],
    rounds: int,
    sample_s: float,
    limit: int,
    single_face: bool,
    model_repository: Path | None,
    config_name: str,
    as_json: bool,
    report: Path | None,
) -> None:
    """Measure the server in turns with one process and with the usual parts, and where the server's time goes.

    "One process" runs in this process what is served; "usual parts" is InsightFace on the model as it was given, with
    YuNet through OpenCV.
    """
    from arcface_build.bench.photos import measure_photos, photos_text
    from arcface_build.bench.server import still_to_choose
    from arcface_clients.faces.images import ARRAY_SUFFIXES, find_files

    files = [name for name in find_files(sources) if not name.lower().endswith(ARRAY_SUFFIXES)]
    photos = [Path(name).read_bytes() for name in files[:: max(1, len(files) // limit)][:limit]]
    repository = repository_at(model_repository)
    if told := still_to_choose(repository, config_name):
        terminal.notice(told)
    result = measure_photos(
        photos,
        repository,
        callers=callers,
        rounds=rounds,
        sample_s=sample_s,
        config=config_name,
        single_face=single_face,
        bars=terminal.round_bar,
    )
    hand_over(result, lambda: photos_text(result), as_json, report)
