"""Records what a newcomer sees: a fresh clone, `scripts/serve`, then README's own lines, with times and sizes.

pip starts with an empty cache, so that everything is downloaded as on a new machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from arcface_build.bench.host import describe_host
from arcface_clients.errors import ArcFaceError, Missing

SERVING = "Ctrl-C stops it."
CROPS = """
import cv2, pathlib
from arcface_clients.faces.synthetic import synthetic_faces
pathlib.Path("crops").mkdir()
for i, face in enumerate(synthetic_faces(16)):
    cv2.imwrite(f"crops/{i}.png", face)
"""


@dataclass(frozen=True)
class Step:
    """One command of the recording, all that it printed, and how long that took."""

    command: str
    printed: str
    seconds: float
    status: int | None  # None: it goes on serving

    @property
    def told(self) -> str:
        """As on a screen, with the exit code where it is not 0."""
        failed = f"(exit code {self.status})\n" if self.status else ""
        return f"$ {self.command}\n{self.printed.rstrip()}\n{failed}"


def record(
    source: str, model: Path | None, first_port: int, say: Callable[[str], None], timeout_s: float = 1800
) -> tuple[list[Step], dict[str, str]]:
    """Clone and run everything in a temporary folder; returns the steps, and sizes by what they are of.

    Args:
        source: what is cloned.
        model: an ONNX of one's own, which is imported under README's name; None leaves that line out.
        first_port: the server's first of three ports.
        say: told each command before it runs.
        timeout_s: longest time for one command.

    Raises:
        ArcFaceError: the server did not start; with what it printed.
    """
    steps: list[Step] = []
    with tempfile.TemporaryDirectory(prefix="arcface-newcomer-") as scratch:
        checkout, url = Path(scratch) / "arcface-triton", f"localhost:{first_port + 1}"
        environment = _environment(Path(scratch), first_port, url)

        def run(command: str, folder: Path = checkout) -> None:
            say(command)
            started = time.monotonic()
            done = _bash(command, folder, environment, timeout_s)
            steps.append(Step(command, done.stdout, time.monotonic() - started, done.returncode))

        run(f"git clone --quiet {source} arcface-triton", Path(scratch))
        if not checkout.is_dir():
            raise Missing(f"{source} could not be cloned: {steps[-1].printed}")
        run("scripts/serve --once")
        sizes = {
            "the checkout": _megabytes(checkout, without=".venv"),
            "packages downloaded": _first(r"installed in .*?, (\d+ MB) downloaded", steps[-1].printed),
            "`.venv`": _megabytes(checkout / ".venv"),
            "`models/` and `model_repository/`": _megabytes(checkout / "models", checkout / "model_repository"),
        }
        say("scripts/serve")
        with _serving(checkout, environment, timeout_s) as step:
            steps.append(step)
            _bash(f".venv/bin/python - <<'PY'{CROPS}PY", checkout, environment, timeout_s)
            for line in readme_lines((checkout / "README.md").read_text()):
                run(line.replace("localhost:8001", url))
            if model is not None:
                shutil.copyfile(model, checkout / "my_r50.onnx")
                run("arcface import my_r50.onnx")
                run(f"arcface compare insightface {url} --faces crops/")
    return steps, sizes


def readme_lines(text: str) -> list[str]:
    """The commands of README's console blocks, in order, without their comments."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE)]
    return [re.split(r"\s+#\s", line)[0].strip() for line in lines if not line.startswith("source ")]


def page(steps: list[Step], sizes: Mapping[str, str], command: str) -> str:
    """The recording as Markdown."""
    host = describe_host()
    rows = "\n".join(f"| `{step.command}` | {step.seconds:.1f} s |" for step in steps)
    of_sizes = "\n".join(f"| {what} | {size} |" for what, size in sizes.items())
    screen = "\n".join(step.told for step in steps)
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"""# A newcomer's first ten minutes

Recorded by `{command}` on {when}: {host["cores"]} cores of {host["cpu"]}, {host["system"]}, Python {host["python"]},
load {host["load_1min"]:.1f} at the end. A fresh clone, pip with an empty cache, then the lines of README; `crops/`
holds 16 synthetic faces.
Altogether {sum(step.seconds for step in steps) / 60:.1f} minutes.

| command | time |
|---|---|
{rows}

| size | |
|---|---|
{of_sizes}

## The screen

`scripts/serve` went on serving in one shell, the lines after it were typed into another.

```text
{screen}```
"""


@contextmanager
def _serving(checkout: Path, environment: Mapping[str, str], timeout_s: float) -> Iterator[Step]:
    """`scripts/serve` until it serves, and its end when the block is left."""
    log, started = checkout / ".cache" / "first-ten-minutes.log", time.monotonic()
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["scripts/serve"], cwd=checkout, env=dict(environment), stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        while SERVING not in (printed := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() - started > timeout_s:
                raise ArcFaceError(f"scripts/serve did not serve:\n{printed}")
            time.sleep(0.2)
        yield Step("scripts/serve", printed, time.monotonic() - started, None)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _environment(scratch: Path, first_port: int, url: str) -> dict[str, str]:
    """A new user's: nothing of this environment's Python, an empty cache, and the ports."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_CACHE_DIR")
    path = [part for part in os.environ["PATH"].split(os.pathsep) if ".venv" not in part]
    ports = {name: str(first_port + i) for i, name in enumerate(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"))}
    return {
        **{key: value for key, value in os.environ.items() if key not in ours and not key.startswith("ARCFACE_")},
        **{f"ARCFACE_SERVE_{name}": port for name, port in ports.items()},
        "ARCFACE_TRITON__URL": url,
        "PATH": os.pathsep.join(path),
        "PIP_CACHE_DIR": str(scratch / "pip"),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "120",
    }


def _bash(
    command: str, folder: Path, environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """One line as typed into a shell in which README's `source .venv/bin/activate` was typed before."""
    line = f"[ ! -f .venv/bin/activate ] || source .venv/bin/activate\n{command}"
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _megabytes(*folders: Path, without: str = "") -> str:
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return f"{sum(file.stat().st_size for file in files if not without or without not in file.parts) / 1e6:.0f} MB"


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "not said"
