# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The inputs that TRL's committed numbers were made with are still these; else every parity test misses its point."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

import rows  # noqa: E402
import tiny  # noqa: E402

FILES = sorted(path.stem for path in GOLDEN.glob("trl_*.json"))


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_weights_are_the_ones_trl_was_given(name: str):
    weights = golden(name)["weights"]
    assert tiny.fingerprint(tiny.base_weights()) == weights["base"]
    assert tiny.fingerprint(tiny.adapter_weights()) == weights["adapter"]
    assert tiny.fingerprint(tiny.adapter_weights(dora=True)) == weights["dora_adapter"]


@pytest.mark.parametrize("name", FILES)
def test_rows_decode_to_the_rows_trl_was_given(name: str, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.write_model(tmp_path / "model"))
    inputs = {"trl_sft": rows.COMPLETIONS, "trl_kto": rows.UNPAIRED}.get(name, rows.PAIRS)
    for given, row in zip(inputs, golden(name)["rows"], strict=True):
        for side in ("completion",) if "completion" in given else ("chosen", "rejected"):
            prefix = "" if side == "completion" else side + "_"
            ids, labels = row[prefix + "input_ids"], row[prefix + "labels"]
            trained = [token for token in labels if token != -100]
            assert ids[len(ids) - len(trained) :] == trained
            assert tokenizer.decode(trained) == given[side][0]["content"] + "<|im_end|>"
            assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n" + tokenizer.decode(trained))
