"""`arcface import` turns a source into models/NAME/ and installs it in the model repository."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, models_dir_option, repository_at
from arcface_build.commands.options.numbers import POSITIVE
from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.settings import settings
from arcface_clients.contract import Preprocessing
from arcface_clients.errors import WrongUse

if TYPE_CHECKING:
    from arcface_build.imports.preprocessing import Stated
    from arcface_build.repository.bring_in import BroughtIn


@click.command("import", context_settings={"auto_envvar_prefix": "ARCFACE_IMPORT"})
@click.argument("source")
@click.option("--name", help="Name of the folder under models/; default: that of the file or the known model.")
@click.option("--color", type=click.Choice(["rgb", "bgr"]), help="Channel order the network expects.")
@click.option("--mean", help="One number or three (123.675,116.28,103.53), 0..255 units, in --color's order.")
@click.option("--std", help="One number or three, like --mean.")
@click.option("--output", help="The output that is the embedding, if several could be.")
@click.option(
    "--faces",
    type=click.Path(exists=True, path_type=Path),
    help="Verify on these aligned 112×112 crops: a folder, or an .npz with `faces`. Default: 64 synthetic faces.",
)
@click.option("--accept-license", is_flag=True, help="Accept the licence of weights that must be downloaded.")
@click.option(
    "--insightface-root",
    type=click.Path(path_type=Path),
    help="InsightFace's root [INSIGHTFACE_HOME or ~/.insightface].",
)
@models_dir_option
@model_repository_option
@click.option("--no-assemble", is_flag=True, help="Only write models/NAME/; do not touch the model repository.")
@click.option(
    "--timeout",
    type=POSITIVE,
    default=1800,
    show_default=True,
    metavar="SECONDS",
    help="Stop an import that takes longer.",
)
@click.option("--force", is_flag=True, help="Import again even if nothing has changed.")
@json_option
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
    """Turn an ArcFace ONNX into a verified serving ONNX and install it in the model repository.

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

    Nothing is written unless the result matches InsightFace's: cosine ≥ 0.99999 on every face, and each row of a batch
    equal to that face embedded alone.
    """
    from arcface_build.repository.bring_in import bring_in
    from arcface_build.serving.change_over import ChangeOver

    config, stated = settings(), _stated(color, mean, std)
    # fail before the work, not after it
    repository = None if no_assemble else repository_at(model_repository, make=True)
    change = None if repository is None else ChangeOver(repository)
    with terminal.phase_bar() as progress:
        done = bring_in(
            source,
            models_dir,
            repository,
            config.versions_kept,
            config.comparison.max_drift.model_dump(),
            name=name,
            cache=config.storage.cache,
            stated=stated,
            output=output,
            faces=faces,
            accept_licence=accept_license,
            insightface_root=insightface_root,
            force=force,
            timeout_s=timeout,
            say=terminal.notice,
            progress=progress,
        )
    imported = done.imported
    look = imported.manifest.preprocessing["look"]
    if look and look["warning"]:
        terminal.complaint(f"preprocessing may be wrong: {look['warning']}. See --color, --mean, --std")
    if faces is not None and imported.reused:
        terminal.complaint(f"nothing has changed, so {faces} was not looked at. To prove the import on it: --force")
    if imported.variants_gone:
        terminal.complaint(
            f"the serving ONNX has changed: {imported.folder}/variants belonged to the old one and were removed"
        )
    hand_over(imported.manifest.to_json(), lambda: _told(done), as_json)
    if change and (told := change.told()):
        terminal.complaint(told)


def _stated(color: str | None, mean: str | None, std: str | None) -> Stated:
    """The preprocessing stated by the user, part by part."""
    from arcface_build.imports.preprocessing import Stated

    if (mean is None) != (std is None):
        raise WrongUse("--mean and --std go together: expected both, got one.")
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
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise WrongUse(f"{option} is {text!r}: expected one number, or three such as 123.675,116.28,103.53.")
    first, second, third = numbers * 3 if len(numbers) == 1 else numbers
    return first, second, third


def _told(done: BroughtIn) -> str:
    """A few lines on what was found, done and verified."""
    manifest, folder = done.imported.manifest, done.imported.folder
    source, proof, wants = manifest.source, manifest.proof, manifest.preprocessing
    lines = [click.style(source["note"], fg="yellow", bold=True)] if source["kind"] == "demo" else []
    lines.append(f"{manifest.name}: {source['file']} ({source['sha256'][:12]}…), licence {source['licence']}")
    lines.append(f"  preprocessing  {wants['color']}, mean {wants['mean']}, std {wants['std']} ({wants['why']})")
    lines.append(f"  network sees   {_network(wants['network'])}")
    lines += [f"  {step['step']:<14} {step['why']}" for step in manifest.steps if step["changed"]]
    lines.append(
        f"  proof          {proof['faces']} faces ({proof['faces_from']}) against {proof['reference']}: "
        f"min cosine {proof['min_cosine']:.8f}, batch rows within {proof['max_row_difference']:.1e}"
    )
    if manifest.cpu:
        lines.append(f"  for CPU        {manifest.cpu['why']}: min cosine {manifest.cpu['min_cosine']:.8f}")
    if manifest.winograd:
        lines.append(f"  for batches    {manifest.winograd['why']}: min cosine {manifest.winograd['min_cosine']:.8f}")
    lines.append(f"  contract id    {manifest.contract_id}")
    state = "unchanged" if done.imported.reused else "written"
    lines.append(f"{state}: {folder} ({manifest.dim}-d, opset {manifest.serving['opset']})")
    if done.installed:
        lines.append("served from: " + ", ".join(f"{model}/{version}" for model, version in done.installed.items()))
    return "\n".join(lines)


def _network(seen: dict[str, Any] | None) -> str:
    """In words, what the network sees of the pixels."""
    if seen is None:
        return "not a separate map of each channel; stated by the caller, not measured"
    return f"{seen['color']}, (x − {seen['mean']}) / {seen['std']}: outside and inside the graph together"
