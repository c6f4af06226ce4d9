# SPDX-License-Identifier: Apache-2.0
"""Texts as tokens: merges across a border, BOS, raw text, refusals, and random conversations with byte-level BPE."""

import random

import numpy as np
import pytest
from data_tools import TEMPLATES, assistant, bytes_tokenizer, load_rows, picture, user, words_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_realign import data
from mlx_realign.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))


LLAMA_USER = "<s> <|header|> user <|/header|> ⏎ ⏎ a <|eot|> <|header|> assistant <|/header|> ⏎ ⏎"
TWO_TURNS = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}


def test_a_merge_across_the_border_belongs_to_the_completion():
    """ "\\n" + "\\n\\n" is one token: the prompt ends before it, and for the pair before the earlier of the two."""
    tokenizer = bytes_tokenizer([("Ċ", "Ċ"), ("ĊĊ", "Ċ")], "llama3")
    tokenizer.chat_template = TEMPLATES["llama3"].replace(" | trim", "")
    header = "<s> <|header|> u s e r <|/header|> ⏎⏎ a <|eot|> <|header|> a s s i s t a n t <|/header|>"
    one = load_rows([{"prompt": "a", "completion": "\nb"}], tokenizer)
    assert picture(tokenizer, one) == [f"{header} | *⏎⏎⏎ *b *<|eot|>"]
    assert one.report["counts"]["seams"] == 1
    pair = load_rows([{"prompt": "a", "chosen": "b", "rejected": "\nb"}], tokenizer, "pairs")
    assert picture(tokenizer, pair) == [f"{header} | ⏎⏎ *b *<|eot|>", f"{header} | *⏎⏎⏎ *b *<|eot|>"]


def test_a_merge_across_the_border_of_a_later_turn_is_trained():
    tokenizer = bytes_tokenizer([("Ċ", "Ċ"), ("ĊĊ", "Ċ")], "llama3")
    tokenizer.chat_template = TEMPLATES["llama3"].replace(" | trim", "")
    row = {"messages": [user("a"), assistant("b"), user("a"), assistant("\nb")]}
    assert picture(tokenizer, load_rows([row], tokenizer))[0].endswith("t a n t <|/header|> *⏎⏎⏎ *b *<|eot|>")


def test_raw_text_takes_the_longest_common_token_prefix():
    """With merges b+c and a+bc, "ab" is [a, b] but "abc" is [abc]: of the prompt nothing is left but a first token."""
    tokenizer = bytes_tokenizer([("b", "c"), ("a", "bc")])
    dataset = load_rows([{"prompt": "xab", "completion": "cd"}, {"prompt": "ab", "completion": "cd"}], tokenizer)
    assert picture(tokenizer, dataset, 0) == ["x | *abc *d *</s>"]
    assert picture(tokenizer, dataset, 1) == ["abc | *d *</s>"]
    assert dataset.report["counts"]["seams"] == 2


@pytest.mark.parametrize("add_bos", [False, True])
def test_there_is_never_a_second_bos(add_bos):
    """Once from the template, once from the tokenizer, once from the text itself: always one."""
    tokenizer = words_tokenizer("llama3", add_bos=add_bos)
    rows = [{"prompt": "a ", "completion": "b"}, {"text": "<s>a b"}, {"text": "a b"}]
    dataset = load_rows(rows, tokenizer)
    bos = "<s>" if add_bos else "a"
    assert picture(tokenizer, dataset, 0) == [f"{LLAMA_USER} | *b *<|eot|>"]
    assert picture(tokenizer, dataset, 1) == ["<s> | *a *␣ *b *</s>"]
    assert picture(tokenizer, dataset, 2) == [f"{bos} | {'*a ' if add_bos else ''}*␣ *b *</s>"]
    raw = load_rows(rows[:1], tokenizer, chat_template=False)
    assert picture(tokenizer, raw) == [f"{'<s> ' if add_bos else ''}a ␣ | *b *</s>"]


def test_an_end_token_in_the_text_is_not_doubled():
    tokenizer = words_tokenizer()
    assert picture(tokenizer, load_rows([{"text": "a b</s>"}], tokenizer)) == ["a | *␣ *b *</s>"]


def test_messages_without_a_template_need_a_clear_word():
    tokenizer = words_tokenizer()
    with pytest.raises(UserError, match="line 1: the row has messages, but the model has no chat template"):
        load_rows([TWO_TURNS], tokenizer)
    dataset = load_rows([TWO_TURNS], tokenizer, chat_template=False)
    assert picture(tokenizer, dataset) == ["a ⏎ | *b *</s> c ⏎ *d *</s>"]


def test_strings_without_a_template_are_raw_and_that_is_said():
    report = load_rows([{"prompt": "a ", "completion": "b"}], words_tokenizer()).report
    assert report["chat_template"] is False
    assert report["notes"] == ["the tokenizer has no chat template: rows are raw text plus the end token"]


def test_a_tokenizer_without_an_end_token_cannot_take_raw_text():
    tokenizer = words_tokenizer(wrapped=False)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        load_rows([{"text": "a b"}], tokenizer)


def test_a_template_that_refuses_a_row_makes_it_a_bad_row():
    rows = [
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "tool", "content": "x"}, user("a"), assistant("b")]},
    ]
    with pytest.raises(UserError, match="line 2: the chat template refuses these messages: no tools here"):
        load_rows(rows, words_tokenizer("strict"))


