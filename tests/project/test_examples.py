"""The examples run on tiny settings, write their picture, and answer wrong input in one line."""

import functools
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import checkpoint, tables
from common.arguments import InputError, status
from common.descent import BLOCK, minimize
from helpers import optional, typed
from scipy import stats

import jaxode

pytestmark = pytest.mark.shown
EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
WITH_A_PACKAGE = {"flax_field": "flax", "numpyro_guide": "numpyro", "patients": "numpyro"}
PNG = b"\x89PNG"


def load(name):
    """The module, with constants in single precision, whichever test is the first to load it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    double = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        spec.loader.exec_module(module)
    finally:
        jax.config.update("jax_enable_x64", double)
    return module


load_once = functools.cache(load)


@pytest.fixture
def run(capsys, tmp_path):
    """Run an example in this process: what it prints. It writes the picture `tmp_path/out.png`."""

    def of(name, *arguments, code=0):
        picture = tmp_path / "out.png"
        arguments = [str(argument) for argument in ("--out", picture, *arguments)]
        try:
            found = status(load_once(name).main, arguments)
        except SystemExit as stop:
            found = stop.code
        text = "".join(capsys.readouterr())
        assert found == code, text
        assert code or picture.read_bytes().startswith(PNG)
        return text

    return of


@pytest.fixture
def one_block(monkeypatch):
    """Residual networks of one block in place of three, which are the same code."""
    one = functools.partial(jaxode.nn.Residual, blocks=1)
    monkeypatch.setattr(jaxode.nn, "Residual", one)


def numbers(text):
    return [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", text)]


def after(output, pattern):
    """All numbers that stand in a line behind the pattern."""
    found = (re.search(pattern, text) for text in output.splitlines())
    return [n for match in found if match for n in numbers(match.string[match.end() :])]


# What each example answers after a few steps.


def kinetics_learns(*found):
    guess, fitted, true = np.log(found[:9]).reshape(3, 3)
    constants, law = found[9:]
    # A size of about one half, of which readings have 0.03.
    nearer = np.linalg.norm(fitted - true) < 0.8 * np.linalg.norm(guess - true)
    return nearer and constants < 0.15 and law < 0.3


def resnets_are_of_first_order(*found):
    """Differences of outputs and gradients to the Neural ODE fall by four from 2 to 8 layers."""
    *rows, apart = found
    (two, *_, state, gradient), (eight, *_, last, last_gradient) = np.reshape(rows, (2, 5))
    ratios = np.array([state / last, gradient / last_gradient])
    return (two, eight) == (2, 8) and (abs(ratios - 4) < 1).all() and apart < 1e-5  # float32


# (example, options, where its numbers stand, what they must be)
RUNS = [
    # The untrained flow does not yet know the classes.
    ("conditional", "--steps 2 --batch 8 --width 4", "held-out bits per dimension, .* (known|be) ",
     lambda known, either: 2.3 < known < 3.2 and abs(known - either) < 0.05),
    # In the units of the file: a Gaussian has -3.53 nats; the flow starts near one.
    ("density_2d", "--data points.csv --steps 2 --batch 16 --width 4 --frames 2",
     "held-out log-density:", lambda nats, points: abs(nats + 3.53) < 0.3),
    *(("flax_field", f"--api {api} --steps 2 --batch 16 --width 4", "held-out log-density:",
       lambda nats, points: -8 < nats < -1) for api in ("nnx", "linen")),
    # After two steps it is still the prior, which is far from the posterior.
    ("posterior", "--simulations 200 --steps 2 --batch 8 --width 4",
     "total variation to the exact posterior:|calibration over",
     lambda variation, simulations, *p: 0.9 < variation < 1 and simulations == 200 and len(p) == 2),
    ("particles", "--steps 2 --matching 2 --batch 64 --samples 500 --width 8", "mean energy: flow",
     lambda flow, weighted, chain: abs(chain + 22.55) < 0.4),  # four standard errors
    ("lattice", "--size 3 --steps 40 --batch 16 --samples 2000",
     r"acceptance of the Metropolis test:|V m\^2: flow, weighted",
     lambda accepted, weighted, error, chain, chain_error: 5 < accepted < 100
     and abs(weighted - chain) < 5 * (error + chain_error)),
    ("spiral", "--steps 2 --width 4", "^  (at|from) ",
     lambda seen, new, later: 0 < seen < new < 3),
    # Nothing is learned in two steps; the data have a size of about 0.8.
    ("latent_ode", "--steps 2 --batch 4", "^(latent ODE|GRU)  ",
     lambda *errors: len(errors) == 4 and min(errors) > 0.5 and max(errors) < 1.5),
    # The error of the mean is the size of the data, 0.64.
    ("segments", "--steps 300", "  trained by (one solve|40 segments)",
     lambda one, many: many < 0.8 * one < 0.8),
    ("kinetics", "--steps 80 --experiments 8",  # blocks of 20 alone
     "^(guess|fitted|true) |^  (fitted constants|learned law) ", kinetics_learns),
    ("resnet_to_ode", "--depths 2 8 --steps 3 --width 8 --batch 32",
     "^(?= +[0-9]+ .*%)|residual blocks by hand:", resnets_are_of_first_order),
    ("numpyro_guide", "--steps 3 --samples 50", "^flow  ", lambda *row: len(row) == 7),
    # Two steps have moved towards the truth.
    ("patients", "--patients 20 --steps 2 --warmup 2 --samples 4", "^median, volume, L",
     lambda truth, fitted, mean, sd: 20 < min(fitted, mean) <= max(fitted, mean) < truth == 30),
]  # fmt: skip
SMALLER = {
    "conditional": {"HELD_OUT": lambda _: 10},
    "latent_ode": {"TRAIN": lambda _: 64},  # as many as are held out
    # Before its step size is known, NUTS takes up to 1023 steps at a time.
    "patients": {"NUTS": lambda nuts: functools.partial(nuts, max_tree_depth=3)},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "where", "promised"), RUNS, ids=[row[0] for row in RUNS]
)
def test_an_example_does_what_it_promises(
    name, options, where, promised, run, one_block, monkeypatch, tmp_path, default_settings
):
    if name in WITH_A_PACKAGE:
        optional(WITH_A_PACKAGE[name])
    for attribute, smaller in SMALLER.get(name, {}).items():
        known = getattr(load_once(name), attribute)
        monkeypatch.setattr(load_once(name), attribute, smaller(known))
    monkeypatch.chdir(tmp_path)
    points = np.random.default_rng(0).normal(size=(3000, 2)) * [20.0, 0.1] + [100.0, -3.0]
    np.savetxt("points.csv", points, delimiter=",", header="x,y", comments="")
    output = run(name, *options.split())
    assert promised(*after(output, where)), output
    if name == "density_2d":
        assert pathlib.Path("out.gif").read_bytes().startswith(b"GIF89a")


def test_every_example_runs():
    own = {"digits", "sharded", "tabular"}  # their tests are below
    assert {name for name, *_ in RUNS} | own == {path.stem for path in EXAMPLES.glob("*.py")}


@typed
@pytest.mark.slow
@pytest.mark.parametrize(("processes", "own_steps"), [(2, False), (1, True)])
def test_sharded_training_has_the_numbers_of_one_device(tmp_path, processes, own_steps):
    command = [sys.executable, EXAMPLES / "sharded.py", "--steps", "3", "--batch", "32"]
    command += ["--processes", str(processes), "--out", tmp_path / "out.png"]
    command += ["--own-steps"] * own_steps
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)
    assert output.count("picture:") == 1
    # Other steps have other errors, each of about the tolerance of 1e-5.
    differences = after(output, "largest difference of a (loss|parameter)")
    assert len(differences) == 2
    assert max(differences) < (1e-4 if own_steps else 1e-12)


# Parts of the examples.


def test_toy_densities():
    density_2d = load_once("density_2d")
    for data in density_2d.TOYS:
        _, points = density_2d.load(data, np.random.default_rng(0))
        assert points.shape == (20_000, 2)
        assert 1 < np.abs(points).max() < 7  # false for NaN, too


@pytest.mark.slow
def test_particles_are_aligned_by_what_is_a_symmetry(default_settings):
    """No order, rotation or reflection of `z` is nearer to `x` than the one that is chosen."""
    particles = load_once("particles")
    z, x = particles.BASE.sample(jax.random.key(0), (2, 20))
    near = jax.vmap(particles.aligned)(z, x)
    log_p = jax.vmap(particles.log_density)
    np.testing.assert_allclose(log_p(near), log_p(z), rtol=1e-3)
    square = lambda z: jnp.sum((z - x) ** 2, axis=(1, 2))
    for angle in np.linspace(0, 2 * np.pi, 30):
        turn = jnp.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for order in particles.ORDERS[::5]:
            for mirror in (jnp.eye(2), jnp.diag(jnp.array([1.0, -1.0]))):
                assert (square(z[:, order] @ turn @ mirror) > square(near) - 1e-3).all()


@pytest.mark.slow
def test_the_exact_posterior_is_that_of_the_simulator(default_settings):
    """Parameters of simulations close to an observation, which the prior's box does not cut."""
    posterior = load_once("posterior")
    theta, x = posterior.simulate(jax.random.key(0), 1_000_000)
    close = np.asarray(theta)[np.abs(np.asarray(x)).max(1) < 0.02]
    grid = jnp.linspace(-0.4, 0.4, 161)
    places = jnp.stack(jnp.meshgrid(grid, grid), -1)
    weights = np.asarray(posterior.exact_posterior(places, np.zeros(2)))
    assert len(close) > 100
    for moment in (lambda p: p[..., 0] * p[..., 1], lambda p: (p**2).sum(-1)):
        expected = (weights * moment(np.asarray(places))).sum() / weights.sum()
        found = moment(close)
        assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(close)) + 1e-3


