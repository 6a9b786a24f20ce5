"""Before serving on a CPU: the fastest variant of the model that is served already, where one passed its gate here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arcface_build.repository.versions import served_manifest
from arcface_build.serving.server_runtimes import ServerRuntimes
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import gated_runtimes, runtime_for
from arcface_clients.errors import Missing, WrongUse


def take_best_variant(
    repository: Path,
    models_dir: Path,
    versions_kept: int,
    limits: Mapping[str, float],
    runtimes: Callable[[], ServerRuntimes],
) -> str:
    """Install what `arcface_build.variants.choose.choose` chooses for the model in arcface_onnx; returns what and why.

    The model stays the same one: where models_dir has no import of this contract, nothing is touched.

    Args:
        repository: the model repository.
        models_dir: where imported models are.
        versions_kept: number of versions to keep for rollbacks.
        limits: largest drift by precision.
        runtimes: those of the server that will run it; only asked where there are variants.

    Raises:
        Missing: what is installed stays, and it passed its gate in no runtime of this host.
    """
    from arcface_build.repository.assemble import assemble
    from arcface_build.variants.choose import choose

    served = served_manifest(repository) or {}
    model_dir = models_dir / served.get("name", "")
    stays = _why_it_stays(served, model_dir, repository)
    if stays:
        if served.get("variant"):
            check_installed(served, runtimes(), limits)
        return f"{served.get('precision', 'fp32')} as installed: {stays}"
    if any((model_dir / "variants").glob("*-cpu.json")):
        server = runtimes()
        openvino = any(runtime != "onnxruntime" for runtime in server.here)
        choice = choose(model_dir, limits, openvino=openvino, told_precision=server.told_precision)
    else:
        choice = choose(model_dir, limits, openvino=False)
    assemble(model_dir, repository, choice, versions_kept, limits)
    return choice.reason


def check_installed(served: Mapping[str, Any], server: ServerRuntimes, limits: Mapping[str, float]) -> None:
    """Refuse a variant that was installed on another host or under wider limits: no runtime here passes.

    Args:
        served: manifest of the version that arcface_onnx serves.
        server: runtimes of the server that will run it.
        limits: largest drift by precision.

    Raises:
        Missing: it would be served ungated.
    """
    variant = served.get("variant")
    if not variant:
        return
    runtime, why_not = None, f"it is set up for {variant['runtime']}, this host has {' and '.join(server.here)}"
    if variant["runtime"] in server.here:
        gated = gated_runtimes(variant.get("sidecar"), limits) or []
        # A server that tells no precision takes any of its own.
        able = [variant["runtime"]] if server.told_precision else server.here
        runtime, why_not = runtime_for(variant["precision"], gated, able, server.told_precision)
    if runtime is None:
        raise Missing(
            f"arcface_onnx holds {variant['precision']} of {served['name']}, which may not run on this host: "
            f"{why_not}. Next: arcface assemble {served['name']} (fp32), or arcface rollback"
        )


def _why_it_stays(served: Mapping[str, Any], model_dir: Path, repository: Path) -> str:
    """Why the installed version is not replaced; empty where it may be."""
    if served.get("held"):
        return f"arcface rollback went back to it (another one: arcface assemble {served['name']})"
    try:
        here = read_import_manifest(model_dir).contract_id
    except (Missing, WrongUse):  # none, or none that can be read
        here = None
    if here is None or here != served["contract_id"]:
        return f"{model_dir} does not hold this model"
    if not os.access(repository, os.W_OK):
        return f"{repository} may not be written"
    return ""
