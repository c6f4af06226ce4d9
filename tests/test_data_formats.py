# SPDX-License-Identifier: Apache-2.0
"""Every accepted row, and the one message each wrong row gets."""

import pytest
from data_tools import assistant, load_rows, user, words_tokenizer

from mlx_realign.data.formats import FORMATS, parse
from mlx_realign.data.messages import RowError
from mlx_realign.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))


SYSTEM = {"role": "system", "content": "s"}
SAME_SFT = [
    {"instruction": "a b", "output": "c"},
    {"instruction": "a b", "output": "c", "input": "", "metadata": {"source": "x", "quality_score": 0.9}},
    {"instruction": "a b", "response": "c"},
    {"prompt": "a b", "completion": "c"},
    {"prompt": "a b", "response": "c", "confidence": "high"},
    {"prompt": [user("a b")], "completion": [assistant("c")]},
    {"prompt": [user("a b")], "completion": "c"},
    {"question": "a b", "answer": "c"},
    {"problem": "a b", "solution": "c"},
    {"messages": [user("a b"), assistant("c")]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}]}, assistant("c")]},
    {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]},
    {"conversations": [user("a b"), assistant("c")]},
]
SAME_SYSTEM = [
    {"instruction": "a", "output": "c", "system": "s"},
    {"prompt": "a", "completion": "c", "system": "s"},
    {"prompt": [SYSTEM, user("a")], "completion": "c"},
    {"messages": [SYSTEM, user("a"), assistant("c")]},
    {"messages": [user("a"), assistant("c")], "system": "s"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}], "system": "s"},
    {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "user", "value": "a"},
            {"from": "model", "value": "c"},
        ]
    },
]
SAME_PAIR = [
    {"prompt": "a", "chosen": "b", "rejected": "c", "metadata": {"gap_score": 0.3}},
    {"prompt": [user("a")], "chosen": "b", "rejected": "c"},
    {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    {"prompt": "a", "chosen": "b", "rejected": ["c"]},
    {"prompt": "a", "chosen": [assistant("b")], "rejected": [[assistant("c")]]},
    {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    {"prompt": [user("a")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
]


@pytest.mark.parametrize(
    ("format", "rows"), [("sft", SAME_SFT), ("sft", SAME_SYSTEM), ("pairs", SAME_PAIR)], ids=["sft", "system", "pairs"]
)
def test_the_same_row_in_every_format_becomes_the_same_tokens(format, rows):
    dataset = load_rows(rows, words_tokenizer("chatml"), format)
    assert len(dataset) == len(rows)
    assert len({example.key for example in dataset}) == 1


def test_different_rows_have_different_keys():
    rows = [{"prompt": "a", "completion": c} for c in ("b", "c", "b c")] + [{"prompt": "b", "completion": "b"}]
    assert len({example.key for example in load_rows(rows, words_tokenizer("chatml"))}) == 4


def test_input_is_appended_to_the_instruction():
    row = parse({"instruction": "a", "input": "b", "output": "c"}, "sft")
    assert (row.prompt, row.completions) == ("a\n\nb", ("c",))


def test_scores_and_margin_of_a_pair_are_kept():
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 9, "rejected_score": 3.5, "margin": 5.5},
        {"prompt": "a", "chosen": "b", "rejected": ["c", "d"], "score_chosen": 2, "score_rejected": [1, 0]},
        {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 9},
    ]
    dataset = load_rows(rows, words_tokenizer("chatml"), "pairs")
    assert [e.extras for e in dataset] == [{"scores": [9.0, 3.5], "margin": 5.5}, {"scores": [2.0, 1.0, 0.0]}, {}]


@pytest.mark.parametrize(
    ("more", "tie"),
    [
        ({"tie": True}, 1.0),
        ({"chosen_score": 3, "rejected_score": 3.0}, 1.0),
        ({"chosen_score": 3, "rejected_score": 3, "tie": None}, 1.0),
        ({"chosen_score": 3, "rejected_score": 3, "tie": False}, None),
        ({"chosen_score": 3, "rejected_score": 2}, None),
        ({"chosen_score": 3, "rejected_score": 2, "tie": True}, 1.0),
        ({"rejected": ["c", "d"], "chosen_score": 3, "rejected_score": [3, 3]}, None),
        ({"tie": False}, None),
        ({}, None),
    ],
)
def test_ties_are_said_or_seen_in_equal_scores(more, tie):
    assert parse({"prompt": "a", "chosen": "b", "rejected": "c", **more}, "pairs").extras.get("tie") == tie


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD = [
    ("sft", [1], "a row must be a JSON object, found a list"),
    ("sft", {}, "keys found: none; sft data has {messages} or {conversations} or {instruction, output}"),
    ("sft", {"instruction": "a", "ouput": "b"}, "did you mean 'output' instead of 'ouput'?"),
    ("sft", {"messags": []}, "did you mean 'messages' instead of 'messags'?"),
    ("sft", PAIR, "this row is pairs data"),
    ("pairs", {"instruction": "a", "output": "b"}, "this row is sft data"),
    ("pairs", {"prompt": "a", "choosen": "b", "rejected": "c"}, "did you mean 'chosen' instead of 'choosen'?"),
    ("unpaired", {"prompt": "a", "completion": "b"}, "keys found: 'prompt', 'completion'; unpaired data has"),
    ("unpaired", {"prompt": "a", "completion": "b", "label": 1}, "'label' must be true or false, found a number (1)"),
    ("sft", {"instruction": "a", "output": ""}, "'output' is empty"),
    ("sft", {"instruction": " \n", "output": "a"}, "'instruction' is empty"),
    ("sft", {"instruction": "a", "output": None}, "'output' must be a string, found null"),
    ("sft", {"instruction": "a", "output": "b", "input": 3}, "'input' must be a string, found a number (3)"),
    ("sft", {"instruction": "a", "output": "b", "system": ["s"]}, "'system' must be a string, found a list"),
    ("sft", {"instruction": "a", "output": "b", "metadata": {"quality_score": 7}}, "'metadata.quality_score' must be"),
    ("sft", {"prompt": {}, "completion": "b"}, "'prompt' must be a string or a list of messages, found an object"),
    ("sft", {"prompt": [user("a"), assistant("b")], "completion": "c"}, "'prompt' ends with an assistant message"),
    ("sft", {"prompt": "a", "completion": [user("b")]}, "'completion[0].role' is 'user': a completion must begin"),
    ("sft", {"prompt": "a", "completion": [assistant("b"), user("c")]}, "'completion' ends with a 'user' message"),
    ("sft", {"messages": "a"}, "'messages' must be a list of messages, found a string"),
    ("sft", {"messages": []}, "'messages' has no messages"),
    ("sft", {"messages": [user("a")]}, "'messages' has no assistant message: there is nothing to train on"),
    ("sft", {"messages": [assistant("a")]}, "'messages' begins with its only assistant message"),
    ("sft", {"messages": [user("a"), assistant("")]}, "'messages[1].content' is empty"),
    ("sft", {"messages": [user("a"), {"role": "assistent", "content": "b"}]}, "'messages[1].role' is 'assistent'"),
    ("sft", {"messages": [user("a"), {"content": "b"}]}, "'messages[1]' must be an object with role and content"),
    ("sft", {"messages": [{"role": "user"}, assistant("b")]}, "'messages[0].content' is missing"),
    ("sft", {"messages": [{"role": "user", "content": 5}, assistant("b")]}, "'messages[0].content' must be a string"),
    ("sft", {"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("b")]},
     "'messages[0].content[0]' is not a text part"),
    ("sft", {"messages": [user("a"), {**assistant("b"), "weight": 0}]}, "no assistant message with a weight above 0"),
    ("sft", {"messages": [SYSTEM, user("a"), assistant("b")], "system": "s"}, "both 'system' and a system message"),
    ("sft", {"conversations": [{"from": "alien", "value": "a"}]}, "'conversations[0].from' is 'alien'"),
    ("sft", {"prompt": "a", "completion": "b", "tools": "[{"}, "'tools' is a string that is not JSON"),
    ("sft", {"prompt": "a", "completion": "b\ud800"}, "'completion' holds \\ud800, half of a character, at position 2"),
    ("sft", {"messages": [user("\udc00"), assistant("b")]}, "'messages[0].content' holds \\udc00"),
    ("pairs", {**PAIR, "rejected": "b"}, "chosen and rejected are the same"),
    ("pairs", {**PAIR, "rejected": [assistant("b")]}, "chosen and rejected are the same"),
    ("pairs", {**PAIR, "rejected": ["c", "b"]}, "chosen and rejected[1] are the same"),
    ("pairs", {**PAIR, "rejected": []}, "'rejected' has no messages"),
    ("pairs", {**PAIR, "chosen": "  "}, "'chosen' is empty"),
    ("pairs", {**PAIR, "chosen": 2}, "'chosen' must be a string or a list of messages, found a number (2)"),
    ("pairs", {**PAIR, "margin": "big"}, "'margin' must be a finite number, found a string"),
    ("pairs", {**PAIR, "tie": 1}, "'tie' must be true or false, found a number (1)"),
    ("pairs", {**PAIR, "rejected": ["c", "b"], "tie": True}, "chosen and rejected[1] are the same"),
    ("pairs", {"prompt": "a", "responses": []},
     "this row is a scored group; `mlx-realign data convert FILE --from grpo --to dpo --output OUT` makes pairs"),
    ("unpaired", {"prompt": "a", "responses": []}, "`mlx-realign data convert FILE --from grpo --to kto --output OUT`"),
    ("pairs", {"problem": "a", "solution": "b", "responses": []},
     "this row is a verified group; `mlx-realign data convert FILE --from rlvr --to dpo --output OUT`"),
    ("unpaired", PAIR, "this row is pairs data; `mlx-realign data convert FILE --from dpo --to kto --output OUT`"),
    ("pairs", {**PAIR, "chosen_score": 1, "rejected_score": [1, 2]}, "'rejected_score' has 2 numbers for 1 rejected"),
    ("pairs", {"chosen": "b", "rejected": "c"}, "there is no 'prompt', and 'chosen' is a string that is not"),
    ("pairs", {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "share no prompt"),
    ("pairs", {"prompt": "z", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
     "'prompt' is not what the conversations in chosen and rejected begin with"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "message"), BAD)
def test_a_wrong_row_gets_one_message_that_names_the_field(format, row, message):
    with pytest.raises(RowError) as error:
        parse(row, format)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [None, 1, True, "", [], {}, [[]], [{}], [{"role": []}], [None], {"role": "user"}])
def test_no_value_in_any_field_is_anything_but_a_row_error(format, value):
    """Fuzz: whatever stands in whichever field, the answer is a row or a RowError, never another exception."""
    for keys, _ in FORMATS[format]:
        good = {key: True if key == "label" else "a" if key != "rejected" else "b" for key in keys}
        for key in [*keys, "system", "tools", "metadata", "chat_template_kwargs", "margin", "input"]:
            try:
                parse({**good, key: value}, format)
            except RowError:
                continue


def test_pairs_that_become_the_same_tokens_are_refused():
    """The template trims what it renders."""
    with pytest.raises(UserError, match="line 1: chosen and rejected become the same tokens"):
        load_rows([{"prompt": "a", "chosen": "b", "rejected": "b "}], words_tokenizer("llama3"), "pairs")
