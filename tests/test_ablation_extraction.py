# SPDX-License-Identifier: Apache-2.0
"""From sets of prompts to what each block's writers lose: blocks without a direction, pairs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_writers import policy_of

from mlx_realign import ablate, adapter, cli, demo_world, vectors
from mlx_realign.ablation import extraction
from mlx_realign.ablation.extraction import Extracted
from mlx_realign.ablation.settings import Settings
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.steering import pairs
from mlx_realign.vectors import About, Direction

RNG = np.random.default_rng(5)


def extracted(alike: tuple[int, ...], **options: Any) -> Extracted:
    """States of 8 and 8 prompts behind the embeddings and three blocks, equal in both sets in the blocks `alike`."""
    sides = RNG.standard_normal((8, 4, 64)) + 1, RNG.standard_normal((8, 4, 64))
    for block in alike:
        sides[0][:, block + 1] = sides[1][:, block + 1] = RNG.standard_normal(64)
    settings = Settings(model="m", positive="p", **options)
    return Extracted(policy_of("llama"), settings, [], {-1: sides}, {})


@pytest.mark.parametrize(
    "options", [{}, {"variant": "projected"}, {"method": "lda"}, {"method": "pca"}, {"method": "logistic"}, {"rank": 2}]
)
def test_blocks_that_see_the_template_alone_lose_nothing(options: dict[str, Any]):
    """As behind a convolution of width 3, whose state at the last tokens of a template is the same for all prompts."""
    found = extracted((-1, 0), **options)
    rows = found.by_block(None, -1)
    assert list(rows) == [1, 2] and all(np.isfinite(r).all() and r.any() for r in rows.values())
    assert set(found.by_block(1, -1)) == {0, 1, 2}  # one block's direction is for all writers
    with pytest.raises(UserError, match="both sets give the same states there"):
        extracted((-1, 0, 1, 2), **options).by_block(None, -1)


def test_an_ablation_of_a_hybrid_names_the_blocks_it_leaves_alone(
    model_folder: Callable[..., Path], tmp_path: Path, capsys: Any
):
    rows = [row | {"prompt": row["prompt"] + " now?"} for row in demo_world.contrast_rows(24)]
    (tmp_path / "sets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", str(model_folder("lfm2")), "--positive", str(tmp_path / "sets.jsonl"), "--position", "last"]
    argv += ["--no-prefix", "--block", "per-block", "--weight", "1", "--variant", "projected", "--max-new-tokens", "2"]
    assert cli.run(ablate.main, [*argv, "--output", str(tmp_path / "out")]) == 0
    assert "block 0 left alone: both sets give the same states there" in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {path.split(".")[2] for path in found["edits"]} == {"1", "2"}
    assert cli.run(ablate.main, [*argv, "--blocks", "0", "--output", str(tmp_path / "none")]) == 2
    assert "--blocks: nothing to remove from block 0: both sets give the same states" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["plain", "projected", "biprojected"])
def test_between_two_blocks_lies_the_interpolated_unit_vector(variant: str):
    found = extracted((-1,), variant=variant)
    sides = [side.astype(np.float64).mean(0) for side in found.states[-1]]
    units, lengths = [], []
    for block in (1, 2):
        vector, baseline = sides[0][block + 1] - sides[1][block + 1], sides[1][block + 1]
        baseline = {"plain": 0 * baseline, "projected": baseline, "biprojected": sides[1][0 + 1]}[variant]
        size = np.linalg.norm(vector)
        vector = vector - (vector @ baseline) / max(baseline @ baseline, 1e-30) * baseline
        lengths.append(size if variant == "biprojected" else np.linalg.norm(vector))
        units.append(vector / np.linalg.norm(vector))
    expected = 0.75 * units[0] + 0.25 * units[1]
    expected *= (0.75 * lengths[0] + 0.25 * lengths[1]) / np.linalg.norm(expected)
    np.testing.assert_allclose(found.by_block(1.25, -1)[0], expected[None], rtol=1e-9)
    assert found.differs(1.25, -1) and not found.differs(-0.5, -1)  # block -1 has none


# ------------------------------------------------------------------ a direction that is there already

ASKED = {"markers": ("rather not",), "max_new_tokens": 2, "select_prompts": 2, "eval_limit": 2, "weight": "1"}


def ablated(file: Path, **options: Any) -> tuple[ablate.Result, dict[int, np.ndarray]]:
    """tiny-chat after it lost a file's direction, and what each block's MLP lost of it: unit [d], B of the adapter."""
    result = ablate.ablate(Policy.load("tiny-chat"), *numbered(24), direction=str(file), **ASKED | options)
    layers = adapter.adapters_of(result.policy.model)
    lost = {e.writer.block: -np.array(layers[e.writer.path].lora_b)[0] for e in result.plan.edits}
    return result, lost


def unit(vector: np.ndarray) -> Any:
    return pytest.approx(vector / np.linalg.norm(vector), abs=1e-5)


def test_the_direction_of_a_file_is_what_writers_lose(tmp_path: Path):
    given = {block: RNG.standard_normal(192).astype(np.float32) for block in range(4)}
    about = About(position="-3", blocks=(2,), base_hash=Policy.load("tiny-chat").base_hash, data_hash="d")
    vectors.save(Direction(given, about), tmp_path / "given.safetensors")
    result, lost = ablated(tmp_path / "given.safetensors")
    assert lost == {block: unit(given[2]) for block in range(4)}  # of its own block
    assert (result.plan.block, result.plan.position) == (2, -3)
    kept = result.direction
    assert kept.about.blocks == (2,) and kept.about.data_hash == "d" and kept.unit(2) == unit(given[2])
    assert ablated(tmp_path / "given.safetensors", block="1")[1][0] == unit(given[1])
    each = ablated(tmp_path / "given.safetensors", block="per-block")[1]
    assert each == {block: unit(given[block]) for block in range(4)}
    halves = [given[block] / np.linalg.norm(given[block]) for block in (2, 3)]
    assert ablated(tmp_path / "given.safetensors", block="2.5")[1][0] == unit(halves[0] + halves[1])
    vectors.save(Direction(given, replace(about, base_hash="other")), tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match="made on another model, and tiny-chat has other weights .* Extract the direction on it[.]$"
    ):
        ablated(tmp_path / "other.safetensors")


def test_a_control_vector_of_another_program_serves_too(tmp_path: Path):
    given = {block: RNG.standard_normal(192).astype(np.float32) for block in (1, 3)}
    facts: dict[str, Any] = {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    mx.save_gguf(str(tmp_path / "v.gguf"), {f"direction.{b}": mx.array(v) for b, v in given.items()}, facts)
    result, lost = ablated(tmp_path / "v.gguf", block="per-block")
    assert lost == {block: unit(vector) for block, vector in given.items()} and result.plan.position == -1
    assert any(line.startswith("blocks 0, 2 left alone: --direction") for line in result.plan.lines)
    with pytest.raises(UserError, match=r"--direction .*v.gguf has no vector there"):
        ablated(tmp_path / "v.gguf", block="2")
    for name, value, flag in (("rank", 2, "rank"), ("position", "-3", "position"), ("prefix", False, "no-prefix")):
        with pytest.raises(
            UserError, match=f"--direction is extracted already, and says from where: leave --{flag} off"
        ):
            ablated(tmp_path / "v.gguf", **{name: value})
    with pytest.raises(UserError, match="--direction .*none.gguf: no such file"):
        ablated(tmp_path / "none.gguf")


# ------------------------------------------------------------------ pairs


def numbered(count: int) -> tuple[list[str], list[str]]:
    return [f"no. {i} of Zarnia?" for i in range(count)], [f"no. {i} of Borland?" for i in range(count)]


def test_lines_of_two_sets_stay_pairs_where_they_are_said_to_be():
    settings = Settings(model="m", positive="p", paired=True, method="pca")
    sets = extraction.split(extraction.as_asked(pairs.read(*numbered(82)), settings), settings)
    assert sum(len(side) for side in sets.fit + sets.select + sets.held) == 164
    for ahead, behind in (sets.fit, sets.select, sets.held):
        assert [str(text).replace("Zarnia", "Borland") for text in ahead] == behind
    assert sets.fit[0] != sorted(sets.fit[0], key=lambda text: int(str(text).split()[1]))  # shuffled all the same


def test_pca_wants_pairs_and_names_the_flag(tmp_path: Path, capsys: Any):
    for side, prompts in zip(("positive", "negative"), numbered(8), strict=True):
        (tmp_path / f"{side}.txt").write_text("\n".join(prompts[: 8 if side == "positive" else 7]) + "\n")
    argv = ["--model", "nowhere", "--positive", str(tmp_path / "positive.txt"), "--output", str(tmp_path / "out")]
    argv += ["--negative", str(tmp_path / "negative.txt"), "--method", "pca"]
    assert cli.run(ablate.main, argv) == 2  # before a model is looked for
    assert "nothing says that these sets are pairs: add --paired where line i" in capsys.readouterr().err
    assert cli.run(ablate.main, [*argv, "--paired"]) == 2
    assert "--paired: 8 positive and 7 negative prompts are no pairs" in capsys.readouterr().err
