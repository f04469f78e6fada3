"""The parts of the benchmarks that decide what is fair, and what counts as a regression."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cases import BENCHMARKS, ON_ITS_OWN, load, memory, tables
from benchmarks.harness import fairness, hlo, machine, report, runner, show

ROOT = Path(__file__).parents[2]
CALLED, SMALL = load("compile_time"), load("per_sample")


def test_errors_are_over_all_leaves_and_over_the_rows_of_the_reference():
    reference = [np.array([3.0, 0.0]), np.array([[4.0]])]
    gradient = [jnp.array([3.0, 0.3]), jnp.array([[4.4]])]
    assert fairness.gradient_error(gradient, reference) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="differ"):
        fairness.gradient_error([np.zeros(3), np.zeros((1, 1))], reference)
    found = [jnp.array([-3.0 + 3e-3, 40.0 - 4e-3, 99.0])]
    nats = fairness.nats_error(found, [np.array([-3.0, 40.0])])
    assert nats == pytest.approx(5e-3 / 2**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("errors", "times", "target", "expected", "note"),
    [  # linear in logarithms; never extrapolated; without a point that another beats in both
        ([1e-4, 1e-2], [[10, 20], [1, 2]], 1e-3, [10**0.5, 2 * 10**0.5], ""),
        ([1e-4, 1e-2], [[10], [1]], 1e-5, None, "not as accurate"),
        ([1e-4, 1e-2], [[10], [1]], 1.0, [1], "more accurate"),
        ([1e-4, 1e-3, 1e-2], [[2], [50], [1]], 1e-3, [2**0.5], ""),
    ],
)
def test_times_are_compared_at_equal_error(errors, times, target, expected, note):
    place = fairness.at_error(errors, times, target)
    assert place.note == note
    assert place.times is None if expected is None else place.times == pytest.approx(expected)


def test_calls_alternate_in_turns_of_some_length(monkeypatch):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = fairness.alternate(calls, seconds=0.0, least=3, most=5, turn=0.0)
    assert "".join(order) == "abcbcacab"
    assert {name: len(row) for name, row in times.items()} == {"a": 3, "b": 3, "c": 3}
    seconds = {"short": iter([9.0, 1.0, 2.0, 8.0] * 2), "long": iter([30.0, 40.0])}
    monkeypatch.setattr(fairness, "timed", lambda call: (next(seconds[call()]), None))
    calls = {name: lambda name=name: name for name in seconds}
    times = fairness.alternate(calls, seconds=0.0, least=2, most=2, turn=20.0)
    assert times == {"short": [5.0, 5.0], "long": [30.0, 40.0]}
    # The median of the ratios of each round.
    assert fairness.ratio([1.0, 2.0, 30.0], [2.0, 4.0, 3.0]) == 0.5


def test_one_that_fails_is_left_out_and_two_points_around_the_target_are_timed_again():
    exact = [np.array([1.0])]
    works = lambda error: lambda: lambda tolerance: (0.0, [np.array([1 + error * tolerance])])

    def breaks():
        raise ValueError("no such thing\nmore")

    makers = {
        "jaxode": works(1.0), "broken": breaks, "killed": works(1.0), "peer": works(2.0),
        "not finite": works(np.nan),
    }  # fmt: skip
    announced = []
    bench = fairness.Bench(0.0, {"killed": "ended the process"}, announced.append)
    groups, tolerances = {"best": ["broken", "killed", "peer"]}, (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    result = fairness.work_precision(bench, makers, exact, tolerances, 5e-4, groups)
    assert set(result["curves"]) == {"jaxode", "peer"}
    assert set(result["failed"]) == {"broken", "killed", "not finite"}
    assert "no such thing" in result["failed"]["broken"]
    assert "killed" not in announced
    assert result["best"] == {"all peers": "peer", "best": "peer"}
    assert 0 < result["ratios"]["best"] == result["ratios"]["all peers"]  # the same two
    rounds = {row["tolerance"]: row["rounds"] for row in result["curves"]["jaxode"]}
    assert rounds == {1e-1: 1, 1e-2: 1, 1e-3: 3, 1e-4: 3}  # and 1e-5 is needed no more
    json.dumps(result)


def test_unequal_mathematics_is_found():
    x = np.linspace(1.0, 2.0, 5)
    fairness.check_equal({"one": x, "other": x * (1 + 1e-15)})
    with pytest.raises(AssertionError, match="other differs from one"):
        fairness.check_equal({"one": x, "other": x * (1 + 1e-9)})
    with pytest.raises(TypeError, match="float64"):
        fairness.check_equal({"one": x, "other": x.astype(np.float32)})


PROGRAM = """HloModule step

