# SPDX-License-Identifier: Apache-2.0
"""Every loss and every method of preferences has the values and the gradients of its formula.

The numbers are NumPy's in extended precision (tests/golden/make_losses.py), written apart from the code: relative 1e-6
in float64 on the CPU, 1e-5 in float32, slopes relative to the largest of their array. What bounds float64 is MLX: its
exp, and with it sigmoid and logaddexp, is right to 1e-7 there and to 2e-6 at e^-60, as in float32.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign import losses, methods
from mlx_realign.batch import Batch, Completion, Example, Scores
from mlx_realign.losses import Pair

FILE = Path(__file__).parent / "golden" / "losses.json"
GOLDEN: dict[str, Any] = json.loads(FILE.read_text())


class Precision(NamedTuple):
    """A type of array and what it can be held to."""

    dtype: mx.Dtype
    relative: float
    floor: float
    """Log-ratios of +-300 give losses like e^-60, the difference of two numbers near 1: below this they are nothing."""


PRECISIONS = [Precision(mx.float64, 1e-6, 1e-12), Precision(mx.float32, 1e-5, 2e-7)]


@pytest.fixture(params=PRECISIONS, ids=["float64", "float32"])
def precision(request: pytest.FixtureRequest):
    """float64 lives on the CPU only; there float32 is held to its limit as well."""
    with mx.stream(mx.cpu):
        yield request.param


def name_of(case: dict[str, Any]) -> str:
    """Of a case, for humans."""
    options = case.get("options") or case.get("settings") or {"": case.get("alpha")}
    words = [case.get("method"), case.get("loss"), case.get("kind"), case.get("sides"), *case.get("extras", [])]
    return "-".join([str(word) for word in words if word] + [f"{k}={v}" for k, v in options.items() if k != "beta"])


def arrays(numbers: Any, dtype: mx.Dtype) -> mx.array:
    """Numbers of the file; null is NaN."""
    return mx.array(np.array(numbers, np.float64), dtype=dtype)


def assert_same(ours: mx.array, theirs: Any, precision: Precision, *, floor: float = 0.0) -> None:
    assert ours.dtype == precision.dtype  # nothing on the way was made less
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=precision.relative, atol=floor)


def assert_slopes(ours: mx.array, theirs: Any, precision: Precision) -> None:
    """Slopes can be differences of larger ones: what counts is how much of the largest they are off."""
    assert_same(ours, theirs, precision, floor=precision.relative * float(np.abs(theirs).max()))


def slopes(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    return mx.grad(lambda x: function(x).sum())(x)


def test_every_loss_has_numbers():
    assert {case["loss"] for case in GOLDEN["pairs"]} == set(losses.names())


@pytest.mark.parametrize("case", GOLDEN["pairs"], ids=name_of)
def test_values_and_slopes_of_a_pair_loss(case: dict[str, Any], precision: Precision):
    pair = Pair(*(arrays(x, precision.dtype) for x in GOLDEN["sides"][case["sides"]].values()))

    def measure(pair: Pair) -> mx.array:
        return getattr(losses, case["loss"])(pair, **case["options"])

    assert_same(measure(pair), case["values"], precision, floor=precision.floor * (case["sides"] == "far"))
    for side in ("chosen", "rejected"):
        found = slopes(lambda x, side=side: measure(pair._replace(**{side: x})), getattr(pair, side))
        assert_slopes(found, case[side], precision)


@pytest.mark.parametrize("case", GOLDEN["divergences"], ids=name_of)
def test_scores_of_other_divergences(case: dict[str, Any], precision: Precision):
    ratio = arrays(case["ratio"], precision.dtype)
    measure = lambda u: losses.divergence(u, case["kind"], case["alpha"])  # noqa: E731
    assert_same(measure(ratio), case["values"], precision, floor=precision.floor)
    assert_slopes(slopes(measure, ratio), case["slopes"], precision)


@pytest.mark.parametrize("case", GOLDEN["singles"], ids=name_of)
def test_values_and_slopes_of_losses_of_single_completions(case: dict[str, Any], precision: Precision):
    ratio, label = arrays(case["ratio"], precision.dtype), arrays(case["label"], precision.dtype)
    options = {k: arrays(v, precision.dtype) if k == "kl" else v for k, v in case["options"].items()}
    measure = lambda ratio: getattr(losses, case["loss"])(ratio, label, **options)  # noqa: E731
    assert_same(measure(ratio), case["values"], precision, floor=precision.floor)
    assert_slopes(slopes(measure, ratio), case["slopes"], precision)


@pytest.mark.parametrize("case", GOLDEN["methods"], ids=name_of)
def test_sums_and_token_slopes_of_a_method(case: dict[str, Any], precision: Precision):
    """From the log-prob of every token to the sum over the batch, and back to the slope of every trained token."""
    module = methods.find(case["method"])
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in case["settings"].items()}
    config = module.Config(**settings)
    batch, scores = made_of(case, precision.dtype)
    batch.extras.update(weight_of_tokens(case, precision.dtype))
    out = module.loss(scores, batch, config)
    assert_same(out.total, case["total"], precision)
    assert out.count.item() == case["count"]
    found = slopes(lambda logps: module.loss(scores._replace(logps=logps), batch, config).total, scores.logps)
    assert_slopes(found.reshape(-1)[batch.positions], case["slopes"], precision)


def made_of(case: dict[str, Any], dtype: mx.Dtype) -> tuple[Batch, Scores]:
    """The batch and what the policy says of it, as far as losses look at them."""
    numbers = GOLDEN["tokens"][case["tokens"]]
    mask = np.array(numbers["mask"], bool)
    prompts = max(numbers["row_prompt"]) + 1
    ref = arrays(numbers["ref_token_logps"], dtype)
    extras = {"row": mx.array(numbers["row"]), "ref_token_logps": ref, "ref_logps": ref.sum(-1)}
    if case["method"] in ("orpo", "cpo"):  # no reference
        extras = {"row": mx.array(numbers["row"])}
    extras |= {name: arrays(numbers[name], dtype) for name in (*case["extras"], "label") if name in numbers}
    extras |= {"kl": arrays(case["kl"], dtype)} if "kl" in case else {}
    batch = Batch(
        prompt=mx.zeros((prompts, 6), mx.int32),
        prompt_pad=mx.array(numbers.get("prompt_pad", [0] * prompts)),
        completion=mx.zeros(mask.shape, mx.int32),
        row_prompt=mx.array(numbers["row_prompt"]),
        mask=mx.array(mask),
        positions=mx.array(np.flatnonzero(mask).astype(np.int32)),
        extras=extras,
    )
    token = {name: arrays(numbers[name], dtype) for name in ("logps", "log_sum_sq", "prompt_logps") if name in numbers}
    zero = mx.zeros(mask.shape)
    return batch, Scores(token["logps"], zero, zero, token["log_sum_sq"], token.get("prompt_logps"))


def weight_of_tokens(case: dict[str, Any], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Pairs over chosen tokens, counted by hand: 6 pairs; 4 + 6 + 1 + 5 chosen tokens, and 3 + 5 + 0 + 2 of prompts."""
    tokens = 16 + 10 * case["settings"].get("nll_on_prompt", False)
    return {"nll_weight": arrays(6 / tokens, dtype)} if case["tokens"] == "pairs" else {}


