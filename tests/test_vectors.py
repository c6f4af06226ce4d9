# SPDX-License-Identifier: Apache-2.0
"""Directions and their files: arithmetic by hand, what comes back from a file, and every file that is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_tools import make_policy
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_realign import vectors
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.vectors import About, Direction, load, save

ABOUT = About(
    method="lda",
    position="-2",
    operator="ablate",
    positions="generated",
    coefficient=0.5,
    strength_unit="median_norm",
    blocks=(1,),
    base_model="tiny",
    data_hash="d4",
    template_prefix=(7, 8),
    measured={"auroc": [0.9, 0.8, 1.0]},
)


def make(about: About = ABOUT, width: int = 64, blocks: tuple[int, ...] = (1, -1, 0)) -> Direction:
    rng = np.random.default_rng(0)
    found = {block: rng.standard_normal(width).astype(np.float32) for block in blocks}
    return Direction(found, about, {0: np.ones(width, np.float32)}, {0: 3.5, 1: 4.25})


def test_what_is_saved_comes_back(tmp_path: Path):
    given, path = make(), tmp_path / "made" / "mood.safetensors"
    save(given, path)
    back = load(path)
    assert back.about == ABOUT
    assert back.blocks == [-1, 0, 1] and back.width == 64
    for block in back.blocks:
        assert back.vectors[block].dtype == np.float32
        assert (back.vectors[block] == given.vectors[block]).all()
    assert (back.baseline[0] == 1).all() and list(back.baseline) == [0]
    assert back.median_norm == {0: 3.5, 1: 4.25}
    assert [p.name for p in path.parent.iterdir()] == ["mood.safetensors"]


def test_the_file_says_in_plain_json_what_it_is(tmp_path: Path):
    save(make(), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        said = json.loads(file.metadata()["mlx_realign.direction"])
        assert sorted(file.keys()) == ["baseline.0", "direction.-1", "direction.0", "direction.1"]
    assert said["site"] == "block_output" and said["convention"] == "0-based block, output" and said["version"] == 1
    assert said["operator"] == "ablate" and said["strength_unit"] == "median_norm" and said["data_hash"] == "d4"


def test_units_norms_and_places_between_blocks_by_hand():
    one = Direction({2: np.array([3.0, 4.0]), 3: np.array([0.0, -2.0])})
    assert one.norm(2) == 5 and one.unit(2) == pytest.approx([0.6, 0.8]) and one.unit(2).dtype == np.float64
    assert one.at(2.5) == pytest.approx(np.array([0.3, -0.1]) / np.sqrt(0.1))
    with pytest.raises(UserError, match="no block 4; it has 2 to 3"):
        one.norm(4)
    with pytest.raises(UserError, match="no unit vector: it is zero"):
        Direction({0: np.zeros(3)}).unit(0)


def test_arithmetic_by_hand():
    one = Direction({1: np.array([1.0, 2.0]), 2: np.array([1.0, 0.0])}, median_norm={1: 3.0})
    other = Direction({2: np.array([0.5, 1.0]), 3: np.array([4.0, 4.0])}, median_norm={1: 9.0, 3: 7.0})
    plain = lambda d: {block: vector.tolist() for block, vector in d.vectors.items()}  # noqa: E731
    assert plain(one + other) == {1: [1, 2], 2: [1.5, 1], 3: [4, 4]}
    assert plain(one - other) == {1: [1, 2], 2: [0.5, -1], 3: [-4, -4]}
    assert plain(2 * one) == plain(one * 2) == plain(np.float64(2) * one) == {1: [2, 4], 2: [2, 0]}
    assert plain(-one / 2) == {1: [-0.5, -1], 2: [-0.5, 0]}
    assert (one + other).median_norm == {1: 3.0, 3: 7.0}
    assert plain(sum([one, other, one])) == {1: [2, 4], 2: [2.5, 1], 3: [4, 4]}  # pyright: ignore
    assert (-one / 2).about.scale == -0.5 and (one + one).about.scale == 1
    with pytest.raises(TypeError):
        _ = one * other  # pyright: ignore


def test_arithmetic_keeps_no_measurement_of_its_operands():
    given = make(dataclasses.replace(ABOUT, base_hash="aa"))
    for made in (-given, given * 2, given + given, given - given * 3):
        assert made.about.coefficient is None and made.about.measured == {}
        assert made.about.operator == "ablate" and made.about.base_hash == "aa"
    assert list((2 * given).baseline) == [0] and (given + given).baseline == {}
    both = given + Direction(given.vectors, About(method="pca", data_hash="e5", blocks=(0,)))
    assert both.about.method == "lda + pca" and both.about.data_hash == "d4+e5" and both.about.blocks == (0, 1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(width=32), "different models cannot be added: tiny .width 64. and tiny .width 32."),
        (make(dataclasses.replace(ABOUT, base_hash="bb")), "different models cannot be added"),
        (make(dataclasses.replace(ABOUT, site="mlp_output")), "different places"),
    ],
)
def test_directions_of_different_models_or_places_are_not_added(other: Direction, message: str):
    with pytest.raises(UserError, match=message):
        _ = make(dataclasses.replace(ABOUT, base_hash="aa")) + other


def test_vectors_that_are_none_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Direction({})
    with pytest.raises(ValueError, match="must all be"):
        Direction({0: np.zeros(3), 1: np.zeros(4)})
    with pytest.raises(UserError, match="block 1 is not finite"):
        Direction({0: np.zeros(3), 1: np.array([0, np.nan, 0])})


# ------------------------------------------------------------------ files that do not fit


def test_a_direction_fits_the_model_that_it_was_made_on(tmp_path: Path):
    policy = make_policy("llama")  # its adapter is not part of the base
    save(make(dataclasses.replace(ABOUT, base_hash=policy.base_hash)), tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors", policy=policy).about.base_model == "tiny"
    other = make_policy("llama")
    layers: Any = other.model.layers
    layers[1].mlp.down_proj.linear.weight *= 1.5
    with pytest.raises(UserError, match=r"a\.safetensors: made on tiny, and tiny has other weights .*--force"):
        load(tmp_path / "a.safetensors", policy=other)
    assert load(tmp_path / "a.safetensors", policy=other, force=True).width == 64


def test_the_base_is_known_by_its_files_at_any_dtype(tiny_model_dir: Path):
    ways: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"quantize": 4}]
    ways += [{"quantize": 4, "cpu_dequantize": "never"}, {"quantize": 8}]
    found = [Policy.load(str(tiny_model_dir), **options).base_hash for options in ways]
    assert found[0] == found[1] and found[2] == found[3] and len(set(found)) == 3


def test_no_force_fits_another_width_or_more_blocks(tmp_path: Path):
    policy = make_policy("llama", rank=0)
    save(make(width=32), tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match="is 64 wide, not 32"):
        load(tmp_path / "narrow.safetensors", policy=policy, force=True)
    save(make(blocks=(0, 1, 2)), tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match="blocks 0 to 1, no block 2"):
        load(tmp_path / "deep.safetensors", policy=policy, force=True)


def test_the_width_is_known_without_a_head():
    policy = make_policy("llama4_text", rank=0)  # multiplies by its embedding's weight: no module is the head
    with pytest.raises(UserError, match="no block 2"):
        vectors.check(make(blocks=(0, 2)), policy, "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format is version 2, and 1 is read here"),
        ({"site": "mlp_output"}, "its site is 'mlp_output', only 'block_output'"),
        ({"convention": "1-based"}, "its convention is '1-based'"),
        ({"strength": 1}, "unknown field 'strength'"),
        ({"blocks": None}, "broken"),
        ({"median_norm": {"a": 1}}, "broken"),
    ],
)
def test_headers_that_would_be_misread_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    said = json.loads(vectors.header(make())) | change
    path = tmp_path / "a.safetensors"
    save_file({"direction.0": np.ones(4, np.float32)}, path, metadata={vectors.HEADER: json.dumps(said)})
    with pytest.raises(UserError, match=message):
        load(path)


def test_files_that_are_no_direction_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "a.safetensors")
    save_file({"lora_a": np.ones(4, np.float32)}, tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match="not a direction"):
        load(tmp_path / "adapter.safetensors")
    save(make(), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load(tmp_path / "cut.safetensors")
    save_file({}, tmp_path / "empty.safetensors", metadata={vectors.HEADER: vectors.header(make())})
    with pytest.raises(UserError, match="broken .*at least one block"):
        load(tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="ends in .safetensors"):
        save(make(), tmp_path / "a.npz")


def test_blocks_in_words():
    assert vectors.spans([-1, 0, 1, 4, 6, 7]) == "-1 to 1, 4, 6 to 7"
