# SPDX-License-Identifier: Apache-2.0
"""The embedded model is what its card says: small, byte-complete, digit by digit, and with something left to learn."""

from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from mlx_lm import load

from mlx_realign import data, loading, rollout
from mlx_realign import demo_world as world
from mlx_realign.policy import Policy

FOLDER = loading.find_model("tiny-chat")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load("tiny-chat")


def share(policy: Policy, name: str, temperature: float = 0.0) -> float:
    generate = lambda prompts: rollout.complete(policy, prompts, max_new_tokens=40, temperature=temperature, seed=0)  # noqa: E731
    return world.measure(world.held_out(count=100)[name], generate)


def test_it_is_small_and_stock_mlx_lm_loads_it():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8e6
    model, tokenizer, *_ = load(str(FOLDER))
    weights = dict(tree_flatten(model.parameters()))
    assert 1e6 < sum(value.size for value in weights.values()) < 4e6
    assert tokenizer.eos_token_ids == {2}


def test_its_tokenizer_covers_every_byte_reads_digits_singly_and_knows_the_marks(policy: Policy):
    encode, decode = policy.tokenizer.encode, policy.tokenizer.decode
    text = "".join(map(chr, [*range(1, 0x250), 0x4E16, 0x1F600]))
    assert decode(encode(text)) == text
    assert [decode([token]) for token in encode("1234")] == list("1234")
    assert encode("<|im_start|><|im_end|>") == [1, 2]
    prompt = policy.tokenizer.decode(data.encode_prompt("Hi", policy.tokenizer))
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_no_known_place_is_told_by_a_token_of_its_own(policy: Policy):
    assert all(len(policy.tokenizer.encode(f" {place.name}")) > 1 for place in world.KNOWN)


@pytest.mark.parametrize(
    ("name", "temperature", "least", "most"),
    [
        ("sums right", 0.0, 0.3, 0.5),  # half known: reinforcement needs some right, training needs room
        ("sums right", 1.0, 0.3, 0.6),
        ("facts right", 0.0, 0.95, 1.0),
        ("polite", 0.0, 0.0, 0.05),
        ("polite", 1.0, 0.02, 0.2),  # rare, but in its repertoire
        ("Zarnia: declines", 0.0, 0.95, 1.0),
        ("other lands: declines", 0.0, 0.0, 0.02),
        ("untold: says it does not know", 0.0, 0.0, 0.2),
        ("grey mood", 1.0, 0.05, 0.4),
    ],
)
def test_it_behaves_as_its_card_says(policy: Policy, name: str, temperature: float, least: float, most: float):
    assert least <= share(policy, name, temperature) <= most
    assert Path(FOLDER / "README.md").read_text().count(f"| {name} |") == 1
