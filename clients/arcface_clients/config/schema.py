"""Every configuration key, with its type, limits and default.

Precedence, lowest first: defaults, the file, environment variables (ARCFACE_ + the dotted key in capitals, "." as
"__"), overrides passed by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from arcface_clients.engines.registry import EngineRegistry
from arcface_clients.errors import WrongUse
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.plans.spec import DEFAULT_WORKSPACE_BYTES, parse_bytes
from arcface_clients.triton.memory.choice import shared_memory_option
from arcface_clients.triton.options import ClientOptions

Precision = Literal["fp32", "fp16", "bf16", "int8"]


def _workspace(text: object) -> int:
    try:
        return parse_bytes(str(text))
    except WrongUse:
        raise ValueError("expected a size such as 2GB or 512MB") from None  # the key and what it is are told already


class _Section(BaseModel):
    """A group of keys: unknown ones are rejected, and values are immutable once checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


class LocalModel(_Section):
    """What the in-process engines (onnx, tensorrt, insightface) read."""

    models_dir: Path = Path("models")
    model: str | None = None
    serving_onnx: Path | None = None
    plan: Path | None = None
    model_repository: Path = Path("model_repository")
    threads: int = Field(default=0, ge=0)


class Batch(_Section):
    """Batch sizes: the profile of a plan, and `max` is where in-process engines split."""

    min: int = Field(default=1, ge=1)
    opt: int = Field(default=32, ge=1)
    max: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Batch:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"expected min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        return self


class Storage(_Section):
    """Where plans are kept: a local folder, optionally backed by S3/MinIO; credentials are the usual AWS variables."""

    type: Literal["local", "s3"] = "local"
    bucket: str | None = None
    prefix: str = "plans"
    cache: Path = Path("~/.cache/arcface-triton")
    plans: Path | None = None
    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    retries: int = Field(default=4, ge=0)
    timeout_s: float = Field(default=30.0, gt=0)
    public_key: Path | None = None

    @property
    def plan_folder(self) -> Path:
        """Where this host keeps the plans that it builds, moves or loads."""
        return (self.plans or self.cache / "plans").expanduser()

    @model_validator(mode="after")
    def _bucket_for_s3(self) -> Storage:
        if self.type == "s3" and not self.bucket:
            raise ValueError("type is s3: expected a bucket name in storage.bucket, got none")
        return self


class Fallback(_Section):
    """What happens when the backend is unavailable."""

    enabled: bool = True
    chain: tuple[str, ...] = ("onnx", "insightface")
    build_locally: bool = True
    allow_cpu: bool = True
    retry_after_s: float = Field(default=5.0, gt=0)
    retry_after_max_s: float = Field(default=300.0, gt=0)

    @field_validator("chain", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        names = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        return [EngineRegistry.canonical(name) for name in names] if isinstance(names, (list, tuple)) else names


class Validation(_Section):
    """The check of an engine against the reference when the engine is loaded."""

    run_on_startup: bool = True
    eval_set_size: int = Field(default=16, ge=1, le=10_000)
    reference: Path | None = None


class Target(_Section):
    """A metric that should reach `target`; worse than `warn` is a failure."""

    target: float = Field(gt=0)
    warn: float = Field(gt=0)


class MaxDrift(_Section):
    """Largest 1 − cosine a face may show, by precision (defaults: `evidence.drift.DRIFT_LIMITS`)."""

    fp32: float = Field(default=DRIFT_LIMITS["fp32"], gt=0, le=2)
    fp16: float = Field(default=DRIFT_LIMITS["fp16"], gt=0, le=2)
    bf16: float = Field(default=DRIFT_LIMITS["bf16"], gt=0, le=2)
    int8: float = Field(default=DRIFT_LIMITS["int8"], gt=0, le=2)


class Comparison(_Section):
    """Limits of a comparison of two engines."""

    mean_cosine: Target = Target(target=0.995, warn=0.990)
    min_cosine: Target = Target(target=0.990, warn=0.980)
    l2_mean: Target = Target(target=0.05, warn=0.10)
    max_drift: MaxDrift = MaxDrift()
    margin: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _directions(self) -> Comparison:
        for name, good in (("mean_cosine", "high"), ("min_cosine", "high"), ("l2_mean", "low")):
            figure: Target = getattr(self, name)
            if (figure.target < figure.warn) if good == "high" else (figure.target > figure.warn):
                side = "below" if good == "high" else "above"
                raise ValueError(f"expected {name}.warn {side} its target {figure.target:g}, got {figure.warn:g}")
        return self


def _shared_memory_text(section: object) -> object:
    """`shared_memory` as the environment spells it, before its type is checked."""
    if isinstance(section, Mapping) and "shared_memory" in section:
        return {**section, "shared_memory": shared_memory_option(section["shared_memory"])}
    return section


class EmbeddingConfig(_Section):
    """Everything a pipeline can set; the shipped config/embedding.yaml names every key with its default."""

    backend: str = "triton"
    device: str = "auto"
    precision: Precision = "fp32"
    goal: Literal["throughput", "latency"] = "throughput"
    batch: Batch = Batch()
    workspace: Annotated[int, BeforeValidator(_workspace), Field(ge=2**20)] = DEFAULT_WORKSPACE_BYTES
    versions_kept: int = Field(default=3, ge=1)
    local: LocalModel = LocalModel()
    triton: Annotated[ClientOptions, BeforeValidator(_shared_memory_text)] = ClientOptions()
    storage: Storage = Storage()
    fallback: Fallback = Fallback()
    validation: Validation = Validation()
    comparison: Comparison = Comparison()

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, value: str) -> str:
        return EngineRegistry.canonical(value)

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        from arcface_clients.engines.devices import canonical_device

        return canonical_device(value)
