"""`arcface plan build` makes a verified plan for this host's GPU from an imported model or a typed ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import models_dir_option
from arcface_build.commands.options.numbers import BatchSizes, FiniteNumber
from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.plans import place_options, summary, table

if TYPE_CHECKING:
    from arcface_build.plans.places import Places

_PATH = click.Path(path_type=Path)

EPILOG = """\b
Examples:
  arcface plan build r50 --precision fp16
  arcface plan build r50 --precision fp16 --max-batch 128 --workspace 2GB --push
  arcface plan build r50 --precision fp16 --profiles 1,8,64       a plan set: kernels tuned for each of them
  arcface plan build typed.onnx --reference models/r50/serving.onnx --no-external-tactics
  arcface plan build r100 --precision fp16 --prelu fused
Old names: `build --fp16` is `plan build NAME --precision fp16`, `info` is `plan show`, `upload` is `plan push`.
"""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="NAME_OR_ONNX")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]), help="[precision in the configuration]"
)
@click.option("--sm", default="auto", show_default=True, help="Expected SM; refuse to build on any other GPU.")
@click.option("--min-batch", type=click.IntRange(1), help="[batch.min in the configuration]")
@click.option("--opt-batch", type=click.IntRange(1), help="[batch.opt]")
@click.option("--max-batch", type=click.IntRange(1), help="[batch.max]")
@click.option(
    "--profiles", type=BatchSizes(), help="Batch sizes with kernels of their own: 1,8,64; the largest is --opt-batch."
)
@click.option("--workspace", help="Scratch memory of the build: 2GB or 2048MB. [workspace]")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="TensorRT's builder_optimization_level.")
@click.option("--hardware-compatible", is_flag=True, help="Also loads on other GPUs from SM 8.0 on; slower.")
@click.option("--any-card", is_flag=True, help="Tune for all cards of this SM, not just this one; TensorRT 10.9+.")
@click.option("--external-tactics/--no-external-tactics", default=True, help="Allow cuBLAS and cuDNN kernels.")
@click.option("--tf32", is_flag=True, help="Let fp32 layers use TF32: faster, but above the fp32 drift limit.")
@click.option(
    "--fold-padded/--no-fold-padded",
    default=None,
    help="Fold BatchNormalization into padded convolutions, exactly. [yes for fp32; others as quantize made them]",
)
@click.option(
    "--prelu", type=click.Choice(["as-is", "fused"]), help="fused: as pointwise nodes that fuse with additions. [as-is]"
)
@click.option("--faces", type=_PATH, help="Verify on these crops: a folder or .npz. Default: 64 synthetic faces.")
@click.option("--reference", type=_PATH, help="Serving ONNX to measure drift against. Default: the model's own.")
@click.option("--timeout-s", type=FiniteNumber(1), default=1800.0, show_default=True, help="Stop a build after this.")
@click.option("--force", is_flag=True, help="Build even if the cache or the store has this plan.")
@click.option("--push", "upload", is_flag=True, help="Publish the plan to the store after the build.")
@click.option("--output", "-o", type=_PATH, help="Also put plan and manifest into this folder.")
@click.option("--sign-key", type=_PATH, help="PEM, ed25519: sign the manifest.")
@models_dir_option
@place_options
@json_option
def build(places: Places, as_json: bool, **asked_for: Any) -> None:
    """Build a plan for this host's GPU, or get it from the cache or the store.

    It is built in a separate process, and kept only if its layers compute in the requested precision and its drift
    passes the gate.
    """
    from arcface_build.plans.for_this_gpu import PlanRequest, plan_for_this_gpu
    from arcface_clients.extras import require

    if asked_for["sign_key"]:
        require("cryptography", purpose="--sign-key")
    obtained, path = plan_for_this_gpu(PlanRequest(**asked_for), places, terminal.phase_bar)
    for note in obtained.notes:
        terminal.notice(note)

    def told() -> str:
        row = summary(obtained.manifest)
        origin = "built" if obtained.source == "build" else f"from the {obtained.source}"
        return f"{table(list(row), [list(row.values())])}\n{origin}: {path}"

    result = {"source": obtained.source, "path": str(path), "notes": obtained.notes, **obtained.manifest.to_json()}
    hand_over(result, told, as_json)
