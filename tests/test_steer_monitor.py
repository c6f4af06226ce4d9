# SPDX-License-Identifier: Apache-2.0
"""steer monitor and steer screen: projections against states taken by hand, rows ranked by them."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from steer_tools import mood_rows, refused, run, states, talk_prompts, write

from mlx_realign import data, rollout, vectors
from mlx_realign.policy import Policy
from mlx_realign.steering import monitor
from mlx_realign.terminal import Console
from mlx_realign.vectors import About, Direction

BLOCK = 1


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load("tiny-chat")


def completion_mean(policy: Policy, prompt: str, completion: str, *, end: bool = False) -> np.ndarray:
    """float64 [d], with or without the token that ends the turn."""
    asked = data.encode_prompt(prompt, policy.tokenizer)
    said = policy.tokenizer.encode(completion, add_special_tokens=False)
    said += [policy.tokenizer.convert_tokens_to_ids("<|im_end|>")] if end else []
    return states(policy, [*asked, *said], BLOCK)[len(asked) :].mean(0)


@pytest.fixture(scope="module")
def folder(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mood.safetensors: mean states of grey replies minus those of bright ones; bare.safetensors without baselines."""
    folder = tmp_path_factory.mktemp("monitor")
    rows = mood_rows(12)
    grey, bright = (
        np.mean([completion_mean(policy, row["prompt"], row[name]) for row in rows], 0)
        for name in ("chosen", "rejected")
    )
    about = About(base_model="tiny-chat", base_hash=policy.base_hash, blocks=(BLOCK,))
    vectors.save(Direction({BLOCK: grey - bright}, about, {BLOCK: bright}), folder / "mood.safetensors")
    vectors.save(Direction({BLOCK: grey - bright}, about), folder / "bare.safetensors")
    return folder


def test_a_trace_is_the_projection_of_each_token(policy, folder, capsys):
    prompt, said = talk_prompts(1)[0], "The station is gloomy today, and I am sad."
    words = ("--direction", folder / "mood.safetensors", "--prompt", prompt, "--completion", said, "--json")
    facts = json.loads(run(capsys, "monitor", *words))
    asked = data.encode_prompt(prompt, policy.tokenizer)
    tokens = [*asked, *policy.tokenizer.encode(said, add_special_tokens=False)]
    direction = vectors.load(folder / "mood.safetensors")
    vector, zero = direction.vectors[BLOCK].astype(np.float64), direction.baseline[BLOCK].astype(np.float64)
    expected = (states(policy, tokens, BLOCK) - zero) @ vector / (vector @ vector)  # 0: negative mean, 1: positive mean
    found = np.array([token["projection"] for token in facts["tokens"]])
    assert np.allclose(found, expected, atol=1e-4)
    assert facts["completion_mean"] == pytest.approx(expected[len(asked) :].mean(), abs=1e-4)
    assert facts["last_prompt_token"] == pytest.approx(expected[len(asked) - 1], abs=1e-4)
    assert [token["part"] for token in facts["tokens"]].count("prompt") == len(asked)
    assert "".join(token["text"] for token in facts["tokens"][len(asked) :]) == said
    bare = json.loads(run(capsys, "monitor", "--direction", folder / "bare.safetensors", *words[2:]))
    plain = states(policy, tokens, BLOCK) @ vector / np.linalg.norm(vector)
    assert not bare["normalised"]
    assert np.allclose([token["projection"] for token in bare["tokens"]], plain, atol=1e-3)


def test_a_multiple_of_a_direction_has_the_same_scale(policy, folder):
    from mlx_realign.steering import monitor

    mood, state = vectors.load(folder / "mood.safetensors"), np.random.default_rng(0).normal(size=(3, 192))
    expected = monitor.scale_of(mood).of(state)
    for made in (2 * mood, -mood, mood / 4):
        np.testing.assert_allclose(monitor.scale_of(made).of(state), expected, rtol=1e-5)


def test_without_a_completion_the_model_answers(policy, folder, capsys):
    prompt = talk_prompts(1)[0]
    words = ("--direction", folder / "mood.safetensors", "--prompt", prompt)
    facts = json.loads(run(capsys, "monitor", *words, "--json", "--system", "Be grey."))
    talk = [{"role": "system", "content": "Be grey."}, {"role": "user", "content": prompt}]
    said = "".join(token["text"] for token in facts["tokens"] if token["part"] == "completion")
    assert said.removesuffix("<|im_end|>") == rollout.complete(policy, [talk], max_new_tokens=128)[0]
    out = run(capsys, "monitor", *words)
    assert prompt in out and "0 (blue) = negative mean, 1 (red) = positive mean" in out


def test_colours_go_from_blue_by_grey_to_red():
    found = {
        "tokens": [{"text": f"t{i}", "projection": value} for i, value in enumerate([-3.0, 0.0, 0.5, 1.0, 9.0])],
        "normalised": True,
        **{"block": 1, "prompt_mean": 0.0, "last_prompt_token": 0.0, "completion_mean": 0.0},
    }
    out = StringIO()
    monitor.show(found, Console(file=out, force_terminal=True, color_system="truecolor", width=200))
    backgrounds = [out.getvalue().split(f"mt{i}")[0].rpartition("48;2;")[2] for i in range(5)]
    cold, plain, warm = ("70;110;220", "235;235;235", "220;70;60")
    assert backgrounds == [cold, cold, plain, warm, warm]


