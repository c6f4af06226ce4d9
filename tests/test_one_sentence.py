# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The report on answers of one sentence: sentences counted by hand, no prompt on both sides, numbers that agree."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import one_sentence  # noqa: E402
import one_sentence_page  # noqa: E402
from sentences import is_degenerate, is_one_sentence, sentences  # noqa: E402

from mlx_realign import data  # noqa: E402
from mlx_realign.data.gates import GateSettings  # noqa: E402
from mlx_realign.data.validate import validate  # noqa: E402
from mlx_realign.policy import Policy  # noqa: E402

REPORT = ROOT / "docs/one-sentence"
RESULT = json.loads((REPORT / "result.json").read_text())
REPLIES = one_sentence.read_rows(REPORT / "replies.jsonl")
ROWS = one_sentence.read_rows(REPORT / "pairs.jsonl")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Water is wet.", 1),
        ("It is blue. It is deep.", 2),
        ("Is it? Yes! It is.", 3),
        ("Dr. Rao pays 3.50 at 5 p.m. for tea, e.g. Earl Grey, vs. coffee.", 1),
        ("John F. Kennedy was president.", 1),
        ("Eat vitamin C. It helps.", 2),
        ('He said "Stop." Then he left.', 2),
        ("Do this:\n\n1. Boil water.\n2. Add tea.", 3),
        ("Wait... there is more.", 1),
        ("It is **hot.** It burns.", 2),
        ("no mark at all", 1),
        ("", 0),
        ("---\n***", 0),
    ],
)
def test_sentences_counted_by_hand(text: str, count: int):
    assert len(sentences(text)) == count


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("Water is wet.", True),
        ("  Water is wet!\n", True),
        ('They call it "the wet."', True),
        ("Water is wet. Fire is hot.", False),
        ("Water is wet", False),  # cut off
        ("Here are the steps:", False),
        ("Yes, sir.", False),  # too short to say anything
        ("Water is wet.\nFire", False),
        ("", False),
    ],
)
def test_what_passes_for_one_sentence(text: str, one: bool):
    assert is_one_sentence(text) is one


def test_what_passes_for_degenerate():
    assert is_degenerate("") and is_degenerate("Yes, sir.") and is_degenerate("the end of it " * 5)
    assert not is_degenerate("Water is wet.") and not is_degenerate("Water is wet because it is water and flows.")


def test_a_pair_prefers_the_first_sentence_and_ends_where_a_sentence_ends():
    reply = "Tea is a drink. It is hot. It has"
    assert one_sentence.pair("Q?", reply, True) == {"prompt": "Q?", "chosen": "Tea is a drink.", "rejected": reply}
    cut = one_sentence.pair("Q?", reply, False)
    assert isinstance(cut, dict) and cut["rejected"] == "Tea is a drink. It is hot."
    assert one_sentence.pair("Q?", "Tea is a drink. It has", False) == "the answer has no second sentence"
    assert one_sentence.pair("Q?", "Tea is a drink.", True) == "the answer has no second sentence"
    long = "They are. " * 20
    reason = "the first sentence is too short beside the answer"
    assert one_sentence.pair("Q?", f"They are many things. {long}", True) == reason
    for odd in ("Here are steps:\n1. Boil it all.", "Really? It is a drink.", "tea is low. It is a drink.", ""):
        assert one_sentence.pair("Q?", odd, True) == "the answer does not begin with a sentence"


def test_wilson_interval_by_hand():
    # 8 of 10, z = 1.96: (0.8 + 0.19208 +- 1.96 sqrt(0.016 + 0.009604)) / 1.38416
    low, high = one_sentence.wilson(8, 10, z=1.96)
    half = 1.96 * math.sqrt(0.025604)
    assert (low, high) == pytest.approx(((0.99208 - half) / 1.38416, (0.99208 + half) / 1.38416), rel=1e-9)
    assert one_sentence.wilson(0, 50)[0] == pytest.approx(0, abs=1e-12)


def test_prompts_are_distinct_and_on_one_side_only():
    held_out, candidates = one_sentence.prompts()
    assert len(held_out) == 50 and len(candidates) >= 200
    every = [*held_out, *candidates, *one_sentence.ASKS_FOR_MORE]
    assert len({prompt.lower() for prompt in every}) == len(every)
    assert {row["prompt"] for row in ROWS} <= set(candidates)
    small = set("a an and are can did do does from how i in is it my of should the to was were what who why".split())
    words = [set(re.findall(r"\w+", prompt.lower())) - small for prompt in every]
    for i, one in enumerate(words):
        for j, other in enumerate(words[:i]):
            shared = len(one & other) / len(one | other)
            assert shared < 0.6, f"near duplicates: {every[i]} / {every[j]}"


