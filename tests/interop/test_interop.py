"""Densities as distributions of other libraries, with the libraries themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import optional

import jaxode

KEY = jax.random.key(0)
DATA = np.random.default_rng(0).normal([5.0, -1.0], [3.0, 0.1], (40, 2))


def twisted(t, z, a):
    return a * jnp.sin(z + z[::-1])


def scaled(t, z, a):
    return a * z


# As many steps as both ways agree to rounding, or one. They compile sooner than adaptive ones.
FLOW = jaxode.cnf(twisted, jaxode.standard_normal(2), steps=16)
STILL = jaxode.cnf(scaled, jaxode.standard_normal(2), steps=1)


def bound(**options) -> Any:
    return jaxode.bind(FLOW, 0.5, **options)


@pytest.fixture
def numpyro():
    return optional("numpyro")


BOX = (np.array([-200.0, -90.0]), np.array([200.0, 90.0]))
MIXED = (np.array([-200.0, -np.inf]), np.array([200.0, 90.0]))
# Options of `bind`, and a row outside of the support.
GIVEN = {
    "no support": ({"standardize": jaxode.standardize.whiten(DATA)}, None),
    "a box": ({"standardize": jaxode.standardize.normal(DATA), "support": BOX}, [0.0, 90.0]),
    "half a box": ({"standardize": DATA, "support": MIXED}, [0.0, 91.0]),
}


@pytest.mark.parametrize("name", GIVEN)
def test_numpyro_has_the_same_density_on_the_same_support(name, numpyro):
    """It is a pytree, as numpyro's own, and so is its transform of the real numbers."""
    given, outside = GIVEN[name]
    density = bound(**given)
    theirs = jaxode.interop.numpyro(density)
    assert theirs.event_shape == (2,)
    np.testing.assert_array_equal(theirs.log_prob(DATA[:3]), density.log_prob(DATA[:3]))
    np.testing.assert_array_equal(theirs.sample(KEY, (3,)), density.sample(KEY, (3,)))
    assert theirs.expand([3]).sample(KEY).shape == (3, 2)
    x, intermediates = theirs.sample_with_intermediates(KEY, (3,))
    np.testing.assert_allclose(theirs.log_prob(x, intermediates), density.log_prob(x), rtol=1e-6)
    assert theirs.support(DATA).all()
    assert outside is None or not theirs.support(jnp.array([outside])).any()

    @jax.jit
    def look(theirs, u):
        transform = numpyro.distributions.biject_to(theirs.support)
        x = transform(u)
        det = transform.log_abs_det_jacobian(u, x)
        slopes = jax.vmap(jax.jacobian(lambda u: transform(u[None])[0]))(u)
        return theirs.log_prob(x), theirs.support(x), transform.inv(x), det, x, slopes

    u = jnp.array([[0.3, -2.0], [1.0, 4.0], [0.0, 1.0]])
    log_prob, inside, back, det, x, slopes = look(theirs, u)
    assert inside.all()
    np.testing.assert_allclose(back, u, rtol=1e-9)
    np.testing.assert_allclose(log_prob, density.log_prob(x), rtol=1e-9)
    # Those of numpyro's real numbers have an entry for each coordinate.
    np.testing.assert_allclose(
        jnp.reshape(det, (3, -1)).sum(1), np.linalg.slogdet(slopes)[1], atol=1e-9
    )


