# SPDX-License-Identifier: Apache-2.0
"""`--verifier` text -> which file, function and argument. Files are read with ast, never imported: see worker.py."""

import ast
import difflib
import importlib.util
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..errors import UserError

FOLDER = Path(__file__).parent
TIMEOUT_S, COST_S = 5.0, 0.05  # of a verifier that does not say
_PARSER = Lock()  # CPython 3.11's ast.parse counts its depth for all threads together and fails where two parse at once


class Verdict(NamedTuple):
    """What one verifier said of one completion."""

    score: float | None
    """In [0, 1]; None: the verifier does not apply to the row, or (reason "not_reached") never came to it."""
    reason: str = ""
    """"" for a plain score, else why it is 0: "timeout", "memory", "died", "error", "too_long", or a verifier's own."""


class Verifier(NamedTuple):
    """A verifier as the command line names it."""

    spec: str
    name: str  # file name, or the function's where the file is the user's
    argument: str
    shaping: bool
    timeout_s: float
    path: str = ""  # of the user's own file, absolute; "" for those of this folder
    function: str = "verify"
    cost_s: float = COST_S


def names() -> list[str]:
    """Every verifier here: the files of this folder that define `verify`."""
    return list(_names())


def find(spec: str) -> Verifier:
    """The verifier that a text like "math", "format:answer" or "path/to/file.py:function" names.

    UserError where there is none of that name, where the file or function is missing, or where the extra is.
    """
    spec = spec.strip()
    if ".py:" in spec or spec.endswith(".py"):
        return _own(spec)
    name, _, argument = spec.partition(":")
    if name not in _names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(
            f"--verifier {spec}: there is no verifier {name!r}{hint} There are {', '.join(names())}, "
            f"or give your own as path/to/file.py:function"
        )
    tree = _tree(FOLDER / f"{name}.py")
    missing = [module for module in _constant(tree, "NEEDS", ()) if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"--verifier {spec}: needs {', '.join(missing)}, not installed: pip install 'mlx-realign[verifiers]'"
        )
    shaping, timeout_s, cost_s = _constants(spec, tree)
    return Verifier(spec, name, argument, shaping, timeout_s, cost_s=cost_s)


def split(text: str) -> list[str]:
    """The verifiers of a comma-separated text; a comma within an argument stays: "math,format:think,answer" -> two.

    What follows a comma belongs to the argument before it unless it has a colon or nearly is the name of a verifier.
    """
    found: list[str] = []
    for part in text.split(","):
        own = ":" in part or ".py" in part or difflib.get_close_matches(part.strip(), _names(), 1, 0.75)
        if found and ":" in found[-1] and not own:
            found[-1] += "," + part
        elif part.strip():
            found.append(part.strip())
    return found


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    paths = sorted(FOLDER.glob("*.py"))
    return tuple(path.stem for path in paths if "\ndef verify(" in path.read_text(encoding="utf-8"))


def _parse(path: Path) -> ast.Module:
    with _PARSER:
        return ast.parse(path.read_bytes(), filename=str(path))


_tree = lru_cache(maxsize=64)(_parse)  # of our own files, which do not change


def _own(spec: str) -> Verifier:
    """The user's file.py, file.py:function or file.py:function:argument."""
    stem, _, rest = spec.partition(".py")
    function, _, argument = rest.removeprefix(":").partition(":")
    function = function or "verify"
    path = Path(stem + ".py").expanduser().resolve()
    if not path.is_file():
        raise UserError(f"--verifier {spec}: there is no file {path}")
    try:
        tree = _parse(path)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--verifier {spec}: {path} is not Python: {error}") from error
    _require_function(spec, path, tree, function)
    shaping, timeout_s, cost_s = _constants(spec, tree)
    name = path.stem if function == "verify" else function
    return Verifier(spec, name, argument, shaping, timeout_s, str(path), function, cost_s)


def _require_function(spec: str, path: Path, tree: ast.Module, function: str) -> None:
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if function not in functions:
        if function in _bound(tree):
            return  # imported or assigned: what it is shows when the worker loads it
        raise UserError(
            f"--verifier {spec}: {path} has no function {function!r} (it has {', '.join(functions) or 'none'}); "
            f"expected def {function}(completion, row, argument='')"
        )
    takes = functions[function].args
    positional = [*takes.posonlyargs, *takes.args]
    needed = len(positional) - len(takes.defaults)
    if needed > 3 or (len(positional) < 2 and not takes.vararg) or any(d is None for d in takes.kw_defaults):
        raise UserError(
            f"--verifier {spec}: {path}:{functions[function].lineno}: expected def {function}(completion, row) or "
            f"def {function}(completion, row, argument='')"
        )


def _bound(tree: ast.Module) -> set[str]:
    """Names that imports and assignments at the top of the file bind."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def _constants(spec: str, tree: ast.Module) -> tuple[bool, float, float]:
    shaping = _constant(tree, "SHAPING", False)
    timeout_s, cost_s = _constant(tree, "TIMEOUT_S", TIMEOUT_S), _constant(tree, "COST_S", COST_S)
    for name, value in (("TIMEOUT_S", timeout_s), ("COST_S", cost_s)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600:
            raise UserError(f"--verifier {spec}: {name} is {value!r}; expected a number of seconds, at most 3600")
    return bool(shaping), float(timeout_s), float(cost_s)


def _constant(tree: ast.Module, name: str, default: Any) -> Any:
    """A literal assigned to a name at the top of the file."""
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                return ast.unparse(node.value)  # not a literal: shown in the message about it
    return default
