"""A run within a time budget: steps that fit into the remaining time, and a report written after each."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.imports.source import file_digest
from arcface_build.plans.source import PlanSource
from arcface_clients.atomic import new_file, write_json
from arcface_tools.gpu_check.clocks import GpuLog
from arcface_tools.gpu_check.contestants import Embed, Row, measure
from arcface_tools.gpu_check.report import to_markdown

FACES, FACES_SEED = 128, 7
RESERVE_S = 5.0  # of the budget, for ending processes and writing the report


class Stopped(BaseException):
    """SIGTERM; not caught by a step's `except Exception`."""


@dataclass
class GpuCheck:
    """One run: the options, the clock, and the report so far."""

    models_dir: Path
    scratch: Path
    target: Path
    deadline: float
    seconds: float
    batches: tuple[int, ...]
    torch_python: str | None
    external_tactics: bool
    faces: np.ndarray
    log: GpuLog
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        """Seconds left in the budget, minus a reserve; every wait is bounded by them."""
        return max(self.deadline - time.monotonic() - RESERVE_S, 0.0)

    def step(self, name: str, needs_s: float, action: Callable[[], Any]) -> None:
        """Run one step if the budget allows, and write the report, with the reason if the step fails."""
        if self.left_s < needs_s:
            self.report["not_measured"].append({"step": name, "why": f"{self.left_s:.0f} s of the budget were left"})
            return
        done: dict[str, Any] = {"step": name}
        self.report["steps"].append(done)
        started = time.monotonic()
        try:
            print(f"[{self.left_s:4.0f} s left] {name}", file=sys.stderr, flush=True)
            action()
        except Exception as exc:  # a report with a gap is better than none
            self.report["not_measured"].append({"step": name, "why": f"{type(exc).__name__}: {exc}"[:800]})
        except BaseException as exc:
            self.report["not_measured"].append({"step": name, "why": f"the run was ended: {type(exc).__name__}"})
            raise
        finally:
            done["seconds"] = round(time.monotonic() - started, 1)
            self.write()

    def write(self) -> None:
        """Write the report so far as JSON and Markdown, atomically."""
        write_json(self.target, self.report)
        with new_file(self.target.with_suffix(".md")) as temporary:
            temporary.write_text(to_markdown(self.report))

    def row(self, embed: Embed, batch: int, callers: int = 1) -> Row:
        """One measurement from host to host."""
        return measure(embed, self.faces, batch, self.seconds, self.log, callers)

    def reference(self, source: PlanSource) -> np.ndarray:
        """The CPU's embeddings of the faces, computed once per model and stored beside it."""
        digest = file_digest(source.reference)[:12]
        kept = source.reference.with_name(f"gpu-check-{digest}-{FACES}-{FACES_SEED}.npy")
        if not kept.is_file():
            with new_file(kept) as temporary, temporary.open("wb") as file:
                np.save(file, source.embed(self.faces))
        return np.asarray(np.load(kept))
