"""Before serving on a CPU: the fastest form of the model that is served already, of those that passed their gates."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arcface_build.repository.integrity import BY_ASSEMBLE, HELD
from arcface_build.repository.versions import served_manifest
from arcface_build.serving.server_runtimes import ServerRuntimes
from arcface_build.variants.choose import FASTEST, Wanted, choose
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import able_runtimes, gated_runtimes
from arcface_clients.errors import Missing, WrongUse


def take_best_variant(
    repository: Path,
    models_dir: Path,
    versions_kept: int,
    limits: Mapping[str, float],
    runtimes: Callable[[], ServerRuntimes],
    wanted: Wanted = FASTEST,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Install what `arcface_build.variants.choose.choose` chooses for the model in arcface_onnx; returns what and why.

    The model stays the same one: where models_dir has no import of this contract, nothing is touched.

    Args:
        repository: the model repository.
        models_dir: where imported models are.
        versions_kept: number of versions to keep for rollbacks.
        limits: largest drift by precision.
        runtimes: those of the server that will run it; only asked where something is chosen.
        wanted: the goal, or one precision.
        say: told before seconds are spent on measuring.

    Raises:
        Missing: what is installed stays, and is not what is wanted.
        GateFailed: the precision that is wanted may not be served here.
    """
    from arcface_build.repository.assemble import assemble

    served = served_manifest(repository) or {}
    model_dir = models_dir / served.get("name", "")
    stays = _why_it_stays(served, model_dir, repository, asked=wanted.precision is not None)
    if stays:
        precision = served.get("precision", "fp32")
        if wanted.precision not in (None, precision):
            raise Missing(
                f"cannot serve {wanted.precision}: {stays}. Next: arcface serve --variant installed ({precision})"
            )
        return f"{precision} as installed: {stays}"
    server = runtimes()
    choice = choose(model_dir, limits, server.here, server.told_precision, wanted, say)
    assemble(model_dir, repository, choice, versions_kept, limits)
    return "\n".join(filter(None, (choice.reason, choice.offer)))


def check_installed(
    served: Mapping[str, Any], runtimes: Callable[[], ServerRuntimes], limits: Mapping[str, float]
) -> None:
    """Refuse a variant that was installed on another host or under wider limits: no runtime here passes.

    Args:
        served: manifest of the version that arcface_onnx serves.
        runtimes: those of the server that will run it; only asked where a variant is served.
        limits: largest drift by precision.

    Raises:
        Missing: it would be served ungated.
    """
    variant = served.get("variant")
    if not variant:
        return
    server = runtimes()
    why_not = f"it is set up for {variant['runtime']}, this host has {' and '.join(server.here)}"
    able: list[str] = []
    if variant["runtime"] in server.here:
        gated = gated_runtimes(variant.get("sidecar"), limits) or []
        # A server that tells no precision takes any of its own.
        here = [variant["runtime"]] if server.told_precision else server.here
        able, why_not = able_runtimes(variant["precision"], gated, here, server.told_precision)
    if variant["runtime"] not in able:
        raise Missing(
            f"arcface_onnx holds {variant['precision']} of {served['name']}, which may not run on this host: "
            f"{why_not}. Next: arcface assemble {served['name']} (fp32), or arcface rollback"
        )


def _why_it_stays(served: Mapping[str, Any], model_dir: Path, repository: Path, asked: bool) -> str:
    """Why the installed version is not replaced; empty where it may be. One held gives way to who asks by name."""
    if served.get(HELD) and not asked:
        by = "assemble --variant asked for" if served[HELD] == BY_ASSEMBLE else "rollback went back to"
        return f"arcface {by} it (the fastest instead: arcface assemble {served['name']} --variant auto)"
    try:
        here = read_import_manifest(model_dir).contract_id
    except (Missing, WrongUse):  # none, or none that can be read
        here = None
    if here is None or here != served["contract_id"]:
        return f"{model_dir} does not hold this model"
    if not os.access(repository, os.W_OK):
        return f"{repository} may not be written"
    return ""
