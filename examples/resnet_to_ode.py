"""A residual network of depth L becomes a Neural ODE as L grows.

    python examples/resnet_to_ode.py

A residual network with shared parameters, z <- z + f(z, l/L) / L, takes L Euler steps of the ODE
dz/ds = f(z, s). Networks of several depths and the Neural ODE classify handwritten digits. Then
residual networks get the parameters of the Neural ODE: their outputs and gradients differ from its
own by O(1/L). About a minute on two cores.
"""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import announce, count, parser, run
from common.descent import minimize
from common.pictures import save
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import jaxode
from jaxode import plot

PIXELS, CLASSES, HELD_OUT = 64, 10, 397
TIGHT = {"rtol": 1e-6, "atol": 1e-6}


class Classifier(NamedTuple):
    field: jaxode.nn.MLP
    head: eqx.nn.Linear


def by_residual_network(field, z, depth):
    """The textbook form, to check that `by_euler` is the same network."""
    for layer in range(depth):
        z = z + jax.vmap(field, in_axes=(None, 0))(jnp.asarray(layer / depth), z) / depth
    return z


def by_euler(field, z, depth):
    """The same residual network: `depth` equal Euler steps, with exact backpropagation."""
    return jaxode.flow(jaxode.nn.field, z, 0.0, 1.0, field, solver=diffrax.Euler(), steps=depth)


def by_ode(field, z, rtol=1e-4, atol=1e-4):
    return jaxode.flow(jaxode.nn.field, z, 0.0, 1.0, field, rtol=rtol, atol=atol, throw=False)


def loss(model, carry, x, labels):
    logits = jax.vmap(model.head)(carry(model.field, x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(model, carry, x, labels):
    logits = jax.jit(lambda: jax.vmap(model.head)(carry(model.field, x)))()
    return float(jnp.mean(jnp.argmax(logits, axis=1) == labels))


def train(model, carry, x, labels, options, name):
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, options.steps), weight_decay=1e-3)

    def of_batch(model, step, key):
        rows = jax.random.choice(key, len(x), (options.batch,))
        return loss(model, carry, x[rows], labels[rows])

    key = jax.random.key(options.seed)
    return minimize(of_batch, model, optimizer, options.steps, key, name)[0]


def relative(a, b):
    a, b = ravel_pytree(a)[0], ravel_pytree(b)[0]
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def compare(model, depths, x, labels):
    """Relative differences of state and gradient to the Neural ODE per depth, and a check."""
    tight = lambda field, z: by_ode(field, z, **TIGHT)
    gradient = lambda carry: jax.jit(jax.grad(loss), static_argnums=1)(model, carry, x, labels)
    end, exact = tight(model.field, x), gradient(tight)
    states, gradients = [], []
    for depth in depths:
        euler = lambda field, z, depth=depth: by_euler(field, z, depth)
        states.append(relative(euler(model.field, x), end))
        gradients.append(relative(gradient(euler), exact))
    same = relative(
        gradient(lambda field, z: by_euler(field, z, 4)),
        gradient(lambda field, z: by_residual_network(field, z, 4)),
    )
    return states, gradients, same


def draw(depths, trained, transferred, ode, states, gradients, model, x, path):
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2), constrained_layout=True)
    axes[0].plot(depths, trained, "o-", label="residual network, trained at this depth")
    axes[0].plot(depths, transferred, "s--", label="parameters of the Neural ODE at this depth")
    axes[0].axhline(ode, color="black", lw=1, ls=":", label="Neural ODE")
    axes[0].set(xlabel="depth L", ylabel="accuracy")
    axes[0].set_title(f"held-out digits, of which one is {1 / HELD_OUT:.2%}")
    axes[1].plot(depths, states, "o-", label="last hidden state")
    axes[1].plot(depths, gradients, "s-", label="gradient in all parameters")
    axes[1].plot(depths, gradients[-1] * depths[-1] / np.array(depths), "k:", label="1/L")
    axes[1].set(yscale="log", xlabel="depth L", ylabel="relative difference")
    for axis in axes[:2]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(depths, map(str, depths))
    axes[1].set_title("residual network and Neural ODE, same parameters")

    # The plane in which the final states vary most.
    end = jnp.asarray(by_ode(model.field, x))
    plane = jnp.linalg.svd(end - end.mean(0), full_matrices=False)[2][:2].T
    few, options = x[:30], {"batch": "joint", "ts": jnp.linspace(0.0, 1.0, 41)}
    smooth = jaxode.solve(jaxode.nn.field, few, 0.0, 1.0, model.field, **options).ys
    plot.trajectories(smooth @ plane, ax=axes[2], start="digit", end="Neural ODE")
    options = {"batch": "joint", "ts": jnp.linspace(0.0, 1.0, depths[1] + 1)}
    options |= {"solver": diffrax.Euler(), "steps": depths[1]}
    corners = jaxode.solve(jaxode.nn.field, few, 0.0, 1.0, model.field, **options).ys @ plane
    axes[2].plot(corners[..., 0], corners[..., 1], color="tab:red", lw=0.7, alpha=0.6)
    axes[2].plot([], [], color="tab:red", lw=0.7, label=f"residual network, L = {depths[1]}")
    axes[2].set_title("30 digits through the layers")
    axes[2].set(xlabel="first principal axis", ylabel="second principal axis")
    for axis in axes:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=400, batch=128, width=96)
    known.add_argument("--depths", type=count, nargs="+", default=[1, 2, 4, 8, 16, 32, 64],
                       help="of the residual networks (default 1 2 4 ... 64)")  # fmt: skip
    options = known.parse_args(arguments)
    depths = sorted(set(options.depths))
    if len(depths) < 2:
        known.error("--depths needs two depths to compare")

    announce(__doc__)
    x, labels = map(jnp.asarray, load_digits(return_X_y=True))
    order = jax.random.permutation(jax.random.key(options.seed), len(x))
    x, labels = (x[order] / 8 - 1).astype(jnp.float32), labels[order]
    (test, x), (test_labels, labels) = jnp.split(x, [HELD_OUT]), jnp.split(labels, [HELD_OUT])
    field_key, head_key = jax.random.split(jax.random.key(options.seed + 1))
    start = Classifier(
        jaxode.nn.MLP(PIXELS, (options.width,), key=field_key),
        eqx.nn.Linear(PIXELS, CLASSES, key=head_key),
    )

    carries = {L: lambda field, z, L=L: by_euler(field, z, L) for L in depths}
    trained = []
    for depth, carry in carries.items():
        model = train(start, carry, x, labels, options, f"residual network, depth {depth}")
        trained.append(accuracy(model, carry, test, test_labels))
    model = train(start, by_ode, x, labels, options, "Neural ODE")
    ode = accuracy(model, by_ode, test, test_labels)
    transferred = [accuracy(model, carry, test, test_labels) for carry in carries.values()]
    states, gradients, same = compare(model, depths, test, test_labels)

    print("                 held-out accuracy            difference to the Neural ODE")
    print("depth L    trained so   Neural ODE's        last state    gradient")
    for row in zip(depths, trained, transferred, states, gradients, strict=True):
        print("{:7d} {:12.1%} {:14.1%} {:17.1e} {:11.1e}".format(*row))
    print(f"Neural ODE {ode:9.1%}")
    print(f"gradients of 4 Euler steps and of 4 residual blocks by hand: {same:.0e} apart")
    draw(depths, trained, transferred, ode, states, gradients, model, test, options.out)
    return 0


if __name__ == "__main__":
    run(main)
