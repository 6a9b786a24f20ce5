"""Parity: sends the same faces to every loaded backend of a server and reports each one's drift from the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_INPUT
from arcface_clients.errors import (
    ConfigError,
    ContractMismatch,
    GateFailed,
    InferenceFailed,
    InvalidFaces,
    ModelNotReady,
    ServerUnreachable,
)
from arcface_clients.evidence.gate import judge_embeddings
from arcface_clients.evidence.golden import judge_golden
from arcface_clients.faces.check import check_faces
from arcface_clients.triton.address import Access, Address, Connection, Tls
from arcface_clients.triton.embedder import TritonEmbedder

REFERENCE = "arcface_reference"
MODELS = (REFERENCE, "arcface_onnx", "arcface_trt", "arcface")
COUNTING = "arcface_parity"  # the ensemble that counts drift in Triton's own metrics
COUNTED_AT_ONCE = 32


@dataclass(frozen=True)
class BackendParity:
    """One row: a served model against the reference, on the same faces.

    Where no reference is loaded it was judged on the two faces whose golden rows it has, and cosines are None: they
    would be of other faces than the report says.
    """

    model: str
    leaf: str  # the model that answers where `model` is an ensemble
    backend: str
    precision: str
    faces_per_s: float  # from a single pass through the server: an indication, not a benchmark
    mean_cosine: float | None
    min_cosine: float | None
    worst_face: int | None
    limit: float | None  # largest drift allowed for its precision; None for the reference itself
    refused: str = ""  # the gate's reason if it did not pass
    demo: bool = False  # random weights: it recognises nobody, however near to its reference it is
    golden_drift: float | None = None  # of the worst golden face, where no reference is loaded

    @property
    def passed(self) -> bool:
        """Whether it passed the gate, or there was nothing to compare it with."""
        return not self.refused

    @property
    def gate(self) -> str:
        """The verdict in words, with its figures."""
        if self.refused:
            return f"FAILED ({self.precision}: {self.refused})"
        if self.golden_drift is not None:
            return f"golden rows ({self.precision}: drift {max(self.golden_drift, 0):.1e} ≤ {self.limit:g})"
        if self.min_cosine is None:
            return "not compared"
        if self.limit is None:
            return "reference"
        return f"passed ({self.precision}: drift {1 - self.min_cosine:.1e} ≤ {self.limit:g})"


@dataclass(frozen=True)
class ParityReport:
    """All loaded backends of one server; `skipped` says why the others are missing."""

    url: str
    faces: int
    contract_id: str | None
    rows: tuple[BackendParity, ...]
    skipped: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every row that was compared passed its gate."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys, and `passed`."""
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return {**asdict(self), "rows": rows, "passed": self.passed}

    def require(self) -> None:
        """Raise unless every gate passed.

        Raises:
            ModelNotReady: there was no reference to compare with.
            GateFailed: names each backend beyond its limit, with the figure.
        """
        failed = [f"{row.model} {row.gate}" for row in self.rows if not row.passed]
        if failed:
            raise GateFailed(f"on {self.faces} faces: {'; '.join(failed)}. See which faces: arcface compare")
        if REFERENCE in self.skipped:
            golden = any(row.golden_drift is not None for row in self.rows)
            what = "only the golden rows of the import were compared" if golden else "nothing was compared"
            raise ModelNotReady(f"{what}: {self.skipped[REFERENCE]}")


def measure_parity(
    url: str,
    faces: Array | None = None,
    models: Sequence[str] = MODELS,
    *,
    limits: Mapping[str, float] | None = None,
    faces_from: str | Path | None = None,
    timeout_s: float = 120.0,
    access: Access | None = None,
    progress: Callable[[str], None] = lambda model: None,
) -> ParityReport:
    """Embed faces with every loaded model, and compare with the reference if that is loaded.

    Args:
        url: the server.
        faces: uint8 (N,112,112,3) BGR, N ≥ 1; None reads `faces_from`, else uses 32 synthetic faces.
        models: models to test; those not loaded are skipped, with the reason in the report.
        limits: largest drift by precision; None uses comparison.max_drift from the configuration.
        faces_from: folder, file, glob or .npz of crops.
        timeout_s: longest wait for one request.
        access: headers, TLS files and compression for the server.
        progress: called with each model's name before that model is tested.

    Each row is gated by its served precision (parameter `precision` of the leaf model, fp32 if absent).

    Raises:
        InvalidFaces: no faces, or invalid ones.
        ServerUnreachable: no server answers.
        ContractMismatch: a backend serves a different contract from the reference.
        ConfigError: a backend states a precision that has no gate.
    """
    if limits is None:
        from arcface_clients.config.sources import load_config

        limits = load_config().comparison.max_drift.model_dump()
    faces = check_faces(_faces(faces, faces_from))
    if not len(faces):
        raise InvalidFaces(f"no faces to compare{f' in {faces_from}' if faces_from else ''}: expected at least one.")
    rows: list[BackendParity] = []
    skipped: dict[str, str] = {}
    reference: Array | None = None
    contract: str | None = None
    named: str | None = None  # what the rows of the first model say, where the server was started without the overlays
    for model in sorted(models, key=lambda name: name != REFERENCE):
        progress(model)
        with TritonEmbedder(
            url, model, timeout_s=timeout_s, retry_for_s=0, expected_contract=contract, **(access or {})
        ) as embedder:
            try:
                served = embedder.ensure_ready()
            except ModelNotReady as exc:
                skipped[model] = str(exc)
                continue
            precision = served.precision or "fp32"
            if precision not in limits:
                raise ConfigError(f"{model!r} states precision {precision!r}; expected one of {', '.join(limits)}.")
            verdict = None
            broken, faces_per_s = "", 0.0
            try:
                embedder.encode(faces[:1])  # the first request may allocate; it is not timed
                started = time.perf_counter()
                embeddings = embedder.encode(faces)
                faces_per_s = len(faces) / (time.perf_counter() - started)
                if model == REFERENCE:
                    reference = embeddings
                if reference is not None:
                    verdict = judge_embeddings(reference, embeddings, precision, limits)
                else:
                    verdict = judge_golden(served.golden, embedder.encode, precision, limits)
            except InferenceFailed as exc:  # NaN, another shape, rows that are not of unit length
                if model == REFERENCE:
                    raise
                broken = str(exc)
            named = _one_contract(model, named, embedder.contract_prefix)
        contract = contract or served.contract_id
        drift = verdict.report if verdict and reference is not None else None
        rows.append(
            BackendParity(
                model=model,
                leaf=served.leaf,
                backend=served.backend,
                precision=precision,
                faces_per_s=faces_per_s,
                mean_cosine=drift.mean_cosine if drift else None,
                min_cosine=drift.min_cosine if drift else None,
                worst_face=drift.worst_face if drift else None,
                limit=None if model == REFERENCE else limits[precision],
                refused=verdict.why if verdict else broken,
                demo=served.demo,
                golden_drift=verdict.max_drift if verdict and reference is None else None,
            )
        )
    return ParityReport(url=url, faces=len(faces), contract_id=contract, rows=tuple(rows), skipped=skipped)


