"""What a server says of a model: batch limit, width, contract id, outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, FACE_SHAPE, OUTPUTS
from arcface_clients.errors import ConfigError

UNLIMITED_BATCH = 64  # what is sent at once to a model that states no limit (max_batch_size 0, batch in its dims)
MAX_SIZE = 65_536  # of a batch and of an embedding; what is stated beyond is a slip or a lie, and would be allocated


@dataclass(frozen=True)
class ServedModel:
    """One model as served now. `leaf` is the model that an ensemble hands the faces to, else the model itself."""

    name: str
    leaf: str
    backend: str
    max_batch_size: int
    embedding_dim: int | None  # None: the server leaves the width open
    contract_id: str | None  # None: Triton was started without the overlay that `arcface import` writes
    precision: str | None
    gpu: int | None  # the leaf's first GPU as the server numbers them; None: it runs on the CPU
    outputs: tuple[str, ...] = (EMBEDDING_OUTPUT,)  # those of the tensor contract that it has
    demo: bool = False  # random weights: its embeddings recognise nobody
    golden: str | None = field(default=None, repr=False)  # rows of the reference: `arcface_clients.evidence.golden`
    max_queue_size: int = 0  # requests that may wait for the leaf; 0: without bound
    instances: int = 1  # of the leaf: batches that the server computes at a time


def next_step(config: Mapping[str, Any]) -> str | None:
    """Name of the model inside an ensemble that makes its `embedding`; None when `config` is no ensemble."""
    for step in config.get("ensemble_scheduling", {}).get("step", []):
        if EMBEDDING_OUTPUT in step.get("output_map", {}).values():
            return str(step["model_name"])
    return None


def served_model(name: str, configs: Sequence[Mapping[str, Any]]) -> ServedModel:
    """`configs`: the configuration of `name` and of each model down its ensembles, the leaf last (Triton's JSON).

    Raises:
        ConfigError: the model does not take `face` and give `embedding` as the tensor contract says.
    """
    top, leaf = configs[0], configs[-1]
    max_batch_size = int(top.get("max_batch_size", 0))
    face = _tensor(top, "input", FACE_INPUT)
    embedding = _tensor(top, "output", EMBEDDING_OUTPUT)
    want = list(FACE_SHAPE) if max_batch_size else [-1, *FACE_SHAPE]
    if not face or not embedding or face["data_type"] != "TYPE_UINT8" or _dims(face) not in (want, [-1] * len(want)):
        raise ConfigError(
            f"the model {name!r} does not follow the tensor contract: expected `face` TYPE_UINT8 {want} → "
            f"`embedding`, got {_written(top, 'input')} → {_written(top, 'output')}. "
            "Put an imported model there: arcface import SOURCE"
        )
    width = (_dims(_tensor(leaf, "output", EMBEDDING_OUTPUT) or embedding) or [-1])[-1]
    if not (0 <= max_batch_size <= MAX_SIZE and width <= MAX_SIZE):
        raise ConfigError(
            f"the model {name!r} states max_batch_size {max_batch_size} and embeddings of {width} numbers; expected "
            f"neither to be above {MAX_SIZE}. Look at its config.pbtxt"
        )
    parameters = leaf.get("parameters", {})
    return ServedModel(
        name=name,
        leaf=leaf.get("name", name),
        backend=leaf.get("platform") or leaf.get("backend") or "unknown",
        max_batch_size=max_batch_size or UNLIMITED_BATCH,
        embedding_dim=width if width > 0 else None,
        contract_id=parameters.get("contract_id", {}).get("string_value") or None,
        precision=parameters.get("precision", {}).get("string_value") or None,
        gpu=_gpu(leaf),
        outputs=tuple(name for name in OUTPUTS if _tensor(top, "output", name)),
        demo=parameters.get("demo", {}).get("string_value", "").lower() in ("true", "1", "yes"),
        golden=parameters.get("golden", {}).get("string_value") or None,
        instances=max(1, sum(map(_instances, leaf.get("instance_group", [])))),
        max_queue_size=int(leaf.get("dynamic_batching", {}).get("default_queue_policy", {}).get("max_queue_size", 0)),
    )


def _gpu(config: Mapping[str, Any]) -> int | None:
    """The first GPU of a model's instances. A running server has replaced KIND_AUTO by what it found."""
    for group in config.get("instance_group", []):
        if group.get("kind", "KIND_AUTO") in ("KIND_GPU", "KIND_AUTO"):
            return int((group.get("gpus") or [0])[0])
    return None


def _instances(group: Mapping[str, Any]) -> int:
    return int(group.get("count", 1)) * max(1, len(group.get("gpus", [])))


def _tensor(config: Mapping[str, Any], side: str, name: str) -> Mapping[str, Any] | None:
    return next((tensor for tensor in config.get(side, []) if tensor["name"] == name), None)


def _dims(tensor: Mapping[str, Any]) -> list[int]:
    return [int(d) for d in tensor.get("dims", [])]  # gRPC's JSON writes int64 as strings


def _written(config: Mapping[str, Any], side: str) -> str:
    tensors = [f"`{t['name']}` {t['data_type']} {_dims(t)}" for t in config.get(side, [])]
    return ", ".join(tensors) or "nothing"
