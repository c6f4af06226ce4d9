# SPDX-License-Identifier: Apache-2.0
"""What the pages say is so: every command runs (training with --dry-run), every row is good, every name exists."""

import ast
import importlib
import io
import json
import re
import runpy
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from docs_tools import PAGES, ROOT, Block, Command, commands, every, name, sections, tables

from mlx_realign import cli, config, data, flags, losses, methods
from mlx_realign.data.validate import validate
from mlx_realign.methods import dpo
from mlx_realign.steering import pairs

GUIDE, SKILL = ROOT / "docs/training-methods.md", ROOT / ".claude/skills/training-methods.md"
COMMANDS = [command for page in PAGES for command in commands(page)]
ROWS = every("jsonl")
METHODS = [*methods.names(), *config.COMMANDS]
METHOD_PARTS = ("Purpose", "Data", "Use", "Not when", "Settings", "Watch", "Failure")
RUN_ELSEWHERE = ("git", "cd", "source")  # nothing of ours to test
FOREIGN_FLAGS = {"--help", "--adapter-path", "--group", "--check"}  # of other programs, or of every command
# What a run of these rows is told beside, so that its first step writes every metric it has.
TOLD = {"groups": ["--verifier", "exact", "--zero-variance", "keep", "--batch-size", "64", "--max-new-tokens", "4"]}


MADE: dict[tuple[str, ...], dict[Path, bytes]] = {}  # files that commands wrote, by their words


