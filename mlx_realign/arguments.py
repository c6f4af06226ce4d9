# SPDX-License-Identifier: Apache-2.0
"""config.json against what mlx-lm's model files take: what stands elsewhere is passed on, the rest told.

transformers 5 keeps rope settings under `rope_parameters` alone, leaves out what only mlx-lm asks for, and renames.
What a model file takes is read from the signature of its ModelArgs, and whether it uses it from its source.
"""

import re
from collections.abc import Iterator
from typing import Any

from . import arguments_lost
from .arguments_read import FIXED_THETA, LOCAL_THETA, NOT_SCALING, PARTIAL, THETA, Taken, by_transformers, read_by

PATTERN = "sliding_window_pattern"
LOCAL_UNSCALED = {"olmo3"}  # one theta for all layers, and sliding ones without the scaling
SIZES = "hidden_size vocab_size intermediate_size num_hidden_layers num_attention_heads".split()  # never by default


def complete(config: dict[str, Any], model_class: type, args_class: type) -> list[str]:
    """Add to config what it says elsewhere than mlx-lm looks; notes of what it says twice, and of what is lost.

    Nothing given is changed, but rope settings that contradict those which transformers takes. Raises ValueError in one
    line for rope settings that the model file cannot be given.
    """
    _read_infinities(config)
    if "text_config" in config and config["text_config"] is None:
        del config["text_config"]  # mlx-lm looks into it wherever there is one
    taken = read_by(config, model_class, args_class)
    twice = _fill_rope(taken)
    _fill_pattern(taken)
    return [*_fill_defaults(taken), *twice, *arguments_lost.notes(taken)]


