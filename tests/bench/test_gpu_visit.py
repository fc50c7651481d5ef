"""`make gpu` on a machine without a GPU: every part goes through, what is broken is said, and nothing hangs."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bench import device_time
from bench.gpu.dry import pretend
from bench.gpu.plan import stages
from bench.gpu.records import Records, read_records
from bench.gpu.sanitizer import sanitizer
from bench.gpu.setting import Setting
from bench.gpu.summary import BARS, CASE, COPY, PRODUCT, floors, is_broken, lines, page
from bench.gpu.visit import Job, Part, Stage, Visit
from bench.op_race import OpRace
from bench.options import Options

ROOT = Path(__file__).parents[2]
ABSENT = ("rich", "pytest", "tyro", "docstring_parser", "yaml", "lightning", "torchmetrics", "matplotlib", "fvcore")
ABSENT += ("huggingface_hub", "transformers", "scipy", "rasterio", "h5py", "tifffile", "nanobind")

# One part of each kind, in one process, where a bare machine has neither the packages nor the compiled library. Ops
# have the shapes of the dry run's small model: those of `base` take ten seconds and pass through the same code.
WHOLE = """
import sys
sys.modules.update(dict.fromkeys({absent!r}))  # as if not installed
import json, traceback
from pathlib import Path
from bench.gpu import part as child
from bench.gpu.plan import stages
from bench.gpu.summary import is_broken, lines
from bench.gpu.visit import Part, Stage, Visit

def make_ops_small():
    import mmmae
    from bench import op_work
    from bench.gpu.setting import DRY_CONFIG
    op_work.CONFIG = mmmae.MMMAEConfig.preset("tiny", **DRY_CONFIG)

class InProcess:
    def __init__(self, part, folder, skip, dry_run):
        folder.mkdir(exist_ok=True)
        self.records, self.log = folder / "records", folder / "log"
        if "mmmae" in sys.modules and "bench.op_cases" not in sys.modules:  # behind the first part, which imports mmmae
            make_ops_small()
        try:
            child.run(self.records, skip, part.task, dry_run=dry_run)
            self.ended = 0
        except Exception:
            self.log.write_text(traceback.format_exc())
            self.ended = 1

    def status(self):
        return self.ended

parts = {{part.task[0]: part for stage in stages(1) for part in reversed(stage.parts)}}
raising = Part("raises", ("small", "fp31", "1/1"))
chosen = [Stage((*parts.values(), raising), 1.0)]
folder = Path({folder!r})
results = Visit(chosen, folder / "visit.json", folder / "work", 99, dry_run=True, start=InProcess, tell=print).run()
from bench.op_cases import CONFIG
assert CONFIG.depth == 1, "ops have the shapes of base"
print(json.dumps([lines(results), is_broken(results)]))
"""


def test_every_part_goes_through_on_a_bare_machine(tmp_path):
    (tmp_path / "work").mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "MMMAE_NATIVE": "0"}
    code = WHOLE.format(absent=ABSENT, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    told, broken = json.loads(done.stdout.splitlines()[-1])
    results = json.loads((tmp_path / "visit.json").read_text())
    by_name = {part["name"]: part for part in results["parts"]}
    raised = by_name.pop("raises")
    for part in by_name.values():
        wrong = [one for one in part["records"] if one["kind"] == "failure" or one.get("ok") is False]
        assert (part["status"], wrong) == ("done", []), part["name"]
    assert raised["status"] == "done"
    assert {record["error"] for record in raised["records"]} == {"KeyError: 'fp31'"}
    kinds = {record["kind"] for part in results["parts"] for record in part["records"]}
    assert kinds == {"fact", "check", "measurement", "kernels", "counts", "failure", "skipped"}
    assert broken
    assert len(told) <= 10
    assert told[0].startswith("dry run, no GPU: broken: ")
    assert "KeyError: 'fp31'" in told[1]
    text = (tmp_path / "visit.md").read_text()
    for title in ("Machine", "Checks", "Training steps", "Encoding", "Ops", "Kernels", "Errors"):
        assert f"\n## {title}\n\n" in text
    assert all(f"- {line}" in text for line in told)


class Toy(Job):
    """A part without torch, whose task is Python code; `found` are its records and `item` begins an item."""

    started: ClassVar = []  # processes of the parts of a test
    begin = """
