# SPDX-License-Identifier: Apache-2.0
"""`data convert`: which pairs and labels come out of groups and pairs, and what is said of those that give none."""

import json
from pathlib import Path

import pytest
from data_tools import assistant, user, write_jsonl

from mlx_realign import cli
from mlx_realign.data.validate import validate

GROUP = {
    "prompt": "q",
    "responses": [{"text": t, "score": s} for t, s in (("a", 0.4), ("b", 0.9), ("c", 0.1), ("d", 0.9))],
}
VERIFIED = {
    "problem": "q",
    "solution": "4",
    "responses": [{"text": t, "correct": c} for t, c in (("x", False), ("y", True), ("z", False), ("w", True))],
}


def group(*scores: float) -> dict:
    return {"prompt": "q", "responses": [{"text": f"r{i}", "score": s} for i, s in enumerate(scores)]}


@pytest.fixture
def convert(tmp_path, capsys):
    """Rows and flags -> (exit code, rows written, standard output, standard error)."""

    def call(rows: list, source: str, to: str, *flags: object) -> tuple[int, list[dict], str, str]:
        path, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
        output.unlink(missing_ok=True)
        words = ["data", "convert", path, "--from", source, "--to", to, "--output", output, *flags]
        code = cli.entry([str(word) for word in words])
        said = capsys.readouterr()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"][: 1 + output.exists()]
        made = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        if made:  # what is written can be trained on
            assert validate(output, "pairs" if to == "dpo" else "unpaired")["good"] == len(made)
        return code, made, said.out, said.err

    return call


def short(pairs: list[dict]) -> list[tuple]:
    return [(p["chosen"], p["rejected"], p["chosen_score"], p["rejected_score"], p.get("margin")) for p in pairs]


# Groups to pairs. --------------------------------------------------------------------------------------------------


def test_best_and_worst_of_a_group_make_one_pair(convert):
    code, made, out, _ = convert([GROUP], "grpo", "dpo")
    assert code == 0
    assert made == [
        {"prompt": "q", "chosen": "b", "rejected": "c", "chosen_score": 0.9, "rejected_score": 0.1, "margin": 0.8}
    ]
    assert out.splitlines()[-1].endswith("out.jsonl: 1 rows from 1")


def test_all_pairs_come_by_the_width_of_their_gap(convert):
    """Scores .4 .9 .1 .9: b and d are equal and make no pair; the others make five."""
    made = convert([GROUP], "grpo", "dpo", "--pairs", "all")[1]
    assert short(made) == [
        ("b", "c", 0.9, 0.1, 0.8),
        ("d", "c", 0.9, 0.1, 0.8),
        ("b", "a", 0.9, 0.4, 0.5),
        ("d", "a", 0.9, 0.4, 0.5),
        ("a", "c", 0.4, 0.1, 0.3),
    ]
    wide = convert([GROUP], "grpo", "dpo", "--pairs", "all", "--min-gap", 0.5)[1]
    assert short(wide) == short(made)[:4]
    assert short(convert([GROUP], "grpo", "dpo", "--pairs", "all", "--max-pairs-per-prompt", 2)[1]) == short(made)[:2]


def test_a_gap_that_only_rounding_makes_too_small_is_enough(convert):
    assert 0.7 - 0.55 < 0.15
    assert convert([group(0.7, 0.55)], "grpo", "dpo", "--min-gap", 0.15)[1][0]["margin"] == 0.15


def test_one_vs_all_puts_the_rejected_into_a_list(convert):
    made = convert([GROUP], "grpo", "dpo", "--pairs", "one-vs-all")[1]
    assert short(made) == [("b", ["c", "a"], 0.9, [0.1, 0.4], None)]
    made = convert([GROUP], "grpo", "dpo", "--pairs", "one-vs-all", "--min-gap", 0.6)[1]
    assert short(made) == [("b", ["c"], 0.9, [0.1], None)]
    made = convert([GROUP], "grpo", "dpo", "--pairs", "one-vs-all", "--max-pairs-per-prompt", 1)[1]
    assert made[0]["rejected"] == ["c"]


def test_verified_groups_pair_a_right_answer_with_a_wrong_one(convert):
    assert short(convert([VERIFIED], "rlvr", "dpo")[1]) == [("y", "x", 1, 0, 1)]
    every = convert([VERIFIED], "rlvr", "dpo", "--pairs", "all")[1]
    assert [(p["chosen"], p["rejected"]) for p in every] == [("y", "x"), ("y", "z"), ("w", "x"), ("w", "z")]


