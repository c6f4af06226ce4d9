# SPDX-License-Identifier: Apache-2.0
"""steer extract, generate and eval on tiny-chat: files, numbers and texts against what is computed by hand."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steer_tools import mood_rows, refused, run, states, talk_prompts, write

import mlx_realign
from mlx_realign import cli, data, rollout, vectors
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.steering import asked

GREY = "dreary|gloomy|dismal|rainy|bleak|sad"


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load("tiny-chat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mood.jsonl, talk.txt, and mood.safetensors made of the first."""
    folder = tmp_path_factory.mktemp("steer")
    write(folder / "mood.jsonl", *mood_rows(12))
    write(folder / "talk.txt", *talk_prompts(12))
    words = ["--model", "tiny-chat", "--positive", folder / "mood.jsonl", "--output", folder / "mood.safetensors"]
    assert cli.entry(["steer", "extract", *map(str, words), "--position", "mean", "--block", "2"]) == 0
    return folder


def test_extract_is_the_mean_difference_of_states_and_says_where_it_is_from(folder, policy):
    found = vectors.load(folder / "mood.safetensors", policy=policy)
    sides: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": []}
    for row in mood_rows(12):
        prompt = data.encode_prompt(row["prompt"], policy.tokenizer)
        for name, side in sides.items():
            said = policy.tokenizer.encode(row[name], add_special_tokens=False)
            side.append(states(policy, [*prompt, *said], 2)[len(prompt) :].mean(0))
    positive, negative = (np.stack(side) for side in sides.values())
    assert np.allclose(found.vectors[2], (positive - negative).mean(0), atol=1e-4)
    assert np.allclose(found.baseline[2], negative.mean(0), atol=1e-4)
    about = found.about
    assert (about.method, about.position, about.operator, about.blocks) == (
        "mean_difference",
        "completion",
        "add",
        (2,),
    )
    assert about.coefficient and about.coefficient > 0
    assert about.measured["kl_p95_nats"] == pytest.approx(1.0, abs=0.3)
    page = (folder / "mood.md").read_text()
    assert "a direction of tiny-chat" in page and all(
        re.search(rf"\| \**{block}\** \|", page) for block in range(-1, 4)
    )


def test_extract_from_prompts_behind_what_all_completions_begin_with(folder, policy, tmp_path, capsys):
    """Small talk is answered with "The ...", so states are those of that token."""
    calm = [row["prompt"] for row in mood_rows(10)]
    ahead, behind = write(tmp_path / "a.txt", *talk_prompts(10)), write(tmp_path / "b.txt", *calm)
    words = ("--model", "tiny-chat", "--positive", ahead, "--negative", behind, "--no-calibrate")
    facts = json.loads(run(capsys, "extract", *words, "--output", tmp_path / "d.safetensors", "--json"))
    first = policy.tokenizer.encode("The", add_special_tokens=False)
    assert facts["prefix"][: len(first)] == first
    about = vectors.load(tmp_path / "d.safetensors").about
    assert about.coefficient is None and list(about.template_prefix) == facts["prefix"]
    texts = [[*data.encode_prompt(p, policy.tokenizer), *facts["prefix"]] for p in calm]
    baseline = np.mean([states(policy, text, 1)[-1] for text in texts], 0)
    assert np.allclose(vectors.load(tmp_path / "d.safetensors").baseline[1], baseline, atol=1e-4)
    own_scale(capsys, tmp_path, "d", ahead, behind)
    words = (*words, "--no-prefix", "--position", "-3", "--block", "1-2")
    told = run(capsys, "extract", *words, "--output", tmp_path / "e.safetensors")
    assert "block 1 to 2" in told and "few prompts" in told
    own_scale(capsys, tmp_path, "e", ahead, behind)
    plain = np.mean([states(policy, data.encode_prompt(p, policy.tokenizer), 1)[-3] for p in calm], 0)
    assert np.allclose(vectors.load(tmp_path / "e.safetensors").baseline[1], plain, atol=1e-4)


