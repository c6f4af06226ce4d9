# SPDX-License-Identifier: Apache-2.0
"""A search is repeatable, goes on where it was stopped, leaves only trials that cannot win, and its choice holds."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign import rollout, writers
from mlx_realign.ablation import edit, search
from mlx_realign.ablation.kernel import Kernel, Space, Tent, space_of
from mlx_realign.ablation.pareto import coarse, dominates, front
from mlx_realign.ablation.scorers import Setting, make
from mlx_realign.ablation.study import Study
from mlx_realign.ablation.trial import Slots, completions
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.vectors import Direction

optuna = pytest.importorskip("optuna")
JournalStorage = optuna.storages.JournalStorage
JournalFileBackend = optuna.storages.journal.JournalFileBackend

POSITIVE = ["Hi", "Tell me about the garden.", "Add 27 and 35.", "?", "What now", "Rain", "Go on then", "Sing"]
NEGATIVE = ["Hello", "Bees", "What is tea?", "Name a bird."]
LENGTH = 8


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy.load(str(tiny_model_dir))


@pytest.fixture(scope="module")
def direction() -> Direction:
    rng = np.random.default_rng(3)
    return Direction({block: rng.normal(size=64).astype(np.float32) for block in range(2)})


@pytest.fixture(scope="module")
def marker(policy: Policy) -> str:
    """A character that about half of the unedited completions hold."""
    said = [text.lower() for text in rollout.complete(policy, POSITIVE, max_new_tokens=LENGTH)]
    letters = sorted({letter for text in said for letter in text if letter.isalnum()})
    return min(letters, key=lambda letter: abs(sum(letter in text for text in said) - 5))


@pytest.fixture(scope="module")
def run(policy: Policy, direction: Direction, marker: str) -> Callable[..., search.Found]:
    found = writers.find(policy)

    def run(journal: Path, trials: int = 10, **options: Any) -> search.Found:
        setting = {"markers": (marker,), "max_new_tokens": LENGTH, "loops": 0.0, "rows": 12, **options}
        return search.run(
            policy, direction, POSITIVE, NEGATIVE, writers=found, trials=trials, journal=journal, **setting
        )

    return run


@pytest.fixture(scope="module")
def whole(run: Callable[..., search.Found], tmp_path_factory: pytest.TempPathFactory) -> search.Found:
    return run(tmp_path_factory.mktemp("search") / "whole.jsonl", trials=20)


def told(found: search.Found) -> list[Any]:
    return [(trial.number, trial.kernel.plain(), trial.scores, trial.pruned) for trial in found.trials]


def test_a_tent_by_hand():
    tent = Tent(max_weight=1.2, position=10.5, min_weight=0.2, distance=4.0)
    assert tent.weight(10) == pytest.approx(1.2 - 0.5 / 4) and tent.weight(8) == pytest.approx(1.2 - 2.5 / 4)
    assert tent.weight(14) == pytest.approx(1.2 - 3.5 / 4) and tent.weight(15) == 0.0 == tent.weight(6)
    kernel = Kernel({"attention": tent}, source=7.5)
    assert kernel.weight("mlp", 10) == 0.0
    assert Kernel.read(kernel.plain()) == kernel


def test_kernels_are_drawn_inside_the_ranges(policy: Policy):
    rng = np.random.default_rng(0)

    class Draw:
        def suggest_float(self, name: str, low: float, high: float) -> float:
            return float(rng.uniform(low, high))

        def suggest_categorical(self, name: str, choices: Any) -> Any:
            return choices[rng.integers(len(choices))]

    full = Direction({block: np.ones(64, np.float32) for block in range(31)})
    kinds = writers.find(policy)
    space = Space(space_of(kinds, full, 31).components, 30, (12.0, 27.0), True)
    drawn = [space.draw(Draw()) for _ in range(400)]
    sources = [kernel.source for kernel in drawn if kernel.source is not None]
    assert 100 < len(sources) < 300 and 12 <= min(sources) and max(sources) <= 27
    attention, mlp = ([kernel.tents[name] for kernel in drawn] for name in ("attention", "mlp"))
    assert 0.1 * 0.8 <= min(t.max_weight for t in attention) < 0.3
    assert 1.2 < max(t.max_weight for t in attention) <= 1.5
    assert 30 < sum(t.max_weight == 0 for t in mlp) < 90, "a seventh of MLPs is left alone: 0.25 of 1.75"
    assert all(18 <= t.position <= 30 and 1 <= t.distance <= 18 and 0 <= t.min_weight <= t.max_weight for t in mlp)


def test_what_a_direction_lacks_is_not_drawn(policy: Policy):
    found = writers.find(policy)
    one = Direction({1: np.ones(64, np.float32)})
    assert space_of(found, one, 2)[2:] == ((1.0, 1.0), False), "one vector serves all"
    both = Direction({0: np.ones(64, np.float32), 1: np.ones(64, np.float32)})
    assert space_of(found, both, 2)[2:] == ((0.4, 0.9), True)
    with pytest.raises(UserError, match=r"vectors for blocks \[7\], the model has 0 to 1"):
        space_of(found, Direction({7: np.ones(64, np.float32)}), 2)


@pytest.mark.slow
def test_the_same_seed_finds_the_same(run: Callable[..., search.Found], tmp_path: Path):
    one, two, other = (run(tmp_path / f"{i}.jsonl", seed=seed, trials=4) for i, seed in enumerate((4, 4, 5)))
    assert told(one) == told(two) and one.chosen == two.chosen
    assert [kernel for _, kernel, *_ in told(one)] != [kernel for _, kernel, *_ in told(other)]


def test_a_search_that_was_stopped_goes_on_and_repeats_nothing(run: Callable[..., search.Found], tmp_path: Path):
    journal, first, later = tmp_path / "search.jsonl", [], []

    def until_four(line: str) -> None:
        first.append(line)
        if sum(said.startswith("trial") for said in first) == 4:
            raise KeyboardInterrupt  # as Ctrl-C does

    with pytest.raises(KeyboardInterrupt) as stop:
        run(journal, say=until_four)
    found = run(journal, say=later.append)
    assert str(stop.value) == f"stopped: 4 of 10 trials are kept in {journal}; the same command goes on from there"
    numbers = [[line.split()[1] for line in said if line.startswith("trial")] for said in (first, later)]
    assert len(numbers[0]) == 4 and len({*numbers[0], *numbers[1]}) == len(found.trials) == 10
    counts = [line.split("(")[1].split(")")[0] for line in first + later if line.startswith("trial")]
    assert counts == [f"{n}/10" for n in range(1, 11)] and "the unedited model" not in later
    assert len({repr(trial.kernel.plain()) for trial in found.trials}) == 10
    again = run(journal, say=later.append, pick="best-kl")
    assert told(again) == told(found) and again.tokens == 0


def test_the_chosen_trial_does_as_an_adapter_what_it_did_as_a_slot(
    whole: search.Found, tiny_model_dir: Path, marker: str
):
    policy = Policy.load(str(tiny_model_dir))
    before = rollout.complete(policy, POSITIVE, max_new_tokens=LENGTH)
    edit.put_on(policy, whole.edits)
    after = rollout.complete(policy, POSITIVE, max_new_tokens=LENGTH)
    rates = [np.mean([marker in text.lower() or not text.strip() for text in texts]) for texts in (before, after)]
    assert rates == [whole.base[0], whole.chosen.scores[0]]
    assert whole.chosen in whole.front and whole.chosen.scores[0] < whole.base[0]


def test_only_trials_that_cannot_win_are_left(whole: search.Found, policy: Policy, direction: Direction, marker: str):
    left = [trial for trial in whole.trials if trial.pruned]
    setting = Setting(policy, POSITIVE, NEGATIVE, markers=(marker,), max_new_tokens=LENGTH, loops=0.0)
    markers, kl = make(["markers", "kl"], setting)
    best = [whole.base, *(trial.scores for trial in front(whole.trials, whole.scorers))]
    found = writers.find(policy)
    assert len(left) >= 3, "or this test says nothing"
    with Slots(policy, found, 1, direction.width) as slots:
        kl.prepare(slots)  # type: ignore[union-attr]
        for trial in left:
            slots.set(1, trial.kernel.edits(found, direction))
            texts = [policy.tokenizer.decode(ids) for ids in completions(slots, 1, markers.prompts, LENGTH)]  # type: ignore[union-attr]
            rate = float(np.mean(markers.judge(range(len(texts)), texts)))  # type: ignore[union-attr]
            assert trial.scores[0] <= rate
            assert kl.value(slots.logps(1, kl.texts)) == pytest.approx(trial.scores[1], rel=1e-3)  # type: ignore[union-attr]
            scores = coarse((rate, trial.scores[1]), whole.scorers)
            assert any(dominates(coarse(other, whole.scorers), scores) for other in best)


def test_markers_that_do_not_fit_stop_it_at_once_and_leave_no_journal(
    run: Callable[..., search.Found], tmp_path: Path, policy: Policy
):
    told: list[str] = []
    said = [" ".join(text.split()) for text in rollout.complete(policy, POSITIVE, max_new_tokens=LENGTH)]
    with pytest.raises(UserError, match="only 0% of the 8 positives show the behaviour by --markers") as error:
        run(tmp_path / "search.jsonl", trials=50, markers=("no such words",), say=told.append)
    assert any(f"One of its replies: {reply!r}." in str(error.value) for reply in said)
    assert sum(line.startswith("trial") for line in told) < 10 and list(tmp_path.iterdir()) == []


def test_markers_that_fit_few_replies_are_warned_of(
    run: Callable[..., search.Found], whole: search.Found, tmp_path: Path, policy: Policy, marker: str
):
    said = [text.lower() for text in rollout.complete(policy, POSITIVE, max_new_tokens=LENGTH)]
    share = sum(marker in text for text in said) / 8
    assert 0.1 < share < 0.5 and any(note.startswith(f"warning: only {share:.0%} of") for note in whole.notes)
    found = run(tmp_path / "search.jsonl", trials=1, markers=tuple({text.split()[0] for text in said}), pick="0")
    assert found.base[0] == 1.0 and not any("warning" in note for note in found.notes)


def test_a_trial_beyond_max_kl_generates_nothing(run: Callable[..., search.Found], tmp_path: Path):
    told: list[str] = []
    with pytest.raises(UserError, match="no trial stayed within a KL of 1e-09"):
        run(tmp_path / "none.jsonl", trials=3, max_kl=1e-9, say=told.append)
    assert sum("left at markers 0.0%" in line for line in told) == 3, "about half of them would have shown it"
    with pytest.raises(UserError, match="journal of a search with another max_kl"):
        run(tmp_path / "none.jsonl", trials=8)


def test_what_is_beyond_max_kl_is_tried_again_within_it(run: Callable[..., search.Found], tmp_path: Path):
    free = run(tmp_path / "free.jsonl", trials=1, pick="0")
    limit = free.trials[0].scores[1] / 2
    found = run(tmp_path / "some.jsonl", trials=6, max_kl=limit)
    assert found.trials[0].pruned and found.trials[0].scores == (0.0, free.trials[0].scores[1])
    whole = [trial for trial in found.trials if not trial.pruned]
    assert whole and all(trial.scores[1] <= limit for trial in whole)


def test_three_scorers_and_a_given_start_of_the_answer(
    run: Callable[..., search.Found], tmp_path: Path, policy: Policy
):
    prefix = policy.tokenizer.encode("So")
    found = run(tmp_path / "three.jsonl", trials=8, scorers=("markers", "kl", "kl:3"), prefix=tuple(prefix))
    assert [len(trial.scores) for trial in found.trials] == [3] * 8
    assert all(prompt[-len(prefix) :] == prefix for prompt in found.scorers[0].prompts)  # type: ignore[union-attr]


def test_a_model_that_shares_no_prompts_is_searched_too(model_folder: Callable[..., Path], tmp_path: Path):
    policy = Policy.load(str(model_folder("lfm2")))
    width = policy.body.hidden(mx.array([[1]])).shape[-1]
    direction = Direction({block: np.random.default_rng(block).normal(size=width) for block in range(3)})
    said = "".join(rollout.complete(policy, POSITIVE[:3], max_new_tokens=4)).lower()
    options: dict[str, Any] = {"markers": (said.split()[0][0],), "max_new_tokens": 4, "loops": 0.0}
    found = search.run(
        policy,
        direction,
        POSITIVE[:3],
        NEGATIVE,
        writers=writers.find(policy),
        trials=2,
        journal=tmp_path / "j",
        **options,
    )
    assert len(found.trials) == 2 and found.tokens > 0


def test_the_middle_comes_first_and_what_works_is_taken_again_but_weaker(
    run: Callable[..., search.Found], tmp_path: Path, policy: Policy, direction: Direction
):
    found = run(tmp_path / "search.jsonl", trials=20, startup=6)
    study = optuna.load_study(
        study_name="ablation", storage=JournalStorage(JournalFileBackend(str(tmp_path / "search.jsonl")))
    )
    tried = study.get_trials(deepcopy=False)
    assert tried[0].params == space_of(writers.find(policy), direction, 2).middle() | {"strength": 1.0}
    assert (tried[0].params["direction"], tried[0].params["attention.max_weight"]) == ("each", pytest.approx(1.15))
    again = [trial for trial in tried if "weaker than" in trial.user_attrs]
    drawn = [trial for trial in tried if "weaker than" not in trial.user_attrs]
    assert 2 <= len(again) <= len(drawn) and all(trial.params["strength"] == 1.0 for trial in drawn[:6])
    for trial in again:
        parent = tried[trial.user_attrs["weaker than"]]
        own, others = trial.params["strength"], {k: v for k, v in trial.params.items() if k != "strength"}
        assert 0.1 <= own < parent.params["strength"] and others.items() <= parent.params.items()
        assert len({round(t.params["strength"], 3) for t in tried if others.items() <= t.params.items()}) == sum(
            others.items() <= t.params.items() for t in tried
        ), "none is tried twice"
        mine, whole = (found.trials[t.number].kernel.tents["attention"] for t in (trial, parent))
        share = own / parent.params["strength"]
        assert mine == pytest.approx(Tent(*(whole * np.array([share, 1, share, 1]))))


def test_a_trial_cut_off_before_it_was_drawn_begins_anew(policy: Policy, tmp_path: Path):
    scorers = make(["markers", "kl"], Setting(policy, POSITIVE, NEGATIVE))
    space = Space(("attention", "mlp"), 10, (4.0, 9.0), True)
    opened = lambda: Study(tmp_path / "search.jsonl", scorers, space, 2, 0, None)  # noqa: E731
    wanted = space.middle() | {"strength": 0.5}
    first = opened()
    first.study.enqueue_trial(wanted, user_attrs={"weaker than": 0})
    first.study.ask()  # nothing is drawn yet
    asked, kernel = opened().ask()
    assert asked.params == wanted and asked.user_attrs == {"weaker than": 0}
    assert kernel.tents["attention"].max_weight == pytest.approx(1.15 / 2)


def test_another_search_in_the_journal_is_refused(run: Callable[..., search.Found], tmp_path: Path):
    run(tmp_path / "search.jsonl", trials=1, pick="0")
    with pytest.raises(UserError, match="journal of a search with another setting"):
        run(tmp_path / "search.jsonl", trials=2, max_new_tokens=LENGTH + 1)
    with pytest.raises(UserError, match="journal of a search with another scorers"):
        run(tmp_path / "search.jsonl", trials=2, scorers=("markers", "kl:2"))
    (tmp_path / "notes.txt").write_text("dear diary\n")
    with pytest.raises(UserError, match="notes.txt: is no journal of a search"):
        run(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("scorer", "file", "one", "other"),
    [
        ("perplexity:{}", "some.txt", "Rain falls.\n", "Rain fell.\n"),
        (
            "accuracy:{}:exact",
            "sums.jsonl",
            '{"prompt": "2+3?", "answer": "5"}\n',
            '{"prompt": "2+3?", "answer": "6"}\n',
        ),
        (
            "{}:judge",
            "own.py",
            "def judge(completion, row):\n    return 1.0\n",
            "def judge(completion, row):\n    return 0.5\n",
        ),
    ],
)
def test_a_journal_is_of_what_is_in_the_scorers_files(
    run: Callable[..., search.Found], tmp_path: Path, scorer: str, file: str, one: str, other: str
):
    path, journal = tmp_path / file, tmp_path / "search.jsonl"
    options: dict[str, Any] = {"trials": 1, "pick": "0", "scorers": ("kl", scorer.format(path))}
    path.write_text(one)
    first = run(journal, **options)
    assert run(journal, **options).base == first.base
    path.write_text(other)
    with pytest.raises(UserError, match="journal of a search with another content of the scorers' files. Go on with"):
        run(journal, **options)


def test_without_optuna_the_extra_is_named(run: Callable[..., search.Found], tmp_path: Path, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'mlx-realign\[search\]'"):
        run(tmp_path / "search.jsonl")
