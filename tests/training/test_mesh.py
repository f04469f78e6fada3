"""`fit` on several devices, and in several processes: the result of one."""

import subprocess
import sys
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import STEPS, cheap, cheap_of_contexts, minimized
from jax.sharding import Mesh

import jaxode
from jaxode.training import steps, validations
from jaxode.training.devices import Devices
from jaxode.training.sources import Rows

pytestmark = pytest.mark.usefixtures("default_settings")
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(500, 2)).astype(np.float32) @ np.array([[2.0, 1.0], [0.0, 1.0]], np.float32)


def mesh_of(*sizes):
    return Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), tuple("ab"[: len(sizes)]))


CASES = CASES = {
    "two axes": ((2, 2), {}),
    "devices that do not divide the validation rows": ((8,), {"validation": X[:50]}),
    "contexts and noise": ((2,), {"context": X[:, :1], "x": np.floor(X), "dequantize": True}),
    "likelihood": ((2,), {"likelihood": 3}),
    "an optimizer with a line search": ((2,), {"optimizer": optax.lbfgs(), "steps": 2}),
}


@pytest.mark.slow  # trains twice, each with programs of its own
@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_one_device(name):
    sizes, options = CASES[name]
    options = {"x": X, "steps": 60, "batch_size": 64, "key": KEY, "progress": False, **options}
    make = cheap_of_contexts if "context" in options else cheap
    density = make(standardize=jaxode.standardize.affine(X))
    expected, expected_history = jaxode.fit(density, **options)
    actual, history = jaxode.fit(density, mesh=mesh_of(*sizes), **options)
    np.testing.assert_allclose(
        [point.nats for point in history], [point.nats for point in expected_history], atol=2e-3
    )
    context = options.get("context")
    rows = {} if context is None else {"context": context[:5]}
    found = actual.log_prob(X[:5], **rows)
    np.testing.assert_allclose(found, expected.log_prob(X[:5], **rows), atol=2e-3)
    assert all(leaf.sharding.num_devices == 1 for leaf in jax.tree.leaves(actual.params)
               if isinstance(leaf, jax.Array))  # fmt: skip


def away(params, x, context, key):
    """The squared distance of rows, which devices have some of, to the parameters."""
    return jnp.mean((x - params) ** 2)


def test_the_loop_gives_the_parameters_of_one_device():
    alone, split = (minimized(away, jnp.zeros(2), mesh=mesh) for mesh in (None, mesh_of(2, 2)))
    np.testing.assert_allclose(split.best.params, alone.best.params, rtol=1e-4)
    assert [point.step for point in split.points] == [0, STEPS]
    assert (alone.best.params != 0).all()
    assert split.plan.devices.from_all(split.best.params).sharding.num_devices == 1


@pytest.mark.parametrize("rows", [100, 98])
def test_looks_are_those_of_one_device(rows):
    """Also at rows that do not divide."""
    density, at = cheap(), Rows(jnp.asarray(X[:rows]), None)
    alone, split = (
        validations.evaluation(density, at, 0.0, KEY, Devices(mesh))(density.params)
        for mesh in (None, mesh_of(4))
    )
    np.testing.assert_allclose(split, alone, rtol=1e-5)


def scaled(t, z, params):
    return params["a"] @ z + params["b"]


def test_devices_exchange_their_gradients_once_a_step():
    flow = jaxode.cnf(scaled, jaxode.standard_normal(2), throw=False)
    arrays, static = eqx.partition({"a": jnp.eye(2), "b": jnp.ones(2)}, eqx.is_inexact_array)
    loss = lambda params, x, context, key: flow.matching_loss(params, x, key=key)
    optimizer, mesh = optax.adam(1e-3), mesh_of(4)
    program = steps.Program(loss, optimizer, 64, static, steps.unchanged, Devices(mesh))
    state = steps.TrainingState(arrays, arrays, optimizer.init(arrays), jnp.zeros((), jnp.int32))
    take = partial(steps._take_steps, program)
    split = steps.over_devices(take, mesh)
    compiled = jax.jit(
        lambda state, key: split(state, (1.0, 1), Rows(jnp.asarray(X), None), key, (0, 2))
    )
    text = compiled.lower(state, KEY).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1


PROCESS = """
import sys
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
import jaxode

me, case = jax.process_index(), sys.argv[3]
x = np.random.default_rng(me).normal(size=(400 + 100 * me, 2)).astype(np.float32) + [3 * me, 0]
columns = 1 if case == "columns" and me else 2
options = {"steps": 200, "batch_size": 128}
if case == "seconds":
    options["seconds"] = 1.0 if me == 0 else 1.0
if case == "iterator":
    options["validation"] = x[:200]
    rows = x
    x = (rows for _ in range(20 if me else 30))
else:
    x = x[:, :columns]
network = jaxode.nn.Residual(columns, 16, 1, key=jax.random.key(0))
flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(columns))
mesh = jax.sharding.Mesh(jax.devices(), "rows")
density, history = jaxode.fit(
    jaxode.bind(flow, network), x, key=jax.random.key(1), mesh=mesh, progress=False, **options
)
mean = density.sample(jax.random.key(2), (2000,)).mean(0)
print("found", history[-1].step, history[-1].nats, *mean.tolist())
"""


def in_two_processes(case):
    import socket

    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    run = lambda i: subprocess.Popen(
        [sys.executable, "-c", PROCESS, address, str(i), case],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    processes = [run(0), run(1)]
    try:
        return [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow  # starts processes, each of which compiles
@pytest.mark.parametrize("case", ["seconds", "iterator"])
def test_processes_train_on_the_rows_of_all(case):
    outputs = in_two_processes(case)
    first, second = (out[out.find("found") :].split() for out, _ in outputs)
    assert first[:1] == ["found"], outputs[0][1]
    assert first == second
    mean = [float(number) for number in first[3:]]
    np.testing.assert_allclose(mean, [1.5, 0.0], atol=0.4)
    if case == "iterator":
        assert all("training ended with the iterator" in errors for _, errors in outputs)


@pytest.mark.slow  # starts processes
def test_processes_with_other_columns_are_told_so():
    for _, errors in in_two_processes("columns"):
        assert "the processes must pass the same columns" in errors
