# SPDX-License-Identifier: Apache-2.0
"""One writer at a time in a folder: a file in it that the system holds locked for as long as its process lives.

The lock is the system's (flock), so a process that is killed lets go; the file only says who holds it. Where a file
system knows no locks, the file alone is judged: by its process, if that ran on this machine.
"""

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

NAME = ".lock"
HELD = (errno.EWOULDBLOCK, errno.EACCES)  # any other refusal: a file system without locks


@contextmanager
def only_writer(folder: Path, named: str = "") -> Iterator[str | None]:
    """Make a folder and hold it against other processes; it goes again if it was made here and is still empty.

    named: what messages call it, by default `--output FOLDER`.

    Yields a sentence where the one that wrote there before ended without letting go. UserError, which names its process
    and machine, where another is at work, and where nothing can be written.
    """
    named, made = named or f"--output {folder}", not folder.exists()
    refuse_name(folder, named)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, left = _take(folder / NAME, named)
    except (FileExistsError, NotADirectoryError) as error:
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        where, what = "" if there == folder else f"{there} ", "a file" if there.exists() else "a link to nothing"
        raise UserError(f"{named}: {where}is {what}; name a folder") from error
    except OSError as error:
        raise UserError(f"{named}: cannot be written: {error.strerror or error}") from error
    try:
        yield left
    finally:
        if _same_file(handle, folder / NAME):
            (folder / NAME).unlink()  # while it is held: who has opened it sees that it has gone
        os.close(handle)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def refuse_name(path: Path, named: str) -> None:
    """UserError for a path to write to whose bytes are no UTF-8: MLX's writers take no other, and would fail late."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"{named}: the path is not valid UTF-8. Give another name") from None


def _take(path: Path, named: str) -> tuple[int, str | None]:
    """The open lock file, held, with this process in it; and what is to be said of the one before."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            holder = _holder(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in HELD or not _gone(holder):
                    raise UserError(_held(path, named, holder)) from None
            if _same_file(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
                return handle, _ended(holder) if holder else None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _holder(handle: int) -> dict[str, Any]:
    """What the file says of its process, {} where it says nothing."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return found if isinstance(found, dict) else {}
    except (ValueError, RecursionError):
        return {}


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')} (since {holder.get('since', '?')})"


def _held(path: Path, named: str, holder: dict[str, Any]) -> str:
    own = "" if holder.get("host") == platform.node() else f", or, if that process is gone, delete {path}"
    return f"{named}: {_who(holder)} is writing there. Wait for it, name another folder{own}"


def _ended(holder: dict[str, Any]) -> str:
    return f"{_who(holder)} wrote there before and ended without finishing"


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the process that a file names is known to be gone; one on another machine is not."""
    if not holder:
        return True
    if holder.get("host") != platform.node() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _same_file(handle: int, path: Path) -> bool:
    """Whether the path still is the open file: its holder may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
