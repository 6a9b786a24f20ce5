"""What Triton says of its own time: counters before and after in, milliseconds a request and faces a batch out."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from arcface_clients.errors import ServerUnreachable

_PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


def read_statistics(http_url: str, timeout_s: float = 10.0) -> dict[str, dict[str, Any]]:
    """Counters since its start of every loaded model, by name; `http_url` is host:port.

    Raises:
        ServerUnreachable: no answer there.
    """
    try:
        with urllib.request.urlopen(f"http://{http_url}/v2/models/stats", timeout=timeout_s) as answer:
            models = json.load(answer)["model_stats"]
    except (urllib.error.URLError, OSError) as exc:
        raise ServerUnreachable(f"no Triton answers at http://{http_url}: {exc}. Start one: arcface serve") from exc
    return {model["name"]: model for model in models}


def server_split(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per model that worked in between: requests, faces an execution, and milliseconds a request by part.

    An ensemble's own parts are the sums of its steps'; `executions` is how often the model ran (batches).
    """
    split: dict[str, dict[str, float]] = {}
    for name, end in after.items():
        start = before.get(name, {})
        requests = _count(end, "success") - _count(start, "success")
        faces = int(end.get("inference_count", 0)) - int(start.get("inference_count", 0))
        executions = int(end.get("execution_count", 0)) - int(start.get("execution_count", 0))
        if requests <= 0 or executions <= 0:
            continue
        row = {"requests": float(requests), "executions": float(executions), "faces_per_execution": faces / executions}
        for part in _PARTS:
            row[f"{part}_ms"] = (_ns(end, part) - _ns(start, part)) / requests / 1e6
        row["total_ms"] = (_ns(end, "success") - _ns(start, "success")) / requests / 1e6
        split[name] = row
    return split


def _count(model: Mapping[str, Any], part: str) -> int:
    return int(model.get("inference_stats", {}).get(part, {}).get("count", 0))


def _ns(model: Mapping[str, Any], part: str) -> int:
    return int(model.get("inference_stats", {}).get(part, {}).get("ns", 0))
