"""Densities in batches: neither numbers, noise, derivatives nor messages depend on the size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, temporary_bytes, trained, typed, with_slow

import jaxode
from jaxode.flows.chunks import LEAST, MOST, Chunks

KEY = jax.random.key(0)
OPTIONS = {"rtol": 1e-6, "atol": 1e-6}
BASE = jaxode.standard_normal(2)
ROWS, SIZE = 20, 8  # two batches of seven, and one of six rows
X = jnp.asarray(np.random.default_rng(0).normal(0, 2, (ROWS, 2)))
CONTEXT = jnp.linspace(-1.0, 1.0, ROWS)[:, None]


@functools.cache
def density(context_size=0, **options):
    flow = jaxode.cnf(jaxode.nn.field, BASE, **OPTIONS, **options)
    return jaxode.bind(flow, trained(context_size), support=(-50.0, 60.0), context_shape=None)


HUTCHINSON = {"divergence": jaxode.divergence.hutchinson()}
# Of the density, the keywords of a call.
CALLS = {
    "log_prob": lambda **size: density().log_prob(X, **size),
    "with noise": lambda **size: density(**HUTCHINSON).log_prob(X, key=KEY, **size),
    "of more axes": lambda **size: density().log_prob(X.reshape(4, 5, 2), **size),
    "sample": lambda **size: density().sample(KEY, ROWS, **size),
    "samples of contexts": lambda **size: density(1).sample(KEY, ROWS, context=CONTEXT, **size),
    "sample_and_log_prob": lambda **size: density().sample_and_log_prob(KEY, (4, 5), **size),
}


# Outside of `jit` the same loop is compiled once.
RUNS = [(name, True) for name in CALLS]
RUNS += [("log_prob", False), ("sample_and_log_prob", False)]


# Samples with their densities have more axes, too, and noise is on two devices, below.
SLOW = [("of more axes", True), ("with noise", True), ("sample", True)]


@pytest.mark.parametrize(("name", "jit"), with_slow(RUNS, SLOW))
def test_results_do_not_depend_on_the_size(name, jit):
    call = CALLS[name]
    expected, in_batches = call(), lambda: call(batch_size=SIZE)
    found = jax.jit(in_batches)() if jit else in_batches()
    # Each row takes the steps that it takes in the whole batch; products of matrices are rounded
    # in another order.
    assert_close(found, expected, 1e-12)


@pytest.mark.slow
def test_derivatives_do_not_depend_on_the_size():
    """By samples, parameters and contexts; of a loop inside of the program."""
    bound = density(1)

    def total(params, x, context, size):
        log_prob = bound.with_params(params).log_prob(x, context=context, batch_size=size)
        return jnp.sum(jnp.sin(log_prob))

    gradient = jax.jit(jax.grad(total, (0, 1, 2)), static_argnums=3)
    found, expected = (gradient(bound.params, X, CONTEXT, size) for size in (SIZE, ROWS))
    assert_close(found, expected, 1e-10)  # sums over rows, in another order


def test_an_ensemble_does_not_depend_on_the_size():
    bound = density()
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), bound.params)

    one = lambda params: bound.with_params(params).log_prob(X, batch_size=SIZE)
    members = jax.jit(jax.vmap(one))(params)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(2)]
    expected = jnp.stack([bound.with_params(one).log_prob(X) for one in each])
    assert_close(members, expected, 1e-12)


@pytest.mark.parametrize("jit", [False, True])
def test_a_row_that_fails_is_named_by_its_number_in_the_whole(jit):
    """Row 13 explodes."""
    error = jax.errors.JaxRuntimeError if jit else jaxode.SolveError
    base = jaxode.standard_normal(2)
    field = lambda t, z, rate: -rate * z * jnp.abs(z).max()
    options = {"max_steps": 8, "throw": True, **OPTIONS}
    bound = jaxode.bind(jaxode.cnf(field, base, **options), jnp.asarray(0.1))
    x = jnp.full((ROWS, 2), 0.1).at[13].set(200.0)
    log_prob = lambda x: bound.log_prob(x, batch_size=SIZE)
    log_prob = jax.jit(log_prob) if jit else log_prob
    with pytest.raises(error, match="1 of 20 rows, first in row 13"):
        jax.block_until_ready(log_prob(x))
    with pytest.raises(error, match=r"x=...\): .* 1 of 20 rows, first in row 13"):
        jax.block_until_ready(log_prob(x.at[13].set(jnp.nan)))
    assert np.isfinite(log_prob(x.at[13].set(0.2))).all()


@pytest.mark.slow
def test_memory_is_that_of_one_batch():
    rows, bound = jax.ShapeDtypeStruct((2048, 2), float), density()
    value = lambda size: lambda x: jnp.sum(bound.log_prob(x, batch_size=size))
    forward = lambda size: jax.jit(value(size)).lower(rows).compile().memory_analysis()
    small, large = (forward(size).temp_size_in_bytes for size in (64, 2048))
    assert 4 * small < large
    assert 4 * temporary_bytes(value(64), rows) < temporary_bytes(value(2048), rows)


def test_gradients_outside_of_a_program_are_compiled_once(compiled):
    """Also after the density was traced for another number of rows."""
    bound = jaxode.bind(jaxode.cnf(lambda t, z, rate: -rate * z, BASE), jnp.asarray(0.1))
    gradient = jax.grad(lambda x: jnp.sum(bound.log_prob(x, batch_size=SIZE)))
    first = gradient(X)
    bound.log_prob(X[:3])
    count = len(compiled)
    np.testing.assert_array_equal(gradient(X), first)
    assert len(compiled) == count > 0


def test_batches_of_many_sizes_share_a_program():
    traced = []

    def field(t, z, rate):
        traced.append(z)
        return -rate * z

    bound, rows = jaxode.bind(jaxode.cnf(field, BASE), jnp.asarray(0.1)), jnp.zeros((100, 2))
    bound.log_prob(rows, batch_size=16)  # seven batches of 15 rows, filled up to 16
    count = len(traced)
    bound.log_prob(rows[:96], batch_size=16)
    assert len(traced) == count > 0


def test_progress_is_told_on_stderr(capsys):
    bound = density()
    bound.log_prob(X, batch_size=SIZE, progress=True)
    told = capsys.readouterr().err.split("\r")
    assert [text.split(" rows")[0] for text in told[1:]] == [
        "log_prob: 6 of 20", "log_prob: 13 of 20", "log_prob: 20 of 20",
    ]  # fmt: skip
    assert told[-1].endswith("\n")
    jax.jit(lambda: bound.log_prob(X, batch_size=SIZE, progress=True))()
    bound.log_prob(X, batch_size=SIZE)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "size"), [(0, MOST), (10, MOST), (20_000, 1677), (10_000_000, LEAST)]
)
def test_a_size_that_is_not_given_depends_on_the_network(weights, size):
    params = {"weights": jnp.zeros(weights), "activation": jnp.tanh}
    assert Chunks.make(None, False, params).size == size


@typed
def test_devices_have_batches_of_their_own():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("rows",))
    spec = jax.sharding.PartitionSpec("rows")
    bound = density(**HUTCHINSON)
    log_prob = lambda size: lambda x: bound.log_prob(x, key=KEY, batch_size=size)
    split = jax.jit(jax.shard_map(log_prob(4), mesh=mesh, in_specs=spec, out_specs=spec))
    assert_close(split(X), log_prob(ROWS)(X), 1e-12)


@pytest.mark.slow
def test_rows_that_are_split_over_devices_are_so_in_every_batch():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("rows",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    rows, bound = jax.ShapeDtypeStruct((16, 2), float, sharding=split), density()
    program = jax.jit(lambda x: bound.log_prob(x, batch_size=SIZE)).lower(rows).compile()
    assert program.output_shardings == split
    # Devices tell each other when their rows are done, and nothing else.
    assert "all-reduce" in program.as_text()
    assert not any(word in program.as_text() for word in ("all-gather", "all-to-all", "permute"))
