# SPDX-License-Identifier: Apache-2.0
"""The reference: step 0 of DPO is ln 2, numbers are computed once, and a change misses exactly what it must."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from train_tools import cache, pair_rows

from mlx_realign import adapter, data, fingerprint, noise
from mlx_realign.batch import Example
from mlx_realign.config import TrainSettings
from mlx_realign.guard import Fault
from mlx_realign.methods import dpo
from mlx_realign.policy import Policy
from mlx_realign.reference import FILE, Reference

LN2 = math.log(2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path):
    """No test sees another one's numbers."""
    with cache(tmp_path / "cache"):
        yield tmp_path / "cache"


@pytest.fixture
def ready(tiny_model_dir) -> Callable[..., Policy]:
    """ready(dora=True) is the tiny policy with a fresh adapter."""

    def make(**settings: Any) -> Policy:
        settings = {"model": str(tiny_model_dir), "lora_rank": 4} | settings
        return Policy.from_settings(TrainSettings(**settings))

    return make


def rows_of(policy: Policy, count: int = 4, **settings: Any) -> list[Example]:
    return list(data.load(pair_rows(count), policy.tokenizer, format="pairs", settings=TrainSettings(**settings)))


def reference(policy: Policy, kind: str = "init", said: list[str] | None = None) -> Reference:
    return Reference(policy, kind, fingerprint.base(policy.model), (said if said is not None else []).append)


def computed(policy: Policy, rows: list[Example], kind: str = "init") -> int:
    """How many of these rows a new run has to compute."""
    found = reference(policy, kind)
    found.totals(rows, data.collate(rows))
    found.close()
    return found.computed


def move(policy: Policy, by: float = 0.02) -> None:
    """Change the adapter as training would."""
    rand = lambda i, v: v + by * mx.random.normal(v.shape, key=mx.random.key(i))  # noqa: E731
    policy.model.load_weights(
        [(k, rand(i, v)) for i, (k, v) in enumerate(adapter.state(policy.model).items())], strict=False
    )
    mx.eval(policy.model.parameters())


def first_loss(policy: Policy, kind: str = "init") -> float:
    """DPO's mean loss before any step, as the loop computes it."""
    rows = rows_of(policy)
    batch = data.collate(rows)
    batch.extras["ref_logps"] = reference(policy, kind).totals(rows, batch)
    out, _ = policy.gradients(batch, lambda scores, part: dpo.loss(scores, part, dpo.Config()))
    return (out.total / out.count).item()  # type: ignore


@pytest.mark.parametrize(
    "settings",
    [{}, {"dora": True}, {"rslora": True}, {"quantize": 4, "cpu_dequantize": "never"}, {"grad_checkpoint": True}],
    ids=lambda s: "-".join(s) or "lora",
)
def test_the_first_loss_is_ln_2_in_float32(ready, settings):
    assert abs(first_loss(ready(**settings)) - LN2) <= 1e-6


def test_the_first_loss_is_ln_2_for_a_policy_started_from_an_adapter(ready, tmp_path):
    before = ready(dora=True)
    move(before)
    adapter.save(before.model, tmp_path / "start", base_model="tiny")
    policy = ready(adapter=str(tmp_path / "start"))
    assert abs(first_loss(policy) - LN2) <= 1e-6
    assert abs(first_loss(policy, "base") - LN2) > 1e-3  # against the bare model it has moved


@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["lora", "dora"])
def test_the_first_loss_is_ln_2_in_bfloat16(ready, settings):
    policy = ready(dtype="bfloat16", **settings)
    assert policy.dtype == mx.bfloat16
    assert abs(first_loss(policy) - LN2) <= 1e-2


def test_numbers_are_those_of_the_policy_as_the_stage_began(ready):
    policy = ready()
    rows = rows_of(policy)
    batch = data.collate(rows)
    expected = np.array(policy.totals(batch))
    kept = reference(policy)
    move(policy)
    assert np.abs(np.array(policy.totals(batch)) - expected).max() > 1e-3
    np.testing.assert_allclose(np.array(kept.totals(rows, batch)), expected, rtol=1e-5)
    assert np.abs(np.array(policy.totals(batch)) - expected).max() > 1e-3  # and the policy is as moved as before


def test_a_later_run_computes_nothing_and_sees_the_same_bits(ready):
    policy = ready()
    rows = rows_of(policy)
    first = reference(policy)
    before = np.array(first.totals(rows, data.collate(rows)))
    again = reference(ready(lora_rank=8, seed=3))  # a fresh adapter says nothing, whatever its rank or seed
    pieces = [again.totals([row], data.collate([row])) for row in reversed(rows)]
    after = np.concatenate([np.array(piece) for piece in reversed(pieces)])
    np.testing.assert_array_equal(after, before)
    assert (first.computed, again.computed) == (4, 0)


def test_a_changed_row_misses_alone_and_the_others_keep_their_first_numbers(ready):
    policy = ready()
    rows = rows_of(policy)
    before = np.array(reference(policy).totals(rows, data.collate(rows)))
    other = rows_of(policy, 5)[4]
    mixed = [rows[0], other, *rows[2:]]
    found = reference(policy)
    after = np.array(found.totals(mixed, data.collate(mixed)))
    assert found.computed == 1
    np.testing.assert_array_equal(np.delete(after, [2, 3]), np.delete(before, [2, 3]))


