# SPDX-License-Identifier: Apache-2.0
"""What a model file of mlx-lm takes of config.json: read from the signature of its ModelArgs, and from its source."""

import copy
import inspect
import re
import sys
from types import ModuleType
from typing import Any, NamedTuple

THETA = ("rope_theta", "rotary_emb_base", "rope_embedding_base", "rope_freq_constant")  # what model files call it
LOCAL_THETA = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
PARTIAL = ("partial_rotary_factor", "rotary_pct", "rotary_dim")
NOT_SCALING = {"rope_theta", "partial_rotary_factor", "type", "rope_type", "max_position_embeddings"}
FIXED_THETA = 10000.0  # of a model file that has no setting for it
TEXT_ARGS = ("TextArgs", "TextConfig", "TextModelArgs")


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

    def value(self, key: str) -> Any:
        """What the model file is given, or takes by default; None where there is neither."""
        if self.part.get(key) is not None or key not in self.fields or self.required(key):
            return self.part.get(key)
        return self.fields[key].default

    @property
    def head_dim(self) -> int | None:
        """Of one head, as it is said or follows from the model's width; None where neither is in config.json."""
        width = self.value("hidden_size") or self.value("n_embd")
        heads = self.value("num_attention_heads") or self.value("n_head")
        return self.value("head_dim") or (width // heads if width and heads else None)


def read_by(config: dict[str, Any], model_class: type, args_class: type) -> Taken:
    modules = [sys.modules[kind.__module__] for kind in (model_class, *model_class.__mro__[1:]) if _is_file(kind)]
    part = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(part, dict)
    args = args_class
    if "text_config" in inspect.signature(args_class).parameters:
        args = _text_args(modules, part) or args_class
    everything: dict[str, ModuleType] = {}
    for module in (sys.modules[args.__module__], *modules):
        _reach(module, everything)
    source = "\n".join(map(source_of, everything.values())).strip()
    return Taken(args, part, _fields(args), source)


def _fields(args: Any) -> dict[str, inspect.Parameter]:
    """What the class takes, each with its default; a list has one that is made anew each time."""
    made = {key: field.default_factory for key, field in getattr(args, "__dataclass_fields__", {}).items()}
    return {
        key: given.replace(default=make()) if callable(make := made.get(key)) else given
        for key, given in inspect.signature(args).parameters.items()
    }


def source_of(module: ModuleType | None) -> str:
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


def by_transformers(part: dict[str, Any]) -> Any:
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
