"""The GPUs of this host as nvidia-smi reports them, and config/gpus.yaml: the cards and expected plans of each SM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arcface_clients.errors import DependencyMissing, Missing, WrongUse
from arcface_clients.gpu import cards as host
from arcface_clients.gpu.cards import Gpu, parse_gpus
from arcface_clients.plans.spec import PRECISIONS, parse_sm

__all__ = ["Gpu", "SmInfo", "find_gpus", "load_gpus_yaml", "parse_gpus"]


@dataclass(frozen=True)
class SmInfo:
    """One block of config/gpus.yaml."""

    sm: str
    architecture: str
    cards: tuple[str, ...]
    plans: tuple[str, ...]


def find_gpus() -> list[Gpu]:
    """All GPUs that this process may use, at least one.

    Raises:
        Missing: no nvidia-smi, no driver, or no GPU.
    """
    try:
        return host.find_gpus()
    except DependencyMissing as exc:
        raise Missing(str(exc)) from exc


def gpu_sm() -> str | None:
    """SM of the first GPU ("8.6"), None if there is no usable GPU."""
    try:
        return find_gpus()[0].sm
    except Missing:
        return None


def load_gpus_yaml(path: Path) -> dict[str, SmInfo]:
    """config/gpus.yaml as SM → block, in the file's order.

    Raises:
        Missing: no such file.
        WrongUse: not in the format of the shipped file.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as exc:
        raise Missing(f"no GPU table at {path} ({exc.strerror}). Give one: --gpus config/gpus.yaml") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise WrongUse(f"{path} is not YAML: {exc}") from exc
    try:
        blocks = [
            SmInfo(parse_sm(sm), block["architecture"], tuple(block["cards"]), tuple(block["plans"]))
            for sm, block in data["sms"].items()
        ]
    except (TypeError, KeyError, AttributeError) as exc:
        raise WrongUse(f"{path}: expected the form sms: {{SM: {{architecture, cards, plans}}}} ({exc!r}).") from exc
    for block in blocks:
        if wrong := [p for p in block.plans if p not in PRECISIONS]:
            raise WrongUse(f"{path}: SM {block.sm} lists plans {wrong}: expected some of {', '.join(PRECISIONS)}.")
    return {block.sm: block for block in blocks}
