"""What a plan takes of a GPU's memory, and so how many instances and which largest batch fit on a card.

A plan of dynamic shapes is not shared between Triton's instances: each has the weights, a context for every profile,
and buffers. The figures are those that the build took on the GPU, and stand in the plan's manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arcface_clients.contract import FACE_BYTES
from arcface_clients.errors import Missing
from arcface_clients.plans.manifest import PlanManifest

DEFAULT_RESERVE_BYTES = 1 << 30  # CUDA's own context, kernels, and what else runs on the card
USEFUL_INSTANCES = 2  # one computes while the other's faces and embeddings are on their way
BUFFER_SETS = 2  # Triton fills one while the other is read
_OUTPUT_VALUES_BESIDE_EMBEDDING = 5  # norm, and the four of the contract


@dataclass(frozen=True)
class PlanMemory:
    """What one instance takes.

    loaded_bytes: the deserialised plan, mostly weights. context_bytes: scratch memory of its contexts, for every
    profile at its largest batch. max_batch: of the plan. dim: of the embedding.
    """

    loaded_bytes: int
    context_bytes: int
    max_batch: int
    dim: int

    @classmethod
    def of(cls, manifest: PlanManifest) -> PlanMemory:
        """The figures in a manifest.

        Raises:
            Missing: it is of an older version, or another builder, and has none.
        """
        told: Any = manifest.build.get("memory")
        try:
            loaded, contexts = int(told["loaded_bytes"]), [int(size) for size in told["context_bytes"]]
        except (TypeError, KeyError, ValueError) as exc:
            raise Missing(
                f"the manifest of {manifest.spec.file_name} does not say what the plan takes on a GPU: expected "
                "build.memory. Build it again: arcface plan build --force"
            ) from exc
        # Lazily loaded weights would not be seen by the measurement, but they are in the file.
        loaded = max(loaded, manifest.size_bytes)
        return cls(loaded, sum(contexts), manifest.spec.max_batch, manifest.dim or 512)

    def instance_bytes(self, max_batch: int) -> int:
        """An instance of this plan, or of one built for a smaller batch: scratch memory grows with the batch."""
        scratch = -(-self.context_bytes * max_batch // self.max_batch)
        row = FACE_BYTES + 4 * (self.dim + _OUTPUT_VALUES_BESIDE_EMBEDDING)
        return self.loaded_bytes + scratch + BUFFER_SETS * max_batch * row


@dataclass(frozen=True)
class Advice:
    """What fits: instances of a plan with this largest batch, each of instance_bytes, in room_bytes.

    rebuilt: the plan's own largest batch does not fit, so it has to be built for this smaller one.
    """

    instances: int
    max_batch: int
    instance_bytes: int
    room_bytes: int
    rebuilt: bool


def advise(
    memory: PlanMemory, free_bytes: int, instances: int | None = None, reserve_bytes: int = DEFAULT_RESERVE_BYTES
) -> Advice:
    """Instances and largest batch for a card with so much free memory; never more than fits.

    Args:
        memory: of the plan.
        free_bytes: of the card.
        instances: wanted; None: two if they fit, else one.
        reserve_bytes: kept free.

    Raises:
        Missing: that many do not fit, at any batch.
    """
    room = free_bytes - reserve_bytes
    for max_batch in _batches(memory.max_batch):
        each = memory.instance_bytes(max_batch)
        fitting = max(room, 0) // each
        if fitting >= (instances or 1):
            count = instances or min(fitting, USEFUL_INSTANCES)
            return Advice(count, max_batch, each, room, rebuilt=max_batch != memory.max_batch)
    needed = (instances or 1) * memory.instance_bytes(1) + reserve_bytes
    raise Missing(
        f"{instances or 1} instance{'s' * ((instances or 1) > 1)} need {_gb(needed)} even for one face at a time "
        f"({_gb(reserve_bytes)} of it kept free): expected at most {_gb(free_bytes)}. Take a larger card, fewer "
        "instances, or a smaller precision: arcface plan build --precision fp16"
    )


def _batches(largest: int) -> list[int]:
    """The plan's largest batch, then the powers of two below it."""
    return [largest, *(1 << n for n in reversed(range(largest.bit_length())) if 1 << n < largest)]


def _gb(size: int) -> str:
    return f"{size / 2**30:.1f} GB"
