"""`--engine ray` and `--runtime-env`: what runs a job, threads of this host or a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from arcface_clients.errors import WrongUse
from arcface_clients.ray_cluster import Cluster
from arcface_clients.triton.served import ServedModel

ACTORS_OF_INSTANCE = 2  # one reads and packs while the requests of the other are computed

engine_option = click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", help="What runs the job: this host, or Ray."
)
runtime_env_option = click.option(
    "--runtime-env",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSON: Ray's runtime environment, for machines that lack this package or variables.",
)


@dataclass(frozen=True)
class Runner:
    """What runs a job: `engine` "local" or "ray", with Ray's actors and the file of its runtime environment."""

    engine: str
    actors: int | None = None
    runtime_env: Path | None = None

    def environment(self) -> dict[str, Any] | None:
        """Ray's runtime environment.

        Raises:
            WrongUse: the file holds no JSON object.
        """
        if self.runtime_env is None:
            return None
        try:
            found = json.loads(self.runtime_env.read_text())
        except ValueError as exc:
            raise WrongUse(f"{self.runtime_env} is not JSON ({exc}): expected Ray's runtime environment") from exc
        if not isinstance(found, dict):
            raise WrongUse(f'{self.runtime_env}: expected an object such as {{"env_vars": {{…}}}}')
        return found

    def cluster(self, served: Sequence[ServedModel]) -> Cluster:
        """What of Ray is used: so many actors as was said, else two for each instance of the served models.

        Raises:
            WrongUse: see `environment`.
        """
        actors = self.actors or ACTORS_OF_INSTANCE * sum(each.instances for each in served)
        return Cluster(actors, runtime_env=self.environment())
