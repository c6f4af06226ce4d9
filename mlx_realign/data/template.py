# SPDX-License-Identifier: Apache-2.0
"""A chat template is a program that comes with a model: here it runs within bounds of time, output and memory.

transformers renders it as ever, with its own filters and globals; loops, calls, operators and filters are counted, and
what an operator would make is measured before it is made. No process and no signal: any thread, any system.
"""

import functools
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..errors import UserError

SECONDS, SECONDS_PER_CHAR = 10.0, 1e-5  # of one conversation; the characters are those of what it is given
WRITTEN, WRITTEN_PER_CHAR = 1 << 24, 32  # characters it may write
MADE, MADE_PER_CHAR = 1 << 28, 256  # bytes, about, of all values made on the way
SOURCE = 1 << 20  # characters of a template
WIDEST = 100_000  # a number given to a filter or a function; what jinja's sandbox allows a range
BITS = 100_000  # of an integer
ITEMS = 1 << 22  # values in a list, or in lists of lists, that is made a text
_WIDE = set("center ljust rjust zfill expandtabs to_bytes indent wordwrap tojson batch slice".split())
_TEXT = set("string join tojson format urlencode pprint xmlattr urlize e escape forceescape capitalize lower upper "
            "title trim replace indent wordwrap center truncate wordcount striptags safe".split())  # fmt: skip


class TooMuch(UserError):
    """The template loops, writes or needs more than any conversation asks for."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the chat template {what} on one conversation. Mend it (chat_template in tokenizer_config.json, or "
            "chat_template.jinja), or use --no-chat-template"
        )


class _Meter(threading.local):
    """What the rendering of one conversation in this thread has used."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, given: int) -> None:
        self.seconds = SECONDS + SECONDS_PER_CHAR * given
        self.until = time.monotonic() + self.seconds
        self.may_write, self.may_make = WRITTEN + WRITTEN_PER_CHAR * given, MADE + MADE_PER_CHAR * given
        self.ticks = self.written = self.made = 0

    def tick(self) -> None:
        self.ticks += 1
        if not self.ticks % 8 and time.monotonic() > self.until:
            raise TooMuch(f"runs for more than {self.seconds:.0f} seconds")

    def write(self, size: int) -> None:
        self.written += size
        if self.written > self.may_write:
            raise TooMuch(f"writes more than {self.may_write:,} characters")

    def make(self, size: int) -> None:
        self.made += size
        if self.made > self.may_make:
            raise TooMuch(f"makes values of more than {self.may_make:,} bytes")


_meter = _Meter()
_grafts: dict[str, tuple[str, Any, Any]] = {}  # template -> (name, its root, its blocks)


def bounded(source: str) -> str:
    """A name to give transformers as `chat_template` in place of `source`: the same template, within bounds.

    UserError for one that jinja cannot read. Rendering raises TooMuch, a UserError.
    """
    found = _grafts.get(source)
    name = found[0] if found else _name(source)
    known = _compiled(name)
    if found is None:
        if len(source) > SOURCE:
            raise UserError(f"the chat template has {len(source):,} characters; more than {SOURCE:,} are not read")
        _meter.begin(len(source))
        try:
            template = _environment(known.environment).from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template cannot be read: {error}") from None
        except RecursionError:
            raise UserError("the chat template cannot be read: it is nested too deeply") from None
        found = _grafts[source] = (name, _root(template.root_render_func), template.blocks)
        if len(_grafts) > 64:
            del _grafts[next(iter(_grafts))]
    known.root_render_func, known.blocks = found[1:]
    return name


def reads(source: str) -> frozenset[str]:
    """The names of values that a template reads. UserError for one that jinja cannot read."""
    environment = _compiled(bounded(source)).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(source)))


def _compiled(name: str) -> Any:
    """transformers' own template of this text; it keeps the last 128."""
    from transformers.utils import chat_template_utils  # late: before mlx-lm it prints advice

    return chat_template_utils._compile_jinja_template(name)


def _name(source: str) -> str:
    digest = hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{{# {{% generation %}} in bounds: {digest} #}}"  # transformers looks for the word


def _root(inner: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    def root(context: Context, *args: Any, **kwargs: Any) -> Iterator[str]:
        _meter.begin(sum(_length(context.get(name), 1 << 40) for name in ("messages", "tools", "documents")))
        for piece in inner(context, *args, **kwargs):
            _meter.tick()
            _meter.write(len(piece))
            yield piece

    return root


def _environment(own: Any) -> "_Environment":
    """transformers' environment of one template, with counters in it."""
    if not isinstance(own, _Environment):
        own.__class__ = _Environment
        own.filters = {name: _counted(name, filter) for name, filter in own.filters.items()}
        own.filters |= {"_each": _each, "_concat": _concat, "_made": _made}
        own.globals.pop("lipsum", None)
        own.finalize = _finalize
    return own


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "%", "+"])
    concat = staticmethod(lambda parts: _joined(list(parts)))  # type: ignore[assignment]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counters().visit(super()._parse(source, name, filename))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _meter.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes in a wrapper of the sandbox
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int) or name == "strftime_now":
            if name == "join" and args and not hasattr(args[0], "__len__"):
                args = (list(args[0]), *args[1:])
            _expect(name, owner, args, kwargs)
        return _made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _meter.tick()
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise TooMuch("computes a number of thousands of digits")
        elif operator == "*" and isinstance(left, int) | isinstance(right, int):
            value, times = (right, left) if isinstance(left, int) else (left, right)
            _meter.make(_size(value) * max(times, 0))
        elif operator == "%" and isinstance(left, str | bytes):
            _expect_format(left, right if isinstance(right, tuple) else (right,))
        return _made(super().call_binop(context, operator, left, right))


