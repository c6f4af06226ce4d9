# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The load-balancing loss of experts: Hugging Face's numbers, the same by every way, and off unless asked for."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from policy_tools import assert_same, checkpointed, flat, gap, make_batch, make_model, make_policy, with_sharing

import mlx_realign
from mlx_realign import adapter, balance, data, forward
from mlx_realign.balance import Balance
from mlx_realign.batch import Batch, Completion, Example, LossOutput, Scores
from mlx_realign.errors import UserError
from mlx_realign.loading import Loaded
from mlx_realign.methods import sft
from mlx_realign.policy import Policy

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from mixture import CONFIG, ROWS, fixed_logits, write_mixture  # noqa: E402

NUMBERS = json.loads((GOLDEN / "balance.json").read_text())


def moe_policy(arch: str = "qwen3_moe", **lora: Any) -> Policy:
    """A tiny mixture that is asked for the loss."""
    policy = make_policy(make_model(arch), **lora)
    experts = "num_local_experts" if arch in ("gpt_oss", "granitemoe") else "num_experts"
    policy.config |= {experts: 4, "num_experts_per_tok": 2}
    policy.router_aux_loss_coef = 0.7
    policy.refresh()
    return policy


def golden_rows() -> Batch:
    """The golden rows: two completions of one prompt share it."""
    row = lambda tokens: Completion(np.array(tokens, np.int32), np.ones(len(tokens), bool))  # noqa: E731
    return data.collate([Example(np.array(p, np.int32), tuple(map(row, cs)), 0, "", {}) for p, cs in ROWS])


def test_the_loss_of_fixed_logits_is_hugging_faces():
    logits, mask = fixed_logits()
    heard = [mx.array(layer) for layer in logits]
    every, real = mx.ones((14,)), mx.array(mask.reshape(-1).astype(np.float32))
    expected = NUMBERS["function"]
    assert Balance(1.0, 6, 2).loss(heard, [every]).item() == pytest.approx(expected["all"], rel=1e-5)
    assert Balance(1.0, 6, 2).loss(heard, [real]).item() == pytest.approx(expected["masked"], rel=1e-5)
    assert Balance(1.0, 6, 1).loss(heard, [real]).item() == pytest.approx(expected["top 1"], rel=1e-5)


def test_two_passes_are_one_population():
    """The first seven tokens heard in one pass, the other seven in the next, as with shared prompts."""
    logits, mask = fixed_logits()
    first, second = ([mx.array(layer[part]) for layer in logits] for part in (slice(0, 7), slice(7, 14)))
    weights = [mx.array(row.astype(np.float32)) for row in mask]
    found = Balance(1.0, 6, 2).loss(first + second, weights)
    assert found.item() == pytest.approx(NUMBERS["function"]["masked"], rel=1e-5)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointed"])
def test_loss_and_gradients_are_hugging_faces(sharing: bool, recomputed: bool, tmp_path: Path):
    """Loss, auxiliary loss and gradients of attention, embedding and routers, all weights trained."""
    model, config = load_model(write_mixture(tmp_path))
    policy = Policy(Loaded(model, None, config, tmp_path, []), "mixture")  # pyright: ignore[reportArgumentType]
    policy.router_aux_loss_coef = CONFIG["router_aux_loss_coef"]
    policy.refresh()
    model.unfreeze()
    with_sharing(policy, sharing)
    if recomputed:
        checkpointed(policy)
    out, slopes = policy.gradients(golden_rows(), lambda scores, part: sft.loss(scores, part, sft.Config()))
    count = out.count.item()
    assert count == NUMBERS["model"]["tokens"]
    total, weight = out.metrics["aux_loss"]
    assert (total / weight).item() == pytest.approx(NUMBERS["model"]["aux_loss"], rel=1e-4)
    assert (out.total / count).item() == pytest.approx(NUMBERS["model"]["loss"], rel=1e-4)
    expected: Any = mx.load(str(GOLDEN / "balance.safetensors"))
    found = flat(slopes)
    for name, value in expected.items():
        size = np.abs(np.array(value)).max()
        assert np.abs(found[name] / count - np.array(value)).max() <= 1e-4 * size, name


@pytest.mark.parametrize("arch", ["qwen3_moe", "olmoe", "gpt_oss", "granitemoe"])
def test_every_way_gives_the_same(arch: str):
    policy, batch = moe_policy(arch), make_batch()
    plain = policy.gradients(batch, nothing)
    shared = with_sharing(policy, True).gradients(batch, nothing)
    with_sharing(policy, False)
    again = policy.gradients(batch, nothing)
    for out, slopes in (shared, again, checkpointed(policy).gradients(batch, nothing)):
        assert out.total.item() == pytest.approx(float(np.array(plain[0].total)), rel=1e-4)
        assert gap(slopes, plain[1]) <= 1e-4
    wide = make_batch(width=lambda n: n + 5)
    assert_same(policy, batch, policy, wide, 2e-5)


def nothing(scores: Scores, batch: Batch) -> LossOutput:
    """A method's loss of zero: what is left is the load-balancing loss."""
    count = batch.mask.sum().astype(mx.float32)
    return LossOutput(scores.logps.sum() * 0, count, {})


