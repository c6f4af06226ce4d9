# SPDX-License-Identifier: Apache-2.0
"""What every preference loss and every method of preferences keeps to: found by name, so new ones are held to it."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import mlx.core as mx
import numpy as np
import pytest
from preference_tools import make_examples, rearranged, said, scores_of
from train_tools import launch, pair_rows, write_rows

from mlx_realign import UserError, data, losses, methods
from mlx_realign.batch import Batch, Example, LossOutput
from mlx_realign.losses import Pair
from mlx_realign.train import train

LN2 = math.log(2)
OPTIONS = {"beta": 0.1, "label_smoothing": 0.1, "gamma": 0.5, "discopop_tau": 0.05, "dpop_lambda": 5.0}
# The policy still is the reference, and chosen and rejected are equally likely per token; with OPTIONS, by hand.
AT_START = {
    "sigmoid": LN2,
    "hinge": 1.0,
    "ipo": 25.0,  # 1 / (4 beta^2)
    "robust": LN2,
    "exo_pair": -LN2 - math.log(0.1 * 0.9) / 2,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 50.0,  # 1 / (2 beta^2)
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.8465735902799727,  # (ln 2 + 1) / 2
    "sigmoid_norm": LN2,
    "dpop": LN2,
    "simpo": 0.9 * math.log1p(math.exp(0.5)) + 0.1 * math.log1p(math.exp(-0.5)),
    "odds_ratio": 0.1 * LN2,
}


# Functions of pairs. -------------------------------------------------------------------------------------------------


def loss_of(name: str) -> Callable[[Pair], mx.array]:
    """The loss with its options at the values of OPTIONS."""
    function = getattr(losses, name)
    wanted = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    missing = [p.name for p in wanted if p.name not in OPTIONS and p.default is p.empty]
    assert not missing, f"loss {name} has an option {missing[0]}: give it a value in OPTIONS of this file"
    return partial(function, **{p.name: OPTIONS[p.name] for p in wanted if p.name in OPTIONS})


def random_pair(seed: int = 0, dtype: mx.Dtype = mx.float32) -> Pair:
    """Six pairs."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, (2, 6))
    own = -lengths * rng.uniform(0.3, 2.5, (2, 6))
    ref = own + rng.uniform(-4, 4, (2, 6))
    columns = [*own, *ref, *lengths.astype(float), rng.uniform(0, 1, 6)]
    return Pair(*(mx.array(x, dtype=dtype) for x in columns))


def taken(pair: Pair, places: Sequence[int]) -> Pair:
    return Pair(*(mx.array(np.array(x)[list(places)]) for x in pair))


@pytest.mark.parametrize("name", losses.names())
def test_a_loss_starts_at_its_known_value(name: str):
    assert name in AT_START, f"loss {name}: say in AT_START of this file, from its formula, where it starts"
    lengths = [mx.array([1.0, 4.0, 9.0]), mx.array([2.0, 4.0, 3.0])]
    sums = [-1.5 * length for length in lengths]
    values = loss_of(name)(Pair(*sums, *sums, *lengths))
    np.testing.assert_allclose(values, [AT_START[name]] * 3, rtol=1e-6)


@pytest.mark.parametrize("name", losses.names())
def test_a_loss_does_not_care_for_the_order_of_pairs(name: str):
    """And each pair has its own value, whatever stands beside it: unless the loss says that it is coupled."""
    pair, order = random_pair(), [4, 0, 5, 2, 1, 3]
    values, turned = loss_of(name)(pair), loss_of(name)(taken(pair, order))
    assert turned.sum().item() == pytest.approx(values.sum().item(), rel=1e-6)
    alone = np.array([loss_of(name)(taken(pair, [i])).item() for i in range(6)])
    if name in losses.COUPLED:
        assert abs(alone.sum() - values.sum().item()) > 1e-3 * abs(alone.sum())
    else:
        np.testing.assert_allclose(values, alone, rtol=1e-6)
        np.testing.assert_allclose(turned, alone[order], rtol=1e-6)


