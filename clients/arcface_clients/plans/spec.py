"""The specification of a plan, and the key and file name that follow from it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from arcface_clients.errors import WrongUse

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DEFAULT_WORKSPACE_BYTES = 1 << 30  # with weights and activations of an r100 the build stays under 2 GB of VRAM
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{big}{end}": 1 << by for big, by in (("k", 10), ("m", 20), ("g", 30)) for end in ("", "b", "ib")}


@dataclass(frozen=True)
class BuilderOptions:
    """Options that change the plan's bytes or speed, and so are part of its key.

    workspace_bytes: limit of TensorRT's scratch memory pool.
    external_tactics: False excludes cuBLAS and cuDNN kernels (needed if only stubs of them are installed).
    hardware_compatible: the plan also loads on other GPUs, Ampere and newer, at some cost in speed.
    same_compute_capability: the plan is tuned for every card of its SM, not only for the one it was built on
        (TensorRT 10.9 or newer).
    tf32: allow TF32 in fp32 layers; off by default, because fp32 drift is gated at 1e-5.
    optimization_level: TensorRT's builder_optimization_level 0..5; None keeps TensorRT's default.
    """

    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    external_tactics: bool = True
    hardware_compatible: bool = False
    tf32: bool = False
    optimization_level: int | None = None
    same_compute_capability: bool = False

    def __post_init__(self) -> None:
        """Reject values that no builder accepts."""
        _check_types(self, (int, bool, bool, bool, int | None, bool))
        if self.workspace_bytes < 1 << 20:
            raise WrongUse(
                f"workspace is {self.workspace_bytes} bytes: expected at least 1 MB. "
                "Give it with a unit: --workspace 2GB"
            )
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise WrongUse(f"optimization level is {self.optimization_level}: expected 0..5.")
        if self.hardware_compatible and self.same_compute_capability:
            raise WrongUse("a plan is hardware-compatible or for all cards of one SM, not both: leave one out.")


@dataclass(frozen=True)
class PlanSpec:
    """One plan as requested. `model` names the file; everything else determines the key.

    onnx_sha256: digest of the *typed* ONNX. sm: "8.6". tensorrt: the full version string, because a plan of another
    version does not load. min/opt/max_batch: the first optimization profile, in faces. gpu: name of the card that it
    is tuned for, None if not tied to one card; another card of the same SM loads it, but may run it slowly.
    tuned_batches: further batch sizes with a profile, and so kernels, of their own: a plan set.
    """

    model: str
    onnx_sha256: str
    precision: str
    sm: str
    tensorrt: str
    min_batch: int = 1
    opt_batch: int = 32
    max_batch: int = 64
    options: BuilderOptions = field(default_factory=BuilderOptions)
    gpu: str | None = None
    tuned_batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Normalise the SM; reject what cannot be built."""
        _check_types(self, (str, str, str, object, str, int, int, int, BuilderOptions, str | None, tuple))
        object.__setattr__(self, "sm", parse_sm(self.sm))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.model):
            raise WrongUse(f"model name is {self.model!r}: expected letters, digits, '.', '_' and '-' only.")
        if not re.fullmatch(r"[0-9a-f]{64}", self.onnx_sha256):
            raise WrongUse(f"onnx_sha256 is {self.onnx_sha256!r}: expected 64 hexadecimal digits.")
        if self.precision not in PRECISIONS:
            raise WrongUse(f"precision is {self.precision!r}: expected one of {', '.join(PRECISIONS)}.")
        if self.options.same_compute_capability and parse_version(self.tensorrt) < (10, 9):
            raise WrongUse(
                f"TensorRT {self.tensorrt} tunes a plan for one card only: expected 10.9 or newer for a whole SM."
            )
        parse_version(self.tensorrt)
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise WrongUse(
                f"batch profile is min {self.min_batch}, opt {self.opt_batch}, max {self.max_batch}: "
                "expected 1 ≤ min ≤ opt ≤ max."
            )
        tuned = self.tuned_batches
        if any(type(b) is not int or not self.min_batch <= b <= self.max_batch for b in tuned) or (
            sorted(set(tuned) - {self.opt_batch}, reverse=True) != list(tuned)
        ):
            raise WrongUse(
                f"batch sizes with kernels of their own are {tuned!r}: expected different ones from {self.min_batch} "
                f"to {self.max_batch}, the largest first, without {self.opt_batch}, which has them already."
            )

    @property
    def profiles(self) -> list[tuple[int, int, int]]:
        """Smallest, tuned-for and largest batch of each optimization profile; the first one takes every batch.

        A profile of a tuned batch takes the smaller ones too: Triton and we choose the profile that fits and whose
        tuned-for batch is nearest. The narrower a profile, the less memory its context takes.
        """
        tuned = [(self.min_batch, batch, batch) for batch in self.tuned_batches]
        return [(self.min_batch, self.opt_batch, self.max_batch), *tuned]

    @property
    def file_name(self) -> str:
        """`{model}-{precision}-sm{SM}.plan`, for example mobilefacenet-fp16-sm86.plan."""
        return f"{self.model}-{self.precision}-{sm_tag(self.sm)}.plan"

    @property
    def key(self) -> str:
        """Sha256 (hex) of the canonical JSON of every field but the model's name."""
        parts = self.to_json()
        del parts["model"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A JSON object: model, onnx_sha256, precision, sm, tensorrt, min/opt/max_batch, options, gpu, tuned_batches.

        Fields added later are written only if set, so that older keys and signatures stay valid.
        """
        data = asdict(self)
        if self.gpu is None:
            del data["gpu"]
        del data["tuned_batches"]
        if self.tuned_batches:
            data["tuned_batches"] = list(self.tuned_batches)
        if not self.options.same_compute_capability:
            del data["options"]["same_compute_capability"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanSpec:
        """The inverse of `to_json`.

        Raises:
            WrongUse: a field is missing, unknown or invalid.
        """
        try:
            tuned = data.get("tuned_batches", ())
            tuned = tuple(tuned) if isinstance(tuned, list) else tuned
            return cls(**{**data, "options": BuilderOptions(**data["options"]), "tuned_batches": tuned})
        except (TypeError, KeyError) as exc:
            raise WrongUse(f"not a plan spec: {exc}.") from exc


def _check_types(value: Any, kinds: tuple[Any, ...]) -> None:
    """Reject fields of the wrong type: specs come from JSON that anyone may have written.

    Raises:
        WrongUse: the first such field; True does not count as a number.
    """
    for one, kind in zip(fields(value), kinds, strict=True):
        got = getattr(value, one.name)
        if not isinstance(got, kind) or (isinstance(got, bool) and kind is not bool):
            raise WrongUse(f"{one.name} is {got!r}: expected {getattr(kind, '__name__', kind)}.")


def parse_sm(text: str | float) -> str:
    """Normalise an SM to "8.6", from "8.6", "86", "sm86", "sm_86", "SM 8.6", "12.0" or "120".

    Raises:
        WrongUse: not a compute capability.
    """
    match = re.fullmatch(r"(?:sm[_ ]?)?(\d{1,2})\.(\d)|(?:sm[_ ]?)?(\d{1,2})(\d)", str(text).strip().lower())
    major, minor = [part for part in match.groups() if part is not None] if match else ("", "")
    if not major or not 5 <= int(major) <= 20:
        raise WrongUse(f"SM is {str(text)!r}: expected a compute capability such as 8.6, 86 or sm86.")
    return f"{int(major)}.{minor}"


def sm_tag(sm: str) -> str:
    """The SM as written in file names: "8.6" → "sm86"."""
    return "sm" + parse_sm(sm).replace(".", "")


def parse_version(text: str) -> tuple[int, ...]:
    """A TensorRT version as numbers: "8.6.0" → (8, 6, 0); a suffix such as .post1 is ignored.

    Raises:
        WrongUse: not a version, or older than 8.6.
    """
    match = re.match(r"\d+(\.\d+)+", text or "")
    version = tuple(int(part) for part in match.group().split(".")) if match else ()
    if version < (8, 6):
        raise WrongUse(f"TensorRT version is {text!r}: expected 8.6 or newer, such as 10.3.0.")
    return version


def parse_bytes(text: str | int) -> int:
    """Bytes from "2GB", "2048MB", "1.5 GiB" or a plain number of bytes; one GB is 2**30, as in TensorRT's options.

    Raises:
        WrongUse: not a number, an unknown unit, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if not match or match.group(2) not in _UNITS or float(match.group(1)) <= 0:
        raise WrongUse(f"size is {str(text)!r}: expected a number with a unit, such as 2GB or 2048MB.")
    return int(float(match.group(1)) * _UNITS[match.group(2)])