def test_training_by_gradient_descent(capsys, default_settings):
    """Every step has its number and its own key, also in a shorter last block."""
    steps, noise = BLOCK + 3, lambda key: jax.random.normal(key)
    loss = lambda p, step, key: 0.5 * p["x"] ** 2 + (step + noise(key)) * p["b"] + 0 * p["b"] ** 2
    params = {"x": jnp.array(1.0), "b": jnp.array(0.0), "name": "not trained"}
    key = jax.random.key(0)
    learned, losses = minimize(loss, params, optax.sgd(0.1), steps, key, "it")
    assert learned["name"] == "not trained"
    assert float(learned["x"]) == pytest.approx(0.9**steps, rel=1e-5)
    gradients = np.arange(steps) + jax.vmap(noise)(jax.random.split(key, steps))
    assert float(learned["b"]) == pytest.approx(-0.1 * float(gradients.sum()), rel=1e-5)
    assert losses.shape == (steps,)
    assert f"it: {steps} steps in " in capsys.readouterr().out
    loss = lambda p, step, key: jnp.where(step < BLOCK + 1, p, jnp.nan)
    with pytest.raises(FloatingPointError, match=f"it: the loss is not finite in step {BLOCK + 1}"):
        minimize(loss, jnp.array(1.0), optax.sgd(0.1), steps, key, "it")


