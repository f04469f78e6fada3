"""Fit a stiff reaction mechanism to noisy experiments, and learn one of its rate laws.

    python examples/kinetics.py

Robertson's mechanism, three reactions whose rates differ by nine orders of magnitude, is observed
in 200 experiments with noise of 3%, from ten microseconds to an hour. All experiments are one solve
by Rodas5P with steps of their own. First the three rate constants are fitted, from guesses that are
wrong by factors of 5 to 20. Then the law of the third reaction is taken away: a network of two of
the concentrations stands in its place, and learns what it has to be for the concentrations to come
out right. Prints the errors of both on new experiments. The picture has the concentrations of one
of those on a logarithmic time axis. Two minutes on two cores.

What makes it train, after Kim et al.: concentrations and rates are divided by their scales, and
rate constants are learned as logarithms.

References: Robertson (1966); Kim et al. (2021), arXiv:2103.15341.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from common.arguments import announce, count, parser, run
from common.descent import minimize
from common.pictures import save

import jaxode

TRUE = jnp.array([0.04, 3e7, 1e4])
GUESS = TRUE * jnp.array([5.0, 0.1, 20.0])
# Concentrations are solved for in these units, in which all are of about one.
UNITS = jnp.array([1.0, 3e-5, 1.0])
TIMES, NOISE = jnp.logspace(-5, 3.5, 30), 0.03


def reactions(y, rates):
    """A -> B, 2 B -> B + C, B + C -> A + C, from concentrations in units of one."""
    return jnp.stack([rates[0] * y[0], rates[1] * y[1] ** 2, rates[2] * y[1] * y[2]])


def change(flows):
    a, b, c = flows
    return jnp.stack([c - a, a - b - c, b])


def known_laws(t, z, logarithms):
    """All three laws, with constants to be fitted."""
    rates = GUESS * jnp.exp(logarithms)
    return change(reactions(z * UNITS, rates)) / UNITS


def learned_law(t, z, parts):
    """The third law is a network, times the concentration of B without which nothing reacts."""
    logarithms, network = parts
    fitted = GUESS * jnp.exp(jax.lax.stop_gradient(logarithms))
    a, b, _ = reactions(z * UNITS, fitted)
    return change((a, b, law(network, z))) / UNITS


def law(network, z):
    return TRUE[2] * UNITS[1] * z[1] * jax.nn.softplus(network(z[::2]))


def solve(f, args, starts, times=TIMES):
    return jaxode.solve(
        f, starts, 0.0, times[-1], args, batch="per_sample", ts=times, solver=jaxode.Rodas5P(),
        rtol=1e-4, atol=1e-6, max_steps=256, throw=False,
    ).ys  # fmt: skip


def experiments(key, number: int):
    """Starts `[experiments, 3]`: A, and some C that is there from the beginning."""
    a, c = jax.random.uniform(key, (2, number), minval=jnp.array([[0.3], [0.0]]))
    return jnp.stack([a, jnp.zeros(number), c], axis=1)


def draw(truth, observed, fits, starts, network, path):
    figure, grid = plt.subplots(2, 2, figsize=(10, 7.75), constrained_layout=True)
    axes = grid.ravel()
    times = jnp.logspace(-6, 4, 200)
    lines = {"truth": (known_laws, truth), **fits}
    for axis, name, i in zip(axes, "ABC", range(3), strict=False):
        for (label, (f, args)), style in zip(lines.items(), ("-", "--", ":"), strict=True):
            ys = solve(f, args, starts[:1], times)[:, 0, i]
            axis.semilogx(times, ys, style, label=label, lw=1.8)
        axis.semilogx(TIMES, observed[:, 0, i], ".", color="gray", ms=5, label="readings")
        unit = "" if UNITS[i] == 1 else f" / {UNITS[i]:.0e}"
        axis.set(title=f"{name}{unit}, a new experiment", xlabel="seconds")
    axes[0].legend(fontsize=8)
    c = jnp.linspace(0, 1, 50)
    for a in (0.2, 0.6, 1.0):
        z = jnp.stack([jnp.full(50, a), jnp.ones(50), c], axis=1)
        learned = jax.vmap(law, (None, 0))(network, z) / UNITS[1]
        axes[3].plot(c, learned / TRUE[2], ":", color="tab:green", lw=1.8)
    axes[3].plot(c, c, color="tab:blue", lw=1.8)
    axes[3].set(title="the third rate law, divided by B", xlabel="C")
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=800, rate=1e-2)
    known.add_argument("--experiments", type=count, default=200, help="(default 200)")
    options = known.parse_args(arguments)
    announce(__doc__)
    keys = jax.random.split(jax.random.key(options.seed), 5)
    truth = jnp.log(TRUE / GUESS)
    starts, new = experiments(keys[0], options.experiments), experiments(keys[1], 20)
    exact = jax.jit(lambda starts: solve(known_laws, truth, starts))
    noisy = lambda ys, key: ys + NOISE * jax.random.normal(key, ys.shape)
    observed, unseen = noisy(exact(starts), keys[2]), exact(new)

    def fit(f, params, steps, rate, name):
        def loss(params, step, key):
            return jnp.mean((solve(f, params, starts) - observed) ** 2)

        optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
        return minimize(loss, params, optimizer, steps, keys[3], name)[0]

    def error(f, params):
        return float(jnp.sqrt(jnp.mean((solve(f, params, new) - unseen) ** 2)))

    steps = max(options.steps // 2, 1)
    fitted = fit(known_laws, jnp.zeros(3), steps, 10 * options.rate, "rate constants")
    for name, rates in (("guess", GUESS), ("fitted", GUESS * jnp.exp(fitted)), ("true", TRUE)):
        print(f"{name:8s}", *(f"{rate:.3g}" for rate in rates), flush=True)
    mlp = eqx.nn.MLP(2, "scalar", 16, 2, jax.nn.softplus, key=keys[4])
    parts = fit(learned_law, (fitted, mlp), options.steps, options.rate, "third law")
    print(f"error on new experiments, of which readings have {NOISE:g}:")
    print(f"  fitted constants {error(known_laws, fitted):.4f}")
    print(f"  learned law      {error(learned_law, parts):.4f}")
    fits = {"fitted constants": (known_laws, fitted), "learned law": (learned_law, parts)}
    draw(truth, noisy(unseen, keys[3]), fits, new, parts[1], options.out)
    return 0


if __name__ == "__main__":
    run(main)
