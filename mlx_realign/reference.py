# SPDX-License-Identifier: Apache-2.0
"""Reference log-probs as data: computed once per row by the policy itself, kept on disk, used by every later run.

A number is stored under the policy it is of (weights, starting adapter, dtype) and the row's key (its tokens and mask):
a changed model, adapter, template, length or row misses exactly the entries it must.
"""

import hashlib
import sqlite3
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .batch import Batch, Example
from .data import cache_dir
from .loading import weights_hash
from .policy import Policy

ADAPTER = ("lora_a", "lora_b", "m")


class Reference:
    """Answers with the summed log-prob of every completion of a batch under the reference policy."""

    def __init__(self, policy: Policy, kind: str) -> None:
        self.policy, self.kind = policy, kind
        with policy.reference(kind):
            unmoved = (
                kind == "base" or policy.starts_at_base
            )  # then the adapter says nothing, whatever its rank or seed
            owner = f"{weights_hash(policy.model, ADAPTER if unmoved else ())} {policy.dtype}"
        self.owner = hashlib.sha256(owner.encode()).hexdigest()[:32]
        cache_dir().mkdir(parents=True, exist_ok=True)
        self.store = sqlite3.connect(cache_dir() / "reference.sqlite", timeout=60)
        self.store.execute(
            "create table if not exists logps (owner text, row text, value blob, primary key (owner, row))"
        )
        self.computed = 0

    def totals(self, examples: Sequence[Example], batch: Batch) -> mx.array:
        """float32 [R], nats, summed over the trained tokens; rows not stored are computed through the same batch."""
        found = [self._find(example) for example in examples]
        if any(values is None for values in found):
            with self.policy.reference(self.kind):
                fresh = np.array(self.policy.totals(batch))
            counts = [len(example.completions) for example in examples]
            found = np.split(fresh, np.cumsum(counts)[:-1])
            rows = [(self.owner, e.key, v.astype("<f4").tobytes()) for e, v in zip(examples, found, strict=True)]
            with self.store:
                self.store.executemany("insert or replace into logps values (?, ?, ?)", rows)
            self.computed += len(rows)
        return mx.array(np.concatenate(found))

    def _find(self, example: Example) -> np.ndarray | None:
        query = "select value from logps where owner = ? and row = ?"
        row = self.store.execute(query, (self.owner, example.key)).fetchone()
        values = np.frombuffer(row[0], "<f4") if row else None
        return values if values is not None and len(values) == len(example.completions) else None
