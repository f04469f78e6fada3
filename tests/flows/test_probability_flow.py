"""The ODE of a diffusion model, for a Gaussian, whose score is known at all times."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AT_RUN_TIME, with_slow

import jaxode
from jaxode.flows.bases import DiagonalNormal

X = jax.random.normal(jax.random.key(0), (16, 2), jnp.float64) + 1
MEAN, SCALE = jnp.array([0.5, -1.0]), jnp.array([0.8, 1.7])
PATHS = [jaxode.VariancePreserving(), jaxode.VarianceExploding(0.05, 10.0)]
MODELS = [(PATHS[0], "score"), (PATHS[0], "noise"), (PATHS[1], "score")]


class Score(eqx.Module):
    """What a model learns of a normal density: arrays as a part of the flow."""

    mean: jax.Array
    path: Any
    predicts: str = eqx.field(static=True)

    def __call__(self, t, z, args):
        mean, std = marginal(self.path, t, self.mean)
        score = -(z - mean) / std**2
        return score if self.predicts == "score" else -self.path.std(t) * score


def marginal(path, t, mean=MEAN):
    """Mean and standard deviation at a time."""
    variance = path.mean_scale(t) ** 2 * SCALE**2 + path.std(t) ** 2
    return path.mean_scale(t) * mean, jnp.sqrt(variance)


@pytest.mark.parametrize(
    ("path", "predicts"),
    with_slow(MODELS, MODELS[:1]),  # that of a noise computes the score
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_the_probability_flow_of_a_gaussian_has_its_density(path, predicts):
    """Compiled, with samples, and a gradient by the model."""
    end, of_time = jnp.asarray(1e-3), lambda t: marginal(path, jnp.asarray(t))

    def flow(mean):
        at_one, std = marginal(path, jnp.ones(()), mean)
        model = jaxode.probability_flow(Score(mean, path, predicts), path, predicts=predicts)
        base = DiagonalNormal(at_one, jnp.log(std))
        return jaxode.cnf(model, base, t0=1.0, t1=1e-3, rtol=1e-10, atol=1e-10)

    def exact(mean):
        at_end, std = marginal(path, end, mean)
        return -jnp.sum(jax.scipy.stats.norm.logpdf(X, at_end[None], std[None])) / len(X)

    loss, gradient = jax.jit(jax.value_and_grad(lambda mean: flow(mean).nll(None, X)))(MEAN)
    expected, slope = jax.value_and_grad(exact)(MEAN)
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    z = jax.random.normal(jax.random.key(1), (5, 2))
    start, at_end = (mean[None] + std[None] * z for mean, std in map(of_time, (1.0, end)))
    np.testing.assert_allclose(flow(MEAN).from_base(None, start), at_end, atol=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_path_solves_its_own_equations(path):
    """The mean grows by the drift, and the variance by twice that and the noise."""

    @jax.jit
    def sides(t):
        growth = jax.grad(path.mean_scale)(t) / path.mean_scale(t)
        variance = jax.grad(lambda t: path.std(t) ** 2)(t)
        expected = 2 * path.drift(t) * path.std(t) ** 2 + path.diffusion(t) ** 2
        return growth, path.drift(t), variance, expected

    # What the equations leave open is the start.
    start = jnp.zeros(())
    np.testing.assert_allclose(path.mean_scale(start), 1.0)
    np.testing.assert_allclose(path.std(start), 0.0 if path is PATHS[0] else 0.05, rtol=1e-12)
    np.testing.assert_allclose(jnp.exp(PATHS[1].base((2, 3)).log_scale), jnp.full((2, 3), 10.0))
    for t in (0.1, 0.9):
        growth, drift, variance, expected = sides(jnp.asarray(t))
        np.testing.assert_allclose(growth, drift, atol=1e-12)
        np.testing.assert_allclose(variance, expected, rtol=1e-10)


@pytest.mark.parametrize("predicts", ["score", "noise"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_closed_form_of_the_model_is_one_of_the_flow(path, predicts):
    m = jaxode.nn.MLP(2, (8,), key=jax.random.key(2))
    f = jaxode.probability_flow(jaxode.nn.field, path, predicts=predicts)
    t = jnp.asarray(0.3)
    field = lambda z: f(t, z, m)
    trace = lambda z: jnp.trace(jax.jacobian(field)(z))
    all_of = jax.jit(lambda z: (f.value_and_divergence(t, z, m), field(z), trace(z)))
    (dz, div), expected, exact = all_of(X[0])
    np.testing.assert_allclose(dz, expected, rtol=1e-12)
    np.testing.assert_allclose(div, exact, rtol=1e-10)
    assert jaxode.divergence.auto().describe(f, X[0], m) == "closed form"
    own = jaxode.probability_flow(lambda t, z, args: -z, path, predicts=predicts)
    assert own.value_and_divergence(t, X[0], None) is NotImplemented


def flow_of(model=lambda t, z, p: -z, **times):
    times = times or {"t0": 1.0, "t1": 1e-3}
    return jaxode.cnf(
        jaxode.probability_flow(model, PATHS[0]), jaxode.standard_normal(2), **times
    )  # fmt: skip


def test_times_that_are_not_known_are_checked_by_the_run():
    run = jax.jit(lambda t0, t1: flow_of(t0=t0, t1=t1).log_prob(None, X))
    np.testing.assert_allclose(run(1.0, 1e-3), flow_of().log_prob(None, X), rtol=1e-10)
    loss = jax.jit(lambda t0, t1: flow_of(t0=t0, t1=t1).nll(None, X))
    assert np.isfinite(loss(1.0, 1e-3))
    for times in ((1e-3, 1.0), (1000.0, 0.0)):
        with pytest.raises(
            AT_RUN_TIME, match=r"a probability flow runs from its noise, the base, at 1"
        ):
            jax.block_until_ready(run(*times))
        assert np.isnan(loss(*times))
