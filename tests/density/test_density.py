"""A flow as a distribution: units, dtypes, steps, divergences, failures, and wrong arguments."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import trained

import jaxode

KEY = jax.random.key(0)
OPTIONS = {"rtol": 1e-9, "atol": 1e-9}
PARAMS, FLOW = trained(), jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), **OPTIONS)
DATA = np.random.default_rng(0).normal([5.0, -1.0], [3.0, 0.1], (40, 2))


def scaled(t, z, a):
    return a * z


def test_units_move_the_density_by_their_logarithm_alone():
    """`x -> 1000 x`: minus `d log 1000`, and samples in the new unit."""
    one, other = (jaxode.bind(FLOW, PARAMS, standardize=s * DATA) for s in (1.0, 1000.0))
    z = one.to_flow(DATA)
    np.testing.assert_allclose([z.mean(0), z.std(0)], [[0, 0], [1, 1]], atol=1e-12)
    np.testing.assert_allclose(
        other.log_prob(1000 * DATA), one.log_prob(DATA) - 2 * np.log(1000), rtol=1e-9
    )
    np.testing.assert_allclose(other.sample(KEY, (4,)), 1000 * one.sample(KEY, (4,)), rtol=1e-9)


def test_another_flow_keeps_parameters_and_maps():
    density = jaxode.bind(
        jaxode.cnf(FLOW.f, FLOW.base, rtol=1e-2, atol=1e-2), PARAMS, standardize=DATA
    )
    wanted = jaxode.bind(FLOW, PARAMS, standardize=DATA).log_prob(DATA)
    np.testing.assert_allclose(density.with_flow(FLOW).log_prob(DATA), wanted, rtol=1e-12)
    assert np.abs(density.log_prob(DATA) - wanted).max() > 1e-8
    with pytest.raises(
        ValueError, match=r"with_flow\(flow=...\): must be made by jaxode.cnf, with"
    ):
        density.with_flow(jaxode.cnf(FLOW.f, jaxode.standard_normal(3)))


def test_a_sample_has_the_same_density_alone_and_in_any_batch():
    """To rounding, at a tolerance at which joint steps move densities by 1e-5 nats and more."""
    flow = jaxode.cnf(jaxode.nn.field, FLOW.base, rtol=1e-3, atol=1e-3)
    params = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    density, x = jaxode.bind(flow, params), np.random.default_rng(0).normal(0, 2, (5, 8, 2))
    many = density.log_prob(x)
    alone = np.array([density.log_prob(row) for row in x.reshape(40, 2)]).reshape(5, 8)
    np.testing.assert_allclose(many, alone, rtol=0, atol=1e-12)
    assert np.abs(flow.log_prob(params, x.reshape(40, 2)) - alone.ravel()).max() > 1e-5
    assert density.to_flow(x[0, :0]).shape == (0, 2)
    assert [density.sample(KEY, shape).shape for shape in ((), (3, 4))] == [(2,), (3, 4, 2)]


@pytest.mark.parametrize("maps", [{"standardize": (0.0, 3.0)}, {"support": (-9.0, np.inf)}])
def test_data_keep_their_dtype(maps):
    """Also with JAX's float64 switched on, as it is here."""
    density, x = jaxode.bind(FLOW, PARAMS, **maps), DATA.astype(np.float32)
    assert density.to_flow(x).dtype == density.log_det(x).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_data_of_any_precision_are_mapped_in_single(dtype, default_settings):
    x = DATA.astype(dtype)
    density = jaxode.bind(jaxode.cnf(scaled, FLOW.base), 0.1, standardize=x)
    found, wanted = density.log_prob(x), density.log_prob(x.astype(np.float32))
    assert found.dtype == density.to_flow(x).dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


