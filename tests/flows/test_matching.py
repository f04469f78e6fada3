"""The loss of flow matching: its minimum, its noise, and what it must not depend on."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import LIBRARIES, optional, typed, with_slow
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxode
from benchmarks.harness.hlo import collectives
from jaxode.coupling import Coupling, independent, optimal_transport
from jaxode.distributions import DiagonalNormal

KEY = jax.random.key(0)
BATCH = 16


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


X, START, CONTEXT = normal(1, BATCH, 2) + 1, normal(2, BATCH, 2), normal(3, BATCH, 2)
PARAMS = (normal(4, 8, 2), normal(5, 2, 8), normal(6, 8))


def field(t, z, args):
    (w1, w2, b), context = args
    return w2 @ jnp.tanh(w1 @ (z + context) + b * t)


def flow_of(f=field, event=2, **options):
    return jaxode.cnf(f, jaxode.standard_normal(event), **options)


# Two Gaussians, of which the best field is known.
MEANS, SCALES = (jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5])), (0.7, 0.4)


def best_field(t0, t1):
    """`E[x - z0 | z_t] / (t1 - t0)`, and what is to be added to it."""

    def f(t, z, params):
        u = (t - t0) / (t1 - t0)
        mean = (1 - u) * MEANS[0] + u * MEANS[1]
        variance = (1 - u) ** 2 * SCALES[0] ** 2 + u**2 * SCALES[1] ** 2
        slope = (u * SCALES[1] ** 2 - (1 - u) * SCALES[0] ** 2) / variance
        best = MEANS[1] - MEANS[0] + slope * (z - mean)
        shift, by_time, by_state = params
        return (best + shift + by_time * u + by_state * (z - mean)) / (t1 - t0)

    return f


@jax.jit
def of_the_best_field(t0, t1):
    """Gradients of the losses of 2000 batches, and the log-densities of `X`."""
    base = DiagonalNormal(MEANS[0], jnp.full(2, jnp.log(SCALES[0])))
    options = {"t0": t0, "t1": t1, "rtol": 1e-10, "atol": 1e-10, "throw": False}
    flow = jaxode.cnf(best_field(t0, t1), base, **options)
    still = tuple(jnp.zeros(2) for _ in range(3))

    def gradient(key):
        x_key, key = jax.random.split(key)
        x = MEANS[1][None] + SCALES[1] * jax.random.normal(x_key, (64, 2))
        return jax.grad(flow.matching_loss)(still, x, key=key)

    return jax.vmap(gradient)(jax.random.split(KEY, 2000)), flow.log_prob(still, X)


@pytest.mark.parametrize("times", [(0.0, 1.0), (2.0, -1.0)])
def test_the_best_field_between_two_gaussians(times):
    gradients, found = of_the_best_field(*times)
    for samples in gradients:
        # Five standard errors; 0.01 is what a field that is wrong by as much would have.
        error = samples.std(0) / np.sqrt(len(samples))
        assert (error < 0.002).all()
        assert (np.abs(samples.mean(0)) < 5 * error).all()
    log_prob = scipy.stats.norm(MEANS[1], SCALES[1]).logpdf(X).sum(1)
    np.testing.assert_allclose(found, log_prob, atol=1e-6)


@pytest.mark.slow
def test_times_in_the_other_direction():
    backward = lambda t, z, args: -field(1 - t, z, args)
    flows = flow_of(), flow_of(backward, t0=1.0, t1=0.0)
    losses = [flow.matching_loss(PARAMS, X, key=KEY, context=CONTEXT) for flow in flows]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-12)
    densities = [flow.log_prob(PARAMS, X, context=CONTEXT) for flow in flows]
    np.testing.assert_allclose(densities[1], densities[0], rtol=1e-10)


@pytest.mark.slow
def test_the_shape_of_an_event_does_not_matter():
    w = normal(7, 16, 16)
    flat = lambda t, z, w: jnp.tanh(w @ z) + t
    shaped = lambda t, z, w: flat(t, z.reshape(16), w).reshape(4, 4, 1)
    x = normal(8, BATCH, 16)
    for coupling in (independent(), optimal_transport(8)):
        expected = flow_of(flat, 16).matching_loss(w, x, key=KEY, coupling=coupling)
        loss = flow_of(shaped, (4, 4, 1)).matching_loss(
            w, x.reshape(BATCH, 4, 4, 1), key=KEY, coupling=coupling
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
    scalar = flow_of(lambda t, z, w: w * z, ()).matching_loss(1.0, x[:, 0], key=KEY)
    assert scalar.shape == ()
    assert jnp.isfinite(scalar)


def test_gradients_of_data_and_context_are_those_of_the_pairs():
    coupling = optimal_transport(8, 0.3)
    paired = START[coupling.pair(KEY, START, X, CONTEXT)]

    def loss(rows, coupling, x0):
        x, context = rows
        return flow_of().matching_loss(
            PARAMS, x, key=KEY, x0=x0, context=context, coupling=coupling
        )  # fmt: skip

    gradient = jax.jit(jax.grad(loss), static_argnums=1)((X, CONTEXT), coupling, START)
    expected = jax.jit(jax.grad(loss), static_argnums=1)((X, CONTEXT), independent(), paired)
    for a, b in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_context_and_weights_stay_with_their_row():
    """The field is the context alone, so that the loss does not depend on the times."""
    flow = flow_of(lambda t, z, args: args[1], t0=0.5, t1=-1.5)
    backwards = Coupling(lambda key, z, x, context: jnp.arange(BATCH)[::-1])
    loss = lambda weights, **coupling: flow.matching_loss(
        None, X, key=KEY, x0=START, context=CONTEXT, weights=weights, **coupling
    )
    errors = ((CONTEXT - (X - START[::-1]) / -2.0) ** 2).mean(1)
    np.testing.assert_allclose(loss(None, coupling=backwards), errors.mean(), rtol=1e-12)
    weights = jnp.linspace(0.0, 3.0, BATCH)
    errors = ((CONTEXT - (X - START) / -2.0) ** 2).mean(1)
    np.testing.assert_allclose(loss(weights), weights @ errors / weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(loss(7 * weights), loss(weights), rtol=1e-12)
    np.testing.assert_allclose(loss(None), errors.mean(), rtol=1e-12)
    assert jnp.isnan(jax.jit(loss)(0 * weights))


def by_context(t, z, args):
    return t * args[1]


def times_of(key, dtype=float, **options):
    """Read off the gradient by the context `c` of the loss `mean (t c - 1)^2`, without rounding."""
    x = jnp.ones((BATCH, 1), dtype)
    flow = flow_of(by_context, 1)
    loss = lambda c: flow.matching_loss(None, x, key=key, x0=0 * x, context=c, **options)
    return -jax.grad(loss)(jnp.zeros_like(x))[:, 0] * BATCH / 2


OF_POWERS = jax.jit(jax.vmap(lambda key, power: times_of(key, time_power=power), (0, None)))


def test_times_are_one_in_each_part():
    u = jax.vmap(times_of)(jax.random.split(KEY, 500))
    strata = jnp.floor(u * BATCH)
    assert (np.sort(strata, axis=1) == np.arange(BATCH)).all()
    # Each row's time is uniform: five standard errors of the mean of 500.
    np.testing.assert_allclose(u.mean(0), 0.5, atol=5 / np.sqrt(12 * 500))
    np.testing.assert_allclose(u.var(0), 1 / 12, atol=0.02)
    # Neighbors are far apart.
    apart = np.abs(np.diff(strata, axis=1))
    assert np.minimum(apart, BATCH - apart).min() >= BATCH // 4


@pytest.mark.parametrize("power", [0.5, 2.0, 3])
def test_times_of_a_power(power):
    """`1 - (1 - v)^power` has the distribution function `1 - (1 - u)^(1 / power)`."""
    keys = jax.random.split(KEY, 500)
    powers = OF_POWERS(keys, float(power))
    np.testing.assert_allclose(powers, 1 - (1 - OF_POWERS(keys, 1)) ** power, rtol=1e-12)
    cdf = lambda u: 1 - (1 - u) ** (1 / power)
    assert scipy.stats.kstest(powers.ravel(), cdf).statistic < 0.02
    one = times_of(keys[0], time_power=power)
    np.testing.assert_allclose(powers[0], one, rtol=1e-12)


@pytest.mark.slow
def test_times_of_power_one_are_those_without():
    """With all their digits: `1 - (1 - v)` would be a multiple of 2^-24 in float32."""
    u = times_of(KEY, np.float32, time_power=1.0)
    np.testing.assert_array_equal(u, times_of(KEY, np.float32))
    assert (u * 2**24 % 1 != 0).any()
    exact = times_of(KEY)
    np.testing.assert_allclose(u, exact, rtol=1e-7)


def test_no_solve_and_no_divergence():
    def no_divergence(*args):
        raise AssertionError

    flow = flow_of(divergence=jaxode.divergence.Divergence(no_divergence, no_divergence))
    loss = lambda params: flow.matching_loss(params, X, key=KEY, context=CONTEXT)
    assert "while" not in str(jax.make_jaxpr(jax.value_and_grad(loss))(PARAMS))


@pytest.mark.slow
def test_transformations():
    loss = lambda key, params: flow_of().matching_loss(
        params, X, key=key, context=CONTEXT, coupling=optimal_transport(8, 0.0)
    )
    keys = jax.random.split(KEY, 3)
    each = jax.jit(jax.vmap(jax.value_and_grad(loss, 1), (0, None)))(keys, PARAMS)
    _, scanned = jax.lax.scan(lambda c, key: (c, jax.value_and_grad(loss, 1)(key, PARAMS)), 0, keys)
    for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(each[0][0], loss(keys[0], PARAMS), rtol=1e-12)
    assert len(np.unique(np.asarray(each[0]))) == 3


@typed
@pytest.mark.parametrize(
    "coupling", [pytest.param(independent(), marks=pytest.mark.slow), optimal_transport(2, 0.0)]
)
@pytest.mark.parametrize("check_vma", with_slow([True, False], [False]))
def test_a_batch_over_devices_has_the_noise_of_one(coupling, check_vma):
    flow = flow_of(axis_name="batch")
    alone = flow_of()

    def loss(flow, params, x, context, weights):
        return flow.matching_loss(
            params, x, key=KEY, context=context, coupling=coupling,
            weights=weights if coupling == independent() else None,
        )  # fmt: skip

    def sharded(params, *rows):
        mean = lambda params: jax.lax.pmean(loss(flow, params, *rows), "batch")
        value, gradient = jax.value_and_grad(mean)(params)
        # Without types, each device has the gradient of its part.
        return value, gradient if check_vma else jax.lax.psum(gradient, "batch")

    mesh = Mesh(np.array(jax.devices()[:8]), ("batch",))
    specs = (P(), P("batch"), P("batch"), P("batch"))
    inputs = (PARAMS, X, CONTEXT, jnp.linspace(0.1, 2.0, BATCH))
    step = jax.jit(
        jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    )
    program = step.lower(*inputs).compile()
    value, gradient = program(*inputs)
    expected = jax.value_and_grad(lambda params, *rows: loss(alone, params, *rows))(*inputs)
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    if check_vma:
        # All of the gradient crosses at once; beside it the loss, the sum and the largest of the
        # weights.
        crossing = collectives(program.as_text())
        assert sum(c["bytes"] for c in crossing) <= sum(leaf.nbytes for leaf in PARAMS) + 24
        for a, b in zip(gradient, expected[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


# bfloat16 has eight bits.
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(jnp.float32, 1e-6, 1e-5), (jnp.bfloat16, 1e-2, 3e-2)]
)
def test_low_precision(dtype, rtol, atol):
    def f(t, z, w):
        return w @ z.astype(w.dtype) + t.astype(w.dtype)

    x, w = X.astype(jnp.float32), jnp.array([[0.5, 1.0], [-1.0, 2.0]])
    loss = lambda w, x=x: flow_of(f).matching_loss(w, x, key=KEY)
    value, gradient = jax.value_and_grad(loss)(w.astype(dtype))
    assert (value.dtype, gradient.dtype) == (jnp.float32, dtype)
    exact, slope = jax.value_and_grad(loss)(w, X)
    np.testing.assert_allclose(value, exact, rtol=rtol)
    np.testing.assert_allclose(gradient.astype(slope.dtype), slope, atol=atol)


def own_normal():
    return DiagonalNormal(jnp.array([1.0, 5.0]), jnp.log(jnp.array([0.1, 0.2])))


@pytest.mark.parametrize("library", ["own", *LIBRARIES])
def test_base_samples_are_those_of_the_base(library, default_settings):
    mean, scale = jnp.array([1.0, 5.0]), jnp.array([0.1, 0.2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their imports warn of what they should change
        if library != "own":
            optional(library)
        base = own_normal() if library == "own" else LIBRARIES[library](mean, scale)
        flow = jaxode.cnf(lambda t, z, p: p - z * 0, base)
        x = jnp.zeros((400, 2), jnp.float32)
        # Its gradient by a constant field is the mean of `p - (x - z0)`.
        gradient = jax.grad(lambda p: flow.matching_loss(p, x, key=KEY))(jnp.zeros(2))
    np.testing.assert_allclose(gradient, mean, atol=0.05)


def test_a_learned_base_learns_nothing_from_matching():
    def loss(base):
        flow = jaxode.cnf(lambda t, z, p: jnp.sin(z), base)
        return flow.matching_loss(None, X, key=KEY)

    for leaf in jax.tree.leaves(jax.grad(loss)(own_normal())):
        assert (leaf == 0).all()


def train(loss, m, steps=600):
    """Adam on `loss(m, key)`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, key):
        m, state = carry
        updates, state = optimizer.update(jax.grad(loss)(m, key), state)
        return (optax.apply_updates(m, updates), state), None

    keys = jax.random.split(KEY, steps)
    return jax.jit(lambda m: jax.lax.scan(step, (m, optimizer.init(m)), keys)[0][0])(m)