class _Counters(NodeTransformer):
    """Every loop counts its turns; what `~` and slices make is measured."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "_made") if isinstance(node.arg, nodes.Slice) else node


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _each(values: Iterable[Any]) -> Any:
    """What a loop goes over. Something without an iterator is refused by the loop itself, as ever."""
    return _ticking(values) if hasattr(values, "__iter__") else values


class _ticking:
    """Counts the turns; has a length where the values have one, as `loop.length` asks for it."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        for value in self.values:
            _meter.tick()
            yield value

    def __len__(self) -> int:
        return len(self.values)  # type: ignore[arg-type]


def _concat(parts: list[Any]) -> str:
    _meter.tick()
    _meter.make(sum(_length(part) for part in parts))
    return "".join(map(str, parts))


def _joined(parts: list[str]) -> str:
    _meter.make(sum(map(len, parts)))
    return "".join(parts)


def _finalize(value: Any) -> Any:
    """Of what a template writes, before it is made a text."""
    _meter.tick()
    if not isinstance(value, str):
        _meter.make(_length(value))
    return value


def _made(value: Any) -> Any:
    _meter.make(_size(value))
    return value


def _size(value: Any) -> int:
    """Bytes of a value itself, about."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple | dict):
        return len(value) * (64 if isinstance(value, dict) else 8)
    return value.bit_length() // 8 if isinstance(value, int) else 0


def _length(value: Any, items: int = ITEMS) -> int:
    """Characters of a value as text, about. TooMuch where more than `items` values are met."""
    length, rest = 0, [value]
    for _ in range(items):
        if not rest:
            return length
        one = rest.pop()
        if isinstance(one, str | bytes):
            length += len(one)
        elif isinstance(one, dict):
            rest += one.keys()
            rest += one.values()
            length += 4
        elif isinstance(one, list | tuple):
            rest += one
            length += 2
        else:
            length += 8
    raise TooMuch(f"makes a text of more than {items:,} values")


def _counted(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is measured before and after. The marks of those that take the context too are kept."""
    first = int(getattr(filter, "jinja_pass_arg", None) is not None)

    @functools.wraps(filter)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _meter.tick()
        if len(args) > first:
            value = args[first]
            if name in ("join", "sum") and not hasattr(value, "__len__") and hasattr(value, "__iter__"):
                value = list(value)
                args = (*args[:first], value, *args[first + 1 :])
            _expect(name, value, args[first + 1 :], kwargs)
        return _made(filter(*args, **kwargs))

    return counted


def _expect(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """TooMuch where a filter, or a method of a text, would make more than may be made."""
    given = [*args, *kwargs.values()]
    if name in _WIDE and any(isinstance(one, int) and one > WIDEST for one in given):
        raise TooMuch(f"asks for a width of more than {WIDEST:,}")
    texts = [one for one in given if isinstance(one, str | bytes)]
    numbers = [one for one in given if isinstance(one, int)]
    size = _length(value) if name in _TEXT else 0
    if name == "replace" and isinstance(value, str | bytes) and len(texts) > 1:
        size += value.count(texts[0]) * len(texts[1])  # type: ignore[arg-type]
    elif name == "join":
        parts = (args[0] if args else []) if isinstance(value, str) and texts == [] else value
        between = len(value) if isinstance(value, str) else max(map(len, texts), default=0)
        size = _length(parts) + between * (len(parts) if hasattr(parts, "__len__") else WIDEST)
    elif name == "indent" and isinstance(value, str):
        size += value.count("\n") * max([4, *numbers, *map(len, texts)])
    elif name in ("wordwrap", "expandtabs", "translate"):
        size += _size(value) * max([8, *numbers, *map(_length, given)])
    elif name == "tojson":
        size *= max([1, *numbers])
    elif name in ("format", "format_map") and isinstance(value, str | bytes):
        _expect_format(value, (*args, kwargs))
    elif name == "sum":
        size = sum(map(_size, value)) if hasattr(value, "__iter__") else 0
    elif name == "strftime_now":
        size = sum(map(int, re.findall(r"\d{1,12}", str(texts))))
    if size:
        _meter.make(size)


def _expect_format(text: str | bytes, values: tuple[Any, ...]) -> None:
    """Fields times the longest value, and the widths that stand in the text or among the values."""
    shown = text if isinstance(text, str) else text.decode("latin-1")
    widths = sum(map(int, re.findall(r"\d{1,12}", shown)))
    if "*" in shown or re.search(r"\{[^{}]*\{", shown):
        widths += sum(abs(one) for one in values if isinstance(one, int))
    _meter.make(len(shown) + widths + (shown.count("%") + shown.count("{")) * _length(values))