@pytest.mark.slow  # on a CPU every trace goes through the C++ compiler
@pytest.mark.parametrize("name", losses.names())
def test_a_compiled_loss_is_the_same(name: str):
    pair = random_pair()
    compiled = mx.compile(lambda *sides: loss_of(name)(Pair._make(sides)))
    np.testing.assert_allclose(compiled(*pair), loss_of(name)(pair), rtol=1e-6)


@pytest.mark.parametrize("name", losses.names())
def test_the_slopes_of_a_loss_are_those_of_finite_differences(name: str):
    with mx.stream(mx.cpu):
        pair, along = (random_pair(seed=seed, dtype=mx.float64) for seed in (0, 1))
        total = lambda x: loss_of(name)(pair._replace(chosen=x[0], rejected=x[1])).sum()  # noqa: E731
        assert_slopes(total, *(mx.stack([side.chosen, side.rejected]) for side in (pair, along)))


@pytest.mark.parametrize("name", losses.names())
def test_a_loss_stays_finite_far_out_and_so_do_its_slopes(name: str):
    """Every sign of log-ratios of 1000, at log-probs of 0 and of -2000."""
    high, low = [0.0, 0.0, -2000.0, -2000.0], [-1000.0, -1000.0, -1000.0, -1000.0]
    lengths = mx.full((4,), 50.0)
    sides = [mx.array(x) for x in (high, [0.0, -2000.0, 0.0, -2000.0], low, low)]
    total = lambda *own: loss_of(name)(Pair._make([*own, *sides[2:], lengths, lengths, 0.0])).sum()  # noqa: E731
    value, found = mx.value_and_grad(total, argnums=(0, 1))(*sides[:2])
    assert all(mx.all(mx.isfinite(x)).item() for x in (value, *found))


def assert_slopes(total: Callable[[mx.array], mx.array], at: mx.array, along: mx.array) -> None:
    """The slope along a direction is that of five-point differences; MLX's exp in float64 leaves them four digits."""
    along = along / mx.abs(along).max()
    slope, size = (mx.grad(total)(at) * along).sum().item(), 0.04
    value = lambda n: total(at + n * size * along).item()  # noqa: E731
    difference = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * size)
    assert slope == pytest.approx(difference, rel=2e-4, abs=2e-5) and abs(difference) > 2e-3


# Methods. ------------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """A method with settings."""

    module: Any
    config: Any
    shown: str

    @property
    def needs(self) -> frozenset[str]:
        return methods.needs(self.module, self.config)


def variants() -> list[Variant]:
    """Every method of pairs or of good and bad completions with each of its loss types, and a few settings more."""
    found = []
    for name in methods.names():
        module = methods.find(name)
        if module.FORMAT in ("pairs", "unpaired"):
            for kind in loss_types(module):
                settings = {} if kind is None else {"loss_type": kind}
                found.append(Variant(module, configured(module, settings), f"{name}-{shown(kind)}".strip("-")))
    for name, settings in (
        ("dpo", {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}),
        ("dpo", {"ld_alpha": 0.3}),
        ("dpo", {"use_weighting": True}),
        ("dpo", {"margin_scale": 0.5}),
        ("dpo", {"f_divergence_type": "js_divergence"}),
        ("orpo", {"nll_on_prompt": True}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5, "margin_scale": 0.5}),
    ):
        module = methods.find(name)
        found.append(Variant(module, module.Config(**settings), f"{name}-{shown(settings)}"))
    return found


def loss_types(module: Any) -> list[Any]:
    """What --loss-type takes: the names of a literal type, or for lists of names what `names` of the module says."""
    kind = get_type_hints(module.Config).get("loss_type")
    if kind is None:
        return [None]
    return list(get_args(kind)) if get_origin(kind) is Literal else [(name,) for name in module.names()]


def configured(module: Any, settings: dict[str, Any]) -> Any:
    """Some loss types have no meaning without smoothed labels."""
    try:
        return module.Config(**settings)
    except UserError:
        return module.Config(**settings, label_smoothing=0.1)


