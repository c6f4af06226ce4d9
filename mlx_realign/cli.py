# SPDX-License-Identifier: Apache-2.0
"""`mlx-realign <name> ...`: a command is a file of this package with a `main(argv)`, found by its name.

`mlx-realign train` runs mlx_realign/train.py, `mlx-realign data` runs mlx_realign/data/__main__.py, and
`python -m mlx_realign.train` is the same. Exit codes: 0 done, 1 a fault, 2 the user's input is wrong, 130 interrupted
(143 by SIGTERM, 129 by SIGHUP).
"""

import errno
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from . import blas, ends, streams, terminal
from .errors import UserError
from .flags import nearest

PACKAGE = Path(__file__).parent
# Patterns, and not Python's parser: it would take longer over the package than all that `mlx-realign --help` does.
MAIN = re.compile(r"^def main\(", re.MULTILINE)
NOBODYS_HOME = (
    "a path begins with ~, and that home is not known. Write the whole path, in flags and files as in the variables "
    "HOME and MLX_REALIGN_CACHE"
)
DOCSTRING = re.compile(r'(?:#.*\n)*"""(.*?)(?:"""|\n)')


def entry(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run(_dispatch, words)


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main` and returns its exit code. A UserError is one message on standard error and code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with streams.surviving(), terminal.shown(), ends.raised():
            return _code(main, words)
    except OSError as error:
        if error.filename != streams.NAME:
            raise
        print(f"error: {streams.NAME}: {error.strerror}", file=sys.stderr)
        return 1


def _code(main: Callable[[list[str]], int | None], words: list[str]) -> int:
    try:
        with blas.told_by_command():
            return main(words) or 0
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "home directory" not in str(error):  # of Path.expanduser, which says no more
            raise
        sys.stdout.flush()
        print(f"error: {NOBODYS_HOME}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)  # a command may say what it keeps
        return ends.code(stop)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone: nothing is wrong
        return 0
    except OSError as error:  # a full disk, a folder that may not be written to: no fault of the program
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        sys.stdout.flush()
        print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2 if isinstance(error, PermissionError) else 1


def commands() -> dict[str, tuple[str, str]]:
    """Name -> (module, first line of its docstring). Files are read, not imported: MLX takes half a second."""
    found = {}
    for path in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__main__.py")]):
        text = path.read_text(encoding="utf-8")
        if path.stem == "cli" or not MAIN.search(text):
            continue
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        name = path.parent.name if path.stem == "__main__" else path.stem
        said = DOCSTRING.match(text)
        found[name] = (module, said[1] if said else "")
    return found


def _dispatch(words: list[str]) -> int | None:
    known = commands()
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, known), default=0)
        print("usage: mlx-realign COMMAND [flags]\n\nRealign a language model with MLX. COMMAND --help says more.\n")
        for name, (_, doc) in known.items():
            print(f"  {name:<{width}}  {doc}")
        return 0
    if words[0] == "--version":
        print(", ".join(f"{name} {metadata.version(name)}" for name in ("mlx-realign", "mlx", "mlx-lm")))
        if line := blas.in_use().line():
            print(line)
        return 0
    if words[0] not in known:
        raise UserError(f"no command {words[0]!r}.{nearest(words[0], known)} There are: {', '.join(known)}.")
    module = importlib.import_module(known[words[0]][0])
    return module.main(words[1:])
