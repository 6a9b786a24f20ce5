"""Checks this host and its configuration: what is present, what is wrong and how to fix it, in text and JSON."""

from __future__ import annotations

import platform
import shutil
import socket
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_clients.checks.report import Check
from arcface_clients.errors import ArcFaceError, BackendUnavailable, DependencyMissing, ModelNotReady, ServerUnreachable
from arcface_clients.extras import how_to_get, install_command
from arcface_clients.gpu.cards import Gpu, find_gpus
from arcface_clients.gpu.driver import found_under_development_name

if TYPE_CHECKING:
    from arcface_clients.checks.benchmark import BenchmarkReport
    from arcface_clients.config.schema import EmbeddingConfig
    from arcface_clients.engines.fallback import FallbackEmbedder

SHARED_MEMORY_WANTED_BYTES = 256 << 20  # pools of a few clients at batch 64: 2.4 MB per request in flight


def client_checks(settings: EmbeddingConfig) -> list[Check]:
    """Everything the clients can find out about this host, in reading order."""
    gpus, gpu = gpus_here()
    looks: dict[str, Callable[[], Check]] = {
        "python": check_python,
        "gpu": lambda: gpu,
        "tensorrt": lambda: check_tensorrt(gpus),
        "tensors on the GPU": lambda: check_driver_name(gpus),
        "onnxruntime": lambda: check_onnxruntime(gpus, settings.backend == "onnx"),
        "reference": check_reference,
        "shared memory": check_shared_memory,
        "local model": lambda: check_local_model(settings),
        "server": lambda: check_server(settings),
        "restrictions": lambda: check_restrictions(settings),
    }
    return [*(guarded(name, look) for name, look in looks.items()), *_served(settings)]


def _served(settings: EmbeddingConfig) -> list[Check]:
    """The checks of a running server; one line where even asking failed."""
    from arcface_clients.checks.served_checks import check_photos, served_checks

    try:
        return [*served_checks(settings), check_photos(settings)]
    except ArcFaceError as exc:
        return [Check("drift", "absent", f"not asked: {exc}")]


def check_python() -> Check:
    """Python, numpy and our own versions."""
    ours = _version("arcface-triton") or "not installed as a package"
    found = f"Python {platform.python_version()}, numpy {_version('numpy')}, arcface-triton {ours}"
    return Check("python", "ok", found)


def gpus_here() -> tuple[list[Gpu], Check]:
    """The GPUs with driver, SM and memory; an empty list if there is none, or none that works."""
    try:
        gpus = find_gpus()
    except DependencyMissing as exc:
        if shutil.which("nvidia-smi"):
            return [], Check("gpu", "problem", *fact_and_fix(exc))
        return [], Check("gpu", "absent", "none: everything runs on the CPU")
    cards = [f"{g.name} SM {g.sm} {g.memory_bytes / 2**30:.0f} GB driver {g.driver} CUDA {g.cuda}" for g in gpus]
    return gpus, Check("gpu", "ok", "; ".join(cards))


def check_tensorrt(gpus: list[Gpu]) -> Check:
    """TensorRT and Polygraphy, which the tensorrt engine needs."""
    version = _module_version("tensorrt")
    polygraphy = _version("polygraphy")
    if version and polygraphy:
        return Check("tensorrt", "ok", f"TensorRT {version}, Polygraphy {polygraphy}")
    missing = " and ".join(n for n, v in (("tensorrt", version), ("polygraphy", polygraphy)) if not v)
    if gpus:
        return Check(
            "tensorrt",
            "problem",
            f"not installed: {missing}",
            install_command("tensorrt") if version else how_to_get("tensorrt"),
        )
    return Check("tensorrt", "absent", f"not installed: {missing} (needed on a GPU host only)")


def check_driver_name(gpus: list[Gpu]) -> Check:
    """libcuda.so, without which Triton's python backend moves faces in CUDA shared memory through the host."""
    name = "tensors on the GPU"
    if not gpus:
        return Check(name, "absent", "no GPU")
    if found_under_development_name():
        return Check(name, "ok", "libcuda.so: Triton's python backend can keep them there")
    return Check(
        name,
        "absent",
        "no libcuda.so, only libcuda.so.1: Triton's python backend silently moves them through the host (the native "
        "tensorrt backend does not need it)",
        "make a link libcuda.so beside libcuda.so.1 (ldconfig -p | grep libcuda), then ldconfig",
    )


