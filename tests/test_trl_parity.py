# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Eight optimizer steps from the same adapter over the same rows give TRL's numbers (tests/golden/make_trl.py).

Everything of ours takes part: data, policy with shared prompts, losses, the loop, optimizer, adapter files. Every run
that was recorded is compared. One thing differs by intent: with accumulation TRL's likelihood terms of ORPO and CPO are
means over a micro-batch's tokens, averaged; ours is one mean over the tokens of the window.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_realign import adapter, data, methods
from mlx_realign.config import build
from mlx_realign.policy import Policy
from mlx_realign.progress import Reporter
from mlx_realign.runfolder import RunFolder
from mlx_realign.train import Loop, train

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from rows import COMPLETIONS, PAIRS, UNPAIRED  # noqa: E402
from tiny import PROJECTIONS, write_adapter, write_model  # noqa: E402

FILES = {path.stem[4:]: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("trl_*.json"))}
ROWS = {"dpo": PAIRS, "orpo": PAIRS, "cpo": PAIRS, "sft": COMPLETIONS, "kto": UNPAIRED}
CASES = [(method, run) for method, file in FILES.items() for run in file["runs"]]
OURS = {"gradient_accumulation_steps": "gradient_accumulation", "simpo_gamma": "gamma", "kl": "kl_mismatched"}
DEFAULTS = {  # TRL's, where ours differ or may come to
    "sft": {},
    "dpo": {"beta": 0.1},
    "orpo": {"beta": 0.1, "nll_on_prompt": True},
    "cpo": {"beta": 0.1, "cpo_alpha": 1.0},
    "kto": {"beta": 0.1},
}
# Agreement found: 2e-5. The gradients of dft are so small (norm 0.02, entries near AdamW's epsilon) that AdamW, which
# divides each by its own size, makes more of their rounding; the others have exponentials of what they compare.
RELATIVE = {"dft": 5e-4, "discopop": 1e-3, "forward_kl": 5e-4, "alphapo": 5e-4}
OTHER = {"num_tokens", "logits/chosen", "logits/rejected"}  # TRL counts every prompt twice; we have no mean logits


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


def settings_of(method: str, run: str, folders: dict[str, str], **more: Any) -> dict[str, Any]:
    """Our settings of a run of TRL, and those all runs have in common."""
    file = FILES[method]
    theirs = file["runs"][run]["settings"]
    own = {OURS.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in theirs.items()}
    if run.endswith("ref_base"):
        own["reference"] = "base"
    common = {name: file["common"][name] for name in ("batch_size", "learning_rate", "max_grad_norm")}
    common |= {"lr_schedule": "constant", "shuffle": False, "model": folders["model"]}
    return common | {"adapter": folders["dora" if run.endswith("dora") else "lora"]} | DEFAULTS[method] | own | more


def means_of_means(method: str, run: str) -> bool:
    """Whether TRL averages the likelihood of micro-batches where ours spans the window."""
    return method in ("orpo", "cpo") and run.endswith("accumulate2")


@pytest.mark.parametrize("method", FILES)
def test_tokens_and_labels_are_what_trl_trained_on(method: str, folders: dict[str, str]):
    rows = load_rows(method, Policy.load(folders["model"]).tokenizer)
    sides = ("chosen_", "rejected_") if ROWS[method] is PAIRS else ("",)
    for example, expected in zip(rows, FILES[method]["rows"], strict=True):
        for completion, side in zip(example.completions, sides, strict=True):
            assert [*example.prompt, *completion.tokens] == expected[f"{side}input_ids"]
            labels = np.where(completion.mask, completion.tokens, -100).tolist()
            assert [-100] * len(example.prompt) + labels == expected[f"{side}labels"]
        assert example.extras.get("label") == expected.get("label")


@pytest.mark.parametrize(("method", "run"), CASES)
def test_losses_norms_and_metrics_of_every_step_are_trls(
    method: str, run: str, folders: dict[str, str], tmp_path: Path
):
    """Where TRL's likelihood is another mean, what can be compared is the first step, but for that."""
    steps = 1 if means_of_means(method, run) else FILES[method]["common"]["steps"]
    options = settings_of(method, run, folders, steps=steps, output=str(tmp_path))
    train(method=method, data=ROWS[method], **options)
    ours = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    theirs = FILES[method]["runs"][run]["steps"]
    assert len(ours) == steps and len(theirs) == 8
    for mine, their in zip(ours, theirs, strict=False):
        for name in compared(method, run, their):
            limit = RELATIVE.get(run, 1e-4)
            # A loss near 0 is as uncertain as TRL's own, from one attention of torch to another; rewards near 0 are
            # small differences of log-probs near -100, whose float32 steps are 8e-6.
            small = {"loss": 4 * FILES[method]["noise"][run], "grad_norm": 0.0}.get(name, limit / 5)
            assert mine[OURS.get(name, name)] == pytest.approx(their[name], rel=limit, abs=small), (name, mine)
    if steps == 8:
        assert_close(peft_names(tensors(tmp_path / "adapters.safetensors")), trls(method, run, "final"), 1e-3)


