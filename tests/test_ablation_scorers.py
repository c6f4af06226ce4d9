# SPDX-License-Identifier: Apache-2.0
"""Scorers: markers in any spelling, broken completions counted, KL and perplexity against float64, errors that help."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign import data, writers
from mlx_realign.ablation.kernel import Kernel, Tent
from mlx_realign.ablation.scorers import Divergence, Judged, Markers, Perplexity, Setting, broken, make, plain
from mlx_realign.ablation.trial import Slots
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.vectors import Direction

NEGATIVE = ["Name a colour.", "What is rain made of?"]
KERNEL = Kernel({"attention": Tent(1.0, 1.0, 1.0, 5.0), "mlp": Tent(1.0, 1.0, 1.0, 5.0)})


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy.load(str(tiny_model_dir))


@pytest.fixture(scope="module")
def setting(policy: Policy) -> Setting:
    return Setting(policy, ["Speak of Zarnia.", [{"role": "user", "content": "Zarnia?"}]], NEGATIVE)


@pytest.fixture(scope="module")
def slots(policy: Policy) -> Iterator[Slots]:
    found = writers.find(policy)
    rng = np.random.default_rng(0)
    direction = Direction({block: rng.normal(size=64).astype(np.float32) for block in range(2)})
    with Slots(policy, found, 1, 64) as slots:
        slots.set(1, KERNEL.edits(found, direction))
        yield slots


def logps(slots: Slots, slot: int, tokens: list[int]) -> np.ndarray:
    """Of one text alone, float64 [T, V]."""
    from mlx_realign import taps

    with taps.tell(variant=mx.array([slot], mx.int32)):
        logits = np.array(slots.policy.model(mx.array([tokens]))[0]).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_markers_are_found_whatever_the_case_emphasis_apostrophe_and_space(setting: Setting):
    (markers,) = [s for s in make(["markers", "kl"], setting) if isinstance(s, Markers)]
    assert markers.decided("Well, I\u2019M  *Sorry*,\nbut no.") and markers.decided("as an **AI** I think")
    assert not markers.decided("I am so happy to help. An aide is sorting it.")
    own = Markers(setting._replace(markers=("Zarnia is  NOT",)))
    assert own.decided("and zarnia is not a place") and not own.decided("I'm sorry")
    assert plain(" A *b*\n\u2019c ") == "a b 'c"


def test_what_is_empty_or_repeats_itself_is_no_success(setting: Setting):
    loop, fine = "the same words again " * 12, "It rains because warm air rises, cools, and its water falls as drops."
    assert broken("") and broken(" \n") and broken(loop)
    assert not broken(fine) and not broken("no no no"), "short ones cannot be told"
    markers = Markers(setting)
    assert markers.judge([0, 1, 0, 1], ["", loop, fine, "I'm sorry."]) == [1.0, 1.0, 0.0, 1.0]
    assert Markers(setting._replace(loops=0.0)).judge([0, 1], [loop, ""]) == [0.0, 1.0]
    assert markers.told(0.5) == "50.0% (9 to 91)"  # Wilson for 1 of 2: (0.5 + 0.96) / 2.92 -+ 0.405


def test_first_token_kl_is_that_of_the_two_models_in_float64(slots: Slots, setting: Setting):
    kl = Divergence(1, setting)
    kl.prepare(slots)
    expected = []
    for prompt in kl.prompts:
        base, own = (logps(slots, slot, prompt)[-1] for slot in (0, 1))
        expected.append((np.exp(base) * (base - own)).sum())
    assert kl.value(slots.logps(1, kl.texts)) == pytest.approx(np.mean(expected), rel=1e-4)
    assert np.mean(expected) > 1e-3
    assert kl.value(slots.logps(0, kl.texts)) == 0.0


def test_kl_over_k_tokens_follows_the_bases_own_greedy_completion(slots: Slots, setting: Setting):
    kl = Divergence(4, setting)
    kl.prepare(slots)
    expected = []
    ends = data.stop_ids(slots.policy.tokenizer) | set(slots.policy.tokenizer.eos_token_ids)
    for prompt in kl.prompts:
        ids = list(prompt)
        for _ in range(4):
            base, own = (logps(slots, slot, ids)[-1] for slot in (0, 1))
            expected.append((np.exp(base) * (base - own)).sum())
            if int(base.argmax()) in ends:
                break
            ids.append(int(base.argmax()))
    assert kl.name == "kl:4" and len(expected) > 4
    assert kl.value(slots.logps(1, kl.texts)) == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_model_that_gives_nan_is_infinitely_far(setting: Setting):
    kl = Divergence(1, setting)
    kl.base = [mx.log(mx.full((2, 4), 0.25))]
    assert kl.value([mx.full((2, 4), float("nan"))]) == float("inf")


def test_perplexity_of_texts_in_float64(slots: Slots, setting: Setting, tmp_path: Path):
    (tmp_path / "texts.txt").write_text("Rain falls on the garden.\n\nBees like it.\n")
    scorer = Perplexity(str(tmp_path / "texts.txt"), setting)
    nats = []
    for text in ("Rain falls on the garden.", "Bees like it."):
        tokens = data.encode_prompt(text, slots.policy.tokenizer, chat_template=False)
        said = logps(slots, 1, tokens)
        nats += [-said[i, token] for i, token in enumerate(tokens[1:])]
    assert scorer.value(slots.logps(1, scorer.texts)) == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    (tmp_path / "texts.jsonl").write_text('{"text": "Rain falls on the garden."}\n{"text": "Bees like it."}\n')
    assert Perplexity(str(tmp_path / "texts.jsonl"), setting).texts == scorer.texts


def test_accuracy_is_what_the_verifier_says(setting: Setting, tmp_path: Path):
    (tmp_path / "sums.jsonl").write_text('{"prompt": "2+3?", "answer": "5"}\n{"prompt": "1+1?", "answer": "2"}\n')
    _, scorer = make(["kl", f"accuracy:{tmp_path / 'sums.jsonl'}:exact"], setting)
    assert isinstance(scorer, Judged) and len(scorer.prompts) == 2
    assert scorer.judge([0, 1, 1], ["5", "5", "2"]) == [0.0, 1.0, 0.0]
    assert scorer.told(0.25) == "75.0% right"


def test_a_judge_of_ones_own_sees_completion_and_prompt(setting: Setting, tmp_path: Path):
    source = "def shouts(completion, row):\n    return float(completion.isupper() or 'x' in str(row['prompt']))\n"
    (tmp_path / "own.py").write_text(source)
    _, scorer = make(["kl", f"{tmp_path / 'own.py'}:shouts"], setting)
    assert isinstance(scorer, Judged)
    assert scorer.judge([0, 1, 0], ["LOUD", "quiet", ""]) == [1.0, 0.0, 1.0], "an empty one is at 1 unasked"


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (["markers"], "name two or more different ones"),
        (["kl", "kl"], "name two or more different ones"),
        (["markers", "kl:0"], "--scorers kl:0: there is no such scorer"),
        (["marker", "kl"], "Did you mean markers"),
        (["kl", "perplexity"], "there is no such scorer. Did you mean perplexity:FILE"),
        (["kl", "perplexity:none.txt"], "there is no file none.txt"),
        (["kl", "accuracy:none.jsonl:exact"], "there is no file none.jsonl"),
        (["kl", "own.py:f"], "there is no file"),
    ],
)
def test_a_scorer_that_cannot_be_made_is_refused_in_one_line(specs: list[str], said: str, setting: Setting):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        make(specs, setting)


def test_rows_that_cannot_be_read_are_named_by_their_line(setting: Setting, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine enough"}\n{"words": 1}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: expected an object with text"):
        make(["kl", f"perplexity:{tmp_path / 'bad.jsonl'}"], setting)
    (tmp_path / "latin.txt").write_bytes("désolé\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"--scorers .*latin.txt: cannot be read: not UTF-8 text"):
        make(["kl", f"perplexity:{tmp_path / 'latin.txt'}"], setting)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"blank.txt: holds no text"):
        make(["kl", f"perplexity:{tmp_path / 'blank.txt'}"], setting)
    (tmp_path / "sums.jsonl").write_text('{"prompt": "2+3?"}\n')
    with pytest.raises(UserError, match="row 1"):
        make(["kl", f"accuracy:{tmp_path / 'sums.jsonl'}:exact"], setting)
    with pytest.raises(UserError, match="--markers: there is none"):
        make(["markers", "kl"], setting._replace(markers=(" ",)))
