# SPDX-License-Identifier: Apache-2.0
"""Formulas of the preference losses in NumPy, real or complex: what `make_losses.py` takes its numbers from.

Written from the papers and from TRL 1.16's definitions, apart from the package. Here c is chosen, r is rejected, and
lengths are in trained tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

REAL = np.longdouble
LN2 = np.log(REAL(2))
Array = Any  # of REAL, or of its complex type


class Sides(NamedTuple):
    """N pairs: log-probs of policy and reference, lengths, demanded margins."""

    c: Array
    r: Array
    ref_c: Array
    ref_r: Array
    length_c: Array
    length_r: Array
    margin: Array

    @property
    def u(self) -> Array:
        """Log-ratio of chosen."""
        return self.c - self.ref_c

    @property
    def v(self) -> Array:
        """Log-ratio of rejected."""
        return self.r - self.ref_r

    def turned(self) -> "Sides":
        """Chosen for rejected; a demanded margin stays."""
        return Sides(self.r, self.c, self.ref_r, self.ref_c, self.length_r, self.length_c, self.margin)


# What the formulas are made of, for real and complex arguments. ------------------------------------------------------


def log_sigmoid(x: Array) -> Array:
    up = x.real > 0
    return np.where(up, 0, x) - np.log1p(np.exp(np.where(up, -x, x)))


def sigmoid(x: Array) -> Array:
    return np.exp(log_sigmoid(x))


def positive(x: Array) -> Array:
    return np.where(x.real > 0, x, 0)


def at_most(x: Array, limit: float) -> Array:
    return np.where(x.real < limit, x, limit)


def log1mexp(x: Array) -> Array:
    low = x.real < -LN2
    return np.where(low, np.log1p(-np.exp(np.where(low, x, -1))), np.log(-np.expm1(np.where(low, -1, x))))


def smoothed(z: Array, e: float) -> Array:
    return -(1 - REAL(e)) * log_sigmoid(z) - REAL(e) * log_sigmoid(-z)


def divergence(u: Array, kind: str, alpha: float = 0.5) -> Array:
    """f'(e^u); exponents end at 80, which float32 still holds."""
    if kind == "forward_kl":
        return 1 - np.exp(at_most(-u, 80))
    if kind == "js_divergence":
        return LN2 + log_sigmoid(u)
    if kind == "alpha_divergence" and alpha != 1:
        return (np.exp(at_most((alpha - 1) * u, 80)) - 1) / (REAL(alpha) - 1)
    return u


def bent(p: Array, alpha: float) -> Array:
    """AlphaPO's reward of a log-prob."""
    return (1 - np.exp(-alpha * p)) / alpha if alpha else p


# Losses. -------------------------------------------------------------------------------------------------------------