def test_pieces_of_characters_that_need_several_tokens_come_with_the_last(policy):
    tokens = policy.tokenizer.encode("a \u00e9\u4e2d b", add_special_tokens=False)
    pieces = monitor.pieces_of(policy.tokenizer, tokens)
    assert "".join(pieces) == "a \u00e9\u4e2d b" and "" in pieces


def test_rows_are_ranked_by_what_their_completions_show(policy, folder, capsys, tmp_path):
    rows = mood_rows(3, seed=7)
    mixed = [
        {"prompt": rows[0]["prompt"], "completion": rows[0]["rejected"], "kept": 1},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": rows[1]["chosen"]}]},
        rows[2],
        {"prompt": "x", "responses": [{"text": rows[0]["chosen"], "score": 1}, {"text": "Fine.", "score": 0}]},
    ]
    source = write(tmp_path / "rows.jsonl", *mixed)
    words = (source, "--direction", folder / "mood.safetensors")
    told = run(capsys, "screen", *words, "--output", tmp_path / "a.jsonl")
    direction = vectors.load(folder / "mood.safetensors")
    vector, zero = direction.vectors[BLOCK].astype(np.float64), direction.baseline[BLOCK].astype(np.float64)
    expected = [
        (completion_mean(policy, prompt, said, end=True) - zero) @ vector / (vector @ vector)
        for prompt, said in [
            (rows[0]["prompt"], rows[0]["rejected"]),
            ("Hi", rows[1]["chosen"]),
            (rows[2]["prompt"], rows[2]["chosen"]),
            ("x", rows[0]["chosen"]),
        ]
    ]
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-4)
    assert [row["rank"] for row in found] == [1 + sum(e > one for e in expected) for one in expected]
    assert [row["line"] for row in found] == [1, 2, 3, 4] and found[0]["rank"] == 4
    assert {key: value for key, value in found[0].items() if key in mixed[0]} == mixed[0]
    assert len(found[2]["scores"]) == len(found[3]["scores"]) == 2 and "scores" not in found[0]
    assert found[2]["scores"][0] > found[2]["scores"][1]
    assert "lowest:" not in told and f"line {1}: " in told  # four rows are all at the top
    limit = sorted(expected)[1] + 1e-6
    facts = json.loads(run(capsys, "screen", *words, "--output", tmp_path / "b.jsonl", "--drop-above", limit, "--json"))
    assert (facts["rows"], facts["written"]) == (4, 2)
    kept = [json.loads(line)["line"] for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert kept == [i + 1 for i, one in enumerate(expected) if one <= limit]


def test_prompts_are_scored_by_their_last_token(policy, folder, capsys, tmp_path):
    prompts = talk_prompts(3)
    source = write(tmp_path / "p.jsonl", *({"prompt": prompt} for prompt in prompts))
    words = (source, "--direction", folder / "bare.safetensors", "--part", "prompt")
    run(capsys, "screen", *words, "--output", tmp_path / "a.jsonl")
    unit = vectors.load(folder / "bare.safetensors").unit(BLOCK)
    expected = [states(policy, data.encode_prompt(p, policy.tokenizer), BLOCK)[-1] @ unit for p in prompts]
    found = [json.loads(line)["score"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert found == pytest.approx(expected, abs=1e-3)
    told = refused(capsys, "screen", *words[:-2], "--output", tmp_path / "b.jsonl")
    assert "line 1: has no completion; --part prompt scores prompts" in told


def test_bad_rows_stop_it_or_are_left_out(folder, capsys, tmp_path):
    source = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"}, "{broken", {"nothing": 1})
    words = ("screen", source, "--direction", folder / "mood.safetensors", "--output", tmp_path / "o.jsonl")
    told = refused(capsys, *words)
    assert "2 of 3 rows cannot be used" in told and "line 2: invalid JSON" in told and not Path(words[-1]).exists()
    facts = json.loads(run(capsys, *words, "--skip-bad-rows", "--json"))
    assert (facts["rows"], facts["left_out"]) == (1, 2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("monitor", "--prompt", "x"), "needs --direction"),
        (("monitor", "--prompt", "x", "--direction", "none.safetensors"), "no such file"),
        (("monitor", "--prompt", " ", "--direction", "mood.safetensors"), "--prompt is empty"),
        (("monitor", "--prompt", "x", "--direction", "mood.safetensors", "--block", "3"), "has no block 3"),
        (("screen", "none.jsonl", "--direction", "mood.safetensors", "--output", "o"), "none.jsonl: no such file"),
        (("screen", "rows.jsonl", "--direction", "mood.safetensors", "--output", "rows.jsonl"), "exists already"),
        (("screen", "empty.jsonl", "--direction", "mood.safetensors", "--output", "o"), "the file is empty"),
        (("screen", "rows.jsonl", "--direction", "mood.safetensors"), "needs --output"),
    ],
)
def test_wrong_words_get_one_line(folder, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(folder)
    write(folder / "rows.jsonl", {"prompt": "a", "completion": "b"})
    write(folder / "empty.jsonl")
    told = refused(capsys, *words)
    assert expected in told and "\n" not in told
