# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of a mixture of experts: Switch Transformer, arXiv:2101.03961, eq. 4 to 6.

With f_e the share of tokens sent to expert e and p_e the mean probability of e, it is E * sum_e f_e p_e, where f has no
gradient. As in Hugging Face's `load_balancing_loss_func` all layers are one population, padding does not count, and a
token counts once for each of its top-k experts. Deviation from TRL: a completion's last token, which predicts nothing,
is never computed here and so does not count. Nothing of it is there unless asked for (`--router-aux-loss-coef`): the
coefficient in config.json is that of the model's own pretraining. Routers are heard by swapping their class.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .adapter_layers import LINEAR, Adapter, base_of, matrix_shape
from .adapter_targets import is_router
from .batch import LossOutput
from .errors import UserError

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # what configs call them
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_ears = threading.local()


class Balance(NamedTuple):
    """The loss of one architecture, and what it weighs."""

    coefficient: float
    experts: int
    top_k: int

    def add(self, out: LossOutput, heard: Sequence[mx.array], weights: Sequence[mx.array]) -> LossOutput:
        """`out` plus coefficient times the loss for each of its units, and the loss itself as metric `aux_loss`.

        Over an accumulation window that is the mean of the micro-batches' losses, weighted by their units.
        """
        loss = self.loss(heard, weights)
        count = mx.stop_gradient(out.count)
        metrics = out.metrics | {"aux_loss": (mx.stop_gradient(loss) * count, count)}
        return LossOutput(out.total + self.coefficient * count * loss, out.count, metrics)

    def loss(self, heard: Sequence[mx.array], weights: Sequence[mx.array]) -> mx.array:
        """float32 scalar; 1 per chosen expert where all are used alike.

        heard: router logits [..., E], every layer's of the first pass through the model, then of the next pass.
        weights: float32 [tokens] of each pass: how often a token counts, 0 for padding.
        """
        sent, probability, tokens = mx.zeros((self.experts,)), mx.zeros((self.experts,)), mx.array(0.0)
        for i, logits in enumerate(heard):
            weight = weights[i * len(weights) // len(heard)]
            flat = logits.reshape(-1, self.experts).astype(mx.float32)
            chosen = mx.argpartition(-mx.stop_gradient(flat), self.top_k - 1, axis=-1)[:, : self.top_k]
            sent = sent.at[chosen.reshape(-1)].add(mx.repeat(weight, self.top_k))
            probability = probability + weight @ mx.softmax(flat, axis=-1)
            tokens = tokens + weight.sum()
        return self.experts * (sent * probability).sum() / mx.maximum(tokens * tokens, 1.0)


def find(model: nn.Module, config: dict[str, Any], coefficient: float) -> Balance:
    """The loss of this model, weighed by the coefficient; its routers get taps.

    Raises UserError where the model has no experts, or the layers that choose them are not found.
    """
    config = config | (config.get("text_config") or {})
    experts, top_k = (next((config[name] for name in names if config.get(name)), None) for names in (EXPERTS, CHOSEN))
    flag = f"--router-aux-loss-coef {coefficient:g}"
    if not experts or not top_k:
        raise UserError(f"{flag}: {config.get('model_type')} models have no experts to balance. Leave it out.")
    for _, module in model.named_modules():  # an adapter may stand around a router by now
        module.__class__ = getattr(type(module), "heard_from", type(module))
    routers = _routers(model, experts)
    for router in routers:
        router.__class__ = _tapped(type(router))
    with listening() as heard:
        model(mx.array([[1, 2, 3]]))
    if not routers or [x.size for x in heard] != [3 * experts] * len(routers):
        raise UserError(f"{flag}: the layers that choose experts were not found in this model. Leave it out.")
    return Balance(coefficient, experts, top_k)


@contextmanager
def listening() -> Iterator[list[mx.array]]:
    """Inside, each call of a router leaves its logits in the list, in the order of the calls."""
    outer = getattr(_ears, "heard", None)
    _ears.heard = heard = []
    try:
        yield heard
    finally:
        _ears.heard = outer


def tell(logits: Sequence[mx.array]) -> None:
    """Leave these logits with whoever listens: routers do, and layers that are computed apart pass theirs on."""
    heard = getattr(_ears, "heard", None)
    if heard is not None:
        heard.extend(logits)


def _routers(model: nn.Module, experts: int) -> list[nn.Module]:
    """Linear layers with one output per expert that choose experts; of an adapted one the adapter layer."""
    found: dict[str, nn.Module] = {}
    for path, module in sorted(model.named_modules(), key=lambda item: len(item[0])):
        base = base_of(module) if isinstance(module, Adapter) else module
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if is_router(path) and not inside and isinstance(base, LINEAR) and matrix_shape(base)[0] == experts:
            found[path] = module
    return list(found.values())


def _tapped(base: Any) -> type:
    class Heard(base):
        heard_from = base

        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            logits = base.__call__(self, *args, **kwargs)
            tell([logits])
            return logits

    Heard.__name__ = base.__name__
    return Heard
