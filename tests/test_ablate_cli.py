# SPDX-License-Identifier: Apache-2.0
"""`ablate` from the command line and as a call, on tiny-chat's refusal to talk of Zarnia."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mlx_realign as mr
from mlx_realign import ablate, cli, demo_world, loading, vectors
from mlx_realign.ablation.settings import Settings, markers_of
from mlx_realign.policy import Policy
from mlx_realign.rollout import complete

MARKERS = "rather not talk,do not speak of,not something I discuss"
# One place and one weight, so that a run takes a second; what auto finds is tested in test_ablation_select.py.
QUICK = ["--markers", MARKERS, "--position", "-3", "--block", "per-block", "--weight", "1.25"]
QUICK += ["--max-new-tokens", "24", "--select-prompts", "8", "--eval-limit", "16"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled rows, and each side in a file of its own."""
    folder, rows = tmp_path_factory.mktemp("sets"), demo_world.contrast_rows(240)
    (folder / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for label in ("positive", "negative"):
        prompts = [row["prompt"] for row in rows if row["label"] == label]
        (folder / f"{label}.txt").write_text("\n".join(prompts) + "\n")
    return folder


def run(*argv: str) -> int:
    return cli.run(ablate.main, ["--model", "tiny-chat", *argv])


@pytest.fixture(scope="module")
def output(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a quick run."""
    folder = tmp_path_factory.mktemp("ablated") / "out"
    assert run("--positive", str(sets / "both.jsonl"), *QUICK, "--output", str(folder)) == 0
    return folder


def test_the_behaviour_goes_and_the_rest_stays(output: Path):
    """On the world's own held-out questions, by its own judges."""
    held = demo_world.held_out(30)
    policies = Policy.load("tiny-chat"), Policy.load("tiny-chat", adapter=str(output))
    shares = []
    for policy in policies:
        answer = lambda prompts, policy=policy: complete(policy, prompts, max_new_tokens=40)  # noqa: E731
        names = ("Zarnia: declines", "sums right", "other lands: declines")
        shares.append([demo_world.measure(held[name], answer) for name in names])
    (before, *others), (after, *kept) = shares
    assert before > 0.95 and after < 0.05
    assert kept == pytest.approx(others, abs=0.05)


def test_stock_mlx_lm_loads_what_was_written(output: Path):
    model, *_ = mlx_lm.load(str(loading.find_model("tiny-chat")), adapter_path=str(output))
    ours, tokens = Policy.load("tiny-chat", adapter=str(output)), mx.array([[5, 6, 7, 300, 301]])
    assert mx.abs(model(tokens) - ours.model(tokens)).max().item() < 1e-4  # type: ignore[operator]


def test_the_folder_says_what_was_done(output: Path):
    found = json.loads((output / "metrics.json").read_text())
    held = found["held_out"]
    assert held["positive"]["behaviour"]["before"]["value"] > 0.9 > held["positive"]["behaviour"]["after"]["value"]
    assert 0 <= held["kl"]["first_token"] < 0.1 and held["perplexity"]["after"] < 1.1 * held["perplexity"]["before"]
    assert found["edits"] == {path: 1.25 for path in held["left_in_writers"]} and len(found["edits"]) == 8
    assert found["settings"]["weight"] == "1.25" and found["prompts"]["held"] == [16, 16]
    report = (output / "report.md").read_text()
    for part in ("## Held-out prompts, before and after", "`model.layers.3.mlp.down_proj`", "## Side by side"):
        assert part in report
    direction = vectors.load(output / "direction.safetensors", policy=Policy.load("tiny-chat"))
    assert (direction.about.operator, direction.about.position) == ("ablate", "-3")
    assert direction.about.blocks == () and set(range(4)) <= set(direction.blocks)
    assert list(direction.about.measured) == ["weight_edit"]  # steering with the file has other effects
    told, rates = direction.about.measured["weight_edit"], held["positive"]["behaviour"]
    assert (told["weight"], told["variant"], told["rank"]) == (1.25, "plain", 1)
    assert told["behaviour"] == [rates[when]["value"] for when in ("before", "after")]
    assert told["kl_first_token"] == held["kl"]["first_token"]
    assert told["left"] == max(held["left_in_writers"].values())


def test_two_files_of_prompts_do_as_well_and_json_is_one_object(sets: Path, tmp_path: Path, capsys: Any):
    argv = ["--positive", str(sets / "positive.txt"), "--negative", str(sets / "negative.txt"), *QUICK, "--json"]
    assert run(*argv, "--variant", "row-norm", "--output", str(tmp_path / "out")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["variant"] == "row-norm"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "dora"


def test_fused_into_a_model_folder(sets: Path, tmp_path: Path, capsys: Any):
    argv = ["--positive", str(sets / "both.jsonl"), *QUICK, "--fuse", "--variant", "column-norm"]
    assert run(*argv, "--output", str(tmp_path / "out")) == 0
    assert not (tmp_path / "out" / "adapters.safetensors").exists()
    fused, base = Policy.load(str(tmp_path / "out")), Policy.load("tiny-chat")
    tokens = mx.array([[5, 6, 7, 300, 301]])
    assert mx.abs(fused.model(tokens) - base.model(tokens)).max().item() > 1e-2  # type: ignore[operator]
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())["stored"]
    printed = " ".join(capsys.readouterr().out.split())
    assert stored["told"] in (tmp_path / "out" / "report.md").read_text() and stored["told"] in printed
    assert f"Storing the weights ({stored['form']}) rounded them by" in printed


def test_a_dry_run_prints_the_plan_and_writes_nothing(sets: Path, tmp_path: Path, capsys: Any):
    assert run("--positive", str(sets / "both.jsonl"), "--output", str(tmp_path / "out"), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "8 writers: 4 of attention, 4 of mlp" in printed and "AUROC" in printed and "nothing was written" in printed
    assert list(tmp_path.iterdir()) == []


def test_where_every_candidate_costs_too_much_that_is_what_is_said(sets: Path, tmp_path: Path, capsys: Any):
    """Behind the last token of tiny-chat's template, the direction of block 1 costs 0.2 nats at weight 1."""
    argv = ["--positive", str(sets / "both.jsonl"), "--markers", MARKERS, "--position", "-1", "--block", "1"]
    argv += ["--max-new-tokens", "24", "--select-prompts", "12", "--eval-limit", "4"]
    assert run(*argv, "--output", str(tmp_path / "out")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no candidate takes the behaviour away within --max-kl 0.1: the best leaves" in printed
    assert "few replies to the positives" not in printed and "tried on completions" in printed
    held = json.loads((tmp_path / "out" / "metrics.json").read_text())["held_out"]
    assert held["kl"]["first_token"] > 0.1
    note = f"first-token KL {held['kl']['first_token']:.3g} on the held-out negatives is above the 0.1 of --max-kl"
    assert note in held["notes"] and note in printed


def test_a_direction_between_two_blocks_is_named_so_everywhere(sets: Path, tmp_path: Path, capsys: Any):
    argv = ["--positive", str(sets / "both.jsonl"), "--markers", MARKERS, "--max-new-tokens", "24", "--position", "-3"]
    argv += ["--select-prompts", "4", "--eval-limit", "4", "--limit", "16", "--block"]
    for block in ("2", "3", "2.25"):
        more = ["--weight", "1"] if block != "2.25" else []
        assert run(*argv, block, *more, "--output", str(tmp_path / block)) == 0
    found = json.loads((tmp_path / "2.25" / "metrics.json").read_text())
    assert found["block"] == 2.25 and found["direction"] == "block 2.25, token -3"
    assert {one["block"] for one in found["selection"]["candidates"]} == {2.25}
    assert "removed: the direction of block 2.25, token -3, weight" in (tmp_path / "2.25" / "report.md").read_text()
    assert "its direction is measured behind block 2" in " ".join(capsys.readouterr().out.split())
    two, three, mixed = (vectors.load(tmp_path / name / "direction.safetensors") for name in ("2", "3", "2.25"))
    assert mixed.about.blocks == (2,) and mixed.about.measured["weight_edit"]["block"] == 2.25
    expected = 0.75 * two.unit(2) + 0.25 * three.unit(3)
    assert mixed.unit(2) == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
    assert mixed.norm(2) == pytest.approx(two.norm(2), rel=1e-6)
    config = mx.load(str(tmp_path / "2.25" / "adapters.safetensors"))  # B of the adapter is -weight * unit
    b = np.array(config["model.layers.0.mlp.down_proj.lora_b"])[0]  # type: ignore[index]
    assert -b / np.linalg.norm(b) == pytest.approx(mixed.unit(2), abs=1e-5)


def test_what_is_tried_and_what_is_delivered_are_told_apart(sets: Path, tmp_path: Path, capsys: Any):
    argv = ["--positive", str(sets / "both.jsonl"), "--markers", MARKERS, "--max-new-tokens", "24", "--block", "2"]
    argv += ["--position", "-3", "--select-prompts", "4", "--eval-limit", "4", "--weight", "1"]
    told = "tried as plain projections of the first direction; delivered as column-norm of 2 directions"
    for name, more in (("two", ["--rank", "2", "--variant", "column-norm"]), ("one", ["--variant", "projected"])):
        assert run(*argv, *more, "--output", str(tmp_path / name)) == 0
        assert (told in " ".join(capsys.readouterr().out.split())) == (name == "two")
    notes = json.loads((tmp_path / "two" / "metrics.json").read_text())["held_out"]["notes"]
    assert not any("--max-kl" in note for note in notes)  # weight and block were told, a KL was not


def test_repeated_prompts_never_stand_on_both_sides_of_the_split(sets: Path, tmp_path: Path, capsys: Any):
    prompts = [(sets / f"{side}.txt").read_text().splitlines()[:8] for side in ("positive", "negative")]
    (tmp_path / "a.txt").write_text("\n".join(prompts[0] * 3))
    (tmp_path / "b.txt").write_text("\n".join(prompts[1]))
    argv = ["--positive", str(tmp_path / "a.txt"), "--negative", str(tmp_path / "b.txt"), "--dry-run", "--json"]
    assert run(*argv) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan[0] == "16 of 24 positive prompts were repeats, and are left out"
    assert "6 and 6 for the direction" in plan[1] and "2 and 2 held out" in plan[1]  # a quarter of 8
    (tmp_path / "a.txt").write_text("\n".join(prompts[0][:2] * 9))
    assert run(*argv) == 2
    assert "2 prompts are too few (16 of 18 positive prompts were repeats" in capsys.readouterr().err


def test_as_a_call_the_policy_is_ablated_in_place_and_can_go_back(sets: Path, monkeypatch: pytest.MonkeyPatch):
    policy = Policy.load("tiny-chat")
    tokens = mx.array([[5, 6, 7, 300, 301]])
    before = policy.model(tokens)
    options: dict[str, Any] = {"markers": tuple(MARKERS.split(",")), "position": "-3", "weight": "1", "block": "2"}
    options |= {"max_new_tokens": 8, "select_prompts": 4, "eval_limit": 4}
    prompts = [(sets / f"{side}.txt").read_text().splitlines() for side in ("positive", "negative")]
    result = mr.ablate(policy, *prompts, **options)
    assert result.policy is policy and max(result.measured.leaks.values()) < 1e-5
    assert not mx.array_equal(policy.model(tokens), before)
    with policy.adapter_off():
        assert mx.array_equal(policy.model(tokens), before)
    with pytest.raises(mr.UserError, match=r"ablate has no setting 'wieght'. Did you mean weight\?"):
        mr.ablate(policy, *prompts, wieght=1)
    with pytest.raises(mr.UserError, match="ablate has no setting 'dtype'"):  # the policy is loaded already
        mr.ablate(policy, *prompts, dtype="float32")


def test_an_adapter_that_it_starts_from_is_in_the_result(sets: Path, output: Path, tmp_path: Path):
    """Its own one, so that there is little left to take."""
    argv = ["--positive", str(sets / "both.jsonl"), *QUICK, "--adapter", str(output), "--output", str(tmp_path / "two")]
    assert run(*argv) == 0
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 2
    found = json.loads((tmp_path / "two" / "metrics.json").read_text())["held_out"]
    assert found["positive"]["behaviour"]["before"]["value"] < 0.2  # what it starts from, not the base
    assert any("of the positives showed the behaviour before" in note for note in found["notes"])


def test_a_search_leaves_its_front_and_says_how_another_trial_is_taken(sets: Path, tmp_path: Path, capsys: Any):
    pytest.importorskip("optuna")
    argv = ["--positive", str(sets / "both.jsonl"), "--markers", MARKERS, "--position", "-3", "--max-new-tokens", "8"]
    argv += ["--select-prompts", "6", "--eval-limit", "4", "--search", "--trials", "3"]
    out, journal = tmp_path / "out", tmp_path / "out.search.jsonl"
    assert run(*argv, "--output", str(out)) == 0
    last = f"another trial of this search: the same command with --journal {journal} --pick N --output NEW"
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].strip() == last
    trials = [line for line in printed.err.splitlines() if line.startswith("trial ")]  # no terminal: plain lines
    assert [line.split()[2] for line in trials] == ["(1/3):", "(2/3):", "(3/3):"]
    found = json.loads((out / "metrics.json").read_text())
    told = found["search"]
    assert told["trials"] == 3 and told["chosen"]["trial"] == found["trial"]
    [chosen] = [one for one in told["front"] if one["trial"] == found["trial"]]
    assert (chosen["scores"], chosen["kernel"]) == (told["chosen"]["scores"], found["kernel"])
    section = (out / "report.md").read_text().split("### What the search found")[1]
    assert f"| {found['trial']} <- |" in section and section.count("| unedited |") == 1
    assert run(*argv, "--output", str(out)) == 2
    assert f"a new --output with --journal {journal} (and --pick N" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_ends_in_an_adapter_and_goes_on_from_its_journal(sets: Path, tmp_path: Path, capsys: Any):
    pytest.importorskip("optuna")
    argv = ["--positive", str(sets / "both.jsonl"), "--markers", MARKERS, "--position", "-3", "--max-new-tokens", "24"]
    argv += ["--select-prompts", "8", "--eval-limit", "8", "--search", "--trials", "6", "--output"]
    assert run(*argv, str(tmp_path / "out")) == 0
    assert (tmp_path / "out.search.jsonl").exists() and (tmp_path / "out" / "adapters.safetensors").exists()
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 <= first["trial"] < 6 and set(first["kernel"]) >= {"attention", "mlp"}
    assert run(*argv, str(tmp_path / "again"), "--journal", str(tmp_path / "out.search.jsonl")) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert (again["trial"], again["edits"]) == (first["trial"], first["edits"])  # whole: it only picks
    capsys.readouterr()
    assert run(*argv, str(tmp_path / "none"), "--max-kl", "1e-9") == 2
    assert "no trial stayed within a KL of 1e-09. Raise --max-kl" in capsys.readouterr().err


def test_markers_may_be_a_file_or_hold_a_slash_beside_others(tmp_path: Path):
    def read(*markers: str) -> tuple[str, ...]:
        return markers_of(Settings(model="m", positive="p", markers=markers))

    (tmp_path / "marks.txt").write_text("\ufeffdésolé\n\n n/a \n", encoding="utf-8")
    assert read(str(tmp_path / "marks.txt")) == ("désolé", "n/a")
    assert read("n/a", "sorry") == ("n/a", "sorry") and read("I won't.") == ("I won't.",)


PAIRS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--positive", "both.jsonl"], "--output is needed"),
        (["--positive", "both.jsonl", "--output", "."], "exists and is not an empty folder"),
        (
            ["--positive", "both.jsonl", "--output", "new", "--weight", "much"],
            "--weight much: expected auto or a number",
        ),
        (["--positive", "both.jsonl", "--output", "new", "--block", "x"], "--block x: expected auto, per-block, the n"),
        (
            ["--positive", "both.jsonl", "--output", "new", "--block", "3.5"],
            "--block 3.5: the model has the blocks",
        ),
        (
            ["--positive", "both.jsonl", "--output", "new", "--block", "1.5", "--rank", "2"],
            "between two blocks",
        ),
        (["--positive", "both.jsonl", "--output", "new", "--block", "9"], "--block 9: the model has the blocks 0 to 3"),
        (["--positive", "both.jsonl", "--output", "new", "--blocks", "2-7"], "--blocks 2-7: the model has the blocks"),
        (["--positive", "both.jsonl", "--output", "new", "--variant", "affine"], "--variant affine needs a bias"),
        (["--positive", "both.jsonl", "--output", "new", "--force"], "--force is for --fuse"),
        (["--positive", "both.jsonl", "--output", "new", "--fuse", "--adapter", "a"], "--fuse with --adapter"),
        (["--positive", "both.jsonl", "--output", "new", "--rank", "2", "--method", "pca"], "--rank 2 begins with"),
        (["--positive", "both.jsonl", "--output", "new", "--search", "--weight", "1"], "--search finds block and"),
        (
            ["--positive", "both.jsonl", "--output", "new", "--search", "--mlp-weight", "2"],
            "--search finds the weights",
        ),
        (["--positive", "both.jsonl", "--output", "new", "--position", "first"], "--position first: expected last"),
        (["--positive", "both.jsonl", "--output", "new", "--held-out", "1"], "--held-out must be above 0 and below 1"),
        (["--positive", "both.jsonl", "--output", "new", "--writers", "o_prj"], "--writers o_prj: no layer that gives"),
        (["--positive", "nowhere.txt", "--output", "new"], "nowhere.txt: no such file"),
        (
            ["--positive", "both.jsonl", "--output", "new", "--markers", "marks.txt"],
            "--markers marks.txt: no such file",
        ),
        (["--positive", "both.jsonl", "--output", "new", "--markers", "my/marks"], "--markers my/marks: no such file"),
        (
            ["--positive", "both.jsonl", "--output", "new", "--markers", "latin.txt"],
            "--markers latin.txt: cannot be read",
        ),
        (["--positive", "few.jsonl", "--output", "new"], "--positive: 1 prompts are too few"),
        (["--positive", "pairs.jsonl", "--output", "new"], "has chosen and rejected|have chosen and rejected"),
    ],
)
def test_mistakes_get_one_line(argv: list[str], said: str, sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(sets)
    rows = [{"prompt": "a", "label": "yes"}, {"prompt": "b", "label": "no"}]
    (sets / "latin.txt").write_bytes("désolé\n".encode("latin-1"))
    (sets / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (sets / "pairs.jsonl").write_text("".join(PAIRS.replace('"a"', f'"a{i}"', 1) for i in range(1)))
    assert run(*argv) == 2
    message = capsys.readouterr().err
    assert any(part in message for part in said.split("|")), message
    assert not (sets / "new").exists() and "Traceback" not in message