def test_integers_are_numbers_and_do_not_wrap(default_settings):
    """Also those that int32 does not hold, such as time stamps."""
    x = np.random.default_rng(1).integers(2_000_000_000, 4_000_000_000, (40, 2))
    field = lambda t, z, args: args[0] * args[1].sum().astype(z.dtype) * z
    flow = jaxode.cnf(field, FLOW.base)
    density = jaxode.bind(flow, 0.1, standardize=x, standardize_context=1.0 * x)
    found = density.log_prob(x, context=x)
    np.testing.assert_array_equal(found, density.log_prob(1.0 * x, context=1.0 * x))
    small = jaxode.bind(density.flow, 0.1, context_shape=(2,))
    found = small.log_prob([3, 4], context=x[0] % 7)
    np.testing.assert_array_equal(found, small.log_prob([3.0, 4.0], context=1.0 * (x[0] % 7)))
    said = r"context=...\): integers must fit int32; got 2\d{9} to 3\d{9}\. Convert them with"
    for call in (small.log_prob, functools.partial(density.flow.log_prob, 0.1)):
        with pytest.raises(ValueError, match=said):
            call(1.0 * DATA, context=x)
    with pytest.raises(ValueError, match=r"solve\(args=...\): integers must fit int32; got"):
        jaxode.solve(lambda t, y, a: a * y, DATA, 0.0, 1.0, x[0, 0])


EXACT = jaxode.divergence.exact()
OWN = jaxode.divergence.Divergence(lambda key, z: None, EXACT.apply)


@pytest.mark.parametrize("chosen", [EXACT, OWN], ids=["exact", "own"])
def test_without_a_key_an_exact_divergence_is_the_one_that_was_chosen(chosen):
    """That of a wrong closed form is right by `exact()`, as the audit advises."""

    class Wrong(eqx.Module):
        def __call__(self, t, z, a):
            return a * z

        def value_and_divergence(self, t, z, a):
            return a * z, a

    x = DATA[:2]
    flow = jaxode.cnf(Wrong(), FLOW.base, divergence=chosen)
    np.testing.assert_allclose(
        jaxode.bind(flow, jnp.array(0.5)).log_prob(x), flow.log_prob(jnp.array(0.5), x), rtol=1e-4
    )


def test_without_a_key_the_divergence_is_exact():
    """Also where the flow's divergence is an estimate."""
    flow = dataclasses.replace(FLOW, divergence=jaxode.divergence.hutchinson())
    exact, noisy = jaxode.bind(FLOW, PARAMS), jaxode.bind(flow, PARAMS)
    np.testing.assert_allclose(noisy.log_prob(DATA[:4]), exact.log_prob(DATA[:4]), rtol=1e-9)
    assert np.abs(noisy.log_prob(DATA[:4], key=KEY) - exact.log_prob(DATA[:4])).max() > 1e-3


@pytest.mark.parametrize("of", ["field", "base"])
def test_a_failed_row_is_nan_inside_of_jit_and_raises_outside(of):
    """And so are its gradients, whatever is differentiated."""
    field = lambda t, z, a: jnp.where(z > 3.0, jnp.nan, a * z)
    made_of = {"field": jnp.array(0.1), "base": jaxode.diagonal_normal(2)}
    x = jnp.array([[1.0, 1.0], [4.0, 1.0]])

    def log_prob(part):
        parts = made_of | {of: part}
        density = jaxode.bind(jaxode.cnf(field, parts["base"]), parts["field"])
        return density.log_prob(x)

    assert np.isnan(jax.jit(log_prob)(made_of[of])).tolist() == [False, True]
    gradient = jax.grad(lambda part: log_prob(part)[1])(made_of[of])
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(jaxode.SolveError, match="not finite"):
        log_prob(made_of[of])


NAMED = {"p": np.linspace(0.0, 1.0, 40), "q": np.linspace(5.0, 9.0, 40)}

# A wrong context of a density that is bound with `NAMED`, and the message.
WRONG_CONTEXTS = {
    "none": (None, r"must be given, with arrays of shape \(\), \(\), as bind was told; got None"),
    "a name and a shape": (
        {"p": np.ones(3), "r": 2.0},
        r"must have the structure of bind's context, .*'r'",
    ),
    "another name": ({"p": 1.0, "r": 2.0}, r"must have the structure of bind's context, .*'r'"),
    "a list of numbers": ([[1.0, 2.0]], r".*got a list of numbers\. Pass np\.asarray of it"),
}


@pytest.mark.parametrize("name", WRONG_CONTEXTS)
def test_wrong_contexts(name):
    context, message = WRONG_CONTEXTS[name]
    flow = jaxode.cnf(lambda t, z, args: args[0] * z * args[1]["p"], FLOW.base)
    density = jaxode.bind(flow, 0.1, standardize=DATA, standardize_context=NAMED)
    with pytest.raises((TypeError, ValueError), match=r"log_prob\(context=...\): " + message):
        density.log_prob(DATA, context=context)


