# SPDX-License-Identifier: Apache-2.0
"""Notes of what config.json says and a model file of mlx-lm does not read, where that changes the arithmetic."""

import copy
import math
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from .arguments_read import FIXED_THETA, LOCAL_THETA, NOT_SCALING, PARTIAL, THETA, Taken, by_transformers, source_of


class Rule(NamedTuple):
    """Keys that change the arithmetic where they are not read."""

    names: str  # a pattern of the whole name
    neutral: tuple[Any, ...]
    meaning: str


# Keys that add or resize tensors (biases, norms, heads) are not here: weights that do not fit are refused anyway.
RULES = [
    Rule(r"rope_theta|rotary_emb_base|rope_local_base_freq", (), "positions turn at another pace"),
    Rule(r"partial_rotary_factor|rotary_pct", (1,), "another part of each head is turned by position"),
    Rule(r"(\w+_)?(multipliers?|logits?_scal(e|ing)|scale_emb|scale_depth)", (1,), "values are not multiplied by it"),
    Rule(r"\w*soft_?cap(ping)?", (0,), "logits are not capped"),
    Rule(r"(q(kv)?_)?clip_qkv", (0,), "queries, keys and values are not clipped"),
    Rule(r"norm_topk_prob", (False,), "experts are weighed otherwise"),
    Rule(r"routed_scaling_factor", (1,), "experts are weighed otherwise"),
    Rule(r"use_parallel_residual|parallel_attn", (False,), "attention and MLP are joined otherwise"),
    Rule(r"alibi|use_alibi", (False,), "positions are counted otherwise"),
    Rule(r"scale_attn_by_inverse_layer_idx", (False,), "attention is scaled otherwise"),
    Rule(r"attention_chunk_size", (), "attention looks further back"),
]
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "mlp_hidden_act")
FAMILIES = [  # (in config.json, in the source of a model file that computes it)
    (r"silu|swish\w*", r"silu|swi(tch)?glu|swish"),
    (r"gelu(_python)?", r"\bgelu\(|nn\.gelu\b|gelu\(\)|approx=.none"),
    (r"gelu_\w+|quick_gelu", r"gelu_\w*approx|geglu|approx=.(precise|tanh|fast)|tanh"),
    (r"relu\w*", r"relu"),
]
WINDOWS = ("sliding_window_size", "attention_window_size")  # what else model files call it
IGNORED = {"mrope_section", "mrope_interleaved", "finetuned", "attn_factor"}  # nothing to text alone, or left to mlx-lm


def notes(taken: Taken) -> Iterator[str]:
    """One line for each key that changes the arithmetic and is not read; none where it says what is done anyway."""
    part = taken.part
    for key, value in part.items():
        found = rule(key)
        if found and not taken.reads(key) and not _neutral(found, value) and not _done_otherwise(taken, key, value):
            yield _note(taken, key, value, found.meaning)
    yield from _lost_scaling(taken)
    yield from _lost_windows(taken)
    yield from _lost_activation(taken)
    scalar = part.get("query_pre_attn_scalar")
    if scalar and scalar != taken.head_dim and not taken.reads("query_pre_attn_scalar"):
        yield _note(taken, "query_pre_attn_scalar", scalar, "attention is scaled otherwise")


def rule(key: str) -> Rule | None:
    """What this key is about, where it changes the arithmetic."""
    return next((one for one in RULES if re.fullmatch(one.names, key)), None)


def _neutral(found: Rule, value: Any) -> bool:
    """Whether a value, or each of a list, changes nothing."""
    if isinstance(value, list):
        return all(_neutral(found, one) for one in value)
    return value is None or isinstance(value, dict | str) or value in found.neutral


def _done_otherwise(taken: Taken, key: str, value: Any) -> bool:
    """Whether the model file does the same by another name or by default, always does it, or has no use for it."""
    if key == "attention_chunk_size":
        return value >= _longest(taken)
    if "cap" in key:  # one file caps at a number of its own
        return re.search(rf"cap\w*(: float)?\s*=\s*{re.escape(str(float(value)))}\b", taken.source) is not None
    if key == "norm_topk_prob":
        return re.search(r"/ (denominator|\(?\w+\.sum\()", taken.source) is not None
    same = next((names for names in (THETA, LOCAL_THETA, PARTIAL) if key in names), ())
    whole = "rope_parameters" in taken.part and "rope_parameters" in taken.fields
    read = [name for name in same if taken.reads(name)]
    named = any(name in taken.part or taken.value(name) == value for name in read)
    usual = {**dict.fromkeys(THETA, FIXED_THETA), **dict.fromkeys(LOCAL_THETA, _theta(taken))}
    alike = not read and usual.get(key) == value
    return bool(same) and (whole or named or alike or not re.search(r"rope\(", taken.source.lower()))


