# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""What a benchmark claims beside its seconds: the arithmetic a step needs, equal work for all, memory of the child."""

import argparse
import json
import resource
import sys
from pathlib import Path

import mlx_lm
import numpy as np
import pytest
from transformers import AutoTokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = Path(__file__).parent.parent / "mlx_realign/assets/tiny-chat"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peer_drivers")]

import common  # noqa: E402
import grpo  # noqa: E402
import head_bytes  # noqa: E402
import launch  # noqa: E402
import make_pairs  # noqa: E402
import make_prompts  # noqa: E402
import mlx.core as mx  # noqa: E402
import peers  # noqa: E402
import reward  # noqa: E402
import rollouts  # noqa: E402
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
    size = launch.peak_gb(resource.getrusage(resource.RUSAGE_SELF)) + 0.2
    maxrss_gb = launch.run([sys.executable, "-c", f"block = bytearray({round(size * 1e9)})"])[2]
    assert size < maxrss_gb < size + 0.04


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


# ---------------------------------------------------------------------------------------------------------------- grpo


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What make_prompts.py writes, of tiny-chat."""
    folder = tmp_path_factory.mktemp("grpo")
    make_prompts.write(folder, TINY)
    return folder


def test_the_endless_model_is_the_model_but_for_the_logits_of_its_end_tokens(endless: Path):
    before, after = (mlx_lm.load(str(folder))[0] for folder in (TINY, endless / "model"))
    ends = json.loads((endless / "lengths.json").read_text())["end_tokens"]
    assert json.loads((TINY / "config.json").read_text())["eos_token_id"] in ends
    tokens = mx.array([[t for t in range(5, 60) if t not in ends]])  # an end token in a prompt is another one there
    changed = np.array(after(tokens))
    expected = np.array(before(tokens))
    expected[..., ends] = 0
    assert np.abs(changed - expected).max() < 1e-4


def test_prompts_are_of_the_lengths_they_are_named_after(endless: Path):
    lengths = json.loads((endless / "lengths.json").read_text())
    assert len(lengths["prompts"]) == 1
    assert len(lengths["mixed"]) == 4
    assert abs(lengths["long"][0] - 200) < 20
    rows = [json.loads(line) for line in (endless / "prompts.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 32
    assert json.loads((endless / "mixed.jsonl").read_text().splitlines()[0])["prompt"].startswith("What is ")


def test_the_reward_is_the_share_of_a_letter_and_counts_what_was_generated():
    assert reward.verify("Eel!", {}, "") == 0.5
    assert reward.verify("") == 0
    tokens: list[int] = []
    turns = [[{"role": "assistant", "content": text}] for text in ("Eel!", "no")]
    assert common.counting_reward(tokens)(completions=turns, completion_ids=[[1, 2, 3], [4]], prompts=[]) == [0.5, 0]
    assert tokens == [4]


def test_settings_that_a_peer_has_are_tried_and_the_leanest_is_one_row_with_checkpointing():
    venvs = {key: Path(key) for key in grpo.KEYS}
    fast = {c.label: c.flags for c in grpo.contestants("grpo", venvs, (32, 8), ["trl:beta=0.1"])}
    assert fast == {
        "unsloth_zoo": ("--rows", "32"),
        "unsloth_zoo, 8 rows at a time": ("--rows", "8"),
        "mlx-lm-lora": (),
        "TRL (torch)": ("--rows", "32"),
        "TRL (torch), 8 rows at a time": ("--rows", "8"),
        "TRL (torch), beta=0.1": ("--rows", "32", "--set", "beta=0.1"),
    }
    lean = {c.label: c.flags for c in grpo.contestants("grpo-checkpointed", venvs, (32, 8), [])}
    assert lean["unsloth_zoo, 1 row at a time"] == ("--rows", "1", "--checkpoint")
    assert lean["mlx-lm-lora"] == ("--checkpoint",)
    fields = common.grpo_fields(argparse.Namespace(batch=4, group_size=8, rows=8, max_new_tokens=64))
    assert fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"] == 32  # one update a rollout


def test_a_step_is_the_median_after_the_first_and_its_parts_add_up():
    notes = {"rollouts_s": [90.0, 4.0, 10.0, 6.0, 99.0], "tokens": [1, 200, 300, 100]}  # the fifth was cut off
    done = launch.Run([100.0, 10.0, 30.0, 20.0], [0.1], 170.0, 1.5, None, notes)
    found = grpo.summary(done, steps=5)
    assert (found["seconds"], found["rollout_s"], found["update_s"]) == (20, 6, 14)  # updates took 6, 20 and 14
    assert (found["tokens"], found["tokens_per_second"]) == (200, 30)  # 600 tokens in 20 s
    alone = grpo.summary(launch.Run([100.0], [0.1], 170.0, 1.5, None, notes), steps=5)
    assert (alone["seconds"], alone["first_step_only"], found["first_step_only"]) == (100, True, False)


def test_a_peer_over_its_limit_is_ended_and_judged_by_the_steps_it_did(tmp_path: Path):
    says = "common.report(steps_s={}, losses=[], mlx_peak_gb=None, rollouts_s=[7.0], tokens=[3])"
    driver = "import common, time\ncommon.limit(0.2, lambda: {})\ntime.sleep(60)\n"
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    for steps in ([3.5], []):
        python.write_text(f"#!{sys.executable}\nimport sys\nsys.path[:0] = {[str(peers.DRIVERS)]}\n")
        with python.open("a") as file:
            file.write(driver.format(says.format(steps)))
        python.chmod(0o755)
        trl = grpo.contestants("grpo", {"trl": tmp_path}, (32,), [])[0]
        if steps:
            done = grpo.drive(trl, tmp_path, 4, 600, {})
            assert done.steps_s == steps
            assert done.wall_s < 10
        else:
            with pytest.raises(launch.Failed, match=r"no step within 600 s \(rollouts: 7 s"):
                grpo.drive(trl, tmp_path, 4, 600, {})


def test_our_step_generates_its_tokens_and_its_parts_are_told(endless: Path):
    job = {"data": endless, "rows": (32,), "tries": [], "steps": 2, "limit": 9, "rounds": 1}
    result = grpo.compare("grpo", argparse.Namespace(**job, ours=["--max-new-tokens", "12"]), {}, {})
    row = result["contestants"]["mlx-realign"]
    assert 0.98 * 4 * 8 * 12 <= row["tokens"] <= 4 * 8 * 12  # tiny-chat is so small that a logit of 0 is drawn at times
    assert 0 < row["rollout_s"] < row["seconds"]
    assert "mlx-realign" in grpo.shown("grpo", result).splitlines()[-1]


def test_rollouts_of_both_make_their_tokens_and_are_divided_by_the_faster_of_theirs(endless: Path):
    calls, tokenizer = rollouts.contestants(str(endless / "model"), tokens=5)
    prompts = [tokenizer.encode(text) for text in ("What is 2 plus 3?", "Why?")]
    found = rollouts.compare(calls, prompts, rounds=1)
    assert all(0.95 * 2 * 8 * 5 <= row["tokens"] <= 2 * 8 * 5 for row in found.values())
    made_up = {name: {**row, "tokens_per_second": n} for n, (name, row) in enumerate(found.items(), 1)}
    last = [line.split()[-1] for line in rollouts.shown("about", made_up).splitlines()[3:]]
    assert last == ["0.25", "0.50", "0.75", "1.00"]


def test_bytes_of_the_head_equal_a_count_by_hand():
    """A bfloat16 head of 49152 x 64 over 512 tokens in one slice; per (token, entry), what is per row left out.

    narrow: the product writes 2; cross entropy and argmax read 2 each; entropy reads 2, writes 0.5 and reads it again;
    the probabilities take 2 + 2; the second product reads 2. The weight is read twice: 4 x 64 / 512.
    float32, compiled: 2 + 2 + 4 to float32, argmax 4, exp 4 + 4, sum 4, weighted sum 8, to bfloat16 4 + 2, product 2.
    """
    case, near = head_bytes.Case(512, 49152, 64, mx.bfloat16, 0), pytest.approx
    per_entry = {
        name: head_bytes.counted(case, form).bytes / (512 * 49152) - 4 * 64 / 512
        for name, form in head_bytes.FORMS.items()
    }
    assert per_entry["narrow"] == near(15, abs=0.1)
    assert per_entry["rows"] == near(15, abs=0.1)
    slices = 2  # of float32 in as many bytes: accumulators [512, 64] are as nothing
    assert per_entry["float32"] == near(40, abs=0.1 * slices)
    one = head_bytes.counted(case, head_bytes.FORMS["narrow"])
    assert one.flops == near(2 * 2 * 512 * 49152 * 64)
    assert head_bytes.counted(case, head_bytes.FORMS["narrow"], fused=False).bytes > 2 * one.bytes
