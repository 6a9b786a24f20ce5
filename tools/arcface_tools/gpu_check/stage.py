"""One stage in a process of its own, so that a crash or a broken CUDA context ends with it.

python -X faulthandler -m arcface_tools.gpu_check.stage STATE NUMBER LEFT_S
"""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path
from typing import Any

from arcface_tools.gpu_check.check import GpuCheck, StopHere, Stopped
from arcface_tools.gpu_check.clocks import GpuLog

STAGES = ("first_minute", "peaks", "bare", "drift", "baselines", "through_triton", "alternatives")
EXIT_STOP = 3


def main(state: Path, number: int, left_s: float) -> int:
    """0 when the stage is through; EXIT_STOP if nothing after it can succeed; 143 after SIGTERM."""
    signal.signal(signal.SIGTERM, _stop)
    module: Any = importlib.import_module(f"arcface_tools.gpu_check.stages.{STAGES[number]}")
    with GpuLog() as log:
        check = GpuCheck(state, number, module.TITLE, left_s, log)
        check.stage.pop("died", None)
        try:
            module.measure(check)
        except StopHere as exc:
            check.report["stopped"] = str(exc)
            check.write()
            return EXIT_STOP
        except Stopped:
            return 128 + signal.SIGTERM
        check.report.pop("stopped", None)
        check.write()
    return 0


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: unwinding may take a moment
    raise Stopped


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