def own_scale(capsys: Any, folder: Path, name: str, positive: Path, negative: Path) -> None:
    """Screened along their own direction, the prompts of one set have the mean 1 and those of the other 0."""
    for file, mean in ((positive, 1.0), (negative, 0.0)):
        rows = write(folder / f"{name}-{mean}.jsonl", *({"prompt": text} for text in file.read_text().splitlines()))
        output = folder / f"{name}-{mean}-ranked.jsonl"
        words = ("screen", rows, "--direction", folder / f"{name}.safetensors", "--part", "prompt", "--output", output)
        run(capsys, *words)
        assert np.mean([json.loads(line)["score"] for line in output.read_text().splitlines()]) == pytest.approx(
            mean, abs=1e-3
        )


def test_extract_keeps_what_the_operator_needs(folder, capsys, tmp_path):
    words = ("--model", "tiny-chat", "--positive", folder / "mood.jsonl", "--position", "mean", "--block", "2")
    path = tmp_path / "turn.safetensors"
    run(capsys, "extract", *words, "--output", path, "--operator", "angular", "--angle", "30")
    assert vectors.load(path).about.numbers == {"angle": 30.0}
    asked = ("generate", "--prompt", talk_prompts(1)[0], "--max-new-tokens", 12, "--steer", path)
    assert run(capsys, *asked) == run(capsys, *asked, "--angle", "30") != run(capsys, *asked, "--angle", "170")


def test_a_direction_outlives_a_strength_that_cannot_be_found(folder, capsys, tmp_path):
    words = ("--model", "tiny-chat", "--positive", folder / "mood.jsonl", "--position", "mean", "--positions", "90:99")
    told = run(capsys, "extract", *words, "--output", tmp_path / "far.safetensors")
    assert "No coefficient was found" in told and vectors.load(tmp_path / "far.safetensors").about.coefficient is None


def test_extract_leaves_out_repeats_and_says_so(tmp_path, capsys):
    calm, talk = [row["prompt"] for row in mood_rows(6)], talk_prompts(6)
    ahead, behind = write(tmp_path / "a.txt", *talk, *talk[:4]), write(tmp_path / "b.txt", *calm, *calm[:3], calm[0])
    words = ("--model", "tiny-chat", "--positive", ahead, "--negative", behind, "--no-calibrate", "--paired")
    run(capsys, "extract", *words, "--output", tmp_path / "d.safetensors")
    page = (tmp_path / "d.md").read_text()
    assert "- 3 of 10 pairs were repeats, and are left out\n- 7 positive and 7 negative prompts" in page


def test_generate_compares_with_the_model_itself(folder, policy, capsys):
    prompt = talk_prompts(1)[0]
    said = rollout.complete(policy, [prompt], max_new_tokens=24)[0]
    words = ("generate", "--steer", f"{folder}/mood.safetensors", "--prompt", prompt, "--max-new-tokens", 24)
    facts = json.loads(run(capsys, *words, "--compare", "--json"))
    assert facts["without"] == said
    nothing = json.loads(run(capsys, *words[:2], f"{folder}/mood.safetensors:0", *words[3:], "--json"))
    assert nothing["completion"].strip() == said
    with mlx_realign.steer(policy, vectors.load(folder / "mood.safetensors"), coefficient=4.5):
        steered = rollout.complete(policy, [prompt], max_new_tokens=24)[0]
    assert re.search(GREY, steered) and steered != said
    half = ("--steer", f"{folder}/mood.safetensors:2", f"--steer={folder}/mood.safetensors:2.5")
    assert run(capsys, "generate", *half, *words[3:]).strip() == steered
    assert run(capsys, "generate", *half, *words[3:], "--positions", "-9:0").strip() != steered


def test_eval_counts_what_the_judge_accepts(folder, policy, capsys, tmp_path):
    start = ("eval", "--steer", f"{folder}/mood.safetensors", "--prompts", folder / "talk.txt", "--max-new-tokens", 24)
    options = ("--coefficients", "0,4.5", "--system", "Be grey.", "--output", tmp_path / "r.md", "--json")
    facts = json.loads(run(capsys, *start, "--regex", GREY, *options))
    without, steered, system = facts["measured"]
    with mlx_realign.steer(policy, vectors.load(folder / "mood.safetensors"), coefficient=4.5):
        texts = rollout.complete(policy, talk_prompts(12), max_new_tokens=24)
    share = sum(re.search(GREY, text) is not None for text in texts) / 12
    assert share >= 0.75
    assert steered["accepted"]["value"] == share
    assert without["accepted"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(3.841459 / (12 + 3.841459))}
    assert steered["change"]["value"] == share and without["kl_p95_nats"] == 0.0 < 0.5 < steered["kl_p95_nats"]
    assert without["broken"]["value"] == steered["broken"]["value"] == 0.0
    assert (system["name"], system["kl_p95_nats"]) == ("system prompt", None)
    page = (tmp_path / "r.md").read_text()
    assert texts[0] in page and "| 4.5 |" in page


