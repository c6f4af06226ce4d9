# SPDX-License-Identifier: Apache-2.0
"""Settings: recipe < flags, one message per mistake, names the same in Python, TOML and on the command line."""

import dataclasses
from pathlib import Path

import pytest

from mlx_realign import config, flags, methods
from mlx_realign.config import TrainSettings
from mlx_realign.errors import UserError

NEEDED = ["--model", "m", "--data", "d"]


def parse(*words: str) -> config.Run:
    return config.parse(["--method", "dpo", *NEEDED, *words])


def message(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        config.parse(list(words))
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path):
    """recipe("beta = 0.2") writes a valid recipe with these lines from line 4 on and returns its path."""

    def write(*lines: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text("\n".join(['method = "dpo"', 'model = "m"', 'data = "d"', *lines]))
        return str(path)

    return write


def test_flags_override_the_recipe_and_the_recipe_the_defaults(recipe):
    path = recipe("beta = 0.2", "batch_size = 2", "learning_rate = 1e-4", "chat_template = false")
    run = config.parse(["--config", path, "--beta", "0.3", "--lora-rank=4"])
    assert (run.method, run.config.beta, run.config.label_smoothing) == ("dpo", 0.3, 0.0)
    assert (run.settings.batch_size, run.settings.learning_rate, run.settings.lora_rank) == (2, 1e-4, 4)
    assert run.settings.chat_template is False
    assert run.settings.keep == TrainSettings().keep


def test_the_method_flag_overrides_the_recipe_method(recipe):
    assert config.parse(["--config", recipe(), "--method=sft"]).method == "sft"


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--no-shuffle"], "shuffle", False),
        (["--no-chat-template"], "chat_template", False),
        (["--dora"], "dora", True),
        (["--dora", "--no-dora"], "dora", False),
        (["--quantize", "4"], "quantize", 4),
        (["--quantize", "none"], "quantize", None),
        (["--lora-layers", "-1"], "lora_layers", -1),
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--epochs=0.5"], "epochs", 0.5),
        (["--lora-targets", "q_proj,v_proj"], "lora_targets", "q_proj,v_proj"),
    ],
)
def test_every_kind_of_flag(words, field, value):
    assert getattr(parse(*words).settings, field) == value


def test_every_field_of_every_method_is_a_flag_with_help(capsys):
    for method in methods.names():
        with pytest.raises(SystemExit) as caught:
            config.parse(["--method", method, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        own = methods.find(method).Config
        shared = {field.name for field in dataclasses.fields(TrainSettings)}
        assert not shared & {field.name for field in dataclasses.fields(own)}, f"{method} repeats a shared setting"
        for field in (*flags.fields_of(TrainSettings).values(), *flags.fields_of(own).values()):
            assert field.doc, f"{field.name} has no help"
            assert field.flag in text or f"--no-{field.flag[2:]}" in text


def test_steps_and_epochs_are_one_choice_and_the_flag_wins(recipe):
    assert "--steps and --epochs both" in message("--method", "dpo", *NEEDED, "--steps", "3", "--epochs", "2")
    assert "steps and epochs both" in message("--config", recipe("steps = 3", "epochs = 2"))
    run = config.parse(["--config", recipe("steps = 3"), "--epochs", "2"])
    assert (run.settings.steps, run.settings.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lerning-rate", "3"], "unknown flag --lerning-rate. Did you mean --learning-rate?"),
        (["--lable-smoothing", "3"], "Did you mean --label-smoothing?"),
        (["--no-beta"], "unknown flag --no-beta."),
        (["--batch-size", "x"], "--batch-size: expected a whole number, got 'x'."),
        (["--batch-size", "1.5"], "--batch-size: expected a whole number, got '1.5'."),
        (["--batch-size"], "--batch-size needs a value: a whole number."),
        (["--learning-rate", "--dora"], "--learning-rate needs a value: a number."),
        (["--dora=yes"], "--dora takes no value"),
        (["--optimizer", "adafctor"], "got 'adafctor'. Did you mean adafactor?"),
        (["--quantize", "3"], "--quantize: expected one of 4, 8, got '3'."),
        (["rows.jsonl"], "unexpected argument 'rows.jsonl'"),
        (["--method", "dop"], "--method dop"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: no such file"),
        (["--batch-size", "0"], "--batch-size must be above 0, got 0."),
        (["--learning-rate", "nan"], "--learning-rate must be above 0, got nan."),
        (["--learning-rate", "1e9"], "--learning-rate must be 1 or less (with adamw"),
        (["--lora-dropout", "1"], "--lora-dropout must be at least 0 and below 1, got 1.0."),
        (["--lora-layers", "0"], "--lora-layers must be -1 (all blocks)"),
        (["--max-length", "1"], "--max-length must be at least 2"),
        (["--full", "--quantize", "4"], "does not go with --quantize"),
        (["--model="], "--model is needed"),
    ],
)
def test_a_wrong_flag_gets_one_message_that_names_it(words, expected):
    text = message("--method", "dpo", *NEEDED, *words)
    assert expected in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("betta = 0.2", "line 5: betta: unknown key. Did you mean beta?"),
        ("batch-size = 2", "line 5: batch-size: unknown key. Did you mean batch_size?"),
        ('batch_size = "2x"', "line 5: batch_size: expected a whole number, got '2x'."),
        ("batch_size = 2.5", "line 5: batch_size: expected a whole number, got 2.5."),
        ("dora = 1", "line 5: dora: expected true or false, got 1."),
        ("model_name = true", "unknown key"),
        ("optimizer = true", "optimizer: expected one of adamw"),
        ("[lora]\nrank = 4", "line 5: lora: recipes are flat"),
        ("beta =\nkeep = 1", "Invalid value (at line 5"),
        ("lora_rank = -1", "--lora-rank must be above 0, got -1."),
    ],
)
def test_a_wrong_recipe_gets_one_message_that_names_file_and_line(recipe, line, expected):
    path = recipe("seed = 1", line)
    text = message("--config", path)
    assert expected in text
    assert path in text or text.startswith("--")


