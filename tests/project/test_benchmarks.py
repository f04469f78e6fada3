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

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cases import (
    accelerators,
    adjoints,
    compile_time,
    load,
    memory,
    per_sample,
    tables,
    time_to_nll,
    tolerance,
)
from benchmarks.harness import (
    fairness,
    hlo,
    machine,
    problems,
    report,
    runner,
    table_data,
)
from benchmarks.peers import estimators, flows

pytestmark = pytest.mark.shown
TINY = problems.Workload(3, 4, (5, 6), steps=20)


_cache = {}


@pytest.fixture
def tiny(default_settings):
    """A flow in float32, and its exact gradient: the same for every test."""
    if not _cache:
        p = problems.flow(TINY)
        _cache["tiny"] = p, flows.exact(p)
    return _cache["tiny"]


def test_gradient_error_is_over_all_leaves_together():
    reference = [np.array([3.0, 0.0]), np.array([[4.0]])]
    gradient = [jnp.array([3.0, 0.3]), jnp.array([[4.4]])]
    assert fairness.gradient_error(gradient, reference) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="differ"):
        fairness.gradient_error([np.zeros(3), np.zeros((1, 1))], reference)


def test_error_in_nats_is_absolute_and_over_the_rows_of_the_reference():
    reference = [np.array([-3.0, 40.0])]
    found = [jnp.array([-3.0 + 3e-3, 40.0 - 4e-3, 99.0])]
    assert fairness.nats_error(found, reference) == pytest.approx(5e-3 / 2**0.5, rel=1e-3)


def test_time_at_an_error_is_linear_in_logarithms():
    times = [[10.0, 20.0], [1.0, 2.0]]
    place = fairness.at_error([1e-4, 1e-2], times, 1e-3)
    assert place.times is not None
    np.testing.assert_allclose(place.times, [10**0.5, 2 * 10**0.5])
    assert place.note == ""


def test_time_at_an_error_is_never_extrapolated():
    errors, times = [1e-4, 1e-2], [[10.0], [1.0]]
    assert fairness.at_error(errors, times, 1e-5) == (None, "not as accurate")
    beyond = fairness.at_error(errors, times, 1.0)
    assert (beyond.times, beyond.note) == ([1.0], "more accurate")


def test_a_point_that_another_beats_in_error_and_time_is_not_on_the_curve():
    errors, times = [1e-4, 1e-3, 1e-2], [[2.0], [50.0], [1.0]]
    place = fairness.at_error(errors, times, 1e-3)
    assert place.times is not None
    np.testing.assert_allclose(place.times, [2**0.5])


