"""Runs a serving ONNX on ONNX Runtime in this process; checks and reports which provider was really used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.arrays import FaceArray, FloatArray
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.devices import (
    CPU,
    CUDA,
    OPENVINO,
    TENSORRT,
    canonical_device,
    device_index,
    order_of_providers,
)
from arcface_clients.engines.in_process import LocalEngine
from arcface_clients.engines.model_folder import WantedModel, sidecar_of
from arcface_clients.engines.registry import EngineRegistry
from arcface_clients.engines.runtimes import (
    OnnxSession,
    Provider,
    available_cores,
    cpu_flags,
    cpu_runtimes,
    first_line,
    gated_runtimes,
    open_session,
    runtime_for,
)
from arcface_clients.errors import ConfigError, DependencyMissing, GateFailed, InferenceFailed, ModelMissing
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.golden import judge_golden
from arcface_clients.extras import importing

_log = logging.getLogger(__name__)


@EngineRegistry.register("onnx")
class OnnxEngine(LocalEngine):
    """ONNX Runtime in this process, on a serving ONNX from `arcface import`: `face` uint8 → `embedding` float32.

    Several threads may call `encode`; each call uses `threads` threads of the session's pool.
    """

    name = "onnx"

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        models_dir: str | Path = "models",
        model: str | None = None,
        served: Callable[[], str | None] = lambda: None,
        model_repository: Path | None = None,
        precision: str = "fp32",
        device: str = "auto",
        threads: int = 0,
        max_batch: int = 64,
        max_drift: Mapping[str, float] | None = None,
    ) -> None:
        """Choose what to load; nothing is loaded yet.

        Args:
            file: the serving ONNX; None uses models_dir/model in this precision.
            models_dir: where imported models are.
            model: name of the model; None uses the served one, or the only one there (beside demo networks).
            served: the contract id that the server names; asked only where there are several models.
            model_repository: where the installed model is, if nothing is served.
            precision: fp32, fp16, int8 (a variant file of that precision), or bf16 (OpenVINO on a CPU that has it).
            device: auto, gpu, cuda, cuda:1, tensorrt, coreml, openvino, cpu.
            threads: intra-op threads; 0 uses all cores of this process.
            max_batch: largest batch passed to one run.
            max_drift: by precision: a variant that drifted more at its gate is not run; None: as its gate judged it.
        """
        super().__init__(max_batch)
        self.precision = precision
        self.device = canonical_device(device)
        self._file = Path(file).expanduser() if file is not None else None
        self._wanted = WantedModel(self._file, models_dir, model, served, model_repository)
        self._threads = threads or available_cores()
        self._max_drift = max_drift
        self._session: OnnxSession | None = None

    @property
    def contract_id(self) -> str | None:
        """From the manifest beside the file; None if there is none."""
        return self._wanted.folder().contract_id

    @property
    def file(self) -> Path:
        """The ONNX file to run.

        Raises:
            ModelMissing: it does not exist; falls back.
        """
        if self._file is None:
            return self._wanted.folder().serving(self.precision)
        if not self._file.is_file():
            raise ModelMissing(f"no serving ONNX at {self._file}. Import one: arcface import SOURCE")
        return self._file

    def _load(self) -> None:
        file = self.file
        self._wanted.folder().check_proved(file)
        with importing("the onnx engine"):
            import onnxruntime
        order = order_of_providers(
            self.device, onnxruntime.get_available_providers(), OPENVINO if self.precision == "bf16" else None
        )
        failed: list[str] = []
        for position, provider in enumerate(order, start=1):
            runtime, why = self._runtime(provider, file)
            try:
                session = open_session(
                    file, runtime or self._gpu_providers(provider), self._threads, refused=ConfigError
                )
                width = _check_contract(session, file)
                precision = "fp32" if (self.precision, runtime) == ("bf16", "openvino-fp32") else self.precision
                self._check_golden(session, file, precision, runtime or provider)
                break
            except (DependencyMissing, GateFailed) as exc:
                failed.append(str(exc))
                if position == len(order):
                    raise
        if failed:
            _log.warning("onnx: %s; using %s", "; ".join(failed), provider)
        reasons = [f"first of {', '.join(order)} that starts" if len(order) > 1 else f"device={self.device}", why]
        self._dim = width
        self._session = session
        self.taken = {
            "provider": provider,
            "reason": "; ".join(filter(None, [*reasons, *failed])),
            "file": str(file),
            "precision": precision,
            "runtime": runtime or provider,
            "threads": self._threads,
            "onnxruntime": onnxruntime.__version__,
        }
        _log.info("onnx: %s on %s (%s)", file, provider, self.taken["reason"])

    def _runtime(self, provider: str, file: Path) -> tuple[str, str]:
        """The runtime of a CPU provider for this file, and why; empty for a GPU provider.

        Raises:
            ModelMissing: the variant passed its gate in none of this provider's runtimes on this host; falls back.
        """
        if provider not in (CPU, OPENVINO):
            return "", ""
        here = [r for r in cpu_runtimes(cpu_flags(), openvino=True) if (r == "onnxruntime") == (provider == CPU)]
        beside = sidecar_of(file)
        if beside is not None and beside.get("precision", self.precision) != self.precision:
            raise ConfigError(
                f"{file} is {beside['precision']} by its sidecar: expected that precision, got {self.precision}. "
                f"Set precision={beside['precision']!r}"
            )
        sidecar = beside if self.precision == "int8" else self._wanted.folder().sidecar(self.precision)
        gated = gated_runtimes(sidecar, self._max_drift)
        runtime, why_not = runtime_for(self.precision, gated, here)
        if runtime is not None:
            return runtime, f"{self.precision} passed its gate in {runtime}" if gated else ""
        if self.precision == "bf16" and "openvino-bf16" not in here:
            return "openvino-fp32", "this CPU has no bf16 (avx512_bf16 or amx_bf16), so it runs in fp32"
        raise ModelMissing(
            f"{file}: {why_not}. "
            f"Gate it here: arcface quantize NAME --precision {self.precision}, or set another device"
        )

    def _gpu_providers(self, provider: str) -> list[Provider]:
        index = {"device_id": str(device_index(self.device))}
        exact = {**index, "use_tf32": "0"}  # TF32 has ten bits of mantissa: beyond the limit for fp32
        if provider == TENSORRT:  # operators that it does not support run on the same GPU
            return [(TENSORRT, index), (CUDA, exact), CPU]
        return [(provider, exact) if provider == CUDA else provider, CPU]

    def _check_golden(self, session: OnnxSession, file: Path, precision: str, runtime: str) -> None:
        """Refuse a runtime that computes something else on this host than the import's reference did.

        Raises:
            GateFailed: the golden faces drift beyond the limit of the precision.
        """
        folder = self._wanted.folder()
        limits = {**DRIFT_LIMITS, **(self._max_drift or {})}
        if self._max_drift is None:
            sidecar: dict[str, Any] = sidecar_of(file) or folder.sidecar(precision) or {}
            for gate in sidecar.get("gates", ()):
                if gate["runtime"] == runtime:
                    limits[precision] = gate.get("limit", limits[precision])

        def embed(faces: FaceArray) -> FloatArray:
            rows = [session.run([EMBEDDING_OUTPUT], {FACE_INPUT: face[None]})[0] for face in faces]
            return np.concatenate(rows)

        golden = folder.manifest.golden if folder.manifest else None
        verdict = judge_golden(golden, embed, precision, limits)
        if verdict is not None and not verdict.passed:
            raise GateFailed(
                f"{file} in {runtime} computes something else on this host than the reference did at the import: "
                f"{verdict.why}, on two golden faces. Use another precision or device, or judge it here: "
                "arcface quantize NAME"
            )

    def _run(self, faces: FaceArray) -> FloatArray:
        session = self._session
        if session is None:
            raise InferenceFailed("onnx: the engine was closed while it was encoding.")
        try:
            rows: FloatArray = session.run([EMBEDDING_OUTPUT], {FACE_INPUT: faces})[0]
            return rows
        except Exception as exc:
            raise InferenceFailed(f"onnx: {first_line(exc)} (batch {len(faces)}, {self.taken['file']})") from exc

    def _unload(self) -> None:
        self._session = None


def _check_contract(session: OnnxSession, file: Path) -> int | None:
    """The width that the file states, after checking its tensor contract."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    found = [(item.name, item.type, item.shape) for item in (*inputs, *outputs)]
    names = ([item.name for item in inputs], [item.name for item in outputs])
    if names[0] != [FACE_INPUT] or EMBEDDING_OUTPUT not in names[1] or inputs[0].type != "tensor(uint8)":
        raise ConfigError(
            f"{file}: not a serving ONNX: expected face uint8 [N,112,112,3] and embedding float32 [N,D], got {found}. "
            f"Convert it: arcface import {file}"
        )
    width = outputs[names[1].index(EMBEDDING_OUTPUT)].shape[-1]
    return width if isinstance(width, int) else None
