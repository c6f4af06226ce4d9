# SPDX-License-Identifier: Apache-2.0
"""Files that are no file of rows, or do not stay one, and texts that no tokenizer takes: one message, at once."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from data_tools import assistant, load_rows, user, words_tokenizer

from mlx_realign import UserError, data
from mlx_realign.config import TrainSettings
from mlx_realign.data import pipeline, source
from mlx_realign.data.difficulty import DifficultySettings, difficulty
from mlx_realign.data.formats import parse
from mlx_realign.data.messages import RowError
from mlx_realign.data.split import SplitSettings, split

ROW = {"prompt": "a", "completion": "b"}
BAD = "b\ud800"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, BAD]}}}
# (format, row, the field that must be named)
HALVES: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {**ROW, "prompt": BAD}, "'prompt'"),
    ("sft", {**ROW, "system": BAD}, "'system'"),
    ("sft", {"instruction": "a", "input": BAD, "output": "b"}, "'input'"),
    ("sft", {"text": BAD}, "'text'"),
    ("sft", {**ROW, "tools": [{"type": "function", "function": {"name": BAD}}]}, r"'tools\[0\].function.name'"),
    ("sft", {**ROW, "chat_template_kwargs": {"thinking": BAD}}, "'chat_template_kwargs.thinking'"),
    ("sft", {**ROW, "chat_template_kwargs": {BAD: 1}}, "'a key of chat_template_kwargs'"),
    ("sft", {"messages": [user("a"), {**assistant("b"), "name": BAD}]}, r"'messages\[1\].name'"),
    ("sft", {"messages": [user("a"), {**assistant("b"), "reasoning_content": BAD}]}, "reasoning_content'"),
    ("sft", {"messages": [user("a"), {**assistant("b"), "tool_calls": [CALL]}]}, r"arguments.x\[1\]'"),
    ("sft", {"messages": [user([{"type": "text", "text": BAD}]), assistant("b")]}, r"content\[0\].text'"),  # type: ignore
    ("sft", {"conversations": [{"from": "human", "value": BAD}, {"from": "gpt", "value": "b"}]}, r"\[0\].value'"),
    ("pairs", {"prompt": "a", "chosen": "b", "rejected": ["c", BAD]}, r"'rejected\[1\]'"),
    ("unpaired", {**ROW, "label": True, "completion": BAD}, "'completion'"),
    ("groups", {"problem": BAD, "solution": "b"}, "'problem'"),
    ("groups", {"prompt": "a", "responses": [{"text": BAD, "score": 1}, {"text": "b", "score": 0}]}, r"\[0\].text'"),
]


@pytest.mark.parametrize("format, row, field", HALVES)
@pytest.mark.parametrize("template", ["chatml", None])
def test_half_a_character_is_named_with_file_line_and_field(format, row, field, template, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(UserError, match=rf"rows.jsonl: 1 of 1 .*\n  line 2: .*{field} holds \\ud800, half of a char"):
        load_rows(path, words_tokenizer(template), format)  # type: ignore[arg-type]


def test_a_prompt_and_a_template_with_half_a_character_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path))
    tokenizer = words_tokenizer("chatml")
    for prompt, field in ((BAD, "prompt"), ([user(BAD)], r"prompt\[0\].content")):
        with pytest.raises(UserError, match=rf"'{field}' holds \\ud800"):
            data.encode_prompt(prompt, tokenizer)
    tokenizer._tokenizer.chat_template = r"{{ '\ud800' if messages[0].content == 'g' }}" + tokenizer.chat_template
    with pytest.raises(UserError, match=r"line 1: 'text of the chat template' holds \\ud800"):
        load_rows([{**ROW, "prompt": "g"}], tokenizer)


def test_what_is_quoted_of_a_row_is_cut_and_depth_has_an_end():
    for row in ({**ROW, "messages": [{"role": "x" * 5_000_000}]}, {"p" * 5_000_000: 1}):
        with pytest.raises(RowError) as error:
            parse({k: v for k, v in row.items() if k != "prompt"}, "sft")
        assert len(str(error.value)) < 1100
    deep: Any = "a"
    for _ in range(900):
        deep = [deep]
    with pytest.raises(RowError, match="'tools.*' is nested more than 100 deep"):
        parse({**ROW, "tools": deep}, "sft")


def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "split").mkdir()
    os.mkfifo(tmp_path / "split" / "train.jsonl")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "round").mkdir()
    (tmp_path / "round" / "round").symlink_to("..")
    began = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        server.bind("socket")
        for name, reason in {
            "pipe.jsonl": "is a pipe, and rows are read more than once: write them into a file first",
            "split": "is a pipe",
            "/dev/zero": "is a device",
            "socket": "is a socket",
            "loop": "cannot be read: ",
            "round/round/round": "no train.jsonl in this folder",
            "x" * 5000: "cannot be read: ",
            "a\0b": "no such file or folder",
            "~nobody-of-this-name/rows.jsonl": "no such file or folder",
        }.items():
            with pytest.raises(UserError, match=reason):
                source.resolve(name)
    assert time.perf_counter() - began < 2


def test_a_line_without_end_is_refused_before_it_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "LINE", 1 << 16)
    path = tmp_path / "rows.jsonl"
    for start in (b'{"text": "a"}\n{"text": "', b"\0"):
        path.write_bytes(start)
        os.truncate(path, 1 << 36)  # 64 GiB of zeros that take no room
        with pytest.raises(UserError, match=rf"line {start.count(10) + 1}: longer than 0 MiB. This is no file of JSON"):
            list(source.read(path))
    path.write_bytes(b"[" + b" " * (1 << 20))
    with pytest.raises(UserError, match="this is a JSON array"):
        list(source.read(path))
    path.write_bytes(b'{"text": "' + b"a" * ((1 << 16) - 13) + b'"}\n{"text": "b"}')
    assert [line for line, _ in source.read(path)] == [1, 2]


@pytest.mark.parametrize("how", ["longer", "other bytes", "another file"])
def test_a_file_that_changes_while_it_is_read_is_told(how, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "_CHUNK_ROWS", 10)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "answer": str(i), "completion": "b"} for i in range(2_000)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)

    def change(_: int) -> None:
        if how == "longer":
            with path.open("a") as file:
                file.write(json.dumps(ROW) + "\n")
        elif how == "other bytes":
            with path.open("r+b") as file:
                file.seek(len(text) - 30)
                file.write(b" " * 5)
        else:
            path.with_suffix(".new").write_text(text[:-1000])
            os.replace(path.with_suffix(".new"), path)

    load = lambda progress: data.load(  # noqa: E731
        path, words_tokenizer("chatml"), format="sft", settings=TrainSettings(), progress=progress
    )
    if how == "another file":  # the one that was opened is whole: its rows are those that were asked for
        assert len(load(change)) == 2_000
    else:
        with pytest.raises(UserError, match="rows.jsonl: was changed while it was read. Start again once nothing"):
            load(change)
        assert not list((tmp_path / "cache").rglob("meta.json"))


def test_commands_that_read_twice_see_the_same_file_or_say_so(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"problem": f"p{i}", "solution": "s", "responses": [{"text": x, "correct": x == "s"} for x in "st"]}
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, calls = source.read, []

    def reading(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            with Path(path).open("a") as file:
                file.write(json.dumps(rows[0]) + "\n")
        return read(*args)

    monkeypatch.setattr(source, "read", reading)
    with pytest.raises(UserError, match="was changed while it was read"):
        split(SplitSettings(str(path), output=str(tmp_path / "out")))
    calls.clear()
    with pytest.raises(UserError, match="was changed while it was read"):
        difficulty(DifficultySettings(str(path), output=str(tmp_path / "out.jsonl")))
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_empty_file_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path))
    for text in ("", "\n\n", "\ufeff"):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(UserError, match="rows.jsonl: the file is empty"):
            load_rows(tmp_path / "rows.jsonl", words_tokenizer("chatml"))  # type: ignore[arg-type]
