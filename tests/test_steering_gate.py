# SPDX-License-Identifier: Apache-2.0
"""steer condition: prompts of one wording are steered, those of another answered by the model itself, from one file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from steer_tools import mood_rows, refused, run, states, write

from mlx_realign import cli, data, demo_world, rollout
from mlx_realign.policy import Policy
from mlx_realign.steering import condition

GREY = "|".join([*demo_world.GREY, "sad"])
SUBJECTS = [f"the {subject}" for subject in demo_world.SUBJECTS]


def asked(wording: int, subjects: list[str]) -> list[str]:
    """Small talk in one wording."""
    return [demo_world.TALK_PROMPTS[wording].format(subject=subject) for subject in subjects]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load("tiny-chat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mood.safetensors, made at block 2; yes.txt and no.txt; gate.safetensors of the first two thirds of them."""
    folder = tmp_path_factory.mktemp("gate")
    write(folder / "mood.jsonl", *mood_rows(12))
    write(folder / "yes.txt", *asked(0, SUBJECTS[:12]))
    write(folder / "no.txt", *asked(1, SUBJECTS[:12]))
    made = ["--positive", folder / "mood.jsonl", "--output", folder / "mood.safetensors", "--position", "mean"]
    gate = ["--positive", folder / "yes.txt", "--negative", folder / "no.txt", "--output", folder / "gate.safetensors"]
    for words in (["extract", *made, "--block", "2"], ["condition", *gate, "--block", "0-2"]):
        assert cli.entry(["steer", words[0], "--model", "tiny-chat", *map(str, words[1:])]) == 0
    return folder


def test_the_file_holds_a_threshold_between_the_two_sets(folder: Path, policy: Policy):
    gate = condition.load(folder / "gate.safetensors", policy)
    assert gate.block <= 2 and (gate.reading, gate.score) == ("last", "signed")
    sides = []
    for wording in (0, 1):
        ends = [
            states(policy, data.encode_prompt(p, policy.tokenizer), gate.block)[-1] for p in asked(wording, SUBJECTS)
        ]
        sides.append(np.stack(ends))
    halves = [side[:12:2].mean(0) for side in sides]  # every other prompt gave the direction
    unit = (halves[0] - halves[1]) / np.linalg.norm(halves[0] - halves[1])
    scores = [(side - halves[1]) @ unit for side in sides]
    assert gate.direction.unit(gate.block) @ unit == pytest.approx(1, abs=1e-6)
    assert gate.sense == "above"
    judged = [score[1:12:2] for score in scores]
    assert gate.threshold == pytest.approx((judged[0].min() + judged[1].max()) / 2, abs=1e-3)
    right = np.concatenate([scores[0][12:] > gate.threshold, scores[1][12:] < gate.threshold])
    assert len(right) == 16 and right.mean() >= 0.8, "other subjects too"


def test_only_its_prompts_are_steered(folder: Path, policy: Policy, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    prompts = [*asked(0, SUBJECTS[12:]), *asked(1, SUBJECTS[12:])]
    base = rollout.complete(policy, prompts, max_new_tokens=24)
    write(tmp_path / "p.txt", *prompts)
    start = ("eval", "--steer", f"{folder}/mood.safetensors", "--prompts", tmp_path / "p.txt", "--max-new-tokens", 24)
    words = ("--coefficients", "4.5", "--regex", GREY, "--json")
    every = json.loads(run(capsys, *start, *words))["measured"][1]["accepted"]["value"]
    half = json.loads(run(capsys, *start, *words, "--condition", folder / "gate.safetensors"))["measured"][1]
    assert every >= 0.75 and half["accepted"]["value"] == pytest.approx(every / 2, abs=0.15)
    for i, steered in ((0, True), (len(SUBJECTS) - 12, False)):
        one = ("--steer", f"{folder}/mood.safetensors:4.5", "--condition", folder / "gate.safetensors")
        said = json.loads(run(capsys, "generate", *one, "--prompt", prompts[i], "--max-new-tokens", 24, "--json"))
        assert (said["completion"].strip() == base[i]) is not steered
        assert bool(re.search(GREY, said["completion"])) is steered


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--output", "x.bin"), "must end in .safetensors"),
        (("--output", "gate.safetensors"), "exists already"),
        (("--negative", "yes.txt"), "stands in the positive set as well"),
        (("--negative", "few.txt"), "at least 4 prompts of each kind; 2 are negative"),
        (("--block", "9"), "has no block 9"),
    ],
)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str], expected: str):
    write(folder / "few.txt", "How are you?", "Who is it?")
    flags = {"--positive": "yes.txt", "--negative": "no.txt", "--output": "new.safetensors"} | dict([words])
    given = [str(folder / text) if "." in text else text for pair in flags.items() for text in pair]
    assert expected in refused(capsys, "condition", "--model", "tiny-chat", *given)
    assert not (folder / "new.safetensors").exists()


def test_a_direction_is_no_condition_and_the_other_way_round(folder: Path, capsys: pytest.CaptureFixture[str]):
    both = folder / "mood.safetensors", folder / "gate.safetensors"
    told = refused(capsys, "generate", "--steer", both[0], "--condition", both[0], "--prompt", "Hello")
    assert "mood.safetensors: holds no condition" in told
    assert "condition" in refused(capsys, "generate", "--steer", both[1], "--prompt", "Hello")
    export = ("export", "--steer", both[0], "--condition", both[1], "--to", "mlx-lm", "--output", folder / "baked")
    assert "it has a condition" in refused(capsys, *export)
