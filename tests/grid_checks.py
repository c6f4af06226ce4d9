# SPDX-License-Identifier: Apache-2.0
"""The grid: what this project does with a model of every architecture, each thing held against stock mlx-lm.

A cell is a number, the largest difference found (at most LIMIT is right), or "refused: ..." with the one line that a
user is told, or "fails: ..." with whatever else was raised. What would prove nothing (an adapter or a vector that moves
nothing) fails too.
"""

import gc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from grid_models import (
    WIDTH,
    Hand,
    Listened,
    examples,
    load_stock,
    logits,
    pristine,
    prompts,
    stock_gradient,
    stock_logps,
    write_folder,
)
from mlx.utils import tree_map
from policy_tools import gap

from mlx_realign import adapter, compiled, data, forward, layout, selfcheck, vectors, writers
from mlx_realign.ablation import edit, variants
from mlx_realign.batch import Batch, LossOutput, Scores, taken
from mlx_realign.config import TrainSettings
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.rollout import rollout
from mlx_realign.sampling import Sampling
from mlx_realign.steering.apply import steer

LIMIT = 1e-4
MOVES = 1e-2  # what an adapter or a vector does is at least this large, in nats or logits
Cell = Any  # a number or a sentence; a pair of numbers where a check says what two differ by
Write = Callable[[Path, str], Path]