def test_every_recipe_in_the_package_is_found_by_its_name_and_parses():
    recipes = sorted((Path(config.__file__).parent / "recipes").glob("*.toml"))
    assert {"sft", "dpo"} <= {path.stem for path in recipes}
    for path in recipes:
        run = config.parse(["--config", path.stem, *NEEDED])
        assert run == config.parse(["--config", str(path), *NEEDED])
        comments = [line for line in path.read_text().splitlines() if "#" in line]
        assert len(comments) >= 5, f"{path} does not say why"


def test_no_method_lists_the_methods():
    assert message(*NEEDED) == f"--method is needed: one of {', '.join(methods.names())}."
    assert {"dpo", "sft"} <= set(methods.names())


def test_a_library_call_is_checked_like_a_command_line():
    run = config.build("dpo", {"model": "m", "data": "d", "beta": 1, "lora_rank": 4})
    assert run == parse("--beta", "1.0", "--lora-rank", "4")
    with pytest.raises(UserError, match="lora_rnk: unknown key. Did you mean lora_rank"):
        config.build("dpo", {"model": "m", "data": "d", "lora_rnk": 4})


@dataclasses.dataclass(frozen=True)
class _Tool:
    file: str
    """What to read."""
    weights: tuple[float, ...] = (1.0,)
    """One per part."""
    loss_type: tuple[str, ...] = ("sigmoid",)


def test_a_command_reads_places_lists_and_defaults():
    def tool(*words: str) -> _Tool:
        return flags.parse(_Tool, words, prog="tool", doc="Reads.", positional=["file"])

    assert tool("rows.jsonl") == _Tool("rows.jsonl")
    assert tool("--weights", "1,0.5", "rows.jsonl", "--loss-type=a,b") == _Tool("rows.jsonl", (1.0, 0.5), ("a", "b"))
    assert tool("--weights", "-1", "-").weights == (-1.0,)
    with pytest.raises(UserError, match="unknown flag -m."):
        tool("rows.jsonl", "-m", "3")
    with pytest.raises(UserError, match="tool needs FILE: What to read."):
        tool()
    with pytest.raises(UserError, match="--weights: expected a comma-separated list, each a number, got '1,x'"):
        tool("a", "--weights", "1,x")
    with pytest.raises(UserError, match="unexpected argument 'b'"):
        tool("a", "b")
