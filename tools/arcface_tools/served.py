"""Measures what safe serving costs: the same model with and without keys, the two extra outputs and a bounded queue.

Every contestant is a server of its own on a copy of the model repository; they are measured in turns within one run,
each by one caller over the same transport, so that the ratios hold on a shared machine.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcface_build.bench.contestants import in_process
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Variant, measure_in_turns, ratio, undisturbed_rounds
from arcface_build.bench.result import summarise
from arcface_build.errors import ProofFailed
from arcface_build.repository.versions import served_version
from arcface_build.serving.binary import find_tritonserver
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients import TritonEmbedder
from arcface_clients.contract import EMBEDDING_OUTPUT
from arcface_clients.faces.synthetic import synthetic_faces

BATCHES = (1, 8, 32)
_MODELS = ("arcface", "arcface_onnx")
_BATCHING = "dynamic_batching {"
_POLICY = "default_queue_policy { max_queue_size: 256 }"
STATED_OUTPUTS = re.compile(r"^output .*\n", re.MULTILINE)  # of an overlay
_OUTPUT = re.compile(r',?\n *(?:output_map \{ key: "|\{ name: ")(?:norm|contract)".*')


@dataclass(frozen=True)
class Setup:
    """How one contestant serves."""

    policy: bool = False
    keys: bool = True
    outputs: bool = True
    environment: dict[str, str] = field(default_factory=dict)


SAFE, BARE, BOUNDED = "as served", "without", "as served, bounded queue"
SETUPS = {
    BARE: Setup(keys=False, outputs=False),
    SAFE: Setup(),
    "keys only": Setup(outputs=False),
    "outputs only": Setup(keys=False),
    BOUNDED: Setup(policy=True),
}


def run(
    repository: Path,
    *,
    batches: Sequence[int] = BATCHES,
    each: bool = False,
    shared_memory: bool = False,
    rounds: int = 10,
    sample_s: float = 3.0,
    on_sample: Callable[[str, int], None] = lambda name, round_: None,
) -> dict[str, Any]:
    """Throughput of `arcface` as served over that of the same without keys and outputs; JSON as from `arcface bench`.

    Args:
        repository: the model repository; the served version of arcface_onnx is measured.
        batches: faces in a request.
        each: keys and outputs one by one as well.
        shared_memory: faces go through shared memory; otherwise over gRPC.
        rounds: undisturbed rounds.
        sample_s: length of a sample.
        on_sample: called with the variant's name and the round.

    Raises:
        ProofFailed: a copy still has what it should be without, or the reverse.
    """
    setups = SETUPS if each else {name: SETUPS[name] for name in (BARE, SAFE, BOUNDED)}
    faces = synthetic_faces(4 * max(batches))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="arcface-bench-")))
        variants: list[Variant] = []
        for number, (name, setup) in enumerate(setups.items()):
            copy = folder / str(number) / "model_repository"
            copy_for(setup, repository, copy)
            server = stack.enter_context(_server(setup, copy, folder / f"{number}.log"))
            server.wait_ready()
            embedder = stack.enter_context(
                # The key is found by itself; where there is none, shared memory needs none.
                TritonEmbedder(server.grpc_url, shared_memory=shared_memory)
            )
            _check(setup, embedder)
            for batch in batches:
                variant = in_process(f"{name} b{batch}", embedder.encode, faces, batch)
                variant.where, variant.server_pids = "server", (server.pid,) if server.pid else ()
                variant.about |= {"setup": name, "transport": "shared memory" if shared_memory else "grpc"}
                variants.append(variant)
        samples = measure_in_turns(variants, rounds, sample_s, on_sample)
    result = summarise(variants, samples, describe_host())
    kept, _ = undisturbed_rounds(samples)
    result["ratios"] = [
        {"variant": f"{name} b{batch}", "base": f"{BARE} b{batch}"}
        | ratio(samples, f"{name} b{batch}", f"{BARE} b{batch}", kept).to_json()
        for batch in batches
        for name in setups
        if name != BARE
    ]
    return {**result, "kind": "bench-served"}


def copy_for(setup: Setup, repository: Path, target: Path) -> None:
    """The ensemble and its leaf as this contestant serves them, in a repository of their own."""
    for model in _MODELS:
        ignored = shutil.ignore_patterns("[0-9]*", "__pycache__", "tuned.pbtxt")
        shutil.copytree(repository / model, target / model, ignore=ignored)
    version = str(served_version(repository) or 1)
    shutil.copytree(repository / "arcface_onnx" / version, target / "arcface_onnx" / version)
    (target / "arcface" / "1").mkdir()
    for config in target.rglob("*.pbtxt"):
        text = config.read_text()
        if setup.policy and config.is_relative_to(target / "arcface_onnx"):
            text = text.replace(_BATCHING, f"{_BATCHING} {_POLICY}", 1)
        if not setup.outputs:
            text = (_OUTPUT if config.is_relative_to(target / "arcface") else STATED_OUTPUTS).sub("", text)
        config.write_text(text)
    if not setup.outputs:
        for weights in (target / "arcface_onnx" / version).glob("*.onnx"):
            _keep_the_embedding(weights)


def _keep_the_embedding(file: Path) -> None:
    import onnx

    model = onnx.load(file)
    kept = [output for output in model.graph.output if output.name == EMBEDDING_OUTPUT]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, file)


def _server(setup: Setup, repository: Path, log_path: Path) -> TritonProcess:
    return TritonProcess(
        find_tritonserver(),
        repository,
        ["arcface"],
        log_path=log_path,
        ports=free_ports(),
        environment=setup.environment,
        guarded=setup.keys,
    )


def _check(setup: Setup, embedder: TritonEmbedder) -> None:
    served = embedder.ensure_ready()
    found = (len(served.outputs) > 1, bool(served.max_queue_size))
    if found != (setup.outputs, setup.policy):
        raise ProofFailed(
            f"the server has outputs {served.outputs} and a queue of {served.max_queue_size}: not {setup}."
        )