class Case:
    """A policy whose adapter has moved, and mlx-lm's model with that adapter."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.dtype = mx.float32 if settings.get("dtype") == "float32" else None  # of mlx-lm's model: as it is stored
        about: dict[str, Any] = {"model": str(folder), "data": "x", "lora_rank": 4, "lora_alpha": 8.0, **settings}
        self.policy = Policy.from_settings(TrainSettings(**about))
        self.model = self.policy.model
        forward.checkpoint_layers(self.model)
        self.checks = selfcheck.run(self.policy)
        self.checkpointed = any(getattr(layer, "recomputed", False) for layer in forward.layers_of(self.model))
        forward.uncheckpoint_layers(self.model)
        state = enumerate(adapter.state(self.model).items())
        moved = [(name, x + 0.05 * mx.random.normal(x.shape, key=mx.random.key(i))) for i, (name, x) in state]
        self.model.load_weights(moved, strict=False)
        self.policy.mark_start()
        self.stock = load_stock(folder, self.saved("adapter"), self.dtype)
        self.examples = examples()
        self.batch = data.collate(self.examples)
        self.slopes: dict[str, np.ndarray] = {}  # by stock mlx-lm
        self.traces = 0  # of compiled gradients, those forgotten too

    def batches(self) -> list[Batch]:
        """The examples as a run lays them out."""
        if not self.policy.exact:
            return [self.batch]
        every, options = [np.arange(len(self.examples))], layout.options(self.policy)
        made = layout.of_rows(self.examples, lambda _: every, 1, **options)  # pyright: ignore[reportArgumentType]
        return [made.lay(part) for part in made.parts(self.examples)]

    def logps(self) -> list[np.ndarray]:
        """Of every completion, token by token."""
        lengths = iter([len(c.tokens) for e in self.examples for c in e.completions])
        found = []
        for batch in self.batches():
            own = [next(lengths) for _ in range(batch.mask.shape[0])]
            found += taken(batch, self.policy.scores(batch).logps, own)
        return found

    def gradient(self) -> dict[str, Any]:
        """Summed over the batches."""
        parts = [self.policy.gradients(batch, weighed_loss)[1] for batch in self.batches()]
        return tree_map(lambda *slopes: sum(slopes[1:], slopes[0]), *parts)

    def forget(self) -> None:
        """Traces hold the way that rows were computed when they were made: after a change of it there are new ones."""
        if self.policy.compiled:
            self.traces += self.policy.traces
            self.policy.compile()

    def saved(self, name: str) -> Path:
        """The adapter as it stands, in a folder for mlx-lm."""
        adapter.save(self.model, self.folder / name, base_model=str(self.folder))
        return self.folder / name

    def note(self, about: str) -> str:
        """The line a user is told when the load-time check gives something up; empty where it does not."""
        return next((line for line in self.checks.notes if about in line), "")


# ------------------------------------------------------------------ training


def log_probs(case: Case) -> float:
    """Of unequal prompts with several completions; with prompts shared, and each row alone."""
    expected = [
        np.where(c.mask, stock_logps(case.stock, e.prompt, c.tokens), 0) for e in case.examples for c in e.completions
    ]
    with case.policy.adapter_off():
        without = case.logps()
    assert _worst(without, expected) > MOVES, "the adapter moves nothing"
    found = [case.logps()]
    if case.policy.sharing:
        found.append(_alone(case, case.logps))
    return max(_worst(one, expected) for one in found)


def gradient(case: Case) -> float:
    """As the policy trains: prompts shared where they can be."""
    case.slopes = stock_gradient(case.stock, case.examples, weights)
    return gap(case.gradient(), case.slopes)


def gradient_alone(case: Case) -> float | None:
    """With each row alone, where that is not what the policy does anyway."""
    if not case.policy.sharing:
        return None
    return gap(_alone(case, case.gradient), case.slopes)


def gradient_checkpointed(case: Case) -> float:
    """With layers recomputed."""
    if not case.checkpointed:
        raise UserError(case.note("checkpointing"))
    forward.checkpoint_layers(case.model)
    case.forget()
    try:
        return gap(case.gradient(), case.slopes)
    finally:
        forward.uncheckpoint_layers(case.model)
        case.forget()


def weights(tokens: mx.array) -> mx.array:
    """Each token weighs something else, so that no error cancels."""
    return mx.cos(5 + tokens.astype(mx.float32))


def weighed_loss(scores: Scores, batch: Batch) -> LossOutput:
    total = (weights(batch.completion) * scores.logps).sum()
    return LossOutput(total, batch.mask.sum().astype(mx.float32), {})


def _alone(case: Case, run: Callable[[], Any]) -> Any:
    case.policy.sharing = False
    case.forget()
    try:
        return run()
    finally:
        case.policy.sharing = True
        case.forget()


def _worst(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(row - e).max()) for row, e in zip(found, expected, strict=True))


# ------------------------------------------------------------------ rollouts


def rollouts(case: Case) -> float:
    """Log-probs that completions were sampled with, of unequal prompts; and how far greedy tokens are from the best."""
    asked, sampling = prompts(17, 2, 1, 9), Sampling(max_new_tokens=10, temperature=0.8)
    worst = _rolled(case, asked, sampling, rows=5)
    greedy = rollout(case.policy, asked, Sampling(max_new_tokens=10, temperature=0.0), seed=4)
    for prompt, (one,) in zip(asked, greedy, strict=True):
        found = logits(case.stock, np.concatenate([prompt, one.tokens]))[len(prompt) - 1 : -1]
        behind = found.max(-1) - found[np.arange(len(one.tokens)), one.tokens]
        worst = max(worst, float(behind.max()))
    return worst


def _rolled(
    case: Case,
    asked: list[np.ndarray],
    sampling: Sampling,
    *,
    rows: int = 64,
    by_hand: Callable[[int], Hand] | None = None,
) -> float:
    """Two completions of each prompt against the stock model, inside `by_hand(tokens of the prompt)` where given."""
    worst = 0.0
    groups = rollout(case.policy, asked, sampling, group_size=2, seed=4, rows=rows)
    for prompt, one in ((prompt, one) for prompt, group in zip(asked, groups, strict=True) for one in group):
        if by_hand is None:
            expected = stock_logps(case.stock, prompt, one.tokens, sampling.temperature)
        else:
            with by_hand(len(prompt)) as hand:
                expected = stock_logps(case.stock, prompt, one.tokens, sampling.temperature)
            assert hand.out is not None, "the stock model does not call its blocks"
        worst = max(worst, float(np.abs(expected - one.logps).max()))
    return worst


# ------------------------------------------------------------------ steering

BLOCK, COEFFICIENT = 1, 1.7


def steering(case: Case) -> float:
    """`add` behind block 1: logits of one pass, and log-probs of rollouts."""
    vector, row = pushing(case), prompts(13)[0]
    add = COEFFICIENT * mx.array(vector)
    with steer(case.policy, directed(vector), coefficient=COEFFICIENT, operator="add", blocks=(BLOCK,)):
        found = np.array(case.model(mx.array(row)[None])[0].astype(mx.float32))
        hand = lambda _: Hand(case.stock, BLOCK, lambda h: h + add)  # noqa: E731
        before = logits(case.stock, row)
        with hand(0):
            expected = logits(case.stock, row)
        said = np.isfinite(expected)  # one model silences tokens
        assert np.abs((expected - before)[said]).max() > MOVES, "the vector moves nothing in the stock model"
        assert np.array_equal(np.isfinite(found), said), "other logits are finite than in the stock model"
        worst = float(np.abs(found - expected)[said].max())
        return max(worst, _rolled(case, prompts(13, 2, 6), Sampling(max_new_tokens=8, temperature=1.0), by_hand=hand))


def steering_generated(case: Case) -> float:
    """`add` behind block 1 on generated tokens alone, in rollouts of unequal prompts."""
    vector = pushing(case)
    add = COEFFICIENT * mx.array(vector)

    def hand(length: int) -> Hand:
        later = lambda h: (mx.arange(h.shape[1]) >= length)[None, :, None]  # noqa: E731
        return Hand(case.stock, BLOCK, lambda h: mx.where(later(h), h + add, h))

    direction, asked = directed(vector), {"operator": "add", "blocks": (BLOCK,), "positions": "generated"}
    with steer(case.policy, direction, coefficient=COEFFICIENT, **asked):
        return _rolled(case, prompts(13, 2, 6), Sampling(max_new_tokens=8, temperature=1.0), by_hand=hand)


def pushing(case: Case) -> np.ndarray:
    """As large as what the block gives."""
    with Hand(case.stock, BLOCK, lambda h: h) as heard:
        logits(case.stock, prompts(13)[0])
    size = 1.0 if heard.out is None else float(np.array(mx.abs(heard.out).mean().astype(mx.float32)))
    return size * np.random.default_rng(0).normal(size=WIDTH).astype(np.float32)


def directed(vector: np.ndarray) -> vectors.Direction:
    return vectors.Direction({BLOCK: vector}, vectors.About(base_model="", blocks=(BLOCK,)))


# ------------------------------------------------------------------ ablation


def ablation(case: Case) -> Cell:
    """One edit of all writers, in mlx-lm: its share of what the blocks of the stock model then add to the stream.

    As an adapter beside the one there is; writers with biases, which no adapter changes, in the weights (`--fuse`).
    """
    unit = np.random.default_rng(1).normal(size=WIDTH)
    unit /= np.linalg.norm(unit)
    policy, every = case.policy, writers.find(case.policy)
    told = writers.rest(policy, every)
    edits = edit.plan(every, unit)
    assert share(case.stock, unit) > MOVES, "the direction is not in what the blocks write"
    if edit.bias_left(policy, edits):
        variants.save_fused(case.folder, case.folder / "fused", edits, "plain")
        edited = load_stock(case.folder / "fused", None, case.dtype)
    else:
        edit.put_on(policy, edits)
        edited = load_stock(case.folder, case.saved("ablated"), case.dtype)
    left = share(edited, unit)
    if told and left > LIMIT:
        ways = ", ".join(sorted({name.rpartition(".")[2] for name in told[0].modules}))
        raise UserError(f"block {told[0].block} writes {told[0].share:.0%} by ways that are not known ({ways or '-'})")
    return left


def share(stock: Any, unit: np.ndarray) -> float:
    """The part along `unit` in what a block adds to a state without it, of all it adds; of the block with most."""
    r, added = mx.array(unit.astype(np.float32)), []
    with Listened(stock, lambda x: x - (x @ r)[..., None] * r) as heard, pristine():
        mx.eval(stock(mx.array(np.stack(prompts(16, 16)))))
        added = [(float(mx.linalg.norm(out @ r)), float(mx.linalg.norm(out - read))) for read, out in heard.kept]
    assert added, "no block was heard in the stock model"
    return max(part / whole for part, whole in added if whole > 0)


# ------------------------------------------------------------------ all of them


class Check(NamedTuple):
    """A column."""

    name: str
    run: Callable[[Case], Any]


CHECKS = [
    Check("log-probs", log_probs),
    Check("gradient", gradient),
    Check("gradient, rows alone", gradient_alone),
    Check("gradient, checkpointed", gradient_checkpointed),
    Check("rollout", rollouts),
    Check("steering", steering),
    Check("steering, generated", steering_generated),
    Check("ablation", ablation),  # the last: it stays on the policy
]


def measure(
    arch: str, folder: Path, *, checks: Sequence[Check] = CHECKS, write: Write = write_folder, **settings: Any
) -> dict[str, Any]:
    """{"way": how rows are computed, "notes": lines of the load-time check, "cells": {name of a check: Cell}}, and
    "traces": how many gradients were compiled, one for each way and shape, 0 where steps are not; "traced": whether
    they can be.
    """
    found: dict[str, Any] = {"way": "", "notes": [], "traces": 0, "cells": {}, "traced": None}
    cells: dict[str, Cell] = found["cells"]
    made: list[Case] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlx-lm's own
        trouble = _cell(lambda: made.append(Case(write(folder, arch), **settings)), folder)
        if not made:
            found["cells"] = {check.name: trouble for check in checks if check.run is not gradient_alone}
            return found
        (case,) = made
        traced = compiled.traceable(case.model, case.policy.body.hidden, case.batch.prompt)
        found |= {"way": _way(case.policy), "notes": [*case.checks.notes], "traced": traced}
        for check in checks:
            cell = _cell(lambda run=check.run: run(case), folder)
            if cell is not None:
                cells[check.name] = cell
        case.forget()
        found["traces"] = case.traces
        if close := getattr(case.policy, "close", None):
            close()
    made.clear()
    gc.collect()
    return found


def _way(policy: Policy) -> str:
    if not policy.sharing:
        return "each row alone"
    return "prompts of one length shared" if policy.even and not policy.exact else "prompts shared"


def _cell(run: Callable[[], Any], folder: Path) -> Any:
    try:
        return run()
    except UserError as error:
        line = str(error).strip().replace(str(folder), "MODEL")
        return f"refused: {line}" if line and "\n" not in line else f"fails: not one line: {line}"
    except (Exception, SystemExit) as error:  # what must not be: it is told, and the other cells are measured
        line = (str(error).strip() or "-").splitlines()[0].replace(str(folder), "MODEL")
        return f"fails: {type(error).__name__}: {line}"
