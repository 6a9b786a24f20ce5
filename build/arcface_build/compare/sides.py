"""Opens what can be compared: an engine, a server, an ONNX file, a plan or saved embeddings."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arcface_clients.engines.model_folder import folder_of, sidecar_of
from arcface_clients.engines.registry import EngineRegistry
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.pipeline import Link, engine_arguments
from arcface_clients.plans.read import read_manifest

if TYPE_CHECKING:
    from arcface_clients.config.schema import EmbeddingConfig

SAVED = (".npz", ".npy")
PLANS = (".plan", ".engine")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: either `encode` embeds faces, or `saved` holds embeddings (with `names`)."""

    label: str
    precision: str = "fp32"
    contract_id: str | None = None
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    saved: np.ndarray | None = None
    names: tuple[str, ...] | None = None


@contextmanager
def open_side(text: str, config: EmbeddingConfig) -> Iterator[Side]:
    """Open saved embeddings (.npz, .npy), an ONNX file, a plan, HOST:PORT[/MODEL], or ENGINE[@PRECISION].

    Args:
        text: the user's argument.
        config: settings of in-process engines and of the configured server.

    Raises:
        Missing: a file does not exist.
        WrongUse: it is none of these.
    """
    path = Path(text)
    suffix = path.suffix.lower()
    label = "/".join(path.parts[-2:]) if path.is_absolute() else text  # reports are passed on
    if suffix in (*SAVED, ".onnx", *PLANS):
        if not path.is_file():
            raise Missing(f"{path} does not exist: expected embeddings, an ONNX file or a plan.")
        if suffix in SAVED:
            yield replace(_saved(path), label=label)
        elif suffix == ".onnx" and not _is_serving(path):
            with EngineRegistry.get("insightface", file=path) as engine:
                yield Side(f"InsightFace on {label}", "fp32", engine.contract_id, engine.encode)
        else:
            from arcface_build.compare.runs import active, embed_with, plan_runner, session_runner

            run = session_runner(path) if suffix == ".onnx" else plan_runner(path, config.storage.public_key)
            with active(run) as runner:
                facts = _facts_beside(path)
                yield Side(
                    label,
                    facts.get("precision", "fp32"),
                    facts.get("contract_id") or None,
                    lambda faces: embed_with(runner, faces),
                )
    elif ":" in text:
        from arcface_clients import TritonEmbedder

        url, served_name = _address(text)
        model, access = served_name or config.triton.model, config.triton.access_to(url)
        with TritonEmbedder(url, model, timeout_s=config.triton.timeout_s, **access) as embedder:
            served = embedder.ensure_ready()
            yield Side(f"{served.name} at {url}", served.precision or "fp32", served.contract_id, embedder.encode)
    else:
        if path.exists():
            raise WrongUse(f"{text} is neither {', '.join(SAVED)}, .onnx nor {', '.join(PLANS)}: cannot compare it.")
        name, _, precision = text.partition("@")
        link = Link(EngineRegistry.canonical(name), config.device, precision or config.precision, name)
        with EngineRegistry.get(link.engine, **engine_arguments(link, config)) as engine:
            engine.ensure_ready()
            yield Side(text, getattr(engine, "precision", "fp32"), engine.contract_id, engine.encode)


def beside_server(config: EmbeddingConfig, *texts: str) -> EmbeddingConfig:
    """The configuration for engines compared with a server: of several imported models they run the one it serves."""
    served = [text for text in texts if ":" in text and Path(text).suffix.lower() not in (*SAVED, ".onnx", *PLANS)]
    if not served:
        return config
    url, model = _address(served[0])
    return config.model_copy(update={"triton": config.triton.towards(url, model), "backend": "triton"})


def _address(text: str) -> tuple[str, str]:
    """URL and served model ("" where none is named) of HOST:PORT[/MODEL]."""
    scheme, _, rest = text.rpartition("://")
    address, _, served_name = rest.partition("/")
    return (f"{scheme}://{address}" if scheme else address), served_name


def _saved(path: Path) -> Side:
    """Embeddings float (N,D) from a .npy, or from a .npz as written by `arcface embed`."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return Side(str(path), saved=_two_dimensional(loaded, path))
            if "embeddings" not in loaded.files:
                found = ", ".join(loaded.files) or "nothing"
                raise WrongUse(f"{path} contains {found}: expected an array `embeddings`.")
            names = tuple(str(name) for name in loaded["paths"]) if "paths" in loaded.files else None
            contract = str(loaded["contract_id"]) or None if "contract_id" in loaded.files else None
            precision = str(loaded["precision"]) if "precision" in loaded.files else "fp32"
            return Side(str(path), precision, contract, saved=_two_dimensional(loaded["embeddings"], path), names=names)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as exc:
        if isinstance(exc, WrongUse):
            raise
        raise WrongUse(
            f"{path} is not a NumPy file, or truncated ({exc}). Next: arcface embed FOLDER -o FILE.npz"
        ) from exc


def _two_dimensional(array: np.ndarray, path: Path) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind != "f":
        raise WrongUse(f"{path} contains {array.dtype} {array.shape}: expected float embeddings (N, D).")
    return array


def _is_serving(path: Path) -> bool:
    """Whether an ONNX takes `face` as uint8, like those made by `arcface import`."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as exc:  # protobuf raises its own exceptions
        raise WrongUse(f"{path} is not an ONNX file: {exc}") from exc
    inputs = {tensor.name: tensor.type.tensor_type.elem_type for tensor in model.graph.input}
    return inputs.get("face") == onnx.TensorProto.UINT8


def _facts_beside(path: Path) -> dict[str, str]:
    """Precision and contract id of a variant, a plan or an import, if a file beside it states them."""
    told: dict[str, str | None]
    if path.suffix.lower() in PLANS:
        plan = read_manifest(path)
        told = {"precision": plan.spec.precision, "contract_id": plan.contract_id}
    else:
        manifest, sidecar = folder_of(path).manifest, sidecar_of(path) or {}
        told = {"precision": sidecar.get("precision"), "contract_id": sidecar.get("contract_id")}
        if manifest:
            told = {key: value or getattr(manifest, key) for key, value in told.items()}
    return {key: value for key, value in told.items() if isinstance(value, str)}
