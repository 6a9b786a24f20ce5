"""Creates engines by name; an engine's module is imported only when its name is requested."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.errors import ConfigError

Engine = TypeVar("Engine", bound=Callable[..., EmbeddingEngine])

_HOMES = {  # name -> module that registers it when imported
    "triton": "arcface_clients.engines.triton",
    "tensorrt": "arcface_clients.engines.tensorrt",
    "onnx": "arcface_clients.engines.onnx",
    "insightface": "arcface_clients.engines.insightface",
}
_ALIASES = {"pytorch": "insightface"}  # pipelines' former name for the reference; no PyTorch is involved
# Former names of constructor arguments.
_OLD_ARGUMENTS = {"tensorrt": {"engine_path": "plan"}, "onnx": {"onnx_path": "file"}}


class EngineRegistry:
    """All engines by name: `triton`, `tensorrt`, `onnx`, `insightface` (alias `pytorch`) and those you register."""

    _registered: dict[str, Callable[..., EmbeddingEngine]] = {}  # noqa: RUF012  one table for the process

    @classmethod
    def register(cls, name: str) -> Callable[[Engine], Engine]:
        """Decorator: make a class (or a function that returns an engine) available under `name`.

        Raises:
            ConfigError: the name is taken by something else.
        """

        def add(factory: Engine) -> Engine:
            taken = cls._registered.get(name)
            home = _HOMES.get(name, factory.__module__)
            if name in _ALIASES or home != factory.__module__ or (taken and taken.__module__ != factory.__module__):
                raise ConfigError(f"engine name {name!r} is taken; choose another. Known: {', '.join(cls.names())}.")
            cls._registered[name] = factory
            return factory

        return add

    @classmethod
    def names(cls) -> list[str]:
        """All names, built-in ones first; aliases are not listed."""
        return [*_HOMES, *(name for name in cls._registered if name not in _HOMES)]

    @classmethod
    def canonical(cls, name: str) -> str:
        """The name itself, or the name behind an alias.

        Raises:
            ConfigError: no engine has this name; the message lists those that exist.
        """
        key = str(name).lower()
        key = _ALIASES.get(key, key)
        if key in _HOMES or key in cls._registered:
            return key
        close = difflib.get_close_matches(key, [*cls.names(), *_ALIASES], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"unknown engine {name!r}: expected one of {', '.join(cls.names())} (pytorch is insightface).{hint}"
        )

    @classmethod
    def get(cls, name: str, **kwargs: Any) -> EmbeddingEngine:
        """A new engine; `kwargs` go to its constructor, which loads nothing: `ensure_ready` or `encode` does.

        The former names `engine_path` (tensorrt: `plan`) and `onnx_path` (onnx: `file`) are understood.

        Raises:
            ConfigError: no engine has this name, or an argument is given under both of its names.
            DependencyMissing: a package needed just to construct the engine is missing (falls back).
        """
        key = cls.canonical(name)
        if key not in cls._registered:
            import_module(_HOMES[key])
        for old, now in _OLD_ARGUMENTS.get(key, {}).items():
            if old in kwargs and now in kwargs:
                raise ConfigError(f"{key}: {old} is the old name of {now}, and both are given: keep {now}.")
            if old in kwargs:
                kwargs[now] = kwargs.pop(old)
        return cls._registered[key](**kwargs)
