"""Triton's own statistics: time per request and faces per batch between two readings of its counters."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from arcface_clients.errors import ServerUnreachable
from arcface_clients.triton.address import Access, Tls

_PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


def read_statistics(http_url: str, access: Access | None = None, timeout_s: float = 10.0) -> dict[str, dict[str, Any]]:
    """Counters of every loaded model since the server's start, by name; `http_url` is host:port or starts with https://.

    Raises:
        ServerUnreachable: no answer.
    """
    access = access or {}
    base = http_url if "://" in http_url else f"http://{http_url}"
    request = urllib.request.Request(f"{base}/v2/models/stats", headers=access.get("headers", {}))
    try:
        context = _tls_context(access.get("tls") or Tls()) if base.startswith("https:") else None
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as answer:
            models = json.load(answer)["model_stats"]
    except (urllib.error.URLError, OSError) as exc:
        raise ServerUnreachable(f"no Triton answers at {base}: {exc}. Start one: arcface serve") from exc
    return {model["name"]: model for model in models}


def _tls_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca_file)
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


def server_split(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """For each model that ran in between: requests, faces per execution, and milliseconds per request by part.

    An ensemble's parts are the sums over its steps; `executions` is how often the model ran (batches).
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


def ensemble_cost(split: Mapping[str, Mapping[str, float]], ensemble: str) -> dict[str, Any] | None:
    """The overhead of a one-step ensemble per request: its total time minus the total time of its step.

    Both means are over the same requests, which excludes the larger spread between two runs.

    Args:
        split: the result of `server_split` for one sample.
        ensemble: the model that was called.

    Returns:
        over (the step's model), added_ms (per request), compute_ms (per request: input, inference and output of the
        step, queue excluded) and share_of_compute (added_ms / compute_ms). None if the model is not an ensemble, if
        more than one model ran (steps may run in parallel), or if others called one of the two in the meantime.
    """
    others = [name for name in split if name != ensemble]
    if ensemble not in split or len(others) != 1:
        return None
    whole, step = split[ensemble], split[others[0]]
    if whole["requests"] != step["requests"]:
        return None
    added_ms, compute_ms = whole["total_ms"] - step["total_ms"], sum(step[f"{part}_ms"] for part in _PARTS[1:])
    return {
        "over": others[0],
        "added_ms": added_ms,
        "compute_ms": compute_ms,
        "share_of_compute": added_ms / compute_ms,
    }


def _count(model: Mapping[str, Any], part: str) -> int:
    return int(model.get("inference_stats", {}).get(part, {}).get("count", 0))


def _ns(model: Mapping[str, Any], part: str) -> int:
    return int(model.get("inference_stats", {}).get(part, {}).get("ns", 0))
