# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is whole or absent, comes back bit for bit, and a full disk costs nothing that was written before."""

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_realign import adapter, checkpoint, optim
from mlx_realign.config import TrainSettings
from mlx_realign.errors import UserError


@pytest.fixture
def model(tiny_model) -> nn.Module:
    """A tiny llama with a fresh adapter."""
    model = tiny_model("llama")
    adapter.attach(model, rank=2, alpha=4.0)
    return model


@pytest.fixture
def updater(model) -> optim.Updater:
    return optim.Updater(TrainSettings(), model.trainable_parameters())


def write(root: Path, step: int, model: nn.Module, updater: optim.Updater, **state: object) -> Path:
    folder = root / f"step-{step:06d}"
    checkpoint.save(folder, model, updater, {"step": step, **state}, base_model="tiny")
    return folder


def stir(model: nn.Module, updater: optim.Updater, seed: int) -> None:
    """One optimizer step along random gradients."""
    grads = {k: mx.random.normal(v.shape, key=mx.random.key(seed)) for k, v in adapter.state(model).items()}
    packed, _ = updater.clip(optim.tree_unflatten(list(grads.items())), mx.array(1.0))
    updater.update(model, packed, 1e-2)


def everything(model: nn.Module, updater: optim.Updater) -> dict[str, mx.array]:
    return optim.flat(model.parameters()) | {f"optimizer/{k}": v for k, v in updater.state().items()}


def equal(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)


def test_what_was_saved_comes_back_bit_for_bit(model, updater, tmp_path):
    stir(model, updater, 1)
    saved = everything(model, updater)
    folder = write(tmp_path, 7, model, updater, best=[0.1 + 0.2, 3])
    stir(model, updater, 2)
    assert not equal(everything(model, updater), saved)
    checkpoint.restore(folder, model, updater)
    assert equal(everything(model, updater), saved)
    state = checkpoint.read_state(folder)
    assert (state["step"], state["best"]) == (7, [0.30000000000000004, 3])


def test_a_checkpoint_is_an_adapter_folder(model, updater, tiny_model, tmp_path):
    stir(model, updater, 1)
    fresh = tiny_model("llama")
    adapter.load(fresh, write(tmp_path, 1, model, updater))
    assert equal(adapter.state(fresh), adapter.state(model))


def test_full_weights_come_back_too(tiny_model, tmp_path):
    model = tiny_model("llama")
    updater = optim.Updater(TrainSettings(optimizer="adafactor"), model.trainable_parameters())
    folder = write(tmp_path, 1, model, updater)
    assert (folder / "weights.safetensors").exists() and not (folder / "adapters.safetensors").exists()
    other = tiny_model("llama", seed=1)
    assert not equal(optim.flat(other.parameters()), optim.flat(model.parameters()))
    checkpoint.restore(folder, other, updater)
    assert equal(optim.flat(other.parameters()), optim.flat(model.parameters()))


def test_the_newest_is_the_one_of_the_highest_step_and_half_written_ones_do_not_count(model, updater, tmp_path):
    assert checkpoint.newest(tmp_path / "nothing") is None
    for step in (9, 1_000_000, 10):
        write(tmp_path, step, model, updater)
    (tmp_path / ".step-2000000.tmp").mkdir()
    (tmp_path / "step-by-step").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "step-1000000"


def test_pruning_keeps_the_newest_and_the_best(model, updater, tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step, model, updater)
    (tmp_path / ".step-000011.tmp").mkdir()
    checkpoint.prune(tmp_path, keep=2, best=tmp_path / "step-000001")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003", "step-000010"]


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors", "adapter_config.json", "state.json"])
def test_damage_is_named(model, updater, tmp_path, name):
    folder = write(tmp_path, 1, model, updater)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"step-000001 is damaged .*{name}.*delete that folder"):
        checkpoint.read_state(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        checkpoint.read_state(folder)


@pytest.mark.parametrize(("name", "at"), [("optimizer.safetensors", b""), ("state.json", b'"step": ')])
def test_one_flipped_bit_is_damage(model, updater, tmp_path, name, at):
    folder = write(tmp_path, 1, model, updater)
    content = bytearray((folder / name).read_bytes())
    content[content.index(at) + len(at) if at else -1] ^= 1  # step 1 becomes step 0
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        checkpoint.read_state(folder)


def test_a_checkpoint_of_another_adapter_is_refused(model, updater, tiny_model, tmp_path):
    folder = write(tmp_path, 1, model, updater)
    other = tiny_model("llama")
    adapter.attach(other, rank=3, alpha=4.0)
    with pytest.raises(UserError, match="another model or adapter"):
        checkpoint.restore(folder, other, None)


def test_a_file_that_is_shorter_than_it_says_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.write_arrays(path, {"x": mx.zeros((100,))})
    checkpoint.prove_whole(path)
    for size in (path.stat().st_size - 1, 20, 3):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(OSError, match=f"x.safetensors has {size} bytes"):
            checkpoint.prove_whole(path)


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from conftest import build_model
from mlx_realign import adapter, checkpoint, optim
from mlx_realign.config import TrainSettings

model = build_model("llama")
adapter.attach(model, rank=2, alpha=4.0)
updater = optim.Updater(TrainSettings(), model.trainable_parameters())
root = Path(sys.argv[1])
save = lambda step: checkpoint.save(root / f"step-{step}", model, updater, {"step": step}, base_model="tiny")
save(1)
for limit in map(int, sys.argv[2:]):  # no file may grow beyond: the arrays, or the text, do not fit
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(2)
    except checkpoint.DiskFull as full:
        print(full)
"""


def test_a_disk_that_takes_no_more_costs_only_the_new_checkpoint(tmp_path):
    """A real limit of the system on how large a file may grow: MLX's writer and Python's both run into it."""
    limits = (30_000, 1000, 100, 0)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), *map(str, limits)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == len(limits)
    assert all(line.startswith(f"{tmp_path / 'step-2'} cannot be written: ") for line in told)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.read_state(tmp_path / "step-1")["step"] == 1


def test_the_message_says_when_the_disk_is_full(tmp_path):
    full = checkpoint.cannot_write(tmp_path / "a" / "b", OSError(errno.ENOSPC, "No space left on device"))
    assert full.startswith(f"{tmp_path / 'a' / 'b'} cannot be written: the disk is full (")
    other = checkpoint.cannot_write(tmp_path, OSError(errno.EROFS, "Read-only file system"))
    assert other == f"{tmp_path} cannot be written: [Errno {errno.EROFS}] Read-only file system"


def test_text_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "config.json"
    checkpoint.write_atomically(path, json.dumps({"a": 1}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        with pytest.raises(checkpoint.DiskFull, match="config.json cannot be written"):
            checkpoint.write_atomically(path, json.dumps({"a": 2}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