def test_calls_alternate_in_another_order_each_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = fairness.alternate(calls, seconds=0.0, least=3, most=5, turn=0.0)
    assert "".join(order) == "abcbcacab"
    assert {name: len(row) for name, row in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_short_call_is_timed_among_others_of_its_own(monkeypatch):
    seconds = {"short": iter([9.0, 1.0, 2.0, 8.0] * 2), "long": iter([30.0, 40.0])}
    monkeypatch.setattr(fairness, "timed", lambda call: (next(seconds[call()]), None))
    calls = {name: lambda name=name: name for name in seconds}
    times = fairness.alternate(calls, seconds=0.0, least=2, most=2, turn=20.0)
    assert times == {"short": [5.0, 5.0], "long": [30.0, 40.0]}


def test_a_ratio_is_the_median_of_the_ratios_of_each_round():
    assert fairness.ratio([1.0, 2.0, 30.0], [2.0, 4.0, 3.0]) == 0.5


def test_one_that_fails_is_recorded_and_the_rest_carried_on():
    exact = [np.array([1.0])]
    works = lambda error: lambda: lambda tolerance: (0.0, [np.array([1 + error * tolerance])])

    def breaks():
        raise ValueError("no such thing\nmore")

    makers = {
        "jaxode": works(0.1), "broken": breaks, "killed": works(1.0), "peer": works(0.2),
        "not finite": works(np.nan),
    }  # fmt: skip
    announced = []
    bench = fairness.Bench(0.0, {"killed": "ended the process"}, announced.append)
    groups = {"best": ["broken", "killed", "peer"]}
    result = fairness.work_precision(bench, makers, exact, (1e-2, 1e-3), 1e-3, groups)
    assert set(result["curves"]) == {"jaxode", "peer"}
    assert set(result["failed"]) == {"broken", "killed", "not finite"}
    assert "no such thing" in result["failed"]["broken"]
    assert "killed" not in announced
    assert result["best"] == {"all peers": "peer", "best": "peer"}
    assert 0 < result["ratios"]["best"] == result["ratios"]["all peers"]  # the same two
    json.dumps(result)


def test_only_the_two_points_around_the_target_are_timed_again_and_again():
    exact, calls = [np.array([1.0])], []

    def step(tolerance):
        calls.append(tolerance)
        return 0.0, [np.array([1 + tolerance])]

    tolerances = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    bench = fairness.Bench(0.0)
    result = fairness.work_precision(bench, {"jaxode": lambda: step}, exact, tolerances, 5e-4, {})
    rounds = {row["tolerance"]: row["rounds"] for row in result["curves"]["jaxode"]}
    assert rounds == {1e-1: 1, 1e-2: 1, 1e-3: 3, 1e-4: 3}
    assert 1e-5 not in calls


def test_unequal_mathematics_is_found():
    x = np.linspace(1.0, 2.0, 5)
    fairness.check_equal({"one": x, "other": x * (1 + 1e-15)})
    with pytest.raises(AssertionError, match="other differs from one"):
        fairness.check_equal({"one": x, "other": x * (1 + 1e-9)})
    with pytest.raises(TypeError, match="float64"):
        fairness.check_equal({"one": x, "other": x.astype(np.float32)})


@pytest.mark.parametrize("platform", ["Intel(R) Xeon(R) CPU E5 @ 2.20GHz 2 cores", "NVIDIA H100"])
def test_machine_names_are_file_names(platform):
    assert machine.slug(platform) in ("intel-xeon-e5-2-cores", "nvidia-h100")


def test_the_machine_can_be_named(monkeypatch):
    monkeypatch.setenv("BENCH_MACHINE", "mine")
    described = machine.machine()
    assert described["name"] == "mine"
    assert described["versions"]["jax"] == jax.__version__


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchdiffeq", "zuko", "torchode"])
def test_contenders_in_pytorch_have_the_gradient_of_the_reference(name, tiny):
    pytest.importorskip(name, reason=f"{name} is installed for benchmarks only: make bench")
    from benchmarks.peers import in_torch

    p, exact = tiny
    for own in (True, False):
        in_torch.check_networks(problems.flow(TINY._replace(own=own)))
    step = getattr(in_torch, f"{name}_step")(p)
    assert fairness.gradient_error(step(1e-5)[1], exact) < 1e-3  # float32


PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

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
  %all-reduce.1 = f32[8,2]{1,0} all-reduce(f32[8,2]{1,0} %x), to_apply=%add, CYCLES10
  ROOT %out = (f32[8,2]{1,0}, s32[]) tuple(%all-reduce.1, %i)
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


def test_collectives_are_found_with_their_bytes_and_loops():
    assert hlo.collectives(PROGRAM) == [
        {"kind": "all-reduce", "bytes": 64, "depth": 1},
        {"kind": "all-reduce", "bytes": 16, "depth": 0},
    ]


def test_kernels_are_counted_loop_by_loop():
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


def test_a_stiff_case_is_a_gradient_by_the_rates_of_each_row():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (flows.AXIS,))
    p, compared = accelerators.stiff_problem(accelerators.STIFF["1000 of Robertson's"], mesh)
    _, gradient = jax.eval_shape(compared["jaxode"].step, p.params, p.x, None)
    assert gradient.shape == (1000, 3)


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


def test_a_contender_that_ends_the_process_is_left_out_of_the_next_try(monkeypatch, tmp_path):
    def worker(name, case, report, options, log):
        assert (name, case) == ("step", "case")
        return subprocess.Popen([sys.executable, "-c", WORKER, report, options])

    monkeypatch.setattr(runner, "worker", worker)
    result = runner.measure("step", "case", 1.0, 60.0, lambda peer: None)
    assert result["failed"] == {"bad": "ended the process, exit status -11"}


