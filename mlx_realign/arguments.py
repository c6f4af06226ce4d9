# SPDX-License-Identifier: Apache-2.0
"""config.json against what mlx-lm's model files take: what stands elsewhere is passed on, the rest told.

transformers 5 keeps rope settings under `rope_parameters` alone, leaves out what only mlx-lm asks for, and renames.
What a model file takes is read from the signature of its ModelArgs, and whether it uses it from its source.
"""

import copy
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

THETA = ("rope_theta", "rotary_emb_base", "rope_embedding_base", "rope_freq_constant")  # what model files call it
LOCAL_THETA = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
PARTIAL = ("partial_rotary_factor", "rotary_pct", "rotary_dim")
PATTERN = "sliding_window_pattern"
LOCAL_UNSCALED = {"olmo3"}  # one theta for all layers, and sliding ones without the scaling
TEXT_ARGS = ("TextArgs", "TextConfig", "TextModelArgs")
NOT_SCALING = {"rope_theta", "partial_rotary_factor", "type", "rope_type", "max_position_embeddings"}
SIZES = "hidden_size vocab_size intermediate_size num_hidden_layers num_attention_heads".split()  # never by default
IGNORED = {"mrope_section", "mrope_interleaved", "finetuned", "attn_factor"}  # nothing to text alone, or left to mlx-lm


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
    (r"gelu", r"\bgelu\(|nn\.gelu\b|gelu\(\)|approx=.none"),
    (r"gelu_\w+|quick_gelu", r"gelu_\w*approx|geglu|approx=.(precise|tanh|fast)|tanh"),
    (r"relu\w*", r"relu"),
]


class Taken(NamedTuple):
    """A part of config.json, and what the model file makes of it."""

    args: Any  # the class
    part: dict[str, Any]
    fields: dict[str, inspect.Parameter]
    source: str

    @property
    def name(self) -> str:
        """Of the model file."""
        return self.args.__module__.rsplit(".", 1)[-1]

    def reads(self, key: str) -> bool:
        """Whether the model file takes this key and uses it."""
        outside = r"\.|\b(args|config)\." if key != "rope_scaling" else r"(args|config)\."  # checked, but not used
        found = re.search(rf"(?:{outside}){key}\b", self.source) is not None
        return key in self.fields and (found or not self.source)

    def lacks(self, key: str) -> bool:
        return key in self.fields and self.part.get(key) is None

    def required(self, key: str) -> bool:
        return self.fields[key].default is inspect.Parameter.empty


def complete(config: dict[str, Any], model_class: type, args_class: type) -> list[str]:
    """Add to config what it says elsewhere than mlx-lm looks, changing nothing given; notes of what is lost.

    Raises ValueError in one line for rope settings that the model file cannot be given.
    """
    _read_infinities(config)
    taken = _taken(config, model_class, args_class)
    _fill_rope(taken)
    _fill_pattern(taken)
    return [*_fill_defaults(taken), *_lost(taken)]


def _read_infinities(value: Any) -> None:
    """{"__float__": "Infinity"}, as transformers 5 writes it, becomes a float, in place."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        if isinstance(inner, dict) and set(inner) == {"__float__"}:
            value[key] = float(inner["__float__"])
        else:
            _read_infinities(inner)


def _taken(config: dict[str, Any], model_class: type, args_class: type) -> Taken:
    modules = [sys.modules[kind.__module__] for kind in (model_class, *model_class.__mro__[1:]) if _is_file(kind)]
    part = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(part, dict)
    args = args_class
    if "text_config" in inspect.signature(args_class).parameters:
        args = _text_args(modules, part) or args_class
    everything: dict[str, ModuleType] = {}
    for module in (sys.modules[args.__module__], *modules):
        _reach(module, everything)
    source = "\n".join(map(_source, everything.values())).strip()
    return Taken(args, part, dict(inspect.signature(args).parameters), source)


def _source(module: ModuleType | None) -> str:
    try:
        return inspect.getsource(module) if module else ""
    except OSError:  # packed without it: what is taken counts as used
        return ""


def _is_file(kind: type) -> bool:
    return hasattr(sys.modules.get(kind.__module__), "ModelArgs")


def _text_args(modules: list[ModuleType], part: dict[str, Any]) -> type | None:
    """The class that a model file with a `text_config` reads it into: its own, or another model file's."""
    own = lambda module: [kind for key, kind in vars(module).items() if key in TEXT_ARGS]  # noqa: E731
    for module in modules:
        files = [value for value in vars(module).values() if isinstance(value, ModuleType) and hasattr(value, "Model")]
        named = [file for file in files if file.__name__.endswith(f".{part.get('model_type')}")]
        if found := own(module) or [kind for file in named or files for kind in own(file) or [file.ModelArgs]]:
            return found[0]
    return None


