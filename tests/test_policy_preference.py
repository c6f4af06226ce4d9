# SPDX-License-Identifier: Apache-2.0
"""What preference losses ask of the policy beside summed log-probs, and what the batches of a window have in common."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from policy_tools import SHAPES, SHARING, gap, make_batch, make_examples, make_policy, with_sharing

from mlx_realign import fingerprint
from mlx_realign.batch import Batch, LossOutput, Scores
from mlx_realign.data import collate, key_of
from mlx_realign.errors import UserError
from mlx_realign.methods import kto
from mlx_realign.policy import Policy
from mlx_realign.preference import nll_weight
from mlx_realign.reference import Reference
from mlx_realign.train import train

PAIRS = [(9, [5, 3]), (4, [2, 7]), (12, [6, 4]), (1, [3, 8])]


def needing(policy: Policy, *needs: str) -> Policy:
    policy.needs = frozenset(needs)
    return policy


def naive_distributions(policy: Policy, row: np.ndarray) -> np.ndarray:
    """float64 log-probs [len(row) - 1, V] of the token after each token of an unpadded row."""
    logits = np.array(policy.model(mx.array(row)[None])[0].astype(mx.float32)).astype(np.float64)[:-1]
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "mamba2"])
def test_prompt_logps_are_those_of_each_prompt_alone(arch: str):
    policy, examples = needing(make_policy(arch), "prompt_logps"), make_examples(SHAPES)
    scores = with_sharing(policy, arch in SHARING).scores(collate(examples))
    assert scores.prompt_logps is not None
    for found, example in zip(np.array(scores.prompt_logps), examples, strict=True):
        every, size = naive_distributions(policy, example.prompt), len(example.prompt) - 1
        np.testing.assert_allclose(found[len(found) - size :], every[np.arange(size), example.prompt[1:]], atol=1e-4)
        assert not found[: len(found) - size].any()


def test_prompt_logps_have_a_gradient_and_both_ways_the_same():
    def loss(scores: Scores, batch: Batch) -> LossOutput:
        assert scores.prompt_logps is not None
        return LossOutput(scores.prompt_logps.sum() + 0.5 * scores.logps.sum(), mx.array(1.0), {})

    policy = needing(make_policy("llama"), "prompt_logps")
    found = [with_sharing(policy, on).gradients(make_batch(), loss)[1] for on in (True, False)]
    assert gap(*found) <= 1e-4
    without = policy.gradients(make_batch(), lambda s, b: LossOutput(0.5 * s.logps.sum(), mx.array(1.0), {}))[1]
    assert gap(found[0], without) > 0.1


def test_log_sum_sq_is_that_of_the_whole_distribution():
    policy, examples = needing(make_policy("llama"), "log_sum_sq"), make_examples(SHAPES)
    scores = policy.scores(collate(examples))
    assert scores.log_sum_sq is not None and scores.prompt_logps is None
    rows = iter(np.array(scores.log_sum_sq))
    for example in examples:
        for tokens, mask in example.completions:
            every = naive_distributions(policy, np.concatenate([example.prompt, tokens]))[len(example.prompt) - 1 :]
            expected = np.where(mask, np.log(np.exp(2 * every).sum(-1)), 0.0)
            np.testing.assert_allclose(next(rows)[: len(tokens)], expected, atol=1e-4)


def test_token_logps_of_parts_are_those_of_the_whole():
    one, two = make_policy("llama"), make_policy("llama", workers=2)
    np.testing.assert_allclose(one.token_logps(make_batch()), two.token_logps(make_batch()), rtol=1e-4)
    np.testing.assert_allclose(two.token_logps(make_batch()).sum(-1), one.totals(make_batch()), rtol=1e-4)


def test_the_reference_keeps_tokens_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path))
    policy = make_policy("llama")
    rows = [e._replace(key=key_of(e.prompt, e.completions)) for e in make_examples(PAIRS)]
    batch = collate(rows)
    expected = np.array(policy.token_logps(batch))
    make = lambda tokens: Reference(policy, "init", fingerprint.base(policy.model), print, tokens=tokens)  # noqa: E731
    for computed in (len(rows), 0):  # computed, then read from the disk
        reference = make(True)
        np.testing.assert_array_equal(reference.extras(rows, batch)["ref_token_logps"], expected)
        assert reference.computed == computed
        reference.close()
    sums = make(False)  # sums are other numbers, under keys of their own
    np.testing.assert_allclose(sums.extras(rows, batch)["ref_logps"], expected.sum(-1), rtol=1e-4)
    assert sums.computed == len(rows)


def test_nll_weight_turns_a_token_mean_into_a_sum_over_pairs():
    """Chosen have 5, 2, 6 and 3 tokens, of which one each of the two longest is not trained; prompts 9, 4, 12, 1."""
    examples = make_examples(PAIRS)
    assert nll_weight(examples).item() == pytest.approx(4 / 14)
    assert nll_weight(examples, prompts=True).item() == pytest.approx(4 / (14 + 8 + 3 + 11 + 0))


PAIR_ROWS = [
    {"prompt": f"Say {word}", "chosen": f"{word}{' please' * i}", "rejected": "No." * (5 - i)}
    for i, word in enumerate(("one", "two", "three", "four"))
]
MARKED = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(PAIR_ROWS)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("orpo", {}),
        ("orpo", {"nll_on_prompt": True}),
        ("cpo", {}),
        ("cpo", {"loss_type": "alphapo", "cpo_alpha": 0.5}),
        ("dpo", {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.5)}),
        ("dpo", {"ld_alpha": 0.3}),
        ("dpo", {"use_weighting": True}),
        ("kto", {}),
    ],
    ids=str,
)
def test_one_batch_of_four_is_four_batches_of_one(
    method: str, options: dict[str, Any], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Through the whole loop, two optimizer steps, the second from a moved policy."""
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))
    rows = MARKED if method == "kto" else PAIR_ROWS
    found = []
    for batch, window in ((4, 1), (1, 4), (2, 2)):
        output = tmp_path / f"{batch}x{window}"
        shape = {"batch_size": batch, "gradient_accumulation": window, "steps": 2, "shuffle": False}
        train(
            method=method,
            data=rows,
            model=str(tiny_model_dir),
            output=str(output),
            learning_rate=1e-2,
            **shape,
            **options,
        )
        found.append([json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            for name in ("loss", "grad_norm", "rewards/chosen", "logps/rejected"):
                assert mine[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_losses_that_sort_a_batch_are_not_cut(kind: str, tiny_model_dir: Path, tmp_path: Path):
    common = {"method": "dpo", "data": PAIR_ROWS, "model": str(tiny_model_dir), "loss_type": (kind,), "steps": 1}
    with pytest.raises(UserError, match="raise --batch-size"):
        train(output=str(tmp_path / "no"), gradient_accumulation=2, **common)
    train(output=str(tmp_path / "yes"), batch_size=4, **common)  # on two cores too, all pairs are one batch
    row = json.loads((tmp_path / "yes" / "metrics.jsonl").read_text())
    assert row["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_ktos_reference_point_comes_from_the_rows_before():
    """Each row answers with the completion of the one before it, the first with that of the last; below 0 counts 0."""
    examples = make_examples([(3, [4]), (5, [2]), (2, [6])])
    asked: list[list[Any]] = []

    def ratios(rows: list[Any]) -> mx.array:
        asked.append(rows)
        return mx.array([3.0, -1.0, 1.0])

    assert kto.window(examples, kto.Config(), ratios)["kl"].item() == 1.0
    assert [r.prompt.tolist() for r in asked[0]] == [e.prompt.tolist() for e in examples]
    lenders = [examples[2], examples[0], examples[1]]
    assert [r.completions[0].tokens.tolist() for r in asked[0]] == [e.completions[0].tokens.tolist() for e in lenders]
    assert len({r.key for r in asked[0]}) == 3
    assert kto.window(examples, kto.Config(), lambda _: mx.array([-5.0, 1.0, 1.0]))["kl"].item() == 0.0
    assert kto.window(examples[:1], kto.Config(), ratios)["kl"].item() == 0.0
    assert kto.window(examples, kto.Config(loss_type="apo_zero_unpaired"), ratios) == {}


def test_kto_refuses_a_step_of_one_row(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="at least 2"):
        train(method="kto", data=MARKED, model=str(tiny_model_dir), output=str(tmp_path), batch_size=1, steps=1)
