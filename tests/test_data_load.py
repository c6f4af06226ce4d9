# SPDX-License-Identifier: Apache-2.0
"""From a file to a dataset: sources, bad rows, truncation, the cache on disk, and files larger than memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_tools import assistant, load_rows, picture, user, words_tokenizer, write_jsonl

from mlx_realign import data
from mlx_realign.config import TrainSettings
from mlx_realign.data.store import find
from mlx_realign.errors import UserError

ROWS = [{"prompt": "a", "completion": "b c"}, {"prompt": "a b", "completion": "d"}, {"prompt": "c", "completion": "e"}]
HEADER = "<|im_start|> user ⏎ a <|im_end|> ⏎ <|im_start|> assistant ⏎"  # 9 tokens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path, tokenizer=None, format="sft", split="train", **settings):
    tokenizer = tokenizer or words_tokenizer("chatml")
    return data.load(path, tokenizer, format=format, settings=TrainSettings(**settings), split=split)


def same(a, b) -> bool:
    arrays = lambda e: [e.prompt, *(x for c in e.completions for x in c)]  # noqa: E731
    return (a.line, a.key, a.extras) == (b.line, b.key, b.extras) and all(map(np.array_equal, arrays(a), arrays(b)))


# Sources. ----------------------------------------------------------------------------------------------------------


def test_a_file_a_folder_and_a_list_are_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    datasets = [load(tmp_path / "train.jsonl"), load(str(tmp_path)), load(ROWS)]
    for dataset in datasets:
        assert all(same(a, b) for a, b in zip(dataset, datasets[0], strict=True))
        assert dataset.report == datasets[0].report
    assert [e.line for e in datasets[0]] == [1, 2, 3]


def test_splits_of_a_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "validation.jsonl", ROWS[:1])
    assert len(load(folder, split="valid")) == 1
    assert [data.has_split(folder, s) for s in ("train", "valid", "test")] == [True, True, False]
    assert not data.has_split(folder / "train.jsonl", "valid")
    with pytest.raises(UserError, match=r"no test.jsonl in this folder \(found: train.jsonl, validation.jsonl\)"):
        load(folder, split="test")


def test_blank_lines_bom_and_a_missing_last_newline_do_no_harm(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n\n  \n" + json.dumps(ROWS[1]).encode())
    assert [e.line for e in load(path)] == [1, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ("", "the file is empty. sft data has rows {messages} or"),
        ("\n \n", "the file is empty"),
        ("[\n{}]", "this is a JSON array, not JSON lines. Convert it"),
        ('{"prompt": "a", "completion": "b"}\n' * 6 + '{"prompt": "a", "compl\n', "line 7: invalid JSON: "),
        (b'{"prompt": "\xff", "completion": "b"}', "line 1: not UTF-8 text"),
        ('{"prompt": "a", "completion": "b"}\n' + "[" * 100_000, "line 2: invalid JSON"),
        ('{"prompt": "a", "completion": ""}', "line 1: 'completion' is empty"),
        ('{"a": 1}', "line 1: keys found: 'a'; sft data has"),
    ],
)
def test_each_wrong_file_gets_one_clear_message(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_hub_dataset_that_cannot_be_had_is_one_line():
    with pytest.raises(UserError, match="nobody/nothing: no such file or folder, and no hub dataset of this name") as e:
        load("nobody/nothing")
    assert "\n" not in str(e.value)


def test_files_other_than_jsonl_are_read_through_datasets(tmp_path, cache):
    pytest.importorskip("datasets")
    from mlx_realign.data.hub import _through_datasets

    folder = tmp_path / "owner"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt,completion\na,b c\na b,d\nc,e\n")
    path = _through_datasets(str(folder), "", "train")
    assert path.is_relative_to(cache)
    assert [e.key for e in load(path)] == [e.key for e in load(ROWS)]
    with pytest.raises(UserError, match="split 'test' cannot be read"):
        _through_datasets(str(folder), "", "test")


def test_an_empty_list_and_an_unknown_format_are_refused():
    with pytest.raises(UserError, match="the list of rows is empty"):
        load([])
    with pytest.raises(UserError, match="no data format 'dpo'; there are sft, pairs, unpaired"):
        load(ROWS, format="dpo")


# Bad rows. ---------------------------------------------------------------------------------------------------------


def test_bad_rows_stop_the_load_and_the_first_twenty_are_listed(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, *[{"prompt": "a", "completion": 1}] * 25])
    with pytest.raises(UserError) as error:
        load(path)
    lines = str(error.value).split("\n")
    assert lines[0] == f"{path}: 25 of 28 rows cannot be used"
    assert lines[1] == "  line 4: 'completion' must be a string or a list of messages, found a number (1)"
    assert len([line for line in lines if line.startswith("  line ")]) == 20
    assert lines[21] == "  ... and 5 more (`mlx-realign data validate` lists all)"
    assert "--skip-bad-rows" in lines[22]


def test_bad_rows_are_left_out_when_asked_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "a"}, ROWS[1], "text"])
    dataset = load(path, skip_bad_rows=True)
    assert [e.line for e in dataset] == [1, 3]
    assert dataset.report["dropped"] == {"bad": 2}
    assert [line for line, _ in dataset.report["dropped_lines"]] == [2, 4]
    assert dataset.report["notes"] == ["2 bad rows were left out"]
    assert dataset.report["rows_read"] == 4
    with pytest.raises(UserError, match="no row is left"):
        load(write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a"}]), skip_bad_rows=True)


# Truncation. -------------------------------------------------------------------------------------------------------


def test_a_row_that_is_too_long_stops_the_load():
    with pytest.raises(UserError) as error:
        load_rows([*ROWS[:1], {"prompt": "a a a", "completion": "b"}], words_tokenizer("chatml"), max_length=13)
    message = str(error.value)
    assert "1 of 2 rows are longer than --max-length 13: line 2 (15 tokens)" in message
    assert "these need 15" in message
    assert "--truncate left" in message


def test_rows_that_are_too_long_are_dropped_when_asked():
    rows = [{"prompt": "a a a", "completion": "b"}, *ROWS[:1]]
    dataset = load_rows(rows, words_tokenizer("chatml"), max_length=13, truncate="drop")
    assert [e.line for e in dataset] == [2]
    assert dataset.report["dropped"] == {"too_long": 1}
    assert dataset.report["dropped_lines"] == [[1, "15 tokens"]]
    assert dataset.report["notes"] == ["1 rows longer than --max-length 13 were left out"]


@pytest.mark.parametrize(
    ("template", "row", "max_length", "expected", "cut"),
    [
        ("chatml", {"prompt": "a", "completion": "b c"}, 13, f"{HEADER} | *b *␣ *c *<|im_end|>", 0),
        ("chatml", {"prompt": "a", "completion": "b c"}, 7, "<|im_start|> assistant ⏎ | *b *␣ *c *<|im_end|>", 6),
        ("chatml", {"prompt": "a", "completion": "b c"}, 5, "⏎ | *b *␣ *c *<|im_end|>", 8),
        ("chatml", {"prompt": "a", "completion": "b c"}, 4, None, 0),  # one prompt token must be left
        # BOS stays in front.
        ("llama3", {"prompt": "a", "completion": "b"}, 6, "<s> <|/header|> ⏎ ⏎ | *b *<|eot|>", 9),
        ("llama3", {"prompt": "a", "completion": "b"}, 3, "⏎ | *b *<|eot|>", 12),
        # A conversation keeps its last turns, whole; an earlier one that still fits in part is context.
        ("chatml", {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, 15,
         "⏎ | *b *<|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ <|im_start|> assistant ⏎ *d *<|im_end|>", 8),
        ("chatml", {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, 14,
         "b <|im_end|> ⏎ <|im_start|> user ⏎ c <|im_end|> ⏎ <|im_start|> assistant ⏎ | *d *<|im_end|>", 9),
        ("chatml", {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, 3, "⏎ | *d *<|im_end|>", 20),
        # Text may be cut anywhere.
        ("chatml", {"text": "a b c d"}, 4, "c | *␣ *d *</s>", 4),
    ],
)  # fmt: skip
def test_left_cuts_the_start_and_keeps_completions_whole(template, row, max_length, expected, cut):
    tokenizer = words_tokenizer(template)
    if expected is None:
        with pytest.raises(UserError, match="no row is left"):
            load_rows([row], tokenizer, max_length=max_length, truncate="left")
        return
    dataset = load_rows([row], tokenizer, max_length=max_length, truncate="left")
    assert picture(tokenizer, dataset) == [expected]
    assert dataset.report["truncated_tokens"] == cut
    assert dataset.report["truncated_rows"] == (cut > 0)
    assert any("lost the start" in note for note in dataset.report["notes"]) == (cut > 0)


def test_left_counts_the_turns_a_long_conversation_loses():
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    report = load_rows([row], words_tokenizer("chatml"), max_length=14, truncate="left").report
    assert report["counts"]["turns_cut"] == 1


def test_left_keeps_both_completions_of_a_pair_whole_or_drops_the_pair():
    tokenizer = words_tokenizer("chatml")
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c d e f"},
        {"prompt": "a", "chosen": "b", "rejected": "c d e f g"},
    ]
    dataset = load_rows(rows, tokenizer, "pairs", max_length=9, truncate="left")
    assert picture(tokenizer, dataset) == ["⏎ | *b *<|im_end|>", "⏎ | *c *␣ *d *␣ *e *␣ *f *<|im_end|>"]
    assert dataset.report["dropped"] == {"too_long": 1}


# The cache. --------------------------------------------------------------------------------------------------------


def test_tokens_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first = load(path)
    monkeypatch.setattr("mlx_realign.data.pipeline._build", lambda *_: pytest.fail("was tokenised again"))
    second = load(path)
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_the_fingerprint_changes_with_what_changes_the_tokens_and_with_nothing_else(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    base = load(path).fingerprint
    other = write_jsonl(tmp_path / "other.jsonl", ROWS)
    assert load(other).fingerprint == base
    assert load(path, learning_rate=1.0, seed=5, batch_size=9).fingerprint == base
    changed = [
        load(write_jsonl(tmp_path / "more.jsonl", [*ROWS, ROWS[0]])).fingerprint,
        load(path, words_tokenizer("llama3")).fingerprint,
        load(path, words_tokenizer("chatml", add_bos=True)).fingerprint,
        load(path, max_length=100).fingerprint,
        load(path, truncate="left").fingerprint,
        load(path, chat_template=False).fingerprint,
    ]
    assert len({base, *changed}) == 1 + len(changed)


@pytest.mark.parametrize("name", ["tokens", "mask", "row_start", "key", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_built_anew(tmp_path, cache, name, damage):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    before = [e._replace(prompt=e.prompt.copy()) for e in load(path)]
    file = next(cache.glob(f"data/*/{name}"))
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    again = load(path)
    assert all(same(a, b) for a, b in zip(before, again, strict=True))
    assert find(again.fingerprint) is not None


def test_a_load_that_fails_leaves_nothing_behind(tmp_path, cache):
    with pytest.raises(UserError):
        load(write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "a"}]))
    assert list(cache.glob("data/*")) == [] and list(cache.glob("data/.*")) == []


def test_a_cache_folder_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write tokenised data to .*[Ss]et MLX_REALIGN_CACHE to another folder"):
        load(ROWS)


def test_a_dataset_is_indexed_like_a_list():
    dataset = load(ROWS)
    assert same(dataset[-1], dataset[2])
    assert same(dataset[int(np.int64(1))], dataset[1])
    with pytest.raises(IndexError):
        dataset[3]
    assert dataset.prompt_lengths.tolist() == [9, 11, 9]
    assert dataset.completion_lengths.tolist() == [4, 2, 2]
    assert dataset.num_completions.tolist() == [1, 1, 1]
    assert dataset.sizes.tolist() == [13, 13, 11]


# Size. -------------------------------------------------------------------------------------------------------------


def test_a_row_of_megabytes_passes_through(tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "a", "completion": ("x" * 999 + " ") * 3000}, ROWS[1]]
    )
    dataset = load(path, max_length=64, truncate="drop")
    assert [e.line for e in dataset] == [1, 3]
    assert dataset.report["dropped_lines"] == [[2, "6010 tokens"]]


STREAM = """
import mlx_realign, resource, sys
sys.path.insert(0, "tests")
from pathlib import Path
from data_tools import words_tokenizer
from mlx_realign import data
from mlx_realign.config import TrainSettings
tokenizer = words_tokenizer("chatml")
load = lambda n: data.load(Path(sys.argv[n]), tokenizer, format="sft", settings=TrainSettings())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(1)
before = peak()
dataset = load(2)
plan = data.plan(dataset, batch_size=8, seed=0, epoch=0)
data.collate([dataset[i] for i in plan[0]])
print(len(dataset), peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """10000 rows after 1000: one chunk at a time, so hardly more (all rows at once would take 30 MB and more)."""
    row = {"prompt": "a " * 40, "completion": "b " * 40}
    small = write_jsonl(tmp_path / "small.jsonl", [row] * 1000)
    large = write_jsonl(tmp_path / "large.jsonl", [row] * 10_000)
    root = Path(__file__).parent.parent
    out = subprocess.run(
        [sys.executable, "-c", STREAM, str(small), str(large)],
        capture_output=True, text=True, check=True, cwd=root, env={**os.environ},
    )  # fmt: skip
    rows, growth = map(int, out.stdout.split()[-2:])
    growth_mb = growth / (2**20 if sys.platform == "darwin" else 2**10)  # ru_maxrss: bytes on macOS, KiB on Linux
    assert rows == 10_000
    assert growth_mb < 12
