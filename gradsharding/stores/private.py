"""A directory that only this user can enter, or a refusal: others who can write there could swap its files."""

import os
from pathlib import Path
from stat import S_IMODE, S_ISDIR

from gradsharding.errors import StoreRefused


def private_directory(path: Path, remedy: str) -> Path:
    """Create ``path`` with mode 0700, or check that it is this user's directory, closed to others and no link; return it.

    Raise StoreRefused otherwise; ``remedy`` ends its message and says what to do instead of using this directory.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        found = path.lstat()
        if not S_ISDIR(found.st_mode):
            raise StoreRefused(
                f"{path} is a link or a file, but gradsharding needs a directory of its own there; {remedy}", path=str(path)
            ) from None
        if found.st_uid != os.geteuid():
            owners = f"{path} belongs to uid {found.st_uid}, not to uid {os.geteuid()}, which would keep private files in it"
            raise StoreRefused(f"{owners}; {remedy}", path=str(path)) from None
        if S_IMODE(found.st_mode) & 0o077:
            raise StoreRefused(
                f"{path} has mode {S_IMODE(found.st_mode):o}, which lets other users in; run chmod 700 on it if only you have used it, "
                f"or {remedy}",
                path=str(path),
            ) from None
    return path
