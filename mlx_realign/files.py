# SPDX-License-Identifier: Apache-2.0
"""New files and folders: written under another name, renamed when complete, never over one that exists.

A folder is held while it is written, so that of two commands that are to write it the second is refused at once.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from . import locks
from .errors import UserError

WRITER = "Unable to write"  # what MLX says when a file cannot take more

DRAFT = ".mlx-realign.draft"


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that exists once the block has ended without an error; UserError where it exists already."""
    with new_path(path) as draft, open_rows(draft) as file:
        yield file


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name once the block has ended without an error; an empty one may exist.

    What a process that was killed left of it is removed. UserError where the folder exists, another process is writing
    it, or it cannot be written.
    """
    require_new_folder(path)
    whole = path.absolute()  # "." has no name of its own
    stays = whole.is_dir() and (os.path.ismount(whole) or whole.samefile(Path.cwd()))  # nothing can take its name
    stays = stays or (whole / DRAFT).exists()
    draft = whole / DRAFT if stays else whole.with_name(f".{whole.name}.draft")
    with locks.only_writer(draft, f"--output {path}"):
        try:
            for left in draft.iterdir():
                if left.name != locks.NAME:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield draft
            if stays:
                for made in draft.iterdir():
                    if made.name != locks.NAME:
                        made.rename(whole / made.name)
            else:
                os.replace(draft, path)
                (path / locks.NAME).unlink()
        except (OSError, RuntimeError) as error:
            if told := _told(error, path, draft):
                raise told from error
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A name with the same ending to write a file under, which then becomes `path`; UserError where that exists."""
    _require_new(path)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        _name(draft, path)
    except (OSError, RuntimeError) as error:
        if told := _told(error, path, draft):
            raise told from error
        raise
    finally:
        if draft.is_file():
            draft.unlink()


def open_rows(path: Path) -> TextIO:
    """For JSON lines: half a character, which UTF-8 cannot hold, becomes JSON's own escape of it."""
    return open(path, "w", encoding="utf-8", errors="backslashreplace")


def write_rows(file: TextIO, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def require_new_folder(path: Path) -> None:
    """UserError where a path is there and is no empty folder."""
    if path.exists() and not (path.is_dir() and not path.is_symlink() and all(x.name == DRAFT for x in path.iterdir())):
        raise UserError(f"--output {path}: exists and is not an empty folder. Give a new one.")


def _name(draft: Path, path: Path) -> None:
    """Give a draft its name, which nobody has taken in the meantime."""
    try:
        os.link(draft, path)  # renaming would replace a file that another process has just written
    except FileExistsError:
        _require_new(path)
    except OSError:  # a file system without links
        _require_new(path)
        os.rename(draft, path)


def _told(error: OSError | RuntimeError, path: Path, draft: Path) -> UserError | None:
    """What to say where it is the output that could not be written; None for errors of something else."""
    reason = ""
    if isinstance(error, RuntimeError):  # MLX's writer, which knows no reason
        reason = f"is the disk full? ({error})" if WRITER in str(error) else ""
    else:
        named = "" if error.filename is None else os.path.abspath(os.fsdecode(error.filename))
        mine = not named or named.startswith((os.path.abspath(draft), os.path.abspath(path)))
        reason = error.strerror or str(error) if mine or Path(named) in path.absolute().parents else ""
    return UserError(f"--output {path}: cannot be written: {reason}") if reason else None


def _require_new(path: Path) -> None:
    locks.refuse_name(path, f"--output {path}")
    if path.exists():
        raise UserError(f"--output {path}: exists already. Give a new name.")