def _read_infinities(value: Any) -> None:
    """{"__float__": "Infinity"}, as transformers 5 writes it, becomes a float, in place."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        if isinstance(inner, dict) and set(inner) == {"__float__"}:
            value[key] = float(inner["__float__"])
        else:
            _read_infinities(inner)


# ---------------------------------------------------------------------------------------------- filling in


def _fill_rope(taken: Taken) -> list[str]:
    """Give the model file what rope_parameters say, over what stands beside them, as transformers 5 does; notes."""
    part, fields, twice = taken.part, taken.fields, list[str]()
    rope, scaling = part.get("rope_parameters") or part.get("rope_scaling"), part.get("rope_scaling")
    if not isinstance(rope, dict) or ("rope_parameters" not in part and "rope_theta" not in rope):
        return twice
    if "rope_parameters" in fields and _whole(taken):
        return twice
    layers = [value for value in rope.values() if isinstance(value, dict) and "rope_theta" in value]
    if layers:
        rope = rope.get("full_attention", layers[0])
        others = [value for value in layers if value != rope]
        if others:
            twice += _fill_local(taken, rope, others)
    elif isinstance(scaling, dict) and scaling:  # there it stands for all of rope_parameters
        rope = {**rope, **scaling}
        beside = {"rope_theta": THETA, "partial_rotary_factor": PARTIAL[:2]}
        rope |= {key: v for key, names in beside.items() if key not in scaling for n in names if (v := part.get(n))}
    twice += _fill(taken, THETA, rope.get("rope_theta"), "rope_theta", fixed=FIXED_THETA)
    if (share := rope.get("partial_rotary_factor")) is not None:
        if taken.lacks("rotary_dim") and "partial_rotary_factor" not in fields and taken.head_dim:
            part["rotary_dim"] = int(taken.head_dim * share)
        else:
            twice += _fill(taken, PARTIAL, share, "partial_rotary_factor", fixed=1.0)
    else:  # all of each head
        for key, whole in (("partial_rotary_factor", 1.0), ("rotary_dim", taken.head_dim)):
            if taken.lacks(key) and taken.required(key):
                part[key] = whole
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default" and "rope_parameters" in part:
        scaling = {key: value for key, value in rope.items() if key not in NOT_SCALING}
        if "rope_scaling" in part and part["rope_scaling"] is None:
            del part["rope_scaling"]
        part.setdefault("rope_scaling", {**scaling, "type": kind, "rope_type": kind})
        _fill(taken, ("rope_scaling",), part["rope_scaling"], f"rope_type {kind}")
    elif taken.lacks("rope_scaling") and taken.required("rope_scaling"):
        part["rope_scaling"] = None
    return twice


def _whole(taken: Taken) -> bool:
    """Whether the model file passes `rope_parameters` on, instead of taking its theta alone."""
    single = r"\s*(is not None|is None|\[\s*[\"']|\.get\(\s*[\"']|and\b|:|= )"
    return re.search(rf"\.rope_parameters\b(?!{single})", taken.source) is not None


def _fill(taken: Taken, names: tuple[str, ...], value: Any, what: str, fixed: Any = None) -> list[str]:
    """Give the value under the first of these names that the model file takes; it may be the fixed value unsaid.

    A note for each other value that config.json has under these names.
    """
    named = [name for name in names if name in taken.fields]
    own = rf"\.rope_parameters(\[|\.get\()[\"']{names[0]}[\"']"
    used = [name for name in named if taken.reads(name)] or re.search(own, taken.source)
    if not used and value is not None and value != fixed:
        raise ValueError(
            f"rope_parameters say {what if what.startswith('rope_type') else f'{what} {value}'}, and "
            f"mlx-lm's {taken.name} has no setting for it: positions would be wrong"
        )
    if value is None:
        return []
    others = [(name, taken.part[name]) for name in names if taken.part.get(name) not in (None, value)]
    if named:
        taken.part[named[0]] = value
    return [
        f"config.json says {name} {other}, and {value} among its rope settings, which is taken, as in transformers; "
        "write one value before you use an adapter with mlx-lm alone"
        for name, other in others
        if name != "rotary_dim"
    ]


def _fill_local(taken: Taken, full: dict[str, Any], others: list[dict[str, Any]]) -> list[str]:
    """Rope settings of sliding layers, which differ from those of full ones."""
    local = others[0]
    if any(other != local for other in others) or local.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters differ by kind of layer in a way that mlx-lm's {taken.name} cannot be given")
    if local.get("partial_rotary_factor", 1) != full.get("partial_rotary_factor", 1):
        raise ValueError(
            f"rope_parameters say a partial_rotary_factor for each kind of layer, and mlx-lm's {taken.name} "
            "has one for all"
        )
    if any(name in taken.fields for name in LOCAL_THETA):
        return _fill(taken, LOCAL_THETA, local["rope_theta"], "rope_theta of sliding layers")
    if local["rope_theta"] != full["rope_theta"] or taken.name not in LOCAL_UNSCALED:
        raise ValueError(
            f"rope_parameters differ between full and sliding layers, and mlx-lm's {taken.name} has one "
            "setting for all: positions would be wrong"
        )
    return []


def _fill_pattern(taken: Taken) -> None:
    """`sliding_window_pattern` n, every n-th layer a full one, from `layer_types`."""
    kinds = taken.part.get("layer_types")
    if not taken.lacks(PATTERN) or "layer_types" in taken.fields or not kinds:
        return
    full = [kind == "full_attention" for kind in kinds]
    pattern = full.index(True) + 1 if any(full) else len(full) + 1
    if full != [(i + 1) % pattern == 0 for i in range(len(full))]:
        raise ValueError(f"layer_types has no regular pattern, and mlx-lm's {taken.name} takes nothing else")
    taken.part[PATTERN] = pattern


def _fill_defaults(taken: Taken) -> Iterator[str]:
    """What config.json leaves to transformers' own class: what must be given, and what changes results in silence."""
    part = taken.part
    quiet = [
        key for key in taken.fields if taken.lacks(key) and not key.startswith("rope") and arguments_lost.rule(key)
    ]
    must = [key for key in taken.fields if taken.lacks(key) and taken.required(key) and key not in SIZES]
    if not (quiet or must) or not (known := by_transformers(part)):
        return
    for key in dict.fromkeys([*quiet, *must]):
        value = getattr(known, key, None)
        if value is not None and not (key.startswith("rope") and isinstance(value, dict)):
            part[key] = value
            usual = taken.fields[key].default
            if key in quiet and not taken.required(key) and usual != value:
                yield (
                    f"config.json does not say {key}: it is {value} as in transformers; mlx-lm alone takes {usual}: "
                    "write it into config.json before you use an adapter there"
                )