CONSTANT = np.stack([DATA[:, 0], np.full(40, 2.0)], 1)
WRONG = {
    "a constant column": (
        {"standardize": CONSTANT},
        r"must vary; got column 1 \(counting from 0\), which is constant in .* Leave it out.$",
    ),
    "a scale of zero": ({"standardize": (0.0, 0.0)}, r"the scale must be positive .* got 0.0"),
    "data that leave": (
        {"standardize": DATA, "support": (0.0, 9.0)},
        r"support=...\): the data must lie strictly inside; got values on or outside it in 40",
    ),
    "a mean of NaN": ({"standardize": (np.nan, 1.0)}, r"the mean must be finite .* got nan"),
    "a scale that is lost": (
        {"standardize": np.float32(1e7) + np.eye(4, 2, dtype=np.float32)},
        r"got column 0 .* constant in float32. Leave it out, or subtract its mean in float64 first",
    ),
    "data with NaN": (
        {"standardize": DATA * np.nan},
        r"bind\(standardize=...\): must be finite; .* 40 of 40 rows",
    ),
    "data of another shape": ({"standardize": np.ones((4, 3))}, r"must have shape \[n, 2\]"),
    "a list": ({"standardize": [DATA.mean(0), DATA.std(0)]}, r"mean and scale a tuple; got a list"),
    "text": (
        {"standardize": DATA.astype(str)},
        r"standardize=.*must be an array of numbers; got an array of <U32. Encode text as numbers",
    ),
    "a masked array": (
        {"standardize": np.ma.masked_less(DATA, 0)},
        r"standardize=.*must be an array of numbers; got a masked array",
    ),
    "a context of text": (
        {"standardize_context": {"name": np.full(40, "a")}},
        r"standardize_context=.*must be an array of numbers; got an array of <U1",
    ),
    "no data": ({"standardize": True}, r"got True. Pass your data, an array \[n, 2\]"),
    "data and a context": (
        {"standardize": (DATA, DATA)},
        r"have shape \(2,\); got \(40, 2\). Pass data as an array; those of a context as stand",
    ),
    "three parts": (
        {"standardize": (DATA, DATA, DATA)},
        r"must be data, or \(mean, scale\); got 3",
    ),
    "a context of several arrays": (
        {"standardize_context": (DATA, DATA)},
        r"standardize_context=...\): must be \(mean, scale\), .* got a tuple of 2 parts",
    ),
    "a number as data of a context": (
        {"standardize_context": {"a": 3.0}},
        r"standardize_context=...\): must be the data, or \(mean, scale\); got 3.0. Pass your",
    ),
    "another map for a context": (
        {"standardize_context": {"a": jaxode.standardize.normal(DATA)}},
        r"standardize_context=...\): a context has affine maps only; .* Pass the data themselves.",
    ),
    "a masked mean": (
        {"standardize": (np.ma.array([1.0, 2.0], mask=[0, 1]), 1.0)},
        r"standardize=...\): must be an array of numbers; got a masked array",
    ),
    "a function in place of its map": (
        {"standardize": jaxode.standardize.normal},
        r"must be the data, or \(mean, scale\); got <function normal",
    ),
    "bounds in the wrong order": ({"support": (1.0, 0.0)}, r"each lower bound must be less"),
    "bounds of another shape": ({"support": (np.zeros(3), 1.0)}, r"the shape of an event, \(2,\)"),
    "a name": ({"support": "positive"}, r"support=...\): must be bounds \(low, high\)"),
    "complex bounds": ({"support": (0j, 1.0)}, r"bounds must be real numbers; got 0j"),
    "bounds too far apart": (
        {"support": (-1.7e308, 1.7e308)},
        r"support=...\): the distance between bounds must be a normal number of float64",
    ),
    "bounds too close": ({"support": (0.0, 5e-324)}, r"must be a normal number of float64"),
    "a size as the shape": (
        {"context_shape": 3},
        r"must be a shape, .* such as \(3,\), .* got 3\.",
    ),
    "a list as the shape": ({"context_shape": [3]}, r"context_shape=...\): must be .* got \[3\]\."),
    "text as the shape": ({"context_shape": "a"}, r"context_shape=...\): must be .* got 'a'\."),
    "a negative size": ({"context_shape": (-1,)}, r"context_shape=...\): must be .* got \(-1,\)\."),
    "another shape than that of the context data": (
        {"standardize_context": DATA, "context_shape": ()},
        r"must end in that of the rows of standardize_context, \(\(2,\),\); got \(\(\),\)\.",
    ),
}
FAR = np.finfo(np.float32)
WRONG_IN_FLOAT32 = {
    "bounds at the ends": (
        {"support": (FAR.min, FAR.max)},
        r"support=...\): the distance between bounds must be a normal number of float32",
    ),
    "bounds too close": ({"support": (0.0, 1e-45)}, r"must be a normal number of float32"),
    "large data": (
        {"standardize": 1e300 * DATA},
        r"data must fit float32; got larger numbers in 40 of 40 rows, .* Rescale the data",
    ),
    "large data on a support": (
        {"standardize": np.abs(1e300 * DATA), "support": (0.0, np.inf)},
        r"data must fit float32; got larger numbers in 40 of 40 rows",
    ),
    "tiny data": ({"standardize": 1e-300 * DATA}, r"constant in float32. .* and rescale it"),
    "a large scale": (
        {"standardize": (0.0, 1e300)},
        r"the scale must be positive and finite in float32; got 1e\+300",
    ),
    "a mean whose rounding is larger than the scale": (
        {"standardize": (1.7e9, 10.0)},
        r"the scale must be more than the rounding of the mean; got 10.0 beside 1700000000.0",
    ),
    "a large mean": (
        {"standardize": (1e300, 1.0)},
        r"the mean must be finite in float32; got 1e\+300",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    given, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        jaxode.bind(FLOW, PARAMS, **given)


@pytest.mark.parametrize("name", ["bounds in the wrong order", "a mean of NaN"])
def test_wrong_arguments_that_are_known_inside_of_a_program(name):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda params: jaxode.bind(FLOW, params, **given).log_prob(DATA))(PARAMS)


@pytest.mark.parametrize("given", [{"standardize": (0.0, 3.0)}, {"support": (-9.0, 9.0)}])
def test_no_maps_around_centred_particles(given):
    """They would leave the space that the density is on, and count its dimensions wrongly."""
    flow = jaxode.cnf(jaxode.nn.field, jaxode.centered_normal(3, 2))
    with pytest.raises(ValueError, match=rf"bind\({next(iter(given))}=...\): needs a base with"):
        jaxode.bind(flow, None, **given)
    mapped = jaxode.bind(jaxode.cnf(flow.f, jaxode.standard_normal((3, 2))), None, **given)
    with pytest.raises(ValueError, match=r"with_flow\(flow=...\): needs a base with"):
        mapped.with_flow(flow)


@pytest.mark.parametrize("name", WRONG_IN_FLOAT32)
def test_what_float32_does_not_hold_is_told(name, default_settings):
    given, message = WRONG_IN_FLOAT32[name]
    with pytest.raises(ValueError, match=message):
        jaxode.bind(FLOW, PARAMS, **given)


def test_wrong_events_and_contexts():
    density = jaxode.bind(FLOW, PARAMS)
    with pytest.raises(ValueError, match=r"log_prob\(x=...\): must have shape \[..., 2\]; got"):
        density.log_prob(jnp.ones((4, 3)))
    with pytest.raises(TypeError, match=r"log_prob\(x=...\): must be real; got complex128"):
        density.log_prob(DATA + 1j)
    for method in (density.log_prob, density.to_flow):
        with pytest.raises(
            TypeError, match=r"\(x=...\): must be an array of numbers; got an array"
        ):
            method(DATA.astype(object))
        with pytest.raises(TypeError, match=r"\(x=...\): .* got a list whose entries differ in"):
            method([[1.0, 2.0], [3.0]])
    with pytest.raises(TypeError, match=r"bind\(flow=...\): must be made by jaxode.cnf"):
        jaxode.bind(PARAMS, FLOW)
    seen = np.random.default_rng(1).normal(10.0, 4.0, (40, 3))
    conditional = jaxode.bind(FLOW, trained(3), standardize=DATA, standardize_context=seen)
    rule = r"must be one of shape \(3,\), or one for each of the samples \(4,\); got shape"
    for where in ("log_prob", "to_flow"):
        for wrong in (seen[:5], seen[0, :2]):
            with pytest.raises(ValueError, match=rf"{where}\(context=...\): {rule}"):
                getattr(conditional, where)(DATA[:4], context=wrong)
    with pytest.raises(ValueError, match=r"sample\(context=...\): must have 1 arrays; got 2"):
        conditional.sample(KEY, (4,), context=(seen[:4], seen[:4]))