def test_kto_measures_its_distance_on_completions_of_other_rows():
    """Each row's prompt gets the completion of the row before it, the first that of the last; z is never negative."""
    kto, asked = methods.find("kto"), []
    rows = [Example(np.array([i]), (Completion(np.array([10 + i]), np.array([True])),), i, "", {}) for i in range(3)]

    def window(*answers: float) -> float:
        def ratios(examples: list[Example]) -> mx.array:
            asked.append([(int(e.prompt[0]), int(e.completions[0].tokens[0])) for e in examples])
            return mx.array(answers)

        return kto.window(rows, kto.Config(), ratios)["kl"].item()

    assert window(0.5, -0.25, 2.0) == 0.75
    assert window(-1.0, 0.25, 0.5) == 0.0
    assert asked == 2 * [[(0, 12), (1, 10), (2, 11)]]


def test_orpo_without_its_likelihood_is_the_odds_ratio(precision: Precision):
    """With weight 0 of the likelihood what is left is the loss of pairs alone."""
    case = next(case for case in GOLDEN["methods"] if case["method"] == "orpo")
    batch, scores = made_of(case, precision.dtype)
    batch.extras["nll_weight"] = mx.array(0.0)
    out = methods.find("orpo").loss(scores, batch, methods.find("orpo").Config(beta=0.25))
    nll = -np.array(GOLDEN["tokens"]["pairs"]["logps"])[np.array(batch.extras["row"]) == 0].sum()
    assert_same(out.total, case["total"] - nll * 6 / 16, precision)


@pytest.mark.parametrize("alpha", [0.25, -0.5, 0.0])
def test_alphapo_bends_log_probs(alpha: float, precision: Precision):
    """(1 - p^-alpha) / alpha of probabilities 1, 1/2 and 1/16, by hand."""
    logps = arrays(np.log([1.0, 1 / 2, 1 / 16]), precision.dtype)
    expected = {
        0.25: [0, (1 - 2**0.25) / 0.25, (1 - 2.0) / 0.25],
        -0.5: [0, (1 - 2**-0.5) / -0.5, (1 - 1 / 4) / -0.5],
        0.0: np.log([1.0, 1 / 2, 1 / 16]),
    }
    assert_same(losses.alphapo(logps, alpha), expected[alpha], precision)
    assert_same(slopes(lambda x: losses.alphapo(x, alpha), logps), np.exp(-alpha * np.array(logps)), precision)


def test_log1mexp_is_right_at_both_ends(precision: Precision):
    """log(1 - p) of p near 0 is -p - p^2/2; of p near 1 it is log(1 - p); at 1/2 both branches meet."""
    x = [-20.0, -8.0, -0.75, -0.5, -(2.0**-10), -(2.0**-16)]
    expected = [-np.exp(-20) - np.exp(-40) / 2, np.log1p(-np.exp(-8)), *np.log(-np.expm1(x[2:]))]
    assert_same(losses.log1mexp(arrays(x, precision.dtype)), expected, precision)
    half = losses.log1mexp(arrays([np.log(0.5)], precision.dtype))
    assert_same(half, [np.log(0.5)], precision)
    assert_same(slopes(losses.log1mexp, arrays(x, precision.dtype)), -1 / np.expm1(-np.array(x)), precision)
    certain = mx.grad(lambda x: losses.log1mexp(x).sum())(arrays([0.0, -1e-9], precision.dtype))
    assert np.isfinite(np.array(certain)).all()