def place(item: Block | Command) -> str:
    return f"{item.page}:{item.line}"


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    """The stand-in for every model the pages name."""
    return model_folder("llama")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for every adapter the pages name."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["train", "--method", "sft", "--model", model, "--data", folder / "rows.jsonl", "--output", folder / "out"]
    assert cli.entry([str(word) for word in [*words, "--steps", 1]]) == 0
    return folder / "out"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every example file of the pages, and the rows of each method as a folder of splits."""
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for block in [*ROWS, *(block for block in every("text") if "file" in block.tags)]:
        with open(folder / block.tags["file"], "a") as file:
            file.write(block.text)
    for block in every("python"):
        if "file" in block.tags:
            (folder / block.tags["file"]).write_text(block.text)
    for method in methods.names():
        (folder / f"{method}-data").mkdir()
        for split in ("train", "valid"):
            rows = "".join(b.text for b in ROWS if b.tags["method"] == method and "refused" not in b.tags)
            (folder / f"{method}-data" / f"{split}.jsonl").write_text(rows)
    return folder


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("command", COMMANDS, ids=place)
def test_the_command_runs(command: Command, desk: Path, model: Path, adapter: Path, monkeypatch: Any, capsys: Any):
    program, *words = command.words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets
    elif words[:1] == ["install"] or words[:3] == ["-m", "pip", "install"]:
        check_install(words[-1])
    elif program == "python" and words[0].startswith(("benchmarks/", "docs/", "tests/")):
        source = (ROOT / words[0]).read_text()
        assert all(word in source for word in words[1:] if word.startswith("--"))
    elif program == "mlx_lm.generate":
        monkeypatch.setattr(sys, "argv", [program, *stand_in(words, model, adapter), "--max-tokens", "2"])
        importlib.import_module("mlx_lm.generate").main()
        assert "Generation:" in capsys.readouterr().out
    elif program not in RUN_ELSEWHERE:
        run_ours(command, model, adapter, monkeypatch, capsys)


def provide(command: Command, model: Path) -> None:
    """Run the commands above this one on its page that write the data and the directions it reads."""
    words = [word for word, before in zip(command.words, ["", *command.words], strict=False) if before != "--output"]
    own = [name.split(":")[0] for word in words for name in word.split(",")]
    for maker in COMMANDS:
        above = maker.page == command.page and maker.line < command.line
        makes = maker.words[1:2] == ["data"] or maker.words[1:3] in (["steer", "extract"], ["steer", "condition"])
        if above and makes and "--output" in maker.words:
            made = maker.words[maker.words.index("--output") + 1]
            if made in own and not Path(made).exists():
                provide(maker, model)
                words = tuple(str(model) if word == "tiny-chat" else word for word in maker.words[1:])
                if words not in MADE:  # once: commands of a page read what the same few make
                    before = set(Path().rglob("*"))
                    assert cli.entry([*words]) == 0
                    new = (path for path in set(Path().rglob("*")) - before if path.is_file())
                    MADE[words] = {path: path.read_bytes() for path in new}
                for path, content in MADE[words].items():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)


def run_ours(command: Command, model: Path, adapter: Path, monkeypatch: Any, capsys: Any) -> None:
    """A command of this package, in this process."""
    provide(command, model)
    program, *words = command.words
    if (program, words[0]) == ("python", "-m") and words[1].startswith("mlx_realign."):
        words = [words[1].removeprefix("mlx_realign."), *words[2:]]
    else:
        assert program == "mlx-realign", f"{place(command)}: what is {program}?"
    words = stand_in(words, model, adapter)
    dry = words[0] == "train" and not {"--dry-run", "--help", "steering"} & set(words)
    words += ["--dry-run"] if dry else []
    words += ["--max-new-tokens", "2"] if "generate" in words[:2] else []
    if words[0] == "demo":  # minutes of training, which the demo's own test does: here its flags
        demo = importlib.import_module("mlx_realign.demo")
        flags.parse(demo.Settings, words[1:], prog="demo", doc="")
        return
    if "--search" in words:
        pytest.importorskip("optuna")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    capsys.readouterr()
    try:
        code = cli.entry(words)
    except SystemExit as done:  # --help
        code = int(done.code or 0)
    out, err = capsys.readouterr()
    assert code == command.code, err
    if command.output is not None:
        assert out == command.output


def stand_in(words: list[str], model: Path, adapter: Path) -> list[str]:
    """Our tiny model for the one named, our adapter where one is named."""
    words = list(words)
    for i, word in enumerate(words[:-1]):
        follows = words[i + 1]
        if word == "--model" and "--search" not in words:  # a search needs a model that shows the behaviour
            words[i + 1] = str(model)
        if word == "--trials":
            words[i + 1] = "4"
        if word in ("--adapter", "--adapter-path") or (i, word) == (0, "export"):
            shutil.copytree(adapter, follows, dirs_exist_ok=True)
            if word == "export":
                words += ["--model", str(model)] if "--model" not in words else []
        if word == "--config" and (recipe := config.PACKAGE / "recipes" / f"{follows}.toml").is_file():
            if folder := tomllib.loads(recipe.read_text()).get("adapter"):
                shutil.copytree(adapter, folder, dirs_exist_ok=True)
    return words


def check_install(what: str) -> None:
    """`mlx-realign[cpu]`, `.[cpu]`: this project with extras it has."""
    package, extras = re.fullmatch(r"([\w.-]+?)(?:\[([\w,]+)\])?", what).groups()  # type: ignore[union-attr]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert package in (".", project["name"])
    assert set((extras or "").split(",")) - {""} <= set(project["optional-dependencies"])


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("block", ROWS, ids=place)
def test_every_example_row_is_good(block: Block, model: Path, tmp_path: Path):
    from mlx_lm.utils import load_tokenizer

    path = tmp_path / block.tags["file"]
    path.write_text(block.text)
    method = block.tags["method"]
    if method == "contrast":
        found = pairs.read(path, positive_label=block.tags.get("positive"))
        tokenizer = load_tokenizer(model)
        assert all(data.encode_prompt(prompt, tokenizer) for prompt in [*found.positive, *found.negative])
        return
    read_as = method if method in data.FORMATS else methods.find(method).FORMAT
    found = validate(path, read_as, tokenizer=load_tokenizer(model), max_length=1024)
    count = len(block.text.splitlines())
    if "refused" in block.tags:
        assert len(found["bad"]) == count
    else:
        assert (found["good"], found["bad"], found["warnings"]) == (count, [], [])
        assert found["over_max_length"]["rows"] == 0


WITH_PYTHON = [page for page in PAGES if any(block.page == name(page) for block in every("python"))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, desk: Path, model: Path, adapter: Path, capsys: Any):
    names: dict[str, Any] = {}
    shutil.copytree(adapter, "sft-out")
    for block in every("python"):
        if block.page == name(page):
            text = block.text.replace('"tiny-chat"', repr(str(model)))
            exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), names)  # noqa: S102 - our own pages


# ------------------------------------------------------------------------------------------------- methods and settings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("page", [GUIDE, SKILL], ids=["guide", "skill"])
def test_every_method_has_its_section_with_all_parts(page: Path, method: str):
    text = sections(page)[method]
    for part in METHOD_PARTS:
        assert re.search(rf"\*\*[^*]*{part}[^*]*\*\*", text, re.IGNORECASE), f"{name(page)}, {method}: no {part}"
    assert f"method={'contrast' if method in config.COMMANDS else method}" in text
    assert re.search(rf"^mlx-realign train --(config|method) {method} ", text, re.MULTILINE)


@pytest.mark.parametrize("method", methods.names())
def test_metrics_to_watch_are_those_a_run_writes(method: str, desk: Path, model: Path):
    words = ["train", "--method", method, "--model", model, "--data", f"{method}-data", "--output", "out", "--steps", 1]
    words += TOLD.get(methods.find(method).FORMAT, [])
    assert cli.entry([str(word) for word in words]) == 0
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    written = set().union(*rows)
    for page in (GUIDE, SKILL):
        watch = re.search(
            r"\*\*(?:What to watch|Watch).*?(?=\n\n\*\*|\n- \*\*|\n```)", sections(page)[method], re.DOTALL
        )
        assert watch
        named = set(re.findall(r"`([a-z_/]+)`", watch[0]))
        assert named and named <= written, f"{name(page)}: {named - written}"


def test_the_guide_tells_every_loss_of_dpo_with_its_default_and_its_paper():
    (told,) = [rows for rows in tables(sections(GUIDE)["dpo"]) if "paper" in rows[0]]
    names = [row["`--loss-type`"].strip("`") for row in told]
    assert sorted(names) == sorted(dpo.names())
    source = Path(losses.__file__).read_text()
    for row, loss in zip(told, names, strict=True):
        if loss == "sft":  # no beta, and nobody's paper
            continue
        assert float(row["beta"].split()[0]) == dpo.Config().beta_of(loss)
        assert row["paper"].removeprefix("arXiv:") in source, f"{loss}: losses.py names another paper"
    assert set(names) <= set(re.findall(r"\w+", sections(SKILL)["dpo"]))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"dpo with (\d+) losses", readme) == [str(len(names))]


def test_the_guide_tells_which_losses_take_which_variation():
    (told,) = [rows for rows in tables(sections(GUIDE)["dpo"]) if "losses" in rows[0]]
    takers = {row["setting"].strip("`").split()[0]: set(row["losses"].split(", ")) for row in told}
    assert takers["--label-smoothing"] == set(dpo.TAKE_SMOOTHING)
    assert takers["--f-divergence-type"] == set(dpo.TAKE_DIVERGENCE)
    assert takers["--margin-scale"] == set(dpo.TAKE_MARGIN)


@pytest.mark.parametrize("page", [GUIDE, SKILL], ids=["guide", "skill"])
def test_every_recipe_is_named(page: Path):
    text = page.read_text(encoding="utf-8")
    for recipe in (config.PACKAGE / "recipes").glob("*.toml"):
        assert recipe.stem in text, f"{name(page)} does not name the recipe {recipe.stem}"


def test_messages_the_guide_quotes_are_those_of_the_code():
    quoted = re.findall(r'it stops: "([^"]+)"', GUIDE.read_text(encoding="utf-8"))
    files = [file for file in config.PACKAGE.rglob("*.py") if "assets" not in file.parts]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert len(quoted) >= 4
    for text in quoted:
        assert any(text in string for string in strings), f"no message says: {text}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_and_path_a_page_names_exists(page: Path):
    text = page.read_text(encoding="utf-8")
    known = set(FOREIGN_FLAGS)
    settings = [config.TrainSettings, *(methods.find(method).Config for method in methods.names())]
    parts = [f"mlx_realign.steering.{path.stem}" for path in (config.PACKAGE / "steering").glob("*.py")]
    for module in [*(module for module, _ in cli.commands().values()), *parts]:
        found = vars(importlib.import_module(module))
        own = [key for key, value in found.items() if key.endswith(("Settings", "Limits")) and isinstance(value, type)]
        settings += [found[key] for key in own]
    for cls in settings:
        for field in flags.fields_of(cls).values():
            known |= {field.flag, field.flag.replace("--", "--no-", 1)}
    known |= {"--method", "--config", "--version"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"<!--.*?-->", "", text))):
        if not re.search(rf"(make|benchmarks/|docs/|tests/).*{flag}", text):
            assert flag in known, f"{name(page)}: {flag} is no flag"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{name(page)}: {target} is not there"
    for path in re.findall(r"`((?:mlx_realign|tests|docs|benchmarks|kernels|\.github)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{name(page)}: {path} is not there"


def test_the_skill_has_front_matter_for_assistants():
    head, _, body = SKILL.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")
    keys = dict(re.findall(r"^(\w+):(.*)$", head, re.MULTILINE))
    assert keys["name"].strip() == SKILL.stem
    assert all(method in keys["description"] for method in METHODS)
    triggers = re.findall(r"^  - (.+)$", head, re.MULTILINE)
    assert len(triggers) >= 5 and "triggers" in keys
    assert body.lstrip().startswith("# ")


def test_the_file_tree_of_the_readme_is_the_one_there_is():
    (tree,) = [block for block in every("text") if "tree" in block.tags]
    named, folder = [], ROOT
    for line in tree.text.splitlines():
        folder = folder if line.startswith(" ") else ROOT
        paths = [folder / word for word in re.split(r" {2,}", line.strip())[0].split()]
        assert all(path.exists() for path in paths), line
        folder = paths[0] if not line.startswith(" ") else folder
        named += paths
    package = ROOT / "mlx_realign"
    for command in cli.commands():
        assert any(path in (package / f"{command}.py", package / command) for path in named), f"{command} is missing"


# -------------------------------------------------------------------------------------------------------------- tables

TABLES = runpy.run_path(str(ROOT / "docs/tables.py"))


def test_every_cell_of_the_backend_matrix_has_a_level_and_evidence():
    found = TABLES["load_backends"]()
    cells = [(method, cell["column"]) for cell in found["cells"] for method in cell["methods"]]
    assert sorted(cells) == sorted((method, column) for method in METHODS for column in found["columns"])
    for cell in found["cells"]:
        assert cell["level"] in ("full", "experimental", "none")
        assert len(cell["evidence"].split()) >= 8
        assert all((ROOT / path).is_file() for path in cell["proof"])
        if cell["level"] == "full":
            assert any(path.startswith("tests/test_") for path in cell["proof"])


def test_the_tables_of_the_pages_are_made_from_the_data(capsys: pytest.CaptureFixture[str]):
    assert TABLES["main"](["--check"]) == 0, capsys.readouterr().out
    found = TABLES["load_backends"]()
    found["cells"][0]["level"] = "none"
    for page in (GUIDE, SKILL):
        text = page.read_text(encoding="utf-8")
        assert TABLES["placed"](text, "docs/backends.toml", TABLES["backends"](found)) != text
    assert TABLES["begin"]("benchmarks/baselines") in (ROOT / "README.md").read_text(encoding="utf-8")


def test_numbers_name_the_best_peer_of_each_kind():
    run = {"mlx-realign": (2.0, 1.5, 1.1), "quick": (3.0, 4.0, None), "lean": (5.0, 1.2, 0.9), "slow": (9.0, 3.0, 2.0)}
    contestants = {label: {"seconds": s, "maxrss_gb": gb, "mlx_peak_gb": own} for label, (s, gb, own) in run.items()}
    machine = {"processor": "Some CPU", "cores": 2, "system": "linux"}
    found = {"cases": {"dpo": {"about": "DPO", "contestants": contestants}}, "machine": machine, "rounds": 2}
    text = TABLES["peers"](found | {"model": "M", "versions": {"quick": "1.0"}})
    assert "| DPO | 2.00 | 5.00, 2.50x (lean) | 3.00, 1.50x (quick) | 1.50 | 1.20, 0.80x (lean) |" in text
    result = {"method": "dpo", "goal": "polite", "changes": "a voice", "seconds": 20.4}
    text = TABLES["demo"]([result | {"before": {"polite": 0.1}, "after": {"polite": 0.95}}])
    assert "| dpo | polite: a voice | 10% | 95% | 20 |" in text
