"""Levels and quantiles of densities of one number, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Frame, optional
from scipy import stats

import jaxode

# As many steps as hold the closed forms below. They compile in half the time of adaptive ones.
NORMAL, FINE = jaxode.standard_normal(1), {"steps": 16}
# As many numbers as levels, so that both take one program.
X, Q = np.linspace(-2.0, 3.0, 4), np.array([1e-6, 0.05, 0.5, 0.9])
# With `a` one of these, the flow stretches the base by `exp(a)`.
STILL, WIDER = jnp.zeros(()), jnp.array(0.7)
WIDTH = np.exp(0.7)


def growing(t, z, a):
    return a * z


def shifted(t, z, args):
    """By the sum of the context."""
    rate, context = args
    return 0 * z + rate * jnp.sum(context)


def bound(a, base=NORMAL, **given):
    return jaxode.bind(jaxode.cnf(growing, base, **FINE), a, **given)


LEARNED = jaxode.flows.bases.DiagonalNormal(jnp.array([2.0]), jnp.log(jnp.array([0.5])))
# A density, and the distribution that it has.
CLOSED = {
    "a normal": (bound(STILL), stats.norm()),
    "numbers without an axis": (bound(WIDER, jaxode.standard_normal(())), stats.norm(0, WIDTH)),
    "a learned base": (bound(WIDER, LEARNED), stats.norm(2 * WIDTH, WIDTH / 2)),
    "units": (bound(WIDER, standardize=(3.0, 2.0)), stats.norm(3, 2 * WIDTH)),
    "a half line": (bound(WIDER, support=(0.0, np.inf)), stats.lognorm(WIDTH)),
    "a half line below": (bound(WIDER, support=(-np.inf, 2.0)), stats.lognorm(WIDTH, -2)),
    "an interval": (bound(WIDER, support=(-1.0, 2.0)), stats.johnsonsb(0, 1 / WIDTH, -1, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_levels_and_quantiles_have_closed_forms(name):
    density, exact = CLOSED[name]
    x = X.reshape(-1, *density.event_shape)
    cdf, quantile = exact.cdf(X), exact.ppf(Q)
    if name == "a half line below":  # scipy has its mirror image
        cdf, quantile = exact.sf(-X), -exact.isf(Q)
    np.testing.assert_allclose(density.cdf(x), cdf, atol=1e-7)
    np.testing.assert_allclose(density.quantile(Q), quantile, rtol=1e-6)
    assert density.quantile(Q.reshape(2, 2)).shape == (2, 2)


@pytest.fixture(scope="module")
def network():
    """A field that is not linear, of a context, and a map of columns that is not either."""
    seen = np.random.default_rng(0).exponential(2.0, (400, 1))
    params = jaxode.nn.Residual(1, 8, 1, key=jax.random.key(1), context_size=2)
    # Its scale and last layer begin small.
    moved = lambda x: (
        x.astype(float) + 0.3 * jnp.sin(1.0 + jnp.arange(1.0 * x.size)).reshape(x.shape)
    )
    params = jax.tree.map(moved, params)
    units = jaxode.standardize.normal(seen)
    flow = jaxode.cnf(jaxode.nn.field, NORMAL, **FINE)
    return jaxode.bind(flow, params, standardize=units, context_shape=(2,))


def test_rows_of_a_context_by_levels(network):
    """The inverse of each other; and increasing."""
    context = np.random.default_rng(1).normal(size=(2, 3, 2))
    x = network.quantile(Q, context=context)
    assert x.shape == (2, 3, 4)
    assert (np.diff(x) > 0).all()
    rows = jnp.broadcast_to(context[:, :, None], (2, 3, 4, 2))
    q = network.cdf(x[..., None], context=rows)
    np.testing.assert_allclose(q, np.broadcast_to(Q, x.shape), atol=1e-6)
    by_row = jax.jit(jax.vmap(lambda row: network.quantile(Q, context=row)))(context[0])
    np.testing.assert_allclose(by_row, x[0], rtol=1e-6)


def test_a_context_moves_quantiles():
    density = jaxode.bind(
        jaxode.cnf(shifted, NORMAL, **FINE), STILL + 1, standardize_context=((1.0, 2.0), 0.5)
    )
    context = np.array([[1.0, 2.0], [3.0, 1.0]])
    means = np.array([[0.0], [2.0]])
    np.testing.assert_allclose(density.quantile(Q, context=context), stats.norm.ppf(Q, means))
    own = np.linspace(0.1, 0.9, 8).reshape(2, 4)  # levels of each row
    found = density.quantile(own, context=context, paired=True)
    np.testing.assert_allclose(found, stats.norm.ppf(own, means))
    with pytest.raises(ValueError, match=r"^quantile\(q=...\): must begin with the axes of the"):
        density.quantile(own[1:], context=context, paired=True)
    x = np.stack([X, X], 1)
    found = density.cdf(x[..., None], context=Frame(context))
    np.testing.assert_allclose(found, stats.norm.cdf(x, means[:, 0]), atol=1e-7)


def test_the_slope_of_a_level_is_the_density(network):
    """And that of a quantile the inverse of it. As many levels as there are rows above."""
    context, levels = jnp.array([0.4, -1.0]), np.linspace(0.01, 0.99, 24)

    def slopes(f, at):
        """Of each number, on which its own value alone depends."""
        value = lambda at: ((values := f(at)).sum(), values)
        return jax.grad(value, has_aux=True)(at)

    slope_of_quantile, x = slopes(lambda q: network.quantile(q, context=context), levels)
    slope, q = slopes(lambda x: network.cdf(x, context=context), x[:, None])
    log_prob = network.log_prob(x[:, None], context=context)
    np.testing.assert_allclose(q, levels, atol=1e-6)
    np.testing.assert_allclose(slope[:, 0], np.exp(log_prob), rtol=1e-5)
    np.testing.assert_allclose(np.log(slope_of_quantile), -log_prob, rtol=1e-5)


def test_levels_outside_of_the_support():
    """Their gradients are zero, and the flow is not asked."""
    outside = jnp.array([[-9.0], [2.0], [-jnp.inf], [jnp.inf]])
    inside = bound(WIDER, support=(-1.0, 2.0))
    assert inside.cdf(outside).tolist() == [0, 1, 0, 1]
    assert inside.cdf(jnp.array([[-1.0], [1e9], [-jnp.inf], [jnp.inf]])).tolist() == [0, 1, 0, 1]
    assert bound(WIDER).cdf(outside).tolist()[2:] == [0, 1]
    by_a, by_x = jax.grad(lambda a, x: inside.with_params(a).cdf(x).sum(), (0, 1))(WIDER, outside)
    assert by_a == 0
    assert not by_x.any()
    with pytest.raises(jaxode.SolveError, match=r"^cdf\(x=...\): must be finite; .* in 1 of 4"):
        inside.cdf([[0.0], [0.0], [np.nan], [0.0]])


def test_maps_of_the_user_may_decrease():
    distrax = optional("distrax")
    falling = distrax.Block(distrax.ScalarAffine(1.0, -2.0), 1)
    density = bound(WIDER, LEARNED, support=falling)
    exact = stats.norm(1 - 4 * WIDTH, WIDTH)
    np.testing.assert_allclose(density.cdf(X[:, None]), exact.cdf(X), atol=1e-7)
    np.testing.assert_allclose(density.quantile(Q), exact.ppf(Q), rtol=1e-6)


def test_angles_have_no_order():
    turn = jaxode.cnf(lambda t, z, a: a * jnp.sin(z), jaxode.torus(1))
    density = jaxode.bind(turn, jnp.asarray(0.1))
    with pytest.raises(ValueError, match=r"^cdf: needs numbers in order, and angles have none"):
        density.cdf(X[:, None])


def test_bases_of_numpyro():
    """Those that know their levels; of the others, the cure is told."""
    dist = optional("numpyro").distributions
    for base in (dist.Logistic(0.0, 1.0).expand([1]).to_event(1), dist.Logistic(0.0, 1.0)):
        density = bound(WIDER, base)
        x = X.reshape(-1, *density.event_shape)
        np.testing.assert_allclose(density.cdf(x), stats.logistic.cdf(X, 0, WIDTH), atol=1e-7)
        np.testing.assert_allclose(density.quantile(Q), stats.logistic.ppf(Q, 0, WIDTH), rtol=1e-6)
    mixed = dist.MixtureSameFamily(
        dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.zeros(2), 1.0)
    )
    said = (
        r"^quantile: needs a base with cdf and icdf; got .*\. Pass jaxode.standard_normal\(\(\)\)"
    )
    with pytest.raises(ValueError, match=said):
        bound(WIDER, mixed).quantile(0.5)


@pytest.mark.parametrize("call", [lambda d: d.cdf(np.ones((3, 2))), lambda d: d.quantile(0.5)])
def test_several_numbers_have_no_order(call):
    with pytest.raises(ValueError, match=r"(cdf|quantile): needs events of one number; got events"):
        call(bound(STILL, jaxode.standard_normal(2)))


def test_a_level_that_a_program_meets():
    """It is NaN in its row, and raises where it may."""
    q = jnp.array([0.5, 1.0, 0.9])
    density, throwing = bound(WIDER), jaxode.cnf(growing, NORMAL, throw=True, **FINE)
    level = jax.jit(density.quantile)
    assert np.isnan(level(q)).tolist() == [False, True, False]
    assert jax.eval_shape(level, q[0]).shape == ()
    said = r"SolveError: quantile\(q=...\): levels must lie strictly between 0 and 1"
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=said):
        jax.block_until_ready(jax.jit(density.with_flow(throwing).quantile)(q))
