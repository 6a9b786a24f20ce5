"""How fast each candidate ran on a host, kept in models/NAME/variants/speed.json until host, runtime or file change."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

from arcface_build.allocator import PRELOAD, with_jemalloc
from arcface_build.host_memory import server_memory_limit
from arcface_build.variants.candidates import Candidate, Measurable
from arcface_build.variants.sidecar import variants_folder
from arcface_clients.atomic import write_json
from arcface_clients.engines.runtimes import TELLING_FLAGS, available_cores, cpu_flags, cpu_name

Goal: TypeAlias = Literal["throughput", "latency"]
_FORMAT = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed(Measurable):
    """What was measured of one candidate.

    Attributes:
        precision, runtime, sha256, form: of the candidate.
        one: faces/s at batch 1, one figure a round.
        full: faces/s at the full batch, one figure a round.
        drift: 1 − cosine of the worst golden face on this host; None for what was timed only to be offered, and for
            what did not run in the memory that there was.
        memory: bytes that its process asked for, more or less; where it was not enough, what it could have had.
    """

    precision: str
    runtime: str
    sha256: str
    one: tuple[float, ...]
    full: tuple[float, ...]
    drift: float | None = None
    form: str = ""
    memory: int = 0

    @property
    def too_large(self) -> str:
        """Why it may not run here for want of memory; empty if it may."""
        if self.full:
            return ""
        return f"it does not run in the {self.memory / 2**30:.1f} GB that a process of the server may take here"

    def rounds(self, goal: Goal) -> tuple[float, ...]:
        """faces/s that count for a goal, one figure a round."""
        return self.one if goal == "latency" else self.full

    def told(self) -> dict[str, Any]:
        """The medians, for a version's manifest."""
        return {
            "precision": self.precision,
            "runtime": self.runtime,
            **({"form": self.form} if self.form else {}),
            "latency_ms": round(1000 / median(self.one), 3),
            "faces_per_s": round(median(self.full), 2),
            "memory_bytes": self.memory,
        } | ({} if self.drift is None else {"drift": self.drift})


@dataclass(frozen=True)
class SpeedTable:
    """All candidates of one model on one host, measured in turns.

    Attributes:
        full_batch: faces a call at the full batch.
        speeds: one entry for each candidate that could be loaded.
        failed: candidate's name → why it could not be loaded. Such a table is not kept. One that needs more memory is
            not among them.
    """

    full_batch: int
    speeds: tuple[Speed, ...]
    failed: dict[str, str] = field(default_factory=dict)

    def of(self, found: Sequence[Candidate], missing: Sequence[Candidate] = ()) -> SpeedTable | None:
        """The entries of these candidates; None if one of `found` was never measured."""
        have = {speed.key: speed for speed in self.speeds}
        if not {one.key for one in found} <= set(have):
            return None
        return SpeedTable(self.full_batch, tuple(have[one.key] for one in (*found, *missing) if one.key in have))


def host_key() -> str:
    """What has to be the same for a measurement to hold: processor, instruction sets, cores, runtime and memory."""
    import onnxruntime

    flags = cpu_flags()
    openvino = "with" if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers() else "without"
    return ", ".join(
        (
            cpu_name(),
            " ".join(_model_of_cpu()),
            " ".join(flag for flag in TELLING_FLAGS if flag in flags) or "no vector extensions known",
            f"{available_cores()} cores",
            f"ONNX Runtime {onnxruntime.__version__} {openvino} OpenVINO",
            "jemalloc" if PRELOAD in with_jemalloc({}) else "no jemalloc",
            f"{server_memory_limit() / 2**30:.1f} GB a process",
        )
    )


def _model_of_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Family and model: virtual machines give processors of several generations the same name."""
    named = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")  # x86, then arm64
    try:
        first = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:
        return []
    lines = (line.partition(":") for line in first.splitlines())
    return [f"{key.strip()} {value.strip()}" for key, _, value in lines if key.strip() in named]


def speeds_file(model_dir: Path) -> Path:
    """Where the tables of a model are: one for each kind of host."""
    return variants_folder(model_dir) / "speed.json"


def kept_speeds(model_dir: Path, host: str) -> SpeedTable | None:
    """The table that was measured on such a host; None if there is none that can be believed."""
    data = _tables(model_dir).get(host)
    if data is None:
        return None
    try:
        speeds = tuple(_speed(entry) for entry in data["speeds"])
        if len({len(speed.one) for speed in speeds if speed.one}) > 1:
            raise ValueError("rounds")
        return SpeedTable(_whole(data["full_batch"]), speeds)
    except (KeyError, TypeError, ValueError, AttributeError):
        _log.warning("%s is damaged: measured again", speeds_file(model_dir))
        return None


def keep_speeds(model_dir: Path, host: str, table: SpeedTable) -> None:
    """Write the table; those of other hosts stay. The file appears whole or stays as it was.

    A folder that may not be written is no fault: it is measured again next time.
    """
    entry = {"full_batch": table.full_batch, "speeds": [asdict(speed) for speed in table.speeds]}
    try:
        speeds_file(model_dir).parent.mkdir(exist_ok=True)
        write_json(speeds_file(model_dir), {"format": _FORMAT, "hosts": {**_tables(model_dir), host: entry}})
    except OSError as exc:
        _log.warning("what was measured is not kept: %s", exc)


def _tables(model_dir: Path) -> dict[str, Any]:
    """Host → its table, unchecked."""
    try:
        data = json.loads(speeds_file(model_dir).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        _log.warning("%s is damaged: measured again", speeds_file(model_dir))
        return {}
    hosts = data.get("hosts") if isinstance(data, dict) and data.get("format") == _FORMAT else None
    return hosts if isinstance(hosts, dict) else {}


def _speed(entry: Mapping[str, Any]) -> Speed:
    one, full = (tuple(_rate(figure) for figure in entry[key]) for key in ("one", "full"))
    memory = entry["memory"]
    if isinstance(memory, bool) or not isinstance(memory, int) or len(one) != len(full) or not (one or memory):
        raise ValueError("rounds")
    texts = (entry["precision"], entry["runtime"], entry["sha256"], entry.get("form", ""))
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("text")
    return Speed(*texts[:3], one, full, entry["drift"], texts[3], memory)


def _rate(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError("rate")
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("batch")
    return value
