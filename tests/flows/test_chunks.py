"""Densities in batches: neither numbers, noise nor messages depend on the size.

That their gradients do not, and of one with a context, is tested in `test_flow_features.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, temporary_bytes, trained, with_slow

import jaxode
from jaxode.flows.chunks import LEAST_CHUNK_ROWS, MOST_CHUNK_ROWS, Chunks

KEY = jax.random.key(0)
BASE = jaxode.standard_normal(2)
ROWS, SIZE = 20, 8  # two batches of seven, and one of six rows
X = jnp.asarray(np.random.default_rng(0).normal(0, 2, (ROWS, 2)))
SHARDED = jax.sharding.PartitionSpec("rows")


def density(f=lambda t, z, rate: -rate * jnp.sin(z + t), params=0.7, **options):
    flow = jaxode.cnf(f, BASE, rtol=1e-6, atol=1e-6, **options)
    return jaxode.bind(flow, params, support=(-50.0, 60.0))


# Of the density, the keywords of a call.
CALLS = {
    "log_prob": lambda **size: density().log_prob(X.reshape(4, 5, 2), **size),
    "sample": lambda **size: density().sample(KEY, ROWS, **size),
    "sample_and_log_prob": lambda **size: density().sample_and_log_prob(KEY, (4, 5), **size),
}


@pytest.mark.parametrize("name", with_slow(CALLS, ["sample"]))  # as with log-densities
def test_results_do_not_depend_on_the_size(name):
    """Outside of `jit`, where a loop in Python runs one program."""
    # Each row takes the steps that it takes in the whole batch.
    assert_close(CALLS[name](batch_size=SIZE), CALLS[name](), 1e-12)


@pytest.mark.parametrize("jit", [False, True])
def test_a_row_that_fails_is_named_by_its_number_in_the_whole(jit):
    """Row 13 explodes."""
    error = jax.errors.JaxRuntimeError if jit else jaxode.SolveError
    field = lambda t, z, rate: -rate * z * jnp.abs(z).max()
    options = {"rtol": 1e-6, "atol": 1e-6, "max_steps": 8, "throw": True}
    bound = jaxode.bind(jaxode.cnf(field, BASE, **options), jnp.asarray(0.1))
    x = jnp.full((ROWS, 2), 0.1).at[13].set(200.0)
    log_prob = lambda x: bound.log_prob(x, batch_size=SIZE)
    log_prob = jax.jit(log_prob) if jit else log_prob
    with pytest.raises(error, match="1 of 20 rows, first in row 13"):
        jax.block_until_ready(log_prob(x))
    with pytest.raises(error, match=r"x=...\): .* 1 of 20 rows, first in row 13"):
        jax.block_until_ready(log_prob(x.at[13].set(jnp.nan)))
    assert np.isfinite(log_prob(x.at[13].set(0.2))).all()


@pytest.mark.slow  # two densities and two gradients are compiled for their memory alone
def test_memory_is_that_of_one_batch():
    rows, bound = jax.ShapeDtypeStruct((2048, 2), float), density(jaxode.nn.field, trained())
    value = lambda size: lambda x: jnp.sum(bound.log_prob(x, batch_size=size))
    forward = lambda size: jax.jit(value(size)).lower(rows).compile().memory_analysis()
    small, large = (forward(size).temp_size_in_bytes for size in (64, 2048))
    assert 4 * small < large
    assert 4 * temporary_bytes(value(64), rows) < temporary_bytes(value(2048), rows)


def test_gradients_outside_of_a_program_are_compiled_once(compiled):
    """Also after the density was traced for another number of rows."""
    bound = density()
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

    bound, rows = density(field), jnp.zeros((100, 2))
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
    ("weights", "size"),
    [(0, MOST_CHUNK_ROWS), (10, MOST_CHUNK_ROWS), (20_000, 1677), (10_000_000, LEAST_CHUNK_ROWS)],
)
def test_a_size_that_is_not_given_depends_on_the_network(weights, size):
    params = {"weights": jnp.zeros(weights), "activation": jnp.tanh}
    assert Chunks.make(None, False, params).size == size


@pytest.mark.slow  # compiles for several devices; what they tell each other is tested below
def test_devices_have_batches_of_their_own():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("rows",))
    bound = density(divergence=jaxode.divergence.hutchinson())
    log_prob = lambda size: lambda x: bound.log_prob(x, key=KEY, batch_size=size)
    split = jax.jit(jax.shard_map(log_prob(4), mesh=mesh, in_specs=SHARDED, out_specs=SHARDED))
    assert_close(split(X), log_prob(ROWS)(X), 1e-12)


def test_rows_that_are_split_over_devices_are_so_in_every_batch():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("rows",))
    split = jax.sharding.NamedSharding(mesh, SHARDED)
    rows, bound = jax.ShapeDtypeStruct((16, 2), float, sharding=split), density()
    program = jax.jit(lambda x: bound.log_prob(x, batch_size=SIZE)).lower(rows).compile()
    assert program.output_shardings == split
    # Devices tell each other when their rows are done, and nothing else.
    assert "all-reduce" in program.as_text()
    assert not any(word in program.as_text() for word in ("all-gather", "all-to-all", "permute"))
