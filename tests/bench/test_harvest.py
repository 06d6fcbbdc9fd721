"""bench/harvest.py on a machine without a GPU, in processes of its own: its imports live in bench/."""

import json
from pathlib import Path

import pytest
import warm

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")
BENCH = Path(__file__).resolve().parents[2] / "bench"


FORKED = """
import os, sys
import pytest
import harvest

run = harvest.run

def forked(arguments, seconds, on_line=None):
    if on_line is not None:
        return run(arguments, seconds, on_line)
    process = os.fork()
    if process == 0:
        status = 1
        try:
            for name in ("conftest", "harvest"):
                del sys.modules[name]
            for name in [name for name in os.environ if name.startswith("PYTEST_")]:
                del os.environ[name]
            os.chdir(harvest.ROOT)
            assert arguments[:2] == ["-m", "pytest"]
            status = int(pytest.main(arguments[2:]))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

harvest.run = forked
"""
ALL_PARTS = """
del harvest.KERNEL_TESTS["attention"]
sys.exit(harvest.main())
"""


def test_every_part_runs_and_writes_its_results(tmp_path):
    """The benchmarks run in forks, and one of the groups of kernel tests as it is: each imports PyTorch otherwise."""
    done = warm.run("-c", FORKED + ALL_PARTS, "--out", tmp_path, "--tiny", cwd=BENCH)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {path.stem.split("-", 3)[-1]: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    groups = {
        name: next(content["groups"] for key, content in results.items() if key.endswith(name))
        for name in ("edit-20b", "kernel-tests", "attention", "token-ops", "lora-20b")
    }
    for part in ("edit-20b", "attention", "token-ops", "lora-20b"):
        for rows in groups[part].values():
            assert all(row["ratio"] > 0 and row["seconds"] > 0 for row in rows), rows
    steps = [[row["member"] for row in rows] for rows in groups["edit-20b"].values()]
    assert steps == [["stock", "compiled", "patched", "one pack", "one pack, 8 bits"]]
    assert [*groups["kernel-tests"]] == ["token ops"]
    for group in groups["kernel-tests"].values():
        assert group["complete"] and group["passed"] > 0 and not group["failed"]
    assert all({"date", "device", "torch", "triton", "commit"} <= content.keys() for content in results.values())


FAULTY_PARTS = """
import time

start = time.monotonic()
assert run(["-c", "import time; time.sleep(600)"], 0.5) is None, "stopped at the time limit"
assert time.monotonic() - start < 300
assert run(["-c", "import os; os.abort()"], 60) == -6
# A part whose process dies after its first measurement, and one that works.
folder = sys.argv[1]
harvest.PARTS = tuple(harvest.Part(name, 300, (), (f"{folder}/{name}.py",)) for name in ("dies", "works"))
sys.argv = ["harvest.py", "--out", f"{folder}/results", "--tiny"]
sys.exit(harvest.main())
"""
MEASURED = """
def test_first(timed, benchmark):
    benchmark.group = "question"
    timed(lambda: None, lambda: None)
"""
DIES = """

def test_second(benchmark):
    import os

    os.abort()
"""


def test_a_part_that_fails_costs_the_next_part_nothing(tmp_path):
    """The parts run in forks; a process of its own is stopped or dies before."""
    (tmp_path / "conftest.py").write_text((BENCH / "conftest.py").read_text())
    (tmp_path / "works.py").write_text(MEASURED)
    (tmp_path / "dies.py").write_text(MEASURED + DIES)
    done = warm.run("-c", FORKED + FAULTY_PARTS, tmp_path, cwd=BENCH)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "dies: failed with exit status -6" in done.stdout and "works: complete" in done.stdout
    kept = {path.stem.rsplit("-", 1)[-1]: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(kept) == {"dies", "works"}, "a part whose process died keeps what it had measured"
    for results in kept.values():
        assert [row["member"] for row in results["groups"]["question"]] == ["test_first"]


def test_refuses_to_measure_without_a_gpu(tmp_path):
    done = warm.run(BENCH / "harvest.py", "--out", tmp_path / "out", cwd=BENCH)
    assert done.returncode == 2 and "--tiny checks on the CPU" in done.stderr
    assert not (tmp_path / "out").exists()


CHANGED = """
import json, sys
from pathlib import Path
import harvest

folder, device = Path(sys.argv[1]), harvest.machine()["device"]
name = "attention"
sources = harvest.digest(harvest.KERNEL_TESTS[name][1])
group = {"sources": sources, "complete": True}
harvest.write_results(folder / "2026-01-01-a-kernel-tests.json", {"device": device, "groups": {name: group}})
print(json.dumps([harvest.passed_before(folder, name) for name in (device, "another GPU")] + [{name: sources}]))
"""


def test_tests_of_unchanged_kernels_are_not_repeated_on_the_same_device(tmp_path):
    done = warm.run("-c", CHANGED, tmp_path, cwd=BENCH)
    assert done.returncode == 0, done.stderr
    here, elsewhere, expected = json.loads(done.stdout)
    assert here == expected and elsewhere == {}
