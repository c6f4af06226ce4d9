# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""What a benchmark claims beside its seconds: the arithmetic a step needs, equal work for all, memory of the child."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import launch  # noqa: E402
import make_pairs  # noqa: E402
import peers  # noqa: E402
import workload  # noqa: E402

CONFIG = {
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "lengths.json").write_text(json.dumps({"prompt": 4, "chosen": 2, "rejected": 1}))
    return tmp_path


def test_flops_of_a_step_equal_a_count_by_hand(tiny: Path):
    # One layer: q 4x4, k and v 4x2, o 4x4, gate, up and down 4x8 = 144 weights, ends in + out = 64. Batch of four.
    # SFT: 3 + 2 tokens a row; queries see 1+2+3 keys in the prompt, 4 and 5 in the completion = 15.
    sft = 4 * (2 * 144) * 20 + 6 * 8 * 20 * (2 * 64) + 4 * 10 * 4 * 8 + 12 * 4 * (4 * 15) * 2
    assert workload.flops_per_step(tiny, workload.CASES["sft"], tiny) == sft
    # DPO: one more token and one more trained, which sees 4 keys. Live: one more forward of all of it.
    cached = 4 * (2 * 144) * 24 + 6 * 8 * 24 * (2 * 64) + 4 * 10 * 4 * 12 + 12 * 4 * (4 * 19) * 2
    assert workload.flops_per_step(tiny, workload.CASES["dpo-cached"], tiny) == cached
    forward = 2 * (2 * 144) * 24 + 2 * 10 * 4 * 12 + 4 * 4 * (4 * 19) * 2
    assert workload.flops_per_step(tiny, workload.CASES["dpo-live"], tiny) == cached + forward


def test_rows_are_distinct_and_true():
    rows = make_pairs.pairs()
    assert len({row["prompt"] for row in rows}) == len(rows) == 128
    for row in rows:
        a, b = (int(word.strip("?")) for word in row["prompt"].split()[-3::2])
        assert f"is {a + b}." in row["chosen"]
        assert f"maybe {a + b + 3}." in row["rejected"]


def test_a_peer_that_cannot_cache_the_reference_is_left_out_of_the_cached_case_only():
    venvs = {key: Path(key) for key in peers.PEERS}
    names = {name: [c.label for c in peers.contestants(case, venvs, [])] for name, case in workload.CASES.items()}
    assert names["dpo-cached"] == ["unsloth_zoo", "TRL (torch)"]
    assert names["dpo-live"] == names["dpo-checkpointed"] == ["unsloth_zoo", "mlx-lm-lora", "TRL (torch)"]
    assert names["sft"] == ["unsloth_zoo", "mlx-lm-lora", "mlx-lm", "TRL (torch)"]
    assert "unsloth_zoo, live reference" in names["dpo-cold"]


def test_memory_is_the_child_s_own_where_it_exceeds_its_parent_s():
    maxrss_gb = launch.run([sys.executable, "-c", "block = bytearray(500 * 10**6)"])[2]
    assert 0.5 < maxrss_gb < 0.54


def test_a_contestant_that_fails_says_why():
    with pytest.raises(launch.Failed, match="no such thing"):
        launch.run([sys.executable, "-c", "raise SystemExit('no such thing')"])
