"""Train a flow on several devices: the same numbers as on one, and one exchange per step.

    python examples/sharded.py                  # eight virtual devices of this computer
    python examples/sharded.py --processes 2    # four in each of two processes
    python examples/sharded.py --own-steps      # each device takes its own solver steps

Each device has part of the batch and all parameters. With axis_name=, all devices take the solver
steps of the whole batch and exchange one number per step. Without it, each device takes its own
steps, and they exchange only the gradient, once per training step. The same training then runs on
one device, and the losses are compared. To train a density on data, `jaxode.fit(mesh=)` does all of
this; here the loop is written out. The eight devices share the cores, so this is about numbers, not
speed; one device per core can be faster than a single one. Half a minute on two cores.
"""

import argparse
import socket
import subprocess
import sys

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import InputError, announce, count, parser, run
from common.pictures import save
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import Progress
from sklearn.datasets import make_moons

import jaxode
from jaxode import plot

AXIS = "batch"


def start(options) -> None:
    """Create the virtual devices, and connect to the other processes, if any."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices // options.processes)
    jax.config.update("jax_enable_x64", True)
    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{options.port}", options.processes, options.process_id
        )


def start_processes(options) -> int:
    """Run this script once per process. They meet at a free port."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--port", str(port)]
    # In separate sessions, Ctrl-C reaches only this process, which then ends the others.
    processes = [
        subprocess.Popen([*command, "--process-id", str(i)], start_new_session=True)
        for i in range(options.processes)
    ]
    try:
        return max(process.wait() for process in processes)
    finally:
        for process in processes:
            process.kill()


def training_step(mesh, optimizer, axis_name):
    """`step(params, state, x, seed)` with the rows of `x` over the devices of `mesh`."""
    flow = jaxode.cnf(
        jaxode.nn.field, jaxode.standard_normal(2), divergence=jaxode.divergence.hutchinson(),
        axis_name=axis_name,
    )  # fmt: skip

    def loss(params, x, key):
        return jax.lax.pmean(flow.nll(params, x, key=key), AXIS)

    def step(params, state, x, seed):
        value, gradient = jax.value_and_grad(loss)(params, x, jax.random.key(seed))
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    specs = (P(), P(), P(AXIS), P())
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P()))


def train(devices, axis_name, data, options, label: str):
    """The losses and parameters of a training run on these devices."""
    mesh, optimizer = Mesh(np.array(devices), (AXIS,)), optax.adam(3e-3)
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    step = training_step(mesh, optimizer, axis_name)
    params = jaxode.nn.ConcatSquash(2, (32, 32), key=jax.random.key(options.seed))
    params, state = jax.device_put((params, optimizer.init(params)), everywhere)
    rng, losses = np.random.default_rng(options.seed), []
    with Progress(disable=options.process_id > 0) as progress:
        task = progress.add_task(f"{label}: compiling", total=options.steps)
        for i in range(options.steps):
            batch = data[rng.integers(0, len(data), options.batch)]
            # Each process gives its devices their rows of the batch.
            x = jax.make_array_from_callback(
                batch.shape, split, lambda rows, batch=batch: batch[rows]
            )
            params, state, loss = step(params, state, x, np.uint32(i))
            losses.append(float(loss))
            progress.update(task, advance=1, description=f"{label}: loss {losses[-1]:.3f} nats")
    return np.array(losses), jax.tree.map(np.asarray, params)


def draw(losses, one, label, path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    plot.history(one, ax=left, window=1, label="one device", lw=4, alpha=0.3)
    plot.history(losses, ax=left, window=1, label=label, color="black")
    left.set(ylabel="negative log-density, nats", title="training loss")
    left.legend()
    right.semilogy(np.arange(1, len(one) + 1), np.maximum(np.abs(losses - one), 1e-17), ".", ms=3)
    right.set(xlabel="training step", ylabel="absolute difference, nats (1e-17: none)")
    right.set(title="difference of the losses", ylim=(5e-18, None))
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=200, batch=256)
    known.add_argument("--devices", type=count, default=8, help="over all processes (default 8)")
    known.add_argument("--processes", type=count, default=1, help="(default 1)")
    known.add_argument("--own-steps", action="store_true", help="each device steps for itself")
    known.add_argument("--process-id", type=int, default=0, help=argparse.SUPPRESS)
    known.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = known.parse_args(arguments)
    if options.devices % options.processes:
        known.error(f"--devices {options.devices} must be a multiple of --processes")
    if options.batch % options.devices:
        known.error(f"--batch {options.batch} must be a multiple of --devices {options.devices}")
    if not hasattr(jax.lax, "pcast"):
        raise InputError(f"needs JAX 0.8 or newer; this is {jax.__version__}")
    if options.port is None:
        announce(__doc__)
        if options.processes > 1:
            return start_processes(options)
    start(options)
    data = make_moons(20_000, noise=0.08, random_state=options.seed)[0]
    axis_name = None if options.own_steps else AXIS
    label = f"{options.devices} devices"
    if options.process_id == 0:
        print(f"training on {label}, then on one", flush=True)
    losses, params = train(jax.devices(), axis_name, data, options, label)
    if options.process_id == 0:
        one, params_of_one = train(jax.local_devices()[:1], None, data, options, "one device")
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(params_of_one), strict=True)
        apart = max(float(np.abs(a - b).max()) for a, b in pairs)
        print(
            f"{label} in {options.processes} processes, last loss {losses[-1]:.6f} nats, "
            f"on one device {one[-1]:.6f}"
        )
        print(f"largest difference of a loss {np.abs(losses - one).max():.1e} nats")
        print(f"largest difference of a parameter {apart:.1e}")
        draw(losses, one, label, options.out)
    return 0


if __name__ == "__main__":
    run(main)
