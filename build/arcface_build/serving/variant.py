"""Before serving on a CPU: the fastest form of the model that is served already, of those that passed their gates."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arcface_build.host_memory import server_memory_limit
from arcface_build.repository.integrity import BY_ASSEMBLE, CHOICE, HELD
from arcface_build.repository.versions import served_manifest
from arcface_build.serving.server_runtimes import ServerRuntimes
from arcface_build.variants.choose import FASTEST, Wanted, choose
from arcface_build.variants.sidecar import retired_since
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import able_runtimes, gated_runtimes
from arcface_clients.errors import GateFailed, Missing, WrongUse


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
    retired = _retired(served, model_dir)
    stays = _why_it_stays(served, model_dir, repository, keep_held=wanted.precision is None and not retired)
    if stays:
        precision = served.get("precision", "fp32")
        if wanted.precision not in (None, precision):
            raise Missing(
                f"cannot serve {wanted.precision}: {stays}. Next: arcface serve --variant installed ({precision})"
            )
        return f"{precision} as installed: {stays}"
    if retired:
        say(f"{served['precision']} of {served['name']} is not served any more: it failed its gate since ({retired})")
    server = runtimes()
    choice = choose(model_dir, limits, server.here, server.told_precision, wanted, say)
    try:
        assemble(model_dir, repository, choice, versions_kept, limits)
    except OSError as exc:  # a full disk keeps nothing that is installed from being served
        if wanted.precision is not None:
            raise
        told = f"{choice.precision} in {choice.runtime} could not be installed ({exc.strerror or exc})"
        return f"{served.get('precision', 'fp32')} as installed: {told}"
    return "\n".join(filter(None, (choice.reason, choice.offer)))


def check_installed(
    served: Mapping[str, Any],
    runtimes: Callable[[], ServerRuntimes],
    limits: Mapping[str, float],
    models_dir: Path | None = None,
) -> None:
    """Refuse a variant that was installed on another host or under wider limits, or failed its gate since.

    Args:
        served: manifest of the version that arcface_onnx serves.
        runtimes: those of the server that will run it; only asked where a variant is served.
        limits: largest drift by precision.
        models_dir: where imported models are.

    Raises:
        Missing: it would be served ungated: no runtime here passes.
        GateFailed: `arcface quantize --verify` has refused it.
    """
    variant = served.get("variant")
    if not variant:
        return
    if why := models_dir and _retired(served, models_dir / served["name"]):
        raise GateFailed(
            f"arcface_onnx holds {variant['precision']} of {served['name']}, which failed its gate on other faces "
            f"since ({why}). Next: arcface assemble {served['name']} --variant auto"
        )
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


def short_of_memory(served: Mapping[str, Any]) -> str:
    """A sentence where what is installed took more memory when it was chosen than it may take here; else empty.

    Args:
        served: manifest of the version that arcface_onnx serves.
    """
    took, limit = served.get(CHOICE, {}).get("memory_bytes", 0), server_memory_limit()
    if took <= limit:
        return ""
    return (
        f"it took {took / 2**30:.1f} GB where it was chosen, and a process of the server may take {limit / 2**30:.1f} "
        f"GB here. Give it more memory, or have it chosen here: arcface assemble {served['name']} --variant auto"
    )


def _retired(served: Mapping[str, Any], model_dir: Path) -> str:
    """What condemns the installed variant since; empty if nothing does."""
    return retired_since(model_dir, (served.get("variant") or {}).get("sidecar") or {})


def _why_it_stays(served: Mapping[str, Any], model_dir: Path, repository: Path, keep_held: bool) -> str:
    """Why the installed version is not replaced; empty where it may be.

    One held gives way to who asks for another by name, and where it failed its gate since.
    """
    if served.get(HELD) and keep_held:
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