def test_numpyro_takes_it_as_a_prior_and_in_a_plate(numpyro):
    """What NUTS sees, for a flow that stands still: `log x` is normal."""
    infer, norm = numpyro.infer.util, jax.scipy.stats.norm
    prior = jaxode.interop.numpyro(
        jaxode.bind(STILL, 0.0, standardize=(1.0, 2.0), support=(0.0, np.inf))
    )
    seen = jnp.array([[3.0, -1.0], [5.0, 1.0]])

    def model():
        x = numpyro.sample("x", prior)
        with numpyro.plate("rows", 2):
            z = numpyro.sample("z", prior)
            likelihood = numpyro.distributions.Normal(x[None] + 0 * z, 1.0)
            numpyro.sample("seen", likelihood.to_event(1), obs=seen)

    u = {"x": jnp.array([0.3, -0.4]), "z": jnp.array([[0.1, 2.0], [-1.0, 0.5]])}
    potential = lambda u: infer.potential_energy(model, (), {}, u)

    def expected(u):
        priors = norm.logpdf(u["x"], 1.0, 2.0).sum() + norm.logpdf(u["z"], 1.0, 2.0).sum()
        return -priors - norm.logpdf(seen, jnp.exp(u["x"])[None], 1.0).sum()

    found, wanted = (jax.jit(jax.value_and_grad(f))(u) for f in (potential, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


def test_numpyro_has_one_context_for_any_number_of_samples(numpyro):
    """Also for as many samples as the context has rows."""
    f = lambda t, z, args: 0 * z + jnp.mean(args[1])
    density = jaxode.bind(jaxode.cnf(f, jaxode.standard_normal(2), steps=1), None)
    given = jaxode.interop.numpyro(density, jnp.arange(12.0).reshape(4, 3))
    for count in (4, 5):
        log_prob = given.log_prob(jnp.full((count, 2), 5.5))
        np.testing.assert_allclose(log_prob, -np.log(2 * np.pi), rtol=1e-5)


def exp_of_distrax(distrax):
    return distrax.Lambda(
        forward=jnp.exp,
        inverse=jnp.log,
        forward_log_det_jacobian=lambda u: u,
        inverse_log_det_jacobian=lambda x: -jnp.log(x),
        event_ndims_in=0,
    )


# A library, its support, the same as bounds, and rows of density zero.
SUPPORTS = {
    "positive": (
        "numpyro", lambda of: of.distributions.constraints.positive, (0.0, np.inf),
        [[1.0, -1.0], [0.0, 1.0]],
    ),
    "interval": (
        "numpyro", lambda of: of.distributions.constraints.interval(-20.0, 20.0), (-20.0, 20.0),
        [[20.0, 1.0], [1.0, -20.0], [21.0, 1.0]],
    ),
    "unit interval": (
        "numpyro", lambda of: of.distributions.constraints.unit_interval, (0.0, 1.0),
        [[0.5, 0.0], [1.0, 0.5]],
    ),
    "real": ("numpyro", lambda of: of.distributions.constraints.real, (-np.inf, np.inf), []),
    "exp": ("distrax", exp_of_distrax, (0.0, np.inf), [[1.0, -1.0], [0.0, 1.0]]),
    "sigmoid": ("distrax", lambda of: of.Sigmoid(), (0.0, 1.0), [[0.5, 0.0], [1.5, 0.5]]),
}  # fmt: skip


@pytest.mark.parametrize("name", SUPPORTS)
def test_constraints_and_bijectors_are_supports(name):
    library, make, bounds, outside = SUPPORTS[name]
    ours, theirs = (bound(support=s) for s in (bounds, make(optional(library))))
    x = ours.sample(KEY, (5,))
    np.testing.assert_allclose(theirs.sample(KEY, (5,)), x, rtol=1e-9)
    # Eight rows of each: one program serves all.
    x = jnp.asarray([*x, *outside, *x[: 3 - len(outside)]])
    log_prob, lost = theirs.log_prob(x), 5 + len(outside)
    assert np.isfinite(log_prob[:5]).all()
    np.testing.assert_array_equal(log_prob[5:lost], -np.inf)
    np.testing.assert_allclose(log_prob, ours.log_prob(x), rtol=1e-7)


def test_a_bijector_of_distrax_is_not_trained():
    density = jaxode.bind(STILL, 0.5, support=optional("distrax").ScalarAffine(0.0, 10.0))
    gradient = jax.grad(lambda density: density.log_prob(jnp.array([3.0, 4.0])))(density)
    assert gradient.params != 0
    assert jax.tree.leaves(gradient.support)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.support))


def test_constraints_of_numpyro_that_are_no_supports(numpyro):
    constraints = numpyro.distributions.constraints
    with pytest.raises(ValueError, match=r"support=...\): the data must lie strictly inside"):
        bound(standardize=np.eye(2), support=constraints.nonnegative)
    for constraint in (constraints.simplex, constraints.nonnegative_integer):
        with pytest.raises(
            ValueError, match=r"support=...\): must be a constraint with a bijection"
        ):
            bound(support=constraint)


def test_flowjax_has_the_same_density():
    optional("flowjax")
    density = bound(standardize=jaxode.standardize.normal(DATA))
    theirs = jaxode.interop.flowjax(density)
    assert (theirs.shape, theirs.cond_shape) == ((2,), None)
    np.testing.assert_allclose(theirs.log_prob(DATA[:3]), density.log_prob(DATA[:3]), rtol=1e-9)
    x, log_prob = theirs.sample_and_log_prob(KEY, (3,))
    np.testing.assert_allclose(density.log_prob(x), log_prob, rtol=1e-6)
    np.testing.assert_allclose(theirs.sample(KEY, (3,)), x, rtol=1e-6)


