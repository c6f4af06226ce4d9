# SPDX-License-Identifier: Apache-2.0
"""What a run of `ablate` cannot end well with is refused before it takes a single state."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

import mlx_realign as mr
from mlx_realign.ablation import extraction
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy

POSITIVE = [f"Tell me about the {thing}." for thing in ("sea", "sky", "moon", "rain", "hill", "wood")]
NEGATIVE = [f"Add {n} and 5." for n in range(6)]


class Begun(Exception):
    """The expensive part has."""


@pytest.fixture
def ablate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """mr.ablate up to where it would take states."""
    monkeypatch.chdir(tmp_path)

    def begin(*_: Any, **__: Any) -> Any:
        raise Begun

    monkeypatch.setattr(extraction, "extract", begin)
    return lambda policy, **options: mr.ablate(policy, POSITIVE, NEGATIVE, **options)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy.load(str(tiny_model_dir))


def test_affine_where_the_architecture_has_no_bias(ablate: Callable[..., Any], model_folder: Callable[..., Path]):
    with pytest.raises(UserError, match="needs a bias in .*o_proj, and mlx-lm's qwen3 has none"):
        ablate(Policy.load(str(model_folder("qwen3"))), fuse=True, variant="affine")
    with pytest.raises(Begun):  # mlx-lm's llama has biases to switch on
        ablate(Policy.load(str(model_folder("llama"))), fuse=True, variant="affine")


def test_fusing_quantised_weights(ablate: Callable[..., Any], model_folder: Callable[..., Path], tmp_path: Path):
    folder = str(tmp_path / "q4")
    mlx_lm.convert(str(model_folder("llama")), mlx_path=folder, quantize=True, q_bits=4, q_group_size=32)
    options: dict[str, Any] = {"fuse": True, "search": True, "journal": "j"}
    with pytest.raises(
        UserError, match=r"would move them by \d+% of what the edit does and put \d+\.\d% of .*random direction"
    ):
        ablate(Policy.load(folder), **options)
    with pytest.raises(Begun):
        ablate(Policy.load(folder), **options, dequantize=True)
    with pytest.raises(UserError, match="affine: the weights are quantised, and cannot be edited"):
        ablate(Policy.load(folder, cpu_dequantize="never"), fuse=True, dequantize=True, variant="affine")


def test_fusing_beside_an_adapter(ablate: Callable[..., Any], model_folder: Callable[..., Path]):
    policy = Policy.load(str(model_folder("llama")))
    mr.adapter.put_on(policy.model, ["model.layers.0.mlp.down_proj"], rank=1, scale=1.0, dropout=0.0, dora=False)
    with pytest.raises(UserError, match="fuse the adapter first"):
        ablate(policy, fuse=True)


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xe9t\xe9 \xff", "cannot be read"), (b" \n\n", "holds no text"), (b"Rain falls.", None)]
)
def test_a_text_for_the_perplexity(ablate: Callable[..., Any], policy: Policy, content: bytes, said: str | None):
    Path("some.txt").write_bytes(content)
    expected = pytest.raises(Begun) if said is None else pytest.raises(UserError, match=f"--text some.txt: {said}")
    with expected:
        ablate(policy, text="some.txt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scorers": ("marker", "kl")}, "--scorers marker: there is no such scorer. Did you mean markers"),
        ({"scorers": ("kl", "perplexity:none.txt")}, "there is no file none.txt"),
        ({"scorers": ("markers", "own.py:judge")}, "there is no file"),
        ({"trials": 3, "pick": "50"}, "--pick 50: 3 --trials end with number 2"),
        ({"trials": 3, "pick": "3"}, "--pick 3: 3 --trials end with number 2"),
        ({"journal": "notes.txt", "pick": "3"}, "notes.txt: is no journal of a search"),
    ],
)
def test_a_search_that_cannot_end(ablate: Callable[..., Any], policy: Policy, options: dict[str, Any], said: str):
    pytest.importorskip("optuna")
    Path("notes.txt").write_text("dear diary\n")
    with pytest.raises(UserError, match=said):
        ablate(policy, **{"search": True, "journal": "j", **options})
    with pytest.raises(Begun):
        ablate(policy, search=True, journal="j", trials=3, pick="2")
    assert not Path("j").exists()


def test_a_number_that_the_journal_holds_may_be_picked(ablate: Callable[..., Any], policy: Policy):
    optuna = pytest.importorskip("optuna")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("j"))
    made = optuna.create_study(storage=storage, study_name="ablation", directions=["minimize"] * 2)
    for pruned in (False, False, False, False, True):
        trial = made.ask()
        for name, value in {"kernel": {"source": None}, "scores": [0.5, 0.1], "pruned": pruned}.items():
            trial.set_user_attr(name, value)
        made.tell(trial, [0.5, 0.1])
    search: dict[str, Any] = {"search": True, "journal": "j", "trials": 2}
    with pytest.raises(Begun):
        ablate(policy, **search, pick="3")
    with pytest.raises(UserError, match="--pick 4: was left early in j"):
        ablate(policy, **search, pick="4")
    with pytest.raises(UserError, match="2 --trials end with number 1. j holds 5. Raise --trials"):
        ablate(policy, **search, pick="5")


def test_without_optuna(ablate: Callable[..., Any], policy: Policy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'mlx-realign\[search\]'"):
        ablate(policy, search=True, journal="j")
