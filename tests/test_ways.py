# SPDX-License-Identifier: Apache-2.0
"""Whatever caches a model has, its rollouts, steered ones and chats are those of plain passes over whole rows."""

from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import VOCAB_SIZE
from policy_tools import Numbers, make_model, make_policy
from test_rollout import TOKENS

from mlx_realign import data, generate, rollout, taps, ways
from mlx_realign.batch import Completion, Example
from mlx_realign.policy import Policy
from mlx_realign.sampling import Sampling
from mlx_realign.steering import Steer, steer
from mlx_realign.vectors import Direction

EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TEXT = {
    **{"model_type": "llama4_text", "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "use_qk_norm": True},
    **{"vocab_size": VOCAB_SIZE, "max_position_embeddings": 512, "rope_theta": 10000.0, "attention_bias": False},
    **{"attention_chunk_size": 8, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64, "num_local_experts": 4},
    **{"num_experts_per_tok": 1, "rope_scaling": None, "attn_temperature_tuning": True, "floor_scale": 16},
    **{"attn_scale": 0.1},
}
ATTENTION = {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False}
NONE, LINEAR = ({"no_op": i == 0, "replace_with_linear": i == 1} for i in range(2))
FEED_FORWARD = {"ffn_mult": 1.3125, "no_op": False, "replace_with_linear": False}
# Each with the way it is expected to generate.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("grouped", {}),
    "jamba": (  # a state space whose convolution would see padding
        "together",
        {
            **{"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
            **{"mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2, "num_experts": 4, "num_experts_per_tok": 2},
        },
    ),
    "rwkv7": (  # no attention at all
        "together",
        {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8, "norm_eps": 1e-5},
    ),
    "llama4": ("together", {"text_config": TEXT, "num_hidden_layers": 4}),  # a cache of chunks
    "nemotron-nas": (  # layers without attention: one has no cache, one a cache that stays empty
        "together",
        {
            **{"attention_bias": False, "mlp_bias": False, "num_hidden_layers": 3},
            "block_configs": [{"attention": kind, "ffn": FEED_FORWARD} for kind in (ATTENTION, NONE, LINEAR)],
        },
    ),
    "deepseek_v3": (  # latent attention: half of the scores come as a mask
        "copied",
        {
            **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16},
            **{"num_key_value_heads": 4, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "n_group": 2},
            **{"topk_group": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "attention_bias": False},
            **{"rope_scaling": None, **EXPERTS},
        },
    ),
}


@pytest.fixture(params=[kind for kind in KINDS if kind != "llama"])
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Policy:
    return policy_of(request.param, monkeypatch)


def policy_of(kind: str, monkeypatch: pytest.MonkeyPatch) -> Policy:
    found = make_policy(make_model(kind, **KINDS[kind][1]), rank=0)
    found.tokenizer = Numbers()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(data, "stop_ids", lambda _: {0})
    return found


def plain(model: nn.Module, prompt: list[int], tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 [L, V]: log-probs of what follows, the row alone, no cache."""
    logits = np.array(model(mx.array([[*prompt, *tokens.tolist()]]))[0, len(prompt) - 1 : -1], np.float64) / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check(policy: Policy, groups: list[list[rollout.Generated]], temperature: float = 1.0) -> None:
    """Log-probs are those of plain passes, to 1e-4."""
    for prompt, group in zip(TOKENS, groups, strict=True):
        for one in group:
            expected = plain(policy.model, prompt, one.tokens, temperature)[np.arange(len(one.tokens)), one.tokens]
            np.testing.assert_allclose(one.logps, expected, atol=1e-4)


def test_rollouts_have_the_log_probs_of_plain_passes(policy):
    """Prompts of 1 to 11 tokens, more of them than a batch holds, and greedy ones take the likeliest token."""
    asked = Sampling(max_new_tokens=10, temperature=1.3)
    check(policy, rollout.rollout(policy, TOKENS, asked, group_size=3, seed=4, rows=7), 1.3)
    kind = policy.config["model_type"]
    way, note = ways.check(policy)
    assert way == KINDS[kind][0]
    assert note is None or note in policy.notes
    greedy = rollout.rollout(policy, TOKENS, Sampling(max_new_tokens=6, temperature=0))
    for prompt, (one,) in zip(TOKENS, greedy, strict=True):
        logps = plain(policy.model, prompt, one.tokens)
        assert (logps.max(-1) - logps[np.arange(len(one.tokens)), one.tokens]).max() < 1e-4


def test_scores_of_a_policy_that_was_only_loaded_are_those_of_plain_passes(policy):
    """Without the checks of a training run: what shares no prompts computes its rows alone."""
    tokens = np.array([8, 30, 4, 61], np.int32)
    alike = (Completion(tokens, np.ones(4, bool)), Completion(tokens[:2], np.ones(2, bool)))
    batch = data.collate([Example(np.array(p, np.int32), alike, 0, str(i), {}) for i, p in enumerate(TOKENS)])
    found = np.array(policy.scores(batch).logps)
    for row, prompt in zip(found[::2], TOKENS, strict=True):
        np.testing.assert_allclose(row, plain(policy.model, prompt, tokens)[np.arange(4), tokens], atol=1e-4)


def test_what_is_steered_begins_behind_each_prompt(policy):
    """Against a vector added by hand at the columns of a whole row that come after its prompt."""
    vector = (0.3 * np.random.default_rng(1).normal(size=64)).astype(np.float32)
    greedy, path = Sampling(max_new_tokens=6, temperature=0), taps.blocks(policy.model)[0]
    base = rollout.rollout(policy, TOKENS, greedy, group_size=2, rows=5)
    with steer(policy, Steer(Direction({0: vector}), positions="generated")):
        groups = rollout.rollout(policy, TOKENS, greedy, group_size=2, rows=5)
    moved = 0
    for prompt, group, (was, _) in zip(TOKENS, groups, base, strict=True):
        behind = lambda h, _, p=prompt: h + mx.where(mx.arange(h.shape[1])[:, None] >= len(p), mx.array(vector), 0)  # noqa: E731
        handle = taps.put(policy.model, path, behind)
        for one in group:
            expected = plain(policy.model, prompt, one.tokens)[np.arange(len(one.tokens)), one.tokens]
            np.testing.assert_allclose(one.logps, expected, atol=1e-4)
            assert one.tokens[0] == was.tokens[0]
            moved += bool(np.abs(one.logps[1:3] - was.logps[1:3]).max() > 1e-3)
        handle.remove()
    assert moved > 4


@pytest.mark.parametrize(
    ("kind", "broken"), [*(("llama", way) for way in (*ways.SHARED, *ways.OWN)), *(("jamba", way) for way in ways.OWN)]
)
def test_a_way_that_is_wrong_is_not_taken(kind, broken, monkeypatch):
    """Each way up to `broken` sees a little of something else: the next one is taken, and gives what is right."""
    policy = policy_of(kind, monkeypatch)
    ladder = [*ways.SHARED, *ways.OWN] if policy.sharing else [*ways.OWN]
    made, wrong = ways.decoder, ladder[: ladder.index(broken) + 1]

    def decoder(policy: Policy, way: str, sampling: Sampling) -> Any:
        found = made(policy, way, sampling)
        if way in wrong:
            factor = mx.array(np.random.default_rng(0).normal(1, 0.1, 64))
            found.policy = copy(policy)
            found.policy.body = copy(policy.body)
            found.policy.body.hidden = lambda *a: policy.body.hidden(*a) * factor  # pyright: ignore
        return found

    monkeypatch.setattr(ways, "decoder", decoder)
    way, note = ways.check(policy)
    assert way == [*ladder, "whole"][len(wrong)]
    assert note and "log-probs differ by" in note
    assert policy.groups_rows == (False if policy.sharing and not policy.stateful else None)
    asked = Sampling(max_new_tokens=8, repetition_penalty=1.2)
    check(policy, rollout.rollout(policy, TOKENS, asked, group_size=2, seed=1, rows=3))


def test_a_closed_policy_copies_prompts_and_says_why(monkeypatch):
    policy = policy_of("llama", monkeypatch)
    assert ways.check(policy) == ("grouped", None)
    policy.close()
    reason = "a prompt's keys and values are copied to each of its rollouts: the policy is closed, and mlx-lm's own"
    check(policy, rollout.rollout(policy, TOKENS, Sampling(max_new_tokens=8), group_size=2, seed=1))
    assert [note for note in policy.notes if "copied" in note] == [f"{reason} attention runs"]
    assert set(policy.tried) == {"grouped", "copied"} and not policy.groups_rows


@pytest.mark.parametrize("kind", [*KINDS, "uncached"])
def test_a_chat_goes_on_from_its_cache_or_begins_anew_and_is_right_either_way(kind, monkeypatch, tiny_model_dir):
    """A turn that goes on, one that takes back the last words, one that takes back more than a chunk holds."""
    cached = kind != "uncached"
    policy = policy_of(kind if cached else "llama", monkeypatch)
    policy.tokenizer = Policy.load(str(tiny_model_dir)).tokenizer
    policy.tokenizer.eos_token_ids = set()
    if not cached:
        policy.tried["alone"] = "not today"
    talk = generate.Session(policy, generate.Settings(model="", max_new_tokens=12))
    prompt = TOKENS[1]
    for turn in range(4):
        runs: list[int] = []
        handle = taps.put(policy.model, taps.blocks(policy.model)[0], lambda h, _, r=runs: (r.append(h.shape[1]), h)[1])
        said = np.array([piece.token for piece in talk.stream(prompt)])
        handle.remove()
        logps = plain(policy.model, prompt, said)
        assert (logps.max(-1) - logps[np.arange(12), said]).max() < 1e-4
        assert talk.fed == [*prompt, *said.tolist()]
        if turn == 1 and cached:
            assert sum(runs) == 12 + 2  # what was computed before was not computed again
        prompt = [[*talk.fed, 5, 9], talk.fed[:-4], TOKENS[1][:5] + [7], []][turn]
