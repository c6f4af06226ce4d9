# SPDX-License-Identifier: Apache-2.0
"""`mlx-realign data validate` and `data show`, called as the console script calls them."""

import io
import json
import re
from pathlib import Path

import pytest
from data_tools import TEMPLATES, assistant, user, words_tokenizer, write_jsonl

from mlx_realign import cli
from mlx_realign.data.show import show, write
from mlx_realign.terminal import Console

PAIRS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    {"prompt": "a", "chosen": "", "rejected": "c"},
    {"prompt": "a b c d", "chosen": "b", "rejected": "c c", "metadata": {"gap_score": 0.05}},
]


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    with open(path, "a") as file:
        file.write('{"prompt": \n')
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with nothing but a tokenizer: validate and show need no weights."""
    tokenizer = words_tokenizer("chatml", wrapped=False)
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.entry(["data", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_validate_lists_every_bad_row_and_exits_2(capsys, pairs):
    code, out, _ = run(capsys, "validate", pairs, "--method", "dpo")
    lines = out.splitlines()
    assert code == 2
    assert lines[0] == "line 2: chosen and rejected are the same: the pair says nothing"
    assert lines[1] == "line 3: 'chosen' is empty"
    assert lines[2].startswith("line 5: invalid JSON: ")
    assert lines[3].startswith("line 4: warning: metadata.gap_score 0.05 is below 0.15")
    assert lines[4] == f"{pairs}: 5 rows, 3 bad, 1 warnings"
    assert lines[5].split() == ["characters", "p50", "p90", "p99", "max"]


def test_validate_of_a_good_file_exits_0(capsys, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    assert run(capsys, "validate", path, "--method", "sft")[0] == 0


def test_validate_counts_tokens_with_a_model(capsys, pairs, model):
    code, out, _ = run(capsys, "validate", pairs, "--method", "dpo", "--model", model, "--max-length", 12, "--json")
    found = json.loads(out)
    assert code == 2
    assert [row["line"] for row in found["bad"]] == [2, 3, 5]
    assert (found["rows"], found["good"]) == (5, 2)
    # 9 tokens of prompt and [b, end]; 15 and [c, space, c, end].
    assert found["lengths"]["unit"] == "tokens"
    assert found["lengths"]["prompt"] == {"p50": 15, "p90": 15, "p99": 15, "max": 15}
    assert found["lengths"]["completion"] == {"p50": 4, "p90": 4, "p99": 4, "max": 4}
    assert found["lengths"]["total"]["max"] == 19
    assert found["over_max_length"] == {"max_length": 12, "rows": 1, "share": 0.5, "completion_alone": 0}


def test_validate_says_what_training_would_do_with_long_rows(capsys, pairs, model):
    out = run(capsys, "validate", pairs, "--method", "dpo", "--model", model, "--max-length", 4)[1]
    assert "2 rows (100.0%) are longer than --max-length 4" in out
    assert "in 1 of them the completion alone does not fit" in out


def test_validate_reports_rows_the_template_refuses(capsys, tmp_path, model):
    tokenizer = words_tokenizer("strict", wrapped=False)
    tokenizer.save_pretrained(model)
    row = {"messages": [{"role": "tool", "content": "x"}, user("a"), assistant("b")]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert run(capsys, "validate", path, "--method", "sft")[0] == 0
    code, out, _ = run(capsys, "validate", path, "--method", "sft", "--model", model)
    assert code == 2
    assert "line 1: the chat template refuses these messages: no tools here" in out


def test_percentiles_are_those_of_the_lengths(capsys, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a" * n, "completion": "b"} for n in range(1, 101)])
    lengths = json.loads(run(capsys, "validate", path, "--method", "sft", "--json")[1])["lengths"]
    assert lengths["unit"] == "characters"
    assert lengths["prompt"] == {"p50": 51, "p90": 91, "p99": 100, "max": 100}
    assert lengths["total"]["max"] == 101


def test_show_prints_rows_with_trained_tokens_in_brackets(capsys, tmp_path, model):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}] * 3
    )
    code, out, _ = run(capsys, "show", path, "-n", 1, "--model", model)
    assert code == 0
    assert "9 + 14 tokens, 4 trained" in out
    assert "assistant\n⟦b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧" in out
    assert out.count("line ") == 1


def test_show_colours_trained_tokens_on_a_terminal(tmp_path, model):
    rows = show([PAIRS[0]], "pairs", words_tokenizer("chatml"), count=1, chat_template=True, split="train")
    console = Console(force_terminal=True, color_system="standard", width=60, record=True, file=io.StringIO())
    write(rows, console)
    html = console.export_html(inline_styles=True)
    spans = re.findall(r'<span style="([^"]*)">([^<]*)</span>', html)
    green = [text for style, text in spans if "color: #008000" in style and "font-weight: bold" in style]
    dim = [text for style, text in spans if "color: #7f7f7f" in style]
    assert green == ["trained", "b&lt;|im_end|&gt;", "c&lt;|im_end|&gt;"]
    assert dim == ["prompt", "&lt;|im_start|&gt;user", "a&lt;|im_end|&gt;", "&lt;|im_start|&gt;assistant"]
    assert "⟦" not in html


def test_show_as_json_has_tokens_masks_and_text(capsys, pairs, model):
    code, out, _ = run(capsys, "show", pairs, "--rows", 2, "--model", model, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["line"] for row in rows] == [1, 2]
    assert rows[0]["prompt"] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert [c["runs"] for c in rows[0]["completions"]] == [
        [{"text": "b<|im_end|>", "trained": True}],
        [{"text": "c<|im_end|>", "trained": True}],
    ]
    assert [c["mask"] for c in rows[0]["completions"]] == [[True, True]] * 2
    assert rows[1]["error"] == "chosen and rejected are the same: the pair says nothing"


def test_show_shows_every_example_of_a_row_whose_template_rewrites_turns(capsys, tmp_path, model):
    talk = [user("a"), assistant("<think>\n</think>b"), user("c"), assistant("d")]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}])
    (model / "chat_template.jinja").write_text(TEMPLATES["qwen3"])
    rows = [json.loads(line) for line in run(capsys, "show", path, "--model", model, "--json")[1].splitlines()]
    assert [[r["text"] for c in row["completions"] for r in c["runs"] if r["trained"]] for row in rows] == [
        ["<think>\n</think>b<|im_end|>"],
        ["d<|im_end|>"],
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["validate", "missing.jsonl", "--method", "sft"], "missing.jsonl: no such file or folder"),
        (["validate", "FILE"], "needs --method"),
        (["validate", "FILE", "--method", "dop"], "there is no such method; the methods are"),
        (
            ["validate", "FILE", "--method", "dpo", "--max-length", "5"],
            "--max-length counts tokens, so it needs --model",
        ),
        (["validate", "FILE", "--method", "dpo", "--model", "nowhere"], "--model nowhere"),
        (["validate", "FILE", "--methd", "dpo"], "unknown flag --methd. Did you mean --method?"),
        (["show", "FILE"], "needs --model"),
        (["show", "FILE", "-n", "many", "--model", "x"], "--rows: expected a whole number, got 'many'"),
        (["shwo", "FILE"], "data has no command 'shwo'. Did you mean show?"),
    ],
)
def test_wrong_calls_exit_2_with_one_message(capsys, pairs, argv, message):
    code, _, err = run(capsys, *(str(pairs) if word == "FILE" else word for word in argv))
    assert code == 2
    assert err.startswith("error: ") and message in err
    assert len(err.splitlines()) == 1


def test_help_names_both_verbs(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "validate|show|convert|difficulty|split|make" in out
    with pytest.raises(SystemExit) as done:
        run(capsys, "show", "--help")
    assert done.value.code == 0
