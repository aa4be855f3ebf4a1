"""benchmarks/gpu.py: its driver, with checks that hang and crash, and some of its real checks on a CPU."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
driver = importlib.import_module("gpu")
harness = importlib.import_module("gpu_steps.harness")
steps = importlib.import_module("gpu_steps")

PLENTY = 60.0


def check(run, name="check", step="P2", limit=PLENTY):
    return harness.Check(step, name, limit, run)


@pytest.fixture
def perform(tmp_path):
    """Runs checks, and returns their records as the file has them."""
    (tmp_path / "scratch").mkdir()

    def run(*checks, seconds=10 * PLENTY):
        results = harness.Results(tmp_path / "found.json", {"date": "today"})
        bench = harness.Bench("cpu", True, ROOT, tmp_path / "scratch")
        harness.perform(checks, bench, results, seconds)
        return json.loads(results.path.read_text())["checks"]

    return run


def fine(bench):
    bench.report(answer=42)


def hang_in_a_function_of_this_name(bench):
    bench.report(before=1)
    while True:
        time.sleep(1)


def test_a_check_that_hangs_is_a_timeout_with_its_stack_and_the_next_one_runs(perform):
    hung, after = perform(check(hang_in_a_function_of_this_name, "hang", limit=1.0), check(fine, "after"))
    assert hung["status"] == "timeout"
    assert "limit of 1 s" in hung["error"][0]
    assert any("hang_in_a_function_of_this_name" in line for line in hung["error"])
    assert hung["figures"] == {"before": 1}
    assert (after["status"], after["figures"]) == ("ok", {"answer": 42})


def test_a_check_that_dies_by_a_signal_has_failed_and_the_next_one_runs(perform):
    def die(bench):
        os.write(1, b"its last words\n")
        os.kill(os.getpid(), signal.SIGKILL)

    dead, after = perform(check(die, "dead"), check(fine, "after"))
    assert dead["status"] == "failed"
    assert dead["error"] == ["killed by SIGKILL", "its last words"]
    assert after["status"] == "ok"


def test_a_check_that_exits_without_an_outcome_has_failed(perform):
    (found,) = perform(check(lambda bench: os._exit(0)))
    assert (found["status"], found["error"]) == ("failed", ["ended with exit code 0"])


def test_a_check_that_raises_has_failed_with_its_error_and_output(perform):
    def fail(bench):
        sys.stdout.write("its output\n")
        raise AssertionError("weights differ")

    (found,) = perform(check(fail))
    assert found["status"] == "failed"
    assert "AssertionError: weights differ" in found["error"]
    assert found["error"][-1] == "its output"


def test_a_check_that_cannot_run_is_skipped_with_its_reason(perform):
    def refuse(bench):
        raise harness.Skipped("no such package")

    (found,) = perform(check(refuse))
    assert (found["status"], found["reason"]) == ("skipped", "no such package")


def test_a_check_that_needs_cuda_is_skipped_on_a_cpu_whatever_its_limit(perform):
    needy = harness.Check("P5", "needy", 1e9, fine, cuda="its kernels")
    (found,) = perform(needy)
    assert (found["status"], found["reason"]) == ("skipped", "needs CUDA: its kernels")


def test_a_check_whose_limit_does_not_fit_is_skipped_and_a_shorter_one_runs(perform):
    long, short = perform(check(fine, "long", limit=100.0), check(fine, "short", limit=20.0), seconds=50.0)
    assert long["status"] == "skipped"
    assert "limit of 100 s does not fit" in long["reason"]
    assert short["status"] == "ok"


def test_results_are_on_disk_after_each_check_and_while_one_runs(perform, tmp_path):
    def look(bench):
        seen = json.loads((tmp_path / "found.json").read_text())
        bench.report(head=seen["date"], statuses=[record["status"] for record in seen["checks"]])

    _, found = perform(check(fine, "first"), check(look, "look"))
    assert found["figures"] == {"head": "today", "statuses": ["ok", "running"]}
    assert not list(tmp_path.glob("*.partial"))


def test_figures_are_on_disk_before_their_check_ends(perform, tmp_path):
    def wait(bench):
        bench.report(early=1)
        while json.loads((tmp_path / "found.json").read_text())["checks"][0].get("figures") != {"early": 1}:
            time.sleep(0.01)

    (found,) = perform(check(wait))
    assert found["status"] == "ok"


def test_processes_that_a_check_has_started_end_with_it(perform):
    def start(bench):
        bench.report(pid=subprocess.Popen(["sleep", "600"]).pid)

    (found,) = perform(check(start))
    stat = Path(f"/proc/{found['figures']['pid']}/stat")
    if not stat.parent.parent.is_dir():
        pytest.skip("no /proc")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # being killed; the test's own limit ends this


def test_each_check_has_an_empty_directory_that_goes_with_it(perform, tmp_path):
    def write(bench):
        bench.report(before=[path.name for path in bench.scratch.iterdir() if path != bench.log])
        (bench.scratch / "file").touch()

    first, second = perform(check(write, "a"), check(write, "b"))
    assert first["figures"] == second["figures"] == {"before": []}
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(("step", "code"), [("P1", 1), ("P6", 1), ("P0", 0), ("P8", 0)])
def test_the_exit_code_is_1_when_a_check_of_p1_to_p6_failed(step, code, tmp_path, monkeypatch, capsys):
    def fail(bench):
        raise AssertionError("on purpose")

    monkeypatch.setattr(steps, "CHECKS", (check(fail, "bad", step), check(fine, "good", step)))
    for name in ("CUDA_VISIBLE_DEVICES", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = tmp_path / "found.txt"
    assert driver.main(["--device", "cpu", "--json", str(tmp_path / "found.json"), "--text", str(text)]) == code
    assert "AssertionError: on purpose" in capsys.readouterr().out
    assert "bad: failed" in text.read_text()
    assert "answer" in text.read_text()


def test_an_unknown_step_and_an_empty_list_are_refused():
    with pytest.raises(ValueError, match=r"no step or check P99"):
        driver.selected("P0,P99")
    with pytest.raises(ValueError, match=r"--list names them"):
        driver.selected(",")


def test_only_takes_steps_and_checks_in_their_usual_order():
    names = [check.full_name for check in driver.selected("P6, P2.noise")]
    assert names == ["P2.noise", "P6.two_ranks"]


def test_check_names_are_unique_and_every_limit_fits_the_time_by_itself():
    names = [check.full_name for check in steps.CHECKS]
    assert len(set(names)) == len(names)
    assert {check.step for check in steps.CHECKS} == {f"P{number}" for number in range(13)}
    assert max(check.limit for check in steps.CHECKS) < driver.SECONDS


def command(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "benchmarks" / "gpu.py")
    return subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device_is_refused(tmp_path):
    done = command("--device", "cuda", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 2
    assert "--device cuda: no CUDA device can be used" in done.stderr


def test_real_checks_on_a_cpu(tmp_path):
    path, text = tmp_path / "found.json", tmp_path / "found.txt"
    only = "P0,P1.sanitizer,P2.losses,P2.noise"
    done = command("--device", "cpu", "--only", only, "--json", str(path), "--text", str(text), "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert (found["commit"], found["torch"], found["small"]) == ("abc", torch.__version__, True)
    assert found["date"]
    assert found["device"]
    records = {f"{record['step']}.{record['check']}": record for record in found["checks"]}
    assert {name: record["status"] for name, record in records.items()} == {
        "P0.versions": "ok",
        "P0.throughput": "ok",
        "P0.host_copies": "skipped",
        "P1.sanitizer": "skipped",
        "P2.losses": "ok",
        "P2.noise": "ok",
    }
    assert records["P2.noise"]["figures"]["share_of_differing_bits"] == 0
    assert set(records["P2.losses"]["figures"]["largest_difference"].values()) == {0.0}
    assert "P2: a step on the device" in text.read_text()


def test_the_conformance_suite_of_the_stores_is_where_the_benchmark_looks():
    text = (ROOT / importlib.import_module("gpu_steps.stores").CONFORMANCE).read_text()
    assert "class TestDeviceStore" in text and "class TestPinnedStore" in text
