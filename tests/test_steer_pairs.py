# SPDX-License-Identifier: Apache-2.0
"""Contrast sets: what each kind of file gives, and one message with file and line for each that cannot be used."""

import json
from pathlib import Path

import pytest

from mlx_realign.ablation import scorers
from mlx_realign.errors import UserError
from mlx_realign.steering import pairs


def write(folder: Path, name: str, *rows: object) -> str:
    """A file of text lines or, for any other name, JSON lines."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_two_text_files_are_the_two_sets_blank_lines_left_out(tmp_path):
    found = pairs.read(write(tmp_path, "a.txt", "one", "", "  two "), write(tmp_path, "b.txt", "three"))
    assert (found.positive, found.negative, found.paired) == (["one", "two"], ["three"], False)


def test_messages_and_a_system_message_beside_a_prompt(tmp_path):
    talk = [{"role": "user", "content": "hi"}]
    ahead = write(tmp_path, "a.jsonl", {"prompt": talk}, {"prompt": "ho", "system": "Be kind."})
    found = pairs.read(ahead, write(tmp_path, "b.txt", "x"))
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "ho"}]
    assert found.positive == [talk, turns]


@pytest.mark.parametrize(
    ("labels", "chosen", "expected"),
    [
        (("harmless", "harmful"), None, "b"),
        (("harmful", "harmless"), None, "a"),
        ((True, False), None, "a"),
        ((0, 1), None, "b"),
        (("neutral", "harmful"), None, "b"),
        (("calm", "negative"), None, "a"),
        (("calm", "loud"), "Loud", "b"),
    ],
)
def test_labels_say_the_sides(tmp_path, labels, chosen, expected):
    rows = [{"prompt": name, "label": label} for name, label in zip("ab", labels, strict=True)]
    found = pairs.read(write(tmp_path, "a.jsonl", *rows), positive_label=chosen)
    assert found.positive == [expected]
    assert found.negative == [{"a": "b", "b": "a"}[expected]]


def test_rows_of_both_sides_are_pairs(tmp_path):
    two = pairs.read(write(tmp_path, "a.jsonl", {"positive": "p", "negative": "n"}, {"positive": "q", "negative": "m"}))
    assert (two.positive, two.negative, two.paired) == (["p", "q"], ["n", "m"], True)
    said = pairs.read(write(tmp_path, "b.jsonl", {"prompt": "p", "chosen": "yes", "rejected": "no"}))
    assert (said.positive, said.negative, said.paired) == (["p"], ["p"], True)
    assert (said.positive_completions, said.negative_completions) == (["yes"], ["no"])


def test_repeats_within_a_set_are_left_out_and_counted():
    found = pairs.read(
        ["a", "b", "a", "a"], [[{"role": "user", "content": "x"}], "x", [{"content": "x", "role": "user"}]]
    )
    assert (found.positive, found.negative) == (["a", "b"], [[{"role": "user", "content": "x"}], "x"])
    assert found.notes == [
        "2 of 4 positive prompts were repeats, and are left out",
        "1 of 3 negative prompts were repeats, and are left out",
    ]
    assert found.hash == pairs.read(["a", "b"], found.negative).hash and pairs.read(["a"], ["b"]).notes == []


def test_of_pairs_only_the_same_pair_is_a_repeat(tmp_path):
    rows = [{"positive": p, "negative": n} for p, n in ("an", "am", "an", "bn")]
    found = pairs.read(write(tmp_path, "a.jsonl", *rows))
    assert (found.positive, found.negative, found.paired) == (["a", "a", "b"], ["n", "m", "n"], True)
    assert found.notes == ["1 of 4 pairs were repeats, and are left out"]
    lines = pairs.read([*"aaab"], [*"nmnn"], paired=True)
    assert (lines.positive, lines.negative, lines.notes) == (found.positive, found.negative, found.notes)
    rows = [{"prompt": "p", "chosen": c, "rejected": r} for c, r in ("yn", "zn", "yn")]
    said = pairs.read(write(tmp_path, "b.jsonl", *rows))
    assert (said.positive_completions, said.negative_completions) == (["y", "z"], ["n", "n"])


def test_the_hash_is_of_the_content_and_its_sides(tmp_path):
    one, two = write(tmp_path, "a.txt", "x", "y"), write(tmp_path, "b.txt", "z")
    again = pairs.read(write(tmp_path, "c.jsonl", {"prompt": "x"}, {"prompt": "y"}), ["z"])
    assert pairs.read(one, two).hash == again.hash
    others = [pairs.read(two, one), pairs.read(["x"], ["y", "z"]), pairs.read(["y", "x"], ["z"])]
    assert len({again.hash, *(other.hash for other in others)}) == 4


def test_prompts_of_one_file(tmp_path):
    assert pairs.prompts_of(write(tmp_path, "a.txt", "x", "y")) == ["x", "y"]
    assert pairs.prompts_of(write(tmp_path, "a.jsonl", {"prompt": "x", "label": "loud"})) == ["x"]


@pytest.mark.parametrize(
    ("ahead", "behind", "expected"),
    [
        ([{"prompt": "a"}, "{broken"], ["b"], "a.jsonl:2: invalid JSON"),
        ([{"prompt": "a"}, {"text": "b"}], ["b"], "a.jsonl:2: has no 'prompt'"),
        ([{"prompt": ""}], ["b"], "a.jsonl:1: 'prompt' is empty"),
        ([{"prompt": 3}], ["b"], "a.jsonl:1: 'prompt' must be a string"),
        ([1], ["b"], "a.jsonl:1: a row must be a JSON object"),
        ([{"prompt": "a"}], ["", " "], "b.txt: holds no prompt"),
        ([], ["b"], "a.jsonl: holds no prompt"),
        ([{"prompt": "a"}], ["c", "a"], "b.txt:2: stands in the positive set as well"),
        ([{"prompt": "a"}], None, "a.jsonl:1: says neither its label nor both sides: --negative"),
        ([{"prompt": "a", "label": "x"}], None, "expected rows of two labels, found 1: 'x'"),
        ([{"prompt": c, "label": c} for c in "abc"], None, "expected rows of two labels, found 3"),
        ([{"prompt": c, "label": c} for c in "ab"], None, "say which is the positive one with --positive-label"),
        ([{"prompt": c, "label": c} for c in "ab"], ["c"], "give such a file alone"),
        ([{"positive": "a", "negative": "b"}], ["c"], "a.jsonl:1: the row has both sides"),
        ([{"positive": "a", "negative": ""}], None, "a.jsonl:1: 'negative' is empty"),
        ([{"positive": "a", "negative": "a"}], None, "a.jsonl:1: stands in the positive set as well"),
        ([{"prompt": "a", "chosen": "x", "rejected": "x"}], None, "stands in the positive set as well"),
        ([{"prompt": "a", "chosen": "x", "rejected": "y"}, {"positive": "b", "negative": "c"}], None, "a.jsonl:2: has"),
        ([{"prompt": "a", "label": {}}], None, "a.jsonl:1: 'label' must be"),
    ],
)
def test_what_cannot_be_used_is_one_message_with_file_and_line(tmp_path, ahead, behind, expected):
    other = None if behind is None else write(tmp_path, "b.txt", *behind)
    with pytest.raises(UserError) as error:
        pairs.read(write(tmp_path, "a.jsonl", *ahead), other)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_folders_bytes_and_flags_that_do_not_go_together(tmp_path):
    good = write(tmp_path, "a.txt", "x")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    for asked, expected in [
        ((str(tmp_path / "none.txt"), good), "--positive"),
        ((good, str(tmp_path)), "is a folder"),
        ((good, str(tmp_path / "b.txt")), "not UTF-8"),
    ]:
        with pytest.raises(UserError, match=expected):
            pairs.read(*asked)
    with pytest.raises(UserError, match="drop --negative"):
        pairs.read(good, good, positive_label="x")
    labelled = write(tmp_path, "c.jsonl", *({"prompt": c, "label": c * 3} for c in "ab"))
    with pytest.raises(UserError, match="Did you mean aaa"):
        pairs.read(labelled, positive_label="aab")


def test_lines_of_text_files_end_at_newlines_alone(tmp_path):
    lines = ["a\u2028b", "c\x85d\x0b\x0c\x1ce", "f"]
    path = tmp_path / "prompts.txt"
    path.write_bytes("\r\n".join(lines).encode())
    assert [row["prompt"] for _, row in pairs._rows(path, "--positive")] == lines
    assert [row["text"] for row in scorers._rows(str(path), ["text"])] == lines