def _reach(module: ModuleType, found: dict[str, ModuleType]) -> None:
    """The model file and those it builds on."""
    if module.__name__ in found or not hasattr(module, "ModelArgs"):
        return
    found[module.__name__] = module
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ in sys.modules:
            _reach(sys.modules[value.__module__], found)
        elif isinstance(value, ModuleType):
            _reach(value, found)


# ---------------------------------------------------------------------------------------------- filling in


def _fill_rope(taken: Taken) -> None:
    part, fields = taken.part, taken.fields
    rope = part.get("rope_parameters") or part.get("rope_scaling")
    if not isinstance(rope, dict) or ("rope_parameters" not in part and "rope_theta" not in rope):
        return
    if "rope_parameters" in fields and _whole(taken):
        return
    layers = [value for value in rope.values() if isinstance(value, dict) and "rope_theta" in value]
    if layers:
        rope = rope.get("full_attention", layers[0])
        others = [value for value in layers if value != rope]
        if others:
            _fill_local(taken, rope, others)
    _fill(taken, THETA, rope.get("rope_theta"), "rope_theta", fixed=10000.0)
    if (share := rope.get("partial_rotary_factor")) is not None:
        if taken.lacks("rotary_dim") and "partial_rotary_factor" not in fields:
            part["rotary_dim"] = int(_head_dim(part) * share)
        else:
            _fill(taken, PARTIAL, share, "partial_rotary_factor", fixed=1.0)
    else:  # all of each head
        for key, whole in (("partial_rotary_factor", 1.0), ("rotary_dim", _head_dim(part))):
            if taken.lacks(key) and taken.required(key):
                part[key] = whole
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default" and "rope_parameters" in part:
        scaling = {key: value for key, value in rope.items() if key not in NOT_SCALING}
        if "rope_scaling" in part and part["rope_scaling"] is None:
            del part["rope_scaling"]
        _fill(taken, ("rope_scaling",), {**scaling, "type": kind, "rope_type": kind}, f"rope_type {kind}")
    elif taken.lacks("rope_scaling") and taken.required("rope_scaling"):
        part["rope_scaling"] = None


def _head_dim(part: dict[str, Any]) -> int:
    return part.get("head_dim") or part["hidden_size"] // part["num_attention_heads"]


def _whole(taken: Taken) -> bool:
    """Whether the model file passes `rope_parameters` on, instead of taking its theta alone."""
    single = r"\s*(is not None|is None|\[\s*[\"']|\.get\(\s*[\"']|and\b|:|= )"
    return re.search(rf"\.rope_parameters\b(?!{single})", taken.source) is not None


def _fill(taken: Taken, names: tuple[str, ...], value: Any, what: str, fixed: Any = None) -> None:
    """Give the value under the first of these names that the model file takes; it may be the fixed value unsaid."""
    named = [name for name in names if name in taken.fields]
    used = [name for name in named if taken.reads(name)]
    if not used and value is not None and value != fixed:
        raise ValueError(
            f"rope_parameters say {what if what.startswith('rope_type') else f'{what} {value}'}, and "
            f"mlx-lm's {taken.name} has no setting for it: positions would be wrong"
        )
    if named and value is not None:
        taken.part.setdefault(named[0], value)