import os, signal, sys
from pathlib import Path
from bench.gpu.records import Records
records = Records(Path(sys.argv[1]), int(sys.argv[2]))
check = dict(what="a case", op="op", backend="b", types="t", error=0, allowed=1, result=0, ok=True)
good = lambda: records.add("check", **check)
"""

    def __init__(self, part, folder, skip, dry_run):
        folder.mkdir(exist_ok=True)
        self.records, self.log = folder / "records", folder / "log"
        code = self.begin + part.task[0]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(self.records), str(skip)],
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        self.started.append(self.process)


GOOD = "records.attempt('first', good)\nrecords.attempt('second', good)\n"


def visit(folder, *tasks, clock=lambda: 0.0, slots=1):
    """Run toy parts, each a stage of its own or all in one, and return results by name."""
    grouped = [task if isinstance(task, tuple) else (task,) for task in tasks]
    numbers = iter(range(99))
    chosen = [Stage(tuple(Part(str(next(numbers)), (code,)) for code in codes), 1.0) for codes in grouped]
    told = []
    Toy.started.clear()
    run = Visit(chosen, folder / "r.json", folder, 1, start=Toy, clock=clock, slots=slots, tell=told.append)
    results = run.run()
    assert json.loads((folder / "r.json").read_text()) == results
    assert all(process.poll() is not None for process in Toy.started)
    return {part["name"]: part for part in results["parts"]}, results


def test_a_part_that_raises_or_dies_stops_no_other(tmp_path):
    raises = "records.attempt('bad', lambda: 1 / 0)\n" + GOOD
    dies = "records.attempt('deadly', lambda: os._exit(7))\n" + GOOD
    sticky = "def fault(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
    sticky += "records.attempt('fault', fault)\n" + GOOD
    found, results = visit(tmp_path, (raises, dies), sticky, "import nonsense", GOOD, slots=2)
    statuses = {name: part["status"] for name, part in found.items()}
    assert statuses == {"0": "done", "1": "done", "2": "done", "3": "failed", "4": "done"}
    for name, item, error in (
        ("0", "bad", "ZeroDivisionError: division by zero"),
        ("1", "deadly", "the process ended with status 7: "),
        ("2", "fault", "the process ended with status 1: RuntimeError: CUDA error: an illegal memory access"),
    ):
        failure, *rest = found[name]["records"]
        assert (failure["kind"], failure["what"]) == ("failure", item)
        assert failure["error"].startswith(error)
        assert [record["what"] for record in rest] == ["a case", "a case"]  # what follows the item runs
    assert "No module named 'nonsense'" in found["3"]["records"][0]["error"]
    assert is_broken(results)
    assert len(lines(results)) <= 10


def test_what_a_later_item_needs_is_done_again_after_a_death(tmp_path):
    code = """
