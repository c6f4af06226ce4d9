# SPDX-License-Identifier: Apache-2.0
"""Chat templates that loop, write or grow without end stop within bounds; those of models render as transformers does;
rows set what a template reads and nothing else."""

import inspect
import json
import resource
import sys
import threading
import time

import pytest
from data_tools import TEMPLATES, assistant, load_rows, user, words_tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_realign import UserError, data
from mlx_realign.data import template
from mlx_realign.data.messages import RESERVED_OPTIONS
from mlx_realign.data.tokens import Words

LOOPS = {
    "without output": "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}",
    "with a test": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "with loop.last": "{% for a in range(99999) %}{% for b in range(99999) %}{% if loop.last %}{% endif %}{% endfor %}"
    "{% endfor %}",
    "recursive": "{% for a in range(99999) recursive %}"
    "{% if loop.depth < 4 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": "{% for a in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
}
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"
GROWTH = {
    "output": "{% for a in range(99999) %}{% for b in range(99999) %}" + 999 * "x" + "{% endfor %}{% endfor %}",
    "a buffer": "{% set x %}{% for a in range(99999) %}{{ messages[0].content * 99999 }}{% endfor %}{% endset %}",
    "~": DOUBLING.replace("STEP", "ns.x ~ ns.x"),
    "+": DOUBLING.replace("STEP", "ns.x + ns.x"),
    "*": DOUBLING.replace("STEP", "ns.x * 9"),
    "* of a constant": "{{ 'x' * 10000000000 }}",
    "* of a list": "{{ ([0] * 10000000000) | length }}",
    "**": "{{ 10 ** 1000000000 }}",
    "* of numbers": DOUBLING.replace("'ab'", "9").replace("STEP", "ns.x * ns.x"),
    "%": "{{ '%10000000000d' % 1 }}",
    "% and *": "{{ '%*d' % (10000000000, 1) }}",
    "% of names": DOUBLING.replace("STEP", "'%(a)s%(a)s%(a)s' % {'a': ns.x}"),
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format of a width": "{{ '{:{}}'.format(1, 10000000000) }}",
    "the filter format": "{{ '%10000000000d' | format(1) }}",
    "center": "{{ 'x' | center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "to_bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "replace": DOUBLING.replace("STEP", "ns.x.replace('', 'abcdefgh')"),
    "the filter replace": DOUBLING.replace("STEP", "ns.x | replace('a', 'aaaa')"),
    "join": DOUBLING.replace("STEP", "[ns.x, ns.x, ns.x] | join"),
    "the method join": DOUBLING.replace("STEP", "ns.x.join('abc')"),
    "indent": DOUBLING.replace("'ab'", "'\n\n'").replace("STEP", "ns.x | indent(90000) ~ ns.x"),
    "wordwrap": "{{ ('x' * 99999) | wordwrap(1, wrapstring='y' * 99999) }}",
    "tojson": "{{ range(99999) | list | tojson(indent=99999) }}",
    "lists": DOUBLING.replace("STEP", "[ns.x, ns.x, ns.x]") + "{{ ns.x }}",
    "lists as text": DOUBLING.replace("STEP", "[ns.x, ns.x, ns.x]") + "{{ ns.x | string }}",
    "slices": "{% set ns = namespace(l=[]) %}{% set big = 'x' * 9999999 %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [big[i:]] %}{% endfor %}",
    "strftime_now": "{{ strftime_now('%1000000000Y') }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "lipsum": "{{ lipsum(100000, max=100000) }}",
}


def words_of(source: str) -> Words:
    """`source` stands where the conversation has the word e in it; without, the template is a plain one."""
    tokenizer = words_tokenizer("chatml")
    asked = "{% if messages[0].content == 'e' %}" + source + "{% endif %}"
    tokenizer._tokenizer.chat_template = asked + TEMPLATES["chatml"]
    return Words(tokenizer)


