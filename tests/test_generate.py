# SPDX-License-Identifier: Apache-2.0
"""generate: what streams is what plain decoding gives, later turns reuse the cache exactly, flags do as they say."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign import cli, data, generate
from mlx_realign.policy import Policy


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy.load(str(tiny_model_dir))


def session(policy: Policy, **settings) -> generate.Session:
    return generate.Session(policy, generate.Settings(model="", max_new_tokens=12, **settings))


def tokens(talk: generate.Session, prompt: list[int]) -> list[int]:
    return [piece.token for piece in talk.stream(prompt)]


def greedy(policy: Policy, prompt: list[int], count: int) -> list[int]:
    """Argmax of the whole forward pass, one token at a time, no cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(np.array(policy.model(mx.array([ids]))[0, -1]))))
    return ids[len(prompt) :]


def test_temperature_0_is_the_argmax_of_the_plain_forward(policy):
    prompt = data.encode_prompt("Hello there", policy.tokenizer)
    got = tokens(session(policy), prompt)
    assert got == greedy(policy, prompt, len(got))
    assert len(got) == 12 or got[-1] in policy.tokenizer.eos_token_ids


@pytest.mark.parametrize("second", ["And more", "Hello again", ""])
def test_a_later_turn_with_the_cache_is_a_first_turn_without(policy, second):
    talk = session(policy)
    first = data.encode_prompt("Hello there", policy.tokenizer)
    said = tokens(talk, first)
    following = [*first, *said[:5], *data.encode_prompt(second, policy.tokenizer)]
    assert tokens(talk, following) == tokens(session(policy), following)
    assert tokens(talk, first) == said  # the same prompt again: at least its last token is fed


def test_sampling_is_repeatable_and_top_k_1_is_greedy(policy):
    prompt = data.encode_prompt("Hello there", policy.tokenizer)
    draws = []
    for _ in range(2):
        mx.random.seed(7)
        draws.append(tokens(session(policy, temperature=1.0), prompt))
    assert draws[0] == draws[1] != tokens(session(policy), prompt)
    assert tokens(session(policy, temperature=1.0, top_k=1), prompt) == tokens(session(policy), prompt)


def test_json_reports_one_object(tiny_model_dir, capsys):
    words = ["--model", str(tiny_model_dir), "--prompt", "Hello", "--max-new-tokens", "3", "--json"]
    assert cli.entry(["generate", *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    # one token per byte of text and one for each of <|im_start|>, <|im_end|>, <|im_start|>
    assert facts["prompt_tokens"] == len("user\nHello" + "\n" + "assistant\n") + 3
    assert facts["completion_tokens"] <= 3
    assert facts["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "x", "--top-p", "0"], "--top-p must be above 0 and at most 1, got 0.0."),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must be 0 or more"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--prompt", "x", "--system", "s", "--no-chat-template"], "--system is a chat message"),
        (["--prompt", "x", "--adapter", "/nowhere"], "/nowhere"),
        (["--prompt", "x", "--model", "/nowhere"], "/nowhere"),
        (["--prompt", "x", "--model", "no-one/nothing"], "no-one/nothing"),
    ],
)
def test_wrong_input_gets_one_message(tiny_model_dir, words, expected, capsys):
    assert cli.entry(["generate", "--model", str(tiny_model_dir), *words]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