def _fill_local(taken: Taken, full: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Rope settings of sliding layers, which differ from those of full ones."""
    local = others[0]
    if any(other != local for other in others) or local.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters differ by kind of layer in a way that mlx-lm's {taken.name} cannot be given")
    if local.get("partial_rotary_factor", 1) != full.get("partial_rotary_factor", 1):
        raise ValueError(
            f"rope_parameters say a partial_rotary_factor for each kind of layer, and mlx-lm's {taken.name} "
            "has one for all"
        )
    names = [name for name in LOCAL_THETA if name in taken.fields]
    if names:
        taken.part.setdefault(names[0], local["rope_theta"])
    elif local["rope_theta"] != full["rope_theta"] or taken.name not in LOCAL_UNSCALED:
        raise ValueError(
            f"rope_parameters differ between full and sliding layers, and mlx-lm's {taken.name} has one "
            "setting for all: positions would be wrong"
        )


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
    quiet = [key for key in taken.fields if taken.lacks(key) and not key.startswith("rope") and _rule(key)]
    must = [key for key in taken.fields if taken.lacks(key) and taken.required(key) and key not in SIZES]
    if not (quiet or must) or not (known := _transformers(part)):
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


def _transformers(part: dict[str, Any]) -> Any:
    """transformers' own configuration of this model type, or None; no code from the folder is run."""
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it thinks of the values is not asked here
    try:
        return CONFIG_MAPPING[part["model_type"]].from_dict(copy.deepcopy(part))
    except Exception:  # not known there, or it does not like a value: mlx-lm has the word
        return None
    finally:
        logging.set_verbosity(level)


# ---------------------------------------------------------------------------------------------- what is lost


def _lost(taken: Taken) -> Iterator[str]:
    """A note for each key that changes the arithmetic and is not read."""
    part = taken.part
    for key, value in part.items():
        rule = _rule(key)
        if rule and not isinstance(value, dict | str) and value is not None and value not in rule.neutral:
            if not taken.reads(key) and not _done_otherwise(taken, key):
                yield _note(taken, key, value, rule.meaning)
    rope = part.get("rope_parameters")
    for key in (*THETA, "partial_rotary_factor"):
        other = rope.get("rope_theta" if key in THETA else key) if isinstance(rope, dict) else None
        if key in part and other is not None and other != part[key] and not _whole(taken):
            yield f"config.json says {key} {part[key]}, and {other} in rope_parameters: the first is taken"
    yield from _lost_scaling(taken)
    yield from _lost_windows(taken)
    yield from _lost_activation(taken)
    scalar = part.get("query_pre_attn_scalar")
    if scalar and scalar != part.get("head_dim") and not taken.reads("query_pre_attn_scalar"):
        yield _note(taken, "query_pre_attn_scalar", scalar, "attention is scaled otherwise")


def _rule(key: str) -> Rule | None:
    return next((rule for rule in RULES if re.fullmatch(rule.names, key)), None)


def _done_otherwise(taken: Taken, key: str) -> bool:
    """Whether the model file takes the same thing by another name, always does it, or has no use for it."""
    if key == "norm_topk_prob":
        return re.search(r"/ (denominator|\(?\w+\.sum\()", taken.source) is not None
    same = next((names for names in (THETA, LOCAL_THETA, PARTIAL) if key in names), ())
    whole = "rope_parameters" in taken.part and "rope_parameters" in taken.fields
    named = any(taken.reads(name) and name in taken.part for name in same)
    return bool(same) and (whole or named or not re.search(r"rope\(", taken.source.lower()))


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
    source = taken.source + _source(sys.modules.get("mlx_lm.models.rope_utils"))
    for key, value in scaling.items():
        if key not in NOT_SCALING | IGNORED and value is not None and source and f'"{key}"' not in source:
            yield _note(taken, f"rope_scaling.{key}", value, "positions turn otherwise")
    if kind in ("longrope", "su") and scaling.get("short_factor") != scaling.get("long_factor"):
        yield _note(
            taken, "rope_scaling.short_factor", "(it takes long_factor always)", "short texts are read otherwise"
        )


def _lost_windows(taken: Taken) -> Iterator[str]:
    part = taken.part
    window, kinds = part.get("sliding_window"), part.get("layer_types")
    slides = part.get("use_sliding_window", True) and (not kinds or any("sliding" in str(kind) for kind in kinds))
    if not isinstance(window, int) or not slides or window >= part.get("max_position_embeddings", sys.maxsize):
        return
    read = taken.reads("sliding_window")
    if read and taken.reads("layer_types") and not kinds:  # the model file then decides
        made = taken.args.from_dict(copy.deepcopy(part)).layer_types
        read = made is None or any("sliding" in str(kind) for kind in made)
    if not read:
        yield _note(taken, "sliding_window", window, "beyond that many tokens attention looks further back")


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
