# SPDX-License-Identifier: Apache-2.0
"""One file per method, found by its name; `Method` says what it defines."""

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol

from ..batch import Batch, LossOutput, Scores
from ..errors import UserError


class Method(Protocol):
    """What a method file defines."""

    FORMAT: str
    """The data format its rows have (data.load)."""
    LEARNING_RATE: float
    """Default for LoRA; a tenth of it with --full."""
    Config: type

    @staticmethod
    def reference(config: Any) -> str | None:
        """Which reference log-probs the loss needs as extras["ref_logps"] float32 [R]: "init", "base" or None."""
        ...

    @staticmethod
    def loss(scores: Scores, batch: Batch, config: Any) -> LossOutput:
        """Sums over the units of this micro-batch."""
        ...


@dataclass(frozen=True)
class NoConfig:
    """For methods without settings of their own."""


def names() -> list[str]:
    """Every method there is."""
    return sorted(module.name for module in iter_modules(__path__))


def find(name: str) -> Any:
    """The module of a method; UserError naming those there are."""
    if name not in names():
        raise UserError(f"--method {name}: there is no such method; the methods are {', '.join(names())}")
    return import_module(f"{__name__}.{name}")
