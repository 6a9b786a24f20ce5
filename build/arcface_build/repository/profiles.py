"""Writes into a config.pbtxt what a plan set needs: its profiles, and CUDA graphs where they are wanted."""

from __future__ import annotations

import re

from arcface_clients.errors import WrongUse

CUDA_GRAPHS = "optimization { cuda { graphs: true } }\n"


def with_profiles(config: str, count: int) -> str:
    """A config.pbtxt whose instances use the first `count` profiles of the plan; one is what Triton does by itself.

    Triton makes a context for each, and takes for each batch the profile that fits and is tuned nearest to it.

    Raises:
        WrongUse: its instance group is not written as in the shipped file.
    """
    if count < 2:
        return config
    names = ", ".join(f'"{index}"' for index in range(count))
    changed, found = re.subn(r"(instance_group \[ \{[^}]*?)\s*\}", rf"\1 profile: [ {names} ] }}", config)
    if found != 1 or "profile:" in config:
        raise WrongUse(
            "config.pbtxt of arcface_trt has no single `instance_group [ { … } ]` without profiles: expected the "
            "shipped one, to write the profiles of a plan set into it. "
            "Restore it: git checkout model_repository/arcface_trt"
        )
    return changed
