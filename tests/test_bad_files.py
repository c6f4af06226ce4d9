# SPDX-License-Identifier: Apache-2.0
"""Files from elsewhere: whatever is in them, one message, soon, and the process lives."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from train_tools import launch, pair_rows, write_rows

from mlx_realign import adapter_patterns, checkpoint
from mlx_realign.errors import UserError

sys.path.insert(0, str(Path(__file__).parent / "reliability"))
import bad_files  # noqa: E402  # pyright: ignore[reportMissingImports]


def test_no_damaged_or_hostile_file_does_more_than_a_message(capsys: pytest.CaptureFixture):
    """The whole table, and files damaged by chance, each of them made here; in one process, that none of them ends."""
    assert bad_files.main(["--random", "30"]) == 0, capsys.readouterr().out


def test_patterns_mean_what_peft_means_by_them():
    """re.match(rf"(.*\\.)?({key})$", path) of PEFT 0.17's get_pattern_key, the first key that matches."""
    paths = ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    match = lambda *patterns: adapter_patterns.first_match(Path("c"), "rank_pattern", patterns, paths)  # noqa: E731
    assert match("q_proj") == {paths[0]: "q_proj", paths[1]: "q_proj"}
    assert match("proj") == {}
    assert match("^model.layers.1.self_attn.q_proj", "q_proj")[paths[1]] == "q_proj"
    assert match(r"layers\.1\..*", "q_proj") == {p: r"layers\.1\..*" if p != paths[1] else "q_proj" for p in paths}
    assert match(r"layers.(0|1).mlp\.\w+") == {paths[2]: r"layers.(0|1).mlp\.\w+"}


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """Folder and data of a run that was stopped after 2 of 3 steps, and its metrics."""
    root = tmp_path_factory.mktemp("run")
    rows = write_rows(root / "rows.jsonl", pair_rows(6))
    done = launch(root / "out", tiny_model_dir, rows, "--steps", 3, "--save-every", 1, "--keep", 9)
    (done.folder / "adapters.safetensors").unlink()
    return done.folder, rows, (done.folder / "metrics.jsonl").read_bytes()


def changed(step: Path, file: str, change: Any) -> None:
    """A checkpoint whose arrays are changed, its checksums true all the same."""
    arrays: Any = mx.load(str(step / file))
    mx.eval(arrays)
    (step / file).unlink()
    mx.save_safetensors(str(step / file), change(dict(arrays)))


def seal(step: Path, replaced: dict[str, Any]) -> None:
    """state.json with other values and true checksums."""
    state = json.loads((step / "state.json").read_text()) | replaced
    state.pop("checksum")
    state["files"] |= {n: checkpoint._checksum(step / n) for n in state["files"] if (step / n).is_file()}
    (step / "state.json").write_text(json.dumps(state | {"checksum": checkpoint._own_checksum(state)}))


ADAPTER, MOMENTS = "adapters.safetensors", "optimizer.safetensors"
FOREIGN = {
    "other names": (ADAPTER, lambda a: {f"x.{k}": v for k, v in a.items()}, "of another model or adapter"),
    "one more": (ADAPTER, lambda a: a | {"model.embed_tokens.weight": mx.zeros((4, 4))}, "of another model or adapter"),
    "other shapes": (ADAPTER, lambda a: {k: v[:, :1] for k, v in a.items()}, "of another model or adapter"),
    "other dtypes": (ADAPTER, lambda a: {k: v.astype(mx.float16) for k, v in a.items()}, "of another model or adapter"),
    "NaN": (ADAPTER, lambda a: {k: v * float("nan") for k, v in a.items()}, "other than finite numbers in"),
    "another optimizer": (MOMENTS, lambda a: {"step": a["step"]}, "of another optimizer or adapter"),
    "moments of other shapes": (MOMENTS, lambda a: {k: v[:1] if v.ndim else v for k, v in a.items()}, "of another opt"),
}
STATES = {
    "a step beyond the run": ({"step": 400}, "it says that it is of step 400"),
    "a step before the run": ({"step": -1}, "it says that it is of step -1"),
    "no step": ({"step": None}, "is damaged"),
    "no tokens": ({"tokens": None, "norms": 3}, "is not what this version writes"),
    "a file of another folder": ({"files": {"../../rows.jsonl": "0" * 32}}, "is damaged"),
    "a device": ({"files": {"/dev/zero": "0" * 32}}, "is damaged"),
}


@pytest.mark.parametrize("name", [*FOREIGN, *STATES])
def test_a_foreign_checkpoint_is_one_message_and_nothing_is_lost(run: Any, tiny_model_dir: Path, name: str):
    folder, rows, metrics = run
    step = folder / "checkpoints" / "step-000002"
    newest = folder / "checkpoints" / "step-000003"
    if newest.exists():  # so that rows of metrics.jsonl stand behind the checkpoint
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
    before = {file: file.read_bytes() for file in step.iterdir()}
    try:
        if name in FOREIGN:
            file, change, told = FOREIGN[name]
            changed(step, file, change)
            seal(step, {})
        else:
            replaced, told = STATES[name]
            seal(step, replaced)
        with pytest.raises(UserError, match="^--resume: ") as caught:
            launch(folder, tiny_model_dir, rows, "--steps", 3, "--save-every", 1, "--keep", 9, "--resume")
        assert told in str(caught.value)
        assert (folder / "metrics.jsonl").read_bytes() == metrics
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def test_a_checkpoint_beyond_the_run_is_refused(run: Any, tmp_path: Path):
    state = {"step": 4}
    with (
        pytest.raises(UserError, match="is of step 4, and this run ends with 3"),
        checkpoint.within(tmp_path, state, 3),
    ):
        raise AssertionError