made = []
records.attempt("make", lambda: made.append(1), needed=True)
records.attempt("deadly", lambda: os._exit(7), needed=True)
records.attempt("use", lambda: records.add("fact", name="made", value=len(made)))
"""
    found, _ = visit(tmp_path, code)
    assert [record.get("value") for record in found["0"]["records"]] == [None, 1]


def test_a_part_that_hangs_is_cut_off_with_what_it_had(tmp_path):
    """When its time is up, which is here when it says that it hangs, however long that takes."""
    stuck = tmp_path / "stuck"
    hang = f"records.attempt('last', lambda: (Path({str(stuck)!r}).touch(), signal.pause()))"
    hangs = f"records.attempt('first', good)\n{hang}"
    found, results = visit(tmp_path, (hangs, GOOD), GOOD, clock=lambda: 31.0 if stuck.exists() else 0.0)
    assert [part["status"] for part in found.values()] == ["cut off", "cut off", "done"]
    assert found["0"]["item"] == "last"
    assert [record["what"] for record in found["0"]["records"]] == ["a case"]
    assert not is_broken(results)
    assert "cut off, the time was up: 0 in last; 1" in lines(results)
    stuck.unlink()
    found, results = visit(tmp_path, hang, clock=lambda: 99.0 if stuck.exists() else 0.0)
    assert is_broken(results)  # it has shown nothing at all


def test_the_results_of_a_visit_are_those_in_its_file_though_time_goes_on(tmp_path):
    tenths = itertools.count()
    visit(tmp_path, GOOD, clock=lambda: next(tenths) / 10)


def test_an_unfinished_line_of_records_is_left_out(tmp_path):
    path = tmp_path / "records"
    Records(path).add("fact", name="a", value=1)
    path.write_text(path.read_text() + '{"kind": "fa')
    assert read_records(path) == [{"kind": "fact", "name": "a", "value": 1}]


def test_running_out_of_memory_is_not_an_error(tmp_path):
    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    Records(tmp_path / "records").attempt("step", run_out)
    _, skipped = read_records(tmp_path / "records")
    assert skipped == {"kind": "skipped", "what": "step", "reason": "out of memory"}


def report(*records, dry_run=False):
    part = {"name": "part", "status": "done", "item": "", "seconds": 1.0, "records": list(records), "log": ""}
    return {"seconds": 1.0, "dry_run": dry_run, "parts": [part]}


def measured(case, **seconds):
    fields = {
        "kind": "measurement",
        "group": "training step",
        "case": case,
        "peak_bytes": None,
        "note": "",
        "limit": None,
    }
    return [
        {**fields, "contender": name.replace("_", ", "), "baseline": False, "seconds": [time]}
        for name, time in seconds.items()
    ]


def test_ten_lines_tell_wrong_results_and_bars():
    wrong = {"kind": "check", "what": "gelu: odd", "op": "gelu", "backend": "triton", "types": "bf16"}
    wrong |= {"error": 0.3, "allowed": 0.1, "result": 0, "ok": False}
    times = measured(CASE.format("base", 64), **{"fast": 0.04, "fast_captured": 0.05, "reference_SDPA": 0.06})
    found = lines(report(wrong, *times))
    assert found[0] == "broken: 0 checks right, 1 wrong, 0 errors, 1 s"
    assert found[1] == "broken: gelu by triton in bf16: 1 cases, worst gelu: odd: 3.0e-01 where 1.0e-01 is allowed"
    bar = "step of base, batch 64: fast or fast, captured 1.50 times as fast as reference, SDPA, bar 1.30"
    assert f"reached: {bar}" in found
    assert sum("not measured: " in line for line in found) == len(BARS) - 1
    assert is_broken(report(wrong))
    assert not is_broken(report(*times))


def test_what_is_only_slow_is_not_broken():
    slow = measured(CASE.format("base", 8), **{"fast_captured": 0.02, "reference_SDPA": 0.02})
    op = {"kind": "measurement", "group": "op", "case": "gelu, batch 8", "note": "", "limit": 1e-3, "with_host": 1e-3}
    ops = [
        {**op, "contender": "F.gelu", "baseline": True, "seconds": [0.001]},
        {**op, "contender": "triton", "baseline": False, "seconds": [0.002]},
    ]
    found = lines(report(*slow, *ops))
    assert found[0].startswith("nothing is broken")
    assert "slow: step of base, batch 8: fast, captured 1.00 times as fast as reference, SDPA, bar 1.50" in found
    assert "slow: 1 ops behind PyTorch's: gelu, batch 8: triton 0.50" in found
    assert not is_broken(report(*slow, *ops))
    assert "| gelu, batch 8 | triton | 2.0000 | 0.50 | 50 % | 1.0000 |  |" in page(report(*slow, *ops))


def test_a_result_that_is_not_a_number_is_wrong_and_the_worst():
    check = {
        "kind": "check",
        "op": "gelu",
        "backend": "triton",
        "types": "bf16",
        "allowed": 0.1,
        "result": 0,
        "ok": False,
    }
    found = lines(report({**check, "what": "a", "error": 5.0}, {**check, "what": "b", "error": float("nan")}))
    assert "2 cases, worst b: nan" in found[1]


def test_a_floor_is_of_products_or_bytes_operator_by_operator():
    peaks = {"kind": "fact", "name": "peaks", "value": {COPY: 1000.0, PRODUCT: 100.0}}
    operators = [[10**9, 10**6, 3], [10**6, 10**9, 2]]  # the first bound by products, 20 us, the second by bytes, 1 ms
    counts = {"kind": "counts", "task": "base, batch 64", "contender": "fast", "operators": operators}
    counts |= {"macs": 3 * 10**9, "bytes": 2 * 10**9, "launches": 5, "casts": 0}
    case = CASE.format("base", 64)
    found = report(peaks, counts, *measured(case, **{"fast": 0.005, "fast_captured": 0.004, "reference_SDPA": 0.006}))
    assert floors(found) == {(case, "fast"): pytest.approx(2.06e-3)}
    assert "floor: step of base, batch 64: fast, captured takes 1.94 times its floor of 2.1 ms" in lines(found)
    assert "| 2.06 | 41 % |" in page(found)


@pytest.mark.parametrize(
    ("printed", "status", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, {"kind": "check", "ok": True, "error": 0.0, "cases": 1}),
        ("========= Invalid read\n========= ERROR SUMMARY: 2 errors", 86, {"kind": "check", "ok": False, "error": 2.0}),
        ("RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)", 86, {"kind": "check", "error": 1.0}),
        ("========= Error: Device not supported", 1, {"kind": "skipped"}),
    ],
)
def test_what_the_sanitizer_prints_is_read(tmp_path, monkeypatch, printed, status, expected):
    tool = tmp_path / "compute-sanitizer"
    begun = """*/records) echo '{"kind": "begin", "what": "a"}' > "$argument";;"""
    tool.write_text(
        f"#!/bin/sh\nfor argument; do case $argument in {begun} esac; done\necho '{printed}'\nexit {status}\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    sanitizer(Records(tmp_path / "found"), Setting(dry_run=True), "memcheck", "bf16")
    _, found = read_records(tmp_path / "found")
    assert found.items() >= expected.items()


def test_lines_that_find_no_room_are_counted():
    failures = [{"kind": "failure", "what": "a", "error": "b"}]
    many = report(*failures)
    many["parts"] = [{**many["parts"][0], "name": str(number)} for number in range(20)]
    found = lines(many)
    assert len(found) == 10
    assert sum(line.startswith("... and ") for line in found) == 1
    assert any(line.startswith("not measured") for line in found)


def test_the_time_is_divided_among_what_is_to_be_done():
    for cores in (1, 4, 16, 64):
        parts = [part for stage in stages(cores) for part in stage.parts]
        assert len({part.name for part in parts}) == len(parts)
        assert sum(stage.seconds for stage in stages(cores)) <= 8 * 60
        assert all(len(stage.parts) == 1 for stage in stages(cores)[1:-1])  # times are taken alone
    assert [part.name for stage in stages(4, "encoder") for part in stage.parts] == ["encoder, base"]


@pytest.fixture
def gpu(monkeypatch):
    """The CPU passes for a GPU."""
    pretend(monkeypatch)


def test_on_a_gpu_an_op_is_timed_by_replays_on_tensors_in_turn(gpu, monkeypatch, tmp_path):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    monkeypatch.setattr("bench.op_race.copies_for", lambda moved: 3)
    options = Options(True, True, False, None, batch=1, device="cpu", dtype="float32", only=None, results=tmp_path)
    race = OpRace("patchify", options)
    race.variants = {name: race.variants[name] for name in ("index the view", "eager")}
    race.run(rounds=4)
    assert len({id(graph) for graph in replays}) == 2
    assert len(replays) == 2 * (1 + 4)
    assert race.seconds == {name: [0.25e-3 / 3] * 4 for name in race.variants}  # an interval between events, of 3 runs


def test_a_run_that_waits_for_the_device_is_timed_with_the_host(gpu):
    def waits():
        return torch.ones(1).item()

    taken, refused = device_time.replayed({"waits": [waits], "does not": [lambda: torch.ones(1)]}, rounds=2)
    assert list(taken) == ["does not"]
    assert refused == {"waits": "CUDA error: operation not permitted when stream is capturing"}
    assert device_time.followed({"waits": waits}, rounds=2, repeat=5) == {"waits": [0.25e-3 / 5] * 2}


def test_runs_follow_each_other_from_an_empty_queue_on(gpu, monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    device_time.followed({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, rounds=1, repeat=2)
    assert log == ["a", "b", "wait", "a", "a", "wait", "wait", "b", "b", "wait"]


def test_queued_runs_start_after_the_host_has_queued_them(gpu, monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("spin"))
    taken = device_time.queued([lambda: log.append("a"), lambda: log.append("b")], rounds=3)
    assert log == ["a", "b", "spin", "a", "b", "a"]
    assert taken == [0.25e-3] * 3


def test_copies_exceed_the_cache(gpu):
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert device_time.copies_for(cache) == 3
    assert device_time.copies_for(10 * cache) == 1
    assert device_time.copies_for(0) == device_time.MOST_COPIES
