"""A serving ONNX in, an engine on ONNX Runtime in this process out; which provider was taken is asserted and said."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from arcface_clients.arrays import FaceArray, FloatArray
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.devices import CPU, canonical_device, choose_provider, device_index
from arcface_clients.engines.in_process import LocalEngine
from arcface_clients.engines.model_folder import ModelFolder, find_model, folder_of, sidecar_of
from arcface_clients.engines.registry import EngineRegistry
from arcface_clients.engines.runtimes import cpu_runtime, gated_runtimes
from arcface_clients.errors import ConfigError, DependencyMissing, InferenceFailed, ModelMissing

OPENVINO = "OpenVINOExecutionProvider"
_HINTS = {"openvino-fp32": "f32", "openvino-bf16": "bf16"}
_log = logging.getLogger(__name__)


@EngineRegistry.register("onnx")
class OnnxEngine(LocalEngine):
    """ONNX Runtime in this process on a serving ONNX: `face` uint8 → `embedding` float32, as `arcface import` makes it.

    Several threads may call `encode`; each call uses `threads` threads of its own pool.
    """

    name = "onnx"

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        models_dir: str | Path = "models",
        model: str | None = None,
        precision: str = "fp32",
        device: str = "auto",
        threads: int = 0,
        max_batch: int = 64,
    ) -> None:
        """Choose what to load; nothing is loaded yet.

        Args:
            file: the serving ONNX; None takes models_dir/model in this precision.
            models_dir: where imported models are.
            model: name of the model; None takes the only one there.
            precision: fp32, fp16, int8 (a variant file of that precision), or bf16 (OpenVINO on a CPU that has it).
            device: auto, gpu, cuda, cuda:1, tensorrt, coreml, openvino, cpu.
            threads: intra-op threads; 0 takes all cores of this process.
            max_batch: largest batch given to one run.
        """
        super().__init__(max_batch)
        self.precision = precision
        self.device = canonical_device(device)
        self._file = Path(file).expanduser() if file is not None else None
        self._models_dir, self._model = models_dir, model
        self._threads = threads or _cores()
        self._session: Any = None

    @property
    def contract_id(self) -> str | None:
        """From the manifest beside the file; None where there is none."""
        return self._folder().contract_id

    @property
    def file(self) -> Path:
        """The ONNX file that is run.

        Raises:
            ModelMissing: it is not there; falls back.
        """
        if self._file is None:
            return self._folder().serving(self.precision)
        if not self._file.is_file():
            raise ModelMissing(f"no serving ONNX at {self._file}. Import one: arcface import SOURCE")
        return self._file

    def _folder(self) -> ModelFolder:
        return folder_of(self._file) if self._file is not None else find_model(self._models_dir, self._model)

    def _load(self) -> None:
        file = self.file
        try:
            import onnxruntime as ort
        except ImportError as exc:
            raise DependencyMissing("the onnx engine needs ONNX Runtime: pip install onnxruntime") from exc
        provider, reason = choose_provider(
            self.device, ort.get_available_providers(), OPENVINO if self.precision == "bf16" else None
        )
        runtime, why = "", ""
        if provider in (CPU, OPENVINO):
            gated = gated_runtimes(sidecar_of(file))
            runtime, why = cpu_runtime(self.precision, provider == OPENVINO, cpu_has_bf16(), gated, file)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle, it would starve a second engine
        asked = [(provider, self._provider_options(provider, runtime))]
        if provider == "TensorrtExecutionProvider":  # what it cannot take runs on the same GPU
            asked.append(("CUDAExecutionProvider", {"device_id": str(device_index(self.device))}))
        try:
            session = ort.InferenceSession(str(file), options, providers=asked)
        except Exception as exc:  # ONNX Runtime raises bare RuntimeErrors of many kinds
            if provider == CPU:
                raise ConfigError(f"{file}: ONNX Runtime cannot load it: {_first_line(exc)}") from exc
            raise DependencyMissing(f"{provider} was asked for and failed: {_first_line(exc)}") from exc
        got = session.get_providers()[0]
        if got != provider:  # a provider that cannot start is replaced by the CPU without an exception
            raise DependencyMissing(
                f"ONNX Runtime was asked for {provider} and silently took {got}: its libraries or driver are missing. "
                "See what is there: arcface doctor"
            )
        self._dim = _check_contract(session, file)
        self._session = session
        self.taken = {
            "provider": provider,
            "reason": "; ".join(filter(None, (reason, why))),
            "file": str(file),
            "precision": "fp32" if (self.precision, runtime) == ("bf16", "openvino-fp32") else self.precision,
            "runtime": runtime or provider,
            "threads": self._threads,
            "onnxruntime": ort.__version__,
        }
        _log.info("onnx: %s on %s (%s)", file, provider, self.taken["reason"])

    def _provider_options(self, provider: str, runtime: str) -> dict[str, str]:
        if provider == OPENVINO:
            # Left alone, OpenVINO infers in bf16 wherever the CPU has it; load_config takes the JSON text itself.
            hints = {"INFERENCE_PRECISION_HINT": _HINTS[runtime], "NUM_STREAMS": "1"}
            if self._threads:
                hints["INFERENCE_NUM_THREADS"] = str(self._threads)
            return {"device_type": "CPU", "load_config": json.dumps({"CPU": hints})}
        if provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
            return {"device_id": str(device_index(self.device))}
        return {}

    def _run(self, faces: FaceArray) -> FloatArray:
        session = self._session
        if session is None:
            raise InferenceFailed("onnx: the engine was closed while it was encoding.")
        try:
            rows: FloatArray = session.run([EMBEDDING_OUTPUT], {FACE_INPUT: faces})[0]
            return rows
        except Exception as exc:
            raise InferenceFailed(f"onnx: {_first_line(exc)} (batch {len(faces)}, {self.taken['file']})") from exc

    def _unload(self) -> None:
        self._session = None


def _check_contract(session: Any, file: Path) -> int | None:
    """The width that the file states, after a look at its tensor contract."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    found = [(item.name, item.type, item.shape) for item in (*inputs, *outputs)]
    names = ([item.name for item in inputs], [item.name for item in outputs])
    if names[0] != [FACE_INPUT] or EMBEDDING_OUTPUT not in names[1] or inputs[0].type != "tensor(uint8)":
        raise ConfigError(
            f"{file}: not a serving ONNX: expected face uint8 [N,112,112,3] and embedding float32 [N,D], got {found}. "
            f"Make one of it: arcface import {file}"
        )
    width = outputs[names[1].index(EMBEDDING_OUTPUT)].shape[-1]
    return width if isinstance(width, int) else None


def _cores() -> int:
    """Cores that this process may use; 0 (ONNX Runtime decides) where the system cannot say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies in bf16 (flags of /proc/cpuinfo); False where that file does not exist."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    return any(flag in text for flag in ("avx512_bf16", "amx_bf16"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
