# SPDX-License-Identifier: Apache-2.0
"""Preventative steering: a direction is added while gradients are computed, and not when the model is used.

Training data that pushes a model along a direction meets a model that is there already, so the weights need not learn
it (Persona vectors, arXiv:2507.21509). Only forward passes with a gradient are steered: evaluations, measurements of
the KL and the adapter that is saved are those of the model without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

from ..policy import Policy
from .apply import steer
from .asked import SteerFlags, steers_of


class TrainWith:
    """Steering that is on inside `gradients()` only; nothing without --steer. `remove` takes it off the model."""

    def __init__(self, policy: Policy, text: str | None) -> None:
        """text: FILE or FILE:coefficient, several with commas between them. UserError for what cannot be used."""
        files = tuple(part.strip() for part in (text or "").split(",") if part.strip())
        self.steers = steers_of(SteerFlags(steer=files), policy, force=None)
        self.steering = steer(policy, *self.steers) if self.steers else None
        if self.steering:
            self.steering.off()

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Inside, the policy is steered."""
        if self.steering is None:
            yield
            return
        self.steering.on()
        try:
            yield
        finally:
            self.steering.off()

    def remove(self) -> None:
        """Take it off the model; twice does nothing."""
        if self.steering:
            self.steering.remove()

    @property
    def identity(self) -> str:
        """Which numbers are added where; a run that goes on must have the same. "" for none."""
        digest = blake2b(digest_size=12)
        for one in self.steers:
            digest.update(repr((one.coefficient, one.operator, one.at, one.positions, one.unit)).encode())
            for block in one.at:
                digest.update(one.direction.vectors[block].tobytes())
        return digest.hexdigest() if self.steers else ""
