# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Make `losses.json`: values and gradients of every preference loss, from the formulas alone (`loss_formulas.py`).

    python tests/golden/make_losses.py

NumPy only, in extended precision where the machine has it. A gradient is a complex step, Im f(x + ih) / h with h near
0: no difference is taken, so nothing cancels, and its digits are as right as those of f. Losses of pairs are given
sums of log-probs (`sides`); those of methods are given single tokens (`tokens`), and every token has its slope.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from loss_formulas import REAL, Array, Sides, Tokens, cpo, divergence, dpo, kto, loss, orpo, unpaired

HERE = Path(__file__).parent
STEP = REAL(1e-60)
TINY = 2.0**-10  # every input is a multiple of it, so that float32 holds it exactly

# Inputs. -------------------------------------------------------------------------------------------------------------


def draw(random: np.random.RandomState, shape: Any, low: float, high: float) -> np.ndarray:
    return grid(low + (high - low) * random.random_sample(shape))


def grid(x: Any) -> np.ndarray:
    return np.round(np.asarray(x) / TINY) * TINY


def make_sides() -> dict[str, dict[str, list[float]]]:
    """two: those of the papers' tables; six: of uneven length; margins: six with margins; far: ratios of +-300."""
    random = np.random.RandomState(11)
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_length", "rejected_length", "margin")
    two = ([-12, -30], [-14, -28], [-13, -29], [-13.5, -29.5], [6, 10], [7, 8], [0, 0])
    lengths = np.array([[1, 3, 5, 8, 12, 20], [4, 2, 9, 5, 16, 11]])
    own = grid(-lengths * draw(random, (2, 6), 0.3, 2.5))
    other = own + draw(random, (2, 6), -4, 4)
    six = (*own, *other, *lengths, np.zeros(6))
    far = (
        [-20, -320, -25, -329, -12.5, -TINY],
        [-330, -15, -42, -308, -300, -2],
        [-320, -20, -324, -30, -13, -298],
        [-30, -315, -340, -10, -0.5, -1.5],
        [8, 120, 9, 130, 5, 8],
        [130, 6, 20, 110, 90, 2],
        [0] * 6,
    )
    sets = {"two": two, "six": six, "margins": (*six[:-1], [0.5, -0.25, 2, 0, 1.5, 0.75]), "far": far}
    return {name: dict(zip(names, map(plain, numbers), strict=True)) for name, numbers in sets.items()}