# Arguments, and how an example ends.


def test_what_ends_an_example_early_is_one_line(capsys):
    for error in (FloatingPointError("step 3"), jaxode.SolveError("log_prob: no")):

        def main(arguments, error=error):
            raise error

        assert status(main) == 1
        assert "".join(capsys.readouterr()) == f"test_examples: {error}\n"


@pytest.mark.parametrize(("name", "package"), WITH_A_PACKAGE.items())
def test_a_package_that_is_not_installed_gets_one_clear_line(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"^{name}: .* is not installed. Run: pip install"):
        load(name)


def start(name, *arguments, output):
    """Run an example in a process of its own, with the compiled programs of those before it.

    Residual networks have one block, as with the fixture `one_block`.
    """
    # The tests may run in the background of a shell, where interrupts are ignored.
    code = (
        "import functools, runpy, signal, sys; sys.argv = sys.argv[1:];"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.path.insert(0, {str(EXAMPLES)!r}); import jaxode;"
        "jaxode.nn.Residual = functools.partial(jaxode.nn.Residual, blocks=1);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, EXAMPLES / f"{name}.py", *arguments]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),  # as many threads as here: the same bits
    }
    return subprocess.Popen(
        [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT, text=True,
        env=os.environ | cache,
    )  # fmt: skip


def interrupt(moment, name, *arguments):
    """Ctrl-C when the example has printed `moment`: its output and exit code."""
    process = start(name, *arguments, "--steps", 100_000, output=subprocess.PIPE)
    output = ""
    while moment not in output:
        text = process.stdout.readline()
        assert text, output
        output += text
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=200)[0]
    assert "Traceback" not in output, output
    return output, process.returncode


