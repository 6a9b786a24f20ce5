"""Reads the configuration from file, environment and caller; a single message names every fault and where it is."""

from __future__ import annotations

import difflib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError

from arcface_clients.config.old_names import OLD_FILE, from_section, renamed, renamed_variables, with_section
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import ConfigError, WrongUse
from arcface_clients.planted import refuse_planted

Model = TypeVar("Model", bound=BaseModel)
DEFAULT_FILE = Path("config/embedding.yaml")
ENV_PREFIX = "ARCFACE_"
FILE_VARIABLE = "ARCFACE_CONFIG"
_log = logging.getLogger(__name__)


@dataclass
class Layers:
    """Merged values as a flat table of dotted keys, and where each came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def add(self, flat: Mapping[str, Any], origin: str | Mapping[str, str]) -> None:
        """Add a layer on top; it overrides the same key, and any key that is its parent or child."""
        for key, value in flat.items():
            for old in [k for k in self.values if k.startswith(f"{key}.") or key.startswith(f"{k}.")]:
                del self.values[old]
            self.values[key] = value
            self.origin[key] = origin if isinstance(origin, str) else origin[key]


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> EmbeddingConfig:
    """The configuration of this process.

    Args:
        path: the file; None uses $ARCFACE_CONFIG, else config/embedding.yaml if that exists, else the defaults.
        overrides: nested keys (old names too) that override file and environment.
        environ: the environment; None takes `os.environ`.

    Raises:
        ConfigError: the file is missing or not YAML, or keys are unknown or values invalid; one message lists them all.
    """
    return checked(EmbeddingConfig, layers(path, overrides or {}, os.environ if environ is None else environ))


def layers(path: str | Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]) -> Layers:
    """File, environment and overrides merged, with old names already replaced."""
    found = Layers()
    environ = {name: text for name, text in environ.items() if text.strip()}  # an empty variable counts as unset
    file = config_file(path, environ)
    if file is not None:
        _add_file(found, file)
    environ = renamed_variables(environ)
    names = {variable(key): key for key in leaf_keys(EmbeddingConfig)}
    from_env = {names[name]: _parsed(name, text) for name, text in environ.items() if name in names}
    found.add(from_env, {key: f"environment variable {variable(key)}" for key in from_env})
    _refuse_unknown_variables(environ, names)
    found.add(renamed(dict(flatten(overrides)), "arguments"), "arguments")
    return found


def _add_file(found: Layers, file: Path) -> None:
    """Add a file, on top of the second file that one of former days names."""
    flat = dict(flatten(read_yaml(file)))
    second = flat.pop(OLD_FILE, None)
    if second:
        named = Path(str(second))
        named = named if named.is_absolute() or named.exists() else file.parent / named.name
        warnings.warn(
            f"{file}: {OLD_FILE} is an old name; write the keys of {named} into this file", FutureWarning, stacklevel=2
        )
        found.add(tensorrt_section(named), str(named))
    found.add(renamed(flat, str(file)), str(file))


def tensorrt_section(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Dotted keys of today from the former `tensorrt` section: a mapping, or the path of a file of its own.

    Current keys, and those of other former sections, are understood beside it.

    Raises:
        ConfigError: see `load_config`.
    """
    if isinstance(source, Mapping):
        return renamed(from_section(dict(flatten(source))), "arguments")
    return renamed(with_section(dict(flatten(read_yaml(Path(source))))), str(source))


def config_file(path: str | Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: the given one, else $ARCFACE_CONFIG, else the default one if it exists, else none.

    Raises:
        ConfigError: another user put the default one there.
    """
    named = path or environ.get(FILE_VARIABLE)
    if named:
        return Path(named)
    if not DEFAULT_FILE.exists():
        return None
    try:
        refuse_planted(Path.cwd() / DEFAULT_FILE, Path.cwd(), f"{FILE_VARIABLE}={DEFAULT_FILE}")
    except WrongUse as exc:
        raise ConfigError(f"{exc}.") from exc
    return DEFAULT_FILE


def checked(model: type[Model], found: Layers) -> Model:
    """An instance of `model`.

    Raises:
        ConfigError: one line for each fault: where, dotted key, what was found, what is allowed.
    """
    try:
        return model.model_validate(_nested(_without_empty_sections(model, found.values)))
    except ValidationError as exc:
        faults = [_fault(model, found, error) for error in exc.errors()]
        raise ConfigError("\n".join(faults)) from exc


class _OnceEachKey(yaml.SafeLoader):
    """YAML's safe loader, except that a duplicate key is an error: otherwise the last one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} appears twice: delete one of them", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file gives an empty mapping."""
    try:
        data = yaml.load(file.read_text(), Loader=_OnceEachKey)
    except OSError as exc:
        raise ConfigError(
            f"{file}: cannot be read ({exc.strerror}): expected a YAML file. Copy config/embedding.yaml to start one."
        ) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        where = getattr(exc, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise ConfigError(f"{file}: not YAML{line}: {getattr(exc, 'problem', exc)}.") from exc
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected keys and values, got {type(data).__name__}.")
    return data


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf as (dotted key, value); `headers` is a value, not a section."""
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and dotted != "triton.headers":
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def leaf_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration model, in order; sections are models or dataclasses."""
    for name, kind in get_type_hints(section).items():
        if isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, BaseModel)):
            yield from leaf_keys(kind, f"{prefix}{name}.")
        elif name in getattr(section, "model_fields", {}) or is_dataclass(section):
            yield f"{prefix}{name}"


