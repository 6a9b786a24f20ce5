"""TensorRT in this process, through Polygraphy; finds the plan for this GPU and checks it before loading."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.devices import canonical_device
from arcface_clients.engines.in_process import LocalEngine
from arcface_clients.engines.registry import EngineRegistry
from arcface_clients.errors import (
    ConfigError,
    DependencyMissing,
    InferenceFailed,
    Missing,
    ModelMissing,
    PlanRefused,
)
from arcface_clients.extras import how_to_get
from arcface_clients.gpu.cards import find_gpus
from arcface_clients.plans.find import find_plan
from arcface_clients.plans.fit import misfit
from arcface_clients.plans.read import Plan, read_plan

_log = logging.getLogger(__name__)


@EngineRegistry.register("tensorrt")
class TensorRtEngine(LocalEngine):
    """A plan in this process. It has one execution context, so calls from several threads take turns.

    It runs on CUDA's current device; CUDA_VISIBLE_DEVICES selects another. Device buffers are kept between calls.
    """

    name = "tensorrt"

    def __init__(
        self,
        plan: str | Path | None = None,
        *,
        device: str = "auto",
        precision: str = "fp16",
        model: str | None = None,
        model_repository: str | Path = "model_repository",
        cache: str | Path = "~/.cache/arcface-triton",
        max_batch: int = 64,
        public_key: str | Path | None = None,
    ) -> None:
        """Choose what to load; nothing is loaded yet.

        Args:
            plan: the plan file; None uses the one for this GPU from the model repository, else from the cache.
            device: auto, gpu, cuda or tensorrt: the first GPU visible to CUDA.
            precision: of the plan to find.
            model: name of the model to find a plan of; None accepts any.
            model_repository: where `arcface assemble` puts plans.
            cache: where `arcface plan build` and `plan pull` put them.
            max_batch: largest batch passed to one run; the plan's own limit applies if it is smaller.
            public_key: PEM, ed25519; if given, a plan not signed by its private key is refused.
        """
        super().__init__(max_batch)
        if canonical_device(device) not in ("auto", "gpu", "cuda", "cuda:0", "tensorrt", "tensorrt:0"):
            raise ConfigError(
                f"the tensorrt engine runs on the first GPU visible to CUDA, got device {device!r}: "
                "expected auto, gpu or cuda. CUDA_VISIBLE_DEVICES=1 selects another GPU."
            )
        self.precision = precision
        self._plan = Path(plan).expanduser() if plan is not None else None
        self._model, self._repository, self._cache = model, Path(model_repository), Path(cache)
        self._public_key = Path(public_key).expanduser() if public_key is not None else None
        self._runner: Any = None
        self._loaded: Plan | None = None
        self._run_lock = threading.Lock()

    @property
    def contract_id(self) -> str | None:
        """From the plan's manifest; None if that does not say."""
        return (self._loaded or self._find(None)).manifest.contract_id

    def _find(self, tensorrt: str | None) -> Plan:
        """The plan, read and checked for this TensorRT version (None: unknown)."""
        with _plan_errors():
            if self._plan is not None:
                return read_plan(self._plan, self._public_key)
            return find_plan(
                _sm(),
                self.precision,
                model_repository=self._repository,
                cache=self._cache,
                model=self._model,
                tensorrt=tensorrt,
                public_key=self._public_key,
                gpu=find_gpus()[0].name,
            )

    def _load(self) -> None:
        try:
            import tensorrt as trt
            from polygraphy.backend.trt import EngineFromBytes, TrtRunner
            from polygraphy.logger import G_LOGGER
        except ImportError as exc:
            raise DependencyMissing(
                f"the tensorrt engine needs TensorRT and Polygraphy ({exc}). On a GPU host: {how_to_get('tensorrt')}"
            ) from exc
        plan = self._find(trt.__version__)
        if why := misfit(plan.manifest, _sm(), trt.__version__):
            raise ModelMissing(
                f"{plan.path} was {why}. Build one here: arcface plan build --precision {plan.manifest.spec.precision}"
            )
        with _plan_errors():
            content = plan.content()
        runner = TrtRunner(EngineFromBytes(content), name="arcface")
        try:
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
                runner.activate()
        except Exception as exc:  # Polygraphy's own if the plan does not deserialise, ctypes' if there is no CUDA
            raise ModelMissing(
                f"{plan.path} does not load under TensorRT {trt.__version__}: {str(exc).partition(chr(10))[0]}. "
                f"Build one on this host: arcface plan build --precision {self.precision}"
            ) from exc
        self._runner, self._loaded = runner, plan
        self.precision = plan.manifest.spec.precision
        largest = runner.engine.get_tensor_profile_shape(FACE_INPUT, 0)[2][0]
        self.max_batch = min(self.max_batch, int(largest))
        width = runner.engine.get_tensor_shape(EMBEDDING_OUTPUT)[-1]
        self._dim = int(width) if width > 0 else None
        self.taken = {
            "provider": "TensorRT",
            "reason": "local.plan" if self._plan else f"plan for SM {_sm()}",
            "file": str(plan.path),
            "precision": self.precision,
            "tensorrt": trt.__version__,
        }

    def _run(self, faces: Array) -> Array:
        with self._run_lock:
            if self._runner is None:
                raise InferenceFailed("tensorrt: the engine was closed while it was encoding.")
            try:
                outputs = self._runner.infer({FACE_INPUT: faces}, check_inputs=False)
            except Exception as exc:
                raise InferenceFailed(
                    f"tensorrt: {str(exc).partition(chr(10))[0]} (batch {len(faces)}, {self.taken['file']})"
                ) from exc
            return np.array(outputs[EMBEDDING_OUTPUT], np.float32)  # the runner's buffer is reused by the next call

    def _unload(self) -> None:
        with self._run_lock:
            self._runner.deactivate()
            self._runner = self._loaded = None


@contextmanager
def _plan_errors() -> Iterator[None]:
    """The only place where errors of a plan become ModelMissing, which falls back.

    A pipeline continues without a plan that it may not load. But a tampered plan is no ordinary absence, so a refusal
    is logged as an error, whatever the chain does next.
    """
    try:
        yield
    except PlanRefused as exc:
        _log.error("the tensorrt engine refuses its plan: %s", exc)
        raise ModelMissing(str(exc)) from exc
    except Missing as exc:
        raise ModelMissing(str(exc)) from exc


def _sm() -> str:
    """SM of the first GPU; raises DependencyMissing, which falls back, if there is none."""
    return find_gpus()[0].sm
