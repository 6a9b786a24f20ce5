"""Measures how long a server takes to be ready, with the outputs stated in the overlays and without, in turns.

Run: python -m arcface_tools.server_start docs/measured/server-start.json [MODEL_REPOSITORY]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Spread
from arcface_build.repository.stated import completion_options
from arcface_build.serving.binary import find_tritonserver
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_tools.served import STATED_OUTPUTS

ROUNDS = 7
STATED, COMPLETED = "outputs stated", "outputs completed by Triton"


def main(target: Path, repository: Path) -> None:
    """Start each server in each round and write the JSON."""
    binary, seconds = find_tritonserver(), {STATED: list[float](), COMPLETED: list[float]()}
    result: dict[str, Any] = {"kind": "server-start", "host": describe_host(), "rounds": ROUNDS}
    with tempfile.TemporaryDirectory(prefix="arcface-start-") as name:
        folders = {way: Path(name) / str(number) / "model_repository" for number, way in enumerate(seconds)}
        for way, folder in folders.items():
            shutil.copytree(repository, folder)
            if way == COMPLETED:
                for overlay in folder.glob("arcface_onnx/configs/*.pbtxt"):
                    overlay.write_text(STATED_OUTPUTS.sub("", overlay.read_text()))
            if bool(completion_options(str(folder), "onnx")) != (way == STATED):
                raise SystemExit(f"{folder}: this copy is not served with {way}; import the model again")
        for number in range(ROUNDS):
            for way in list(folders)[:: 1 if number % 2 else -1]:
                log_path = Path(name) / "tritonserver.log"
                server = TritonProcess(binary, folders[way], ["arcface"], ports=free_ports(), log_path=log_path)
                started = time.perf_counter()
                with server:
                    server.wait_ready()
                    seconds[way].append(time.perf_counter() - started)
                print(f"{way}: {seconds[way][-1]:.2f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    result["ready_s"] = [{"way": way, **Spread.of(values).to_json()} for way, values in seconds.items()]
    pairs = zip(seconds[COMPLETED], seconds[STATED], strict=True)
    result["saved_s"] = Spread.of([before - after for before, after in pairs]).to_json()
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "model_repository"))
