"""`arcface plan build`: an imported model's name (or a typed ONNX) in; a proved plan for this host's GPU out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arcface_build.commands.plan_options import json_option, place_options, summary, table

if TYPE_CHECKING:
    import numpy as np

    from arcface_build.plans.places import Places

_PATH = click.Path(path_type=Path)

EPILOG = """\b
Examples:
  arcface plan build r50 --precision fp16
  arcface plan build r50 --precision fp16 --max-batch 128 --workspace 2GB --push
  arcface plan build typed.onnx --reference models/r50/serving.onnx --no-external-tactics
Old names: `build --fp16` is `plan build NAME --precision fp16`, `info` is `plan show`, `upload` is `plan push`.
"""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="NAME_OR_ONNX")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]), help="[precision in the configuration]"
)
@click.option("--sm", default="auto", show_default=True, help="Refuse to build on a GPU of another SM.")
@click.option("--min-batch", type=click.IntRange(1), help="[batch.min in the configuration]")
@click.option("--opt-batch", type=click.IntRange(1), help="[batch.opt]")
@click.option("--max-batch", type=click.IntRange(1), help="[batch.max]")
@click.option("--workspace", help="Scratch memory of the build: 2GB or 2048MB. [workspace]")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="TensorRT's builder_optimization_level.")
@click.option("--hardware-compatible", is_flag=True, help="Also loads on other GPUs from SM 8.0 on; slower.")
@click.option("--external-tactics/--no-external-tactics", default=True, help="Kernels of cuBLAS and cuDNN.")
@click.option("--tf32", is_flag=True, help="Let fp32 layers use TF32: faster, and above the fp32 drift limit.")
@click.option("--faces", type=_PATH, help="Prove on these crops: a folder or .npz. Default: 64 drawn faces.")
@click.option("--reference", type=_PATH, help="Serving ONNX that drift is measured against. Default: the model's own.")
@click.option(
    "--timeout-s", type=click.FloatRange(1), default=1800.0, show_default=True, help="Stop a build after this."
)
@click.option("--force", is_flag=True, help="Build although the cache or the store has this plan.")
@click.option("--push", "upload", is_flag=True, help="Publish the plan to the store after the build.")
@click.option("--output", "-o", type=_PATH, help="Also put plan and manifest into this folder.")
@click.option("--sign-key", type=_PATH, help="PEM, ed25519: sign the manifest.")
@click.option("--models-dir", type=_PATH, default=Path("models"), show_default=True)
@place_options
@json_option
def build(
    places: Places,
    model: str,
    precision: str | None,
    sm: str,
    min_batch: int | None,
    opt_batch: int | None,
    max_batch: int | None,
    workspace: str | None,
    optimization_level: int | None,
    hardware_compatible: bool,
    external_tactics: bool,
    tf32: bool,
    faces: Path | None,
    reference: Path | None,
    timeout_s: float,
    force: bool,
    upload: bool,
    output: Path | None,
    sign_key: Path | None,
    models_dir: Path,
    as_json: bool,
) -> None:
    """Build a plan for this host's GPU, or get it from the cache or the store.

    Built in a process of its own; kept only if its layers compute in the asked precision and its drift is within the
    gate.
    """
    from arcface_build.plans.build import Proof, build_plan, tensorrt_version
    from arcface_build.plans.get_or_build import get_or_build
    from arcface_build.plans.gpu import find_gpus
    from arcface_build.plans.source import find_source
    from arcface_build.plans.typed import check_buildable, read_typed_onnx
    from arcface_clients.errors import WrongUse
    from arcface_clients.plans.spec import BuilderOptions, PlanSpec, parse_bytes, parse_sm

    config = places.config
    precision = precision or config.precision
    gpu, version = find_gpus()[0], tensorrt_version()
    if sm != "auto" and parse_sm(sm) != gpu.sm:
        raise WrongUse(
            f"this GPU is an {gpu.name} of SM {gpu.sm}, asked for SM {parse_sm(sm)}: build it on such a GPU."
        )
    if upload:
        places.need_store()
    source = find_source(model, precision, models_dir, reference)
    typed = read_typed_onnx(source.onnx)
    check_buildable(typed, precision, version)
    spec = PlanSpec(
        model=source.name,
        onnx_sha256=typed.sha256,
        precision=precision,
        sm=gpu.sm,
        tensorrt=version,
        min_batch=min_batch or config.batch.min,
        opt_batch=opt_batch or min(config.batch.opt, max_batch or config.batch.max),
        max_batch=max_batch or config.batch.max,
        options=BuilderOptions(
            workspace_bytes=parse_bytes(workspace) if workspace else config.workspace,
            external_tactics=external_tactics,
            hardware_compatible=hardware_compatible,
            tf32=tf32,
            optimization_level=optimization_level,
        ),
    )

    def builder(asked: PlanSpec, target: Path) -> Any:
        crops = _faces(faces)
        proof = Proof(crops, source.embed(crops), dict(config.comparison.max_drift))
        with _phases() as on_phase:
            return build_plan(
                typed,
                asked,
                target,
                proof,
                contract_id=source.contract_id,
                timing_caches=places.timing_caches,
                refused=places.refused,
                timeout_s=timeout_s,
                on_phase=on_phase,
            )

    obtained = get_or_build(
        spec,
        places.cache,
        places.store,
        builder if force or config.fallback.build_locally else None,
        read_cache=not force,
        read_store=not force,
        upload=upload,
        sign_key=sign_key,
    )
    path = places.cache.pull(obtained.manifest, output) if output else obtained.path
    if as_json:
        fields = {"source": obtained.source, "path": str(path), "notes": obtained.notes}
        click.echo(json.dumps({**fields, **obtained.manifest.to_json()}, indent=2))
        return
    for note in obtained.notes:
        click.echo(note, err=True)
    row = summary(obtained.manifest)
    click.echo(table(list(row), [list(row.values())]))
    click.echo(f"{'built' if obtained.source == 'build' else 'from the ' + obtained.source}: {path}")


def _faces(path: Path | None) -> np.ndarray:
    from arcface_build.imports.proof_faces import drawn_faces, read_faces

    return (read_faces(path) if path else drawn_faces()).faces


@contextmanager
def _phases() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with the phase that the build is in; phases of unknown length pulse."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total or None)
