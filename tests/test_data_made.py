# SPDX-License-Identifier: Apache-2.0
"""`data difficulty`, `data split` and `data make`: rows chosen, shared out and made."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
from data_tools import assistant, user, write_jsonl

from mlx_realign import cli
from mlx_realign.data.make import INSTRUCTION
from mlx_realign.data.problems import problem_key
from mlx_realign.data.validate import validate


@pytest.fixture
def run(tmp_path, capsys):
    """Words -> (exit code, standard output, standard error). No draft is left behind."""

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.entry(["data", *map(str, words)])
        said = capsys.readouterr()
        assert not [path for path in tmp_path.rglob(".*")]
        return code, said.out, said.err

    return call


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def verified(problem: str, right: int, of: int, **more) -> dict:
    responses = [{"text": f"r{i}", "correct": i < right} for i in range(of)]
    return {"problem": problem, "solution": "x", "responses": responses, **more}


# Difficulty. -------------------------------------------------------------------------------------------------------


def test_the_pass_rate_is_smoothed_and_shared_by_rows_of_a_problem(run, tmp_path):
    """(right + 1) / (responses + 2): 3 of 4 is 4 / 6; "b" has 0 of 2 and 1 of 4 together, 2 / 8."""
    rows = [verified("a", 3, 4, level=1), verified("b", 0, 2), verified(" B", 1, 4), {"prompt": "c"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, out, _ = run("difficulty", path, "--output", tmp_path / "out.jsonl")
    assert code == 0
    made = read(tmp_path / "out.jsonl")
    assert [row.pop("pass_rate") for row in made[:3]] == pytest.approx([4 / 6, 2 / 8, 2 / 8], abs=1e-6)
    assert made == rows
    assert out.splitlines() == [
        f"{path}: pass rate 0.46 on average of 2 problems; 50% to 0.25, 50% to 0.75",
        "1 of 4 rows have no responses and so no pass rate",
        f"{tmp_path / 'out.jsonl'}: 4 rows",
    ]


def test_repeated_responses_count_as_often_as_they_come(run, tmp_path):
    row = {"prompt": "a", "responses": [{"text": "same", "score": 1}] * 3 + [{"text": "other", "score": 0}]}
    found = json.loads(run("difficulty", write_jsonl(tmp_path / "rows.jsonl", [row]), "--json")[1])
    assert (found["mean"], found["problems"], found["output"]) == (0.75, 1, None)


def test_rows_are_chosen_by_their_pass_rate(run, tmp_path):
    rows = [verified(f"p{n}", n, 8) for n in range(9)] + [{"prompt": "c"}]  # rates 0.1, 0.2 ... 0.9
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = ["difficulty", path, "--min-pass-rate", 0.2, "--max-pass-rate", 0.5]
    code, out, _ = run(*words)
    assert (code, out.splitlines()[-1]) == (0, "4 of 10 rows have a smoothed pass rate from 0.2 to 0.5")
    found = json.loads(run(*words, "--output", tmp_path / "out.jsonl", "--json")[1])
    assert [row["problem"] for row in read(tmp_path / "out.jsonl")] == ["p1", "p2", "p3", "p4"]
    assert (found["kept"], found["outside"], found["open"]) == (4, 5, 1)
    code, _, err = run("difficulty", path, "--min-pass-rate", 0.95, "--output", tmp_path / "none.jsonl")
    assert code == 2 and "nothing to write: no problem has a pass rate from 0.95 to 1" in err
    assert not (tmp_path / "none.jsonl").exists()


def test_scores_need_a_threshold(run, tmp_path):
    row = {"prompt": "a", "responses": [{"text": str(s), "score": s} for s in (0.2, 0.5, 0.9, 1)]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, verified("b", 1, 2)])
    code, _, err = run("difficulty", path)
    assert code == 2
    assert "  line 1: a score of 0.2 is neither 0 nor 1: --threshold says from where on it is right" in err.splitlines()
    assert json.loads(run("difficulty", path, "--threshold", 0.5, "--json")[1])["mean"] == (3 / 4 + 1 / 2) / 2
    assert run("difficulty", path, "--skip-bad-rows")[1].startswith("line 1: left out: a score of 0.2")


def test_a_verifier_judges_anew_and_keeps_the_flag_where_it_cannot_say(run, tmp_path):
    own = tmp_path / "own.py"
    judge = "None if completion == 'r3' else float(completion == 'r2')"
    own.write_text(f"def verify(completion, row):\n    return {judge}\n")
    path = write_jsonl(tmp_path / "rows.jsonl", [verified("a", 2, 4), verified("b", 4, 4)])
    found = json.loads(run("difficulty", path, "--verifier", own, "--json")[1])
    assert found["mean"] == (1 / 4 + 2 / 4) / 2  # of b also r3, whose flag is true


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-pass-rate", "2"], "--min-pass-rate must be from 0 to 1, got 2.0"),
        (["--min-pass-rate", "0.6", "--max-pass-rate", "0.5"], "--min-pass-rate 0.6 is above --max-pass-rate 0.5"),
        (["--output", "FILE"], "exists already. Give a new name."),
        (["--verifier", "mth"], "there is no verifier 'mth'; did you mean math?"),
    ],
)
def test_wrong_calls_of_difficulty(run, tmp_path, flags, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [verified("a", 1, 2)])
    code, _, err = run("difficulty", path, *(path if flag == "FILE" else flag for flag in flags))
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert run("difficulty", write_jsonl(tmp_path / "open.jsonl", [{"prompt": "a"}]))[2].endswith(
        "none of 1 rows has responses, so there is no pass rate\n"
    )


# Split. ------------------------------------------------------------------------------------------------------------


def problems(count: int, rows_each: int = 3) -> list[dict]:
    """Every problem in several spellings and formats, shuffled."""
    rows = []
    for i in range(count):
        asked = f"What is {i} + {i}?"
        forms: list[dict] = [
            {"prompt": asked},
            {"question": asked.upper(), "answer": "x"},
            {"problem": f" {asked}\n", "solution": "x"},
        ]
        forms.append({"messages": [{"role": "system", "content": "s"}, user(asked), assistant("b")]})
        rows += [{**form, "n": i} for form in forms[:rows_each]]
    random.Random(0).shuffle(rows)
    return rows


def test_no_problem_is_on_two_sides_and_no_row_is_lost(run, tmp_path):
    rows = problems(40, 4)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, out, _ = run("split", path, "--by", "problem", "--valid", 0.1, "--test", 0.2, "--output", tmp_path / "out")
    assert code == 0
    sides = {side: read(tmp_path / "out" / f"{side}.jsonl") for side in ("train", "valid", "test")}
    found = {side: {row["n"] for row in part} for side, part in sides.items()}
    assert [len(found[side]) for side in sides] == [28, 4, 8]
    assert [len(part) for part in sides.values()] == [112, 16, 32]
    assert found["train"] | found["valid"] | found["test"] == set(range(40))
    for part in sides.values():  # in the order of the file
        assert part == [row for row in rows if row["n"] in {r["n"] for r in part}]
    assert out.splitlines()[1] == f"{tmp_path / 'out'}/valid.jsonl: 16 rows of 4 problems"


def test_the_split_depends_on_seed_and_text_not_on_the_order_of_rows(run, tmp_path):
    def valid(rows: list[dict], name: str, seed: int = 0) -> set[int]:
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        assert run("split", path, "--seed", seed, "--valid", 0.25, "--output", tmp_path / name)[0] == 0
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["train.jsonl", "valid.jsonl"]
        return {row["n"] for row in read(tmp_path / name / "valid.jsonl")}

    rows = problems(40)
    first = valid(rows, "a")
    assert first == valid(rows[::-1], "b") == valid(problems(40, 1), "c")
    assert first != valid(rows, "d", seed=1)
    assert len(first & valid(problems(80), "e")) > len(first) / 2  # more rows: most stay where they were


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(run, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", problems(10))
    folder = tmp_path / "out"
    folder.mkdir()
    assert run("split", path, "--output", folder)[0] == 0  # an empty folder will do
    before = read(folder / "train.jsonl")
    for output in (folder, path):
        code, _, err = run("split", path, "--output", output, "--seed", 5)
        assert code == 2 and f"--output {output}: exists" in err
    assert read(folder / "train.jsonl") == before
    assert f"{path} is a file" in run("split", path, "--output", path / "below")[2]


def test_rows_that_ask_nothing_stop_the_split(run, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*problems(10), {"answer": "x"}, {"prompt": "  "}, 3])
    code, _, err = run("split", path, "--output", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()
    assert "3 of 33 rows cannot be used, so nothing was written" in err
    assert "line 31: keys found: 'answer'; what a row asks stands under one of problem, question, prompt" in err
    assert "line 32: 'prompt' holds nothing that is asked" in err
    code, out, _ = run("split", path, "--output", tmp_path / "out", "--skip-bad-rows")
    assert code == 0 and out.startswith("line 31: left out: ")
    assert sum(len(read(file)) for file in (tmp_path / "out").iterdir()) == 30


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--valid", "1"], "--valid must be a share from 0 to less than 1, got 1.0"),
        (["--valid", "0"], "--valid 0 --test 0: something must go there"),
        (["--valid", "0.5", "--test", "0.5"], "--valid 0.5 --test 0.5: something must go there, and not all of it"),
        (["--by", "row"], "--by: expected one of problem, got 'row'"),
        (["--valid", "0.9"], "2 different problems are too few to split"),
    ],
)
def test_wrong_calls_of_split(run, tmp_path, flags, message):
    path = write_jsonl(tmp_path / "rows.jsonl", problems(2))
    code, _, err = run("split", path, "--output", tmp_path / "out", *flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1


# Make. -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(run, tmp_path):
    """Flags -> the rows written, which are good groups without responses."""
    names = iter(range(1000))

    def call(*flags: object) -> list[dict]:
        path = tmp_path / f"made{next(names)}.jsonl"
        code, out, err = run("make", "--output", path, *flags)
        assert (code, err) == (0, "")
        assert validate(path, "groups")["good"] == len(read(path))
        assert out == f"{path}: {len(read(path))} rows of {flags[1]}\n"
        return read(path)

    return call


def test_sums_are_right_and_never_repeat(made):
    rows = made("--task", "sums", "-n", 400, "--config", "min=-5,max=9,operators=+-", "--ask", "none")
    assert len({problem_key(row) for row in rows}) == 400
    for row in rows:
        a, sign, b = re.fullmatch(r"What is (-?\d+) ([+-]) (-?\d+)\?", row["prompt"]).groups()  # type: ignore
        assert -5 <= int(a) <= 9 and -5 <= int(b) <= 9
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert row["task"] == "sums"
        assert row["entry"] == {
            "question": row["prompt"], "answer": row["answer"],
            "metadata": {"source_dataset": "sums", "a": int(a), "b": int(b), "operator": sign},
        }  # fmt: skip
    every = made("--task", "sums", "-n", 450, "--config", "min=-5,max=9,operators=+-")
    assert len({row["prompt"] for row in every}) == 15 * 15 * 2


def test_the_same_seed_makes_the_same_rows(made):
    rows = [made("--task", "sums", "-n", 50, "--seed", seed) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_where_the_answer_is_asked_for(made):
    suffix, system, none = (made("--task", "sums", "-n", 5, "--ask", ask) for ask in ("suffix", "system", "none"))
    assert "<answer> and </answer>" in INSTRUCTION
    for a, b, c in zip(suffix, system, none, strict=True):
        assert a["prompt"] == f"{c['prompt']}\n\n{INSTRUCTION}" and "system" not in a and "system" not in c
        assert (b["prompt"], b["system"]) == (c["prompt"], INSTRUCTION)
    assert made("--task", "sums", "-n", 5) == suffix


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "chain_sum"], "--task chain_sum: expected sums, or a task like reasoning_gym:chain_sum"),
        (["--task", "reasoning_gym:"], "expected sums, or a task like reasoning_gym:chain_sum"),
        (["--task", "sums", "--config", "lowest=1"], "--config lowest: sums has min, max, operators."),
        (["--task", "sums", "--config", "min=a"], "--config min=a: expected a whole number"),
        (["--task", "sums", "--config", "min"], "--config min: expected key=value"),
        (["--task", "sums", "--config", "operators=/"], "--config operators=/: expected some of + - *"),
        (["--task", "sums", "-n", "5", "--config", "min=1,max=2"], "there are 4 sums of 1 to 2"),
        (["--task", "sums", "-n", "1", "--config", "min=3,max=2"], "there are 0 sums of 3 to 2"),
        (["--task", "sums", "-n", "0"], "--rows must be at least 1, got 0"),
        ([], "needs --task"),
    ],
)
def test_wrong_calls_of_make(run, tmp_path, flags, message):
    code, _, err = run("make", "--output", tmp_path / "out.jsonl", *flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_without_the_library_the_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    code, _, err = run("make", "--task", "reasoning_gym:chain_sum", "--output", tmp_path / "out.jsonl")
    assert code == 2 and "pip install 'mlx-realign[verifiers]'" in err


def test_rows_of_reasoning_gym_are_judged_by_its_verifier(made, run, tmp_path):
    pytest.importorskip("reasoning_gym")
    from mlx_realign.verifiers import Pool

    config = "min_terms=2,max_terms=2,min_digits=1,max_digits=2"
    rows = made("--task", "reasoning_gym:chain_sum", "-n", 30, "--seed", 3, "--config", config)
    assert rows == made("--task", "reasoning_gym:chain_sum", "-n", 30, "--seed", 3, "--config", config)
    assert len({problem_key(row) for row in rows}) == 30
    assert all(row["prompt"].endswith(INSTRUCTION) and row["entry"]["question"] in row["prompt"] for row in rows)
    with Pool(["reasoning_gym"]) as pool:
        assert pool.check(enumerate(rows, 1)) == []
        right = pool.judge([f"<answer>{row['answer']}</answer>" for row in rows], rows)
        wrong = pool.judge([f"<answer>{int(row['answer']) + 1}</answer>" for row in rows], rows)
    assert {v[0].score for v in right} == {1.0} and {v[0].score for v in wrong} == {0.0}
    for flags, message in (
        (["--task", "reasoning_gym:chain_sums"], "reasoning_gym has no task 'chain_sums'. Did you mean chain_sum?"),
        (["--task", "reasoning_gym:chain_sum", "--config", "terms=2"], "--task reasoning_gym:chain_sum --config: "),
        (["--task", "reasoning_gym:chain_sum", "--config", "min_terms=9,max_terms=2"], "--config: "),
        (
            ["--task", "reasoning_gym:chain_sum", "-n", "500", "--config", config.replace("=2", "=1")],
            "different questi",
        ),
    ):
        code, _, err = run("make", *flags, "--output", tmp_path / "none.jsonl")
        assert code == 2 and message in err and len(err.splitlines()) == 1