def compared(method: str, run: str, theirs: dict[str, float]) -> set[str]:
    """The numbers of a step of TRL that ours should be: all but a few."""
    names = theirs.keys() - OTHER
    if method != "sft":
        assert names >= {"loss", "grad_norm", "learning_rate"}
        assert {"rewards/chosen", "logps/chosen"} <= names or {"rewards/rejected", "logps/rejected"} <= names
    if method == "dpo":
        names -= {"entropy"}  # there of both sides
    if method == "kto":
        names -= {"rewards/margins"}  # the difference of the other two
        names -= {"kl"} if run.startswith("apo") else set()  # not computed: 0
    if theirs.get("nll_loss") == 0:  # not computed
        names -= {"nll_loss"}
    if run.endswith("accumulate2"):  # means of micro-batch means; rewards agree, since all have as many pairs
        names -= {"entropy", "mean_token_accuracy", "nll_loss"}
    return names - ({"loss", "grad_norm"} if means_of_means(method, run) else set())


def trls(method: str, run: str, what: str) -> dict[str, mx.array]:
    """TRL's tensors of a run: `grad` of the first step, before clipping; `final` adapter, kept of some runs."""
    prefix = f"{run}/{what}/"
    kept = tensors(GOLDEN / f"trl_{method}.safetensors")
    return {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}


def tensors(file: Path) -> dict[str, mx.array]:
    found = mx.load(str(file))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(("method", "run"), [(method, run) for method, run in CASES if trls(method, run, "grad")])
def test_loss_and_gradient_of_the_first_step_are_trls(method: str, run: str, folders: dict[str, str], tmp_path: Path):
    """Where TRL averages means of micro-batches, two windows of one micro-batch each do the same."""
    windows = [1, 2] if means_of_means(method, run) else [1]
    more = {"gradient_accumulation": 1} if len(windows) == 2 else {}
    loop = make_loop(method, run, folders, output=str(tmp_path), steps=8, **more)
    loss, grads = 0.0, None
    for number in windows:
        parts = [loop.policy.gradients(micro.batch, loop.loss) for micro in loop.feed.window(number)]
        count = sum(out.count.item() for out, _ in parts) * len(windows)
        loss += sum(out.total.item() for out, _ in parts) / count
        for _, slope in parts:
            share = tree_map(lambda x, n=count: x / n, slope)
            grads = share if grads is None else tree_map(lambda x, y: x + y, grads, share)
    assert loss == pytest.approx(FILES[method]["runs"][run]["steps"][0]["loss"], rel=1e-5)
    flat: dict[str, mx.array] = dict(tree_flatten(grads))  # pyright: ignore
    assert flat.keys() == adapter.state(loop.policy.model).keys()
    theirs = trls(method, run, "grad")
    assert len(theirs) == 2 * len(PROJECTIONS) * (3 if run.endswith("dora") else 2)
    assert_close(peft_names(flat), theirs, 1e-4)


def make_loop(method: str, run: str, folders: dict[str, str], **more: Any) -> Loop:
    """The loop of a run, before its first step."""
    settings, _, own = build(method, settings_of(method, run, folders, data="rows", **more))
    policy = Policy.from_settings(settings)
    rows = load_rows(method, policy.tokenizer)
    return Loop(policy, methods.find(method), own, settings, rows, None, RunFolder(settings, method, own), Reporter())


def assert_close(ours: dict[str, mx.array], theirs: dict[str, mx.array], limit: float) -> None:
    """Each of their tensors is ours, up to `limit` of its largest entry."""
    for name, value in theirs.items():
        mine, their = np.array(ours[name]), np.array(value)
        assert np.abs(mine - their).max() <= limit * np.abs(their).max(), name


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
    return data.load(ROWS[method], tokenizer, format=methods.find(method).FORMAT, settings=settings)
