# SPDX-License-Identifier: Apache-2.0
"""Functions exchanged in the modules of one model, and nowhere else.

A module's class is swapped for a subclass with copies of those methods that call one of the functions: the same code,
but with globals in which its name means ours. A method that is one of the functions is ours itself. A function is known
by what it is, never by its name: other models have functions of the same name with another meaning. Parameter paths
stay, and the original classes are never touched.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import update_wrapper
from types import CodeType, FunctionType
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

Function = Callable[..., Any]


class Switch:
    """The exchanged functions of one model. on: False lets mlx-lm's own functions run, as does `close` for good."""

    def __init__(self) -> None:
        self.on, self.closed = True, False
        self.notes: list[str] = []
        self.attended: Counter[tuple[int, str]] = Counter()  # attention calls by head size and kind of mask
        self._put: list[tuple[Function, Function]] = []  # (the function, what is called in its place)
        self._classes: dict[type, type] = {}
        self._made: set[type] = set()
        self._helpers: dict[FunctionType, FunctionType] = {}
        self._modules: list[Any] = []
        self._modes: list[Any] = []  # modules that `close` puts into evaluation mode
        self._own: list[tuple[Any, str, Any, Any]] = []  # (module, name, what was there, its copy)

    def put(self, function: Function, ours: Function) -> None:
        """Call `ours` in the place of `function`; it looks at `on` itself."""
        self._put.append((function, ours))

    def take(self, model: Any) -> None:
        """Exchange the functions in all modules of a model (an mlx.nn.Module).

        One without parameters may be part of other models too, as the default of an argument (mlx-lm's experts share
        their activation): the model gets a copy of it.
        """
        copies: dict[int, Any] = {}
        for parent in model.modules():
            for name, module in parent.items():
                wanted = isinstance(module, nn.Module) and self._class(module) is not type(module)
                if wanted and not tree_flatten(module.parameters()):
                    own = copies.setdefault(id(module), copy(module))
                    parent[name] = own
                    self._own.append((parent, name, module, own))
        for module in model.modules():
            if (kind := self._class(module)) is not type(module):
                module.__class__ = kind
                self._modules.append(module)

    def put_back(self, modules: list[Any]) -> None:
        """Have `close` put these into evaluation mode, where they were."""
        self._modes += modules

    def close(self) -> None:
        """Give the modules their classes back; one that was wrapped since keeps it, with mlx-lm's function inside."""
        self.on, self.closed = False, True
        for module in self._modules:
            if type(module) in self._made:
                module.__class__ = vars(type(module))["switched_from"]
        for parent, name, module, own in self._own:
            if parent.get(name) is own and type(own) is type(module):
                parent[name] = module
        for module in self._modes:
            module._training = False
        self._modules, self._own, self._modes = [], [], []

    def _class(self, module: nn.Module) -> type:
        kind = type(module)
        if kind in self._made:  # a part of the model in two places
            return kind
        if kind not in self._classes:
            self._classes[kind] = self._rebound(kind)
        return self._classes[kind]

    def _rebound(self, kind: type) -> type:
        """A subclass whose methods call ours, or the class itself where none calls one of the functions."""
        methods: dict[str, Any] = {}
        hidden: set[str] = set()  # methods that a class before has in the place of these
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            if "switched_from" in vars(base):
                continue  # of another switch: go by what it was made from
            for name, method in vars(base).items():
                if name not in hidden and isinstance(method, FunctionType) and (new := self._with_ours(method)):
                    methods[name] = new
            hidden |= vars(base).keys()
        if not methods:
            return kind
        body = {"switched_from": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__, **methods}
        self._made.add(made := type(kind.__name__, (kind,), body))
        return made

    def _with_ours(self, function: FunctionType) -> FunctionType | None:
        """Ours, or a copy of a function that calls ours, itself or by functions beside it; None where it calls none."""
        for original, ours in self._put:
            if function is original:
                return ours  # type: ignore[return-value]
        if new := self._found(function):
            return _exchanged(function, new)
        return None

    def _found(self, function: FunctionType) -> Mapping[str, Any]:
        """Which global names of a function's code mean something else in its copy."""
        found: dict[str, Any] = {}
        for name in set(_names(function.__code__)):
            value = function.__globals__.get(name)
            for original, ours in self._put:
                if value is original:
                    found[name] = ours
            beside = isinstance(value, FunctionType) and value.__globals__ is function.__globals__
            if beside and value is not function and (helper := self._helper(value)):
                found[name] = helper
        return found

    def _helper(self, function: FunctionType) -> FunctionType | None:
        if function not in self._helpers:
            self._helpers[function] = function  # while it is looked at: helpers may call each other
            self._helpers[function] = self._with_ours(function) or function
        helper = self._helpers[function]
        return None if helper is function else helper


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _exchanged(function: FunctionType, new: Mapping[str, Any]) -> FunctionType:
    own = {**function.__globals__, **new}
    made = FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    if own.get(function.__name__) is function:
        own[function.__name__] = made  # it may call itself
    return update_wrapper(made, function)  # type: ignore[return-value]