@pytest.mark.slow
def test_interruption_of_training_goes_on_with_what_there_is(tmp_path):
    picture = tmp_path / "digits.png"
    arguments = ["--width", 4, "--batch", 8, "--steps", 100_000, "--out", picture]
    output, code = interrupt("matching: step 0", "digits", *arguments)
    assert code == 0
    assert picture.read_bytes().startswith(PNG)
    gaussian, flow = after(output, "^full-covariance Gaussian"), after(output, "^flow ")
    # The Gaussian needs no training. The flow still takes the pixels as nearly independent.
    assert 2.3 < gaussian[0] < gaussian[1] < 2.6 < min(flow) < max(flow) < 3.2


@typed
@pytest.mark.slow
def test_interruption_ends_all_processes(tmp_path):
    """The output ends only when the last process has."""
    arguments = ["--processes", 2, "--out", tmp_path / "sharded.png"]
    output, code = interrupt("training on 8 devices", "sharded", *arguments)
    assert output.count("Stopped.") == 1
    assert code == 130


# Tables: reading, and a training that survives a crash.


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


SQUARES = [f"{i},{i * i}" for i in range(30)]
WITH_A_THIRD = [f"{row},{i % 7}" for i, row in enumerate(SQUARES)]
NORMAL = [",".join(map(str, row)) for row in np.random.default_rng(0).normal(size=(20, 14))]
TWO = "two numeric columns separated by a comma are needed, with points in the numbers; got "
OTHER = f"{TWO}cells that seem to be separated by ';'"
FEW, CONSTANT = "at least 20 rows are needed; got ", "is constant in the rows to train on"
# The rules of `common.tables`, which both examples share: (content, what is wrong with it).
BAD_TABLES = {
    "missing": (None, "cannot read "),
    "binary": (b"\xff\xfe\x00\x01" * 20, "cannot read "),
    "empty": ("", f"{FEW}0"),
    "19 rows": (lines("a,b", *SQUARES[:19]), f"{FEW}19"),
    "one column": (lines(*range(30)), f"{TWO}1"),
    "decimal commas": (lines("a;b", *(f"{i},5;{i * i},25" for i in range(30))), OTHER),
    "commas in texts": (lines("a;note;b", *(f"{i},5;o, w;{i * i},2" for i in range(30))), OTHER),
    "index": (lines(",a,b", *(f"{i},{row}" for i, row in enumerate(SQUARES[3:]))),
              "column 1 has no name and counts the rows"),
    "numbers as names": (lines("0,1,2", *WITH_A_THIRD),
                         "line 1: looks like the column numbers of pandas, not like data"),
    "mistyped first line": (lines("1.0x,2", *SQUARES),
                            "or a finite number in each; got '2' and '1.0x'"),
    "short row": (lines("a,b", *SQUARES, "7"), "line 32: b must be a finite number; got nothing"),
    "nan": (lines(*SQUARES, "nan,2"), "line 31: column 1 must be a finite number; got 'nan'"),
    "underscore": (lines(*SQUARES, "1_0,2"), "column 1 must be a finite number; got '1_0'"),
    "huge": (lines(*SQUARES, "1e200,2"), "numbers beyond 1e30 are too large"),
    "constant in float32": (lines(*(f"{1.7e9 + 120 * i},{i * i}" for i in range(20))),
                            f"column 1 {CONSTANT}"),
    "few rows": (lines(*NORMAL), "14 columns need at least 15 rows to train on; got 14"),
    "one column twice": (lines("a,b,c", *(f"{i % 7},{i**2 % 11},{2 * (i % 7)}" for i in range(30))),
                         "the columns a, c depend linearly on each other"),
    # The rows that seed 0 holds out are the only ones with a 1.
    "constant part": (lines(*(f"{i},{int(i in (2, 4, 6, 19))}" for i in range(20))),
                      f"column 2 {CONSTANT}"),
}  # fmt: skip
# Of points in the plane alone.
BAD_POINTS = {
    "constant part": (lines(*(f"{i},{int(i in (4, 19))}" for i in range(20))),
                      f"column 2 {CONSTANT}"),
    "three columns": (lines(*WITH_A_THIRD), "columns are needed; got 3. Use tabular.py for more"),
    "missing": (None, "is neither one of 8gaussians, moons, checkerboard, pinwheel, rings nor a"),
}  # fmt: skip
BAD = [("tabular", *row) for row in BAD_TABLES.values()]
BAD += [("density_2d", *row) for row in BAD_POINTS.values()]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[*BAD_TABLES, *BAD_POINTS])
def test_a_table_that_cannot_be_learned_gets_one_clear_line(name, content, message, run, tmp_path):
    table = tmp_path / "table.csv"
    if content is not None:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = run(name, "--data", table, code=2)
    assert text.startswith(f"{name}: ")  # before it trains
    assert message in text
    assert text.count("\n") == 1


