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
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cases import accelerators, adjoints, load, memory, tables, time_to_nll, tolerance
from benchmarks.harness import fairness, hlo, machine, problems, report, runner, table_data
from benchmarks.peers import estimators

pytestmark = pytest.mark.shown
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


def test_a_step_and_its_reverse_are_the_two_loops_over_steps():
    loop = lambda kernels, *inside: hlo.Loop(None, hlo.Work(kernels), list(inside))
    ahead, back = loop(2, loop(10)), loop(3, loop(1000), loop(5))
    program = hlo.Loop(1, hlo.Work(7), [loop(20), ahead, back])
    contender = accelerators.Contender(lambda *args: None, None, backward=(0, 4), once=(2,))
    found = accelerators.described(program, contender)
    kernels = {name: found[name]["kernels"] for name in ("forward", "backward", "once")}
    assert kernels == {"forward": 2 + 6 * 10, "backward": 3 + 4 * 5, "once": 7 + 2 * 20}
    program.loops.append(ahead)
    with pytest.raises(ValueError, match="got 3"):
        accelerators.described(program, contender)


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


def test_results_are_reported_with_failures_and_crashes(monkeypatch, tmp_path):
    curves = {"jaxode": [[8, 2**20], [512, 2**22]], "diffrax backsolve": [[8, 2**21]]}
    dim = {"failed": {"jax odeint": "ValueError: no"}, "curves": curves}
    crashed = {"dim": dim, "batch": {"crashed": "start: ended the process"}}
    times = {"jaxode": fairness.summary([1.0]), "diffrax checkpointed": fairness.summary([2.0])}
    called = lambda code, **ratios: {
        case: {"code": code, "ratios": ratios, "times": times} for case in CALLED.cases
    }
    own = machine.machine()
    monkeypatch.setattr(report, "PUBLISHED", "mine")
    for name, benchmarks in (
        ("mine", {"memory": crashed, "compile_time": called("abc", diffrax=0.5)}),
        ("other", {"compile_time": called("def", zuko=0.9)}),
    ):
        results = {"machine": own | {"name": name}, "benchmarks": benchmarks}
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    (tmp_path / "benchmarks").mkdir()
    readme, text = tmp_path / "README.md", tmp_path / "benchmarks" / "RESULTS.md"
    names = "benchmarks", "densities"
    readme.write_text("".join(f"<!-- {name} -->old<!-- end of {name} -->" for name in names))
    report.write(tmp_path, tmp_path)
    case, pictures = next(iter(CALLED.cases)), ("bench_memory", "bench_compile_time_other")
    for file, parts in {
        readme: ("| first call, flow / Neural ODE | 0.50 / 0.50 |  |", "commit abc"),
        text: (
            f"| jaxode divided by | diffrax |\n|---|---|\n| {case} | 0.50 |",
            "| MiB | dim 8 | dim 512 |", "| diffrax backsolve | 2.00 |  |",
            "jax odeint failed: ValueError: no", "batch crashed: start: ended the process",
            *(f"docs/images/{name}.png" for name in pictures),
        ),
    }.items():  # fmt: skip
        assert [part for part in parts if part not in file.read_text()] == []
    assert not re.search("old|commit def", readme.read_text())  # of a machine not published
    for name in pictures:
        assert (tmp_path / f"docs/images/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_times_to_a_likelihood_stand_beside_the_nats_within_a_minute():
    ours, peer = "jaxode, Residual, matching, then likelihood", time_to_nll.SAME_METHOD
    run = lambda reached, steps, *curve: {"reached": reached, "steps": steps, "curve": [*curve]}
    done = {
        f"8 Gaussians: {ours}, seed 0": run(5.0, 8400, [5.0, 2.5], [30.0, 2.4], [59.0, 2.7]),
        f"8 Gaussians: {ours}, seed 1": run(4.0, 4000, [4.0, 2.5]),
        f"8 Gaussians: {peer}, seed 0": run(7.0, 400, [8.0, 2.5], [59.0, 2.45]),
    }
    table = time_to_nll.BENCHMARK.table(done)
    assert f"| {ours} | 5.0, 4.0 | 2.400 | 2.700 | 30.0 |" in table
    assert f"| {peer} | 7.0 | 2.450 | 2.450 | 59.0 |" in table
    del done[f"8 Gaussians: {ours}, seed 0"]["curve"][1]
    assert "| 2.500 | 2.700 | not reached |" in time_to_nll.BENCHMARK.table(done)


def test_tables_have_columns_with_a_density_and_are_spread_and_split():
    rng = np.random.default_rng(0)
    good = rng.standard_normal((400, 3)).round(6)
    atom = np.where(np.arange(400) < 10, 0.5, rng.standard_normal(400))
    combination = good @ [1, 2, 3] + 1e-3 * rng.standard_normal(400)
    columns = [good[:, 0], atom, rng.integers(0, 30, 400), good[:, 1], good[:, 2], combination]
    x = np.stack([*columns, np.ones(400)], axis=1)
    left = table_data.with_density(np.concatenate([x, x[:7]]))
    np.testing.assert_array_equal(left[np.argsort(left[:, 0])], good[np.argsort(good[:, 0])])
    # Rounded values are spread over their gap, the smallest.
    x = np.arange(1000.0)[:, None] * [0.01, 1.0]
    x[:, 1] = x[::-1, 1] ** 2
    noise = table_data.spread(x, rng) - x
    for column, gap in zip(noise.T, (0.01, 1.0), strict=True):
        assert gap / 2 >= abs(column).max() > 0.4 * gap
    table = table_data.prepare(rng.standard_normal((1000, 2)))
    assert [len(part) for part in table] == [800, 100, 100]
    assert len(np.unique(np.concatenate(table), axis=0)) == 1000
    moments = table.train.mean(0), table.train.std(0)
    np.testing.assert_allclose(moments, [[0, 0], [1, 1]], atol=1e-6)  # float32


def test_scores_are_those_of_the_best_on_the_validation_rows_in_time(monkeypatch):
    now = [0.0]

    def train():
        # Seconds of the work before each candidate, its validation nats, and its test nats.
        for seconds, *nats in [(8, 5, 50), (9, 3, 30), (3.5, 2, 20), (20, 4, 40), (60, 1, 10)]:
            now[0] += seconds
            yield estimators.Candidate(nats[0], lambda nats=nats: nats[1])

    def contender(table, seed, seconds):
        now[0] += 100  # imports
        return train()

    monkeypatch.setattr(tables, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    contenders = dict.fromkeys(("any", "jaxode"), estimators.Contender(contender))
    monkeypatch.setattr(tables, "CONTENDERS", contenders)
    scores = lambda name, times: tables.scores(tables.Case("", name, "", 0), None, times)
    found = scores("any", [5.0, 20.0, 60.0])
    # At 20.5 s is in time for 20, at 100.5 not for 60, and there is none at 5.
    assert {end: score["nats"] for end, score in found.items()} == {"20": 20, "60": 20}
    assert found["20"]["seconds"] == 20.5
    # It was told to take 60 seconds, and is a little late.
    assert scores("jaxode", [60.0])["60"]["nats"] == 10


def test_the_tables_of_densities_say_which_is_best_and_what_is_missing():
    def run(validation=0.0, **nats):
        scores = {
            end[1:]: {"nats": value, "validation": validation, "seconds": 63.0}
            for end, value in nats.items()
        }
        return {"rows": 80, "columns": 2, "times": ["20", "60"], "scores": scores}

    done = {
        "banana: jaxode, seed 0": run(t20=2.0, t60=1.0),
        "banana: jaxode, seed 1": run(t20=2.0, t60=2.0),
        "banana: zuko NSF, seed 0": run(t60=1.25),
        "magic: zuko NSF, seed 0": run(t20=5.0, t60=float("nan")),
        "magic: jaxode, seed 0": run(t20=4.0, t60=3.0),
        "phoneme: jaxode, seed 0": run(t20=4.0, t60=3.0),
    }
    shown = tables.BENCHMARK.table
    after, before = shown(done).split("nats after 20 s")
    assert "| banana, 80 x 2, 1 to 2 seeds | 1.500 |  | **1.250** |" in after
    assert "| magic, 80 x 2 | **3.000** |  | none in time |" in after
    assert "| banana, 80 x 2, 1 to 2 seeds | **2.000** |  | none in time |" in before
    assert "as a row names, or one: 0, 1; jaxode at most 215% late." in before
    assert after.startswith(
        "Best after 60 s, of 2 tables (mean rank): jaxode 1 (1.5), zuko NSF 1 (1.5)."
    )
    # Of three settings the validation rows choose, for each seed; of equal ones the first.
    name = lambda setting, seed: tables.Case("magic", "jaxode", setting, seed).name
    done = {
        name(setting, seed): run(-abs(place - 1), t60=10 * seed + place)
        for seed in (0, 1, 2)
        for place, setting in enumerate(estimators.CONTENDERS["jaxode"].settings)
    }
    documented, best = shown(done).split("The best of three settings")
    assert "| magic, 80 x 2, 3 seeds | **10.000** |" in documented
    assert "| magic, 80 x 2, 3 seeds | **10.000** |  |  |" in best
    done |= {name("width 256", seed): run(-5.0, t60=10 * seed + 3) for seed in (0, 1, 2)}
    assert "| **13.000** |" in shown(done).split("three settings")[1]
    del done[name("width 256", 2)]  # then its third seed has no best
    assert "2 seeds | **8.000** |" in shown(done).split("three settings")[1]
    done["magic: zuko NSF, seed 0"] = run(t60=5.0)  # of one setting only: who is best?
    assert "| magic, 80 x 2, 1 to 3 seeds | 10.000 |  | **5.000** |" in shown(done)
    assert "The best of three settings" not in shown(done)


@pytest.mark.slow
def test_the_scripts_behind_the_pictures_of_the_documentation(
    tmp_path, monkeypatch, default_settings
):
    """On tiny settings: errors fall with the tolerance, and the adjoint ODE needs less memory."""
    monkeypatch.delitem(adjoints.ADJOINTS, "DiscreteAdjoint(checkpoints=8)")  # in a test of its own
    workload = problems.Workload(2, 4, (5,), steps=200)
    rows = tolerance.measure(workload, (1e-1, 1e-5), ("Tsit5",))
    assert rows[1]["gradient"] < rows[0]["gradient"]
    assert rows[1]["evaluations"] > rows[0]["evaluations"]
    tolerance.draw({"rows": rows}, tmp_path / "tolerance.png")
    measured = {"memory": adjoints.memory((4,)), "contraction": adjoints.contraction((1,))}
    states = {row["adjoint"]: row["states"] for row in measured["memory"]}
    assert states["BacksolveAdjoint()"] < states["DiscreteAdjoint()"]
    # The tolerance is 1e-5; the gradient multiplies the error by less than a hundred.
    assert all(row["error"] < 1e-3 for row in measured["contraction"])
    loose, tight = adjoints.moving_mesh((1e-2, 1e-6))
    gap = lambda row: abs(row["gradient"] - row["finite difference of the computed loss"])
    # What the page on gradients says: they agree as the tolerance is tightened, and not before.
    assert gap(loose) > 1 > 1e-4 > gap(tight)
    adjoints.draw(measured, tmp_path / "adjoints.png")
    assert (tmp_path / "tolerance.png").stat().st_size > 0
    assert (tmp_path / "adjoints.png").stat().st_size > 0