def loss(name: str, s: Sides, beta: float, **o: float) -> Array:
    """[N]: the loss of each pair; o: options under the names of the command line."""
    b, e = REAL(beta), o.get("label_smoothing", 0.0)
    z = b * (s.u - s.v)
    per_token = s.u / s.length_c - s.v / s.length_r
    match name:
        case "sigmoid":
            return smoothed(z - s.margin, e)
        case "hinge":
            return positive(1 + s.margin - z)
        case "ipo":
            return (per_token - 1 / (2 * b)) ** 2
        case "robust":
            return (-(1 - REAL(e)) * log_sigmoid(z) + REAL(e) * log_sigmoid(-z)) / (1 - 2 * REAL(e))
        case "exo_pair":
            other = sigmoid(-z) * (log_sigmoid(-z) - np.log(REAL(e)))
            return sigmoid(z) * (log_sigmoid(z) - np.log1p(-REAL(e))) + other
        case "nca_pair":
            return -log_sigmoid(b * s.u) - log_sigmoid(-b * s.u) / 2 - log_sigmoid(-b * s.v) / 2
        case "bco_pair":
            return -log_sigmoid(b * s.u) - log_sigmoid(-b * s.v)
        case "sppo_hard":
            return (s.u - 1 / (2 * b)) ** 2 + (s.v + 1 / (2 * b)) ** 2
        case "aot":
            return smoothed(b * (np.sort(s.c - s.r) - np.sort(s.ref_c - s.ref_r)), e)
        case "aot_unpaired":
            return smoothed(b * (np.sort(s.u) - np.sort(s.v)), e)
        case "apo_zero":  # 1 - sigmoid(x) = sigmoid(-x)
            return sigmoid(-b * s.u) + sigmoid(b * s.v)
        case "apo_down":
            return sigmoid(b * s.u) + sigmoid(-z)
        case "discopop":
            m = z / REAL(o["discopop_tau"])
            return -log_sigmoid(z) * sigmoid(-m) + np.exp(log_sigmoid(m) - z)
        case "sigmoid_norm":
            return -log_sigmoid(b * per_token - s.margin)
        case "dpop":
            return -log_sigmoid(z - b * REAL(o["dpop_lambda"]) * positive(s.ref_c - s.c))
        case "simpo":
            return smoothed(b * (s.c / s.length_c - s.r / s.length_r) - o["gamma"] - s.margin, e)
        case "odds_ratio":
            p, q = s.c / s.length_c, s.r / s.length_r
            return -b * log_sigmoid((p - q) - (log1mexp(p) - log1mexp(q)))
    raise KeyError(name)


def kto(ratio: Array, label: Array, beta: float, kl: float, good: float, bad: float) -> Array:
    """With kl 0 it is apo_zero_unpaired."""
    z = REAL(beta) * (ratio - kl)
    return np.where(label == 1, good * sigmoid(-z), bad * sigmoid(z))


# Whole methods, from single tokens. ----------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Numbers of a batch's tokens, by name, and its pairs as rows (chosen, rejected)."""

    numbers: dict[str, Any]
    extras: list[str]
    """What the batch is said to have of margin, scores and tie."""

    def __post_init__(self) -> None:
        prompts, row = self.numbers["row_prompt"], self.numbers["row"]
        chosen = {p: i for i, p in enumerate(prompts) if row[i] == 0}
        self.pairs = [(chosen[p], i) for i, p in enumerate(prompts) if row[i] != 0]

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array(self.numbers[name], float).astype(REAL)

    def of_pairs(self, name: str) -> np.ndarray:
        """A number of each pair's prompt."""
        return self[name][[self.numbers["row_prompt"][r] for _, r in self.pairs]]

    def sides(self, logps: Array, ref: Array, *, margin_scale: float = 0, ld_alpha: float | None = None) -> Sides:
        """Sums over the trained tokens; those beyond the shorter completion's count ld_alpha."""
        mask = self["mask"]
        place, length = mask.cumsum(1), mask.sum(1)
        beyond = REAL(1 if ld_alpha is None else ld_alpha)
        columns = []
        for pair in self.pairs:
            common = min(length[list(pair)])
            weights = [mask[i] * np.where(place[i] <= common, 1, beyond) for i in pair]
            sums = [(x[i] * weight).sum() for x in (logps, ref) for i, weight in zip(pair, weights, strict=True)]
            columns.append([*sums, *length[list(pair)]])
        c, r, ref_c, ref_r, length_c, length_r = np.array(columns).T
        return Sides(c, r, ref_c, ref_r, length_c, length_r, self.margins() * margin_scale)

    def margins(self) -> np.ndarray:
        """The row's margin, else the difference of its scores, else 0."""
        found = np.full(len(self.pairs), np.nan)
        if "scores" in self.extras:
            found = np.array([self["scores"][c] - self["scores"][r] for c, r in self.pairs])
        if "margin" in self.extras:
            found = np.where(np.isnan(self.of_pairs("margin")), found, self.of_pairs("margin"))
        return np.nan_to_num(found, nan=0)

    def either(self, measure: Callable[[Sides], Array], s: Sides) -> Array:
        """[N]; a pair of equals counts half in either order."""
        if "tie" not in self.extras:
            return measure(s)
        return np.where(self.of_pairs("tie") == 1, (measure(s) + measure(s.turned())) / 2, measure(s))

    def nll(self, logps: Array) -> tuple[Array, int]:
        """Sum over the chosen tokens, and how many they are."""
        rows = sorted({c for c, _ in self.pairs})
        return -(logps * self["mask"])[rows].sum(), int(self["mask"][rows].sum())