def test_a_table_is_read_with_its_header_and_without_its_text(tmp_path):
    table, rows = tmp_path / "table.csv", [f"r{i},{i},,{i * i}" for i in range(20)]
    for header, expected in (((), ["column 2", "column 4"]), (("0,a,b,c",), ["a", "c"])):
        table.write_text(lines(*header, *rows))
        names, values = tables.read(table)
        assert names == expected
        np.testing.assert_array_equal(values, [[i, i * i] for i in range(20)])


def test_new_rows_keep_their_digits_and_their_names(tmp_path):
    rows = 1.7e9 + np.random.default_rng(0).normal(size=(20, 2))  # times in seconds
    tables.write(tmp_path / "table.csv", ["height, cm", "température"], rows)
    names, values = tables.read(tmp_path / "table.csv")
    assert names == ["height, cm", "température"]
    np.testing.assert_array_equal(values, rows)


def test_a_checkpoint_that_cannot_be_used_gets_one_clear_line(tmp_path):
    path, params, settings = tmp_path / "state", {"w": jnp.ones(3), "b": jnp.ones(2)}, {"width": 8}
    load = functools.partial(checkpoint.load, path)
    with pytest.raises(InputError, match="cannot read the checkpoint"):
        load(params, settings)
    checkpoint.save(path, params, [3, [[0, 1.5], [3, float("inf")]]], settings)
    loaded, record = load(jax.tree.map(jnp.zeros_like, params), settings)
    assert eqx.tree_equal(loaded, params)
    assert record == [3, [[0, 1.5], [3, float("inf")]]]
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    other_record = good.replace(b"[3, [[0", b"[4, [[0")
    bad = (b"", b"\n", b"{}\n", b"[]\n", good[:-1], good[:100], flipped, other_record, b"no")
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(InputError, match="is damaged, or not a checkpoint"):
            load(params, settings)
        assert path.read_bytes() == content  # left for its owner to look at
    path.write_bytes(good)
    with pytest.raises(InputError, match="was saved with other settings: width 8"):
        load(params, {"width": 4})
    for other in ({"w": jnp.ones(3)}, {"w": jnp.ones(4), "b": jnp.ones(2)}):
        with pytest.raises(InputError, match="by another version of this script"):
            load(other, settings)


def tabular(tmp_path, *more):
    """Arguments for a small table of three columns and some text."""
    rng, table = np.random.default_rng(0), tmp_path / "table.csv"
    x = rng.normal(size=(200, 3)) @ np.array([[1.0, 2, 0], [0, 0.3, 1], [0, 0, 5]]) + 7
    rows = (f"r{i},{a},{b},{c}" for i, (a, b, c) in enumerate(x))
    table.write_text(lines("name,a,b,c", *rows))
    arguments = ["--data", table, "--width", 8, "--batch", 16, "--rows", 20]
    arguments += ["--checkpoint", tmp_path / "state", "--out", tmp_path / "out.png"]
    return [str(argument) for argument in (*arguments, *more)]


