"""`arcface import`: a source's name in, models/NAME/ and a filled model repository out."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arcface_clients.contract import Preprocessing
from arcface_clients.errors import WrongUse

if TYPE_CHECKING:
    from arcface_build.imports.child import Job
    from arcface_build.imports.manifest import Manifest
    from arcface_build.imports.preprocessing import Stated


@click.command("import", context_settings={"auto_envvar_prefix": "ARCFACE_IMPORT"})
@click.argument("source")
@click.option("--name", help="Name of the folder under models/; by default the file's or the known model's.")
@click.option("--color", type=click.Choice(["rgb", "bgr"]), help="Channel order that the network wants.")
@click.option("--mean", help="One number or three (123.675,116.28,103.53), 0..255 units, in --color's order.")
@click.option("--std", help="One number or three, as --mean.")
@click.option("--output", help="The output that is the embedding, where several can be.")
@click.option(
    "--faces",
    type=click.Path(exists=True, path_type=Path),
    help="Prove on these aligned 112×112 crops: a folder, or an .npz with `faces`. Default: 64 drawn faces.",
)
@click.option("--accept-license", is_flag=True, help="Agree to the licence of weights that have to be downloaded.")
@click.option(
    "--insightface-root",
    type=click.Path(path_type=Path),
    help="InsightFace's root [INSIGHTFACE_HOME or ~/.insightface].",
)
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"), show_default=True)
@click.option("--model-repository", type=click.Path(path_type=Path), help="Default: model_repository/ here or above.")
@click.option("--no-assemble", is_flag=True, help="Only write models/NAME/, leave the model repository alone.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=1800,
    show_default=True,
    metavar="SECONDS",
    help="End an import that takes longer.",
)
@click.option("--force", is_flag=True, help="Import again although nothing has changed.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(
    source: str,
    name: str | None,
    color: str | None,
    mean: str | None,
    std: str | None,
    output: str | None,
    faces: Path | None,
    accept_license: bool,
    insightface_root: Path | None,
    models_dir: Path,
    model_repository: Path | None,
    no_assemble: bool,
    timeout: float,
    force: bool,
    as_json: bool,
) -> None:
    """Turn an ArcFace ONNX into a proved serving ONNX and put it into the model repository.

    SOURCE is an ONNX file, a checkpoint of an arcface_torch IResNet (.pth, .safetensors), a folder or zip with a pack,
    a name from config/models.yaml (mobilefacenet), an InsightFace pack (buffalo_l, buffalo_s, antelopev2) or a demo
    network with random weights (demo, demo-r18, demo-r34, demo-r50, demo-r100).

    \b
    Examples:
      arcface import demo
      arcface import buffalo_l --accept-license
      arcface import my_r50.onnx --name r50
      arcface import backbone.pth --name r100
      arcface import other.onnx --color bgr --mean 127.5 --std 128

    Nothing is written unless the result equals InsightFace's: cosine ≥ 0.99999 on every face, and each row of a batch
    equal to its single run.
    """
    from arcface_build.imports.child import Job
    from arcface_build.repository.versions import find_repository

    stated = _stated(color, mean, std)
    repository = None if no_assemble else find_repository(model_repository)  # before the work, not after it
    job = Job(
        source=source,
        models_dir=str(models_dir),
        scratch="",
        name=name,
        stated=stated.to_json(),
        output=output,
        faces=str(faces) if faces else None,
        accept_licence=accept_license,
        insightface_root=str(insightface_root) if insightface_root else None,
        force=force,
    )
    manifest, folder, reused, had_variants = _import(job, timeout)
    if had_variants and not (folder / "variants").is_dir():
        click.echo(f"the serving ONNX is another one now: {folder}/variants were of the old one and are gone", err=True)
    if (look := manifest.preprocessing["look"]) and look["warning"]:
        click.secho(f"preprocessing may be wrong: {look['warning']}. See --color, --mean, --std", fg="yellow", err=True)
    installed = None
    if repository is not None:
        from arcface_build.repository.assemble import assemble

        installed = assemble(folder, repository)
    if as_json:
        click.echo(json.dumps(manifest.to_json(), indent=2))
        return
    _report(manifest, folder, reused, installed)


def _import(job: Job, timeout_s: float) -> tuple[Manifest, Path, bool, bool]:
    """(manifest, its folder, whether it was there already, whether the folder had variants): made aside, then moved."""
    from arcface_build.imports.child import run_child
    from arcface_build.imports.manifest import Manifest
    from arcface_clients.atomic import new_folder

    models_dir = Path(job.models_dir)
    models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=models_dir) as scratch, _progress() as progress:
        done = run_child(replace(job, scratch=scratch), timeout_s, progress, lambda line: click.echo(line, err=True))
        folder = models_dir / done.name
        had_variants = (folder / "variants").is_dir()
        if done.made:
            with new_folder(folder) as whole:
                for part in Path(done.made).iterdir():
                    part.rename(whole / part.name)
    return Manifest(**done.manifest), folder, not done.made, had_variants


def _stated(color: str | None, mean: str | None, std: str | None) -> Stated:
    """What the user says about preprocessing, part by part."""
    from arcface_build.imports.preprocessing import Stated

    if (mean is None) != (std is None):
        raise WrongUse("--mean and --std belong together: expected both, got one.")
    if mean is None or std is None:
        return Stated(color)
    means, stds = _three("--mean", mean), _three("--std", std)
    if 0 < max(means) <= 1 and max(stds) <= 1:
        raise WrongUse(f"--mean {mean} --std {std} look like units of 0..1: expected 0..255. Multiply both by 255.")
    try:
        Preprocessing("rgb", means, stds)
    except ValueError as exc:
        raise WrongUse(f"--mean, --std: {exc}.") from exc
    return Stated(color, means, stds)


def _three(option: str, text: str) -> tuple[float, float, float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3):
        raise WrongUse(f"{option} is {text!r}: expected one number or three with commas, as 123.675,116.28,103.53.")
    first, second, third = numbers * 3 if len(numbers) == 1 else numbers
    return first, second, third


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr that shows what is being done; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("import", total=1)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _report(manifest: Manifest, folder: Path, reused: bool, installed: dict[str, int] | None) -> None:
    """What was found, done and proved, in a few lines on stdout."""
    source, proof, wants = manifest.source, manifest.proof, manifest.preprocessing
    if source["kind"] == "demo":
        click.secho(source["note"], fg="yellow", bold=True)
    click.echo(f"{manifest.name}: {source['file']} ({source['sha256'][:12]}…), licence {source['licence']}")
    click.echo(f"  preprocessing  {wants['color']}, mean {wants['mean']}, std {wants['std']} ({wants['why']})")
    click.echo(f"  network sees   {_network(wants.get('network'))}")
    for step in manifest.steps:
        if step["changed"]:
            click.echo(f"  {step['step']:<14} {step['why']}")
    click.echo(
        f"  proof          {proof['faces']} faces ({proof['faces_from']}) against {proof['reference']}: "
        f"min cosine {proof['min_cosine']:.8f}, batch rows within {proof['max_row_difference']:.1e}"
    )
    if manifest.cpu:
        click.echo(f"  for CPU        {manifest.cpu['why']}: min cosine {manifest.cpu['min_cosine']:.8f}")
    click.echo(f"  contract id    {manifest.contract_id}")
    click.echo(
        f"{'unchanged' if reused else 'written'}: {folder} ({manifest.dim}-d, opset {manifest.serving['opset']})"
    )
    if installed:
        click.echo("served from: " + ", ".join(f"{model}/{version}" for model, version in installed.items()))


def _network(seen: dict[str, Any] | None) -> str:
    """What the network sees of the pixels, in words."""
    if seen is None:
        return "something else than a map of each channel by itself; stated by the caller, not measured"
    return f"{seen['color']}, (x − {seen['mean']}) / {seen['std']}: outside and inside the graph together"