def make_tokens() -> dict[str, dict[str, Any]]:
    """`pairs`: 4 prompts, 6 pairs, holes in two masks, a rejected row before its chosen one; `single`: 7 rows."""
    random = np.random.RandomState(12)
    sets = {}
    for name, lengths, row, row_prompt in (
        ("pairs", [4, 6, 7, 3, 9, 2, 1, 5, 8, 5], [0, 1, 0, 1, 2, 1, 0, 0, 1, 2], [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        ("single", [5, 2, 7, 1, 4, 6, 3], [0] * 7, list(range(7))),
    ):
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        mask[2, 2] = mask[-2, 3] = False
        logps = draw(random, mask.shape, -3, -0.05) * mask
        ref = np.minimum(logps + draw(random, mask.shape, -0.5, 0.5), -TINY) * mask
        found: dict[str, Any] = {"mask": mask.astype(int).tolist(), "row": row, "row_prompt": row_prompt}
        found |= {"logps": plain(logps), "ref_token_logps": plain(ref)}
        found |= {"log_sum_sq": plain(draw(random, mask.shape, -3, -0.05) * mask)}
        if name == "pairs":
            lengths = np.array([3, 5, 0, 2])[:, None]  # a prompt of one token has none that anything predicts
            found["prompt_pad"] = (5 - lengths[:, 0]).tolist()
            found["prompt_logps"] = plain(draw(random, (4, 5), -4, -0.1) * (np.arange(5) >= 5 - lengths))
            found["margin"] = [0.5, None, 1.25, 0.0]
            found["scores"] = [3.5, 1.0, 8.0, 6.5, None, 2.0, 9.0, 1.0, 1.0, 0.25]
            found["tie"] = [0.0, 1.0, None, 1.0]
        else:
            found["label"] = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
        sets[name] = found
    return sets


# The cases. ----------------------------------------------------------------------------------------------------------

EXO, ROBUST = {"label_smoothing": 1e-3}, {"label_smoothing": 0.1}
DISCOPOP, SIMPO = {"discopop_tau": 0.05}, {"gamma": 0.5}
SETS = ("two", "six", "far")
PAIR_CASES: list[tuple[str, dict[str, float], tuple[str, ...]]] = [
    ("sigmoid", {}, (*SETS, "margins")),
    ("sigmoid", ROBUST, (*SETS, "margins")),
    ("hinge", {}, (*SETS, "margins")),
    ("hinge", {"beta": 0.7}, ("six", "margins")),
    ("ipo", {}, SETS),
    ("robust", ROBUST, SETS),
    ("exo_pair", EXO, SETS),
    ("exo_pair", {"label_smoothing": 0.3}, ("six",)),
    ("nca_pair", {}, SETS),
    ("bco_pair", {}, SETS),
    ("sppo_hard", {}, SETS),
    ("aot", {}, SETS),
    ("aot", ROBUST, SETS),
    ("aot_unpaired", {}, SETS),
    ("aot_unpaired", ROBUST, SETS),
    ("apo_zero", {}, SETS),
    ("apo_down", {}, SETS),
    ("discopop", DISCOPOP, SETS),
    ("discopop", {"discopop_tau": 1.0}, SETS),
    ("sigmoid_norm", {"beta": 5.0}, (*SETS, "margins")),
    ("dpop", {"dpop_lambda": 50.0}, SETS),
    ("dpop", {"dpop_lambda": 2.0, "beta": 0.3}, ("six",)),
    ("simpo", {"beta": 2.0, **SIMPO}, (*SETS, "margins")),
    ("simpo", {"beta": 10.0, "gamma": 3.0, **ROBUST}, ("six", "margins")),
    ("odds_ratio", {}, SETS),
    ("odds_ratio", {"beta": 1.0}, ("six",)),
]
DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": -0.75},
]
OWN: dict[str, dict[str, Any]] = {
    "exo_pair": EXO,
    "robust": ROBUST,
    "discopop": DISCOPOP,
    "dpop": {"dpop_lambda": 50.0},
}
BY_NAME = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"),  # these take divergences
    *("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "dpop"),
)
DPO: list[tuple[dict[str, Any], list[str]]] = [  # settings, extras of the batch
    *[({"loss_type": [name], **OWN.get(name, {})}, []) for name in BY_NAME],
    *[({"loss_type": [name], **OWN.get(name, {}), **f}, []) for name in BY_NAME[:7] for f in DIVERGENCES[:3]],
    ({"loss_type": ["sigmoid"], **DIVERGENCES[3]}, []),
    ({"loss_type": ["sigmoid"], **ROBUST}, []),
    *[({"loss_type": [name], "ld_alpha": 0.3}, []) for name in ("sigmoid", "ipo", "nca_pair")],
    ({"loss_type": ["sigmoid"], "ld_alpha": 0.0}, []),
    *[({"loss_type": [name], "use_weighting": True}, []) for name in ("sigmoid", "ipo")],
    *[({"loss_type": [name], "margin_scale": 0.8}, ["margin"]) for name in ("sigmoid", "hinge", "sigmoid_norm")],
    ({"loss_type": ["sigmoid"], "margin_scale": 0.25}, ["margin", "scores"]),
    ({"loss_type": ["sigmoid"], "margin_scale": 0.25}, ["scores"]),
    *[({"loss_type": [name], **OWN.get(name, {})}, ["tie"]) for name in ("sigmoid", "ipo", "apo_zero", "dpop")],
    ({"loss_type": ["sft"]}, []),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, []),
    ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, []),
]
CPO: list[tuple[dict[str, Any], list[str]]] = [
    *[({"loss_type": name, "beta": 0.1, "cpo_alpha": 1.0}, []) for name in ("sigmoid", "hinge", "ipo")],
    ({"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.0, **ROBUST}, []),
    ({"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "gamma": 1.0}, []),
    ({"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.5, "gamma": 1.0}, []),
    *[
        ({"loss_type": name, "beta": 2.0, "cpo_alpha": 0.0, "gamma": 1.0, "alpha": alpha}, [])
        for name in ("alphapo", "simpo", "ipo")
        for alpha in (0.25, -0.5)
    ],
    ({"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0, "alpha": -0.5}, []),
    ({"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "gamma": 1.0, "margin_scale": 0.8}, ["margin"]),
    ({"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "gamma": 1.0}, ["tie"]),
]
KTO: list[dict[str, Any]] = [
    {"loss_type": "kto", "beta": 0.1, "kl": 0.0},
    {"loss_type": "kto", "beta": 0.3, "kl": 1.75, "desirable_weight": 1.25, "undesirable_weight": 0.75},
    {"loss_type": "apo_zero_unpaired", "beta": 0.1},
    {"loss_type": "apo_zero_unpaired", "beta": 0.5, "desirable_weight": 0.5, "undesirable_weight": 2.0},
]


# Writing. ------------------------------------------------------------------------------------------------------------


def slopes(function: Callable[[Array], Array], x: np.ndarray) -> np.ndarray:
    """d sum(function) / dx, entry by entry."""
    found = np.zeros(x.shape, REAL)
    for place in np.ndindex(x.shape):
        moved = x.astype(np.clongdouble)
        moved[place] += 1j * STEP
        found[place] = np.sum(function(moved)).imag / STEP
    return found


def plain(x: Any) -> list[Any]:
    return (np.asarray(x, np.float64) + 0.0).tolist()  # no -0.0


def pair_cases(sets: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    cases = []
    for name, options, where in PAIR_CASES:
        options = {"beta": 0.1, **options}
        for key in where:
            s = Sides(*(np.array(x, REAL) for x in sets[key].values()))
            case: dict[str, Any] = {"loss": name, "sides": key, "options": options}
            case["values"] = plain(loss(name, s, **options))
            case["chosen"] = plain(slopes(lambda c, s=s, n=name, o=options: loss(n, s._replace(c=c), **o), s.c))
            case["rejected"] = plain(slopes(lambda r, s=s, n=name, o=options: loss(n, s._replace(r=r), **o), s.r))
            cases.append(case)
    return cases


def divergence_cases() -> list[dict[str, Any]]:
    ratio = np.array([-300, -20, -2.5, -0.25, 0.25, 3, 20, 300], REAL)
    kinds = [(f["f_divergence_type"], f.get("f_alpha_divergence_coef", 0.5)) for f in DIVERGENCES]
    cases = []
    for kind, alpha in (*kinds, ("alpha_divergence", 2.0), ("alpha_divergence", 1.0), ("reverse_kl", 0.5)):
        case: dict[str, Any] = {"kind": kind, "alpha": alpha, "ratio": plain(ratio)}
        case["values"] = plain(divergence(ratio, kind, alpha))
        case["slopes"] = plain(slopes(lambda u, k=kind, a=alpha: divergence(u, k, a), ratio))
        cases.append(case)
    return cases


def single_cases() -> list[dict[str, Any]]:
    ratio = np.array([-300, -8.25, -0.5, 0.25, 2, 15.5, 300] * 2, REAL)
    label = np.repeat([1.0, 0.0], 7)
    cases = []
    for settings in KTO:
        options = {k: v for k, v in settings.items() if k != "loss_type"}
        good, bad = options.get("desirable_weight", 1), options.get("undesirable_weight", 1)
        arguments = (label, options["beta"], options.get("kl", 0), good, bad)
        case: dict[str, Any] = {"loss": settings["loss_type"], "options": options}
        case |= {"ratio": plain(ratio), "label": plain(label), "values": plain(kto(ratio, *arguments))}
        case["slopes"] = plain(slopes(lambda r, a=arguments: kto(r, *a), ratio))
        cases.append(case)
    return cases


def method_cases(sets: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    asked: list[tuple[str, Callable[..., Array], dict[str, Any], list[str]]] = [
        *[("dpo", dpo, {"beta": 0.1, **settings}, extras) for settings, extras in DPO],
        *[("orpo", orpo, {"beta": 0.25, "nll_on_prompt": on}, []) for on in (False, True)],
        ("orpo", orpo, {"beta": 0.25}, ["tie"]),
        *[("cpo", cpo, settings, extras) for settings, extras in CPO],
        *[("kto", unpaired, settings, []) for settings in KTO],
    ]
    cases = []
    for name, method, settings, extras in asked:
        which = "single" if name == "kto" else "pairs"
        tokens = Tokens(sets[which], extras)
        logps, mask = tokens["logps"], tokens["mask"] == 1
        measure = lambda x, m=method, t=tokens, s=settings: m(t, x, **s)  # noqa: E731
        own = {k: v for k, v in settings.items() if k != "kl"}
        case: dict[str, Any] = {"method": name, "tokens": which, "extras": extras, "settings": own}
        case |= {"kl": settings["kl"]} if "kl" in settings else {}
        case |= {"total": float(measure(logps)), "count": len(tokens.pairs) or len(mask)}
        cases.append(case | {"slopes": plain(slopes(measure, logps)[mask])})
    return cases


def main() -> None:
    own, tokens = make_sides(), make_tokens()
    parts = {"pairs": pair_cases(own), "divergences": divergence_cases(), "singles": single_cases()}
    parts["methods"] = method_cases(tokens)
    texts = [f'"{name}": {json.dumps(numbers)}' for name, numbers in (("sides", own), ("tokens", tokens))]
    for name, cases in parts.items():
        texts.append(f'"{name}": [\n' + ",\n".join(json.dumps(case) for case in cases) + "\n]")
    (HERE / "losses.json").write_text("{\n" + ",\n".join(texts) + "\n}\n")


if __name__ == "__main__":
    main()