def _theta(taken: Taken) -> Any:
    """The pace at which the positions of all layers turn, where no other is read for some."""
    return next((taken.value(name) for name in THETA if taken.reads(name)), FIXED_THETA)


def _note(taken: Taken, key: str, value: Any, meaning: str) -> str:
    return f"config.json says {key} {value}, which mlx-lm's {taken.name} does not read: {meaning}"


def _lost_scaling(taken: Taken) -> Iterator[str]:
    scaling = taken.part.get("rope_scaling")
    if not isinstance(scaling, dict):
        return
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("default", "mrope") or (taken.part.get("rope_parameters") and "rope_parameters" in taken.fields):
        return
    if not taken.reads("rope_scaling"):
        yield _note(taken, "rope_scaling", f"of type {kind}", "long texts are read otherwise")
        return
    source = taken.source + source_of(sys.modules.get("mlx_lm.models.rope_utils"))
    for key, value in scaling.items():
        if key in NOT_SCALING | IGNORED or value is None or _same(_usual(kind, scaling, taken).get(key), value):
            continue
        if source and f'"{key}"' not in source:
            yield _note(taken, f"rope_scaling.{key}", value, "positions turn otherwise")
    if kind in ("longrope", "su") and scaling.get("short_factor") != scaling.get("long_factor"):
        yield _note(
            taken, "rope_scaling.short_factor", "(it takes long_factor always)", "short texts are read otherwise"
        )


def _usual(kind: str, scaling: dict[str, Any], taken: Taken) -> dict[str, Any]:
    """What mlx-lm computes without being told, which is what transformers does where the key is left out."""
    factor, original = scaling.get("factor") or 1, scaling.get("original_max_position_embeddings")
    if "yarn" in kind:
        grown = lambda scale: 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
        return {
            "attention_factor": grown(scaling.get("mscale", 1)) / grown(scaling.get("mscale_all_dim", 0)),
            "truncate": True,
        }
    if kind in ("longrope", "su"):
        original = original or taken.value("original_max_position_embeddings")
        longer = _longest(taken) / original if original else 1
        return {"attention_factor": math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0}
    return {"attention_factor": 1.0}


def _same(usual: Any, value: Any) -> bool:
    if isinstance(usual, float) and isinstance(value, int | float):
        return math.isclose(usual, value, rel_tol=1e-4)
    return usual is not None and usual == value


def _lost_windows(taken: Taken) -> Iterator[str]:
    part = taken.part
    window, kinds = part.get("sliding_window"), part.get("layer_types")
    slides = part.get("use_sliding_window", True) and (not kinds or any("sliding" in str(kind) for kind in kinds))
    if not isinstance(window, int) or not slides or window >= _longest(taken):
        return
    read = taken.reads("sliding_window") or any(taken.reads(name) and taken.value(name) == window for name in WINDOWS)
    if read and taken.reads("layer_types") and not kinds:  # the model file then decides
        made = taken.args.from_dict(copy.deepcopy(part)).layer_types
        read = made is None or any("sliding" in str(kind) for kind in made)
    if not read and _slides(part):
        yield _note(taken, "sliding_window", window, "beyond that many tokens attention looks further back")


def _slides(part: dict[str, Any]) -> bool:
    """Whether any layer has the window in transformers, which has switches of its own for it; True if unknown."""
    known = by_transformers(part)
    kinds = getattr(known, "layer_types", None) or ["sliding"]
    return not known or (bool(getattr(known, "sliding_window", None)) and any("sliding" in str(one) for one in kinds))


def _longest(taken: Taken) -> int:
    return taken.value("max_position_embeddings") or sys.maxsize


def _lost_activation(taken: Taken) -> Iterator[str]:
    source = re.sub(r"\s", "", taken.source.lower())
    for key in ACTIVATIONS:
        value = taken.part.get(key)
        if not isinstance(value, str) or taken.reads(key):
            continue
        if key == "hidden_act" and taken.part.get("hidden_activation"):
            continue  # Gemma has both, and the other one counts
        computed = next((there for here, there in FAMILIES if re.fullmatch(here, value)), re.escape(value))
        if source and not re.search(computed, source):
            yield _note(taken, key, value, "its MLPs compute otherwise")
