# SPDX-License-Identifier: Apache-2.0
"""The command line: commands by file name, exit codes, and one message for each of the usual mistakes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_realign import cli

ROOT = Path(__file__).parent.parent
PAIR = {"prompt": "Say hi", "chosen": "Hi!", "rejected": "No."}

Outcome = tuple[int, str, str]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """command("train", "--steps", 1) -> (exit code, standard output, standard error), in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        try:
            code = cli.entry([str(word) for word in words])
        except SystemExit as exit:  # --help
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """rows(PAIR, "not json") writes a file of JSON lines (strings as they are)."""

    def write(*lines: object) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def train(command, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """train(data, *flags): DPO on the tiny model; a later flag of the same name wins."""

    def run(data: object, *words: object) -> Outcome:
        start = ["train", "--method", "dpo", "--model", tiny_model_dir, "--data", data, "--output", tmp_path / "out"]
        return command(*start, "--steps", 1, "--batch-size", 1, *words)

    return run


def refused(outcome: Outcome, *parts: str) -> str:
    """The one message of an outcome with exit code 2."""
    code, _, err = outcome
    assert code == 2, err
    assert err.startswith("error: ") and err.count("error: ") == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in err
    return err


def test_help_lists_every_command_with_the_first_line_of_its_file(command):
    code, out, _ = command("--help")
    assert code == 0
    for name in ("data", "generate", "train", "export", "demo"):
        assert f"\n  {name} " in out
    assert command()[:2] == (code, out)
    for name, (_, doc) in cli.commands().items():
        assert doc.endswith((".", ":")), f"the file of {name} needs a one-line summary"


def test_each_command_explains_itself(command):
    for name in cli.commands():
        code, out, _ = command(name, "--help")
        assert code == 0
        assert f"mlx-realign {name}" in out


def test_version_names_what_numbers_depend_on(command):
    code, out, _ = command("--version")
    assert code == 0
    assert [part.split()[0] for part in out.splitlines()[0].split(", ")] == ["mlx-realign", "mlx", "mlx-lm"]


def test_an_unknown_command_gets_the_nearest(command):
    refused(command("trian"), "no command 'trian'. Did you mean train?")


def test_module_and_console_script_are_the_same_command():
    for start in (["-m", "mlx_realign", "generate"], ["-m", "mlx_realign.generate"]):
        done = subprocess.run(
            [sys.executable, *start, "--modle", "x"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: unknown flag --modle. Did you mean --model? --help lists them all.\n"


def test_help_says_nothing_on_standard_error():
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    words = [sys.executable, "-m", "mlx_realign", "data", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # where transformers comes before mlx-lm it gives advice


def test_interrupt_exits_130_and_a_closed_pipe_is_no_fault(capsys):
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt(*words)

    assert cli.run(interrupted, []) == 130 == cli.run(interrupted, ["stopped: 4 trials are kept"])
    assert capsys.readouterr().err == "interrupted\nstopped: 4 trials are kept\n"


# ------------------------------------------------- the twelve usual mistakes: exit code 2, one message, no traceback


def test_missing_file(train, tmp_path):
    refused(train(tmp_path / "nowhere.jsonl"), "nowhere.jsonl", "no such file")


def test_empty_file(train, rows):
    refused(train(rows()), "rows.jsonl", "empty")


def test_invalid_json_names_the_line(train, rows):
    refused(train(rows(*[PAIR] * 6, '{"prompt": "Say hi", "chosen":', PAIR)), "rows.jsonl", "line 7", "JSON")


def test_wrong_keys_are_told_with_the_accepted_ones(train, rows):
    refused(train(rows({"question": "Say hi", "answer": "Hi!"})), "line 1", "question", "chosen", "rejected")


def test_chosen_equal_to_rejected(train, rows):
    refused(train(rows(PAIR, {**PAIR, "rejected": "Hi!"})), "line 2", "chosen", "rejected", "same")


def test_empty_completion(train, rows):
    refused(train(rows(PAIR, PAIR, {**PAIR, "chosen": ""})), "line 3", "chosen", "empty")


def test_too_long_without_truncate(train, rows):
    long = {**PAIR, "prompt": "word " * 100}
    refused(train(rows(PAIR, long), "--max-length", 64), "line 2", "max-length", "--truncate")
    assert train(rows(PAIR, long), "--max-length", 64, "--truncate", "left", "--dry-run")[0] == 0


def test_unknown_flag(train, rows):
    refused(train(rows(PAIR), "--lerning-rate", "1e-4"), "--lerning-rate", "--learning-rate")


def test_unknown_recipe_key(train, rows, tmp_path):
    recipe = tmp_path / "run.toml"
    recipe.write_text("# a comment\nlearning-rte = 1e-4\n")
    refused(train(rows(PAIR), "--config", recipe), "run.toml line 2", "learning-rte", "learning_rate")


def test_model_without_a_chat_template(train, rows, model_folder):
    talk = {"prompt": [{"role": "user", "content": "Say hi"}]}
    pair = talk | {name: [{"role": "assistant", "content": PAIR[name]}] for name in ("chosen", "rejected")}
    refused(train(rows(pair), "--model", model_folder("llama", chat_template=None)), "chat template")


def test_corrupt_adapter(train, rows, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    refused(train(rows(PAIR), "--adapter", adapter), str(adapter), "adapter_config.json")
    lora = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapters.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0 garbage")
    refused(train(rows(PAIR), "--adapter", adapter), str(adapter), "adapters.safetensors")


def test_corrupt_checkpoint(train, rows, tmp_path):
    assert train(rows(PAIR), "--save-every", 1)[0] == 0
    saved = sorted((tmp_path / "out" / "checkpoints").rglob("*.safetensors"))
    assert saved
    for path in saved:
        path.write_bytes(path.read_bytes()[:100])
    refused(train(rows(PAIR), "--resume", "--steps", 2), "checkpoints")


def test_a_disk_that_is_full_or_closed_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def full(_: list[str]) -> int:
        raise OSError(28, "No space left on device")

    def closed(_: list[str]) -> int:
        (tmp_path / "nowhere" / "file").write_text("x")
        return 0

    def broken(_: list[str]) -> int:
        raise OSError("a fault of ours")

    assert cli.run(full, []) == 1
    assert capsys.readouterr().err == "error: writing: No space left on device\n"
    assert cli.run(closed, []) == 1
    assert "nowhere/file: No such file" in capsys.readouterr().err
    with pytest.raises(OSError, match="a fault of ours"):
        cli.run(broken, [])
