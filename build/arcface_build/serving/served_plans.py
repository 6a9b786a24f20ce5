"""Which plans in arcface_trt a server may be given: read and checked here, because Triton's own backend cannot."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from arcface_clients.errors import PlanRefused, WrongUse
from arcface_clients.plans.find import newest_version
from arcface_clients.plans.fit import misfit
from arcface_clients.plans.read import read_plan
from arcface_clients.plans.spec import parse_sm, parse_version

_TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")


@dataclass(frozen=True)
class ServedPlans:
    """The plans of the version that a server takes. good: their SMs ("8.6"). refused: SM → why, in a sentence."""

    good: frozenset[str]
    refused: Mapping[str, str]


def served_plans(repository: Path, public_key: Path | None = None, tensorrt: str | None = None) -> ServedPlans:
    """Read every plan in the newest version of arcface_trt.

    Args:
        repository: the model repository.
        public_key: PEM; where given, plans that its private key has not signed are refused.
        tensorrt: version that will load them; None: not known, not asked.

    Raises:
        Missing, WrongUse: the public key is not there, or is none.
    """
    folder = newest_version(repository / "arcface_trt")
    good: set[str] = set()
    refused: dict[str, str] = {}
    for path in sorted(folder.glob("sm[0-9]*.plan")) if folder else []:
        sm = parse_sm(path.stem)
        try:
            why = misfit(read_plan(path, public_key).manifest, sm, tensorrt)
        except PlanRefused as exc:
            why = str(exc)
        if why is None:
            good.add(sm)
        else:
            refused[sm] = why if str(path) in why else f"plan {path} is {why}"
    return ServedPlans(frozenset(good), refused)


def tensorrt_of_server() -> str | None:
    """The TensorRT that this host's tritonserver loads plans with; None where nothing says it.

    NGC's images say it in TRT_VERSION; our stand-in backend runs in this Python's environment.
    """
    if shutil.which("tritonserver"):
        said = [os.environ.get("TRT_VERSION", "")]
    else:
        said = [_installed(name) for name in _TENSORRT_PACKAGES]
    for version in filter(None, said):
        with suppress(WrongUse):
            parse_version(version)
            return version
    return None


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
