"""The examples run on tiny settings, write their picture, and answer wrong input in one line."""

import importlib.util
import json
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import optional
from scipy import stats

import jaxode

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG"
HELPERS = {"arguments", "checkpoint", "pictures", "tables"}
WITH_A_PACKAGE = {"flax_field": "flax", "numpyro_guide": "numpyro"}
sys.path.insert(0, str(EXAMPLES))  # as for a script there: one example imports from another


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_digits(tmp_path, capsys, default_settings):
    picture = tmp_path / "digits.png"
    arguments = ["--steps", "2", "--batch", "8", "--width", "4"]
    assert load("digits").main([*arguments, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(PNG)
    output = capsys.readouterr().out
    gaussian, flow = (
        [float(word) for word in line.split()[-2:]]
        for line in output.splitlines()
        if line.startswith(("full-covariance Gaussian", "flow "))
    )
    # The Gaussian needs no training; after two steps the flow is still close to it.
    assert 2.3 < gaussian[0] < gaussian[1] < 2.6
    np.testing.assert_allclose(flow, gaussian, atol=0.05)


@pytest.mark.parametrize("data", ["8gaussians", "moons", "checkerboard", "pinwheel", "rings"])
def test_toy_densities(data):
    points = load("density_2d").load(data, np.random.default_rng(0))
    assert points.shape == (20_000, 2)
    assert np.isfinite(points).all()
    assert 1 < np.abs(points).max() < 7


@pytest.mark.slow
def test_density_of_a_csv_file(tmp_path, capsys, default_settings):
    rng, file, picture = np.random.default_rng(0), tmp_path / "points.csv", tmp_path / "a" / "b.png"
    points = rng.normal([100.0, -3.0], [20.0, 0.1], (3000, 2))
    np.savetxt(file, points, delimiter=",", header="x,y", comments="")
    arguments = ["--data", str(file), "--steps", "2", "--batch", "16", "--width", "4"]
    arguments += ["--frames", "2"]
    assert load("density_2d").main([*arguments, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(PNG)
    assert picture.with_suffix(".gif").read_bytes().startswith(b"GIF89a")
    line = next(line for line in capsys.readouterr().out.splitlines() if "held-out" in line)
    # In the units of the data: a Gaussian of these widths has -3.53 nats; the flow starts near one.
    assert abs(float(line.split()[2]) + 3.53) < 0.3


BAD_FILES = {
    "missing": (
        None,
        "is neither one of 8gaussians, moons, checkerboard, pinwheel, rings nor a file",
    ),
    "three columns": ("1,2,3\n" * 20, "line 1: two columns separated by a comma are needed; got 3"),
    "one column": ("1\n" * 20, "line 1: two columns separated by a comma are needed; got 1"),
    "text": ("1,2\n" * 19 + "1,two\n", "line 20: 'two' is not a finite number"),
    "nan": ("1,2\n" * 19 + "nan,2\n", "line 20: 'nan' is not a finite number"),
    "empty": ("", "at least 20 points are needed; got 0"),
    "header only": ("x,y\n", "at least 20 points are needed; got 0"),
    "constant": ("0.1,2\n" * 20, "a column is constant in the points to train on"),
    # Seed 0 holds out the points 4 and 19.
    "constant part": (
        "".join(f"{i},{int(i in (4, 19))}\n" for i in range(20)),
        "a column is constant in the points to train on, so they have no density",
    ),
    "constant in float32": (
        "".join(f"{1e9 + i},{i * i}\n" for i in range(20)),
        "a column is constant in the points to train on",
    ),
    "line": ("".join(f"{i},{2 * i}\n" for i in range(20)), "the points to train on lie on a line"),
    "huge": ("1e200,2\n" * 20 + "1,3\n", "numbers beyond 1e30 are too large"),
    "mistyped first line": ("1.0x,2\n" + "1,2\n" * 20, "line 1: '1.0x' is not a finite number"),
    "semicolons": ("1;2\n" * 30, "two columns separated by a comma are needed; got 1"),
    "binary": (b"\xff\xfe\x00\x01" * 20, "cannot read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_wrong_file_gets_one_clear_line(name, tmp_path, capsys):
    content, message = BAD_FILES[name]
    file = tmp_path / "points.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert load("density_2d").main(["--data", str(file)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert str(file) in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--out", "file/a.png", "argument --out: cannot make the folder of "),
        ("--out", "folder.png", "argument --out: cannot write "),
        ("--out", "a.txt", "argument --out: must name a .png, .pdf or .svg file; got "),
        ("--seed", "-1", "argument --seed: must be at least 0 and below 2**31; got -1"),
        ("--seed", str(2**31), "argument --seed: must be at least 0 and below 2**31; got 2147"),
    ],
)
@pytest.mark.parametrize("name", sorted({p.stem for p in EXAMPLES.glob("*.py")} - HELPERS))
def test_a_wrong_argument_gets_one_clear_line_before_training(
    name, option, value, message, tmp_path, capsys, monkeypatch
):
    if name in WITH_A_PACKAGE:
        optional(WITH_A_PACKAGE[name])
    if name == "sharded" and option == "--seed":
        pytest.skip("has no --seed")
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    value = str(tmp_path / value) if option == "--out" else value
    monkeypatch.setattr(sys, "argv", [name, option, value])
    with pytest.raises(SystemExit, match="2"):
        load(name).main()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "argument --steps: must be a whole number of at least 1; got 0"),
        ("--batch", "1.5", "argument --batch: must be a whole number of at least 1; got 1.5"),
        ("--seconds", "0", "argument --seconds: must be a positive number of seconds; got 0"),
        ("--seconds", "nan", "argument --seconds: must be a positive number of seconds; got nan"),
    ],
)
def test_a_wrong_length_of_training_gets_one_clear_line(option, value, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        load("digits").main([option, value])
    assert message in capsys.readouterr().err.splitlines()[-1]


def interrupt(moment, name, *arguments):
    """Ctrl-C when the example has printed `moment`: its output and exit code."""
    # The tests may run in the background of a shell, where interrupts are ignored.
    interruptible = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", interruptible, str(EXAMPLES / f"{name}.py")]
    process = subprocess.Popen(
        [*command, *map(str, arguments), "--steps", "100000"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    output = ""
    while moment not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=200)[0]
    assert "Traceback" not in output, output
    return output, process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["digits to train on", "matching: step 0"])
def test_interruption_ends_cleanly(tmp_path, moment):
    """Ctrl-C before the first score just ends; later it goes on with what there is."""
    picture = tmp_path / "digits.png"
    arguments = ["--width", 4, "--batch", 8, "--seconds", 1000, "--out", picture]
    _, code = interrupt(moment, "digits", *arguments)
    assert picture.exists() == (moment == "matching: step 0")
    assert code == (0 if moment == "matching: step 0" else 130)


@pytest.mark.skipif(not hasattr(jax.lax, "pcast"), reason="needs JAX 0.8 or newer")
@pytest.mark.slow
def test_interruption_ends_all_processes(tmp_path):
    """The output ends only when the last process has."""
    arguments = ["--processes", 2, "--out", tmp_path / "sharded.png"]
    output, code = interrupt("training on 8 devices", "sharded", *arguments)
    assert output.count("Stopped.") == 1
    assert code == 130


def run(name, capsys, *arguments, code=0):
    """What the example prints, to standard output and standard error."""
    assert load(name).main([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def numbers(text):
    return [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", text)]


@pytest.mark.slow
def test_spiral(tmp_path, capsys, default_settings):
    picture = tmp_path / "spiral.png"
    output = run("spiral", capsys, "--steps", 2, "--width", 4, "--out", picture).out
    assert picture.read_bytes().startswith(PNG)
    seen, new, _ = (numbers(line)[-1] for line in output.splitlines() if line.startswith("  "))
    assert 0 < seen < new < 3


@pytest.mark.slow
def test_latent_ode(tmp_path, capsys, default_settings):
    picture = tmp_path / "latent.png"
    output = run("latent_ode", capsys, "--steps", 2, "--batch", 4, "--out", picture).out
    assert picture.read_bytes().startswith(PNG)
    for name in ("latent ODE ", "GRU "):
        (line,) = (line for line in output.splitlines() if line.startswith(name))
        # Nothing is learned in two steps; the data have a size of about 0.8.
        assert all(0.5 < error < 1.5 for error in numbers(line))


def test_latent_ode_reads_one_species_at_a_time_and_pads_with_the_last(default_settings):
    latent = load("latent_ode")
    series = latent.simulate(jax.random.key(0), 5)
    halves = np.asarray(series.times).reshape(5, 2, -1)
    assert (np.diff(halves, axis=2) >= 0).all()
    assert (halves[:, 0] <= latent.HALF).all()
    assert (halves[:, 1] >= latent.HALF).all()
    real = np.asarray(series.read).sum(2).reshape(5, 2, -1)
    assert real.max() == 1
    np.testing.assert_array_equal(halves[real == 0], np.repeat(halves[..., -1:], 24, 2)[real == 0])


@pytest.mark.slow
def test_posterior(tmp_path, capsys, default_settings):
    picture = tmp_path / "posterior.png"
    arguments = ["--simulations", 200, "--steps", 2, "--batch", 8, "--width", 4]
    output = run("posterior", capsys, *arguments, "--out", picture).out
    assert picture.read_bytes().startswith(PNG)
    # After two steps it is still the prior, which is far from the posterior.
    assert 0.9 < float(re.search(r"variation .*: (\S+)", output)[1]) < 1
    assert "calibration over 200 new simulations: p = " in output


def test_the_exact_posterior_is_that_of_the_simulator(default_settings):
    """Parameters of simulations close to an observation, which the prior's box does not cut."""
    posterior = load("posterior")
    theta, x = posterior.simulate(jax.random.key(0), 1_000_000)
    close = np.asarray(theta)[np.abs(np.asarray(x)).max(1) < 0.02]
    grid = jax.numpy.linspace(-0.4, 0.4, 161)
    places = jax.numpy.stack(jax.numpy.meshgrid(grid, grid), -1)
    weights = np.asarray(posterior.exact_posterior(places, np.zeros(2)))
    assert len(close) > 100
    for moment in (lambda p: p[..., 0] * p[..., 1], lambda p: (p**2).sum(-1)):
        expected = (weights * moment(np.asarray(places))).sum() / weights.sum()
        found = moment(close)
        assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(close)) + 1e-3


@pytest.mark.slow
def test_segments(tmp_path, capsys, default_settings):
    picture = tmp_path / "segments.png"
    output = run("segments", capsys, "--steps", 300, "--out", picture).out
    assert picture.read_bytes().startswith(PNG)
    one, many = (numbers(line)[-2] for line in output.splitlines() if "trained by" in line)
    # That of the mean is the size of the data, 0.64.
    assert many < 0.8 * one < 0.8


def test_spiral_observes_each_series_at_its_own_times(default_settings):
    spiral = load("spiral")
    y0 = jax.numpy.array([[1.0, 0.5], [-0.3, 1.2]])
    times = jax.numpy.array([[0.1, 0.7, 1.9], [0.2, 0.3, 0.8]])
    seen = spiral.observe(spiral.truth, None, y0, times, rtol=1e-6, atol=1e-6)
    one = lambda y0, t: spiral.jaxode.solve(spiral.truth, y0, 0.0, t, rtol=1e-6, atol=1e-6).y1
    expected = jax.vmap(jax.vmap(one, in_axes=(None, 0)))(y0, times)
    np.testing.assert_allclose(seen, expected, atol=2e-5)  # float32, tolerance 1e-6


@pytest.mark.slow
def test_resnet_to_ode(tmp_path, capsys, default_settings):
    picture = tmp_path / "resnet.png"
    arguments = ["--depths", 2, 8, 32, "--steps", 3, "--width", 8, "--batch", 32]
    output = run("resnet_to_ode", capsys, *arguments, "--out", picture).out
    assert picture.read_bytes().startswith(PNG)
    rows = [numbers(line) for line in output.splitlines() if re.match(r" +\d+ ", line)]
    assert [row[0] for row in rows] == [2, 8, 32]
    states, gradients = np.array(rows)[:, -2:].T
    for differences in (states, gradients):  # of first order in 1/L
        np.testing.assert_allclose(differences[:-1] / differences[1:], 4, rtol=0.25)
    apart = next(line for line in output.splitlines() if "by hand" in line)
    assert numbers(apart)[-1] < 1e-5  # rounding, in float32


@pytest.mark.slow
def test_conditional(tmp_path, capsys, default_settings):
    picture = tmp_path / "conditional.png"
    arguments = ["--steps", 2, "--batch", 8, "--width", 4, "--out", picture]
    output = run("conditional", capsys, *arguments).out
    assert picture.read_bytes().startswith(PNG)
    known, either = (numbers(line)[-1] for line in output.splitlines() if "bits per" in line)
    # The untrained flow is close to the Gaussian, and does not yet know the classes.
    np.testing.assert_allclose([known, either], 2.44, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_flax_field(tmp_path, capsys, default_settings, api):
    optional("flax")
    picture = tmp_path / "flax.png"
    arguments = ["--api", api, "--steps", 2, "--batch", 16, "--width", 4, "--out", picture]
    output = run("flax_field", capsys, *arguments).out
    assert picture.read_bytes().startswith(PNG)
    score = next(line for line in output.splitlines() if line.startswith("held-out"))
    assert -8 < numbers(score)[0] < -1


@pytest.mark.slow
def test_numpyro_guide(tmp_path, capsys, default_settings):
    optional("numpyro")
    picture = tmp_path / "guide.png"
    output = run("numpyro_guide", capsys, "--steps", 3, "--samples", 50, "--out", picture).out
    assert picture.read_bytes().startswith(PNG)
    assert re.search(r"^flow  .*\d$", output, re.MULTILINE)


@pytest.mark.parametrize(("name", "package"), WITH_A_PACKAGE.items())
def test_a_package_that_is_not_installed_gets_one_clear_line(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"^{name}: .* is not installed. Run: pip install"):
        load(name)


def small_table(path, rows=200):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)) @ np.array([[1.0, 2, 0], [0, 0.3, 1], [0, 0, 5]]) + 7
    lines = [f"r{i},{a},{b},{c}" for i, (a, b, c) in enumerate(x)]
    path.write_text("\n".join(["name,a,b,c", *lines]))
    return path


def lines(*rows, header=""):
    return header + "".join(f"{row}\n" for row in rows)


# Tables of two columns that are not in proportion, and what is wrong with them.
BAD_TABLES = {
    "19 rows": (lines(*(f"{i},{i * i}" for i in range(19))), "at least 20 rows are needed; got 19"),
    "19 rows with a header": (
        lines(*(f"{i},{i * i}" for i in range(19)), header="a,b\n"),
        "at least 20 rows are needed; got 19",
    ),
    "empty": ("", "at least 20 rows are needed; got 0"),
    "text": (lines(*["x,y"] * 30), "two numeric columns separated by a comma are needed; got 0"),
    "semicolons": (
        lines(*(f"{i};{i * i}" for i in range(30))),
        "two numeric columns separated by a comma are needed; got 0. Its cells seem to be "
        "separated by ';'",
    ),
    "missing in the first row": (
        lines(",7", *(f"{i},{i * i}" for i in range(30)), header="a,b\n"),
        "line 2: a must be a finite number; got ''",
    ),
    "missing at the end": (
        lines(*(f"{i},{i * i}" for i in range(30)), "7", header="a,b\n"),
        "line 32: b must be a finite number; got nothing",
    ),
    "header with numbers": (
        lines(*(f"{i},{i * i},7" for i in range(30)), header=",0,1\n"),
        "line 1: must have a name above each column of numbers, or a finite number in each; got "
        "'0' and ''",
    ),
    "huge": (lines(*(f"{i},{i * i}e300" for i in range(20))), "numbers beyond 1e30 are too large"),
    # Seed 0 holds out the rows 2, 4, 6 and 19.
    "constant part": (
        lines(*(f"{i},{int(i in (2, 4, 6, 19))}" for i in range(20)), header="a,b\n"),
        "b is constant in the rows to train on, so they have no density. Leave it out",
    ),
    "proportional": (
        lines(*(f"{i % 7},{i * i % 11},{2 * (i % 7)}" for i in range(30)), header="a,b,c\n"),
        "the columns a, c depend linearly on each other, so the rows have no density",
    ),
    "sum": (
        lines(
            *(f"{a},{b},{a + b},{c}" for a, b, c in np.random.default_rng(0).normal(size=(30, 3)))
        ),
        "the columns column 1, column 2, column 3 depend linearly on each other",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_cannot_be_learned_gets_one_clear_line(name, tmp_path, capsys):
    content, message = BAD_TABLES[name]
    table = tmp_path / "table.csv"
    table.write_text(content)
    output, error = run("tabular", capsys, "--data", table, code=2)
    assert not output  # before it trains
    assert message in error
    assert error.count("\n") == 1


def test_a_table_is_read_with_its_header_and_without_its_text(tmp_path):
    read_csv, table = load("tabular").read_csv, tmp_path / "table.csv"
    rows = [f"r{i},{i},,{i * i}" for i in range(20)]
    for header, expected in (("", ["column 2", "column 4"]), ("0,a,b,c\n", ["a", "c"])):
        table.write_text(lines(*rows, header=header))
        names, values = read_csv(table)
        assert names == expected
        np.testing.assert_array_equal(values, [[i, i * i] for i in range(20)])


def test_new_rows_keep_their_digits_and_their_names(tmp_path):
    example, table = load("tabular"), tmp_path / "table.csv"
    rows = 1.7e9 + np.random.default_rng(0).normal(size=(20, 2))  # times in seconds
    example.write_csv(table, ["height, cm", "température"], rows)
    names, values = example.read_csv(table)
    assert names == ["height, cm", "température"]
    np.testing.assert_array_equal(values, rows)


def tabular(tmp_path, *more):
    arguments = ["--data", small_table(tmp_path / "table.csv"), "--width", 8, "--batch", 16]
    arguments += ["--checkpoint", tmp_path / "state", "--out", tmp_path / "a.png", "--rows", 20]
    return [str(argument) for argument in (*arguments, *more)]


# (options, message); `d` is the folder of the table d/table.csv.
BAD_PATHS = {
    "not a picture": (["--out", "d/x.csv"], "argument --out: must name a .png, .pdf or .svg file"),
    "rows over the data": (
        ["--out", "d/table.png"],
        "d/table.csv, for the new rows, must be differ",
    ),
    "rows over the data by another name": (
        ["--out", "d/new/../table.png"],
        "must be different files",
    ),
    "checkpoint over the data": (["--checkpoint", "d/table.csv"], "must be different files"),
    "checkpoint under the rows": (["--checkpoint", "d/a.csv"], "must be different files"),
    "folder": (["--checkpoint", "d/table.csv/x"], "cannot make the folder of d/table.csv/x: "),
}


@pytest.mark.parametrize("name", BAD_PATHS)
def test_no_file_is_lost_or_found_unwritable_after_training(name, tmp_path, capsys):
    more, message = BAD_PATHS[name]
    arguments = tabular(tmp_path, *(word.replace("d/", f"{tmp_path}/") for word in more))
    table = (tmp_path / "table.csv").read_bytes()
    with pytest.raises(SystemExit) as info:
        load("tabular").main(arguments)
    assert info.value.code == 2
    output, error = capsys.readouterr()
    assert not output  # before it trains
    assert message.replace("d/", f"{tmp_path}/") in error
    assert (tmp_path / "table.csv").read_bytes() == table


@pytest.mark.slow
def test_tabular(tmp_path, capsys, default_settings):
    output = run("tabular", capsys, *tabular(tmp_path, "--steps", 5)).out
    rows = "144 rows to train on, 16 to know when to stop, 40 held out, 3 columns: a, b, c"
    assert rows in output
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    table = np.genfromtxt(tmp_path / "a.csv", delimiter=",", names=True)
    assert table.dtype.names == ("a", "b", "c")
    assert table.shape == (20,)
    # The score of the Gaussian in the units of the table is its density of the raw rows.
    rows = np.genfromtxt(tmp_path / "table.csv", delimiter=",", skip_header=1)[:, 1:]
    held_out, x = np.split(np.random.default_rng(0).permutation(rows), [40])
    gaussian = stats.multivariate_normal(x.mean(0), np.cov(x.T, ddof=0)).logpdf(held_out).mean()
    score = next(line for line in output.splitlines() if line.startswith("full"))
    assert numbers(score)[0] == pytest.approx(gaussian, abs=2e-3)
    again = run("tabular", capsys, *tabular(tmp_path, "--steps", 5, "--evaluate")).out
    assert "continuing from step 5" in again
    result = lambda text: [line for line in text.splitlines() if line.startswith(("flow", "full"))]
    assert result(again) == result(output)


def test_training_ends_with_its_best_parameters(tmp_path, capsys, monkeypatch, default_settings):
    example = load("tabular")
    options = example.parse(tabular(tmp_path, "--steps", 9))
    state = example.State.start(jax.numpy.array(0.0), options)
    assert float(state._replace(average=jax.numpy.array(7.0)).learned) == 7.0  # not judged yet
    for step, loss in enumerate([3.0, 2.0, 5.0, np.nan]):
        state = state._replace(average=jax.numpy.array(float(step)), step=jax.numpy.array(step))
        state = state.compared(jax.numpy.array(loss))
    assert (float(state.learned), float(state.least), int(state.best_step)) == (1.0, 2.0, 1)
    assert not state.stale
    monkeypatch.setattr(example, "CHECK", 1)
    monkeypatch.setattr(example, "PATIENCE", 2)
    assert state.stale
    # The first step has a rate of zero, the next ones ruin the flow.
    assert example.main(tabular(tmp_path, "--steps", 9, "--rate", 200.0)) == 0
    output = capsys.readouterr().out
    assert "ends after 3 steps: " in output
    assert "3 steps taken" in output


def test_what_is_evaluated_is_the_best(tmp_path, monkeypatch, default_settings):
    example, evaluated = load("tabular"), []
    evaluate = example.evaluate

    def recorded(density, *data):
        evaluated.append(density.params)
        return evaluate(density, *data)

    monkeypatch.setattr(example, "evaluate", recorded)
    monkeypatch.setattr(example, "CHECK", 1)
    # The first step has a rate of zero, the second one ruins the flow.
    arguments = tabular(tmp_path, "--steps", 2, "--rate", 50.0)
    assert example.main(arguments) == 0
    like = example.State.start(evaluated[0], example.parse(arguments))
    header = json.loads((tmp_path / "state").read_bytes().partition(b"\n")[0])
    state = example.load(tmp_path / "state", like, header["settings"])
    leaves = jax.tree.leaves
    assert all(map(np.array_equal, leaves(evaluated[0]), leaves(state.best)))
    assert not all(map(np.array_equal, leaves(state.average), leaves(state.best)))


def test_a_checkpoint_that_cannot_be_used_gets_one_clear_line(tmp_path, capsys, default_settings):
    state = tmp_path / "state"
    arguments = tabular(tmp_path, "--steps", 2)
    assert (
        "cannot read the checkpoint" in run("tabular", capsys, *arguments, "--evaluate", code=2).err
    )
    run("tabular", capsys, *arguments)
    good = state.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for bad in (b"", b"\n", b"{}\n", good[:-1], good[:100], flipped, b"no checkpoint"):
        state.write_bytes(bad)
        error = run("tabular", capsys, *arguments, code=2).err
        assert "is damaged, or not a checkpoint" in error
        assert state.read_bytes() == bad  # left for its owner to look at
    state.write_bytes(good)
    error = run("tabular", capsys, *arguments, "--width", 4, code=2).err
    assert "was saved with other settings: width 8" in error
    assert "That training is complete" in run("tabular", capsys, *arguments).out
    example = load("tabular")
    header, _, _ = good.partition(b"\n")
    example.save(state, example.State(*[np.zeros(())] * 8), json.loads(header)["settings"])
    assert "by another version of this script" in run("tabular", capsys, *arguments, code=2).err


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(
    tmp_path, capsys, default_settings
):
    arguments = tabular(tmp_path, "--steps", 60, "--rate", 1e30)
    error = run("tabular", capsys, *arguments, code=1).err
    assert re.search(r"in step \d+ the loss \(.*\) or its gradient is not finite", error)
    good = int(re.search(r"the last good state, before step (\d+)", error)[1])
    assert 0 < good < 60
    output = run("tabular", capsys, *arguments, "--evaluate").out
    assert f"continuing from step {good} " in output
    score = next(line for line in output.splitlines() if line.startswith("flow"))
    assert np.isfinite(numbers(score)[0])


def test_a_gradient_that_is_not_finite_stops_although_the_loss_is_finite(
    tmp_path, default_settings
):
    table = load("tabular")
    options = table.parse(tabular(tmp_path, "--steps", 1))
    # The loss does not depend on p, but its derivative at zero is infinite times zero.
    field = lambda t, z, p: -z + 0 * jax.numpy.sqrt(p)
    density = jaxode.bind(jaxode.cnf(field, jaxode.standard_normal(3)), jax.numpy.zeros(()))
    state, x = table.State.start(density.params, options), jax.numpy.ones((20, 3))
    with pytest.raises(FloatingPointError, match=r"loss \(\d.*gradient is not finite\. Saved"):
        table.train(density, state, x, x, {}, options)


def test_what_the_last_step_has_made_is_not_saved_if_its_loss_is_not_finite(
    tmp_path, capsys, default_settings
):
    arguments = tabular(tmp_path, "--steps", 1)
    error = run("tabular", capsys, *arguments, "--rate", 1e30, code=1).err
    assert "in step 1 the loss (" in error
    assert "Saved: the last good state, before step 0" in error
    assert "1 steps taken" in run("tabular", capsys, *arguments).out


def test_a_flow_that_cannot_be_solved_gets_one_clear_line(tmp_path, capsys, monkeypatch):
    example = load("tabular")

    def fail(*arguments):
        raise example.jaxode.SolveError("log_prob: the steps ran out at t=0.5.")

    monkeypatch.setattr(example, "evaluate", fail)
    monkeypatch.setattr(example, "train", lambda density, state, *rest: state)
    assert example.main(tabular(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error == "tabular: the flow cannot be solved: log_prob: the steps ran out at t=0.5.\n"


@pytest.mark.slow
def test_training_killed_at_any_moment_ends_with_the_same_parameters(tmp_path):
    """SIGKILL, twice, while it saves at every step; then bit for bit the same file."""
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()

    def start(where):
        command = [sys.executable, str(EXAMPLES / "tabular.py")]
        command += tabular(tmp_path / where, "--steps", 300, "--every", 1)
        output = subprocess.DEVNULL
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def step_of(file):
        header, _, _ = file.read_bytes().partition(b"\n")
        return json.loads(header)["step"]

    state = tmp_path / "killed" / "state"
    for moment in (1, 90):
        process = start("killed")
        while process.poll() is None and not (state.exists() and step_of(state) >= moment):
            pass
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert moment <= step_of(state) < 300
    for where in ("killed", "whole"):
        assert start(where).wait(timeout=200) == 0
    assert state.read_bytes() == (tmp_path / "whole" / "state").read_bytes()
    assert (tmp_path / "killed" / "a.csv").read_bytes() == (
        tmp_path / "whole" / "a.csv"
    ).read_bytes()


@pytest.mark.skipif(not hasattr(jax.lax, "pcast"), reason="needs JAX 0.8 or newer")
@pytest.mark.slow
@pytest.mark.parametrize(("processes", "own_steps"), [(2, False), (1, True)])
def test_sharded_training_has_the_numbers_of_one_device(tmp_path, processes, own_steps):
    picture = tmp_path / "sharded.png"
    command = [sys.executable, EXAMPLES / "sharded.py", "--steps", "3", "--batch", "32"]
    command += ["--processes", str(processes), "--out", picture, *["--own-steps"] * own_steps]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert picture.read_bytes().startswith(PNG)
    losses, parameters = (
        float(re.search(rf"largest difference of a {name} (\S+)", output).group(1))
        for name in ("loss", "parameter")
    )
    # Other steps have other errors, each of about the tolerance of 1e-5.
    limit = 1e-4 if own_steps else 1e-12
    assert losses < limit
    assert parameters < limit