def shown(settings: Any) -> str:
    text = "" if settings is None else str(settings)
    return "".join(c if c.isalnum() or c in "_." else "-" for c in text).strip("-")


VARIANTS = variants()
each = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.shown)


def batch_of(variant: Variant, examples: list[Example], pad: int = 0, dtype: mx.Dtype = mx.float32) -> Batch:
    """The batch of these rows, and what the reference and the window of all four rows add to it."""
    batch = data.collate(examples, width=lambda n: n + pad)
    if variant.module.reference(variant.config):
        ref = mx.where(batch.mask, said(batch.completion, np.arange(batch.mask.shape[1]), 9, -3.0, dtype), 0)
        batch.extras.update({"ref_token_logps": ref, "ref_logps": ref.sum(-1)})
    if together := methods.shared(variant.module, variant.config):
        batch.extras.update(together(make_examples(variant.module.FORMAT), ratios))
    return batch


def ratios(examples: list[Example]) -> mx.array:
    """Some log-ratios of other rows, 0.4 nats on average."""
    return mx.linspace(0.1, 0.7, len(examples))


def outcome(variant: Variant, examples: list[Example], pad: int = 0) -> LossOutput:
    batch = batch_of(variant, examples, pad)
    return variant.module.loss(scores_of(batch, mx.float32), batch, variant.config)


def assert_equal(one: LossOutput, other: LossOutput) -> None:
    assert one.total.item() == pytest.approx(other.total.item(), rel=2e-6)
    assert one.count.item() == other.count.item()
    assert one.metrics.keys() == other.metrics.keys()
    for name, (total, count) in one.metrics.items():
        assert total.item() == pytest.approx(other.metrics[name][0].item(), rel=5e-6, abs=1e-5), name
        assert count.item() == other.metrics[name][1].item(), name


@each
def test_padding_changes_nothing(variant: Variant):
    examples = make_examples(variant.module.FORMAT)
    assert_equal(outcome(variant, examples, pad=7), outcome(variant, examples))


@each
def test_the_order_of_rows_and_of_rejected_ones_changes_nothing(variant: Variant):
    examples = make_examples(variant.module.FORMAT)
    turned = [rearranged(e, [0, *reversed(range(1, len(e.completions)))]) for e in examples]
    for other in ([examples[i] for i in (2, 0, 3, 1)], turned):
        assert_equal(outcome(variant, other), outcome(variant, examples))


@each
def test_sums_over_micro_batches_are_those_over_the_whole(variant: Variant):
    """One batch of 4 is 1 + 3 is 2 + 2, but for losses that compare the pairs of a batch: those say so."""
    examples = make_examples(variant.module.FORMAT)
    whole = outcome(variant, examples)
    for cut in (1, 2):
        parts = [outcome(variant, examples[:cut]), outcome(variant, examples[cut:])]
        total, count = sum(p.total.item() for p in parts), sum(p.count.item() for p in parts)
        assert count == whole.count.item()
        if "whole_batch" in variant.needs:
            assert abs(total - whole.total.item()) > 1e-4 * abs(whole.total.item())
            continue
        assert total == pytest.approx(whole.total.item(), rel=2e-6)
        for name, (found, weight) in whole.metrics.items():
            sums = [sum(p.metrics[name][i].item() for p in parts) for i in (0, 1)]
            assert sums == pytest.approx([found.item(), weight.item()], rel=5e-6, abs=1e-5), name


def test_losses_that_compare_pairs_refuse_accumulation():
    whole = {kind for v in VARIANTS if "whole_batch" in v.needs for kind in v.config.loss_type}
    assert whole == set(losses.COUPLED)
    for name in losses.COUPLED:
        asked = {"loss_type": ("sigmoid", name), "gradient_accumulation": 2, "output": "never-written"}
        with pytest.raises(UserError, match="--gradient-accumulation"):
            train(method="dpo", data=[], model="never-loaded", **asked)


