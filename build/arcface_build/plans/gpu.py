"""The GPUs of this host as nvidia-smi tells them, and config/gpus.yaml: SM → cards and the plans wanted for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from arcface_build.errors import Missing, WrongUse
from arcface_build.plans.spec import PRECISIONS, parse_sm

_FIELDS = "index,name,compute_cap,driver_version,memory.total,memory.used"


@dataclass(frozen=True)
class Gpu:
    """One GPU. cuda: the newest CUDA version that the driver supports, or None where nvidia-smi does not say."""

    index: int
    name: str
    sm: str
    driver: str
    memory_bytes: int
    memory_used_bytes: int
    cuda: str | None = None


@dataclass(frozen=True)
class SmInfo:
    """One block of config/gpus.yaml."""

    sm: str
    architecture: str
    cards: tuple[str, ...]
    plans: tuple[str, ...]


def find_gpus() -> list[Gpu]:
    """All GPUs that this process may see in nvidia-smi, at least one.

    Raises:
        Missing: no nvidia-smi, no driver, or no GPU.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        raise Missing(
            "no NVIDIA GPU on this host: nvidia-smi is not installed. Run this on a GPU host, or arcface plan pull"
        )
    try:
        query = [program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        banner = subprocess.run([program], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Missing(f"nvidia-smi does not answer ({exc}). Check the driver: nvidia-smi") from exc
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().splitlines()
        raise Missing(
            f"no usable NVIDIA GPU: nvidia-smi says {said[0] if said else answer.returncode!r}. Check the driver."
        )
    gpus = parse_gpus(answer.stdout, banner)
    gpus = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not gpus:
        raise Missing(
            "no NVIDIA GPU on this host: nvidia-smi lists none. Check CUDA_VISIBLE_DEVICES and the container's --gpus"
        )
    return gpus


def parse_gpus(csv: str, banner: str = "") -> list[Gpu]:
    """GPUs from `nvidia-smi --query-gpu=… --format=csv,noheader,nounits` (memory in MiB) and its plain banner."""
    cuda = banner.partition("CUDA Version:")[2].split()
    gpus = []
    for line in csv.strip().splitlines():
        index, name, sm, driver, total, used = (part.strip() for part in line.split(","))
        memory = [int(float(mib)) << 20 if mib.replace(".", "").isdigit() else 0 for mib in (total, used)]
        gpus.append(Gpu(int(index), name, parse_sm(sm), driver, *memory, cuda=cuda[0] if cuda else None))
    return gpus


def visible(gpus: list[Gpu], cuda_visible_devices: str | None) -> list[Gpu]:
    """The GPUs that CUDA shows a process, in its order, when indices are listed; UUIDs are left to CUDA itself."""
    wanted = [part.strip() for part in (cuda_visible_devices or "").split(",")]
    if cuda_visible_devices is None or not all(part.lstrip("-").isdigit() for part in wanted if part):
        return gpus
    by_index = {str(gpu.index): gpu for gpu in gpus}
    return [by_index[part] for part in wanted if part in by_index]


def load_gpus_yaml(path: Path) -> dict[str, SmInfo]:
    """config/gpus.yaml as SM → block, in the file's order.

    Raises:
        Missing: no such file.
        WrongUse: not of the form shown in the file that ships.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as exc:
        raise Missing(f"no GPU table at {path} ({exc.strerror}). Give one: --gpus config/gpus.yaml") from exc
    except yaml.YAMLError as exc:
        raise WrongUse(f"{path} is not YAML: {exc}") from exc
    try:
        blocks = [
            SmInfo(parse_sm(sm), block["architecture"], tuple(block["cards"]), tuple(block["plans"]))
            for sm, block in data["sms"].items()
        ]
    except (TypeError, KeyError, AttributeError) as exc:
        raise WrongUse(f"{path} has not the form sms: {{SM: {{architecture, cards, plans}}}} ({exc!r}).") from exc
    for block in blocks:
        if wrong := [p for p in block.plans if p not in PRECISIONS]:
            raise WrongUse(f"{path}: SM {block.sm} lists plans {wrong}: expected some of {', '.join(PRECISIONS)}.")
    return {block.sm: block for block in blocks}
