# SPDX-License-Identifier: Apache-2.0
"""Groups: one prompt with judged responses, or with none; what becomes of them from the file to the batch."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from data_tools import TEMPLATES, assistant, load_rows, picture, user, words_tokenizer, write_jsonl

from mlx_realign import cli, data
from mlx_realign.config import TrainSettings
from mlx_realign.data.formats import parse
from mlx_realign.data.messages import RowError
from mlx_realign.data.store import find
from mlx_realign.errors import UserError

HEADER = "<|im_start|> user ⏎ a <|im_end|> ⏎ <|im_start|> assistant ⏎"  # 9 tokens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with nothing but a tokenizer."""
    words_tokenizer("chatml", wrapped=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.entry(["data", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def scored(*responses: tuple[str, float], **more) -> dict:
    return {"prompt": "a", "responses": [{"text": t, "score": s} for t, s in responses], **more}


def verified(*responses: tuple[str, bool], **more) -> dict:
    return {"problem": "a", "solution": "b", "responses": [{"text": t, "correct": c} for t, c in responses], **more}


# Rows. -------------------------------------------------------------------------------------------------------------


def test_a_scored_group_is_its_prompt_with_every_response_ended():
    tokenizer = words_tokenizer("chatml")
    dataset = load_rows([scored(("b", 0.25), ("c d", 1), ("e", 0), level=3)], tokenizer, "groups")
    assert picture(tokenizer, dataset) == [
        f"{HEADER} | *b *<|im_end|>", f"{HEADER} | *c *␣ *d *<|im_end|>", f"{HEADER} | *e *<|im_end|>",
    ]  # fmt: skip
    assert dataset[0].extras == {"scores": [0.25, 1.0, 0.0], "row": {"prompt": "a", "level": 3}}


def test_a_verified_group_has_scores_of_one_and_zero():
    row = verified(("b", True), ("c", False), steps=[{"description": "x"}])
    dataset = load_rows([row], words_tokenizer("chatml"), "groups")
    steps = [{"description": "x"}]
    assert dataset[0].extras == {"scores": [1.0, 0.0], "row": {"problem": "a", "solution": "b", "steps": steps}}
    assert dataset.prompt_lengths.tolist() == [9] and picture(words_tokenizer("chatml"), dataset)[1].startswith(HEADER)


@pytest.mark.parametrize(
    ("row", "kind", "scores"),
    [
        ({"prompt": "a", "solution": "b", "responses": [{"text": t, "correct": t == "b"} for t in "bc"]},
         "verified", [1, 0]),
        ({"question": "a", "answer": "4", "responses": [{"text": t, "correct": False} for t in "bc"]},
         "verified", [0, 0]),
        # Both: what is correct is correct by something, a solution or an answer.
        ({"prompt": "a", "responses": [{"text": t, "score": 0.5, "correct": True} for t in "bc"]},
         "scored", [0.5, 0.5]),
        ({"prompt": "a", "answer": 4, "responses": [{"text": t, "score": 0.5, "correct": True} for t in "bc"]},
         "verified", [1, 1]),
        ({"prompt": "a", "responses": [{"text": t, "score": -7, "correct": "so"} for t in "bc"]}, "scored", [-7, -7]),
        ({"prompt": "a", "problem": "x", "solution": "y", "responses": [{"text": t, "score": 1} for t in "bc"]},
         "scored", [1, 1]),
        ({"prompt": None, "problem": "a", "answer": "4", "responses": None}, "open", None),
        ({"prompt": "a", "responses": []}, "open", None),
        ({"problem": "a", "answer": 4}, "open", None),
        ({"prompt": [user("a")], "chosen": "b"}, "open", None),
    ],
)  # fmt: skip
def test_how_a_group_is_judged(row, kind, scores):
    found = parse(row, "groups")
    assert (found.group, found.extras.get("scores")) == (kind, scores)
    assert "responses" not in found.extras["row"]
    assert found.prompt in ("a", [user("a")])
    assert len(found.completions) == len(scores or [])


TWO = [{"text": "b", "score": 1}, {"text": "c", "score": 0}]
BAD = [
    (scored(("b", 1)), "'responses' has 1, and a group has 2 to 32 responses (or none)"),
    (scored(*((f"b{i}", 1) for i in range(33))), "'responses' has 33, and a group has 2 to 32 responses"),
    ({"prompt": "a", "responses": {"text": "b"}}, "'responses' must be a list of responses, found an object"),
    ({"prompt": "a", "responses": ["b", "c"]}, "'responses[0]' must be an object with text and score, found a string"),
    ({"prompt": "a", "responses": [TWO[0], {"text": "c"}]}, "'responses[1]' has no 'score' (keys found: 'text')"),
    ({"prompt": "a", "responses": [TWO[0], {"score": 1}]}, "'responses[1]' has no 'text' (keys found: 'score')"),
    (scored(("b", 1), (" ", 0)), "'responses[1].text' is empty"),
    ({"prompt": "a", "responses": [TWO[0], {"text": 3, "score": 1}]}, "'responses[1].text' must be a string, found a"),
    (scored(("b", 1), ("c", True)), "'responses[1].score' must be a finite number, found a boolean (True)"),
    ({"prompt": "a", "responses": [TWO[0], {"text": "c", "score": "0.5"}]}, "must be a finite number, found a string"),
    (scored(("b", 1), ("c", float("nan"))), "'responses[1].score' must be a finite number, found a number (nan)"),
    (scored(("b", 1), ("c", -float("inf"))), "'responses[1].score' must be a finite number, found a number (-inf)"),
    (scored(("b", 1), ("c", 10**400)), "'responses[1].score' must be a finite number, found a number (1000"),
    (verified(("b", True), ("c", 0)), "'responses[1].correct' must be true or false, found a number (0)"),  # type: ignore
    (verified(("b", "true"), ("c", False)), "'responses[0].correct' must be true or false, found a string"),  # type: ignore
    (verified(("b", True), ("c", None)), "'responses[1].correct' must be true or false, found null"),  # type: ignore
    ({"prompt": "a", "responses": [TWO[0], {"text": "c", "correct": True}]}, "'responses' mixes 'score' and 'correct'"),
    (scored(("b", 1), ("b", 0.5)), "has the same text twice, with scores 1 and 0.5: the row contradicts itself"),
    ({"prompt": "", "responses": TWO}, "'prompt' is empty"),
    ({"prompt": 4, "responses": TWO}, "'prompt' must be a string or a list of messages, found a number (4)"),
    ({"prompt": [user("a"), assistant("b")]}, "'prompt' ends with an assistant message"),
    ({"problem": "a", "solution": "", "responses": TWO}, "'solution' is empty"),
    ({"problem": "a", "solution": 4}, "'solution' must be a string, found a number (4)"),
    ({"problem": ["a"], "solution": "b"}, "'problem' must be a string, found a list"),
    ({"question": "a", "answer": " "}, "'answer' is empty"),
    ({"question": "a", "answer": None}, "'question' stands without 'solution' or 'answer'"),
    ({"problem": "a", "responses": TWO}, "keys found: 'problem', 'responses'; groups data has {prompt, responses} or"),
    ({"prompt": "a", "respones": TWO}, "a list stands under 'respones'; did you mean 'responses'?"),
    ({"prompt": "a", "response": ["b", "c"]}, "a list stands under 'response'; did you mean 'responses'?"),
    ({"instruction": "a", "output": "b"}, "this row is sft data"),
    ({"prompt": [{"role": "system", "content": "s"}, user("a")], "system": "s"}, "both 'system' and a system message"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_wrong_group_gets_one_message_that_names_the_field(row, message):
    with pytest.raises(RowError) as error:
        parse(row, "groups")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_groups_are_named_where_other_rows_are_wanted():
    with pytest.raises(RowError, match="this row is groups data"):
        parse({"prompt": "a", "responses": TWO}, "sft")
    with pytest.raises(RowError, match="this row is pairs data$"):  # not groups, though a prompt alone is a group
        parse({"prompt": "a", "chosen": "b", "rejected": "c"}, "sft")


@pytest.mark.parametrize("digits", [5000, 99_999])
def test_a_number_of_thousands_of_digits_is_one_bad_row(tmp_path, digits):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "n": ' + "1" * digits + "}\n")
    with pytest.raises(UserError, match="line 1: invalid JSON: "):
        data.load(path, words_tokenizer("chatml"), format="groups", settings=TrainSettings())


# The same response twice. ------------------------------------------------------------------------------------------


def test_a_response_that_comes_twice_counts_once_and_is_told():
    rows = [scored(("b", 1), ("c", 0), ("b", 1), ("b", 1)), scored(("b", 1), ("c", 0))]
    dataset = load_rows(rows, words_tokenizer("chatml"), "groups")
    assert [e.extras["scores"] for e in dataset] == [[1.0, 0.0]] * 2
    assert dataset[0].key == dataset[1].key
    assert dataset.report["notes"] == ["2 responses are left out: their group has the same response already"]


def test_responses_that_a_template_makes_the_same_are_one_response():
    """llama3's template trims: " b" becomes "b"."""
    tokenizer = words_tokenizer("llama3")
    dataset = load_rows([scored(("c", 0), ("b", 1), (" b", 1), ("d", 0.5))], tokenizer, "groups")
    assert [c.partition("| ")[2] for c in picture(tokenizer, dataset)] == ["*c *<|eot|>", "*b *<|eot|>", "*d *<|eot|>"]
    assert dataset[0].extras["scores"] == [0.0, 1.0, 0.5]
    assert dataset.report["counts"]["duplicate_responses"] == 1
    with pytest.raises(UserError, match="line 1: two responses with scores 0 and 1 become the same tokens"):
        load_rows([scored(("b", 0), ("c", 0), (" b", 1))], tokenizer, "groups")


def test_a_group_of_one_and_the_same_response_stays_with_one():
    dataset = load_rows([scored(("b", 1), ("b", 1)), scored(("c", 1), ("c ", 1))], words_tokenizer("llama3"), "groups")
    assert dataset.num_completions.tolist() == [1, 1]
    assert [e.extras["scores"] for e in dataset] == [[1.0], [1.0]]


# Prompts alone. ----------------------------------------------------------------------------------------------------

PROMPTS = ["a b", [user("a")], [user("a"), assistant("b"), user("c")], [{"role": "system", "content": "d"}, user("a")]]


@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_a_prompt_alone_is_the_tokens_that_are_generated_from(template):
    tokenizer = words_tokenizer(template, add_bos=template is None)
    prompts = PROMPTS if template else PROMPTS[:1]
    dataset = load_rows([{"prompt": p, "answer": "4"} for p in prompts], tokenizer, "groups")
    assert [e.prompt.tolist() for e in dataset] == [data.encode_prompt(p, tokenizer) for p in prompts]
    assert all(e.completions == () for e in dataset)


def test_a_prompt_alone_written_by_hand():
    tokenizer = words_tokenizer("r1")
    names = lambda e: " ".join(tokenizer.convert_ids_to_tokens(e.prompt.tolist())).replace("\n", "⏎")  # noqa: E731
    rows = [{"prompt": "a", "system": "d"}, {"question": "a", "answer": "b"}]
    dataset = load_rows(rows, tokenizer, "groups")
    opened = f"{HEADER} <think> ⏎"  # the template's generation prompt opens a thought
    assert [names(e) for e in dataset] == [f"<|im_start|> system ⏎ d <|im_end|> ⏎ {opened}", opened]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_without_a_template_too(prompt):
    tokenizer = words_tokenizer("chatml", add_bos=True)
    example = load_rows([{"prompt": prompt}], tokenizer, "groups", chat_template=False)[0]
    assert example.prompt.tolist() == data.encode_prompt(prompt, tokenizer, chat_template=False)


def test_messages_still_need_a_template():
    with pytest.raises(UserError, match="line 1: the row has messages, but the model has no chat template"):
        load_rows([{"prompt": [user("a")]}], words_tokenizer(None), "groups")
    with pytest.raises(UserError, match="line 1: the chat template refuses these messages: no tools here"):
        load_rows([{"prompt": [{"role": "tool", "content": "x"}, user("a")]}], words_tokenizer("strict"), "groups")


def wide(n: int) -> int:
    return -(-n // 16) * 16


MIXED = [scored(("b", 1), ("c d", 0)), {"prompt": "a b", "answer": "é\ud800", "n": [1, {"x": None}]},
         verified(("e", True), ("f", False), ("g", False)), {"prompt": "a"}]  # fmt: skip


def test_a_file_mixes_rows_with_and_without_responses(cache, monkeypatch):
    first = load_rows(MIXED, words_tokenizer("chatml"), "groups")
    monkeypatch.setattr("mlx_realign.data.pipeline._build", lambda *_: pytest.fail("was tokenised again"))
    for dataset in (first, load_rows(MIXED, words_tokenizer("chatml"), "groups")):
        assert dataset.num_completions.tolist() == [2, 0, 3, 0]
        assert dataset.completion_lengths.tolist() == [4, 0, 2, 0]
        assert dataset.prompt_lengths.tolist() == [9, 11, 9, 9]
        assert dataset.sizes.tolist() == [9 + 2 + 4, 11, 9 + 6, 9]
        assert [len(e.completions) for e in dataset] == [2, 0, 3, 0]
        assert [e.line for e in dataset] == [1, 2, 3, 4]
        assert dataset[1].extras == {"row": {"prompt": "a b", "answer": "é\ud800", "n": [1, {"x": None}]}}
        assert dataset[2].completions[2].mask.tolist() == [True, True]
        assert dataset.report["notes"] == ["2 rows have no responses: a run has to generate them"]
        assert dataset.report["completions"] == 5 and dataset.report["trained_tokens"] == 12


def test_a_file_of_prompts_alone_is_stored(cache):
    dataset = load_rows([{"prompt": "a"}, {"prompt": "b"}], words_tokenizer("chatml"), "groups")
    assert (len(dataset), dataset.sizes.tolist(), dataset.report["trained_tokens"]) == (2, [9, 9], 0)
    assert dataset[0].key != dataset[1].key

    again = find(dataset.fingerprint)
    assert again is not None and [e.prompt.tolist() for e in again] == [e.prompt.tolist() for e in dataset]


def test_rows_from_python_may_hold_numpy():
    row = {"prompt": "a", "answer": np.int64(4), "tests": np.array([[1.5, 2.0]]), "path": (1, 2)}
    extras = load_rows([row], words_tokenizer("chatml"), "groups")[0].extras
    assert extras["row"] == {"prompt": "a", "answer": 4, "tests": [[1.5, 2.0]], "path": [1, 2]}


@pytest.mark.parametrize(
    ("max_length", "truncate", "kept"), [(9, "error", 9), (8, "left", 8), (8, "drop", None), (8, "error", None)]
)
def test_max_length_counts_the_prompt_alone(max_length, truncate, kept):
    load = lambda: load_rows(  # noqa: E731
        [{"prompt": "a"}], words_tokenizer("chatml"), "groups", max_length=max_length, truncate=truncate
    )
    if kept is None:
        with pytest.raises(UserError, match="no row is left" if truncate == "drop" else r"line 1 \(9 tokens\)"):
            load()
        return
    whole = load_rows([{"prompt": "a"}], words_tokenizer("chatml"), "groups")[0].prompt.tolist()
    assert load()[0].prompt.tolist() == whole[-kept:]


def test_a_group_that_is_too_long_keeps_its_responses_whole():
    tokenizer = words_tokenizer("chatml")
    dataset = load_rows([scored(("b", 1), ("c d", 0))], tokenizer, "groups", max_length=6, truncate="left")
    assert picture(tokenizer, dataset) == ["assistant ⏎ | *b *<|im_end|>", "assistant ⏎ | *c *␣ *d *<|im_end|>"]


# Batches. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [None, 40])
def test_a_plan_has_every_row_once(batch_tokens):
    dataset = load_rows(MIXED * 5, words_tokenizer("chatml"), "groups")
    plan = data.plan(dataset, batch_size=3, batch_tokens=batch_tokens, seed=0, epoch=1, width=wide)
    assert sorted(np.concatenate(plan).tolist()) == list(range(20))


def test_a_batch_of_rows_with_and_without_responses():
    dataset = load_rows(MIXED, words_tokenizer("chatml"), "groups")
    batch = data.collate(list(dataset))
    assert batch.prompt.shape == (4, 11) and batch.completion.shape == (5, 4)
    assert batch.row_prompt.tolist() == [0, 0, 2, 2, 2]
    assert batch.extras["scores"].tolist() == [1, 0, 1, 0, 0]
    assert batch.extras["row"].tolist() == [0, 1, 0, 1, 2]  # not the JSON row of the extras
    assert set(batch.extras) == {"row", "scores"}


def test_a_batch_of_prompts_alone_has_no_completion():
    dataset = load_rows([{"prompt": "a"}, {"prompt": "a b"}], words_tokenizer("chatml"), "groups")
    batch = data.collate(list(dataset), width=wide)
    assert batch.prompt.shape == (2, 16) and batch.pad.tolist() == [7, 5]
    assert [len(x) for x in (batch.completion, batch.row_prompt, batch.mask, batch.positions)] == [0, 0, 0, 0]
    assert batch.positions.dtype == mx.int32 and batch.extras["row"].shape == (0,)


# The commands. -----------------------------------------------------------------------------------------------------


def test_validate_lists_bad_groups_with_their_lines(capsys, tmp_path):
    rows = [MIXED[0], {"prompt": "a", "responses": [TWO[0]]}, verified(("b", True), ("c", 1)), MIXED[3]]  # type: ignore
    code, out, _ = run(capsys, "validate", write_jsonl(tmp_path / "rows.jsonl", rows), "--method", "groups")
    lines = out.splitlines()
    assert code == 2
    assert lines[0] == "line 2: 'responses' has 1, and a group has 2 to 32 responses (or none)"
    assert lines[1] == "line 3: 'responses[1].correct' must be true or false, found a number (1)"
    assert lines[2].endswith("rows.jsonl: 4 rows, 2 bad, 0 warnings")


def test_validate_refuses_scores_outside_what_is_told(capsys, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [scored(("b", 0), ("c", 11)), verified(("b", True), ("c", False))])
    assert run(capsys, "validate", path, "--method", "groups")[0] == 0
    code, out, _ = run(capsys, "validate", path, "--method", "groups", "--score-max", 10)
    assert (code, out.splitlines()[0]) == (2, "line 1: a score of 11 is above --score-max 10")
    code, out, _ = run(capsys, "validate", path, "--method", "groups", "--score-min", 0.5)
    assert (code, out.splitlines()[0]) == (2, "line 1: a score of 0 is below --score-min 0.5")
    code, _, err = run(capsys, "validate", path, "--method", "sft", "--score-min", 0)
    assert (code, err) == (2, "error: --score-min is about groups, and this is sft data: drop it\n")


def test_validate_counts_tokens_of_groups(capsys, tmp_path, model):
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED)
    words = ["validate", path, "--method", "groups", "--model", model, "--max-length", 12, "--json"]
    found = json.loads(run(capsys, *words)[1])
    assert found["lengths"]["completion"] == {"p50": 2, "p90": 4, "p99": 4, "max": 4}
    assert found["lengths"]["total"] == {"p50": 11, "p90": 13, "p99": 13, "max": 13}
    assert found["over_max_length"] == {"max_length": 12, "rows": 1, "share": 0.25, "completion_alone": 0}
    assert found["counts"]["rows_without_responses"] == 2


def test_show_prints_groups_and_prompts_alone(capsys, tmp_path, model):
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED)
    code, out, _ = run(capsys, "show", path, "-n", 2, "--model", model)
    assert code == 0
    assert "completion 1: 9 + 2 tokens, 2 trained" in out and "⟦c d<|im_end|>⟧" in out
    assert "11 tokens, no responses\n<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n" in out
    alone = write_jsonl(tmp_path / "alone.jsonl", [{"prompt": "a"}])  # a prompt alone is taken for a group too
    assert "9 tokens, no responses" in run(capsys, "show", alone, "--model", model)[1]