def conditional_data(key, rows):
    """One normal at 3 and one at -3, by the condition."""
    sign_key, key = jax.random.split(key)
    sign = jax.random.rademacher(sign_key, (rows, 1), float)
    return 3 * sign + 0.5 * jax.random.normal(key, (rows, 1)), sign


@pytest.mark.slow
def test_transport_that_ignores_the_condition_skews_and_its_weight_mends_it(default_settings):
    x, sign = conditional_data(KEY, 512)
    z = jax.random.normal(jax.random.key(9), (512, 1))
    of_plus = lambda coupling: z[coupling.pair(KEY, z, x, sign)][sign > 0]
    # All of the base belongs to each condition; plain transport gives it half.
    assert of_plus(optimal_transport(16, 0.0)).mean() > 0.6
    assert np.abs(of_plus(optimal_transport(16, 100.0)).mean()) < 0.25

    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(1), rtol=1e-4, atol=1e-4)
    m = jaxode.nn.ConcatSquash(1, (16, 16), key=KEY, context_size=1)

    def worst(coupling):
        """The largest distance of quantiles to those of the data, in its standard deviations."""

        def loss(m, key):
            x, sign = conditional_data(key, 128)
            return flow.matching_loss(m, x, key=key, context=sign, coupling=coupling)

        trained = train(loss, m)
        ps = jnp.linspace(0.05, 0.95, 19)[:, None]
        samples = flow.from_base(
            trained, jax.scipy.stats.norm.ppf(ps), context=jnp.ones_like(ps)
        )  # fmt: skip
        return jnp.max(jnp.abs(samples - 3 - 0.5 * jax.scipy.stats.norm.ppf(ps))) / 0.5

    assert worst(optimal_transport(16, 0.0)) > 1.5
    assert worst(optimal_transport(16, 100.0)) < 0.6