def check_onnxruntime(gpus: list[Gpu], needed: bool = False) -> Check:
    """ONNX Runtime: exactly one wheel installed, and its providers."""
    wheels = [n for n in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino") if _version(n)]
    if util.find_spec("onnxruntime") is None:
        wanted = "onnxruntime-gpu" if gpus else "onnxruntime"
        status = "problem" if needed else "absent"
        return Check("onnxruntime", status, "not installed: the onnx engine is unavailable", f"pip install {wanted}")
    try:
        import onnxruntime

        found = f"ONNX Runtime {onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}"
    except Exception as exc:  # a broken wheel can raise anything
        return Check(
            "onnxruntime", "problem", f"does not import: {exc}", "pip install --force-reinstall --no-deps onnxruntime"
        )
    if len(wheels) > 1:
        return Check(
            "onnxruntime",
            "problem",
            f"{found}; conflicting wheels installed: {', '.join(wheels)}",
            f"keep one: pip uninstall -y {' '.join(wheels)} && pip install {wheels[-1]}",
        )
    if gpus and "CUDA" not in found:
        return Check(
            "onnxruntime",
            "problem",
            f"{found}; this host has a GPU that this wheel cannot use",
            f"pip uninstall -y {' '.join(wheels)} && pip install onnxruntime-gpu",
        )
    return Check("onnxruntime", "ok", found)


def check_reference() -> Check:
    """InsightFace, the reference for every comparison."""
    version = _version("insightface")
    if version:
        return Check("reference", "ok", f"InsightFace {version}")
    return Check("reference", "absent", "InsightFace is not installed: no reference", how_to_get("insightface"))


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Size of /dev/shm, through which a client passes faces to a server on the same host."""
    if not folder.is_dir():
        return Check("shared memory", "absent", f"no {folder}: faces go over the wire")
    usage = shutil.disk_usage(folder)
    found = f"{folder}: {usage.free >> 20} of {usage.total >> 20} MB free"
    if usage.free < SHARED_MEMORY_WANTED_BYTES:
        return Check(
            "shared memory",
            "problem",
            f"{found}, {SHARED_MEMORY_WANTED_BYTES >> 20} MB needed",
            "docker run --shm-size=1g (compose: shm_size; Kubernetes: an emptyDir of medium Memory on /dev/shm)",
        )
    return Check("shared memory", "ok", found)


def check_local_model(settings: EmbeddingConfig) -> Check:
    """The model that in-process engines would load."""
    from arcface_clients.pipeline import local_model

    try:
        model = local_model(settings)
    except BackendUnavailable as exc:
        status = "problem" if settings.backend in ("onnx", "insightface") else "absent"
        return Check("local model", status, fact_and_fix(exc)[0], "arcface import SOURCE, or: arcface import demo")
    except ArcFaceError as exc:
        return Check(
            "local model", "problem", str(exc).partition(": ")[0], "name it: local.model in config/embedding.yaml"
        )
    contract = (model.contract_id or "unknown")[:12]
    return Check("local model", "ok", f"{model.path.name} in {settings.local.models_dir}, contract {contract}")


def check_server(settings: EmbeddingConfig, timeout_s: float = 3.0) -> Check:
    """Whether the model is served at triton.url, tested with our own client as a pipeline would use it."""
    from arcface_clients.engines.registry import EngineRegistry
    from arcface_clients.faces.synthetic import synthetic_faces
    from arcface_clients.pipeline import Link, engine_arguments

    triton = settings.triton
    status = "problem" if settings.backend == "triton" else "absent"
    fix = "start one: arcface serve, or set triton.url (ARCFACE_TRITON__URL)"
    try:
        with socket.create_connection((triton.address.host, triton.address.port), timeout_s):
            pass
    except OSError as exc:
        return Check("server", status, f"nothing answers at {triton.url} ({exc.strerror or exc})", fix)
    arguments = engine_arguments(Link("triton", "auto", settings.precision, "triton"), settings)
    try:
        with EngineRegistry.get("triton", **{**arguments, "timeout_s": timeout_s, "retry_for_s": 0}) as engine:
            engine.ensure_ready()
            engine.encode(synthetic_faces(1))  # a server may be ready while the process that computes is dead
            contract = (engine.contract_id or "unknown: started without --model-config-name")[:48]
            found = f"{triton.url} serves {triton.model}, width {engine.embedding_dim}, contract {contract}"
            return Check("server", "ok", found)
    except (ServerUnreachable, ModelNotReady) as exc:
        return Check("server", status, str(exc), fix)
    except ArcFaceError as exc:
        return Check("server", status, str(exc), "look at what listens there (ss -ltnp), and at its log")


def check_restrictions(settings: EmbeddingConfig, timeout_s: float = 3.0) -> Check:
    """Whether the server refuses to administer itself for whoever has no key, by asking for its list of models."""
    from arcface_clients.triton.transports.listing import models_without_key

    triton, name = settings.triton, "restrictions"
    address = triton.address
    try:
        listed = models_without_key(triton.connection(), timeout_s)
    except ArcFaceError as exc:
        return Check(name, "absent", f"not asked: {exc}")
    if listed is None:
        return Check(name, "ok", f"{address} refuses model control without its key")
    return Check(
        name,
        "problem",
        f"{address} lets anyone who reaches it load and unload models, which runs code",
        "serve it by: arcface serve, or give tritonserver --http-restricted-api and --grpc-restricted-protocol "
        "(docs/operations.md)",
    )


def engine_diagnostics(
    backend: FallbackEmbedder,
    settings: EmbeddingConfig,
    benchmark: BenchmarkReport | None = None,
) -> dict[str, Any]:
    """The engine in use as JSON: backend, file, precision, batch size, width, throughput, latency, VRAM, validation."""
    from arcface_clients.engines.validation import precision_of

    engine = backend.engine
    taken = getattr(engine, "taken", {})
    report = backend.validations.get(backend.last_engine or "")
    return {
        "backend": backend.last_engine,
        "reason": backend.reason,
        "engine_path": taken.get("file") or (settings.triton.url if backend.last_engine == "triton" else None),
        "provider": taken.get("provider"),
        "precision": taken.get("precision") or precision_of(engine, settings.precision),
        "batch_size": getattr(engine, "max_batch", None) or getattr(engine, "max_batch_size", None),
        "embedding_dim": engine.embedding_dim,
        "contract_id": engine.contract_id,
        "throughput_faces_per_s": benchmark.faces_per_s if benchmark else None,
        "latency_ms": {"p50": benchmark.latency_p50_ms, "p99": benchmark.latency_p99_ms} if benchmark else None,
        "vram_bytes": benchmark.vram_bytes if benchmark else None,
        "peak_rss_bytes": benchmark.peak_rss_bytes if benchmark else None,
        "benchmark": benchmark.to_json() if benchmark else None,
        "validation": report.to_json() if report else {"status": "off", "why": "validation.run_on_startup is false"},
    }


def guarded(name: str, look: Callable[[], Check]) -> Check:
    """Run a check; an exception becomes a problem, so that one failing check does not stop the others."""
    try:
        return look()
    except Exception as exc:
        return Check(name, "problem", f"{type(exc).__name__}: {exc}", "run again with ARCFACE_TRACEBACK=1")


def fact_and_fix(error: Exception) -> tuple[str, str]:
    """Split one of our messages at its first full stop: what happened, and what to do (or "")."""
    fact, _, fix = str(error).partition(". ")
    return fact, fix


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _module_version(name: str) -> str | None:
    """Version of a module that may lack package metadata (a bundled TensorRT has none)."""
    if _version(name):
        return _version(name)
    if util.find_spec(name) is None:
        return None
    try:
        return str(__import__(name).__version__)
    except Exception:  # its shared libraries are missing
        return None
