# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Eight optimizer steps from the same adapter over the same rows give TRL's numbers (tests/golden/make_trl.py).

Everything of ours takes part: data, policy with shared prompts, losses, the loop, optimizer, adapter files.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_realign import adapter, data
from mlx_realign.config import build
from mlx_realign.methods import dpo, sft
from mlx_realign.policy import Policy
from mlx_realign.train import train

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from rows import COMPLETIONS, PAIRS  # noqa: E402
from tiny import PROJECTIONS, write_adapter, write_model  # noqa: E402

FILES = {name: json.loads((GOLDEN / f"trl_{name}.json").read_text()) for name in ("dpo", "sft")}
ROWS = {"dpo": PAIRS, "sft": COMPLETIONS}
METHODS = {"dpo": dpo, "sft": sft}
RUNS = {  # run of TRL -> our settings
    "dpo": {
        "sigmoid": {},
        "sigmoid_accumulate2": {"gradient_accumulation": 2},
        "sigmoid_ref_base": {"reference": "base"},
        "sigmoid_dora": {},
    },
    "sft": {
        "nll": {},
        "nll_accumulate2": {"gradient_accumulation": 2},
        "nll_dora": {},
        "dft": {"loss_type": "dft"},
    },
}
# Agreement found: 7e-6. Only dft's gradients are so small (norm 0.02, entries near AdamW's epsilon) that AdamW, which
# divides each by its own size, makes a little more of their rounding.
RELATIVE = {"dft": 5e-4}
ABSOLUTE = 2e-5  # rewards near 0 are small differences of log-probs near -100, whose float32 steps are 8e-6
CASES = [(method, run) for method, runs in RUNS.items() for run in runs]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The model, the start adapter and its DoRA form, as folders."""
    root = tmp_path_factory.mktemp("trl")
    write_model(root / "model")
    write_adapter(root / "lora")
    write_adapter(root / "dora", dora=True)
    return {name: str(root / name) for name in ("model", "lora", "dora")}


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory):
    """No number may come from a cache that an earlier run left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_REALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def adapter_of(folders: dict[str, str], run: str) -> str:
    return folders["dora" if run.endswith("dora") else "lora"]


@pytest.mark.parametrize("method", FILES)
def test_tokens_and_labels_are_what_trl_trained_on(method: str, folders: dict[str, str]):
    rows = load_rows(method, Policy.load(folders["model"]).tokenizer)
    sides = ("chosen_", "rejected_") if method == "dpo" else ("",)
    for example, expected in zip(rows, FILES[method]["rows"], strict=True):
        for completion, side in zip(example.completions, sides, strict=True):
            assert [*example.prompt, *completion.tokens] == expected[f"{side}input_ids"]
            labels = np.where(completion.mask, completion.tokens, -100).tolist()
            assert [-100] * len(example.prompt) + labels == expected[f"{side}labels"]


@pytest.mark.parametrize(("method", "run"), CASES)
def test_losses_norms_and_metrics_of_every_step_are_trls(
    method: str, run: str, folders: dict[str, str], tmp_path: Path
):
    common = FILES[method]["common"]
    train(
        method=method,
        data=ROWS[method],
        model=folders["model"],
        adapter=adapter_of(folders, run),
        output=str(tmp_path),
        steps=common["steps"],
        batch_size=common["batch_size"],
        learning_rate=common["learning_rate"],
        max_grad_norm=common["max_grad_norm"],
        lr_schedule="constant",
        shuffle=False,
        **RUNS[method][run],
    )
    ours = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    theirs = FILES[method]["runs"][run]["steps"]
    assert len(ours) == len(theirs) == 8
    names = compared(method, run)
    for mine, their in zip(ours, theirs, strict=True):
        for name in names:
            assert mine[name] == pytest.approx(their[name], rel=RELATIVE.get(run, 1e-4), abs=ABSOLUTE), (name, mine)
    assert_close(peft_names(tensors(tmp_path / "adapters.safetensors")), trls(method, run, "final"), 1e-3)


def compared(method: str, run: str) -> list[str]:
    """With accumulation TRL's metrics are means of micro-batch means, ours are weighted: only rewards agree then."""
    names = ["loss", "grad_norm", "learning_rate"]
    if method == "dpo":
        names += [f"rewards/{what}" for what in ("chosen", "rejected", "margins", "accuracies")]
        names += ["logps/chosen", "logps/rejected"]
    elif not run.endswith("accumulate2"):
        names += ["entropy", "mean_token_accuracy"]
    return names


@pytest.mark.parametrize(("method", "run"), CASES)
def test_gradients_of_the_first_step_are_trls(method: str, run: str, folders: dict[str, str]):
    policy = Policy.load(folders["model"], adapter=adapter_of(folders, run))
    rows = load_rows(method, policy.tokenizer)
    count = 2 * RUNS[method][run].get("gradient_accumulation", 1)
    batch = data.collate([rows[i] for i in range(count)])
    own = METHODS[method].Config(**{k: v for k, v in RUNS[method][run].items() if k != "gradient_accumulation"})
    if method == "dpo":
        with policy.reference(own.reference):
            batch.extras["ref_logps"] = policy.totals(batch)
    out, grads = policy.gradients(batch, lambda scores, part: METHODS[method].loss(scores, part, own))
    flat = dict(tree_flatten(grads))
    assert flat.keys() == adapter.state(policy.model).keys()
    theirs = trls(method, run, "grad")
    assert len(theirs) == 2 * len(PROJECTIONS) * (3 if run.endswith("dora") else 2)
    assert_close({name: value / out.count for name, value in peft_names(flat).items()}, theirs, 1e-4)


def assert_close(ours: dict[str, mx.array], theirs: dict[str, mx.array], limit: float) -> None:
    """Each of their tensors is ours, up to `limit` of its largest entry."""
    for name, value in theirs.items():
        mine, their = np.array(ours[name]), np.array(value)
        assert np.abs(mine - their).max() <= limit * np.abs(their).max(), name


def trls(method: str, run: str, what: str) -> dict[str, mx.array]:
    """TRL's tensors of a run: `grad` of the first step, before clipping; `final` adapter, kept of some runs."""
    prefix = f"{run}/{what}/"
    kept = tensors(GOLDEN / f"trl_{method}.safetensors")
    return {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}


def tensors(file: Path) -> dict[str, mx.array]:
    found = mx.load(str(file))
    assert isinstance(found, dict)
    return found


def peft_names(flat: dict[str, mx.array]) -> dict[str, mx.array]:
    """Our tensors under PEFT's names and in its layout: lora_A [rank, in], lora_B [out, rank]."""
    kinds = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    named = {}
    for path, value in flat.items():
        home, _, leaf = path.rpartition(".")
        named[f"base_model.model.{home}.{kinds[leaf]}"] = value.T
    return named


def load_rows(method: str, tokenizer: Any) -> data.Dataset:
    settings = build(method, {"model": "m", "data": "rows"}).settings
    return data.load(ROWS[method], tokenizer, format=METHODS[method].FORMAT, settings=settings)
