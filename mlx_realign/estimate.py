# SPDX-License-Identifier: Apache-2.0
"""A run in numbers before it starts; memory and time by computing one real micro-batch of it."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import layout, packing
from .batch import Batch
from .data import Dataset
from .optim import flat
from .progress import duration

QUICK_S = 5.0  # a first measurement shorter than this is made again: it includes warming up
SAMPLED_ROWS = 200
MOST = 64  # shapes whose attention is looked at


def facts(loop: Any) -> dict[str, Any]:
    """What the run is about to do."""
    policy, settings, feed = loop.policy, loop.settings, loop.feed
    report = feed.rows.report
    return {
        "model": f"{policy.name}, {policy.parameters / 1e6:.1f}M parameters, {str(policy.dtype).rpartition('.')[2]}",
        "trained_parameters": policy.trained,
        "trained_share": f"{policy.trained / policy.parameters:.3%}",
        "rows": len(feed.rows),
        "tokens": report["tokens"],
        "trained_tokens": report["trained_tokens"],
        "eval_rows": len(feed.held_out) if feed.held_out else 0,
        "micro_batches_per_epoch": feed.per_epoch,
        "steps": feed.steps,
        "kl_to_start": loop.drift.described,
        "learning_rate": loop.peak_rate,
        "optimizer": f"{settings.optimizer}, {settings.lr_schedule} after {settings.warmup_steps} steps of warm-up",
    }


def estimate(loop: Any) -> dict[str, Any]:
    """Peak memory (MLX's own, GB) from the widest micro-batch of the first epoch, time from its seconds per token.

    Nothing of the policy or the folder changes.
    """
    policy, feed = loop.policy, loop.feed
    plan = feed.plan(0)
    sizes = [int(feed.rows.sizes[rows].sum()) for rows in plan]
    widest = int(np.argmax([_padded(feed.rows, rows) for rows in plan]))
    reference_s = 0.0
    made = bool((feed.rows.num_completions == 0).any())  # the policy writes the completions itself
    if feed.reference and not made:
        sample = np.linspace(0, len(feed.rows) - 1, min(len(feed.rows), SAMPLED_ROWS)).astype(int)
        missing = np.mean([feed.reference.find(feed.rows[int(i)]) is None for i in sample])
        bare = [feed.bare(part) for part in feed.parts([feed.rows[int(i)] for i in plan[widest]])]
        reference_s = _seconds(lambda: [policy.totals(one) for one in bare]) * float(missing) if missing else 0.0
    mx.reset_peak_memory()
    began = time.perf_counter()
    batches = [micro.batch for micro in feed.together(feed.rows, [(0, plan[widest])])]
    made_s = time.perf_counter() - began
    step_s = _seconds(lambda: [policy.gradients(batch, loop.loss) for batch in batches])
    sum_of_window = sum(value.nbytes for value in flat(policy.model.trainable_parameters()).values())
    peak = mx.get_peak_memory() + (sum_of_window if loop.settings.gradient_accumulation > 1 else 0)
    seconds = step_s / sizes[widest] * float(np.mean(sizes)) * feed.micro
    if made:
        seconds = (step_s + made_s / loop.config.updates_per_rollout) * feed.steps * loop.settings.gradient_accumulation
    seconds += reference_s / sizes[widest] * sum(sizes[: feed.micro])
    if loop.drift.every:
        seconds += _seconds(loop.drift.begin) * (1 + feed.steps // loop.drift.every)
    return {
        "estimated_peak_memory_gb": round(peak / 1e9, 3),
        "estimated_time_s": round(seconds, 1),
        "estimated_time": f"{duration(seconds)}, {seconds / feed.steps:.1f} s a step; evaluations come on top",
    }


def shares(loop: Any) -> dict[str, Any]:
    """How the first epoch's rows will lie on the device of --plan-for; nothing is computed.

    See `Layout.shares` and `layout.attention`.
    """
    policy, feed, device = loop.policy, loop.feed, loop.settings.plan_for
    exact = policy.exact if device == "here" else device != "cpu"
    if not exact:
        return _rounded(_padded_shares(loop))
    found = layout.Layout((feed.layout or feed.laid_out()).shapes, **layout.options(policy))
    for wanted in feed.needs(found):
        found.note(wanted)
    compiled = loop.settings.compile != "off"
    told = found.shares() | ({} if compiled else {"compiled_share": 0.0})
    batches = [(layout.blank(shape), count) for shape, count in found.used.most_common(MOST)]
    return _rounded(told | _attention(policy, batches))


def _rounded(told: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in told.items()}


def _padded_shares(loop: Any) -> dict[str, Any]:
    """Where rows of a micro-batch lie together, prompts padded on the left."""
    policy, feed = loop.policy, loop.feed
    kinds: Counter[tuple[int, ...]] = Counter()
    real = 0
    for places in layout.spread(feed.plan(0)) if policy.packing else ():
        lengths = feed.rows.sizes[places] - 1
        bins, width = packing.fitted(lengths)
        kinds[len(bins), width + 1, 0, 0] += 1
        real += int(lengths.sum())
    for places in () if policy.packing else layout.spread(feed.plan(0)):
        rows, counts = feed.rows, feed.rows.num_completions[places]
        if not counts.all():
            return {}  # the policy writes completions itself
        widths = int(rows.prompt_lengths[places].max()), int(rows.completion_lengths[places].max())
        kinds[len(places), widths[0], int(counts.sum()), widths[1]] += 1
        real += int(rows.sizes[places].sum()) - len(places)
    computed = sum(n * (p * (columns - 1) + r * wide) for (p, columns, r, wide), n in kinds.items())
    told = {"shapes": len(kinds), "compiled_share": float(policy.compiled), "padding_share": 1 - real / computed}
    sample = layout.spread(feed.plan(0), 4)
    batches = [(feed.bare([feed.rows[int(i)] for i in places]), 1) for places in sample]
    return told | {"recomputed_share": 0.0} | _attention(policy, batches)


def _attention(policy: Any, batches: Sequence[tuple[Batch, int]]) -> dict[str, Any]:
    """Of the attention calls of these batches, each counted so often; only their graphs are built."""
    met: Counter[tuple[int, str]] = Counter()
    for batch, count in batches:
        policy.kernels.attended.clear()
        policy.states(batch)
        met.update({kind: n * count for kind, n in policy.kernels.attended.items()})
    return layout.attention(met)


def _padded(rows: Dataset, places: np.ndarray) -> int:
    """Tokens of a micro-batch with its padding."""
    completions = int(rows.num_completions[places].sum())
    longest = int(rows.prompt_lengths[places].max()), int(rows.completion_lengths[places].max())
    return len(places) * longest[0] + completions * longest[1]


def _seconds(run: Callable[[], Any]) -> float:
    took = 0.0
    for _ in range(2):
        started = time.perf_counter()
        run()
        took = time.perf_counter() - started
        if took > QUICK_S:
            break
    return took
