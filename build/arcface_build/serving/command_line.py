"""Triton's own command line: which repository and models, with which backends, on which ports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arcface_build.repository.stated import completion_options
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.exposure import Exposure
from arcface_build.serving.ports import Ports

# A peer that vanished without a word (a pulled cable, a frozen laptop) is asked after a minute and given up after 20 s
# more. Every connection ends after five minutes, once its requests are done: idle ones go, busy clients connect anew.
CONNECTIONS = (
    "--grpc-keepalive-time=60000",
    "--grpc-keepalive-timeout=20000",
    "--grpc-keepalive-permit-without-calls=true",
    "--grpc-max-connection-age=300000",
    "--grpc-max-connection-age-grace=120000",
)


def arguments(
    binary: TritonBinary,
    repository: Path | str,
    models: Sequence[str],
    config_name: str,
    ports: Ports,
    exposure: Exposure,
) -> list[str]:
    """Triton's command line. Explicit control: an ensemble loads what it is composed of, and nothing else."""
    line = [str(binary.path), f"--model-repository={repository}", "--model-control-mode=explicit"]
    line += [f"--load-model={model}" for model in models]
    line += [f"--model-config-name={config_name}"] if config_name else []
    line += [f"--backend-directory={binary.backend_directory}"] if binary.backend_directory else []
    line += binary.options
    line += completion_options(repository, config_name)
    line += [f"--http-port={ports.http}", f"--grpc-port={ports.grpc}", f"--metrics-port={ports.metrics}"]
    return [*line, *exposure.options()]
