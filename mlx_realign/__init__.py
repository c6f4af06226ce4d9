# SPDX-License-Identifier: Apache-2.0
"""Realign language models with MLX: supervised and preference methods over one shared-prefix policy."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .blas import for_a_command, load_fast_blas

__version__ = "0.1.0"

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "MLX has no backend on this machine. Install one: pip install 'mlx-realign[cpu]' (Linux CPU), "
        "pip install 'mlx-realign[cuda]' (Linux, NVIDIA), pip install mlx-realign (macOS, Apple silicon)."
    ) from error
try:
    load_fast_blas()
except KeyboardInterrupt:  # while a library proves itself: a command ends as it does anywhere else, see cli.run
    if not for_a_command():
        raise
    print("interrupted", file=sys.stderr)
    raise SystemExit(130) from None

if TYPE_CHECKING:
    from . import losses as losses
    from .policy import Policy as Policy
    from .steering.apply import steer as steer
    from .train import train as train

_HOMES = {"Policy": "policy", "train": "train", "UserError": "errors"}


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `mlx-realign --help` does not wait for a model library."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
