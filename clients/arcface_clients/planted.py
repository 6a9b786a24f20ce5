"""Whether a file that was found and not named may have been put there by another user of the host."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from arcface_clients.errors import WrongUse


def refuse_planted(path: Path, folder: Path, instead: str) -> None:
    """Refuse what somebody else put where anybody may, as in /tmp, or above the current folder.

    In the current folder, if not everybody may write there, what is found belongs to it, as a volume does. Above it,
    what belongs to this user, to root or to the owner of the current folder does.

    Args:
        path: what was found.
        folder: where it was looked for: the current folder, or one above.
        instead: how to name what is meant.

    Raises:
        WrongUse: that is so.
    """
    links = [folder / part for part in (path.relative_to(folder), *path.relative_to(folder).parents[:-1])]
    owners = {found.st_uid for each in links for found in (each.lstat(), each.stat())} - {os.getuid(), 0}
    everybodys, here = folder.stat().st_mode & stat.S_IWOTH, Path.cwd()
    if not everybodys and folder.samefile(here):
        return
    if not everybodys:
        owners -= {here.stat().st_uid}
    if owners:
        raise WrongUse(
            f"{path} belongs to another user (uid {min(owners)}), who may have put it there for this command to find. "
            f"If it is what you mean, name it: {instead}"
        )
