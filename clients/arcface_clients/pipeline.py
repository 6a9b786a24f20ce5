"""The entry point for pipelines: one call turns a configuration into an engine, replacing in-process InsightFace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_clients.engines.devices import canonical_device
from arcface_clients.engines.fallback import FallbackEmbedder
from arcface_clients.engines.model_folder import ModelFolder, find_model
from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.engines.registry import EngineRegistry
from arcface_clients.engines.validation import StartupValidation
from arcface_clients.errors import ArcFaceError, BackendUnavailable, ConfigError
from arcface_clients.extras import require

if TYPE_CHECKING:
    from arcface_clients.config.schema import EmbeddingConfig


ASK_S = 3.0  # how long a server is asked which model it serves


@dataclass(frozen=True)
class Link:
    """One engine of a chain, not yet created; `label` is its name in logs and in `last_engine`."""

    engine: str
    device: str
    precision: str
    label: str


def get_embedding_backend(
    backend_type: str | None = None,
    device: str = "auto",
    tensorrt_config: Mapping[str, Any] | str | Path | None = None,
    allow_cpu_fallback: bool = True,
    config: EmbeddingConfig | str | Path | None = None,
) -> FallbackEmbedder:
    """The engine that a pipeline embeds with: `.encode(faces)`, `.ensure_ready()`, `.close()`, `.last_engine`.

    Nothing is loaded or connected before the first `ensure_ready` or `encode`.

    Args:
        backend_type: triton, tensorrt, onnx, insightface (alias pytorch); None uses `backend` from the configuration.
        device: for in-process engines; auto uses `device` from the configuration.
        tensorrt_config: keys that override the file: of config/embedding.yaml, or of the former `tensorrt` section
            (precision, max_batch_size, workspace_gb, engine_path, …); or the path of a file with such keys.
        allow_cpu_fallback: if False, no engine that computes on this host's CPU takes over; the engine named by
            `backend_type` is used regardless. `fallback.allow_cpu` must allow it too.
        config: a configuration, or the path of its file; None searches for it, see `load_config`.

    Raises:
        ConfigError: an unknown engine, device or key, or an invalid value.
        DependencyMissing: pydantic or PyYAML is not installed.
    """
    require("pydantic", "yaml", purpose="get_embedding_backend")
    settings = _settings(backend_type, device, tensorrt_config, config)
    links = backend_chain(
        settings.backend,
        settings.device,
        settings.precision,
        settings.fallback.chain if settings.fallback.enabled else (),
        allow_cpu_fallback and settings.fallback.allow_cpu,
    )
    return FallbackEmbedder(
        [_named(link, settings) for link in links],
        retry_after_s=settings.fallback.retry_after_s,
        retry_after_max_s=settings.fallback.retry_after_max_s,
        validate=startup_validation(settings) if settings.validation.run_on_startup else None,
    )


def backend_chain(
    backend: str, device: str, precision: str, fallback: tuple[str, ...], allow_cpu: bool
) -> tuple[Link, ...]:
    """Engines to try, in order: the requested backend, then the fallbacks, with ONNX Runtime in fp32.

    The fp32 file always exists and is closest to the reference. If fallbacks may not compute on the CPU, InsightFace
    is left out (it runs nowhere else) and ONNX Runtime must find a GPU.
    """
    anywhere = "auto" if allow_cpu else "gpu"
    links = [Link(backend, anywhere if (backend, device) == ("onnx", "auto") else device, precision, backend)]
    onnx_device = device if device == "cpu" or (backend != "onnx" and device != "auto") else anywhere
    for name in fallback:
        if not allow_cpu and (name == "insightface" or (name == "onnx" and onnx_device == "cpu")):
            continue
        link = Link(name, onnx_device, "fp32", name) if name == "onnx" else Link(name, "auto", precision, name)
        twins = [have for have in links if have.engine == name]
        if not twins:
            links.append(link)
        elif name == "onnx" and all((t.device, t.precision) != (link.device, link.precision) for t in twins):
            links.append(Link(name, link.device, link.precision, f"{name}-{link.precision}@{link.device}"))
    return tuple(links)


def engine_arguments(link: Link, settings: EmbeddingConfig) -> dict[str, Any]:
    """Constructor arguments for an engine, from the configuration; {} for engines that are not ours."""
    local = settings.local
    if link.engine == "triton":
        return dict(vars(settings.triton))
    if link.engine == "onnx":
        return {
            "file": local.serving_onnx,
            **_model_of(settings),
            "precision": link.precision,
            "device": link.device,
            "threads": local.threads,
            "max_batch": settings.batch.max,
            "max_drift": settings.comparison.max_drift.model_dump(),
        }
    if link.engine == "tensorrt":
        return {
            "plan": local.plan,
            "device": link.device,
            "precision": link.precision,
            "model": local.model,
            "model_repository": local.model_repository,
            "cache": settings.storage.plan_folder,
            "public_key": settings.storage.public_key,
            "max_batch": settings.batch.max,
        }
    if link.engine == "insightface":
        return {
            **_model_of(settings),
            "threads": local.threads,
            "max_batch": settings.batch.max,
        }
    return {}


def local_model(settings: EmbeddingConfig) -> ModelFolder:
    """The imported model that the in-process engines run: every door finds it here.

    Raises:
        ModelMissing, ConfigError: see `find_model`.
    """
    return find_model(**_model_of(settings))


def _model_of(settings: EmbeddingConfig) -> dict[str, Any]:
    """What the engines, and `find_model` behind them, need to find the imported model."""
    local = settings.local
    return {
        "models_dir": local.models_dir,
        "model": local.model,
        "served": lambda: _served_contract(settings),
        "model_repository": local.model_repository,
    }


def _served_contract(settings: EmbeddingConfig) -> str | None:
    """The contract id, or its beginning, that the configured server must have, else has, if it answers now."""
    from arcface_clients.triton.embedder import TritonEmbedder, named_contract

    triton = settings.triton
    if triton.expected_contract or "triton" not in (settings.backend, *settings.fallback.chain):
        return triton.expected_contract
    asked = replace(triton, timeout_s=min(triton.timeout_s, ASK_S), total_timeout_s=ASK_S, retry_for_s=0)
    try:
        with TritonEmbedder(**vars(asked)) as embedder:
            return named_contract(embedder)
    except ArcFaceError:  # whoever uses that server reports it
        return None


def startup_validation(settings: EmbeddingConfig) -> StartupValidation:
    """The configured validation, against a stored reference or InsightFace on the local model."""
    reference = Link("insightface", "auto", "fp32", "insightface")
    return StartupValidation(
        settings.comparison.max_drift.model_dump(),
        count=settings.validation.eval_set_size,
        precision=settings.precision,
        stored=settings.validation.reference,
        make_reference=lambda: _make(reference, settings),
    )


def _named(link: Link, settings: EmbeddingConfig) -> tuple[str, Callable[[], EmbeddingEngine]]:
    """Name and factory; the engine is created now if possible, so that contradictions surface here and not later."""
    try:
        engine = _make(link, settings)
    except BackendUnavailable:
        return link.label, lambda: _make(link, settings)
    return link.label, lambda: engine


def _make(link: Link, settings: EmbeddingConfig) -> EmbeddingEngine:
    return EngineRegistry.get(link.engine, **engine_arguments(link, settings))


def _settings(
    backend_type: str | None,
    device: str,
    tensorrt_config: Mapping[str, Any] | str | Path | None,
    config: EmbeddingConfig | str | Path | None,
) -> EmbeddingConfig:
    from arcface_clients.config.schema import EmbeddingConfig
    from arcface_clients.config.sources import Layers, checked, flatten, load_config, tensorrt_section

    for name, value, kinds in (
        ("tensorrt_config", tensorrt_config, (Mapping, str, Path)),
        ("config", config, (EmbeddingConfig, str, Path)),
    ):
        if value is not None and not isinstance(value, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigError(
                f"{name}: expected {expected}, got {type(value).__name__}. "
                "Keys and values go into tensorrt_config, the path of a file into config."
            )
    asked = tensorrt_section(tensorrt_config or {})
    if backend_type is not None:
        asked["backend"] = EngineRegistry.canonical(backend_type)
    if canonical_device(device) != "auto":
        asked["device"] = canonical_device(device)
    if isinstance(config, EmbeddingConfig):
        if not asked:
            return config
        layers = Layers()
        layers.add(dict(flatten(config.model_dump())), "config")
        layers.add(asked, "arguments")
        return checked(EmbeddingConfig, layers)
    return load_config(config, asked)
