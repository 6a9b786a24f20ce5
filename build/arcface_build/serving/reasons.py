"""Why a tritonserver ended or did not start: from its exit status and its log, as one sentence."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from arcface_build.host_memory import launch_limit, usable_memory

KILLED = "the kernel killed a process for want of memory"


def reason_of_end(status: int, log_path: Path) -> str:
    """Why a tritonserver ended: the signal that it was sent, else its status and what its log says."""
    if status >= 0:
        return f"with status {status}: {reason_in_log(log_path)}"
    memory = " (out of memory? Next: dmesg)" if status == -signal.SIGKILL else ""
    return f"by {signal.Signals(-status).name}{memory} (log: {log_path})"


def for_want_of_memory() -> str:
    """What to say where the kernel killed a process while a server started."""
    here = f"this host or container has {usable_memory() / 2**30:.1f} GB"
    return f"{KILLED} meanwhile: {here}. Give it more, or a smaller model"


def reason_in_log(path: Path) -> str:
    """The cause in a tritonserver log, as one sentence: a missing library, or why models could not be loaded."""
    library = missing_library(path)
    if library:
        return f"it needs {library}, which this host has not. Install it, or use the NGC container: docker-compose up"
    text = path.read_text(errors="replace") if path.is_file() else ""
    older = re.search(r"mapped from non-existing output (\w+) in model (\w+)", text)
    if older:
        return (
            f"the weights in {older[2]} come from an older import: they have no output {older[1]!r}. "
            f"Import the same source again: arcface import SOURCE (log: {path})"
        )
    if told := refusals(path):
        return "; ".join(f"{model}: {reason}" for model, reason in told.items()) + f" (log: {path})"
    unread = re.findall(r"Poll failed for model directory '(\w+)': (.+?)\"?$", text, re.MULTILINE)
    if unread:
        return "; ".join(f"{model}: {reason}" for model, reason in unread) + f" (log: {path})"
    errors = [line for line in text.splitlines() if re.match(r"E\d{4} |error: |.*unrecognized option", line)]
    reason = re.sub(r"^\S*/tritonserver: ", "", errors[-1]) if errors else "no reason in its output"
    return f"{reason} (log: {path})"


def refusals(path: Path) -> dict[str, str]:
    """Model → why its backend did not load it, by a tritonserver log."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    reasons = re.findall(r"failed to load '(\w+)' version \d+: \w+(?: \w+)*: (.+)", text)
    return {model: _first_line(reason) for model, reason in reasons}


def missing_library(path: Path) -> str | None:
    """The shared library (or GLIBC version) that the server or one of its stubs did not find, None if none."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    found = re.search(r"error while loading shared libraries: (\S+?):|version `(GLIBC_[0-9.]+)' not found", text)
    return found and (found.group(1) or found.group(2))


def _first_line(reason: str) -> str:
    """What a model said, without the exception's class and the stack that the python backend appends."""
    if re.search("MemoryError|OutOfMemory|bad_alloc", reason):  # Python gives it no text of its own
        return f"it needs more memory than the {launch_limit() / 2**30:.1f} GB that its process may take here"
    plain = re.sub(r"^(?:\w+Exception|\w+Error): ", "", reason.strip().strip('"'))
    return re.split(r"\\n|\n| At:", plain)[0].strip()
