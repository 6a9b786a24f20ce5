"""What could be served on a CPU: each file of a model in each runtime that may run it, and why the rest may not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_build.variants.sidecar import read_sidecar
from arcface_clients.engines.import_manifest import ImportManifest, read_import_manifest
from arcface_clients.engines.model_folder import ModelFolder
from arcface_clients.engines.runtimes import RUNTIMES, able_runtimes
from arcface_clients.errors import ContractMismatch, GateFailed, WrongUse
from arcface_clients.evidence.gate import judge_sidecar
from arcface_clients.plans.manifest import file_sha256

if TYPE_CHECKING:
    import onnx

PRECISIONS = ("fp32", "bf16", "int8")  # the more exact one first
WINOGRAD = "Winograd"
PLAIN = ("fp32", "onnxruntime", "")  # precision, runtime and form of what is served where nothing was chosen


class Measurable:
    """What a measurement is kept under: a file by its digest, in a runtime."""

    precision: str
    runtime: str
    sha256: str
    form: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Tells it from all others."""
        return self.precision, self.runtime, self.sha256

    @property
    def name(self) -> str:
        """For people: precision, form and runtime; no two candidates of a model share one."""
        return " ".join(filter(None, (self.precision, self.form and f"by {self.form}", f"in {self.runtime}")))


@dataclass(frozen=True)
class Candidate(Measurable):
    """One file in one runtime.

    Attributes:
        precision: fp32, bf16 or int8.
        runtime: one of `arcface_clients.engines.runtimes.RUNTIMES`.
        file: the ONNX, relative to the model folder.
        sha256: of that file.
        sidecar: the variant's, with its gates; None for fp32.
        made: makes the model where it is not that file.
        form: "Winograd" where it computes convolutions by that method, which costs memory.
    """

    precision: str
    runtime: str
    file: str
    sha256: str
    sidecar: dict[str, Any] | None = None
    made: Callable[[], onnx.ModelProto] | None = None
    form: str = ""

    @property
    def drift(self) -> float | None:
        """1 − cosine of the worst face that judged it in this runtime; None for fp32."""
        gates = (self.sidecar or {}).get("gates", ())
        return next((float(gate["drift"]["max_drift"]) for gate in gates if gate["runtime"] == self.runtime), None)


def candidates(
    model_dir: Path,
    limits: Mapping[str, float] | None,
    here: Sequence[str],
    told_precision: bool = True,
) -> tuple[list[Candidate], dict[str, str]]:
    """All that passed its gate and that a runtime here can compute, the most exact precision first.

    Args:
        model_dir: models/NAME/.
        limits: largest drift by precision; None keeps the limits that the variants were judged by.
        here: runtimes of what will serve it, the preferred one first.
        told_precision: whether OpenVINO is told in which precision to compute; see `able_runtimes`.

    Returns:
        The candidates, fp32 in ONNX Runtime's own kernels first (it is what an import proved), and name or precision →
        why it is not among them. One that is damaged, or whose file is gone, keeps no other from being served.
    """
    imported = read_import_manifest(model_dir)
    exact = _told(able_runtimes("fp32", None, here, told_precision)[0], told_precision)
    found: list[Candidate] = []
    why_not: dict[str, str] = {}
    for runtime in sorted(exact, key=RUNTIMES.index):
        for form, part in _fp32_parts(imported, runtime):
            if (model_dir / part["file"]).is_file():
                found.append(Candidate("fp32", runtime, *fp32_file(model_dir, part), form=form))
            else:
                name = Candidate("fp32", runtime, "", "", form=form).name
                why_not[name] = f"{part['file']} is gone. Import the model again: arcface import SOURCE"
    for precision in PRECISIONS[1:]:
        try:
            sidecar = read_sidecar(model_dir, precision, "cpu")
        except WrongUse as exc:
            why_not[precision] = str(exc)
            continue
        if sidecar is None:
            why_not[precision] = f"none that passed its gate (arcface quantize {model_dir.name} makes one)"
            continue
        verdicts = judge_sidecar(sidecar, limits)
        passed = [runtime for runtime, verdict in verdicts.items() if verdict.passed]
        able, why = able_runtimes(precision, passed, here, told_precision)
        if not able:
            refused = (verdicts[one].why for one in here if one in verdicts and not verdicts[one].passed)
            why_not[precision] = next(refused, why)
            continue
        file = model_dir / sidecar["file"]
        try:
            ModelFolder(model_dir, imported).check_proved(file)
        except (GateFailed, ContractMismatch) as exc:
            why_not[precision] = str(exc)
            continue
        digest = sidecar.get("sha256") or file_sha256(file)
        found += [
            Candidate(precision, runtime, sidecar["file"], digest, sidecar) for runtime in _told(able, told_precision)
        ]
    return found, why_not


def _told(able: Sequence[str], told_precision: bool) -> list[str]:
    """An OpenVINO that is not told a precision is one runtime: the one that it takes by itself on this CPU."""
    openvino = [runtime for runtime in able if runtime.startswith("openvino")]
    return [runtime for runtime in able if told_precision or runtime not in openvino[1:]]


def _fp32_parts(imported: ImportManifest, runtime: str) -> list[tuple[str, dict[str, Any]]]:
    """Form and manifest entry: ONNX Runtime's own kernels have a form of their own, OpenVINO fuses the plain one.

    Winograd's is for both: OpenVINO computes its products well with AVX-512 and badly without, ONNX Runtime with AVX2.
    """
    plain = imported.cpu or imported.serving if runtime == "onnxruntime" else imported.serving
    return [("", plain), *([(WINOGRAD, imported.winograd)] if imported.winograd else [])]


def fp32_file(model_dir: Path, part: Mapping[str, Any]) -> tuple[str, str]:
    """File and digest of a part of an import's manifest; older ones state no digest."""
    return str(part["file"]), str(part.get("sha256") or file_sha256(model_dir / part["file"]))