@pytest.mark.slow
def test_straightening_lowers_the_evaluations(default_settings):
    flow = jaxode.cnf(
        jaxode.nn.field, jaxode.standard_normal(2), divergence=jaxode.divergence.exact(),
        batch="per_sample", rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    m = jaxode.nn.ConcatSquash(2, (32, 32), key=KEY)

    def data(key):
        corner_key, key = jax.random.split(key)
        corners = 2 * jax.random.rademacher(corner_key, (256, 2), float)
        return corners + 0.2 * jax.random.normal(key, (256, 2))

    m = train(lambda m, key: flow.matching_loss(m, data(key), key=key), m)
    start = flow.base.sample(KEY, (2048,))
    end = flow.from_base(m, start)

    def on_pairs(m, key):
        rows = jax.random.randint(key, (256,), 0, len(end))
        return flow.matching_loss(m, end[rows], key=key, x0=start[rows])

    evaluations, nll = [], []
    for trained in (m, train(on_pairs, m)):
        loss, aux = flow.nll_and_stats(trained, data(KEY))
        evaluations.append(float(aux.stats.num_evals.mean()))
        nll.append(float(loss))
    assert evaluations[1] < 0.85 * evaluations[0]
    assert nll[1] < nll[0] + 0.1


def loss(x=X, flow=None, **options):
    flow = flow_of(lambda t, z, p: -z) if flow is None else flow
    return flow.matching_loss(None, x, **{"key": KEY, **options})


WEIGHTS = jnp.linspace(1.0, 3.0, BATCH).at[5].set(0)


def of_data(data):
    of = lambda params, data: flow_of().matching_loss(params, key=KEY, weights=WEIGHTS, **data)
    return jax.value_and_grad(of, (0, 1))(PARAMS, data)


@pytest.mark.parametrize("name", ["x", "x0", "context"])
@pytest.mark.parametrize("value_and_grad", [of_data, jax.jit(of_data)], ids=["eager", "jit"])
def test_a_row_of_weight_zero_may_hold_anything(name, value_and_grad):
    data = {"x": X, "x0": START, "context": CONTEXT}
    expected = value_and_grad(data)
    found = value_and_grad(data | {name: data[name].at[5, 0].set(jnp.nan)})
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    with pytest.raises(jaxode.SolveError, match=rf"{name}=...\).* 1 of 16 rows, first in row 4\."):
        flow_of().matching_loss(
            PARAMS, key=KEY, weights=WEIGHTS, **data | {name: data[name].at[4:6].set(jnp.nan)}
        )


def no_context(t, z, args):
    params, context = args
    return params * z + jnp.nan_to_num(context)


DRAWS_NAN = jaxode.cnf(lambda t, z, p: -z, DiagonalNormal(START[0] / 0, START[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: loss(flow=DRAWS_NAN),
            "cnf(base=...): must draw finite samples; got NaN or inf in 16 of 16 rows, first in "
            "row 0. Fix its parameters or its method `sample`.",
        ),
        (
            lambda: DRAWS_NAN.sample(PARAMS, KEY, 3),
            "cnf(base=...): must draw finite samples; got NaN or inf in 3 of 3 rows, first in "
            "row 0. Fix its parameters or its method `sample`.",
        ),
        (
            lambda: loss(X.at[3].set(1e200)),
            "matching_loss(x=...): squared differences to the vector field must be finite; got an "
            "overflow in 1 of 16 rows, first in row 3, where the field is finite.",
        ),
        (
            lambda: flow_of(no_context).matching_loss(
                jnp.nan, X, key=KEY, context=CONTEXT.at[2].set(jnp.nan)
            ),
            "matching_loss: the vector field or the state is not finite.",
        ),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_named(call, message):
    with pytest.raises(jaxode.SolveError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_a_training_step_does_not_search_for_wrong_rows():
    """A sort tells whether the coupling is a permutation. Which rows are wrong is asked later."""
    step = jax.grad(lambda z: loss(z, coupling=optimal_transport(8)))
    program = str(jax.make_jaxpr(step)(X))
    assert "sort" in program
    assert "searchsorted" not in program
