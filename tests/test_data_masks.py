# SPDX-License-Identifier: Apache-2.0
"""Which tokens are trained, written out by hand for each kind of row and of chat template."""

import random

import numpy as np
import pytest
from data_tools import (
    TEMPLATES,
    assistant,
    bytes_tokenizer,
    load_rows,
    picture,
    user,
    words_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from mlx_realign import data
from mlx_realign.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))


CHATML_USER = "<|im_start|> user ⏎ a <|im_end|> ⏎ <|im_start|> assistant ⏎"
LLAMA_USER = "<s> <|header|> user <|/header|> ⏎ ⏎ a <|eot|> <|header|> assistant <|/header|> ⏎ ⏎"
TWO_TURNS = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
THOUGHTS = {"messages": [user("a"), assistant("<think>\n</think>b"), user("c"), assistant("<think>\n</think>\nd")]}

# (template, row, what must come out): prompt | completion, * = trained, ⏎ = newline token, ␣ = space token.
SFT = [
    # Strings become one user and one assistant message; the newline behind the end token is no part of the completion.
    ("chatml", {"instruction": "a", "output": "b c"}, f"{CHATML_USER} | *b *␣ *c *<|im_end|>"),
    ("chatml", {"prompt": "a", "completion": "b"}, f"{CHATML_USER} | *b *<|im_end|>"),
    ("chatml", {"instruction": "a", "input": "c", "output": "b"},
     "<|im_start|> user ⏎ a ⏎ ⏎ c <|im_end|> ⏎ <|im_start|> assistant ⏎ | *b *<|im_end|>"),
    ("chatml", {"instruction": "a", "output": "b", "system": "You"},
     f"<|im_start|> system ⏎ You <|im_end|> ⏎ {CHATML_USER} | *b *<|im_end|>"),
    # All assistant turns are trained; the user's in between are not; nothing follows the last end token.
    ("chatml", TWO_TURNS, f"{CHATML_USER} | *b *<|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ "
     "<|im_start|> assistant ⏎ *d *<|im_end|>"),
    ("chatml", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
     f"{CHATML_USER} | *b *<|im_end|>"),
    # A user message at the end is of no use; two assistant messages in a row are two turns.
    ("chatml", {"messages": [user("a"), assistant("b"), user("c")]}, f"{CHATML_USER} | *b *<|im_end|>"),
    ("chatml", {"messages": [user("a"), assistant("b"), assistant("c")]},
     f"{CHATML_USER} | *b *<|im_end|> ⏎ <|im_start|> assistant ⏎ *c *<|im_end|>"),
    # An assistant turn that opens the conversation has no prompt: context only.
    ("chatml", {"messages": [assistant("b"), user("a"), assistant("c")]},
     f"<|im_start|> assistant ⏎ b <|im_end|> ⏎ {CHATML_USER} | *c *<|im_end|>"),
    # A prompt's own assistant turns are not trained, a completion's all are, unless their weight is 0.
    ("chatml", {"prompt": [user("a"), assistant("b"), user("c")], "completion": "d"},
     f"{CHATML_USER} b <|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ <|im_start|> assistant ⏎ | *d *<|im_end|>"),
    ("chatml", {"prompt": "a", "completion": [assistant("b"), user("c"), assistant("d")]},
     f"{CHATML_USER} | *b *<|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ <|im_start|> assistant ⏎ *d *<|im_end|>"),
    ("chatml", {"messages": [user("a"), {**assistant("b"), "weight": 0}, user("c"), assistant("d")]},
     f"{CHATML_USER} b <|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ <|im_start|> assistant ⏎ | *d *<|im_end|>"),
    # The end token inside a text does not end the turn.
    ("chatml", {"prompt": "a", "completion": "b<|im_end|>c"}, f"{CHATML_USER} | *b *<|im_end|> *c *<|im_end|>"),
    # Text is never templated; its first token has nothing before it, so it is the prompt.
    ("chatml", {"text": "a b"}, "a | *␣ *b *</s>"),
    ("llama3", {"instruction": "a", "output": " b "}, f"{LLAMA_USER} | *b *<|eot|>"),
    ("llama3", TWO_TURNS, f"{LLAMA_USER} | *b *<|eot|> <|header|> user <|/header|> ⏎ ⏎ c <|eot|> "
     "<|header|> assistant <|/header|> ⏎ ⏎ *d *<|eot|>"),
    # Markers: the newline inside them is not trained, the header inside them neither, the end token always.
    ("marked", TWO_TURNS, f"{CHATML_USER} | *b *<|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ "
     "<|im_start|> assistant ⏎ *d *<|im_end|>"),
    ("marked_badly", TWO_TURNS, f"{CHATML_USER} | *b *<|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ "
     "<|im_start|> assistant ⏎ *d *<|im_end|>"),
    ("marked_answer", THOUGHTS, f"{CHATML_USER} <think> ⏎ </think> | *b *<|im_end|> <|im_start|> user ⏎ c "
     "<|im_end|> ⏎ <|im_start|> assistant ⏎ <think> ⏎ </think> *⏎ *d *<|im_end|>"),
    # Qwen3 drops earlier thoughts: each turn is trained in a rendering of its own, as the model would generate it.
    ("qwen3", THOUGHTS, [
        f"{CHATML_USER} | *<think> *⏎ *</think> *b *<|im_end|>",
        f"{CHATML_USER} b <|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ <|im_start|> assistant ⏎ | "
        "*<think> *⏎ *</think> *⏎ *d *<|im_end|>"]),
    # ... as few as that takes: the second and third turn are the same in the middle and at the end.
    ("qwen3", {"messages": [*THOUGHTS["messages"][:2], user("c"), assistant("d"), user("e"), assistant("f")]}, [
        f"{CHATML_USER} | *<think> *⏎ *</think> *b *<|im_end|>",
        f"{CHATML_USER} b <|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ <|im_start|> assistant ⏎ | *d *<|im_end|> ⏎ "
        "<|im_start|> user ⏎ e <|im_end|> ⏎ <|im_start|> assistant ⏎ *f *<|im_end|>"]),
    ("qwen3", TWO_TURNS, f"{CHATML_USER} | *b *<|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ "
     "<|im_start|> assistant ⏎ *d *<|im_end|>"),
    # The generation prompt's opening thought is no part of a finished turn: trained from where the two part.
    ("r1", THOUGHTS, f"{CHATML_USER} | *b *<|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ <|im_start|> assistant ⏎ "
     "*⏎ *d *<|im_end|>"),
    # The token that closes the whole conversation is not what ends a turn.
    ("phi3", TWO_TURNS, "<|im_start|> user ⏎ a <|end|> ⏎ <|im_start|> assistant ⏎ | *b *<|end|> ⏎ <|im_start|> user "
     "⏎ c <|end|> ⏎ <|im_start|> assistant ⏎ *d *<|end|>"),
    # No end token in the template: the tokenizer's own ends the completion.
    ("endless", TWO_TURNS, "User: ⏎ a ⏎ Assistant: ⏎ | *b ⏎ User: ⏎ c ⏎ Assistant: ⏎ *d *</s>"),
    # Two tokens end a turn: the second one is where generation stops.
    ("cohere", TWO_TURNS, "<|im_start|> user ⏎ a <|end|> <|eot|> <|im_start|> assistant ⏎ | *b *<|end|> *<|eot|> "
     "<|im_start|> user ⏎ c <|end|> <|eot|> <|im_start|> assistant ⏎ *d *<|end|> *<|eot|>"),
    # The last turn ends otherwise than the others, which therefore stand in examples of their own.
    ("harmony", TWO_TURNS, [
        "<|im_start|> user ⏎ a <|end|> <|im_start|> assistant ⏎ | *b *<|eot|>",
        "<|im_start|> user ⏎ a <|end|> <|im_start|> assistant ⏎ b <|end|> <|im_start|> user ⏎ c <|end|> "
        "<|im_start|> assistant ⏎ | *d *<|eot|>"]),
    # Content as a list of parts: strings are handed over as one text part.
    ("parts", TWO_TURNS, f"{CHATML_USER} | *b *<|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ "
     "<|im_start|> assistant ⏎ *d *<|im_end|>"),
    ("strict", {"prompt": "a", "completion": "b"},
     f"<|im_start|> system ⏎ You ␣ help <|im_end|> ⏎ {CHATML_USER} | *b *<|im_end|>"),
    # No template: raw text plus the end token.
    (None, {"prompt": "a ", "completion": "b c"}, "a ␣ | *b *␣ *c *</s>"),
    (None, {"prompt": "a ", "completion": "b", "system": "You"}, "You ⏎ a ␣ | *b *</s>"),
    (None, {"text": "a b"}, "a | *␣ *b *</s>"),
]  # fmt: skip