def test_an_answer_that_comes_twice_counts_once_with_its_mean_score(convert):
    responses = [{"text": t, "score": s} for t, s in (("a", 0.2), ("b", 0.5), (" a ", 0.4), ("c", 0.3))]
    made = convert([{"prompt": "q", "responses": responses}], "grpo", "dpo", "--pairs", "all")[1]
    assert [(p["chosen"], p["rejected"], p["margin"]) for p in made] == [("b", "a", 0.2), ("b", "c", 0.2)]


def test_groups_without_a_gap_are_skipped_and_told(convert):
    rows = [group(0.5, 0.5), group(0.9, 0.5), group(0.3)]
    code, made, out, _ = convert(rows, "grpo", "dpo")
    assert (code, len(made)) == (0, 1)
    assert out.splitlines()[0] == "2 of 3 rows skipped (line 1, 3): no two responses differ in score"
    code, made, _, err = convert(rows, "grpo", "dpo", "--min-gap", 0.5)
    assert (code, made) == (2, [])
    assert err.endswith(
        "in.jsonl: nothing to write: of 3 rows 0 are bad and 3 skipped "
        "(no two responses differ in score by 0.5 or more)\n"
    )


def test_what_goes_to_the_template_is_handed_on(convert):
    talk = [{"role": "system", "content": "s"}, user("q")]
    more = {"tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}, "difficulty": 3}
    row = {**GROUP, **more, "prompt": talk, "metadata": {"verifier": "v", "gap_score": 0.1}}
    (made,) = convert([row], "grpo", "dpo")[1]
    assert made["prompt"] == talk
    assert (made["tools"], made["chat_template_kwargs"]) == (more["tools"], more["chat_template_kwargs"])
    assert made["metadata"] == {"verifier": "v"} and "difficulty" not in made
    assert convert([{**GROUP, "system": "s"}], "grpo", "dpo")[1][0]["system"] == "s"


# To labels. --------------------------------------------------------------------------------------------------------


def test_groups_become_labels(convert):
    scored = convert([GROUP], "grpo", "kto", "--threshold", 0.4)[1]
    assert [(r["prompt"], r["completion"], r["label"]) for r in scored] == [
        ("q", "a", True), ("q", "b", True), ("q", "c", False), ("q", "d", True),
    ]  # fmt: skip
    verified = convert([VERIFIED], "rlvr", "kto")[1]
    assert [(r["completion"], r["label"]) for r in verified] == [("x", False), ("y", True), ("z", False), ("w", True)]


def test_pairs_become_labels_and_ties_none(convert):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": ["b", "c"], "system": "s", "metadata": {"gap_score": 0.05}},
        {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 3, "rejected_score": 3},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
    ]
    code, made, out, _ = convert(rows, "dpo", "kto")
    assert code == 0
    assert made == [
        {"prompt": "q", "completion": "a", "label": True, "system": "s", "metadata": {}},
        {"prompt": "q", "completion": "b", "label": False, "system": "s", "metadata": {}},
        {"prompt": "q", "completion": "c", "label": False, "system": "s", "metadata": {}},
        {"prompt": [user("q")], "completion": [assistant("a")], "label": True},
        {"prompt": [user("q")], "completion": [assistant("b")], "label": False},
    ]
    assert out.splitlines()[0] == "1 of 3 rows skipped (line 2): a tie: neither completion is the better one"


# What is wrong. ----------------------------------------------------------------------------------------------------

BAD = [
    ("grpo", [1], "a row must be a JSON object, found a list"),
    ("grpo", {"prompt": "q"}, "keys found: 'prompt'; grpo data has {prompt, responses}: 'responses' is missing"),
    ("rlvr", GROUP, "rlvr data has {problem, solution, responses}: 'problem' is missing"),
    ("grpo", {**GROUP, "responses": []}, "'responses' must be a list of responses, found none"),
    ("grpo", {**GROUP, "responses": "a"}, "'responses' must be a list of responses, found a string"),
    ("grpo", {**GROUP, "responses": ["a"]}, "'responses[0]' must be an object with text and score, found a string"),
    ("grpo", {**GROUP, "responses": [{"text": "a"}]}, "'responses[0]' has no 'score' (keys found: 'text')"),
    ("grpo", {**GROUP, "responses": [{"text": "a", "score": "1"}]}, "'responses[0].score' must be a finite number"),
    ("grpo", {**GROUP, "responses": [{"text": " ", "score": 1}]}, "'responses[0].text' is empty"),
    ("grpo", {**GROUP, "prompt": ""}, "'prompt' is empty"),
    ("grpo", {**GROUP, "prompt": [assistant("a")]}, "'prompt' ends with an assistant message"),
    ("grpo", {**GROUP, "system": 1}, "'system' must be a string, found a number (1)"),
    ("rlvr", {**VERIFIED, "problem": 1}, "'problem' must be a string, found a number (1)"),
    ("rlvr", {**VERIFIED, "solution": ""}, "'solution' is empty"),
    ("rlvr", {**VERIFIED, "responses": [{"text": "a", "correct": 1}]},
     "'responses[0].correct' must be true or false, found a number (1)"),
    ("dpo", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b", "tie": "no"}, "'tie' must be true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "row", "message"), BAD)
