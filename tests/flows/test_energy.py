"""The reverse Kullback-Leibler loss and its path gradient. `test_flow_features.py` has their closed
forms: with a context, probes, a base of one's own, either direction of time and each solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, temporary_bytes, trained, with_slow
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxode
from jaxode.nn import field

KEY = jax.random.key(7)
A = jnp.array([[0.3, 1.0], [-0.5, -0.2]])


def linear(t, z, A):
    return A @ z


def double_well(x):
    return -((x[0] ** 2 - 2) ** 2) / 4 - 2 * (x[1] - x[0] / 2) ** 2


def flow_of(f=field, **options):
    return jaxode.cnf(f, jaxode.standard_normal(2), **{"rtol": 1e-9, "atol": 1e-9, **options})


@pytest.mark.parametrize("path", with_slow([True, False], [False]))  # the same guard
def test_a_second_derivative_raises(path):
    """It would lack that of the target's slope, and of the score."""

    def gradient(a):
        flow = jaxode.cnf(lambda t, z, a: a * z, jaxode.standard_normal(2))
        loss = lambda a: flow.reverse_kl_loss(a, double_well, 3, key=KEY, path=path)
        return jax.grad(loss)(a)

    for twice in (jax.jacfwd, jax.grad):
        with pytest.raises(RuntimeError, match="reverse_kl_loss: has first derivatives only"):
            jax.eval_shape(twice(gradient), 0.3)


STEPS = ["joint", "per_sample"]


@pytest.mark.parametrize("batch", with_slow(STEPS, STEPS[1:]))  # `test_flow_features.py` has them
def test_the_path_gradient_has_no_noise_where_the_flow_is_the_target(batch):
    """By the parameters and an end time."""
    E = jax.scipy.linalg.expm(A)
    precision = jnp.linalg.inv(E @ E.T)
    target = lambda x: -0.5 * x @ precision @ x

    @jax.jit
    def gradients(A, t1):
        of = lambda A, t1, path: flow_of(linear, batch=batch, t1=t1).reverse_kl_loss(
            A, target, 4, key=KEY, path=path
        )
        return [jax.grad(of, (0, 1))(A, t1, path) for path in (True, False)]

    by_path, plain = gradients(A, 1.0)
    for leaf, noisy in zip(by_path, plain, strict=True):
        np.testing.assert_allclose(leaf, jnp.zeros_like(leaf), atol=1e-6)
        assert jnp.abs(noisy).max() > 1e-3


class Cube:
    """A uniform density, which jumps at its edge."""

    event_shape = (2,)

    def log_prob(self, z):
        inside = (jnp.abs(z) <= 1).all(-1)
        return jnp.where(inside, -2 * jnp.log(2.0), -jnp.inf)

    def sample(self, key, shape):
        return jax.random.uniform(key, (*shape, 2), minval=-1.0, maxval=1.0)


class Exponential:
    """No number below zero."""

    event_shape = (1,)

    def log_prob(self, z):
        return jnp.sum(-z + 0 * jnp.log(z), axis=-1)

    def sample(self, key, sample_shape):
        return jax.random.exponential(key, (*sample_shape, 1))


@pytest.mark.parametrize("base", [Cube(), Exponential()], ids=lambda base: type(base).__name__)
@pytest.mark.parametrize("transform", [lambda f: f, lambda f: jax.jit(jax.grad(f))])
def test_no_path_gradient_with_a_base_that_jumps(base, transform):
    flow = jaxode.cnf(lambda t, z, p: p * z, base)
    loss = lambda p: flow.reverse_kl_loss(p, lambda x: -jnp.sum(x**2), 4, key=KEY)
    with pytest.raises(ValueError, match=r"reverse_kl_loss\(path=...\): needs a base that is now"):
        transform(loss)(0.0)


def test_the_plain_gradient_with_a_base_that_jumps():
    """The loss is `-2 p + exp(2 p) / 3`, up to a constant; the path would leave out the first."""
    flow, target = jaxode.cnf(lambda t, z, p: p * z, Cube()), lambda x: -0.5 * jnp.sum(x**2)
    loss = lambda p: flow.reverse_kl_loss(p, target, 4096, key=KEY, path=False)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.0), -4 / 3, atol=0.05)


def nan_above(x):
    return jnp.where(x[0] > 0, jnp.nan, -jnp.sum(x**2))


def steep_below(x):
    """Minus infinity times zero in the derivative, not in the value."""
    return -jnp.sqrt(jnp.maximum(x[0], 0.0))


NAN = "must be finite at the samples of the flow; got NaN or inf in {} of 6 "
STEEP = "must have a finite gradient at .*; got NaN or inf in {} of 6 "


@pytest.mark.parametrize(
    ("batch", "target", "message"),
    [("joint", nan_above, NAN), ("per_sample", steep_below, STEEP)],
)
def test_a_target_that_is_not_finite_is_named(batch, target, message):
    of = lambda **options: flow_of(linear, batch=batch, steps=2, **options)
    A = jnp.zeros((2, 2))
    z = of().sample(A, KEY, 6)
    count = int((z[:, 0] > 0).sum()) if target is nan_above else int((z[:, 0] < 0).sum())
    assert 0 < count < 6
    loss = lambda flow, A: flow.reverse_kl_loss(A, target, 6, key=KEY)
    where = r"reverse_kl_loss\(log_density=...\): "
    with pytest.raises(jaxode.SolveError, match=where + message.format(count)):
        loss(of(), A)
    for leaf in jax.jit(jax.value_and_grad(lambda A: loss(of(), A)))(A):
        assert jnp.isnan(leaf).all()
    if target is nan_above:  # a program says what is said outside of one
        with pytest.raises(jax.errors.JaxRuntimeError, match=message.format(count)):
            jax.block_until_ready(jax.jit(lambda A: loss(of(throw=True), A))(A))


def test_a_failed_solve_is_named_and_not_the_target():
    flow = flow_of(max_steps=2)
    with pytest.raises(jaxode.SolveError, match="the steps ran out"):
        flow.reverse_kl_loss(trained(), double_well, 4, key=KEY)


@pytest.mark.slow  # compiles for several devices
def test_devices_share_a_batch():
    """With a key for each device, the gradient is the mean of theirs."""
    keys = jax.random.split(KEY, 2)
    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))

    def mean(A, keys):
        flow = flow_of(linear, axis_name="i")
        return jax.lax.pmean(flow.reverse_kl_loss(A, double_well, 3, key=keys[0]), "i")

    loss = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("i")), out_specs=P())
    alone = lambda key: lambda A: flow_of(linear).reverse_kl_loss(A, double_well, 3, key=key)
    each = [jax.value_and_grad(alone(key))(A) for key in keys]
    # Joint steps of both devices at tolerances of 1e-9, and of each.
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    assert_close(jax.jit(jax.value_and_grad(loss))(A, keys), expected, 1e-6)


@pytest.mark.slow  # two gradients are compiled for their memory alone
def test_memory_does_not_grow_with_the_steps():
    def bytes_of(steps):
        flow = flow_of(linear, steps=steps, adjoint=jaxode.DiscreteAdjoint(checkpoints=4))
        return temporary_bytes(lambda A: flow.reverse_kl_loss(A, double_well, 64, key=KEY), A)

    # Two numbers for each step beside 4 states of 64 rows.
    assert bytes_of(512) < 1.3 * bytes_of(16)