PAIRS = [
    ("chatml", {"prompt": "a", "chosen": "b", "rejected": "c"},
     [f"{CHATML_USER} | *b *<|im_end|>", f"{CHATML_USER} | *c *<|im_end|>"]),
    ("chatml", {"prompt": "a", "chosen": "b", "rejected": ["c", "d"]},
     [f"{CHATML_USER} | *{x} *<|im_end|>" for x in "bcd"]),
    # What both begin with belongs to the prompt only as far as the template's generation prompt goes.
    ("chatml", {"prompt": "a", "chosen": "b c", "rejected": "b d"},
     [f"{CHATML_USER} | *b *␣ *c *<|im_end|>", f"{CHATML_USER} | *b *␣ *d *<|im_end|>"]),
    ("chatml", {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
     [f"{CHATML_USER} | *b *<|im_end|>", f"{CHATML_USER} | *c *<|im_end|>"]),
    ("chatml", {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
     [f"{CHATML_USER} | *b *<|im_end|>", f"{CHATML_USER} | *c *<|im_end|>"]),
    ("chatml", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
     [f"{CHATML_USER} | *b *<|im_end|>", f"{CHATML_USER} | *c *<|im_end|>"]),
    # Earlier assistant turns are the prompt's; later ones are trained in both.
    ("chatml", {"prompt": [user("a"), assistant("d"), user("e")], "chosen": [assistant("b")], "rejected": "c"},
     [f"{CHATML_USER} d <|im_end|> ⏎ <|im_start|> user ⏎ e <|im_end|> ⏎ <|im_start|> assistant ⏎ | *{x} *<|im_end|>"
      for x in "bc"]),
    ("chatml", {"prompt": "a", "chosen": [assistant("b"), user("e"), assistant("f")], "rejected": "c"},
     [f"{CHATML_USER} | *b *<|im_end|> ⏎ <|im_start|> user ⏎ e <|im_end|> ⏎ <|im_start|> assistant ⏎ *f *<|im_end|>",
      f"{CHATML_USER} | *c *<|im_end|>"]),
    ("llama3", {"prompt": "a", "chosen": "b", "rejected": "c"},
     [f"{LLAMA_USER} | *b *<|eot|>", f"{LLAMA_USER} | *c *<|eot|>"]),
    ("marked_answer", {"prompt": "a", "chosen": "<think>\n</think>b", "rejected": "c"},
     [f"{CHATML_USER} | <think> ⏎ </think> *b *<|im_end|>", f"{CHATML_USER} | *c *<|im_end|>"]),
    ("qwen3", {"prompt": "a", "chosen": [assistant("<think>\n</think>b"), user("e"), assistant("f")], "rejected": "c"},
     [f"{CHATML_USER} | b <|im_end|> ⏎ <|im_start|> user ⏎ e <|im_end|> ⏎ <|im_start|> assistant ⏎ *f *<|im_end|>",
      f"{CHATML_USER} | *c *<|im_end|>"]),
    (None, {"prompt": "a ", "chosen": "b", "rejected": "c d"}, ["a ␣ | *b *</s>", "a ␣ | *c *␣ *d *</s>"]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "row", "expected"), SFT)
def test_sft_masks_are_those_written_by_hand(template, row, expected):
    tokenizer = words_tokenizer(template)
    dataset = load_rows([row], tokenizer)
    pictures = [text for i in range(len(dataset)) for text in picture(tokenizer, dataset, i)]
    assert pictures == (expected if isinstance(expected, list) else [expected])
    assert {example.line for example in dataset} == {1}


@pytest.mark.parametrize(("template", "row", "expected"), PAIRS)
def test_pair_masks_are_those_written_by_hand(template, row, expected):
    tokenizer = words_tokenizer(template)
    assert picture(tokenizer, load_rows([row], tokenizer, "pairs")) == expected


def test_an_unpaired_row_is_one_completion_with_its_label():
    tokenizer = words_tokenizer("chatml")
    dataset = load_rows([{"prompt": "a", "completion": "b", "label": False}], tokenizer, "unpaired")
    assert picture(tokenizer, dataset) == [f"{CHATML_USER} | *b *<|im_end|>"]
    assert dataset[0].extras == {"label": False}


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "strict"])
def test_wrapped_plain_and_custom_tokenizers_give_the_same_masks(template):
    """A tokenizer with its own `encode` is called text by text, and positions are found by token prefixes."""

    class OwnEncode(PreTrainedTokenizerFast):
        def encode(self, *args, **kwargs):
            return super().encode(*args, **kwargs)

    wrapped, plain = words_tokenizer(template), words_tokenizer(template, wrapped=False)
    own = OwnEncode(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    own.chat_template = plain.chat_template
    pictures = [picture(t, load_rows([TWO_TURNS, THOUGHTS], t), i) for t in (wrapped, plain, own) for i in (0, 1)]
    assert pictures[:2] == pictures[2:4] == pictures[4:]


@pytest.mark.parametrize("template", ["marked", "marked_answer"])
def test_marked_masks_equal_the_tokenizers_own(template):
    tokenizer = words_tokenizer(template, wrapped=False)
    out = tokenizer.apply_chat_template(
        THOUGHTS["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ours = load_rows([THOUGHTS], tokenizer)[0]
    ids = np.concatenate([ours.prompt, ours.completions[0].tokens])
    mask = np.concatenate([np.zeros(len(ours.prompt), bool), ours.completions[0].mask])
    newline = tokenizer.convert_tokens_to_ids("\n")
    after_end = np.concatenate([[False], ids[:-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")])
    theirs = np.array(out["assistant_masks"], bool)[: len(ids)] & ~((ids == newline) & after_end)
    assert ids.tolist() == out["input_ids"][: len(ids)]
    assert mask.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("template", "row", "key", "count"),
    [
        ("qwen3", THOUGHTS, "rows_split", 1),
        ("r1", TWO_TURNS, "turns_with_other_opening", 2),
        ("endless", TWO_TURNS, "turns_without_end_token", 1),
        ("endless", TWO_TURNS, "ends_added", 1),
        ("chatml", {"messages": [assistant("b"), user("a"), assistant("c")]}, "turns_without_prompt", 1),
        ("chatml", {"messages": [user("a"), assistant("c"), user("a"), user("b")]}, "messages_unused", 2),
    ],
)
def test_what_a_template_makes_untrainable_is_counted_and_said(template, row, key, count):
    report = load_rows([row], words_tokenizer(template)).report
    assert report["counts"][key] == count
    assert any(note.startswith(f"{count} ") for note in report["notes"])


def test_a_pair_cannot_be_split_and_that_is_said():
    row = {"prompt": "a", "chosen": [assistant("<think>\n</think>b"), user("e"), assistant("f")], "rejected": "c"}
    report = load_rows([row], words_tokenizer("qwen3"), "pairs").report
    assert report["counts"] == {"turns_rewritten": 1, "turns_trained": 2}
    assert report["notes"][0].startswith("1 assistant turns are not trained: the chat template rewrites")


def test_a_template_that_hides_the_answer_is_refused():
    tokenizer = words_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="does not show what the assistant says"):
        load_rows([TWO_TURNS], tokenizer)


def test_a_clean_file_has_nothing_to_say():
    report = load_rows([TWO_TURNS], words_tokenizer("chatml")).report
    assert report["notes"] == []
    assert report["counts"] == {"turns_trained": 2}
    assert (report["tokens"], report["prompt_tokens"], report["trained_tokens"]) == (23, 9, 4)


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