def test_flowjax_passes_a_condition_whose_shape_is_known():
    optional("flowjax")
    flow = jaxode.cnf(lambda t, z, args: -z * args[1].mean(), FLOW.base, steps=1)
    contexts = np.random.default_rng(1).normal(10.0, 4.0, (40, 3))
    density = jaxode.bind(flow, 0.0, standardize=DATA, standardize_context=contexts)
    theirs = jaxode.interop.flowjax(density)
    assert theirs.cond_shape == (3,)
    expected = density.log_prob(DATA[:3], context=contexts[:3])
    np.testing.assert_allclose(theirs.log_prob(DATA[:3], contexts[:3]), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="Pass context_shape= to bind"):
        jaxode.interop.flowjax(jaxode.bind(flow, 0.0)).log_prob(DATA[:3], jnp.ones((3, 1)))


@pytest.mark.parametrize("library", ["numpyro", "flowjax"])
def test_other_libraries_get_no_density_of_centred_particles(library):
    flow = jaxode.cnf(lambda t, z, a: a * z, jaxode.centered_normal(4, 2))
    message = rf"interop.{library}\(density=...\): .* a shift does not change"
    with pytest.raises(ValueError, match=message):
        getattr(jaxode.interop, library)(jaxode.bind(flow, 0.0))


@pytest.mark.parametrize("library", ["numpyro", "flowjax"])
def test_other_libraries_get_no_density_of_angles(library):
    flow = jaxode.cnf(lambda t, z, a: a * jnp.sin(z), jaxode.torus(1))
    with pytest.raises(ValueError, match=rf"interop.{library}\(density=...\): .* one of angles"):
        getattr(jaxode.interop, library)(jaxode.bind(flow, 0.1))


BOUNDED = {
    "uniform": (lambda dist: dist.Uniform(-1.0, jnp.ones(2)).to_event(1), [0.5, -0.5], [3.0, 0.5]),
    "exponential": (lambda dist: dist.Exponential(jnp.ones(2)).to_event(1), [0.5, 2.0], [0.5, -1]),
    "normal": (lambda dist: dist.Normal(0.0, jnp.ones(2)).to_event(1), [0.5, 2.0], None),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_base_of_numpyro_is_zero_outside_of_its_support(name, numpyro, default_settings):
    """Also in a program, where numpyro checks nothing; with its gradient."""
    make, inside, outside = BOUNDED[name]
    base = make(numpyro.distributions)
    flow = jaxode.cnf(scaled, base, batch="per_sample", throw=False, steps=1)
    density = jaxode.bind(flow, 0.0)
    z = jnp.array([inside, outside or inside, [jnp.nan, 1.0]])
    for log_prob in (density.log_prob(z), density.flow.log_prob(0.0, z)):
        np.testing.assert_allclose(log_prob[0], base.log_prob(z[0]), rtol=1e-5)
        assert outside is None or log_prob[1] == -jnp.inf
        assert jnp.isnan(log_prob[2])
    slope = jax.jit(jax.grad(lambda z: flow.base.log_prob(z).sum()))(z)
    assert jnp.isfinite(slope[:2]).all()
    np.testing.assert_allclose(slope[0], jax.jit(jax.grad(base.log_prob))(z[0]), rtol=1e-5)
    loss = lambda: density.reverse_kl_loss(lambda x: -jnp.sum(x**2), 4, key=jax.random.key(0))
    assert (flow.base is base) == (outside is None)
    if outside is None:
        assert jnp.isfinite(loss())
    else:
        with pytest.raises(ValueError, match="nowhere zero"):
            loss()


def moved(t, z, p):
    return p + 0 * z


def test_a_base_of_numpyro_whose_support_is_wider_than_it_says_is_left_alone(
    numpyro, default_settings
):
    """On a circle, and where numpyro takes the range of a transform."""
    dist = numpyro.distributions
    turn = lambda base: jaxode.cnf(moved, base, steps=1).log_prob(1.0, jnp.full((1, 1), -3.0))
    circle = dist.VonMises(0.0, jnp.full(1, 2.0)).to_event(1)
    np.testing.assert_allclose(turn(circle), circle.log_prob(jnp.full(1, 2 * np.pi - 4)), rtol=1e-5)
    flip = dist.transforms.AffineTransform(0.0, -jnp.ones(1), domain=dist.constraints.positive)
    mirrored = dist.TransformedDistribution(dist.Exponential(jnp.ones(1)).to_event(1), flip)
    np.testing.assert_allclose(turn(mirrored), -4.0, rtol=1e-5)