def test_a_wrong_row_is_told_with_its_line_and_nothing_is_written(convert, source, row, message):
    good = {"grpo": GROUP, "rlvr": VERIFIED, "dpo": {"prompt": "q", "chosen": "a", "rejected": "b"}}[source]
    to = "kto" if source == "dpo" else "dpo"
    code, made, _, err = convert([good, row], source, to)
    assert (code, made) == (2, [])
    first, line, last = err.splitlines()
    assert first.endswith("in.jsonl: 1 of 2 rows cannot be converted, so nothing was written")
    assert line.startswith("  line 2: ") and message in line
    assert last == "Mend them, or leave them out with --skip-bad-rows."
    code, made, out, _ = convert([good, row], source, to, "--skip-bad-rows")
    assert code == 0 and made
    assert out.splitlines()[0].startswith("line 2: left out: ") and message in out.splitlines()[0]


def test_json_says_what_was_done(convert):
    code, made, out, _ = convert([GROUP, group(1, 1), {}], "grpo", "dpo", "--skip-bad-rows", "--json", "--pairs", "all")
    found = json.loads(out)
    assert (found["read"], found["written"], found["skipped"], found["skipped_lines"]) == (3, 5, 1, [2])
    assert [row["line"] for row in found["bad"]] == [3]
    assert Path(found["output"]).name == "out.jsonl"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["grpo", "kto"], "--from grpo --to kto needs --threshold"),
        (["rlvr", "kto", "--threshold", "1"], "--threshold goes with --from grpo --to kto only"),
        (["rlvr", "kto", "--pairs", "all"], "--pairs says how pairs are made, so it does not go with --to kto"),
        (["dpo", "kto", "--min-gap", "1"], "--min-gap says how pairs are made, so it does not go with --to kto"),
        (["dpo", "dpo"], "--from dpo --to dpo: there is nothing to convert"),
        (["grpo", "dpo", "--min-gap", "-1"], "--min-gap must be 0 or more, got -1.0"),
        (["grpo", "dpo", "--max-pairs-per-prompt", "2"], "--max-pairs-per-prompt goes with --pairs all or one-vs-all"),
        (["grpo", "dpo", "--pairs", "all", "--max-pairs-per-prompt", "0"], "must be at least 1, got 0"),
        (["grpo", "dpo", "--pairs", "some"], "--pairs: expected one of best-worst, all, one-vs-all, got 'some'"),
        (["sft", "dpo"], "expected one of grpo, rlvr, dpo, got 'sft'"),
    ],
)
def test_wrong_calls_are_told_in_one_line(convert, flags, message):
    code, made, _, err = convert([GROUP], *flags)
    assert (code, made) == (2, [])
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_no_file_is_overwritten(tmp_path, capsys):
    path, other = write_jsonl(tmp_path / "rows.jsonl", [GROUP]), write_jsonl(tmp_path / "other.jsonl", [])
    (tmp_path / "link.jsonl").symlink_to(path)
    for output in (path, other, tmp_path, tmp_path / "link.jsonl"):
        words = ["data", "convert", path, "--from=grpo", "--to", "dpo", "--output", output]
        assert cli.entry([str(word) for word in words]) == 2
        assert f"--output {output}: exists already. Give a new name." in capsys.readouterr().err
    assert json.loads(path.read_text()) == GROUP


def test_a_folder_that_cannot_be_made_is_told(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [GROUP])
    output = path / "out.jsonl"
    words = ["data", "convert", path, "--from", "grpo", "--to", "dpo", "--output", output]
    assert cli.entry([str(word) for word in words]) == 2
    assert f"--output {output}: cannot be written: " in capsys.readouterr().err


def test_half_a_character_in_what_is_handed_on_survives(convert):
    row = {**GROUP, "metadata": {"source": "\ud800é"}}
    assert convert([row], "grpo", "dpo")[1][0]["metadata"] == {"source": "\ud800é"}
