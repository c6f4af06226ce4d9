# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""`benchmarks/mac.py`: a failure is told and the rest goes on, Ctrl-C leaves a result, every number has its command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "mlx_realign/assets/tiny-chat"
sys.path[:0] = [str(ROOT / "benchmarks")]

import launch  # noqa: E402
import mac_facts  # noqa: E402
import mac_job  # noqa: E402
import mac_memory  # noqa: E402
import mac_page  # noqa: E402
import mac_peers  # noqa: E402

STATUS = {"done", "failed", "left out", "interrupted"}
WAIT_S = 120


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose first model is nowhere, and which is ended by Ctrl-C while it trains."""
    folder = tmp_path_factory.mktemp("mac") / "report"
    command = ["sh", ROOT / "benchmarks/mac.sh", "--small", "--yes", "--only", "checks,steady", "--output", folder]
    command += ["--models", f"nowhere/nothing,{TINY}", "--python", sys.executable]
    with (folder.parent / "said").open("w") as said:
        child = subprocess.Popen([str(word) for word in command], stdout=said, stderr=said, start_new_session=True)
        began = time.monotonic()
        while not list(folder.glob("work/tmp/*/output/metrics.jsonl")):
            assert child.poll() is None and time.monotonic() - began < WAIT_S, (folder.parent / "said").read_text()
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        code = child.wait(WAIT_S)
    assert code == 130, (folder.parent / "said").read_text()
    return folder


@pytest.fixture(scope="module")
def result(report: Path) -> dict[str, Any]:
    return json.loads((report / "result.json").read_text())


def test_every_number_has_its_command_and_what_has_none_a_reason(result: dict[str, Any]):
    assert result["schema"] == 1 and result["kind"] == "small" and result["ended_by"] == "SIGINT"
    assert result["began"] <= result["ended"] and {"commit", "changed"} <= set(result)
    assert list(result["parts"]) == list(mac_job.PARTS)
    left_out = {name for name, part in result["parts"].items() if part["reason"] == "not asked for"}
    assert left_out == set(mac_job.PARTS) - {"setup", "checks", "steady"}
    for part in result["parts"].values():
        assert part["status"] in STATUS and part["seconds"] >= 0
        for entry in part["entries"]:
            assert entry["of"] and entry["status"] in STATUS
            done = entry["status"] == "done"
            assert (entry["found"] is not None) == (entry["reason"] is None) == done
            assert entry["command"] or not done


def test_a_part_that_fails_is_told_and_the_others_go_on(result: dict[str, Any], report: Path):
    checks = result["parts"]["checks"]
    assert (checks["status"], checks["reason"]) == ("failed", "2 of 4 measurements failed")
    reasons = [entry["reason"] for entry in checks["entries"]]
    assert reasons[:2] == ["nowhere/nothing: no such folder, and --small downloads no models"] * 2
    for entry in checks["entries"][2:]:
        assert entry["found"]["self_check"]["chunked_head"].startswith("exact")
        assert entry["found"]["estimated_peak_memory_gb"] > 0
        assert "mlx_realign.train --method dpo" in entry["command"]
    assert "nowhere/nothing: no such folder" in (report / "result.md").read_text()


def test_ctrl_c_ends_what_runs_and_leaves_a_result(result: dict[str, Any], report: Path):
    (entry,) = result["parts"]["steady"]["entries"]
    assert (entry["status"], entry["reason"]) == ("interrupted", "ended from outside while it ran")
    assert result["parts"]["steady"]["status"] == "interrupted"
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(report / "work") not in listed  # the trainer is gone too
    assert "ended early by SIGINT" in (report / "result.md").read_text()


def test_nothing_tells_who_the_machine_s_owner_is(report: Path):
    text = (report / "result.json").read_text()
    assert str(Path.home()) not in text and str(report) not in text and str(ROOT) not in text


def job_in(folder: Path) -> mac_job.Job:
    job = mac_job.Job(folder, "small", mac_job.SIZES["small"], python=Path(sys.executable))
    job.result = json.loads(job.path.read_text()) if job.path.exists() else job.result
    job.part = "memory"
    job.result["parts"].setdefault("memory", {"entries": []})
    return job


def test_what_was_measured_is_not_measured_again_and_what_failed_is(tmp_path: Path):
    count = tmp_path / "count"
    program = f"import sys; open({str(count)!r}, 'a').write('x'); sys.exit(sys.argv[1] or 0)"
    for _ in range(2):
        job = job_in(tmp_path / "report")
        for name, code in (("good", ""), ("bad", "no luck")):
            command = [sys.executable, "-c", program, code]
            job.measure({"what": name}, command, lambda *_: {"n": 1})
    entries = job_in(tmp_path / "report").entries
    assert [(e["status"], e["reason"]) for e in entries] == [("done", None), ("failed", "ended with 1: no luck")]
    assert count.read_text() == "xxx"


def test_a_process_over_its_limit_is_told_to_end_with_all_that_it_started(tmp_path: Path):
    sleeper = ["-c", "import time; time.sleep(77)", str(tmp_path)]
    child = f"import subprocess, sys; subprocess.run([sys.executable, *{sleeper!r}])"
    with pytest.raises(launch.Late, match="not done after 0.5 s"):
        launch.run([sys.executable, "-c", child], limit=0.5)
    time.sleep(0.2)
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_failures_of_the_suite_are_counted_and_named(tmp_path: Path):
    (tmp_path / "test_it.py").write_text("def test_a():\n    pass\ndef test_b():\n    assert 1 == 2\n")
    report = tmp_path / "report.xml"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_it.py"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True)
    found = mac_facts.counts(report, tmp_path / "work")
    assert {k: found[k] for k in ("tests", "passed", "failed", "errors", "skipped")} == {
        "tests": 2, "passed": 1, "failed": 1, "errors": 0, "skipped": 0}  # fmt: skip
    assert list(found["failures"]) == ["test_it::test_b"]
    assert "AssertionError" in found["failures"]["test_it::test_b"][-1]


def test_the_memory_of_a_row_is_a_line_and_the_plan_is_off_by_a_factor(tmp_path: Path):
    job = job_in(tmp_path)
    for tokens, peak in ((1000, 3.0), (2000, 5.0), (4000, 9.0)):  # 1 GB, and 2 for each 1000 tokens
        of = {"method": "sft", "tokens": tokens, "model": "m"}
        job.note(of | {"by": "step"}, "done", None, command="c", found={"peak_memory_gb": peak})
        job.note(of | {"by": "plan"}, "done", None, command="c", found={"plan": {"peak_memory_gb": peak / 1.25}})
    mac_memory.fitted(job, "sft")
    found = (job.entry({"method": "sft", "fit": True}) or {})["found"]
    assert found["gb_per_1000_tokens"] == pytest.approx(2.0) and found["gb_without_rows"] == pytest.approx(1.0)
    assert found["measured_over_plan"] == pytest.approx(1.25) and found["measured_over_dry_run"] is None
    assert found["growth_of_the_last_doubling"] == pytest.approx(1.8)


def test_speeds_are_told_span_by_span():
    # 100 tokens a step; 1 s each at first, then 2: the first step compiles and the last span is broken.
    took = [9.0, *[1.0] * 4, *[2.0] * 3]
    rows = [{"num_tokens": 100 * (i + 1), "step_s": s} for i, s in enumerate(took)]
    found = mac_memory.by_span(rows, 4.0)
    assert found["tokens_per_second"] == [100.0, 50.0] and found["last_over_first"] == 0.5


def test_a_speed_counts_the_same_tokens_for_every_contestant(tmp_path: Path):
    (tmp_path / "lengths.json").write_text(json.dumps({"512": {"sft": {"prompt": 52, "chosen": 460, "rejected": 1}}}))
    row = mac_peers.ROWS[0]
    found = mac_peers.numbers(row, [9.0, 9.0, 2.0, 2.0, 4.0], [], 1.5, 2.0, tmp_path)
    assert (found["tokens_per_second"], found["iterations_per_second"]) == (256.0, 0.5)
    grpo = next(row for row in mac_peers.ROWS if row.method == "grpo")
    (tmp_path / "lengths.json").write_text(json.dumps({"256": {"dpo": {"prompt": 8, "chosen": 8, "rejected": 8}}}))
    found = mac_peers.numbers(grpo, [9.0, 9.0, 2.0, 4.0], [7, 7, 600, 300], None, 2.0, tmp_path)
    assert (found["tokens_per_second"], found["peak_memory_gb"]) == (150.0, None)


def test_a_table_tells_what_is_not_there():
    entry = {"of": {"row": "a", "who": "b", "median": True}, "status": "failed", "reason": "why | so", "found": None}
    parts = {"peers": {"status": "failed", "reason": "1 of 1 measurements failed", "entries": [entry]}}
    text = mac_page.page({"kind": "full", "commit": "f" * 40, "parts": parts})
    assert "- row a, who b, median True: failed, why | so" in text
