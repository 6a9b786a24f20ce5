"""Imports an untrusted file in a child process, so that a hang, a crash or memory exhaustion is one clear error.

    python -m arcface_build.imports.child   < job.json

The child resolves the source, converts and proves it, and writes into a scratch folder; only the parent publishes.
Standard output carries one JSON object per line: {"progress"}, {"say"}, {"error", "message"} or {"manifest", ...};
everything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from arcface_build.child_process import end_with_parent, module_line, take_at_most
from arcface_build.host_memory import own_limit, usable_memory
from arcface_clients.errors import ArcFaceError
from arcface_clients.evidence.drift import DRIFT_LIMITS

TIMEOUT_S = 1800.0
MEMORY_SHARE = 0.8  # of the host's memory, or the container's; a ResNet100 needs less than 2 GB
EXIT_TOLD = 4  # the child has reported the error


@dataclass(frozen=True)
class ImportJob:
    """The import to run; paths as text, `stated` as returned by `Stated.to_json`."""

    source: str
    models_dir: str
    scratch: str
    cache: str
    name: str | None = None
    stated: dict[str, Any] | None = None
    output: str | None = None
    faces: str | None = None
    accept_licence: bool = False
    insightface_root: str | None = None
    force: bool = False
    limits: Mapping[str, float] = field(default_factory=lambda: DRIFT_LIMITS)


@dataclass(frozen=True)
class Done:
    """The child's result: manifest as JSON, model name, and the finished folder, or "" if it was up to date."""

    manifest: dict[str, Any]
    name: str
    made: str


def run_child(
    job: ImportJob,
    timeout_s: float,
    progress: Callable[[str, int, int], None],
    say: Callable[[str], None],
) -> Done:
    """Run the job in a child process, which has ended by the time this returns or raises.

    Raises:
        ArcFaceError: raised by the child; SourceRefused if it ran out of time or memory, or crashed.
    """
    log = Path(job.scratch) / "stderr.log"
    with log.open("w") as errors:
        child = subprocess.Popen(
            module_line("arcface_build.imports.child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # the parent handles Ctrl-C
        )
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(child)

    timer = threading.Timer(timeout_s, stop)
    told: dict[str, Any] = {}
    try:
        timer.start()
        stdin, stdout = cast(IO[str], child.stdin), cast(IO[str], child.stdout)
        with stdin:
            stdin.write(json.dumps(asdict(job)))
        for line in stdout:
            said = json.loads(line)
            if "progress" in said:
                progress(*said["progress"])
            elif "say" in said:
                say(said["say"])
            else:
                told = said
        code = child.wait()
    except BrokenPipeError:
        code = child.wait()
    finally:
        timer.cancel()
        _kill(child)
        child.wait()
        if child.stdout:
            child.stdout.close()
    if os.environ.get("ARCFACE_TRACEBACK"):
        sys.stderr.write(log.read_text(errors="replace"))
    if code == 0 and "manifest" in told:
        return Done(**told)
    raise _error(told, code, job.source, timeout_s if late.is_set() else None)


def _error(told: dict[str, Any], code: int, source: str, timeout_s: float | None) -> Exception:
    """The exception for the way the child ended."""
    import arcface_build.errors
    import arcface_clients.errors

    refused = arcface_build.errors.SourceRefused
    file = Path(source).name
    if timeout_s is not None:
        return refused(f"{file} was not imported within {timeout_s:g} s and was stopped. Allow more time: --timeout")
    if told.get("error") == "OSError":
        return OSError(told["message"])
    for module in (arcface_build.errors, arcface_clients.errors):
        kind = getattr(module, told.get("error", ""), None)
        if isinstance(kind, type) and issubclass(kind, ArcFaceError):
            return kind(told["message"])
    if told.get("error") == "MemoryError":
        return refused(
            f"{file} needs more than the {memory_limit() / 2**30:.1f} GB of memory that an import may take here. "
            "Next: import it where there is more, or give this host, container or session (ulimit -d) more"
        )
    if "error" in told:
        return refused(
            f"{file}: the import failed: {told['error']}: {told['message']}. ARCFACE_TRACEBACK=1 shows where."
        )
    if code == -signal.SIGKILL:
        return refused(f"the import of {file} was killed (by the kernel, out of memory, or by hand).")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return refused(f"{file} crashes the ONNX libraries ({how}): expected a valid file. Export it again.")


def memory_limit() -> int:
    """Bytes that a child may allocate."""
    share, own = int(usable_memory() * MEMORY_SHARE), own_limit()
    return share if own is None else min(share, own)


def _kill(child: subprocess.Popen[str]) -> None:
    """Kill the child and everything it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


def main() -> int:
    """Run the job given on standard input; returns 0, or EXIT_TOLD after reporting an error."""
    end_with_parent()
    take_at_most(memory_limit())
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # C++ code and InsightFace print to standard output too
    try:
        _tell(lines, **asdict(_work(ImportJob(**json.load(sys.stdin)), lines)))
    except MemoryError:
        _tell(lines, error="MemoryError", message="")
    except OSError as exc:
        kind = type(exc).__name__ if isinstance(exc, ArcFaceError) else "OSError"
        _tell(lines, error=kind, message=str(exc))
    except Exception as exc:
        traceback.print_exc()
        _tell(lines, error=type(exc).__name__, message=" ".join(str(exc).split()))
    else:
        return 0
    return EXIT_TOLD


def _work(job: ImportJob, lines: IO[str]) -> Done:
    from arcface_build.imports.importing import existing_import, import_model
    from arcface_build.imports.preprocessing import Stated
    from arcface_build.imports.proof_faces import read_faces, synthetic_proof_faces
    from arcface_build.imports.source import known_models, resolve, with_file
    from arcface_clients.engines.import_manifest import check_name

    def progress(what: str, done: int, total: int) -> None:
        _tell(lines, progress=[what, done, total])

    stated = Stated.from_json(job.stated or {})
    scratch = Path(job.scratch)
    found = resolve(
        job.source,
        scratch,
        known=known_models(),
        cache=Path(job.cache),
        accept_licence=job.accept_licence,
        insightface_root=Path(job.insightface_root) if job.insightface_root else None,
        say=lambda line: _tell(lines, say=line),
    )
    name = check_name(job.name or found.name, "Choose one: --name NAME")
    folder = Path(job.models_dir) / name
    there = None if job.force else existing_import(folder, found, stated, job.output, job.limits)
    if there is not None:
        return Done(there.to_json(), name, "")
    found = with_file(found, lambda done, total: progress("build the demo network", done, total))
    faces = read_faces(Path(job.faces)) if job.faces else synthetic_proof_faces()
    made = scratch / "made" / name
    manifest = import_model(
        found,
        made,
        faces,
        stated=stated,
        output=job.output,
        variants_of=folder,
        limits=job.limits,
        progress=progress,
    )
    return Done(manifest.to_json(), name, str(made))


def _tell(lines: IO[str], **fields: Any) -> None:
    print(json.dumps(fields), file=lines, flush=True)


if __name__ == "__main__":
    sys.exit(main())
