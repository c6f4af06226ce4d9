# SPDX-License-Identifier: Apache-2.0
"""How modules are called, for the wrappers that stand around them: blocks take their input by position or by name, and
caches one by one, in lists, in tuples or in mlx-lm's `CacheList`."""

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.nn as nn

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@cache
def first_name(kind: type, method: str = "__call__") -> str | None:
    """What the class calls the first argument of `method`; wrappers, which pass on any arguments, are looked through.

    None where it takes none by name.
    """
    for base in kind.__mro__:
        if method in vars(base):
            names = list(inspect.signature(vars(base)[method]).parameters.values())[1:2]
            if names and names[0].kind is names[0].POSITIONAL_OR_KEYWORD:
                return names[0].name
    return None


def first(kind: type, args: Args, kwargs: Kwargs, method: str = "__call__") -> Any:
    """The first argument of a call, however it is given; None where there is none."""
    return args[0] if args else kwargs.get(first_name(kind, method) or "")


def with_first(kind: type, x: Any, args: Args, kwargs: Kwargs, method: str = "__call__") -> tuple[Args, Kwargs]:
    """The arguments with `x` in the place of the first."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, (first_name(kind, method) or "x"): x}


def caches(*values: Any) -> Iterator[Any]:
    """The caches among arguments, and those in lists, tuples and dictionaries of them; mlx-lm's or ours."""
    for value in values:
        if isinstance(value, nn.Module):
            continue
        if isinstance(value, list | tuple):
            yield from caches(*value)
        elif isinstance(value, dict):
            yield from caches(*value.values())
        elif hasattr(value, "caches"):
            yield from caches(*value.caches)
        elif hasattr(value, "update_and_fetch") or hasattr(value, "state"):
            yield value
