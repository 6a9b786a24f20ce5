"""What a run is told once and every stage reads: networks, batch sizes, how long to measure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arcface_clients.atomic import write_json


@dataclass(frozen=True)
class Settings:
    """One run's options, in the state folder as settings.json, so that a later command measures the same.

    networks: (name, source as for `arcface import`), the first is the one that the goals are stated for.
    batches: faces per run; kernels are tuned for `opt_batch`. faces: how many drift is measured on.
    replays: the fewest of one measurement. callers: requests in flight through a server.
    """

    networks: tuple[tuple[str, str], ...]
    batches: tuple[int, ...] = (1, 8, 32, 64, 128)
    opt_batch: int = 64
    faces: int = 400
    sample_s: float = 0.7
    warm_up_s: float = 0.5  # idle clocks are a fifth of busy ones
    replays: int = 200
    callers: int = 8
    gemm_size: int = 8192
    torch_python: str | None = None
    external_tactics: bool = True

    @property
    def goal_batches(self) -> tuple[int, ...]:
        """The two largest batches, which the goals are read at: 64 and 128."""
        return self.batches[-2:]

    def write(self, state: Path) -> None:
        """Write settings.json."""
        write_json(state / "settings.json", asdict(self))

    @classmethod
    def read(cls, state: Path) -> Settings:
        """The inverse of `write`."""
        told: dict[str, Any] = json.loads((state / "settings.json").read_text())
        return cls(**{key: _tuples(value) for key, value in told.items()})


def named(sources: list[str]) -> Iterator[tuple[str, str]]:
    """("real", "files/x.onnx") from "real=files/x.onnx"; the name defaults to a file's stem or the source itself."""
    for text in sources:
        name, given, source = text.partition("=")
        yield (name, source) if given else (Path(text).stem.lower() if text.endswith(".onnx") else text, text)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
