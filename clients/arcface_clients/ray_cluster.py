"""The connection to a Ray cluster, what of it is used, and what its workers' errors mean; for bulk jobs and people."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from arcface_clients.errors import ArcFaceError, DependencyMissing
from arcface_clients.extras import importing

TRIES = 3  # workers that a unit or a person may kill
SAY_AFTER_S = 30.0  # without a worker, what the cluster lacks is said


@dataclass(frozen=True)
class Cluster:
    """What of Ray is used.

    Attributes:
        actors: how many, each with a client of its own; of tasks, how many at a time.
        cpus: that an actor or a task claims; a client of a fast server uses one.
        runtime_env: Ray's, for machines that lack this package or variables: {"pip": …, "env_vars": …}.
        store_bytes: Ray's object store, where Ray is started here; the job needs next to none.
    """

    actors: int = 2
    cpus: float = 1.0
    runtime_env: Mapping[str, Any] | None = None
    store_bytes: int = 100 << 20

    def options(self) -> dict[str, Any]:
        """Of every actor and task."""
        found: dict[str, Any] = {"num_cpus": self.cpus, "scheduling_strategy": "SPREAD"}
        return {**found, "runtime_env": dict(self.runtime_env)} if self.runtime_env else found


@contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, as the program connected it; else connected for the block, with what it prints sent to stderr.

    Raises:
        DependencyMissing: it is not installed, cannot be reached or does not start.
    """
    with importing("--engine ray"):
        import ray
    if ray.is_initialized():
        yield ray
        return
    with redirect_stdout(sys.stderr):  # Ray tells of dead workers on stdout, which is for results
        try:
            _connect(ray, cluster)
            yield ray
        finally:
            ray.shutdown()


def _connect(ray: Any, cluster: Cluster) -> None:
    """Connect to $RAY_ADDRESS, else to the Ray on this host, else start one; $RAY_ADDRESS=local always starts one."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # a busy host is given more time than Ray gives it
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "local":
        try:
            _somebody_listens(address)
            ray.init(address=address, log_to_driver=False)
            return
        except Exception as exc:  # Ray raises ConnectionError, RuntimeError, ValueError and plain Exceptions
            ray.shutdown()
            if os.environ.get("RAY_ADDRESS"):
                raise _unreachable(f"Ray at {address} cannot be reached", exc) from exc
    for attempts_left in (1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=max(1, round(cluster.actors * cluster.cpus)),
                object_store_memory=cluster.store_bytes,
                include_dashboard=False,
                log_to_driver=False,
            )
            return
        except Exception as exc:  # a plain Exception where it did not start in its own 30 s
            ray.shutdown()
            if not attempts_left:
                raise _unreachable("Ray does not start on this host", exc) from exc


def _somebody_listens(address: str, timeout_s: float = 10.0) -> None:
    """Raise OSError if nobody listens at host:port: Ray itself would look for minutes. Other forms are left to Ray."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()


def _unreachable(what: str, exc: Exception) -> DependencyMissing:
    return DependencyMissing(
        f"{what}: {str(exc).rstrip('. ')}. Next: ray start --head, or leave out --engine ray; what is done is kept"
    )


def raised_by(exc: Exception) -> ArcFaceError:
    """What an actor or a task raised, from Ray's RayTaskError around it; what is none of ours is wrapped."""
    cause = getattr(exc, "cause", None)
    if isinstance(cause, ArcFaceError):
        return cause
    error = ArcFaceError(f"a Ray worker failed ({short(exc)}); what is done is kept: run the same command again")
    error.__cause__ = exc
    return error


def short(exc: Exception) -> str:
    """The last line of Ray's message, which says what happened."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(exc).__name__