def count_drift(url: str, faces: Array, *, timeout_s: float = 120.0, access: Access | None = None) -> bool:
    """Have the server compare faces with its reference and record their drift in its own metrics (`arcface_drift`).

    Args:
        url: the server's gRPC address.
        faces: uint8 (N,112,112,3) BGR.
        timeout_s: longest wait for one request.
        access: headers and TLS files of the server.

    Returns:
        Whether it did; False if `arcface_parity` is not loaded.

    Raises:
        ConfigError: not a gRPC address.
        ServerUnreachable: no server answers.
        InferenceFailed: a backend answered with an error.
    """
    from tritonclient import grpc as triton

    from arcface_clients.triton.transports.grpc_messages import channel_options

    address = Address.parse(url)
    if address.protocol != "grpc":
        raise ConfigError(f"drift is counted over gRPC only; got {url}. Give the gRPC port: --url grpc://HOST:8001")
    # Not with a TritonEmbedder: it requests `embedding` alone, and Triton skips steps whose outputs nobody requests.
    access = access or {}
    tls, headers = access.get("tls") or Tls(), access.get("headers", {})
    files = {
        "root_certificates": tls.ca_file,
        "private_key": tls.key_file,
        "certificate_chain": tls.cert_file,
    }
    with triton.InferenceServerClient(
        address.target,
        ssl=address.tls,
        channel_args=channel_options(Connection(address)),
        **{name: str(file) for name, file in files.items() if file},
    ) as client:
        try:
            if not client.is_model_ready(COUNTING, headers=headers, client_timeout=timeout_s):
                return False
            for start in range(0, len(faces), COUNTED_AT_ONCE):
                part = np.ascontiguousarray(faces[start : start + COUNTED_AT_ONCE])
                tensor = triton.InferInput(FACE_INPUT, part.shape, "UINT8")
                tensor.set_data_from_numpy(part)
                client.infer(COUNTING, [tensor], headers=headers, client_timeout=timeout_s)
        except triton.InferenceServerException as exc:
            kind = ServerUnreachable if "UNAVAILABLE" in str(exc.status()) else InferenceFailed
            raise kind(f"{COUNTING!r} at {address} answered {exc.status()}: {exc.message()}") from exc
    return True


def render_table(report: ParityReport) -> str:
    """The report as a table for a terminal or a log, at most 100 columns wide for our own model names."""
    lines: list[tuple[str, ...]] = [("backend", "faces/s", "mean cosine", "min cosine", "gate")]
    for row in report.rows:
        gate = row.gate + ", DEMO" * row.demo
        lines.append((row.model, f"{row.faces_per_s:.1f}", _cosine(row.mean_cosine), _cosine(row.min_cosine), gate))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    lines.insert(1, tuple("─" * width for width in widths))
    return "\n".join(
        "  ".join(cell.rjust(width) if i in (1, 2, 3) else cell.ljust(width) for i, (cell, width) in columns).rstrip()
        for columns in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    )


def _one_contract(model: str, before: str | None, now: str | None) -> str | None:
    """What the rows of all models name, so far as they do.

    Raises:
        ContractMismatch: two things.
    """
    if before and now and before != now:
        raise ContractMismatch(
            f"rows of {model!r} are of contract {now[:12]}, those before of {before[:12]}: expected one model "
            "behind all backends. Import it again: arcface import SOURCE"
        )
    return before or now


def _faces(faces: Array | None, faces_from: str | Path | None) -> Array:
    if faces is not None:
        return faces
    if faces_from is not None:
        from arcface_clients.faces.images import load_faces

        return load_faces([faces_from])[0]
    from arcface_clients.faces.synthetic import synthetic_faces

    return synthetic_faces(32)


def _cosine(value: float | None) -> str:
    return "—" if value is None else f"{value:.7f}"
