"""Runs one benchmark: perf_analyzer through a server and runtimes in this process, interleaved."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import numpy.typing as npt

from arcface_build.bench import contestants
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Variant, measure_in_turns
from arcface_build.bench.perf_analyzer import Load, PerfAnalyzer, write_input_data
from arcface_build.bench.pytorch import pytorch_sessions
from arcface_build.bench.result import summarise
from arcface_build.bench.server import ServerUnderTest, own_server
from arcface_build.bench.waterfall import waterfall, waterfall_loads
from arcface_build.repository.versions import served_folder, served_manifest
from arcface_clients.errors import WrongUse
from arcface_clients.extras import require
from arcface_clients.triton.embedder import TritonEmbedder, named_contract

Bars = Callable[[int], AbstractContextManager[Callable[[str, int], None]]]  # total steps → callback for each


@dataclass(frozen=True)
class BenchRequest:
    """What to measure, and how long: `models` × `protocols` × `batches` × `callers`, and the runtimes."""

    models: Sequence[str]
    protocols: Sequence[str]
    batches: Sequence[int]
    callers: Sequence[int]
    bare: bool = True
    spinning: bool = True
    insightface: bool = False
    pytorch: bool = False
    onnx: Path | None = None  # for the bare runtime; None: the served one
    waterfall: bool = False
    rounds: int = 7
    sample_s: float = 3.0

    def __post_init__(self) -> None:
        """Reject what cannot be measured."""
        if self.waterfall and (len(self.batches) > 1 or not self.bare):
            raise WrongUse("--waterfall needs exactly one --batch and the bare runtime; got several, or --no-bare.")
        self.loads()

    def loads(self) -> list[Load]:
        """The loads that perf_analyzer sends.

        Raises:
            WrongUse: an unknown protocol.
        """
        if self.waterfall:
            return waterfall_loads(self.batches[0])
        return [Load(*parts) for parts in product(self.models, self.protocols, self.batches, self.callers)]

    def served(self) -> tuple[str, ...]:
        """The models that the server must have."""
        return ("arcface_onnx", "arcface") if self.waterfall else tuple(self.models)


def run_benchmark(
    asked: BenchRequest,
    faces_bgr_u8: npt.NDArray[Any],
    program: PerfAnalyzer,
    *,
    repository: Callable[[], Path],
    config: str = "onnx",
    target: ServerUnderTest | None = None,
    bars: Bars,
) -> dict[str, Any]:
    """Measure; returns the benchmark's JSON (docs/reports.md).

    Args:
        asked: what to measure.
        faces_bgr_u8: crops to send, uint8 (N,112,112,3).
        program: the result of `find_perf_analyzer`.
        repository: returns the model repository, where the bare runtimes and our own server find their files; called
            only if needed.
        config: Triton's --model-config-name for our own server.
        target: a running server; None starts one.
        bars: shows progress.
    """
    for wanted, module in ((asked.bare, "onnxruntime"), (asked.insightface, "insightface"), (asked.pytorch, "torch")):
        if wanted:
            require(module, purpose="this benchmark")
    host, given = describe_host(), target is not None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="arcface-bench-")))
        if target is None:
            target = stack.enter_context(own_server(repository(), asked.served(), config))
        variants = _in_process(asked, faces_bgr_u8, repository)
        data = write_input_data(faces_bgr_u8, folder / "faces.json")
        variants += [contestants.served(program, load, target, data) for load in asked.loads()]
        advance = stack.enter_context(bars(len(variants) * (asked.rounds + 1)))
        samples = measure_in_turns(variants, asked.rounds, asked.sample_s, advance)
        served = _served(target, asked.served()[0], None if given else repository())
    told = {"created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "served": served}
    result = summarise(variants, samples, host) | {"faces": len(faces_bgr_u8), **told}
    if asked.waterfall:
        result["waterfall"] = waterfall(samples, result["rounds"]["kept"], asked.batches[0])
    return result


def _served(target: ServerUnderTest, model: str, repository: Path | None) -> dict[str, str | None]:
    """What the server says of the model under test; `name`: of the import, where our own server has it."""
    url = f"grpcs://{target.grpc_url}" if target.encrypted else target.grpc_url
    with TritonEmbedder(url, model, **target.access) as embedder:
        contract, precision = named_contract(embedder), embedder.served.precision or "fp32"
    name = (served_manifest(repository) or {}).get("name") if repository else None
    return {"model": model, "name": name, "precision": precision, "contract_id": contract}


def served_file(repository: Path, model: str, name: str) -> Path:
    """The file of the newest version of a model in the repository."""
    return served_folder(repository, model) / name


def _in_process(asked: BenchRequest, faces: npt.NDArray[Any], repository: Callable[[], Path]) -> list[Variant]:
    """The runtimes in this process."""
    variants: list[Variant] = []
    if asked.bare:
        onnx = asked.onnx or served_file(repository(), "arcface_onnx", "model.onnx")
        variants += [contestants.bare_session(onnx, faces, batch, spinning=asked.spinning) for batch in asked.batches]
    if asked.insightface or asked.pytorch:
        source, batches = served_file(repository(), "arcface_reference", "source.onnx"), sorted({1, *asked.batches})
        variants += contestants.insightface_sessions(source, faces, batches) if asked.insightface else []
        variants += pytorch_sessions(source, faces, batches) if asked.pytorch else []
    return variants