def test_a_changed_template_or_length_misses(ready):
    policy = ready()
    assert computed(policy, rows_of(policy)) == 4
    assert computed(policy, rows_of(policy, chat_template=False)) == 4
    cut = rows_of(policy, max_length=70, truncate="left")
    short = sum(len(a.prompt) != len(b.prompt) for a, b in zip(cut, rows_of(policy), strict=True))
    assert 0 < short < 4
    assert computed(policy, cut) == short


def test_rounded_products_are_another_policy(ready, monkeypatch):
    """A run with MLX_ENABLE_TF32=0 after one without must not be held to the rounded numbers of that one."""
    policy = ready()
    rows = rows_of(policy)
    assert [computed(policy, rows), computed(policy, rows)] == [4, 0]
    monkeypatch.setattr(noise, "short_products", lambda: True)
    assert [computed(policy, rows), computed(policy, rows)] == [4, 0]


def test_a_changed_adapter_scale_dtype_or_weight_misses(ready, tmp_path):
    policy = ready()
    move(policy)
    adapter.save(policy.model, tmp_path / "one", base_model="tiny")
    start = ready(adapter=str(tmp_path / "one"))
    rows = rows_of(start)
    assert computed(start, rows) == 4
    assert computed(ready(adapter=str(tmp_path / "one")), rows) == 0
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(config.read_text().replace('"scale": 8.0', '"scale": 4.0'))  # alpha 32 / rank 4
    assert computed(ready(adapter=str(tmp_path / "one")), rows) == 4
    assert computed(start, rows, "base") == 4
    assert computed(ready(), rows) == 0  # "base" of one is "init" of a fresh one
    assert computed(ready(dtype="bfloat16"), rows) == 4
    changed = ready()
    linear = dict(changed.model.named_modules())["model.layers.1.mlp.down_proj"].linear
    linear.weight = linear.weight.at[5, 7].add(1e-3)
    mx.eval(linear.weight)
    assert computed(changed, rows) == 4


def test_a_damaged_cache_is_begun_anew(ready, own_cache):
    policy = ready()
    rows = rows_of(policy)
    assert computed(policy, rows) == 4
    for damage in (b"this is no database" * 100, b"\0" * 5000):
        (own_cache / FILE).write_bytes(damage)
        said: list[str] = []
        found = reference(policy, said=said)
        found.totals(rows, data.collate(rows))
        found.close()
        assert found.computed == 4 and len(said) == 1
        assert "is damaged" in said[0] and "begun anew" in said[0] and FILE in said[0]
        assert computed(policy, rows) == 0


def test_a_cache_damaged_in_its_middle_costs_the_cache_and_nothing_else(ready, own_cache):
    policy = ready()
    rows = rows_of(policy)
    kept = reference(policy)
    expected = np.array(kept.totals(rows, data.collate(rows)))
    kept.close()
    path = own_cache / FILE
    pages = bytearray(path.read_bytes())
    pages[4096 : 4096 + 2000] = b"\xff" * 2000  # the header of the table's own page
    path.write_bytes(pages)
    said: list[str] = []
    found = reference(policy, said=said)
    for _ in range(2):
        np.testing.assert_allclose(np.array(found.totals(rows, data.collate(rows))), expected, rtol=1e-5)
    assert len(said) == 1 and FILE in said[0]
    assert found.computed == 4


def test_a_cache_that_cannot_be_written_is_done_without_in_one_message(ready, own_cache):
    policy = ready()
    rows = rows_of(policy)
    (own_cache / FILE).mkdir(parents=True)
    said: list[str] = []
    found = reference(policy, said=said)
    for _ in range(2):
        found.totals(rows, data.collate(rows))
    assert found.computed == 4
    assert len(said) == 1 and "kept in memory" in said[0] and "MLX_REALIGN_CACHE" in said[0]


def test_a_policy_that_has_moved_for_good_is_not_asked(ready):
    policy = ready()
    rows = rows_of(policy)
    found = reference(policy)
    found.totals(rows[:2], data.collate(rows[:2]))
    found.seal()
    found.totals(rows[:2], data.collate(rows[:2]))
    with pytest.raises(Fault, match="the policy has moved; --resume computes them again"):
        found.totals(rows, data.collate(rows))


def test_fingerprints_see_any_entry_and_any_exchange():
    x = mx.random.normal((64, 48), key=mx.random.key(0))
    same = fingerprint.of([("w", x)])
    assert fingerprint.of([("w", x + 0)]) == same
    swapped = mx.array(np.array(x)[:, [1, 0, *range(2, 48)]])
    one = x.at[63, 47].add(1e-7 * x[63, 47].abs() + 1e-6)
    others = [("w", swapped), ("w", one), ("v", x), ("w", x.reshape(48, 64)), ("w", x.astype(mx.bfloat16))]
    assert len({same, *(fingerprint.of([other]) for other in others)}) == 6


def test_wrapping_a_layer_leaves_the_fingerprint_of_the_base(ready, tiny_model_dir: Path):
    bare = Policy.load(str(tiny_model_dir))
    policy = ready(dora=True)
    move(policy)
    assert fingerprint.base(policy.model) == fingerprint.base(bare.model)
    assert fingerprint.adapters(bare.model) == ""