def test_programs_for_accelerators_are_compiled_case_by_case(monkeypatch, tmp_path, capsys):
    script = "import sys; open(sys.argv[1], 'a').write('{\"result\": {\"programs\": {}}}')"

    def worker(name, case, report, options, log):
        return subprocess.Popen([sys.executable, "-c", script, report])

    monkeypatch.setattr(runner, "worker", worker)
    monkeypatch.setattr(accelerators, "PACKAGES", ())
    monkeypatch.setattr(accelerators, "ENVIRONMENT", {})
    monkeypatch.setattr(accelerators, "RESULTS", tmp_path / "accelerators.json")
    monkeypatch.setattr(accelerators, "PAGE", tmp_path / "page.md")
    page = "before <!-- accelerators -->old<!-- end of accelerators --> after"
    accelerators.PAGE.write_text(page)
    assert accelerators.measured(SimpleNamespace(fresh=True)) == 0
    written = runner.read(accelerators.RESULTS)
    assert list(written) == ["versions", "cases"]
    assert list(written["cases"]) == list(accelerators.BENCHMARK.cases)
    assert "old" not in accelerators.PAGE.read_text()
    assert "jaxode over a peer" in capsys.readouterr().out
    monkeypatch.setattr(runner, "worker", None)  # all are there
    assert accelerators.measured(SimpleNamespace(fresh=False)) == 0


def on_a_machine(monkeypatch, measure, cores, path):
    """`run(names)`, which goes on with the results at the path."""
    machine = {"name": "mine", "device": "a machine", "cores": cores}
    monkeypatch.setattr(runner, "measure", measure)
    monkeypatch.setattr(runner, "OUT", path.parent)
    monkeypatch.setattr(runner, "code", lambda: "abc")

    def run(names, **options):
        results = runner.read(path) | {"machine": machine}
        runner.run(names, results, partial(runner.save, path), **options)
        return results["benchmarks"]

    return run


def test_a_run_continues_with_the_cases_that_are_missing(monkeypatch, tmp_path):
    measured = []

    def measure(name, case, seconds, limit, tell, stop):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((name, case))
        return {}

    path, names = tmp_path / "mine.json", ["compile_time", "per_sample"]
    run = on_a_machine(monkeypatch, measure, 1, path)
    with pytest.raises(KeyboardInterrupt):
        run(names)
    done = {"code": "abc"}
    assert runner.read(path)["benchmarks"] == {
        "compile_time": {"flow, 8 Gaussians, a user's own field": done, "Neural ODE, state 4": done}
    }
    measured.clear()
    run(names)
    assert measured == [("per_sample", case) for case in per_sample.BENCHMARK.cases]
    measured.clear()
    run(["per_sample"], fresh=True)
    assert measured == [("per_sample", case) for case in per_sample.BENCHMARK.cases]
    measured.clear()
    found = run(["per_sample"], fresh=True, match="jaxode.nn")
    assert [case.endswith("jaxode.nn") for _, case in measured] == [True]
    assert list(found["per_sample"]) == list(per_sample.BENCHMARK.cases)  # the others are kept
    with pytest.raises(SystemExit, match="no case contains 'nothing'"):
        run(["per_sample"], fresh=True, match="nothing")
    assert runner.read(path)["benchmarks"] == found


def test_two_runs_do_not_write_the_same_results(tmp_path):
    path = tmp_path / "mine.json"
    with runner.alone(path):
        with pytest.raises(SystemExit, match="another run writes to"), runner.alone(path):
            pass
        with runner.alone(tmp_path / "others" / "mine.json"):
            pass
    with runner.alone(path):
        pass


def test_a_case_that_had_less_time_is_shown_until_it_is_measured_again(monkeypatch, tmp_path):
    measured = []

    def measure(name, case, seconds, limit, tell, stop):
        measured.append(seconds)
        return {"times": ["20", "60", f"{seconds:g}"], "scores": {}}

    path, case = tmp_path / "mine.json", "banana: jaxode, seed 0"
    runner.save(path, {"benchmarks": {"tables": {case: {"scores": {"20": {}, "60": {}}}}}})
    run = on_a_machine(monkeypatch, measure, 1, path)
    run(["tables"], seconds=60.0, match=case)
    assert not measured
    assert run(["tables"], match=case)["tables"][case]["times"] == ["20", "60", "300"]
    run(["tables"], match=case)
    assert measured == [300.0]