def test_rows_are_what_the_page_says_they_are():
    assert len(ROWS) == RESULT["pairs"]["rows"] == 200
    for row in ROWS:
        assert is_one_sentence(row["chosen"]) and row["rejected"].startswith(row["chosen"])
        assert len(sentences(row["rejected"])) > 1
    gates = validate(REPORT / "pairs.jsonl", "pairs", gates=GateSettings())["gates"]
    assert "fail" not in {gate["verdict"] for gate in gates}
    assert (REPORT / "pairs.jsonl").stat().st_size < 200_000


def test_the_result_is_what_the_replies_show():
    held_out = REPLIES[: RESULT["held_out"]]
    assert [row["prompt"] for row in held_out] == one_sentence.prompts()[0]
    for when in ("before", "after"):
        texts = [row[when] for row in held_out]
        found = RESULT[when]
        assert found["one_sentence"] == np.mean([is_one_sentence(text) for text in texts])
        assert found["sentences"] == pytest.approx(np.mean([len(sentences(text)) for text in texts]))
        assert found["words"] == pytest.approx(np.mean([len(text.split()) for text in texts]))
        assert found["ended"] == np.mean([row[f"{when}_ended"] for row in held_out])
        assert found["degenerate"] == np.mean([is_degenerate(text) for text in texts])
        low, high = found["one_sentence_interval"]
        assert low <= found["one_sentence"] <= high
    same = [row["before"].split()[:8] == row["after"].split()[:8] for row in held_out]
    assert RESULT["kept"]["first_8_words"] == np.mean(same)


def test_training_changed_the_behaviour_without_breaking_the_replies():
    before, after = RESULT["before"], RESULT["after"]
    assert after["one_sentence_interval"][0] > before["one_sentence_interval"][1]
    assert after["degenerate"] <= 0.05 and after["ended"] > before["ended"]
    assert 0 < RESULT["kl"]["kl"] < 1
    steps = one_sentence.read_rows(REPORT / "metrics.jsonl")
    assert len(steps) == RESULT["train"]["steps"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-3) and steps[-1]["loss"] < steps[0]["loss"]


def test_the_page_is_made_from_the_result(tmp_path: Path):
    assert (ROOT / "docs/one-sentence.md").read_text() == one_sentence_page.page(RESULT, REPLIES)
    for name in ("result.json", "replies.jsonl"):
        (tmp_path / "report").mkdir(exist_ok=True)
        (tmp_path / "report" / name).write_bytes((REPORT / name).read_bytes())
    one_sentence_page.write_pages(tmp_path / "report")
    assert (tmp_path / "report/samples.md").read_text() == (REPORT / "samples.md").read_text()


def test_kl_equals_numpy_s_over_the_whole_vocabulary(adapted: Policy):
    prompt, text = "Hi", "I am here to help."
    found = one_sentence.against_start(adapted, [prompt], [(text, True)])
    ids = data.encode_prompt(prompt, adapted.tokenizer)
    reply = [*one_sentence.tokens(adapted, text), adapted.tokenizer.eos_token_id]

    def logs() -> Any:
        logits = np.array(adapted.model(mx.array([ids + reply]))[0, len(ids) - 1 : -1], np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    now = logs()
    with adapted.adapter_off():
        start = logs()
    kl = (np.exp(now) * (now - start)).sum(-1)
    assert kl.mean() > 1e-4
    assert found["kl"] == pytest.approx(kl.mean(), rel=1e-3)
    assert found["kl_words"] == pytest.approx(kl[:-1].mean(), rel=1e-3)
    assert found["tokens"] == len(reply)
    surprise = -start[np.arange(len(reply) - 1), reply[:-1]].mean()
    assert found["start_perplexity"] == pytest.approx(np.exp(surprise), rel=1e-4)


@pytest.fixture
def adapted(tiny_model_dir: Path) -> Policy:
    """A small policy whose adapter changes what it says."""
    from mlx_realign import adapter

    policy = Policy.load(str(tiny_model_dir))
    adapter.attach(policy.model, rank=4, alpha=8.0)
    mx.random.seed(0)
    for layer in adapter.adapters_of(policy.model).values():
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape)
    return policy
