# SPDX-License-Identifier: Apache-2.0
"""What a run's settings ask of its policy and its data before the first step; what makes no sense is refused."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import adapter, data, forward, methods
from .config import TrainSettings
from .errors import UserError
from .policy import Policy

Rows = str | Path | Sequence[dict[str, Any]]


def refuse_pointless(settings: TrainSettings, module: Any, own: Any) -> None:
    """UserError for a setting that would be ignored, or harm, with this method, its settings or the optimizer."""
    needs = methods.needs(module, own)
    if "whole_batch" in needs and settings.gradient_accumulation > 1:
        raise UserError(
            "--gradient-accumulation: this loss compares all rows of a batch with one another, so several batches are "
            "another loss: raise --batch-size instead"
        )
    if "other_rows" in needs and settings.batch_size * settings.gradient_accumulation < 2:
        raise UserError("--batch-size 1: this loss compares a row with other rows of its step; take at least 2")
    if "other_rows" in needs and settings.full:
        raise UserError(
            "--full: this loss asks the reference about new rows at every step, and there is no second copy of the "
            "weights; train an adapter, or take --loss-type apo_zero_unpaired"
        )
    if "new_rows" in needs and settings.full:
        raise UserError(
            "--full: --kl-coef asks the reference about new completions at every step, and there is no second copy of "
            "the weights; train an adapter, or drop --kl-coef"
        )
    if settings.steer and (module.FORMAT == "groups" or module.reference(own)):
        raise UserError(
            "--steer is for methods that look at the policy alone, sft, orpo and cpo: here its log-probs are compared "
            "with those of a reference, or of the policy that generated, and these are not steered"
        )
    if settings.plan_for != "here" and not settings.dry_run:
        raise UserError("--plan-for tells about a run that is not made: add --dry-run")
    if settings.pack and (module.FORMAT != "sft" or settings.steer or settings.router_aux_loss_coef):
        reason = "takes no --steer and no --router-aux-loss-coef" if module.FORMAT == "sft" else "is for sft"
        raise UserError(f"--pack {reason}: leave it out")
    if settings.lora_dropout and module.FORMAT != "sft":
        raise UserError("--lora-dropout is for sft: here the noise would stand between log-probs that are compared")
    if settings.full and settings.adapter:
        raise UserError("--full trains the model's own weights: fuse --adapter into it first (mlx-realign export)")
    if settings.lora_dropout and settings.full:
        raise UserError("--lora-dropout is of an adapter: with --full there is none")
    if settings.weight_decay and settings.optimizer == "adam":
        raise UserError("--weight-decay has no effect on --optimizer adam: take adamw")


def ready(policy: Policy | None, settings: TrainSettings) -> Policy:
    """The policy with what is to be trained free, its dropout and checkpointing as these settings say."""
    if policy is None:
        policy = Policy.from_settings(settings)
    else:
        if settings.full and adapter.adapters_of(policy.model):
            raise UserError("--full: the policy carries an adapter; fuse it first (mlx-realign export --to fused)")
        if not settings.grad_checkpoint:
            forward.uncheckpoint_layers(policy.model)  # an earlier stage may have asked for it
        policy.prepare(settings)
    if settings.full and any(hasattr(module, "bits") for _, module in policy.model.named_modules()):
        raise UserError("--full: the weights are quantised and cannot be trained; train an adapter, or a dense model")
    for layer in adapter.adapters_of(policy.model).values():
        layer.dropout = settings.lora_dropout  # whatever the adapter it starts from was trained with
    return policy


def loader(policy: Policy, module: Any, settings: TrainSettings) -> Callable[..., data.Dataset]:
    """`data.load` for this policy, method and run."""
    made_for = {"tokenizer": policy.tokenizer, "reach": policy.reach}
    return partial(data.load, format=module.FORMAT, settings=settings, **made_for)


def held_out_rows(settings: TrainSettings, rows: Rows | None, load: Callable[..., data.Dataset]) -> data.Dataset | None:
    """Those of --eval-data, else the data folder's own. UserError where there are none and a setting needs them."""
    named = rows if rows is not None else settings.data
    if settings.eval_data:
        return load(settings.eval_data)
    if isinstance(named, str | Path) and data.has_split(named, "valid"):
        return load(named, split="valid")
    if settings.early_stop or settings.eval_every:
        flag = "early-stop" if settings.early_stop else "eval-every"
        raise UserError(f"--{flag} needs held-out rows: give --eval-data, or a data folder with a valid.jsonl")
    return None
