# SPDX-License-Identifier: Apache-2.0
"""What is reported of an ablation, against float64 NumPy and counts by hand."""

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_ablation_select import log_softmax
from test_writers import policy_of

from mlx_realign import writers
from mlx_realign.ablation import edit, measure, report
from mlx_realign.ablation.measure import Bench, Measured, Removed, Side
from mlx_realign.policy import Policy

RNG = np.random.default_rng(6)
R = RNG.standard_normal(64)
SETS = [[list(map(int, RNG.integers(3, 250, n))) for n in (6, 4, 9)] for _ in range(2)]


class Bytes:
    """A tokenizer whose tokens are letters; it has no end."""

    eos_token_ids: frozenset[int] = frozenset()
    chat_template = None
    eos_token_id = None

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def side(texts: list[str], marks: tuple[str, ...] = ("no",)) -> Side:
    shows = np.array([any(mark in text for mark in marks) for text in texts])
    return Side(texts, [[1]] * len(texts), shows, np.array([measure.broken(text) for text in texts]))


def before_and_after(arch: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Policy, edit.Applied, Bench, Measured]:
    policy = policy_of(arch)
    monkeypatch.setattr(policy, "tokenizer", Bytes())
    monkeypatch.setattr("mlx_realign.data.stop_ids", lambda _: set())
    applied = edit.put_on(policy, edit.plan(writers.find(policy), R, 0.8))
    bench = Bench(*SETS, shown=["?"] * 6, markers=("zzzz",), max_new_tokens=7, kl_tokens=5)
    left = edit.leaks(applied), edit.left_in_blocks(policy, R)
    return policy, applied, bench, measure.measure(applied, bench, Removed(R, 1, -1), left)


@pytest.mark.parametrize("arch", ["llama", "lfm2"])
def test_kl_and_perplexity_are_those_of_numpy(arch: str, monkeypatch: pytest.MonkeyPatch):
    policy, applied, bench, found = before_and_after(arch, monkeypatch)

    def logps() -> list[np.ndarray]:
        rows = []
        for prompt, ids in zip(bench.negative, found.before[1].tokens, strict=True):
            text = [*prompt, *ids[:4]]
            rows.append(log_softmax(np.array(policy.model(mx.array([text]))[0]).astype(np.float64))[len(prompt) - 1 :])
        return rows

    now = logps()
    with applied.off():
        base = logps()
    kls = [(np.exp(p) * (p - q)).sum(-1) for p, q in zip(base, now, strict=True)]
    np.testing.assert_allclose(found.kl_tokens, np.concatenate(kls), atol=1e-5)
    assert found.kl_first == pytest.approx(np.mean([k[0] for k in kls]), abs=1e-5) and found.kl_first > 1e-3
    for told, rows in zip(found.perplexity, (base, now), strict=True):
        targets = [ids[:5] for ids in found.before[1].tokens]
        nll = [-row[np.arange(5), ids] for row, ids in zip(rows, targets, strict=True)]
        assert told == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_greedy_completions_before_are_the_unedited_models(monkeypatch: pytest.MonkeyPatch):
    policy, _, bench, found = before_and_after("llama", monkeypatch)
    with policy.adapter_off():
        for prompt, ids in zip(bench.positive, found.before[0].tokens, strict=True):
            text = list(prompt)
            for _ in range(7):
                text.append(int(np.argmax(np.array(policy.model(mx.array([text]))[0, -1]))))
            assert text[len(prompt) :] == ids


def test_where_the_sets_stand_on_the_direction(monkeypatch: pytest.MonkeyPatch):
    policy, applied, bench, found = before_and_after("llama", monkeypatch)

    def means() -> list[float]:
        h = policy.model.model.embed_tokens  # type: ignore[union-attr]
        sides = []
        for prompts in (bench.positive, bench.negative):
            states = []
            for prompt in prompts:
                x = h(mx.array([prompt]))
                for layer in policy.model.layers:  # type: ignore[union-attr]
                    x = layer(x, mask="causal")
                states.append(np.array(x)[0, -1] @ R / np.linalg.norm(R))
            sides.append(float(np.mean(states)))
        return sides

    now = means()
    with applied.off():
        was = means()
    expected = [(value - was[1]) / (was[0] - was[1]) for value in now]
    assert list(found.along.values()) == pytest.approx(expected, abs=1e-4)