def dpo(t: Tokens, logps: Array, *, beta: float, loss_type: list[str], **o: Any) -> Array:
    """Sum over the pairs; a token mean beside them counts once for each of them."""
    s = t.sides(logps, t["ref_token_logps"], margin_scale=o.get("margin_scale", 0), ld_alpha=o.get("ld_alpha"))
    weights: Any = 1
    if o.get("use_weighting"):  # WPO; of the log-probs as they are: no slope
        of_row = np.exp(((logps.real - t["log_sum_sq"]) * t["mask"]).sum(1) / t["mask"].sum(1))
        weights = np.array([of_row[c] * of_row[r] for c, r in t.pairs])
    options = {k: o[k] for k in ("label_smoothing", "discopop_tau", "dpop_lambda") if k in o}
    total: Any = 0
    for name, weight in zip(loss_type, o.get("loss_weights", [1] * len(loss_type)), strict=True):
        if name == "sft":
            nll, count = t.nll(logps)
            total += REAL(weight) * nll * len(t.pairs) / count
        else:
            measure = lambda s, name=name: loss(name, scored(s, o), beta, **options)  # noqa: E731
            total += REAL(weight) * (weights * t.either(measure, s)).sum()
    return total


def scored(s: Sides, o: dict[str, Any]) -> Sides:
    """With the scores of another divergence in the place of log-ratios."""
    if "f_divergence_type" not in o:
        return s
    c, r = (divergence(x, o["f_divergence_type"], o.get("f_alpha_divergence_coef", 0.5)) for x in (s.u, s.v))
    return s._replace(c=c, r=r, ref_c=0, ref_r=0)


def orpo(t: Tokens, logps: Array, *, beta: float, nll_on_prompt: bool = False) -> Array:
    """As dpo; on the prompt, every prompt token but its first counts as well."""
    nll, count = t.nll(logps)
    if nll_on_prompt:
        nll, count = nll - t["prompt_logps"].sum(), count + int((5 - t["prompt_pad"]).sum())
    pairs = t.either(lambda s: loss("odds_ratio", s, beta), t.sides(logps, 0 * logps)).sum()
    return pairs + nll * len(t.pairs) / count


def cpo(t: Tokens, logps: Array, *, loss_type: str, beta: float, cpo_alpha: float, **o: Any) -> Array:
    """As dpo; sigmoid and hinge compare sums, the others means, AlphaPO what `bent` makes of them."""
    s = t.sides(logps, 0 * logps, margin_scale=o.get("margin_scale", 0))
    sums = loss_type in ("sigmoid", "hinge")
    c, r = (bent(x, o.get("alpha", 0)) for x in ((s.c, s.r) if sums else (s.c / s.length_c, s.r / s.length_r)))
    one = np.ones(len(t.pairs))
    s = s._replace(c=c, r=r, length_c=one, length_r=one)
    name = "simpo" if loss_type == "alphapo" else loss_type
    options = {k: o[k] for k in ("label_smoothing", "gamma") if k in o}
    nll, count = t.nll(logps)
    pairs = t.either(lambda s: loss(name, s, beta, **options), s).sum()
    return pairs + REAL(cpo_alpha) * nll * len(t.pairs) / count


def unpaired(t: Tokens, logps: Array, *, loss_type: str, beta: float, kl: float = 0.0, **o: Any) -> Array:
    """Sum over the completions."""
    ratio = ((logps - t["ref_token_logps"]) * t["mask"]).sum(1)
    good, bad = o.get("desirable_weight", 1), o.get("undesirable_weight", 1)
    return kto(ratio, t["label"], beta, kl, good, bad).sum()
