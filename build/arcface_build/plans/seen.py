"""What this host has seen of a store's signed plans: an older one under the same key, put back, is noticed.

A signature says who vouched for a plan, not that it is the newest one. So the time of signing stands in the manifest,
under the signature, and the newest of each key is remembered here. A host that has never asked for a key knows nothing
about it, and whoever may write in this folder may make it forget: SECURITY.md says what that leaves open.
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
    """A folder with one small file a key: when the newest plan that was seen had been signed, ISO 8601."""

    def __init__(self, folder: Path) -> None:
        """Remember in this folder, which is made on the first plan."""
        self.folder = folder

    def check(self, manifest: PlanManifest, where: str) -> None:
        """Compare a manifest whose signature was checked with what was seen, then remember it.

        Raises:
            PlanRefused: it was signed before the one that was seen, or says no time.
        """
        signed, seen = manifest.published, self._seen(manifest.key)
        if seen is not None and (signed is None or signed < seen):
            raise PlanRefused(
                f"{where} was signed {signed.isoformat() if signed else 'at no time that it says'}, and this host has "
                f"seen a plan of this key signed {seen.isoformat()}: an older one was put back. Where that is meant, "
                f"sign it again: arcface plan push --sign-key PRIVATE.pem, or forget what was seen: rm "
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
                f"{self.folder / key} cannot be read ({exc}): it says which plan of this key was seen last. "
                f"Where that is meant, forget it: rm {self.folder / key}"
            ) from exc

    def _remember(self, key: str, signed: datetime) -> None:
        try:
            with new_file(self.folder / key) as temporary:
                temporary.write_text(signed.isoformat() + "\n")
        except OSError as exc:
            _log.warning("%s may not be written (%s): an older plan, put back, would not be noticed", self.folder, exc)
