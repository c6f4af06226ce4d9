# SPDX-License-Identifier: Apache-2.0
"""How what was decided is delivered: on the policy as an adapter or in its weights, and as a direction's file."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import adapter, capture, directions
from .. import writers as writers_module
from ..errors import UserError
from ..policy import Policy
from ..vectors import Direction
from . import edit, variants
from .edit import Applied
from .extraction import Extracted, Sets
from .measure import Measured
from .planning import Plan
from .settings import Settings

MEASURED_BEFORE = "Rates, KL and perplexity are of the edit in memory, before this rounding."


def put_on(extracted: Extracted, plan: Plan, sets: Sets, settings: Settings) -> tuple[Applied, list[str]]:
    """The edits on the policy, as the variant has them; sentences on what an adapter cannot hold."""
    policy, edits, lines = extracted.policy, plan.edits, []
    if not edits:
        raise UserError("nothing is to be edited: all weights are 0.")
    if settings.fuse and not any("scales" in writers_module.module_at(policy.model, e.writer.path) for e in edits):
        means = None
        if settings.variant == "affine":
            asked = capture.encode(policy, sets.fit[1][:128], prefix=extracted.prefix)
            means = plan.facts["means"] = variants.means_of(policy, edits, asked)
        return variants.rewrite(policy, edits, settings.variant, means), lines
    if left := edit.bias_left(policy, edits):
        worst = max(left, key=left.__getitem__)
        lines.append(
            f"{len(left)} writers have a bias, which an adapter cannot change: up to {left[worst]:.0%} of one lies "
            f"along the direction ({worst}) and stays; --fuse edits it"
        )
    experts = any(e.writer.kind == "experts" for e in edits)
    if settings.variant == "row-norm" and not experts and not adapter.adapters_of(policy.model):
        return edit.put_on(policy, edits, dora=True), lines
    if settings.variant not in variants.FULL_RANK:
        return edit.put_on(policy, edits), lines
    more, errors = variants.remainder(policy, edits, settings.variant, settings.extra_rank)
    lines.append(
        f"{settings.variant} is a change of full rank: the adapter's {settings.extra_rank} more ranks miss "
        f"{np.mean(list(errors.values())):.1%} of it on average, {max(errors.values()):.1%} at most; --fuse is exact"
    )
    return edit.put_on(policy, edits, more=more), lines


def as_stored(policy: Policy, edits: Sequence[edit.Edit], stored: variants.Stored) -> str:
    """What storing has cost, and whether the weights that were measured are those."""
    forms = {variants.form(writers_module.module_at(policy.model, e.writer.path)) for e in edits}
    same = forms == {stored.form} and not adapter.adapters_of(policy.model)
    about = "These are the weights that were measured." if same else MEASURED_BEFORE
    worst, back = (max(shares.values(), default=0.0) for shares in (stored.left, stored.back))
    return (
        f"Storing the weights ({stored.form}) rounded them by {stored.rounding:.2%} of the edit; up to {worst:.2%} of "
        f"B W is left, and rounding alone put up to {back:.2%} of it back. {about}"
    )


def weight_edit(plan: Plan, found: Measured, settings: Settings) -> dict[str, Any]:
    """What a direction's file says of the edit that was measured: steering along the direction has other effects."""
    rates = [float(sides[0].failed.mean()) for sides in (found.before, found.after)]
    how = {name: plan.facts[name] for name in ("weight", "kernel") if name in plan.facts}
    how |= {"block": plan.block, "variant": settings.variant, "rank": settings.rank}
    return {**how, "behaviour": rates, "kl_first_token": found.kl_first, "left": max(found.leaks.values(), default=0.0)}


def direction_of(extracted: Extracted, plan: Plan, data_hash: str, found: Measured) -> Direction:
    """The direction as its file keeps it, with what the edit of the weights was measured to do."""
    told = {"weight_edit": weight_edit(plan, found, extracted.settings)}
    block = None if plan.block is None else round(plan.block)
    direction = extracted.direction(block, plan.position, data_hash, told)
    if block is None or (plan.rows is None and plan.block == block):
        return direction
    rows = plan.rows or extracted.by_block(plan.block, plan.position)  # --block and a search may take what lies between
    mixed = directions.unit(np.atleast_2d(rows[block])[0]) * direction.norm(block)
    return dataclasses.replace(direction, vectors=direction.vectors | {block: mixed})
