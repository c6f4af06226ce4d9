# SPDX-License-Identifier: Apache-2.0
"""Families in 4-bit bfloat16, packed weights kept, as most Macs run them; against stock mlx-lm of the same folder.

Twice: in float32 over the same packed weights, where the limit is the grid's, so that what is lost or doubled shows;
and in bfloat16, where a cell is a pair: how far this project, and how far mlx-lm in bfloat16, is from it in float32.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from grid_checks import (
    BLOCK,
    CHECKS,
    COEFFICIENT,
    Case,
    Check,
    directed,
    measure,
    pushing,
    weights,
)
from grid_models import WIDTH, Hand, Listened, load_stock, pristine, prompts, stock_gradient, stock_logps, write_packed
from mlx.utils import tree_flatten

from mlx_realign import capture, writers
from mlx_realign.ablation import edit
from mlx_realign.rollout import rollout
from mlx_realign.sampling import Sampling
from mlx_realign.steering.apply import steer

Pair = list[float]


def packed(arch: str, folder: Path) -> dict[str, Any]:
    """As `measure`, in float32; "bfloat16" holds the same of pairs."""
    options: dict[str, Any] = {"write": write_packed, "cpu_dequantize": "never"}
    found = measure(arch, folder, checks=EXACT, dtype="float32", **options)
    return {**found, "bfloat16": measure(arch, folder, checks=ROUNDED, dtype="bfloat16", **options)}


def states(case: Case) -> float:
    """What blocks leave behind the last token of unequal prompts, as captured; the largest difference."""
    return float(np.abs(_captured(case) - _heard(case.stock)).max())


# ------------------------------------------------------------------ in bfloat16


def rounded_log_probs(case: Case) -> Pair:
    """Of all trained tokens."""
    found = case.logps()
    asked = [(e.prompt, c.tokens) for e in case.examples for c in e.completions]
    masks = [c.mask for e in case.examples for c in e.completions]
    return _pair(case, found, lambda stock: [stock_logps(stock, *one) for one in asked], masks)


def rounded_gradient(case: Case) -> Pair:
    """Of a step as the policy takes it: of all LoRA tensors as one row."""
    slopes: Any = tree_flatten(case.gradient())
    joined = lambda slopes: [np.concatenate([np.array(x, np.float32).ravel() for _, x in sorted(slopes)])]  # noqa: E731
    found = joined([(name, x.astype(mx.float32)) for name, x in slopes])
    return _pair(case, found, lambda stock: joined(stock_gradient(stock, case.examples, weights).items()))


def rounded_rollout(case: Case) -> Pair:
    """Log-probs that completions of unequal prompts were sampled with."""
    return _rolled(case, lambda stock, prompt, tokens: stock_logps(stock, prompt, tokens))


def rounded_states(case: Case) -> Pair:
    """As `states`."""
    return _pair(case, _captured(case), _heard)


def rounded_steering(case: Case) -> Pair:
    """`add` behind block 1 on generated tokens alone, in rollouts of unequal prompts."""
    vector = pushing(case)

    def by_hand(stock: Any, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        def change(h: mx.array) -> mx.array:
            later = (mx.arange(h.shape[1]) >= len(prompt))[None, :, None]
            return mx.where(later, h + (COEFFICIENT * mx.array(vector)).astype(h.dtype), h)

        with Hand(stock, BLOCK, change):
            return stock_logps(stock, prompt, tokens)

    how: dict[str, Any] = {"operator": "add", "blocks": (BLOCK,), "positions": "generated"}
    with steer(case.policy, directed(vector), coefficient=COEFFICIENT, **how):
        return _rolled(case, by_hand)


def rounded_ablation(case: Case) -> Pair | None:
    """What is left of a direction in what blocks add, all writers edited: in the policy, in mlx-lm with its adapter.

    None where writers have biases, which no adapter changes.
    """
    unit = np.random.default_rng(1).normal(size=WIDTH)
    unit /= np.linalg.norm(unit)
    policy, tokens = case.policy, mx.array(np.stack(prompts(16, 16, 16)))
    before = max(edit.left_in_blocks(policy, unit, tokens).values())
    edits = edit.plan(writers.find(policy), unit)
    if edit.bias_left(policy, edits):
        return None
    edit.put_on(policy, edits)
    stock, shares = load_stock(case.folder, case.saved("ablated")), []
    with Listened(stock, lambda x: x) as heard, pristine():
        mx.eval(stock(tokens))
        for read, out in heard.kept:
            added = np.array(out.astype(mx.float32) - read.astype(mx.float32))
            shares.append(float(np.linalg.norm(added @ unit) / np.linalg.norm(added)))
    return [max(edit.left_in_blocks(policy, unit, tokens).values()) / before, max(shares) / before]


def _rolled(case: Case, by_mlx_lm: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]) -> Pair:
    asked = prompts(17, 2, 1, 9)
    groups = rollout(case.policy, asked, Sampling(max_new_tokens=10, temperature=1.0), group_size=2, seed=4)
    made = [(prompt, one) for prompt, group in zip(asked, groups, strict=True) for one in group]
    said = [one.logps for _, one in made]
    return _pair(case, said, lambda stock: [by_mlx_lm(stock, prompt, one.tokens) for prompt, one in made])


def _captured(case: Case) -> np.ndarray:
    """float32 [prompts, blocks, D]."""
    return capture.collect(case.policy, [row.tolist() for row in prompts(13, 2, 6, 9, 17, 4, 1, 11)])[:, :, 0]


def _heard(stock: Any) -> np.ndarray:
    """As `_captured`: what block 0 reads, then what each gives."""
    every = []
    for row in prompts(13, 2, 6, 9, 17, 4, 1, 11):
        with Listened(stock, lambda x: x) as heard, pristine():
            mx.eval(stock(mx.array(row)[None]))
        rows = [heard.kept[0][0], *(out for _, out in heard.kept)]
        every.append([np.array(x[0, -1].astype(mx.float32)) for x in rows])
    return np.array(every)


def _exact(case: Case) -> Any:
    """mlx-lm's model in float32 with the same packed weights and adapter."""
    return load_stock(case.folder, case.folder / "adapter", mx.float32)


def _pair(case: Case, found: Any, of: Callable[[Any], Any], masks: Sequence[np.ndarray] | None = None) -> Pair:
    """How far `found`, and what `of` gives of mlx-lm's model, is from what it gives in float32.

    Norms, relative, of the middle row: where rounding makes a token take another expert, that is a row's affair.
    """
    exact, stock = of(_exact(case)), of(case.stock)
    kept = [np.ones(np.shape(one), bool) for one in exact] if masks is None else masks
    far = lambda a, b, m: np.linalg.norm((np.asarray(a) - b)[m]) / np.linalg.norm(np.asarray(b)[m])  # noqa: E731
    return [float(np.median([far(*row) for row in zip(one, exact, kept, strict=True)])) for one in (found, stock)]


EXACT = [*CHECKS[:-1], Check("states", states), CHECKS[-1]]
ROUNDED = [
    Check("log-probs", rounded_log_probs),
    Check("gradient", rounded_gradient),
    Check("rollout", rounded_rollout),
    Check("states", rounded_states),
    Check("steering, generated", rounded_steering),
    Check("ablation", rounded_ablation),  # the last: it stays on the policy
]