def test_rates_count_what_is_empty_or_goes_round_in_circles_as_failures():
    loop = "no more words " * 30
    before = side(["no, sir", "no", "yes of course", "no"]), side(["fine", "fine"])
    after = side(["", loop.replace("no ", "so "), "yes of course", "certainly"]), side(["fine", "no"])
    found = Measured(before, after, 0.7, np.array([0.7, 0.1]), (2.0, 3.0), {"positives_after": -1.0}, {}, {})
    facts = measure.facts(found)
    told = facts["positive"]["behaviour"]
    assert (
        told["before"]["value"] == 0.75 and told["after"]["value"] == 0.5
    )  # two broken ones, though none has a marker
    assert facts["positive"]["marked"]["after"]["value"] == 0.0
    assert facts["positive"]["broken"]["after"]["value"] == 0.5
    # Wilson's interval of 3 of 4 by its formula.
    z, n, p = 1.959963984540054, 4, 0.75
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n)
    half *= math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (told["before"]["low"], told["before"]["high"]) == pytest.approx((middle - half, middle + half))
    assert (told["change"]["higher"], told["change"]["lower"]) == (0, 1)
    notes = measure.remarks(found, Bench([], [], [], max_new_tokens=50, max_kl=0.1))
    assert measure.remarks(found, Bench([], [], [], max_new_tokens=50, max_kl=0.7)) == notes[:-2] + notes[-1:]
    words = (
        "most of the behaviour is still there: 50%",
        "at most 50 tokens",
        "empty or degenerate",
        "over-ablation: 50%",
        "beyond the negatives",
        "first-token KL 0.7 on the held-out negatives is above the 0.1 of --max-kl",
        "0.70 is above",
    )
    assert all(any(word in note for note in notes) for word in words) and len(notes) == len(words)


def test_the_report_quotes_replies_so_that_markdown_leaves_them_alone():
    both = side(["<b>*no*</b>\n\n# title"]), side(["fine"])
    found = Measured(both, both, 0.0, np.zeros(1), (1.0, 1.0), {"positives_after": 1.0, "negatives_after": 0.0}, {}, {})
    text = report.text("T", ["plan"], found, Bench([[1]], [[1]], ["a | b", "c"]), [], [("## More", "text")])
    assert "\\<b\\>\\*no\\*\\</b\\> \\# title" in text and "_positive_: a \\| b" in text
    assert "| positives: shown, or broken | 100.0% (20.7 to 100.0) | 100.0% (20.7 to 100.0) |" in text
    assert text.index("## More") < text.index("## Side by side")


@pytest.mark.parametrize(("count", "most", "expected"), [(10, 3, [0, 3, 6]), (2, 8, [0, 1]), (5, 0, [])])
def test_samples_are_evenly_apart(count: int, most: int, expected: list[int]):
    assert report.picks(count, most) == expected


@pytest.mark.parametrize("bos", [None, 7])
def test_a_long_paragraph_is_read_to_its_end_in_windows(
    bos: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path
):
    """Windows of 5 tokens by hand: those of [7] 20 21 ... 30, each token but the first predicted once."""
    policy = Policy.load(str(tiny_model_dir))
    monkeypatch.setattr(measure, "WINDOW", 5)
    policy.tokenizer.bos_token_id = bos
    ids = {"long": [7, *range(20, 31)], "one": [7], "short": [7, 9]}
    monkeypatch.setattr("mlx_realign.data.encode_prompt", lambda text, *_, **__: ids[text])
    (tmp_path / "text.txt").write_text("long\n\none\n\nshort\n")
    texts, targets = measure.texts_of(policy, str(tmp_path / "text.txt"))
    later = [[7, 24, 25, 26, 27], [7, 28, 29]] if bos else [[24, 25, 26, 27, 28], [29]]
    assert [(list(text.tokens), text.first) for text in texts] == [
        ([7, 20, 21, 22, 23], 0),
        *((tokens, 1 if bos else 0) for tokens in later),
        ([7], 0),
    ]
    assert targets.tolist() == [*range(20, 31), 9]
    nats = []
    for text, wanted in zip(
        texts, np.split(targets, np.cumsum([len(t.tokens) - t.first for t in texts])[:-1]), strict=True
    ):
        rows = log_softmax(np.array(policy.model(mx.array([text.tokens]))[0]).astype(np.float64))[text.first :]
        nats += [-rows[i, token] for i, token in enumerate(wanted)]
    assert len(nats) == 12
    found = measure.perplexity(policy, measure.states(policy, texts), targets)
    assert found == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
