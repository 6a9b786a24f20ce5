"""Translates former names of configuration keys and variables to the current ones, with one warning for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from arcface_clients.errors import ConfigError
from arcface_clients.evidence.drift import DRIFT_LIMITS

Translation = Callable[[Any], dict[str, Any]]


def _same(*keys: str) -> Translation:
    return lambda value: dict.fromkeys(keys, value)


def _size(unit: str) -> Translation:
    return lambda value: {"workspace": f"{value}{unit}"}


def _bucket(value: Any) -> dict[str, Any]:
    return {"storage.bucket": value, "storage.type": "s3"} if value else {"storage.bucket": None}


def _switch(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool):  # a quoted word such as "no" would count as true
        raise ConfigError(f"the old name enabled is {value!r}: expected true or false. Use backend: instead.")
    return {"backend": "tensorrt" if value else "insightface"}  # off meant the unaccelerated reference


# Old key -> what it sets now. These were valid both at the top level and in a section.
_ANYWHERE: dict[str, Translation] = {
    "workspace_gb": _size("GB"),
    "workspace_size_mb": _size("MB"),
    "batch_size": _same("batch.max"),  # beside max_batch_size: batch.opt
    "min_batch_size": _same("batch.min"),
    "opt_batch_size": _same("batch.opt"),
    "max_batch_size": _same("batch.max"),
}
# `tensorrt.` and `arcface_tensorrt.` are two names of one former section; a key in it that is not listed here is
# rejected like any unknown key.
_IN_SECTION: dict[str, Translation] = {
    "enabled": _switch,
    "precision": _same("precision"),
    "device": _same("device"),
    **_ANYWHERE,
    "engine_path": _same("local.plan"),
    "engine_local_dir": _same("storage.plans"),
    "model_name": _same("local.model"),
    "onnx_path": _same("local.serving_onnx"),
    "engine_s3_bucket": _bucket,
    "engine_s3_prefix": _same("storage.prefix"),
    "engine_cache_dir": _same("storage.cache"),
    "s3_endpoint_url": _same("storage.endpoint"),
    "s3_region": _same("storage.region"),
    "build_locally": _same("fallback.build_locally"),
    "fallback_to_pytorch": _same("fallback.enabled"),
    "allow_cpu_fallback": _same("fallback.allow_cpu"),
    "run_validation": _same("validation.run_on_startup"),
    "eval_set_size": _same("validation.eval_set_size"),
}
OLD_NAMES: dict[str, Translation] = {
    "backend_type": _same("backend"),
    **_ANYWHERE,
    **{f"{section}.{key}": to for section in ("tensorrt", "arcface_tensorrt") for key, to in _IN_SECTION.items()},
    "embedding.backend": _same("backend"),
    "storage.cache_dir": _same("storage.cache"),
    "fallback.fallback_to_pytorch": _same("fallback.enabled"),
    "validation.enabled": _same("validation.run_on_startup"),
    # one limit for every precision, and one that either passed or failed
    "validation.max_drift_cosine": _same(*(f"comparison.max_drift.{precision}" for precision in DRIFT_LIMITS)),
    "comparison.min_cosine_similarity": _same("comparison.min_cosine.target", "comparison.min_cosine.warn"),
}
OLD_FILE = "embedding.tensorrt_config"  # the path of a second file, whose keys are all old
OLD_VARIABLES = {
    "ARCFACE_URL": "ARCFACE_TRITON__URL",
    "ARCFACE_CACHE": "ARCFACE_STORAGE__CACHE",
    "ARCFACE_PLAN_CACHE": "ARCFACE_STORAGE__PLANS",
}


def renamed_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with old variables renamed; each one found raises a FutureWarning.

    Raises:
        ConfigError: an old and a new name have different values.
    """
    result = {name: text for name, text in environ.items() if name not in OLD_VARIABLES}
    for old in (name for name in environ if name in OLD_VARIABLES):
        now = OLD_VARIABLES[old]
        if result.setdefault(now, environ[old]) != environ[old]:
            raise ConfigError(
                f"environment: {now} is {result[now]!r} but the old name {old} is {environ[old]!r}: "
                f"keep {now} and unset {old}."
            )
        warnings.warn(f"environment variable {old} is an old name; use {now}", FutureWarning, stacklevel=2)
    return result


def renamed(flat: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`flat` (dotted key → value) with old names replaced; each one found raises a FutureWarning.

    Raises:
        ConfigError: an old and a new name, or two old ones, have different values.
    """
    result = {key: value for key, value in flat.items() if key not in OLD_NAMES}
    said_by = {key: key for key in result}
    for old, now in _translated(flat, OLD_NAMES):
        for key, value in now.items():
            if key in result and result[key] != value:
                raise ConfigError(
                    f"{origin}: {said_by[key]} is {result[key]!r} but the old name {old} is {value!r}: "
                    f"keep {key} and delete {old}."
                )
            result[key] = value
            said_by.setdefault(key, old)
        news = ", ".join(f"{key}: {value}" for key, value in now.items())
        warnings.warn(f"{origin}: {old} is an old name; use {news}", FutureWarning, stacklevel=2)
    return result


def from_section(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Translate keys of the former section, which `tensorrt_config` still accepts; others are returned unchanged."""
    result = {key: value for key, value in flat.items() if key not in _IN_SECTION}
    for _, now in _translated(flat, _IN_SECTION):
        result.update(now)
    return result


def with_section(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a file that is the former section alone, with the section's name before those that need it."""
    alone = _IN_SECTION.keys() - OLD_NAMES.keys() - {"precision", "device"}  # these two are keys of today as well
    return {f"tensorrt.{key}" if key in alone else key: value for key, value in flat.items()}


def _translated(flat: Mapping[str, Any], table: Mapping[str, Translation]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each old key with what it sets. Beside a largest batch, `batch_size` was the usual one."""
    for old in (key for key in flat if key in table):
        usual = f"{old.removesuffix('batch_size')}max_batch_size" in flat
        yield old, (_same("batch.opt") if usual else table[old])(flat[old])
