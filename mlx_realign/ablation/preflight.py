# SPDX-License-Identifier: Apache-2.0
"""Refused here, with the model just loaded: whatever a run would otherwise stop at behind its expensive part."""

import numpy as np

from .. import adapter, adapter_fuse, loading
from ..bench import outputs
from ..errors import UserError
from ..policy import Policy
from ..writers import Writer, module_at
from . import edit, measure, study, variants
from .extraction import Sets
from .scorers import Judged, Setting, make
from .settings import Settings, journal_of, markers_of


def preflight(policy: Policy, sets: Sets, writers: list[Writer], settings: Settings) -> None:
    """UserError for what --fuse cannot store, a --text that cannot be read, a search that cannot begin or pick."""
    if settings.fuse:
        _refuse_unstorable(policy, writers, settings)
    if settings.text:
        measure.texts_of(policy, settings.text)
    if settings.search:
        _refuse_unsearchable(policy, sets, settings)


def _refuse_unstorable(policy: Policy, writers: list[Writer], settings: Settings) -> None:
    """An adapter; quantised weights without a flag that says how, with what that would cost; a bias without a place."""
    if adapter.adapters_of(policy.model):
        raise UserError("--fuse with --adapter: fuse the adapter first (mlx-realign export --to fused).")
    trusted = settings.trust_remote_code
    if policy.config.get("quantization") and not (settings.force or settings.dequantize):
        width = outputs(module_at(policy.model, writers[0].path))
        anywhere = np.random.default_rng(settings.seed).standard_normal(width)
        edits = edit.plan(writers, anywhere)
        try:
            variants.save_fused(policy.folder, None, edits, settings.variant, trust_remote_code=trusted)
        except UserError as error:  # the direction's own loss is known only when it is extracted, and may be less
            raise UserError(f"{error} (Measured along a random direction.)") from None
    if settings.variant == "affine":
        if any("scales" in module_at(policy.model, writer.path) for writer in writers):
            raise UserError(
                "--variant affine: the weights are quantised, and cannot be edited. Load them with --dtype float32."
            )
        model, config = loading.load_base(policy.folder, trusted)  # its weights are not read
        if settings.dequantize:
            adapter_fuse.dequantise(model, config)
        variants.hold_biases(model, config, [writer.path for writer in writers])


def _refuse_unsearchable(policy: Policy, sets: Sets, settings: Settings) -> None:
    """Optuna or a scorer that is not there, a trial to pick that there will not be."""
    study.load_optuna()
    positive, negative = (side[: settings.select_prompts] for side in sets.select)
    for scorer in make(settings.scorers, Setting(policy, positive, negative, markers=markers_of(settings))):
        if isinstance(scorer, Judged):
            scorer.pool.close()
    if settings.pick.isdecimal():
        _refuse_pick(int(settings.pick), settings)


def _refuse_pick(number: int, settings: Settings) -> None:
    journal = journal_of(settings)
    known = {trial.number: trial for trial in study.held(journal)}
    if number not in known and number >= settings.trials:
        there = f"{journal} holds {len(known)}. " if known else ""
        raise UserError(
            f"--pick {number}: {settings.trials} --trials end with number {settings.trials - 1}. {there}Raise "
            "--trials, or name the --journal of a search that holds it."
        )
    if number in known and known[number].pruned:
        raise UserError(
            f"--pick {number}: was left early in {journal}. Name a trial of the table that a search ends with."
        )
