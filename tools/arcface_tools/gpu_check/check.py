"""One stage of a run: its steps within the time that is left, each in the report as soon as it is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.atomic import new_file, write_json
from arcface_clients.errors import Missing
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_tools.gpu_check.clocks import GpuLog
from arcface_tools.gpu_check.settings import Settings

FACES_SEED = 7
RESERVE_S = 5.0  # of the budget, for ending processes and writing the report

ENDED = "the run was ended"  # why a step has no whole result

Result = dict[str, Any]
"""What a step measured; it is in the report with what was known when the step failed."""


class Stopped(BaseException):
    """SIGTERM; not caught by a step's `except Exception`."""


class StopHere(Exception):
    """Nothing after this can succeed; the message is the sentence for the user."""


class GpuCheck:
    """The stage's clock, its part of the report, and the state folder, where everything that is made is kept."""

    def __init__(self, state: Path, stage: int, title: str, left_s: float, log: GpuLog) -> None:
        """Continue the report of the state folder; every wait ends within `left_s` seconds from now."""
        self.state, self.log = state, log
        self.settings = Settings.read(state)
        self.report = read_report(state)
        self.stage = self.report["stages"].setdefault(str(stage), {"title": title, "steps": {}})
        self._deadline = time.monotonic() + left_s
        self._faces: np.ndarray | None = None

    @property
    def left_s(self) -> float:
        """Seconds left for this stage, minus a reserve; every wait is bounded by them."""
        return max(self._deadline - time.monotonic() - RESERVE_S, 0.0)

    @property
    def logs(self) -> Path:
        """Logs of builds, servers and stages."""
        return self.state / "logs"

    @property
    def faces(self) -> np.ndarray:
        """The faces of this run: uint8 (N,112,112,3) BGR, made once."""
        if self._faces is None:
            file = self.state / f"faces-{self.settings.faces}-{FACES_SEED}.npy"
            if not file.is_file():
                with new_file(file) as temporary, temporary.open("wb") as opened:
                    np.save(opened, synthetic_faces(self.settings.faces, seed=FACES_SEED))
            self._faces = np.load(file)
        return self._faces

    def step(self, name: str, needs_s: float, action: Callable[[Result], None]) -> bool:
        """Run a step if the time allows, and keep its result; whether the report has a whole one.

        A step that an earlier run has finished is not run again. One that fails leaves its traceback and what it had
        measured, and the next one runs.
        """
        before = self.stage["steps"].get(name)
        if before and "why" not in before and not before.get("running"):
            return True
        if self.left_s < needs_s:
            self.stage["steps"][name] = {
                "why": f"{self.left_s:.0f} s were left, and it may need {needs_s:.0f}", "result": {}
            }  # fmt: skip
            self.write()
            return False
        entry: dict[str, Any] = {"running": True, "result": {}}
        self.stage["steps"][name] = entry
        self.write()  # a crash of this process leaves the name of the step
        print(f"[{self.left_s:4.0f} s left] {name}", flush=True)
        started = time.monotonic()
        try:
            action(entry["result"])
        except Exception as exc:  # a report with a gap is better than none
            entry["why"] = f"{type(exc).__name__}: {exc}"[:1500]
            entry["traceback"] = traceback.format_exc()[-4000:]
        except BaseException:
            entry["why"] = ENDED
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - started, 1)
            entry["gpu"] = self.log.between(started)
            del entry["running"]
            self.write()
        return "why" not in entry

    def result(self, stage: int, name: str) -> Result:
        """What a step of any stage has measured; empty if nothing."""
        steps = self.report["stages"].get(str(stage), {}).get("steps", {})
        return dict(steps.get(name, {}).get("result", {}))

    def write(self) -> None:
        """Write the report so far, atomically."""
        write_json(self.state / "report.json", self.report)

    def command(self, arguments: Sequence[str], log: str) -> None:
        """Run a Python of ours in a process of its own, bounded by the time left; what it says goes to logs/.

        Raises:
            Missing: it failed; the message is its last line.
        """
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.logs.mkdir(exist_ok=True)
        file = self.logs / log
        with file.open("a") as said:
            done = subprocess.run(
                [sys.executable, *arguments], stdout=said, stderr=subprocess.STDOUT, timeout=max(self.left_s, 1),
                check=False, env=environment,
            )  # fmt: skip
        if done.returncode != 0:
            lines = file.read_text(errors="replace").strip().splitlines()
            raise Missing((lines or ["it said nothing"])[-1])


def read_report(state: Path) -> dict[str, Any]:
    """The report of a state folder."""
    report: dict[str, Any] = json.loads((state / "report.json").read_text())
    return report
