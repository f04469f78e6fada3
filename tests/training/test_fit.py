"""Training in one call: what it gives, with which fields, optimizers and contexts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import (
    BENT,
    CONTEXT,
    FAST,
    INTEGERS,
    OTHERS,
    RNG,
    ROWS,
    STEPS,
    bound,
    cheap,
    equal,
    fit,
    fitted,
    log_prob_of,
    parameters,
    score,
)

import jaxode
from jaxode.training import loop
from jaxode.training.fit import FEW_ROWS_PER_COLUMN, MATCHING_RATE, adam

pytestmark = pytest.mark.usefixtures("default_settings")


def test_it_improves_on_the_start():
    density, history = fitted()
    assert [(at.phase, at.step) for at in history] == [("matching", 0), ("matching", STEPS)]
    assert 0 < history[0].seconds < history[1].seconds
    assert history[1].nats < history[0].nats - 0.1
    assert score(density) < score(bound()) - 0.1
    assert equal(density.standardize, bound().standardize)


def test_it_goes_on_from_a_fitted_density():
    density, history = fitted()
    longer, points = fit(density, validation=OTHERS)
    assert points[0].nats == history[-1].nats
    assert points[-1].nats < history[-1].nats
    assert score(longer) < score(density)


def test_likelihood_follows_matching_and_the_key_decides_everything():
    run = functools.partial(fit, steps=50, likelihood=50, validation=OTHERS)
    density, history = run()
    assert [(point.phase, point.step) for point in history] == [
        ("matching", 0), ("matching", 50), ("likelihood", 0), ("likelihood", 50)
    ]  # fmt: skip
    assert history[2].nats == min(history[0].nats, history[1].nats)
    assert history[3].nats < history[2].nats
    again, points = run()
    assert equal(again, density)
    assert [point.nats for point in points] == [point.nats for point in history]
    assert not equal(run(key=jax.random.key(2))[0], density)


def test_a_vector_of_all_parameters_is_trained_alike(monkeypatch):
    """The default optimizer gets one where nothing decays, as with many rows."""
    monkeypatch.setattr("jaxode.training.fit.FEW_ROWS", 0)
    ravel, ravelled = loop.ravel_pytree, []
    monkeypatch.setattr(loop, "ravel_pytree", lambda tree: ravelled.append(1) or ravel(tree))
    as_vector, _ = fit(validation=OTHERS, optimizer=None)
    assert ravelled
    ravelled.clear()
    alike, _ = fit(validation=OTHERS, optimizer=adam(MATCHING_RATE))
    assert not ravelled
    for a, b in zip(*map(jax.tree.leaves, (as_vector.params, alike.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # other roundings, 150 steps


def constant(t, z, p):
    return p + 0 * z


def test_each_step_draws_rows_and_noise_of_its_own():
    """The mean of 50 base samples, one in each step, is less off than one of them, by about 1."""
    x = 3 + 0.01 * np.random.default_rng(0).normal(size=(40, 8))
    start = bound(8, params=jnp.zeros(8), f=constant, standardize=(0.0, 1.0))
    density, _ = fit(start, x, batch_size=1, steps=50, optimizer=optax.sgd(1.5))
    assert jnp.sqrt(jnp.mean((density.params - 3) ** 2)) < 0.5


def drifting(t, y, p):
    """The gradients of `matrix` and `vector` are so small that Adam leaves them alone."""
    constant, *idle = jax.lax.stop_gradient(p["constant"]), p["matrix"], p["vector"]
    return p["drift"] - y + 1e-12 * sum(leaf.sum() for leaf in [constant, *idle])


@pytest.mark.parametrize(
    ("less", "few", "decayed"), [(0, 2000, {"matrix"}), (1, 2000, set()), (0, 199, set())]
)
def test_weights_decay_at_few_rows(less, few, decayed, monkeypatch):
    """Matrices that are trained: up to 100 rows for each of two columns, and up to `few`."""
    monkeypatch.setattr("jaxode.training.fit.FEW_ROWS", few)
    # Not one row more but a limit below: one program serves all.
    monkeypatch.setattr("jaxode.training.fit.FEW_ROWS_PER_COLUMN", FEW_ROWS_PER_COLUMN - less)
    shapes = {"constant": (2, 2), "matrix": (2, 2), "vector": (2,), "drift": (2,)}
    start = {name: jnp.ones(shape) for name, shape in shapes.items()}
    density, _ = fit(bound(f=drifting, params=start), validation=OTHERS, optimizer=None)
    changed = {name for name in shapes if not np.allclose(density.params[name], 1, atol=1e-3)}
    assert changed == {"drift"} | decayed


def own_field(t, z, params):
    """Its parameters are a dictionary, of which one is a number of Python."""
    return params["scale"] * (params["out"] @ jnp.tanh(params["in"] @ z + t)) + params["shift"]


# An optimizer and steps. All gain a nat on rows three deviations away, where the start has twelve
# more than the best. Near the best, or with L-BFGS, a line search on noisy losses may gain nothing.
OPTIMIZERS = {
    "lion": (optax.lion(1e-2), 250),
    "of the loss": (optax.chain(FAST, optax.contrib.reduce_on_plateau(patience=500)), 250),
    "a line search": (
        optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
        ),
        25,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_and_any_field(name):
    weights = jax.random.normal(jax.random.key(3), (8, 2))
    params = {"in": weights, "out": jnp.zeros((2, 8)), "shift": jnp.zeros(2), "scale": 0.5}
    start = bound(params=params, f=own_field, standardize=(0.0, 1.0))
    optimizer, steps = OPTIMIZERS[name]
    far = BENT + 3, OTHERS + 3
    density, history = fit(start, far[0], optimizer=optimizer, validation=far[1], steps=steps)
    assert history[-1].nats < history[0].nats - 1
    assert score(density, far[1]) < score(start, far[1]) - 1
    assert density.params["scale"] != 0.5


def along(t, z, p):
    return jnp.imag(p) + 0 * z


def test_complex_parameters_are_trained():
    density, _ = fit(bound(params=jnp.asarray(0j), f=along, standardize=(0.0, 1.0)), BENT + 5)
    assert density.params.imag > 0.3  # by 0.01 a step, less and less, and averaged


@pytest.mark.slow  # a training of its own dtype
def test_double_precision_and_strict_promotion():
    """Which Adam does not have."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    options = {"dequantize": True, "optimizer": optax.sgd(0.01), "steps": 50}
    density, history = fit(cheap(standardize=None), INTEGERS, **options)
    assert np.isfinite([point.nats for point in history]).all()
    assert density.log_prob(BENT).dtype == np.float64