@pytest.mark.parametrize("name", LOOPS)
def test_a_template_that_loops_ends_in_time(name, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    words, began = words_of(LOOPS[name]), time.perf_counter()
    with pytest.raises(UserError, match="chat template runs for more than 0 seconds on one conversation. Mend it"):
        words.render([[user("e")]], {}, generate=False)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("name", GROWTH)
def test_a_template_that_grows_ends_before_memory_does(name):
    words = words_of(GROWTH[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "lipsum":  # not given to templates at all
        assert "undefined" in str(words.render([[user("e")]], {}, generate=False)[0])
    else:
        with pytest.raises(UserError, match="the chat template (writes|makes|computes|asks)"):
            words.render([[user("e")]], {}, generate=False)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (1 << 30) // (1 if sys.platform == "darwin" else 1024)
    assert "user\na" in str(words.render([[user("a")]], {}, generate=False)[0])


def test_bounds_hold_off_the_main_thread_and_each_conversation_has_its_own(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    words, found = words_of(LOOPS["without output"]), []

    def render() -> None:
        try:
            words.render([[user("e")]], {}, generate=False)
        except UserError as error:
            found.append(str(error))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2
    monkeypatch.setattr(template, "WRITTEN", 100)
    talks = [[user("a b c d"), assistant("e f g")]] * 50  # 50 times 70 characters
    assert len(words.render(talks, {}, generate=False)) == 50


def test_a_load_says_once_that_the_template_has_no_end(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    tokenizer = words_tokenizer("chatml")
    tokenizer._tokenizer.chat_template = LOOPS["without output"] + TEMPLATES["chatml"]
    with pytest.raises(UserError, match="^the chat template runs for more than 0 seconds"):
        load_rows([{"prompt": "a", "completion": "b"}] * 9, tokenizer, skip_bad_rows=True)
    for broken, reason in (("{% for %}", "cannot be read: "), ("x" * (1 << 21), "characters; more than")):
        tokenizer._tokenizer.chat_template = broken
        with pytest.raises(UserError, match=f"^the chat template .*{reason}"):
            load_rows([{"prompt": "a", "completion": "b"}], tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(name):
    words = Words(words_tokenizer(name))
    talk = [user("a b"), assistant("<think> c </think> d"), user("e"), assistant("f " * 40)]
    if words.parts:
        talk = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
    for generate in (True, False):
        kwargs = {**words.base.special_tokens_map, "enable_thinking": False, "add_generation_prompt": generate}
        plain = render_jinja_template(conversations=[talk], chat_template=TEMPLATES[name], **kwargs)[0][0]
        assert words.render([talk], {}, generate)[0] == plain


def test_filters_loops_and_operators_of_real_templates_render_as_transformers_renders_them():
    source = (
        "{{- bos_token }}{%- for m in messages[1:] if m.role != 'x' -%}{{ loop.index }}{{ loop.length }}"
        "{{ loop.last }}"
        "{{ loop.previtem.role if loop.previtem else '-' }}{{ loop.nextitem is defined }}"
        "{{ loop.cycle('odd', 'even') }}"
        "{{ m.content.split('b')[-1].strip() ~ 1 ~ none ~ [m.role] }}{{ '%s-%03d' % (m.role, 7) }}"
        "{{ '{}:{:>4}'.format(m.role, 'y') }}{{ [1, 2] + [3] }}{{ 2 ** 10 }}{{ 3 * 'ab' }}{{ m | tojson(indent=2) }}"
        "{{ m.content | replace('a', 'zz') | indent(2) | trim | upper }}{{ m.keys() | list | join(', ') }}\n"
        "{%- endfor %}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
        "{% for k, v in dict(b=1, a=2) | dictsort %}{{ k }}{{ v }}{% else %}none{% endfor %}"
        "{% for x in [] %}{% else %}E{% endfor %}{% set ns = namespace(n=0) %}{% for m in messages | reverse %}"
        "{% set ns.n = ns.n + loop.revindex %}"
        "{% if loop.index0 == 1 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}{% macro f(a, b=2) %}{{ a }}{{ b }}"
        "{{ caller() if caller }}{% endmacro %}{% call f(12345678) %}in{% endcall %}{{ undefined_one }}"
        "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}{{ ', '.join('ab') }}"
    )
    words = words_of(source)
    talk = [user("e"), user("a b"), assistant("b c\nd a")]
    given = {"enable_thinking": False, **words.base.special_tokens_map}
    plain = render_jinja_template(conversations=[talk], chat_template=words.base.chat_template, **given)
    assert words.render([talk], {}, False) == plain[0]


def test_a_row_cannot_set_what_the_call_or_the_library_sets(tmp_path):
    """Refused are all parameters of the two functions of transformers, but what a template reads."""
    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    theirs = {name for function in functions for name in inspect.signature(function).parameters}
    assert theirs - {"self", "kwargs", "tools", "documents"} <= RESERVED_OPTIONS
    assert set(words_tokenizer("chatml")._tokenizer.special_tokens_map) <= RESERVED_OPTIONS
    row = {"prompt": "a", "completion": "b"}
    for key in sorted(RESERVED_OPTIONS):
        path = tmp_path / f"{key}.jsonl"
        path.write_text(json.dumps({**row, "chat_template_kwargs": {key: "{{ 'c' }}"}}))
        with pytest.raises(UserError, match=rf"{key}.jsonl: 1 of 1 rows .*\n  line 1: 'chat_template_kwargs.{key}' is"):
            load_rows(path, words_tokenizer("chatml"))  # type: ignore[arg-type]


def test_values_that_a_template_reads_reach_it_and_others_are_told():
    tokenizer = words_tokenizer("chatml")
    tokenizer._tokenizer.chat_template = "{{ mode }}" + TEMPLATES["chatml"]
    row = {"prompt": "a", "completion": "b"}
    found = load_rows([row, {**row, "chat_template_kwargs": {"mode": "d", "modes": "c", "thinking": True}}], tokenizer)
    plain, given = (tokenizer.decode(example.prompt.tolist()) for example in found)
    assert given == "d" + plain
    assert "1 rows have chat_template_kwargs that the chat template does not read" in found.report["notes"]


def test_a_prompt_outside_a_row_has_the_same_bounds(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    tokenizer = words_tokenizer("chatml")
    tokenizer._tokenizer.chat_template = LOOPS["macros"] + TEMPLATES["chatml"]
    with pytest.raises(UserError, match="chat template runs for more than"):
        data.encode_prompt("a", tokenizer)
