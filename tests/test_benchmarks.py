# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""What a benchmark claims beside its seconds: the arithmetic a step needs, equal work for all, memory of the child."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = Path(__file__).parent.parent / "mlx_realign/assets/tiny-chat"
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
    # ORPO and CPO do DPO's work without a reference. On the prompt too: three more predicted tokens a row.
    assert workload.flops_per_step(tiny, workload.CASES["orpo"], tiny) == cached
    assert workload.flops_per_step(tiny, workload.CASES["cpo-checkpointed"], tiny) == cached
    on_prompt = cached + 4 * 10 * 4 * 12
    assert workload.flops_per_step(tiny, workload.CASES["orpo-prompt"], tiny) == on_prompt
    # Three rejected: 3 + 2 + 3 tokens a row, 5 trained; queries see 6 keys in the prompt, 4 + 5 + 3 x 4 after = 27.
    several = 4 * (2 * 144) * 32 + 6 * 8 * 32 * (2 * 64) + 4 * 10 * 4 * 20 + 12 * 4 * (4 * 27) * 2
    assert workload.flops_per_step(tiny, workload.CASES["dpo-rejected3"], tiny) == several


def test_rows_are_distinct_and_true():
    rows = make_pairs.pairs()
    assert len({row["prompt"] for row in rows}) == len(rows) == 128
    for row in rows:
        a, b = (int(word.strip("?")) for word in row["prompt"].split()[-3::2])
        assert f"is {a + b}." in row["chosen"]
        assert f"maybe {a + b + 3}." in row["rejected"]


def test_three_rejected_are_the_one_and_two_more_wrong_ones():
    for one, several in zip(make_pairs.pairs(), make_pairs.pairs(rejected=3), strict=True):
        assert {**several, "rejected": several["rejected"][0]} == one
        right = int(one["chosen"].split("is ")[1].split(".")[0])
        wrong = [int(text.split("maybe ")[1].split(".")[0]) for text in several["rejected"]]
        assert len({right, *wrong}) == 4


@pytest.mark.parametrize("asked", [None, 400])
def test_a_prompt_is_as_long_as_asked(asked: int | None, tmp_path: Path):
    # tiny-chat's template puts 3 tokens and words around a turn, and the head of the answer after it.
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    sentence = "Here is some context about arithmetic that is long enough to matter. "
    length = make_pairs.write(tmp_path, str(TINY), asked)["prompt"]
    rows = [json.loads(line) for line in (tmp_path / "dpo/steps.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    for row in rows:
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == length
    if asked:
        assert abs(length - asked) <= len(tokenizer(sentence, add_special_tokens=False)["input_ids"]) / 2 + 1
    else:
        assert rows[0]["prompt"].count(sentence) == 3


def test_a_peer_that_cannot_cache_the_reference_is_left_out_of_the_cached_case_only():
    venvs = {key: Path(key) for key in peers.PEERS}
    names = {name: [c.label for c in peers.contestants(case, venvs, [])] for name, case in peers.COMPARED.items()}
    assert names["dpo-cached"] == ["unsloth_zoo", "TRL (torch)"]
    assert names["dpo-live"] == names["dpo-checkpointed"] == ["unsloth_zoo", "mlx-lm-lora", "TRL (torch)"]
    assert names["sft"] == ["unsloth_zoo", "mlx-lm-lora", "mlx-lm", "TRL (torch)"]
    assert names["orpo"] == names["cpo"] == ["unsloth_zoo", "mlx-lm-lora", "TRL (torch)"]
    assert "unsloth_zoo, live reference" in names["dpo-cold"]


def test_memory_is_the_child_s_own_where_it_exceeds_its_parent_s():
    maxrss_gb = launch.run([sys.executable, "-c", "block = bytearray(500 * 10**6)"])[2]
    assert 0.5 < maxrss_gb < 0.54


def test_a_contestant_that_fails_says_why():
    with pytest.raises(launch.Failed, match="no such thing"):
        launch.run([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_peers_run_the_same_loss_where_the_case_names_it_and_none_where_it_cannot_read_the_rows():
    venvs = {key: Path(key) for key in peers.PEERS}
    found = [c.label for c in peers.contestants(workload.CASES["orpo-prompt"], venvs, [])]
    assert found == ["unsloth_zoo", "TRL (torch)"]  # mlx-lm-lora's likelihood is of chosen alone
    assert "dpo-rejected3" not in peers.COMPARED


def test_the_comparison_goes_on_without_a_peer_that_crashes(tmp_path: Path):
    make_pairs.write(tmp_path / "data", str(TINY))
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho step 1\nkill -ABRT $$\n")
    python.chmod(0o755)
    job = argparse.Namespace(model=TINY, data=tmp_path / "data", tries=[], steps=3, rounds=2, no_warm_up=True, ours=[])
    result = peers.compare("cpo", job, {"mlx-lm-lora": tmp_path / "venv"}, {"mlx-lm-lora": {}})
    assert result["failed"] == {"mlx-lm-lora": "ended with -6: step 1"}
    assert list(result["contestants"]) == ["mlx-realign"]
    assert len(result["contestants"]["mlx-realign"]["all_seconds"]) == 1  # no second round beside nobody
    assert peers.shown("cpo", result).splitlines()[-1] == "mlx-lm-lora failed, ended with -6: step 1"