def variable(key: str) -> str:
    """The environment variable of a dotted key: storage.bucket → ARCFACE_STORAGE__BUCKET."""
    return ENV_PREFIX + key.upper().replace(".", "__")


def _parsed(name: str, text: str) -> Any:
    """Parse a variable: null is None, [lists] and {mappings} are YAML, everything else stays text."""
    if text.strip().lower() in ("null", "none"):
        return None
    try:
        return yaml.safe_load(text) if text.strip()[0] in "[{" else text
    except yaml.YAMLError as exc:
        raise ConfigError(f"environment variable {name}: not YAML: {text!r}.") from exc


def _refuse_unknown_variables(environ: Mapping[str, str], names: Mapping[str, str]) -> None:
    """ARCFACE_X__Y can only be meant for us: reject unknown ones. ARCFACE_X may belong to others: warn if close."""
    for name in sorted(set(environ) - set(names)):
        if not name.startswith(ENV_PREFIX):
            continue
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.9)
        if "__" in name:
            hint = f"did you mean {close[0]}?" if close else "docs/configuration.md lists them all."
            raise ConfigError(f"environment variable {name}: no such key: {hint}")
        if close:
            _log.warning("environment variable %s is ignored; did you mean %s?", name, close[0])


def _without_empty_sections(model: type[BaseModel], flat: Mapping[str, Any]) -> dict[str, Any]:
    """A section whose keys are all commented out parses as None in YAML; it means the defaults."""
    sections = {k.rpartition(".")[0] for k in leaf_keys(model)}
    return {key: value for key, value in flat.items() if value is not None or key not in sections}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _fault(model: type[BaseModel], found: Layers, error: Any) -> str:
    """One pydantic error as one line in our format."""
    key = ".".join(str(part) for part in error["loc"])
    blamed = getattr(error.get("ctx", {}).get("error"), "key", None)
    key = f"{key}.{blamed}" if blamed else key
    where = next(
        (text for k, text in found.origin.items() if f"{k}.".startswith(f"{key}.") or f"{key}.".startswith(f"{k}.")),
        "configuration",
    )
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: {key}: no such key. {_neighbours(model, key)}"
    if error["type"] in ("model_type", "dataclass_type"):
        return f"{where}: {key}: got {error['input']!r}; expected keys under it. {_allowed(model, key)}"
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    if blamed and message.startswith(f"{blamed} is "):
        return f"{where}: {key}: got {message.removeprefix(f'{blamed} is ')}."
    if isinstance(error["input"], dict):  # a rule over several keys
        return f"{where}: {key}: {message}."
    end = "" if message.endswith("?") else "."
    return f"{where}: {key}: got {error['input']!r}; {message[0].lower()}{message[1:]}{end}"


def _neighbours(model: type[BaseModel], key: str) -> str:
    """Suggestions for an unknown key."""
    known = list(leaf_keys(model))
    close = difflib.get_close_matches(key, [*known, *dict.fromkeys(k.split(".")[0] for k in known)], n=1, cutoff=0.7)
    return (f"Did you mean {close[0]}? " if close else "") + _allowed(model, key.rpartition(".")[0])


def _allowed(model: type[BaseModel], section: str) -> str:
    start = f"{section}." if section else ""
    here = dict.fromkeys(k.removeprefix(start).split(".")[0] for k in leaf_keys(model) if k.startswith(start))
    return f"Allowed{f' in {section}' if section else ''}: {', '.join(here)}."
