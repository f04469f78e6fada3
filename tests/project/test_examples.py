"""The examples run on tiny settings, write their picture, and answer wrong input in one line."""

import functools
import pathlib
import struct
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from common.arguments import InputError, status
from common.descent import BLOCK, minimize
from helpers import optional
from running import EXAMPLES, PNG, after, load, load_once, start

import jaxode

WITH_A_PACKAGE = {"flax_field": "flax", "numpyro_guide": "numpyro", "patients": "numpyro"}


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
SHARDED = "largest difference of a (loss|parameter)"
RUNS = [
    # The Gaussian needs no training. The flow still takes the pixels as nearly independent.
    ("digits", "--steps 2 --batch 8 --width 4", "^(full-covariance Gaussian|flow) ",
     lambda *bits: 2.3 < bits[0] < bits[1] < 2.6 < min(bits[2:]) < max(bits[2:]) < 3.2),
    # A block of steps: still far from independent pixels.
    ("mnist", "--data . --minutes 0.0001 --batch 8 --width 8 --blocks 1 --test 16 --classes",
     "^test images:|^noise and|^half the|^Bayes",
     lambda bits, error, n, noise, of, by_tolerance, right, few: 1 < bits < 9 and n == of == 16
     and noise < 0.1 and abs(by_tolerance) < 0.01 and 0 <= right <= 100),
    ("sharded", "--steps 3 --batch 32 --processes 2", SHARDED,
     lambda loss, parameter: max(loss, parameter) < 1e-12),
    # Other steps have other errors, each of about the tolerance of 1e-5.
    ("sharded", "--steps 3 --batch 32 --own-steps", SHARDED,
     lambda loss, parameter: max(loss, parameter) < 1e-4),
    # The untrained flow does not yet know the classes.
    ("conditional", "--steps 2 --batch 8 --width 4", "held-out bits per dimension, .* (known|be) ",
     lambda known, either: 2.3 < known < 3.2 and abs(known - either) < 0.05),
    # In the units of the file: a Gaussian has -3.53 nats; the flow starts near one.
    ("density_2d", "--data points.csv --steps 2 --batch 16 --width 4 --frames 2",
     "held-out log-density:", lambda nats, points: abs(nats + 3.53) < 0.3),
    # Columns that do not depend on each other have about 20 nats in all.
    ("tabular", "--data flats.csv --steps 2 --rows 20", "^held-out rows:",
     lambda nats: -30 < nats < -15),
    # In CRPS, interval and its width, twice. The standard deviation of the rents is about 500.
    ("regression", "--data flats.csv --target rent --steps 2", "^(flow|constant normal) ",
     lambda *found: len(found) == 14 and 0 < found[7] < 200 and 0 < found[0] < 600),
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
    # Little is learned in two steps. The data have a standard deviation of about 0.7.
    ("series", "--steps 2", "^(prey|predators) ",
     lambda *row: len(row) == 6 and max(row[0], row[3]) < 1.2 < 30 < min(row[2], row[5])),
    ("series", "--data readings.csv --row patient --time hour --steps 2", "^pulse ",
     lambda error, last, inside: 0 < error < 20 and 0 < last < 20 and 30 < inside <= 100),
    # The error of the mean is the size of the data, 0.64.
    ("segments", "--steps 300", "  trained by (one solve|40 segments)",
     lambda one, many: many < 0.8 * one < 0.8),
    ("forced", "--rooms 4", "^largest difference|  (loss|air|gain)",
     lambda apart, *found: apart < 1e-6 and len(found) == 9
     and (abs(np.subtract(found[::3], found[2::3])) < 4 * np.array(found[1::3])).all()),
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
    "mnist": {"PATCH": lambda _: 14, "CHUNK": lambda _: 16},
    "conditional": {"HELD_OUT": lambda _: 10},
    "series": {"PONDS": lambda _: 30},
    # Before its step size is known, NUTS takes up to 1023 steps at a time.
    "patients": {"NUTS": lambda nuts: functools.partial(nuts, max_tree_depth=3)},
}


SMOKE = {"density_2d": pytest.mark.smoke}