def test_only_cases_without_times_run_side_by_side(monkeypatch, tmp_path):
    both, working = threading.Barrier(2, timeout=60), set()

    def measure(name, case, seconds, limit, tell, stop):
        working.add(case)
        if name == "memory":
            both.wait()
            time.sleep(0.1 * (case == "width"))
        else:
            assert working == {case}
        working.discard(case)
        return {"measured": case}

    names = ["compile_time", "memory"]
    results = on_a_machine(monkeypatch, measure, 2, tmp_path / "mine.json")(names)
    for name in names:
        assert [result["measured"] for result in results[name].values()] == list(load(name).cases)


def test_an_interruption_ends_what_runs_side_by_side(monkeypatch, tmp_path):
    processes, begun = [], threading.Event()

    def worker(name, case, report, options, log):
        if case != next(iter(memory.BENCHMARK.cases)):
            begun.wait()
            raise KeyboardInterrupt
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        begun.set()
        return processes[0]

    run = on_a_machine(monkeypatch, runner.measure, 2, tmp_path / "mine.json")
    monkeypatch.setattr(runner, "worker", worker)
    with pytest.raises(KeyboardInterrupt):
        run(["memory"])
    assert processes[0].wait(timeout=10) == -signal.SIGKILL


def test_results_are_reported_with_failures_and_crashes(monkeypatch, tmp_path):
    case = {
        "failed": {"jax odeint": "ValueError: no"},
        "curves": {"jaxode": [[8, 2**20], [512, 2**22]], "diffrax backsolve": [[8, 2**21]]},
    }
    cases = {"dim": case, "batch": {"crashed": "start: ended the process"}}
    first = {"code": "abc", "ratios": {"diffrax": 0.5}, "times": {
        "jaxode": fairness.summary([1.0]), "diffrax checkpointed": fairness.summary([2.0])
    }}  # fmt: skip
    called = dict.fromkeys(compile_time.BENCHMARK.cases, first)
    benchmarks = {"memory": cases, "compile_time": called}
    own = machine.machine()
    monkeypatch.setattr(report, "PUBLISHED", own["name"])
    results = {"machine": own, "benchmarks": benchmarks}
    (tmp_path / "mine.json").write_text(json.dumps(results))
    called = {case: first | {"code": "def", "ratios": {"zuko": 0.9}} for case in called}
    results = {"machine": own | {"name": "other"}, "benchmarks": {"compile_time": called}}
    (tmp_path / "other.json").write_text(json.dumps(results))
    (tmp_path / "table.json").write_text(json.dumps({"machine": "of another kind"}))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text(
        "before <!-- benchmarks -->old<!-- end of benchmarks -->"
        "<!-- densities -->old<!-- end of densities --> after"
    )
    report.write(tmp_path, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before <!-- benchmarks -->")
    assert readme.endswith(" after")
    case = next(iter(compile_time.BENCHMARK.cases))
    assert "| first call, flow / Neural ODE | 0.50 / 0.50 |  |" in readme
    assert "commit abc" in readme
    assert "commit def" not in readme  # of a machine that is not the published one
    assert "old" not in readme
    text = (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert f"| jaxode divided by | diffrax |\n|---|---|\n| {case} | 0.50 |" in text
    assert "| MiB | dim 8 | dim 512 |" in text
    assert "| diffrax backsolve | 2.00 |  |" in text
    assert "jax odeint failed: ValueError: no" in text
    assert "batch crashed: start: ended the process" in text
    picture = tmp_path / "docs" / "images" / "bench_memory.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"## {own['name']}" in text
    assert "## other" in text
    assert "docs/images/bench_compile_time_other.png" in text
    assert (picture.parent / "bench_compile_time_other.png").exists()


def test_times_to_a_likelihood_stand_beside_the_nats_within_a_minute():
    name = "jaxode, Residual, matching, then likelihood"
    run = lambda reached, steps, last: {
        "reached": reached, "steps": steps, "curve": [[reached, 2.5], [59.0, last]]
    }  # fmt: skip
    done = {
        f"8 Gaussians: {name}, seed 0": run(5.0, 8400, 2.7),
        f"8 Gaussians: {name}, seed 1": run(4.0, 4000, 2.5),
    }
    assert f"| {name} | 5.0, 4.0 | 2.500 | 2.700 |  |" in time_to_nll.BENCHMARK.table(done)
    peer = time_to_nll.SAME_METHOD
    done[f"8 Gaussians: {peer}, seed 0"] = run(8.0, 400, 2.45) | {"reached": 7.0}
    table = time_to_nll.BENCHMARK.table(done)
    assert f"| {name} | 5.0, 4.0 | 2.500 | 2.700 | not reached |" in table
    assert f"| {peer} | 7.0 | 2.450 | 2.450 | 59.0 |" in table
    done[f"8 Gaussians: {name}, seed 0"]["curve"].insert(1, [30.0, 2.45])
    table = time_to_nll.BENCHMARK.table(done)
    assert f"| {name} | 5.0, 4.0 | 2.450 | 2.700 | 30.0 |" in table


def test_columns_without_a_density_are_left_out_of_tables():
    rng = np.random.default_rng(0)
    good = rng.standard_normal((400, 3)).round(6)
    atom = np.where(np.arange(400) < 10, 0.5, rng.standard_normal(400))
    combination = good @ [1, 2, 3] + 1e-3 * rng.standard_normal(400)
    columns = [good[:, 0], atom, rng.integers(0, 30, 400), good[:, 1], good[:, 2], combination]
    x = np.stack([*columns, np.ones(400)], axis=1)
    repeated = np.concatenate([x, x[:7]])
    left = table_data.with_density(repeated)
    np.testing.assert_array_equal(left[np.argsort(left[:, 0])], good[np.argsort(good[:, 0])])


def test_rounded_values_of_tables_are_spread_over_their_gap_and_split():
    x = np.arange(1000.0)[:, None] * [0.01, 1.0]
    x[:, 1] = x[::-1, 1] ** 2  # the smallest gap is 1
    noise = table_data.spread(x, np.random.default_rng(0)) - x
    for column, gap in zip(noise.T, (0.01, 1.0), strict=True):
        assert gap / 2 >= abs(column).max() > 0.4 * gap
    table = table_data.prepare(np.random.default_rng(0).standard_normal((1000, 2)))
    assert [len(part) for part in table] == [800, 100, 100]
    assert len(np.unique(np.concatenate(table), axis=0)) == 1000
    np.testing.assert_allclose(table.train.mean(0), 0, atol=1e-6)  # float32
    np.testing.assert_allclose(table.train.std(0), 1, atol=1e-6)


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


def test_the_table_of_densities_says_which_is_best_and_what_is_missing():
    def run(**nats):
        scores = {end[1:]: {"nats": value, "seconds": 63.0} for end, value in nats.items()}
        return {"rows": 80, "columns": 2, "scores": scores}

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
    assert shown(done).startswith(
        "Best after 60 s, of 2 tables (mean rank): jaxode 1 (1.5), zuko NSF 1 (1.5)."
    )


def test_the_best_of_three_settings_is_that_of_the_validation_rows():
    def run(test, validation):
        scores = {"60": {"nats": test, "validation": validation, "seconds": 60.0}}
        return {"rows": 80, "columns": 2, "times": ["60"], "scores": scores}

    settings = estimators.CONTENDERS["jaxode"].settings
    name = lambda setting, seed: tables.Case("magic", "jaxode", setting, seed).name
    done = {
        name(setting, seed): run(10 * seed + place, -abs(place - 1))
        for seed in (0, 1, 2)
        for place, setting in enumerate(settings)
    }
    documented, best = tables.BENCHMARK.table(done).split("The best of three settings")
    assert "| magic, 80 x 2, 3 seeds | **10.000** |" in documented
    # Settings 0 and 2 are equal on the validation rows: the first counts.
    assert "| magic, 80 x 2, 3 seeds | **10.000** |  |  |" in best
    for seed in (0, 1, 2):
        done[name("width 256", seed)] = run(10 * seed + 3, -5.0)
    assert "| **13.000** |" in tables.BENCHMARK.table(done).split("three settings")[1]
    del done[name("width 256", 2)]  # then its third seed has no best
    assert "2 seeds | **8.000** |" in tables.BENCHMARK.table(done).split("three settings")[1]
    done["magic: zuko NSF, seed 0"] = run(5.0, 0.0)  # of one setting only: who is best?
    table = tables.BENCHMARK.table(done)
    assert "| magic, 80 x 2, 1 to 3 seeds | 10.000 |  | **5.000** |" in table
    assert "The best of three settings" not in table


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
