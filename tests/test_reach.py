# SPDX-License-Identifier: Apache-2.0
"""Tokens and positions that a model has no row for are refused wherever ids enter, before MLX reads foreign memory."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCAB_SIZE
from policy_tools import make_model, make_policy, speaking
from train_tools import launch, write_rows

from mlx_realign import capture, cli, data, rollout
from mlx_realign.batch import Completion, Example
from mlx_realign.config import TrainSettings
from mlx_realign.data.formats import parse
from mlx_realign.data.messages import RowError
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.reach import Reach, of_config
from mlx_realign.sampling import Sampling

BEYOND = f"outside of the model's embedding, which has {VOCAB_SIZE} rows"
GPT2 = {"n_ctx": 32, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 32, "layer_norm_epsilon": 1e-5}


@pytest.fixture(scope="module")
def gpt2() -> Policy:
    """A model with a table of 32 positions."""
    return make_policy(make_model("gpt2", **GPT2, num_key_value_heads=None), rank=0)


@pytest.fixture(scope="module")
def grown(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a token more than its embedding has rows."""
    folder = tmp_path_factory.mktemp("grown") / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    more = tokenizer["added_tokens"][-1] | {"id": VOCAB_SIZE, "content": "<|new|>"}
    tokenizer["added_tokens"].append(more)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def batch_of(*rows: tuple[list[int], list[int]]) -> Any:
    made = [(np.array(p, np.int32), np.array(c, np.int32)) for p, c in rows]
    return data.collate([Example(p, (Completion(c, np.ones(len(c), bool)),), 0, "", {}) for p, c in made])


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "mamba2", "lfm2", "llama4_text", "gemma4_text"])
def test_the_rows_of_an_embedding_are_found_on_any_model(arch: str):
    assert make_policy(arch, rank=0).reach.ids == VOCAB_SIZE


def test_a_table_of_positions_is_found_and_ends_at_its_last_row(gpt2: Policy):
    assert gpt2.reach == Reach(VOCAB_SIZE, 32, None)
    table: Any = gpt2.model["model"].wpe
    assert mx.array_equal(table(mx.array([31, 32, 10**6, -1])), table.weight[mx.array([31, 31, 31, 0])])
    assert of_config({"max_position_embeddings": 64, "text_config": {"vocab_size": 7}}) == Reach(7, None, 64)
    assert of_config({"vocab_size": 50280, "embedding_size": 50304}).ids == 50304  # OLMo pads its table
    assert of_config({"vocab_size": 30000, "embedding_size": 128}).ids == 30000  # elsewhere it is a width


@pytest.mark.parametrize("token", [VOCAB_SIZE, 10**6, 2**31, -1])
def test_every_entrance_of_the_library_refuses_a_token_without_a_row(monkeypatch: pytest.MonkeyPatch, token: int):
    policy = speaking(monkeypatch, "llama", rank=0)
    policy.tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: ["<|new|>"])  # pyright: ignore
    text = " ('<|new|>')" if token > 0 else ""
    told = f"token {token}{text} is {BEYOND}"
    with pytest.raises(UserError) as caught:
        rollout.rollout(policy, [[1], [2, token]], Sampling(max_new_tokens=2))
    assert str(caught.value).startswith(f"prompt 2: {told}")
    with pytest.raises(UserError) as caught:
        capture.collect(policy, [[1, token]])
    assert str(caught.value).startswith(f"text 1: {told}")
    with pytest.raises(UserError, match="text 2: "):
        capture.completion_means(policy, [[1], [1]], [[2], [token]])
    if token < 2**31:
        for batch in (batch_of(([1, token], [2])), batch_of(([1], [2]), ([1, 2], [3, token]))):
            for use in (policy.totals, policy.token_logps, lambda b: policy.gradients(b, lambda *_: None)):  # type: ignore
                with pytest.raises(UserError) as caught:
                    use(batch)
                assert str(caught.value).startswith(f"batch: {told}")


def test_a_text_longer_than_the_table_of_positions_is_refused(monkeypatch: pytest.MonkeyPatch, gpt2: Policy):
    with pytest.raises(UserError, match="prompt 1: 30 tokens and 3 new ones are 33 tokens, and the model's table of"):
        rollout.rollout(gpt2, [[1] * 30], Sampling(max_new_tokens=3))
    with pytest.raises(UserError, match="text 1: 33 tokens, and the model's table of positions has 32 rows"):
        capture.collect(gpt2, [[1] * 33])
    assert capture.collect(gpt2, [[1] * 32]).shape[0] == 1


def test_rows_are_named_by_their_lines_wherever_a_file_is_read(grown: Path, tmp_path: Path, capsys: Any):
    rows = [{"prompt": "Hi", "completion": "a"}, {"prompt": "Hi", "completion": "<|new|>"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    told = f"line 2: token {VOCAB_SIZE} ('<|new|>') is {BEYOND}"
    with pytest.raises(UserError, match="1 of 2 rows cannot be used") as caught:
        launch(tmp_path / "out", grown, file, method="sft")
    assert told in str(caught.value) and not (tmp_path / "out" / "metrics.jsonl").exists()
    run = launch(tmp_path / "out", grown, file, "--skip-bad-rows", "--steps", 1, method="sft")
    assert run.code == 0 and len(run.steps) == 1
    capsys.readouterr()
    assert cli.entry(["data", "validate", str(file), "--method", "sft", "--model", str(grown)]) == 2
    assert told in capsys.readouterr().out
    assert cli.entry(["generate", "--model", str(grown), "--prompt", "Hi <|new|>"]) == 2
    assert f"prompt 1: token {VOCAB_SIZE} ('<|new|>') is {BEYOND}" in capsys.readouterr().err


def test_a_text_longer_than_the_model_was_made_for_is_one_note(grown: Path, tmp_path: Path, monkeypatch: Any):
    policy = Policy.load(str(grown))
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path))
    settings = TrainSettings(model="x", data="rows")
    rows = [{"prompt": "a" * 40, "completion": "b"}] * 3
    for stated, count in ((20, 1), (400, 0)):
        found = data.load(rows, policy.tokenizer, format="sft", settings=settings, reach=Reach(None, None, stated))
        notes = [note for note in found.report["notes"] if "max_position_embeddings" in note]
        assert len(notes) == count == sum(f"made for {stated}" in note for note in notes)


def test_a_message_does_not_quote_millions_of_characters():
    error = UserError(f"a.json: {'k' * 5_000_000}: not known. Leave it out.\n{'short'}")
    assert len(str(error)) < 1100 and str(error).endswith("Leave it out.\nshort") and "4999" in str(error)
    with pytest.raises(RowError) as caught:
        parse({"k" * 5_000_000: 1}, "sft")
    assert 50 < len(str(caught.value)) < 1100
