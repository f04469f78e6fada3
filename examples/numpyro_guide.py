"""A flow as the variational guide of a numpyro model, compared with NUTS.

    python examples/numpyro_guide.py

The model is "eight schools": the effects of coaching, with an unknown spread tau between schools.
`FlowGuide` works for any model with continuous latent variables. There are no samples for
`jaxode.fit`, so numpyro trains it by the ELBO. Prints the posterior according to NUTS, the flow and
a Gaussian guide, and whether training exploited solver errors. About a minute on two cores.

Reference: Rubin (1981), doi:10.3102/10769986006004377.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import announce, count, parser, positive, run
from common.pictures import save
from rich.progress import Progress

try:
    import numpyro
    import numpyro.distributions as dist
    from numpyro.handlers import reparam
    from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_median
    from numpyro.infer.autoguide import AutoContinuous, AutoNormal
    from numpyro.infer.reparam import LocScaleReparam
except ModuleNotFoundError:
    sys.exit("numpyro_guide: numpyro is not installed. Run: pip install numpyro")

import jaxode
from jaxode import plot

EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools():
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(EFFECT)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, ERROR), obs=EFFECT)


# The usual theta = mu + tau * standard normal: without it, NUTS gets stuck in a funnel's neck.
MODEL = reparam(eight_schools, config={"theta": LocScaleReparam(0)})


class FlowGuide(AutoContinuous):
    """All latent variables, unconstrained and as one vector, with the density of a flow."""

    tolerance: float

    def _get_posterior(self):
        size = self.latent_dim
        make = lambda key: jaxode.nn.ConcatSquash(size, (64, 64), key=key)
        params: Any = numpyro.param("field", make)
        # The base density is learned, too, because latent variables have different scales.
        normal: Any = jaxode.diagonal_normal(size)
        base: Any = numpyro.param("base", normal)
        rtol = atol = self.tolerance
        flow = jaxode.cnf(jaxode.nn.field, base, rtol=rtol, atol=atol, throw=False)
        return jaxode.interop.numpyro(jaxode.bind(flow, params))


def fit(guide, steps, key):
    """Stochastic variational inference: the parameters, and the negative ELBO of each step."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    )
    svi = SVI(MODEL, guide, optimizer, Trace_ELBO(num_particles=64))
    state, losses, update = svi.init(key), [], jax.jit(svi.update)
    with Progress() as progress:
        task = progress.add_task("compiling", total=steps)
        for _ in range(steps):
            state, loss = update(state)
            losses.append(float(loss))
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"{type(guide).__name__}: the ELBO is not finite in step {len(losses)}"
                )
            text = f"{type(guide).__name__}, ELBO {-np.mean(losses[-50:]):.2f}"
            progress.update(task, advance=1, description=text)
    return svi.get_params(state), losses


def elbo(guide, params, samples, key):
    """The ELBO of a trained guide on fresh samples."""
    loss = Trace_ELBO(num_particles=samples).loss
    return -float(jax.jit(lambda key: loss(key, params, MODEL, guide))(key))


def by_nuts(samples, key):
    """The reference posterior."""
    mcmc = MCMC(NUTS(MODEL), num_warmup=min(1000, samples), num_samples=samples, progress_bar=False)
    mcmc.run(key)
    return mcmc.get_samples()


def draw(posteriors, histories, path):
    """The funnel according to each method, the effects of the schools, and the training."""
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    axes = list(figure.subplot_mosaic("ABC;DDE").values())
    colors = dict(zip(posteriors, ("black", "tab:orange", "tab:blue"), strict=True))
    for axis, (name, draws) in zip(axes, posteriors.items(), strict=False):
        points = np.stack([draws["theta"][:, 0], np.log(draws["tau"])], axis=1)
        plot.samples(points[:4000], ax=axis, color=colors[name], s=2)
        axis.set(xlim=(-25, 45), ylim=(-4, 4), title=name)
        axis.set(xlabel="effect of the first school", ylabel="log tau")
    for i, (name, draws) in enumerate(posteriors.items()):
        low, middle, high = np.quantile(draws["theta"], (0.05, 0.5, 0.95), axis=0)
        where = np.arange(len(EFFECT)) + 0.2 * (i - 1)
        axes[3].errorbar(
            where, middle, (middle - low, high - middle), fmt="o", ms=3, color=colors[name],
            label=name,
        )  # fmt: skip
    axes[3].set(xlabel="school", ylabel="effect", title="median and 90% interval")
    axes[3].set_xticks(range(len(EFFECT)), map(str, range(1, len(EFFECT) + 1)))
    axes[3].legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    for name, losses in histories.items():
        plot.history(losses, ax=axes[4], color=colors[name], label=name)
    axes[4].set(ylim=(31, 34), ylabel="negative ELBO, nats", title="training, mean of 50 steps")
    axes[4].legend()
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__)
    known.add_argument("--steps", type=count, default=600, help="(default 600; the Gaussian 4x)")
    # At 1e-3, the optimizer finds parameters whose solver error looks like a better ELBO.
    known.add_argument(
        "--tolerance", type=positive, default=1e-5, help="in training (default 1e-5)"
    )
    known.add_argument(
        "--samples", type=count, default=4000, help="of each posterior (default 4000)"
    )
    options = known.parse_args(arguments)
    if options.tolerance >= 1:
        known.error("--tolerance must be below 1")
    FlowGuide.tolerance = options.tolerance

    announce(__doc__)
    keys = iter(jax.random.split(jax.random.key(options.seed), 7))
    print("NUTS ...", flush=True)
    posteriors, histories, final = {"NUTS": by_nuts(options.samples, next(keys))}, {}, {}
    for name, guide_type in (("flow", FlowGuide), ("mean-field Gaussian", AutoNormal)):
        guide = guide_type(MODEL, init_loc_fn=init_to_median)
        # A step of the Gaussian is cheap, but it needs more of them.
        steps = options.steps * (1 if guide_type is FlowGuide else 4)
        params, histories[name] = fit(guide, steps, next(keys))
        shape = (options.samples,)
        posteriors[name] = guide.sample_posterior(next(keys), params, sample_shape=shape)
        final[name] = elbo(guide, params, options.samples, key := next(keys))
        if isinstance(guide, FlowGuide):
            guide.tolerance = 1e-6
            tight = elbo(guide, params, options.samples, key)
            print(f"ELBO of the flow: {final[name]:.3f} as trained, {tight:.3f} at a tolerance of")
            print(f"{guide.tolerance:g}. A gap between them is solver error that was optimized.")

    print("                          mu          log tau          theta[0]       final")
    print("                      mean   sd     mean    sd       mean    sd       ELBO")
    for name, draws in posteriors.items():
        columns = (draws["mu"], jnp.log(draws["tau"]), draws["theta"][:, 0])
        text = "   ".join(f"{float(c.mean()):6.2f} {float(c.std()):5.2f}" for c in columns)
        print(f"{name:20}{text}" + (f"{final[name]:10.2f}" if name in final else ""))
    draw(posteriors, histories, options.out)
    return 0


if __name__ == "__main__":
    run(main)