def test_adapters_learn_from_it_though_routers_are_frozen():
    policy, batch = moe_policy(), make_batch()
    routers = {k: np.array(v) for k, v in tree_flatten(policy.model.parameters()) if ".mlp.gate." in k}
    out, slopes = policy.gradients(batch, nothing)
    assert not any(".mlp.gate." in name for name in flat(slopes))
    early = [name for name in flat(slopes) if "layers.0." in name]
    assert early
    assert all(np.abs(flat(slopes)[name]).max() > 0 for name in early)
    before = out.metrics["aux_loss"][0].item()
    state = adapter.state(policy.model)
    step = {name: state[name] - 0.02 / out.count * mx.array(value) for name, value in flat(slopes).items()}
    policy.model.load_weights(list(step.items()), strict=False)
    assert policy.losses(batch, nothing).metrics["aux_loss"][0].item() < before  # pyright: ignore[reportOperatorIssue]
    after = {k: np.array(v) for k, v in tree_flatten(policy.model.parameters()) if ".mlp.gate." in k}
    assert len(after) == 2
    assert all(np.array_equal(after[k], routers[k]) for k in routers)


def test_it_is_weighed_by_the_units_of_the_micro_batch():
    policy, batch = moe_policy(), make_batch()
    out = policy.losses(batch, nothing)
    total, weight = out.metrics["aux_loss"]
    assert weight.item() == out.count.item() == np.array(batch.mask).sum()
    assert out.total.item() == pytest.approx(0.7 * float(np.array(total)), rel=1e-5)
    assert 1.5 < float(np.array(total / weight)) < 4  # 2 when two experts a token are used alike


def test_a_batch_is_not_cut_for_workers():
    policy = make_policy(make_model("qwen3_moe"), workers=2)
    assert policy.workers.count == 2
    policy.config |= {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.9}
    policy.refresh()
    assert policy.workers.count == 2  # what config.json says is not asked for
    policy.router_aux_loss_coef = 0.1
    policy.refresh()
    assert policy.workers.count == 1


PAIRS = [{"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "I do not know what the sum is."}]


def trained(folder: Path, tmp_path: Path, **settings: Any) -> dict[str, Any]:
    """Metrics of the first step of dpo."""
    mlx_realign.train(
        method="dpo", model=str(folder), data=PAIRS, output=str(tmp_path / "out"), steps=1, lora_rank=2, **settings
    )
    return json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_a_run_has_it_when_asked_and_not_because_of_config_json(
    coefficient: float | None, tmp_path: Path, model_folder: Callable[..., Path]
):
    """gpt-oss publishes a coefficient of 0.9 with `output_router_logits` false: dpo starts at ln 2 all the same."""
    folder = model_folder("qwen3_moe")
    config = json.loads((folder / "config.json").read_text()) | {"router_aux_loss_coef": 0.9}
    (folder / "config.json").write_text(json.dumps(config))
    asked = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    metrics = trained(folder, tmp_path, **asked)
    expected = math.log(2) + (coefficient or 0.0) * metrics.get("aux_loss", 0.0)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
    assert ("aux_loss" in metrics) == (coefficient is not None)


def test_asked_of_a_model_without_experts_it_is_an_error(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="^--router-aux-loss-coef 0.01: llama models have no experts to balance"):
        trained(tiny_model_dir, tmp_path, router_aux_loss_coef=0.01)


def test_a_negative_coefficient_is_refused(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="^--router-aux-loss-coef must be 0 or more, got -1.0"):
        trained(tiny_model_dir, tmp_path, router_aux_loss_coef=-1.0)


def test_routers_that_cannot_be_found_are_said():
    model = make_model("qwen3_moe")
    for layer in forward.layers_of(model):
        layer.mlp.gate.__class__ = Opaque
    policy = make_policy(model)
    policy.config |= {"num_experts": 4, "num_experts_per_tok": 2}
    policy.router_aux_loss_coef = 0.7
    with pytest.raises(UserError, match="^--router-aux-loss-coef 0.7: the layers that choose experts were not found"):
        policy.refresh()


class Opaque(nn.Module):
    """A router that is no linear layer."""

    weight: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.T


def test_an_adapted_router_is_heard_with_its_adapter():
    """A PEFT adapter may have moved a router; what it says then is what counts."""
    policy, batch = moe_policy(rank=0), make_batch()
    before = policy.losses(batch, nothing).total.item()
    adapter.put_on(policy.model, ["model.layers.0.mlp.gate"], rank=2, scale=1.0, dropout=0.0, dora=False)
    gate: Any = forward.layers_of(policy.model)[0].mlp.gate
    gate.lora_b = mx.random.normal(gate.lora_b.shape, key=mx.random.key(0))
    policy.refresh()
    with balance.listening() as heard:
        policy.model(mx.array([[1, 2, 3]]))
    assert len(heard) == 2
    assert abs(float(np.array(policy.losses(batch, nothing).total)) - float(np.array(before))) > 1e-4


def test_tokens_count_alike_in_both_ways():
    """Of 14 + 3 + 1 + 19 prompt tokens each counts once per completion; untrained tails and padding count nothing."""
    batch = make_batch()
    mask = np.array(batch.mask)
    mask[1, 5:] = False  # the last four tokens of a completion of nine are not trained, so nobody needs them
    batch = batch._replace(mask=mx.array(mask))
    lengths = np.array([5, 5, 12, 1, 6, 4, 7])
    prompts = np.array([14, 14, 3, 3, 3, 1, 19])
    for sharing in (True, False):
        total = sum(float(np.array(w.sum())) for w in forward.token_weights(batch, sharing))
        assert total == (prompts + lengths - 1).sum()