@pytest.mark.slow  # each compiles what it trains
@pytest.mark.parametrize(
    ("name", "options", "where", "promised"),
    [pytest.param(*row, marks=SMOKE.get(row[0], ()), id=row[0]) for row in RUNS],
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
    load_once("tabular").tables.flats(300, 0).to_csv("flats.csv", index=False)
    if name == "series":
        noise = np.random.default_rng(0).normal(size=(2, 100))
        columns = {"patient": np.repeat(np.arange(20), 5), "hour": np.tile(np.arange(5.0), 20)}
        readings = pd.DataFrame(columns | {"pulse": 70 + 5 * noise[0], "ph": 7.4 + noise[1]})
        readings.to_csv("readings.csv", index=False)
    if name == "mnist":
        for kind, count in (("train", 160), ("t10k", 16)):
            levels = np.random.default_rng(0).integers(0, 4, (count, 28, 28)) // 3 * 255
            idx = lambda shape, x: struct.pack(f">i{len(shape)}i", 2048 + len(shape), *shape) + x
            pathlib.Path(f"{kind}-images-idx3-ubyte").write_bytes(
                idx(levels.shape, levels.astype(np.uint8).tobytes())
            )
            pathlib.Path(f"{kind}-labels-idx1-ubyte").write_bytes(
                idx((count,), (np.arange(count) % 10).astype(np.uint8).tobytes())
            )
    if name == "sharded":  # makes its devices, and processes
        process = start(name, *options.split(), "--out", "out.png", output=subprocess.PIPE)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert output.count("picture:") == 1
        assert pathlib.Path("out.png").read_bytes().startswith(PNG)
    else:
        output = run(name, *options.split())
    assert promised(*after(output, where)), output
    if name == "density_2d":
        assert pathlib.Path("out.gif").read_bytes().startswith(b"GIF89a")


def test_every_example_runs():
    assert {name for name, *_ in RUNS} == {path.stem for path in EXAMPLES.glob("*.py")}


# Parts of the examples.


def test_toy_densities():
    density_2d = load_once("density_2d")
    for data in density_2d.TOYS:
        points = density_2d.load(data, np.random.default_rng(0))
        assert points.shape == (20_000, 2)
        assert 1 < np.abs(points).max() < 7  # false for NaN, too


def test_particles_are_aligned_by_what_is_a_symmetry(default_settings):
    """No order, rotation or reflection of `z` is nearer to `x` than the one that is chosen."""
    particles = load_once("particles")
    z, x = particles.BASE.sample(jax.random.key(0), (2, 20))
    near = jax.vmap(particles.aligned)(z, x)
    log_p = jax.vmap(particles.log_density)
    np.testing.assert_allclose(log_p(near), log_p(z), rtol=1e-3)
    square = lambda z: np.sum((z - np.asarray(x)) ** 2, axis=(-2, -1))
    angles = np.linspace(0, 2 * np.pi, 30)
    turns = np.moveaxis([[np.cos(angles), np.sin(angles)], [-np.sin(angles), np.cos(angles)]], 2, 0)
    for order in particles.ORDERS[::5]:
        for mirror in ([1.0, 1.0], [1.0, -1.0]):
            others = np.asarray(z)[:, order] @ turns[:, None] * mirror
            assert (square(others) > square(np.asarray(near)) - 1e-3).all()


@pytest.mark.slow  # a million simulations
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


# How an example ends.

ENDS = [(FloatingPointError("step 3"), 1), (jaxode.SolveError("log_prob: no"), 1),
        (InputError("no rows"), 2), (KeyboardInterrupt(), 130)]  # fmt: skip


@pytest.mark.parametrize(("error", "code"), ENDS)
def test_what_ends_an_example_early_is_one_line(error, code, capsys):
    def main(arguments):
        raise error

    assert status(main) == code
    shown = "Stopped.\n" if code == 130 else f"test_examples: {error}\n"
    assert "".join(capsys.readouterr()) == shown


def test_interruption_ends_all_processes(monkeypatch):
    """The output ends only when the last process has."""
    sharded, killed = load_once("sharded"), []

    class Process:
        def wait(self):
            raise KeyboardInterrupt

        def kill(self):
            killed.append(self)

    monkeypatch.setattr(subprocess, "Popen", lambda command, start_new_session: Process())
    with pytest.raises(KeyboardInterrupt):
        sharded.start_processes(SimpleNamespace(processes=2))
    assert len(set(killed)) == 2


@pytest.mark.parametrize(("name", "package"), WITH_A_PACKAGE.items())
def test_a_package_that_is_not_installed_gets_one_clear_line(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"^{name}: .* is not installed. Run: pip install"):
        load(name)
