# SPDX-License-Identifier: Apache-2.0
"""Reference log-probs as data: computed once per row by the policy itself, kept on disk, used by every later run.

A number is stored under the policy it is of (weights, adapter, config, dtype) and the row's key (its tokens and mask):
a changed model, adapter, template, length or row misses exactly the entries it must. The first number computed for a
row is the one that stays, so a run that goes on after a crash sees what it saw before.
"""

import json
import sqlite3
from collections.abc import Callable, Sequence
from hashlib import blake2b

import mlx.core as mx
import numpy as np

from . import blas, fingerprint, noise
from .batch import Batch, Example, placed, taken
from .cache import cache_dir
from .guard import Fault
from .policy import Policy

VERSION = 1  # raise it when the same policy gives the same row another number
FILE = "reference.sqlite"


class Reference:
    """Answers with the summed log-prob of every completion of a batch under the reference policy."""

    def __init__(
        self, policy: Policy, kind: str, base: str, say: Callable[[str], None], *, tokens: bool = False
    ) -> None:
        """kind: "init" or "base" (Policy.reference); base: fingerprint.base of the model; say: for the user.

        tokens: keep the log-prob of every token instead of their sum per completion.
        """
        self.policy, self.kind, self.say, self.tokens = policy, kind, say, tokens
        with policy.reference(kind):  # a fresh adapter says nothing yet, whatever its rank or seed
            plain = kind == "base" or kind == "init" and policy.starts_at_base
            adapter = "" if plain else fingerprint.adapters(policy.model)
        facts = [VERSION, base, adapter, str(policy.dtype), policy.config, *(["tokens"] if tokens else [])]
        facts += [policy.temperature] if policy.temperature != 1 else []
        facts += [str(mx.default_device().type), blas.in_use().name]  # a home folder may serve several machines
        facts += ["short products"] if noise.short_products() else []  # the same machine with MLX_ENABLE_TF32=0 too
        self.owner = blake2b(json.dumps(facts, default=str, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.memory: dict[str, np.ndarray] = {}  # what could not be stored
        self.store = self._open()
        self.computed = 0
        self.sealed = False

    def extras(self, examples: Sequence[Example], batch: Batch) -> dict[str, mx.array]:
        """What a loss reads: `ref_logps` float32 [R], or with `tokens` `ref_token_logps` [R, Lc], zero where masked."""
        if not self.tokens:
            return {"ref_logps": self.totals(examples, batch)}
        lengths = [len(c.tokens) for e in examples for c in e.completions]
        values = np.split(np.concatenate(self._answers(examples, batch)), np.cumsum(lengths)[:-1])
        return {"ref_token_logps": placed(batch, values)}

    def totals(self, examples: Sequence[Example], batch: Batch) -> mx.array:
        """float32 [R], nats, summed over the trained tokens; rows not stored are computed through the same batch."""
        return mx.array(np.concatenate(self._answers(examples, batch)))

    def _answers(self, examples: Sequence[Example], batch: Batch) -> list[np.ndarray]:
        """The numbers of each example: one per completion, or with `tokens` one per completion token."""
        found = [self.find(example) for example in examples]
        if any(values is None for values in found):
            if self.sealed:
                raise Fault("the reference's numbers are lost and the policy has moved; --resume computes them again")
            with self.policy.reference(self.kind):
                fresh = self._fresh(examples, batch)
            new = {e.key: own for e, own, old in zip(examples, fresh, found, strict=True) if old is None}
            self._keep(new)
            found = [new.get(e.key, old) for e, old in zip(examples, found, strict=True)]
        return [values for values in found if values is not None]

    def _fresh(self, examples: Sequence[Example], batch: Batch) -> list[np.ndarray]:
        if not self.tokens:
            counts = [len(example.completions) for example in examples]
            return np.split(np.array(self.policy.totals(batch)).astype("<f4"), np.cumsum(counts)[:-1])
        lengths = [len(c.tokens) for e in examples for c in e.completions]
        rows = iter(taken(batch, self.policy.token_logps(batch), lengths))
        return [np.concatenate([next(rows) for _ in e.completions]) for e in examples]

    def _size(self, example: Example) -> int:
        return sum(len(c.tokens) if self.tokens else 1 for c in example.completions)

    def seal(self) -> None:
        """From here on the policy is no longer able to answer: full fine-tuning has moved it."""
        self.sealed = True

    def close(self) -> None:
        """Leave the cache as one file."""
        if self.store:
            self.store.close()
            self.store = None

    def find(self, example: Example) -> np.ndarray | None:
        """float32 [completions] (with `tokens`: [their tokens]) as stored, or None."""
        values = self.memory.get(example.key)
        if values is None and self.store:
            query = "select value from logps where owner = ? and row = ?"
            try:
                row = self.store.execute(query, (self.owner, example.key)).fetchone()
            except sqlite3.DatabaseError as error:
                self._give_up(error)
                return None
            values = np.frombuffer(row[0], "<f4") if row and len(row[0]) % 4 == 0 else None
        return values if values is not None and len(values) == self._size(example) else None

    def _keep(self, new: dict[str, np.ndarray]) -> None:
        self.computed += len(new)
        if self.store:
            rows = [(self.owner, key, values.tobytes()) for key, values in new.items()]
            try:
                with self.store:
                    self.store.executemany("insert or replace into logps values (?, ?, ?)", rows)
                return
            except sqlite3.DatabaseError as error:
                self._give_up(error)
        self.memory |= new

    def _open(self) -> sqlite3.Connection | None:
        """The store; a damaged one is begun anew, one that cannot be written is done without."""
        path = cache_dir() / FILE
        for attempt in range(2):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                store = sqlite3.connect(path, timeout=60)
                store.execute("pragma journal_mode = wal")
                store.execute("pragma synchronous = normal")  # a commit per micro-batch need not wait for the disk
                store.execute(
                    "create table if not exists logps (owner text, row text, value blob, primary key (owner, row))"
                )
                store.execute("select owner, row, value from logps limit 1").fetchone()
                return store
            except (sqlite3.DatabaseError, OSError) as error:
                if attempt or isinstance(error, sqlite3.OperationalError | OSError) and "column" not in str(error):
                    self._give_up(error)
                    return None
                self.say(f"the reference cache {path} is damaged ({error}); it is begun anew")
                for name in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
                    (path.parent / name).unlink(missing_ok=True)
        return None

    def _give_up(self, error: Exception) -> None:
        """Go on without the disk: this run's numbers are kept in memory."""
        self.say(
            f"the reference cache {cache_dir() / FILE} cannot be used ({error}); its numbers are kept in memory, for "
            "this run only. Delete the file, or set MLX_REALIGN_CACHE to another folder"
        )
        self.store = None
