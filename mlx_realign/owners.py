# SPDX-License-Identifier: Apache-2.0
"""Which policy a model serves: one at a time."""

import gc
import weakref
from typing import Any

from .errors import UserError

alive: weakref.WeakSet[Any] = weakref.WeakSet()  # every policy that somebody holds


def refuse_second(model: Any) -> None:
    """UserError where a policy has this model: a second would freeze what the first trains, and share its adapter."""
    others = lambda: [one for one in alive if one.model is model and not one.kernels.closed]  # noqa: E731
    if others() and gc.collect() >= 0 and others():  # one that nobody holds may still be in a cycle
        raise UserError(
            f"this model serves the policy {others()[0].name!r} already, and two would train and switch the same "
            "modules: use that one, call its close() first, or load the model again."
        )