def test_tools_and_template_settings_of_a_row_reach_the_template():
    tokenizer = words_tokenizer("chatml")
    tokenizer.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}{{ mode or '' }}" + TEMPLATES["chatml"]
    row = {"prompt": "a", "completion": "b"}
    rows = [row, {**row, "tools": '[{"name": "c"}]'}, {**row, "chat_template_kwargs": {"mode": "d"}}]
    dataset = load_rows(rows, tokenizer)
    starts = [picture(tokenizer, dataset, i)[0].split(" ")[0] for i in range(3)]
    assert starts == ["<|im_start|>", "c", "d"]


@pytest.mark.parametrize("template", ["chatml", "llama3", "marked", "phi3"])
def test_random_conversations_train_exactly_what_the_assistant_said(template):
    """Whatever the texts hold (spaces, newlines, letters of many bytes), decoding the trained runs gives them back."""
    rng = random.Random(0)
    pieces = ["a", " b", "\n", "é", "日本", "👩‍👩‍👧", "  ", ".", "\t", "0", "<|im"]
    merges = [("Ċ", "Ċ"), ("Ġ", "b"), ("Ġ", "Ġ"), ("ĊĊ", "a"), (".", "Ċ")]
    tokenizer = bytes_tokenizer(merges, template)
    tokenizer.chat_template = TEMPLATES[template].replace(" | trim", "")
    end = {"llama3": "<|eot|>", "phi3": "<|end|>"}.get(template, "<|im_end|>")
    rows, said = [], []
    for _ in range(60):
        talk = []
        for _ in range(rng.randint(1, 4)):
            text = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) + "z" for _ in range(2)]
            talk += [user(text[0]), assistant(text[1])]
        rows.append({"messages": talk})
        said.append([m["content"] + end for m in talk[1::2]])
    dataset = load_rows(rows, tokenizer)
    seams = 0
    for example, row, texts in zip(dataset, rows, said, strict=True):
        tokens, mask = example.completions[0]
        borders = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0))
        runs = [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(borders[::2], borders[1::2], strict=True)]
        assert len(runs) == len(texts)
        assert all(run.endswith(text) and not run[: -len(text)].strip() for run, text in zip(runs, texts, strict=True))
        prompt = data.encode_prompt(row["messages"][:1], tokenizer)
        seam = example.prompt.tolist() != prompt
        assert not seam or (example.prompt.tolist() == prompt[: len(example.prompt)] and runs[0] != texts[0])
        seams += seam
        whole = np.concatenate([example.prompt, tokens])
        for turn, start in enumerate(borders[::2] + len(example.prompt)):
            given = np.array(data.encode_prompt(row["messages"][: 2 * turn + 1], tokenizer))
            assert start == next((i for i, token in enumerate(given) if whole[i] != token), len(given))
    assert dataset.report["counts"].get("seams", 0) == seams


@pytest.mark.parametrize("template", TEMPLATES)
def test_borders_found_by_special_tokens_are_the_tokenised_prompts_own(template, monkeypatch):
    """The short cut against the longest common prefix with the tokenised prompt, with special texts in the rows."""
    rng = random.Random(1)
    pieces = ["a", "b", " ", "\n", "\n\n", "<|im_start|>", "<|im_end|>", "<|header|>", "<|end|>", "assistant\n", "</s>"]
    text = lambda: "".join(rng.choices(pieces, k=rng.randint(1, 6))) + "z"  # noqa: E731
    rows = [{"prompt": text(), "chosen": text(), "rejected": "y" + text()} for _ in range(200)]
    tokenizer = bytes_tokenizer([("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("ĊĊ", "a")], template)
    quick = load_rows(rows, tokenizer, "pairs")
    monkeypatch.setattr("mlx_realign.data.chat._quick_border", lambda *_: None)
    slow = load_rows([*rows, {"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer, "pairs")
    assert [e.key for e in quick] == [e.key for e in slow][:-1]


def test_a_template_that_is_a_function_is_called_one_conversation_at_a_time():
    """Some mlx-lm models bring their template as Python code."""

    def chatml(messages, add_generation_prompt=False, **_):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    plain = words_tokenizer("chatml", wrapped=False)
    expected = picture(plain, load_rows([TWO_TURNS], plain))
    plain.chat_template = None
    tokenizer = TokenizerWrapper(plain, chat_template=chatml)
    assert picture(tokenizer, load_rows([TWO_TURNS], tokenizer)) == expected


def test_generation_prompts_and_stop_ids():
    tokenizer = words_tokenizer("chatml")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>", "a", "\n")}
    assert [tokenizer.decode([i]) for i in data.encode_prompt("a", tokenizer)][-3:] == [
        "<|im_start|>",
        "assistant",
        "\n",
    ]
    assert data.encode_prompt("a", tokenizer) == data.encode_prompt([user("a")], tokenizer)
    assert data.encode_prompt("a", tokenizer, chat_template=False) == [ids["a"]]
    assert data.encode_prompt([user("a")], tokenizer, chat_template=False) == [ids["a"], ids["\n"]]
    assert data.stop_ids(tokenizer) == {ids["</s>"], ids["<|im_end|>"]}
    assert data.stop_ids(words_tokenizer()) == {ids["</s>"]}
    with pytest.raises(UserError, match="no chat template"):
        data.encode_prompt([user("a")], words_tokenizer())
