# SPDX-License-Identifier: Apache-2.0
"""Which tokens are trained, written out by hand for each kind of row and of chat template."""

import numpy as np
import pytest
from data_tools import (
    TEMPLATES,
    assistant,
    load_rows,
    picture,
    user,
    words_tokenizer,
)
from transformers import PreTrainedTokenizerFast

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