# `d` is the folder of the table d/table.csv. A row for each check of `common.arguments`, and for
# each way to lose a file.
BAD_ARGUMENTS = [
    ("--out d/file/a.png", "argument --out: cannot make the folder of d/file/a.png: "),
    ("--out d/folder.png", "argument --out: cannot write d/folder.png"),
    ("--out d/a.txt", "argument --out: must name a .png, .pdf or .svg file; got d/a.txt"),
    ("--seed 2147483648", "argument --seed: must be at least 0 and below 2**31; got 2147483648"),
    ("--steps 0", "argument --steps: must be a whole number of at least 1; got 0"),
    ("--rate nan", "argument --rate: must be a positive number; got nan"),
    ("--out d/beside.png", "tabular: cannot write d/beside.csv"),
    ("--out d/new/../table.png", "d/new/../table.csv, for the new rows, must be different files"),
    ("--checkpoint d/table.csv", "must be different files"),
    ("--checkpoint d/out.csv", "must be different files"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_ARGUMENTS)
def test_a_wrong_argument_gets_one_clear_line_and_no_file_is_lost(wrong, message, run, tmp_path):
    (tmp_path / "file").touch()
    for folder in ("folder.png", "beside.csv"):
        (tmp_path / folder).mkdir()
    wrong, message = (text.replace("d/", f"{tmp_path}/") for text in (wrong, message))
    arguments = tabular(tmp_path, *wrong.split())
    table = (tmp_path / "table.csv").read_bytes()
    text = run("tabular", *arguments, code=2)
    assert text.startswith(("usage", "tabular: "))  # before it trains
    assert message in text.splitlines()[-1]
    assert (tmp_path / "table.csv").read_bytes() == table


@pytest.mark.slow
def test_tabular(run, one_block, tmp_path, default_settings):
    arguments = tabular(tmp_path, "--steps", 5, "--every", 3)
    assert "cannot read the checkpoint" in run("tabular", *arguments, "--evaluate", code=2)
    output = run("tabular", *arguments)
    rows = "144 rows to train on, 16 to know when to stop, 40 held out, 3 columns: a, b, c"
    assert rows in output
    table = np.genfromtxt(tmp_path / "out.csv", delimiter=",", names=True)
    assert table.dtype.names == ("a", "b", "c")
    assert table.shape == (20,)
    # The score of the Gaussian in the units of the table is its density of the raw rows.
    rows = np.genfromtxt(tmp_path / "table.csv", delimiter=",", skip_header=1)[:, 1:]
    held_out, x = np.split(np.random.default_rng(0).permutation(rows), [40])
    x = x[16:]  # without those that say when to stop
    gaussian = stats.multivariate_normal(x.mean(0), np.cov(x.T, ddof=0)).logpdf(held_out).mean()
    result = lambda text: [after(text, "^full-covariance Gaussian"), after(text, "^flow ")]
    assert result(output)[0][0] == pytest.approx(gaussian, abs=2e-3)
    again = run("tabular", *arguments)
    assert "continuing from step 5 in" in again
    assert "That training is complete" in again
    assert result(again) == result(output)
    error = run("tabular", *arguments, "--width", 4, code=2)
    assert "was saved with other settings: width 8" in error


@pytest.mark.slow
def test_training_ends_with_its_best_parameters(
    run, one_block, tmp_path, monkeypatch, default_settings
):
    """The first round ruins the flow; the best are the parameters that it started with."""
    monkeypatch.setattr(load_once("tabular"), "PATIENCE", 3)
    arguments = tabular(tmp_path, "--steps", 9, "--every", 3, "--rate", 1e30)
    with pytest.warns(UserWarning, match="Lower the rate of the optimizer"):
        output = run("tabular", *arguments)
    assert "training ends after 3 steps: no improvement" in output
    saved = run("tabular", *arguments, "--evaluate")
    assert "That training is complete" in saved
    assert after(saved, "^flow ") == after(output, "^flow ")
    assert np.isfinite(after(output, "^flow ")[0])


@pytest.mark.slow
def test_training_killed_at_any_moment_ends_with_the_same_parameters(
    tmp_path, one_block, default_settings
):
    """SIGKILL, then Ctrl-C, in one of many rounds; then bit for bit the same files."""
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    state, output = tmp_path / "killed" / "state", tmp_path / "output"

    def train(where):
        arguments = tabular(tmp_path / where, "--steps", 100, "--every", 10)
        with output.open("w") as file:
            return start("tabular", *arguments, output=file)

    def step():
        if not state.exists():
            return 0
        return json.loads(state.read_bytes().partition(b"\n")[0])["record"][0]

    for moment, sent, code in ((10, signal.SIGKILL, -signal.SIGKILL), (40, signal.SIGINT, 130)):
        process = train("killed")
        while process.poll() is None and step() < moment:
            time.sleep(0.005)  # the example needs the processor
        process.send_signal(sent)
        assert process.wait() == code
        assert moment <= step() < 100
    assert "Stopped. Start again to continue from what was last saved." in output.read_text()
    for where in ("killed", "whole"):
        arguments = tabular(tmp_path / where, "--steps", 100, "--every", 10)
        assert status(load_once("tabular").main, arguments) == 0
    for file in ("state", "out.csv"):
        whole = (tmp_path / "whole" / file).read_bytes()
        assert (tmp_path / "killed" / file).read_bytes() == whole
