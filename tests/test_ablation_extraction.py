# SPDX-License-Identifier: Apache-2.0
"""From sets of prompts to what each block's writers lose: blocks without a direction, pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_writers import policy_of

from mlx_realign import ablate, cli, demo_world
from mlx_realign.ablation import extraction
from mlx_realign.ablation.extraction import Extracted
from mlx_realign.ablation.settings import Settings
from mlx_realign.errors import UserError
from mlx_realign.steering import pairs

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