%fused (x: f32[8,2], w: f32[2,2]) -> f32[8,2] {
  %dot.1 = f32[8,2]{1,0} dot(%x, %w), operand_precision={highest,highest}
  ROOT %tanh.1 = f32[8,2]{1,0} tanh(%dot.1)
}

%stage (state: (f32[8,2], s32[])) -> (f32[8,2], s32[]) {
  %next = s32[] add(%i, %one)
  %fusion.1 = f32[8,2]{1,0:T(8,128)} fusion(%x, %w), kind=kOutput, calls=%fused, CYCLES100
  ROOT %out.1 = (f32[8,2]{1,0}, s32[]) tuple(%fusion.1, %next)
}

%body (state: (f32[8,2], s32[])) -> (f32[8,2], s32[]) {
  %stages = (f32[8,2]{1,0}, s32[]) while(%state), condition=%condition, body=%stage
  ROOT %all-reduce.1 = f32[8,2]{1,0} all-reduce(f32[8,2]{1,0} %x), to_apply=%add, CYCLES10
}

%condition (state: (f32[8,2], s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,2]) -> f32[8,2] {
  %loop = (f32[8,2]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  %dot.2 = f32[8,2]{1,0} dot(%x, %w), CYCLES7
  ROOT %all-reduce.2 = (f32[3]{0}, f32[]) all-reduce(%a, %b), to_apply=%add, CYCLES5
}
"""


def test_kernels_and_collectives_are_counted_loop_by_loop():
    assert hlo.collectives(PROGRAM) == [
        {"kind": "all-reduce", "bytes": 64, "depth": 1},
        {"kind": "all-reduce", "bytes": 16, "depth": 0},
    ]
    text = re.sub(r"CYCLES(\d+)", r'backend_config={"estimated_cycles":"\1"}', PROGRAM)
    program = hlo.read(text)
    (steps,) = program.loops
    assert program.own == hlo.Work(kernels=2, products=1, full=0, cycles=12)
    assert steps.trip(6) == hlo.Work(kernels=7, products=6, full=6, cycles=610)
    with pytest.raises(ValueError, match="argument"):
        steps.trip(6, 6)
    # Without estimates, as on a GPU, arithmetic on single numbers is a kernel, too.
    known = PROGRAM.replace("body=%stage", 'body=%stage, config={"known_trip_count":{"n":"2"}}')
    (steps,) = hlo.read(known).loops
    assert steps.trip() == hlo.Work(kernels=8, products=2, full=2)


WORKER = """
import json, os, signal, sys
report, options = sys.argv[1], json.loads(sys.argv[2])
def say(**message):
    with open(report, "a") as file:
        file.write(json.dumps(message) + chr(10))
say(next="good")
say(next="bad")
if "bad" not in options["skip"]:
    os.kill(os.getpid(), signal.SIGSEGV)
say(result={"failed": options["skip"]})
"""


def test_a_contender_that_ends_the_process_is_left_out_of_the_next_try(monkeypatch):
    def worker(name, case, report, options, log):
        assert (name, case) == ("step", "case")
        return subprocess.Popen([sys.executable, "-c", WORKER, report, options])

    monkeypatch.setattr(runner, "worker", worker)
    result = runner.measure("step", "case", 1.0, 60.0, lambda peer: None)
    assert result["failed"] == {"bad": "ended the process, exit status -11"}


def on_two_cores(monkeypatch, measure, path):
    """`run(names)`, which goes on with the results at the path."""
    monkeypatch.setattr(runner, "measure", measure)
    monkeypatch.setattr(runner, "OUT", path.parent)
    monkeypatch.setattr(runner, "code", lambda: "abc")

    def run(names, **options):
        results = runner.read(path) | {"machine": {"cores": 2}}
        runner.run(names, results, partial(runner.save, path), **options)
        return results["benchmarks"]

    return run


def test_a_run_continues_with_the_cases_that_are_missing(monkeypatch, tmp_path):
    measured, alone = [], threading.Lock()

    def measure(name, case, seconds, limit, tell, stop):
        if len(measured) == 2:
            raise KeyboardInterrupt
        assert alone.acquire(blocking=False)  # nothing runs beside what is timed
        time.sleep(0.01)
        alone.release()
        measured.append(case)
        return {"times": ["60", f"{seconds:g}"], "scores": {}}

    path, cases = tmp_path / "mine.json", [*SMALL.cases]
    run = on_two_cores(monkeypatch, measure, path)
    with pytest.raises(KeyboardInterrupt):
        run(["compile_time", "per_sample"])
    found = runner.read(path)["benchmarks"]
    assert {name: [*of] for name, of in found.items()} == {"compile_time": [*CALLED.cases]}
    table = next(iter(tables.BENCHMARK.cases))
    for names, options, expected in (
        (["compile_time", "per_sample"], {}, cases),
        (["per_sample"], {}, []),
        (["per_sample"], {"fresh": True}, cases),
        (["per_sample"], {"fresh": True, "match": "jaxode.nn"}, cases[1:]),  # others are kept
        (["tables"], {"match": table, "seconds": 90.0}, [table]),
        (["tables"], {"match": table, "seconds": 60.0}, []),
        (["tables"], {"match": table}, [table]),  # it had less time
    ):
        measured.clear()
        found = run(names, **options)
        assert measured == expected
        assert list(found["per_sample"]) == cases
    with pytest.raises(SystemExit, match="no case contains 'nothing'"):
        run(["per_sample"], fresh=True, match="nothing")
    assert runner.read(path)["benchmarks"] == found


def test_two_runs_do_not_write_the_same_results(tmp_path):
    path = tmp_path / "mine.json"
    raises = pytest.raises(SystemExit, match="another run writes to")
    with runner.alone(path), runner.alone(tmp_path / "others" / "mine.json"):
        pass
    with runner.alone(path), raises, runner.alone(path):
        pass


def test_an_interruption_ends_what_runs_side_by_side(monkeypatch, tmp_path):
    processes, begun = [], threading.Event()

    def worker(name, case, report, options, log):
        if case != next(iter(memory.BENCHMARK.cases)):
            begun.wait()
            raise KeyboardInterrupt
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        begun.set()
        return processes[0]

    run = on_two_cores(monkeypatch, runner.measure, tmp_path / "mine.json")
    monkeypatch.setattr(runner, "worker", worker)
    with pytest.raises(KeyboardInterrupt):
        run(["memory"])
    assert processes[0].wait(timeout=10) == -signal.SIGKILL


def test_pages_and_pictures_are_those_of_the_results(monkeypatch, tmp_path):
    drawn, pages = [], ("README.md", "benchmarks/RESULTS.md")
    monkeypatch.setattr(report.show, "save", lambda figure, title, path: drawn.append(path.name))
    (tmp_path / "benchmarks").mkdir()
    text = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(
        re.sub(r"(?s)(<!-- (\w+) -->).*(<!-- end of \2)", r"\1\3", text)
    )
    report.write(ROOT / "benchmarks" / "results", tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    assert len((ROOT / pages[1]).read_text().splitlines()) <= 220
    assert set(drawn) == {path.name for path in (ROOT / "docs/images").glob("bench_*")}


def test_show_prints_every_median_failure_and_choice(monkeypatch, capsys):
    asked = lambda *names: monkeypatch.setattr(sys, "argv", ["benchmarks", "--show", *names])
    for name in (*BENCHMARKS, *ON_ITS_OWN):
        asked(name)
        assert runner.main() == 0
        printed = capsys.readouterr().out
        numbers = set(re.findall(r"-?\d[\d.]*(?:e[+-]\d+)?", printed))
        for results in report.read(ROOT / "benchmarks" / "results"):
            cases = [*load(name).cases.keys() & results["benchmarks"].get(name, {}).keys()]
            found = [results["benchmarks"][name][case] for case in cases]
            assert not found or f"## {results['machine']['name']}\n" in printed
            for median in medians_in(found):
                forms = show.ms(median), f"{median:.2f}", f"{1e6 * median:.3g}"
                assert numbers.intersection(forms), (name, median)
            for result in found:
                assert [
                    best for best in result.get("best", {}).values() if best not in printed
                ] == []
                for contender, why in result.get("failed", {}).items():
                    assert f"{contender} failed: {why}" in printed
                assert "crashed" not in result or result["crashed"] in printed
    asked()
    assert runner.main() == 0
    assert capsys.readouterr().out.count("\n### ") > len(BENCHMARKS)


def medians_in(found):
    """The numbers under the key `median`, however deep."""
    if isinstance(found, dict):
        return [found["median"]] if "median" in found else medians_in([*found.values()])
    return [m for part in found for m in medians_in(part)] if isinstance(found, list) else []


def test_cases_that_crash_and_contenders_that_fail_stand_in_the_report():
    curves = {"jaxode": [[8, 2**20], [512, 2**22]], "diffrax backsolve": [[8, 2**21]]}
    dim = {"failed": {"jax odeint": "ValueError: no"}, "curves": curves}
    crashed = {"dim": dim, "batch": {"crashed": "start: ended the process"}}
    text = "\n".join(
        report.sections({"machine": machine.machine(), "benchmarks": {"memory": crashed}})
    )
    for part in (
        "| MiB | dim 8 | dim 512 |", "| diffrax backsolve | 2.00 |  |",
        "jax odeint failed: ValueError: no", "batch crashed: start: ended the process",
    ):  # fmt: skip
        assert part in text