@each
def test_the_slopes_of_tokens_are_those_of_finite_differences(variant: Variant):
    """WPO's weights have no slope: their squares move along, which leaves the weights alone."""
    with mx.stream(mx.cpu):
        batch = batch_of(variant, make_examples(variant.module.FORMAT), dtype=mx.float64)
        scores = scores_of(batch, mx.float64)
        assert scores.log_sum_sq is not None
        aligned = scores.logps - scores.log_sum_sq

        def total(logps: mx.array) -> mx.array:
            moved = scores._replace(logps=logps, log_sum_sq=mx.stop_gradient(logps) - aligned)
            return variant.module.loss(moved, batch, variant.config).total

        for seed in (20, 21):
            along = said(batch.completion, np.arange(batch.mask.shape[1]), seed, -1.0, mx.float64) + 0.5
            assert_slopes(total, scores.logps, mx.where(batch.mask, along, 0))


@each
def test_swapping_chosen_and_rejected_negates_the_margin(variant: Variant):
    examples = [e._replace(completions=e.completions[:2]) for e in make_examples(variant.module.FORMAT)]
    examples = [e._replace(extras={k: v for k, v in e.extras.items() if k == "label"}) for e in examples]
    if variant.module.FORMAT == "unpaired":  # here the label is what is turned
        turned = [e._replace(extras={"label": not e.extras["label"]}) for e in examples]
    else:
        turned = [rearranged(e, [1, 0]) for e in examples]
    one, other = outcome(variant, examples).metrics, outcome(variant, turned).metrics
    mean = lambda metrics, name: (metrics[name][0] / metrics[name][1]).item()  # noqa: E731
    for what in ("rewards", "logps"):
        for side, opposite in (("chosen", "rejected"), ("rejected", "chosen")):
            found = mean(one, f"{what}/{side}")
            assert found == pytest.approx(mean(other, f"{what}/{opposite}"), rel=1e-5)
    if variant.module.FORMAT == "pairs":
        assert mean(one, "rewards/margins") == pytest.approx(-mean(other, "rewards/margins"), rel=1e-5)
        assert mean(one, "rewards/accuracies") == pytest.approx(1 - mean(other, "rewards/accuracies"))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.module.reference(v.config)], ids=lambda v: v.shown)
def test_at_its_reference_a_policy_has_no_reward_and_the_known_loss(variant: Variant):
    batch = batch_of(variant, make_examples(variant.module.FORMAT))
    scores = scores_of(batch, mx.float32)
    batch.extras.update({"ref_token_logps": scores.logps, "ref_logps": scores.logps.sum(-1), "kl": mx.array(0.0)})
    out = variant.module.loss(scores, batch, variant.config)
    assert all(out.metrics[f"rewards/{side}"][0].item() == 0 for side in ("chosen", "rejected"))
    names = variant.config.loss_type
    if variant.module.FORMAT == "unpaired" or variant.config == configured(variant.module, {"loss_type": names}):
        expected = 0.5 if variant.module.FORMAT == "unpaired" else AT_START[names[0]]
        assert out.total.item() == pytest.approx(expected * out.count.item(), rel=1e-6)


# The whole loop. -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("dpo", ("--loss-type", "sigmoid,sft", "--loss-weights", "1,0.5")),
        ("orpo", ()),
        ("orpo", ("--nll-on-prompt",)),
        ("cpo", ()),
        ("kto", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value).strip("-"),
)
def test_a_window_of_two_batches_is_one_batch_of_both(method, words, tmp_path: Path, tiny_model_dir: Path):
    """Terms that are means over tokens, or over the other rows, span the window."""
    rows: list[dict[str, Any]] = list(pair_rows(4))
    if method == "kto":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0} for i, r in enumerate(rows)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = []
    for size, count in ((4, 1), (2, 2), (1, 4)):
        shape = ("--batch-size", size, "--gradient-accumulation", count, "--steps", 2, "--no-shuffle")
        run = launch(tmp_path / str(size), tiny_model_dir, file, *shape, *words, method=method)
        assert run.code == 0
        found.append([(row["loss"], row["grad_norm"]) for row in run.steps])
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=2e-5)
