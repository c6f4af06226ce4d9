# SPDX-License-Identifier: Apache-2.0
"""Control vectors against the GGUF specification, byte by byte: a reader and a writer made from it and nothing else."""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_tools import make_policy

from mlx_realign import gguf_vectors, vectors
from mlx_realign.errors import UserError
from mlx_realign.vectors import About, Direction

UINT32, STRING, F32, F16 = 4, 8, 0, 1  # types of metadata values, types of tensors


def parse(path: Path) -> tuple[dict[str, tuple[int, Any]], dict[str, tuple[int, list[int], np.ndarray]]]:
    """Key -> (type, value) and tensor -> (type, dimensions, float32 data) of a GGUF file of version 3."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    assert take("4s") == b"GGUF" and take("I") == 3
    tensors, keys = take("Q"), take("Q")
    facts: dict[str, tuple[int, Any]] = {}
    for _ in range(keys):
        name, kind = text(), take("I")
        facts[name] = (kind, text() if kind == STRING else take("I"))
        assert kind in (STRING, UINT32)
    listed = []
    for _ in range(tensors):
        name, dimensions = text(), [take("Q") for _ in range(take("I"))]
        listed.append((name, dimensions, take("I"), take("Q")))
    alignment = facts.get("general.alignment", (UINT32, 32))[1]
    start = -(-at // alignment) * alignment
    found = {}
    for name, dimensions, kind, offset in listed:
        assert offset % alignment == 0
        found[name] = (kind, dimensions, np.frombuffer(data, "<f4", int(np.prod(dimensions)), start + offset))
    return facts, found


def compose(path: Path, tensors: dict[str, np.ndarray], facts: dict[str, Any]) -> Path:
    """A GGUF file of version 3, as another program would write it; facts are texts, numbers, or bytes as they are."""
    said = lambda text: struct.pack("<Q", len(text)) + text.encode()  # noqa: E731
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    for key, value in facts.items():
        out += said(key)
        if isinstance(value, bytes):
            out += value
            continue
        out += struct.pack("<I", STRING) + said(value) if isinstance(value, str) else struct.pack("<II", UINT32, value)
    offset, body = 0, b""
    for name, array in tensors.items():
        kind = F32 if array.dtype == np.float32 else F16
        out += said(name) + struct.pack(f"<I{array.ndim}Q", array.ndim, *array.shape[::-1])
        out += struct.pack("<IQ", kind, offset)
        content = array.tobytes()
        body += content + b"\0" * (-len(content) % 32)
        offset = len(body)
    path.write_bytes(out + b"\0" * (-len(out) % 32) + body)
    return path


def make(about: About | None = None, width: int = 64, **rest: Any) -> Direction:
    rng = np.random.default_rng(0)
    return Direction({block: rng.standard_normal(width) for block in (-1, 0, 1, 2)}, about or About(), **rest)


def test_what_is_written_is_a_control_vector_by_the_specification(tmp_path: Path):
    given = make(About(coefficient=2.0))
    assert gguf_vectors.write(given, tmp_path / "a.gguf", model_type="llama") == [1, 2]
    facts, tensors = parse(tmp_path / "a.gguf")
    assert facts["general.architecture"] == (STRING, "controlvector")
    assert facts["controlvector.model_hint"] == (STRING, "llama")
    assert facts["controlvector.layer_count"] == (UINT32, 2)
    assert set(tensors) == {"direction.1", "direction.2"}
    for block in (1, 2):
        kind, dimensions, values = tensors[f"direction.{block}"]
        assert kind == F32 and dimensions == [64]
        assert (values == 2 * given.vectors[block]).all()


def test_strength_1_there_is_the_coefficient_here(tmp_path: Path):
    given = make(About(strength_unit="median_norm"), median_norm={1: 10.0, 2: 20.0})
    gguf_vectors.write(given, tmp_path / "a.gguf", model_type="llama", coefficient=0.3, blocks=[2])
    _, tensors = parse(tmp_path / "a.gguf")
    assert list(tensors) == ["direction.2"]
    assert np.linalg.norm(tensors["direction.2"][2]) == pytest.approx(6.0, rel=1e-6)
    with pytest.raises(UserError, match="block 2 lacks"):
        lacking = dataclasses.replace(given, median_norm={1: 10.0})
        gguf_vectors.write(lacking, tmp_path / "b.gguf", model_type="llama")


def test_ours_comes_back_with_all_that_its_header_says(tmp_path: Path):
    about = About(method="lda", coefficient=0.5, blocks=(2,), base_model="tiny", base_hash="ab", data_hash="cd")
    gguf_vectors.write(make(about, median_norm={1: 3.0, 2: 4.0}), tmp_path / "a.gguf", model_type="llama")
    back = vectors.load(tmp_path / "a.gguf")
    assert back.about == dataclasses.replace(about, coefficient=1.0)
    assert back.median_norm == {2: 4.0}
    assert (back.vectors[2] == np.float32(0.5) * make().vectors[2]).all() and back.blocks == [2]
    with pytest.raises(UserError, match="other weights"):
        vectors.load(tmp_path / "a.gguf", policy=make_policy("gemma3_text", rank=0))


def test_a_file_of_another_program_is_read(tmp_path: Path):
    given = {f"direction.{k}": np.full(8, k, np.float32) for k in (11, 2)}
    facts: dict[str, str | int] = {"general.architecture": "controlvector", "controlvector.model_hint": "mistral"}
    path = compose(tmp_path / "a.gguf", given, facts | {"controlvector.layer_count": 2})
    back = gguf_vectors.read(path)
    assert back.blocks == [2, 11] and (back.vectors[11] == 11).all() and back.width == 8
    assert back.about == About(
        method="unknown", position="unknown", coefficient=1.0, measured={"model_hint": "mistral"}
    )


def test_arrays_in_arrays_are_passed_over(tmp_path: Path):
    pair = struct.pack("<IQ2i", 5, 2, 7, 8)  # int32
    words = struct.pack("<IQQ", STRING, 1, 3) + b"abc"
    given = {"direction.1": np.ones(8, np.float32)}
    facts = {"general.architecture": "controlvector", "x": struct.pack("<IIQ", 9, 9, 2) + pair + words}
    assert gguf_vectors.read(compose(tmp_path / "a.gguf", given, facts)).blocks == [1]
    deep = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000 + pair
    with pytest.raises(UserError, match="deep"):
        gguf_vectors.read(compose(tmp_path / "b.gguf", given, facts | {"x": deep}))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"token_embd.weight": np.ones(8, np.float32)}, "no control vector .it is: llama"),
        ({"direction.0": np.ones(8, np.float32)}, "direction.0 .8. is not a vector of a block from 1 on"),
        ({"direction.x": np.ones(8, np.float32)}, "direction.x"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "direction.1 .2, 4. is not"),
        ({"direction.1": np.ones(8, np.float32), "direction.2": np.ones(4, np.float32)}, "must all be"),
    ],
)
def test_files_that_llama_cpp_would_refuse_are_refused(tmp_path: Path, tensors: dict, message: str):
    path = compose(tmp_path / "a.gguf", tensors, {"general.architecture": "llama"})
    with pytest.raises(UserError, match=message):
        gguf_vectors.read(path)


def test_files_that_are_no_gguf_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        gguf_vectors.read(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"no")
    with pytest.raises(UserError, match="not a complete GGUF file"):
        gguf_vectors.read(tmp_path / "a.gguf")


@pytest.mark.parametrize("about", [About(operator="ablate"), About(positions="generated")])
def test_what_cannot_be_said_there_is_refused(tmp_path: Path, about: About):
    with pytest.raises(UserError, match="is added at all positions, and this direction is meant for"):
        gguf_vectors.write(make(about), tmp_path / "a.gguf", model_type="llama")
    assert not (tmp_path / "a.gguf").exists()
    assert gguf_vectors.write(make(about), tmp_path / "a.gguf", model_type="llama", force=True) == [1, 2]


def test_blocks_that_cannot_be_said_there_are_refused(tmp_path: Path):
    def write(direction: Direction, blocks: list[int] | None = None, name: str = "a.gguf") -> None:
        gguf_vectors.write(direction, tmp_path / name, model_type="llama", blocks=blocks)

    with pytest.raises(UserError, match="cannot say block 0"):
        write(make(), [0, 1])
    with pytest.raises(UserError, match="cannot say block -1"):
        write(make(About(blocks=(-1,))))
    with pytest.raises(UserError, match="cannot say any of the blocks -1 to 0"):
        write(Direction({-1: np.ones(4), 0: np.ones(4)}))
    with pytest.raises(UserError, match="no block 5; it has -1 to 2"):
        write(make(), [5])
    with pytest.raises(UserError, match="ends in .gguf"):
        write(make(), name="a.bin")
