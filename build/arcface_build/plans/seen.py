"""Detects rollback attacks: remembers the newest signed plan seen under each key, and refuses older ones.

A signature says who vouched for a plan, not that it is the newest one. So the manifest contains the time of signing,
covered by the signature, and the newest time for each key is remembered here. A host that has never fetched a key knows
nothing about it, and anyone who can write to this folder can make it forget: see SECURITY.md.
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from arcface_clients.atomic import new_file
from arcface_clients.errors import PlanRefused
from arcface_clients.plans.manifest import PlanManifest

_log = logging.getLogger(__name__)


class SeenPlans:
    """A folder with one small file per key: when the newest plan seen was signed, ISO 8601."""

    def __init__(self, folder: Path) -> None:
        """Remember in this folder, which is created with the first plan."""
        self.folder = folder

    def check(self, manifest: PlanManifest, where: str) -> None:
        """Compare a manifest whose signature has been checked with the newest one seen, then remember it.

        Raises:
            PlanRefused: it was signed before the newest one seen, or states no time.
        """
        signed, seen = manifest.published, self._seen(manifest.key)
        if seen is not None and (signed is None or signed < seen):
            raise PlanRefused(
                f"{where} was signed {signed.isoformat() if signed else 'at an unstated time'}, but this host has "
                f"seen a plan of this key signed {seen.isoformat()}: an older one was put back. If that is intended, "
                f"sign it again: arcface plan push --sign-key PRIVATE.pem, or forget the newer one: rm "
                f"{self.folder / manifest.key}"
            )
        if signed is not None and (seen is None or signed > seen):
            self._remember(manifest.key, signed)

    def _seen(self, key: str) -> datetime | None:
        try:
            return datetime.fromisoformat((self.folder / key).read_text().strip())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            raise PlanRefused(
                f"{self.folder / key} cannot be read ({exc}): it records the newest plan of this key seen here. "
                f"If that is intended, forget it: rm {self.folder / key}"
            ) from exc

    def _remember(self, key: str, signed: datetime) -> None:
        try:
            with new_file(self.folder / key) as temporary:
                temporary.write_text(signed.isoformat() + "\n")
        except OSError as exc:
            _log.warning("%s cannot be written (%s): an older plan put back would go unnoticed", self.folder, exc)