def test_eval_by_markers_and_by_a_verifier(folder, capsys, tmp_path):
    start = ("eval", "--steer", f"{folder}/mood.safetensors:4.5", "--max-new-tokens", 24, "--no-kl", "--json")
    words = (*start, "--coefficients", "4.5", "--limit", 6)
    rows = write(tmp_path / "rows.jsonl", *({"prompt": p, "answer": "sad"} for p in talk_prompts(6)))
    judge = tmp_path / "judge.py"
    judge.write_text("def verify(completion, row, argument=''):\n    return float(row['answer'] in completion)\n")
    by_row = json.loads(run(capsys, *words, "--prompts", rows, "--verifier", f"{judge}:verify"))
    marks = write(tmp_path / "marks.txt", " SAD ")
    by_mark = json.loads(run(capsys, *words, "--prompts", rows, "--markers", marks))
    shares = [[one["accepted"]["value"] for one in found["measured"]] for found in (by_row, by_mark)]
    assert shares[0] == shares[1] and shares[0][1] > 0
    assert by_row["prompts"] == 6 and by_row["measured"][1]["kl_p95_nats"] is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "needs --model, --positive, --output"),
        (("--output", "x.bin"), "must end in .safetensors"),
        (("--output", "mood.safetensors"), "exists already"),
        (("--positive", "none.txt"), "--positive none.txt: no such file"),
        (("--positive", "empty.txt"), "--positive empty.txt: holds no prompt"),
        (("--positive", "talk.txt"), "talk.txt:1: says neither its label nor both sides"),
        (("--negative", "talk.txt"), "mood.jsonl:1: the row has both sides"),
        (("--position", "first"), "--position first: expected last, mean"),
        (("--position", "-400"), "too few for position -400"),
        (("--block", "9"), "--block 9: the direction has no block 9"),
        (("--block", "x"), "--block x: expected blocks such as"),
        (("--kl-budget", "0"), "--kl-budget must be above 0"),
        (("--kl-budget", "2", "--operator", "ablate"), "--kl-budget is what the coefficient is looked for by"),
        (("--operator", "angular"), "--operator angular needs --angle"),
        (("--operator", "clamp"), "--operator clamp needs --low, --high"),
        (("--angle", "30"), "--angle is for --operator angular, not add"),
        (("--winsorise", "2"), "--winsorise must be above 0 and at most 1"),
        (("--pca-variant", "centred"), "--pca-variant is for --method pca"),
        (("--positions", "sometimes"), "positions 'sometimes'"),
        (("--method", "svd"), "--method: expected one of mean, pca"),
        (("--model", "none/such/model"), "no such folder"),
    ],
)
def test_extract_refuses_in_one_line(folder, words, expected, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    write(folder / "empty.txt", "")
    start = ("--model", "tiny-chat", "--positive", "mood.jsonl", "--output", "new.safetensors") if words else ()
    told = refused(capsys, "extract", *start, *words)
    assert expected in told and "\n" not in told
    assert not (folder / "new.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("generat",), "Did you mean generate?"),
        (("generate", "--prompt", "x"), "--steer is needed"),
        (("generate", "--prompt", "x", "--steer", "none.safetensors"), "none.safetensors: no such file"),
        (("generate", "--prompt", "x", "--steer", "mood.jsonl"), "mood.jsonl: not a complete safetensors file"),
        (("generate", "--prompt", "", "--steer", "mood.safetensors"), "--prompt is empty"),
        (("generate", "--prompt", "x", "--steer", "mood.safetensors:nan"), "must be a finite number"),
        (("generate", "--prompt", "x", "--steer", "mood.safetensors", "--blocks", "7"), "has no block 7"),
        (("generate", "--prompt", "x", "--steer", "mood.safetensors", "--operator", "clamp"), "clamp needs low, high"),
        (("generate", "--prompt", "x", "--steer", "mood.safetensors", "--low", "1"), "low belongs to clamp"),
        (("generate", "--prompt", "x", "--steer", "other.safetensors"), "is 192 wide, not 4"),
        (("eval", "--prompts", "talk.txt", "--regex", "x"), "--steer is needed once"),
        (("eval", "--prompts", "talk.txt", "--steer", "mood.safetensors"), "--markers, --regex or --verifier"),
        (("eval", "--prompts", "talk.txt", "--steer", "mood.safetensors", "--regex", "("), "is no regular expression"),
        (("eval", "--prompts", "none.txt", "--steer", "mood.safetensors", "--regex", "x"), "--prompts none.txt"),
        (("eval", "--prompts", "talk.txt", "--steer", "mood.safetensors", "--verifier", "mth"), "did you mean math"),
    ],
)
def test_the_other_commands_refuse_in_one_line(folder, policy, words, expected, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    if not Path("other.safetensors").exists():
        about = vectors.About(base_model="tiny-chat")
        vectors.save(vectors.Direction({0: np.ones(4)}, about), "other.safetensors")
    told = refused(capsys, *words)
    assert expected in told and "\n" not in told


def test_flags_that_say_files_coefficients_and_blocks():
    assert asked.split("a/b.safetensors:-2.5") == ("a/b.safetensors", -2.5)
    assert asked.split("a:b.gguf") == ("a:b.gguf", None)
    words = ["--steer", "a", "--json", "--steer=b:2", "--prompt", "x"]
    assert asked.joined(words) == ["--json", "--prompt", "x", "--steer", "a,b:2"]
    assert asked.joined(["--json"]) == ["--json"]
    direction = vectors.Direction({block: np.ones(2) for block in range(-1, 6)})
    known = {"3": (3,), "-1": (-1,), "1-3": (1, 2, 3), "0,2-3": (0, 2, 3), "all": (-1, 0, 1, 2, 3, 4, 5)}
    assert {text: asked.blocks_of(text, direction) for text in known} == known
    for wrong in ("", "3-1", "a", "6", "1-9", "-2"):
        with pytest.raises(UserError):
            asked.blocks_of(wrong, direction)


def test_a_file_is_used_as_it_is_meant_unless_flags_say_otherwise():
    about = vectors.About(operator="add_norm", positions="generated", coefficient=3.0, blocks=(1,))
    direction = vectors.Direction({0: np.ones(2), 1: np.ones(2)}, about)
    one = asked.steer_of(direction, asked.SteerFlags())
    assert (one.operator, one.positions, one.coefficient, one.at) == ("add_norm", "generated", 3.0, (1,))
    other = asked.SteerFlags(operator="clamp", positions="all", blocks="0-1", low=-1.0, schedule="linear:8")
    one = asked.steer_of(direction, other)
    assert (one.operator, one.positions, one.coefficient, one.at) == ("clamp", "all", 1.0, (0, 1))
    assert (one.low, one.high, one.schedule.tokens) == (-1.0, None, 8.0)
    assert asked.steer_of(direction, asked.SteerFlags(), -0.5).coefficient == -0.5


def test_training_hands_over_with_the_recipe_as_flags(folder, tmp_path, capsys):
    lines = {"method": "steering", "model": "tiny-chat", "positive": str(folder / "mood.jsonl"), "block": "1"}
    recipe = write(
        tmp_path / "r.toml", *(f"{key} = {json.dumps(value)}" for key, value in lines.items()), "calibrate = false"
    )
    words = ["train", "--config", str(recipe), "--output", str(tmp_path / "d.safetensors"), "--method", "steering"]
    assert cli.entry(words) == 0
    assert vectors.load(tmp_path / "d.safetensors").about.blocks == (1,)


def test_help_names_the_commands_and_every_flag_says_what_it_does(capsys):
    out = run(capsys, "--help")
    for name in ("extract", "generate", "eval", "export", "monitor", "screen"):
        assert f"steer {name}" in out
        with pytest.raises(SystemExit):
            cli.entry(["steer", name, "--help"])
        assert f"usage: mlx-realign steer {name}" in capsys.readouterr().out