@pytest.mark.slow  # a training of its own shape
def test_an_event_may_be_a_number():
    x = np.random.default_rng(1).normal(size=40)
    density, history = fit(cheap(event=(), standardize=None), x, steps=50)
    assert density.event_shape == ()
    assert np.isfinite([point.nats for point in history]).all()
    assert np.isfinite(log_prob_of(density, x, None)).all()


MOVED = 3 * CONTEXT + 0.5 * RNG.normal(size=(ROWS, 2))  # a normal whose mean is the context


def test_a_context(monkeypatch):
    """With base samples that go to rows of like contexts."""
    # Otherwise, the error of looks is some hundredths.
    monkeypatch.setattr(loop, "VALIDATION_TOLERANCE", 1e-6)
    coupling = jaxode.coupling.optimal_transport(16, condition_weight=1.0)
    start = bound(params=parameters(context_size=1), standardize=MOVED, standardize_context=CONTEXT)
    rows, aside = (MOVED[:200], CONTEXT[:200]), (MOVED[200:], CONTEXT[200:])
    density, history = fit(start, rows[0], context=rows[1], validation=aside, coupling=coupling)
    looks = [point.nats for point in history]
    np.testing.assert_allclose(looks, [score(each, *aside) for each in (start, density)], atol=1e-3)
    assert looks[1] < looks[0] - 1
    assert density.sample(jax.random.key(0), context=CONTEXT[:5]).shape == (5, 2)
