"""The parameters of hundreds of patients, and of their population, from sparse blood samples.

    python examples/patients.py

A drug is absorbed at a rate of its own in each patient, and eliminated by an enzyme that saturates:
the same in all, up to its amount. Each patient takes doses at irregular times, misses some, and
gives 4 to 8 blood samples. One solve covers all patients and jumps at their doses. First gradient
descent fits the population and every patient (variational inference: an approximate maximum
likelihood), then NUTS samples the hierarchical posterior of 20 of them in numpyro. Needs numpyro.
About two minutes on two cores.

Reference: Davidian and Giltinan (2003), doi:10.1198/1085711032697.
"""

import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import announce, count, parser, run
from common.descent import minimize
from common.pictures import save

try:
    import numpyro
    import numpyro.distributions as dist
    from numpyro.diagnostics import split_gelman_rubin
    from numpyro.infer import MCMC, NUTS, init_to_value
except ModuleNotFoundError:
    sys.exit("patients: numpyro is not installed. Run: pip install numpyro")

import jaxode
from jaxode import plot

DAYS, DOSES, SAMPLES = 3, 6, 8
STRENGTHS = (50.0, 100.0, 200.0, 400.0)  # of a dose, mg
NAMES = ("clearance, L/h", "volume, L", "absorption, 1/h")
# Of the simulation: the median of each parameter, the spread of its logarithm, the concentration in
# mg/L at which elimination is half as fast as it would be, and the relative error of a measurement.
TRUTH = {
    "median": np.log([4.0, 30.0, 1.0]),
    "spread": np.log([0.3, 0.2, 0.4]),
    "half": np.log(4.0),
    "error": np.log(0.1),
}


def concentration(logs, half, strength, doses, ts):
    """The concentration of each patient at its own times.

    `logs` are the logarithms of the patients' parameters, `[patients, 3]`, `strength` is that of
    the doses of each, `[patients]`, `doses` and `ts` are times of each, `[patients, doses]` and
    `[patients, samples]`.
    """

    def body(t, amounts, args):
        half, (clearance, volume, absorption, _) = args
        gut, blood = amounts
        level = blood / volume
        absorbed = absorption * gut
        return -absorbed, absorbed - clearance * level / (1 + level / half)

    def take(t, amounts, args, i):
        (gut, blood), (*_, dose) = amounts, args[1]
        return gut + dose, blood

    clearance, volume, absorption = jnp.exp(logs).T
    nothing = jnp.zeros(len(logs))
    solution = jaxode.solve(
        body, (nothing, nothing), 0.0, 24.0 * DAYS, half,
        row_args=(clearance, volume, absorption, strength), batch="per_sample", ts=ts,
        jumps=jaxode.Jumps(doses, take), rtol=1e-4, atol=1e-4, max_steps=64, throw=False,
    )  # fmt: skip
    return solution.ys[1] / volume[:, None]


def simulate(patients, rng):
    """When each patient took which dose and gave blood, and what was measured."""
    planned = 12.0 * np.arange(DOSES) + rng.uniform(0, 3, (patients, DOSES))
    missed = rng.random((patients, DOSES)) < 0.2
    missed[:, 0] = False
    # Jumps are in order, and infinity is no jump.
    doses = np.sort(np.where(missed, np.inf, planned), axis=1)
    last = np.maximum.accumulate(np.where(np.isinf(doses), 0, doses), axis=1)
    before = np.take_along_axis(last, rng.integers(0, DOSES, (patients, SAMPLES)), axis=1)
    ts = np.sort(before + rng.uniform(0.5, 9, (patients, SAMPLES)), axis=1)
    seen = rng.permuted(np.arange(SAMPLES) < rng.integers(4, SAMPLES + 1, (patients, 1)), axis=1)
    logs = TRUTH["median"] + np.exp(TRUTH["spread"]) * rng.normal(size=(patients, 3))
    strength = rng.choice(STRENGTHS, patients)
    levels = jax.jit(concentration)(logs, np.exp(TRUTH["half"]), strength, doses, ts)
    noise = np.exp(TRUTH["error"]) * rng.normal(size=ts.shape)
    data = {"strength": strength, "doses": doses, "ts": ts, "seen": seen}
    data["logs"] = np.log(levels) + noise
    return jax.tree.map(jnp.asarray, data), logs


def log_likelihood(parameters, half, error, data):
    """Of each patient. Measurements have a relative error."""
    levels = concentration(parameters, half, data["strength"], data["doses"], data["ts"])
    expected = jnp.log(jnp.maximum(levels, 1e-6))
    terms = jax.scipy.stats.norm.logpdf(data["logs"], expected, error)
    return jnp.sum(jnp.where(data["seen"], terms, 0.0), axis=1)


def fit(data, steps, key):
    """The population, and a normal distribution of the parameters of each patient.

    Minimizes the negative evidence lower bound, per patient.
    """
    patients = len(data["ts"])
    start = {
        "population": {
            "median": jnp.log(jnp.array([3.0, 20.0, 0.7])), "spread": jnp.full(3, jnp.log(0.5)),
            "half": jnp.log(8.0), "error": jnp.log(0.3),
        },
        "mean": jnp.zeros((patients, 3)), "width": jnp.full((patients, 3), -1.0),
    }  # fmt: skip

    def loss(params, step, key):
        population = params["population"]
        mean, width = params["mean"], jnp.exp(params["width"])
        draw = mean + width * jax.random.normal(key, mean.shape)
        logs = population["median"] + jnp.exp(population["spread"]) * draw
        half, error = jnp.exp(population["half"]), jnp.exp(population["error"])
        # From the standard normal prior of the standardized parameters.
        divergence = 0.5 * (mean**2 + width**2 - 1) - params["width"]
        return jnp.mean(jnp.sum(divergence, axis=1) - log_likelihood(logs, half, error, data))

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))
    return minimize(loss, start, optimizer, steps, key, "population")


def model(data):
    """The same model for numpyro, with priors on the population."""
    median = numpyro.sample("median", dist.Normal(jnp.log(jnp.array([3.0, 20.0, 0.7])), 1.0))
    spread = numpyro.sample("spread", dist.HalfNormal(0.5).expand([3]))
    half = numpyro.sample("half", dist.LogNormal(np.log(8.0), 0.7))
    error = numpyro.sample("error", dist.HalfNormal(0.3))
    with numpyro.plate("patients", len(data["ts"])):
        # Centered: the samples of a patient say more about it than the population does.
        logs = numpyro.sample("logs", dist.Normal(median, spread).to_event(1))
        numpyro.factor("measured", log_likelihood(logs, half, error, data))


def by_nuts(data, fitted, warmup, samples, key):
    """Two chains from near the fit: the draws, the largest r-hat, and the seconds."""
    population = fitted["population"]
    start = {name: jnp.exp(population[name]) for name in ("spread", "half", "error")}
    start |= {"median": population["median"], "logs": individual(fitted)[: len(data["ts"])]}
    kernel = NUTS(model, init_strategy=init_to_value(values=start), target_accept_prob=0.9)
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=samples, num_chains=2, chain_method="sequential",
        progress_bar=False,
    )  # fmt: skip
    begin = time.perf_counter()
    mcmc.run(key, data)
    draws = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    seconds = time.perf_counter() - begin
    with np.errstate(all="ignore"):  # NaN for chains too short to have moved
        r_hat = max(float(np.max(split_gelman_rubin(np.asarray(x)))) for x in draws.values())
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), draws), r_hat, seconds


def draw(data, truth, fitted, draws, losses, path):
    """Fits of four patients, every patient against the truth, the posterior, and the training."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 8), constrained_layout=True)
    times = np.linspace(0.0, 24 * DAYS, 200)
    some, of_four = draws["logs"][:: max(len(draws["half"]) // 100, 1)], slice(0, 4)
    half = draws["half"][:: max(len(draws["half"]) // 100, 1)]
    shown = jnp.broadcast_to(jnp.asarray(times, jnp.float32), (4, len(times)))
    given = data["strength"][of_four], data["doses"][of_four], shown
    curve = lambda of: concentration(of[0], of[1], *given)
    curves = jax.jit(lambda *of: jax.lax.map(curve, of))(some[:, of_four], half)
    for i, axis in enumerate(axes[0]):
        low, middle, high = np.quantile(curves[:, i], (0.05, 0.5, 0.95), axis=0)
        axis.fill_between(times, low, high, color="tab:blue", alpha=0.25, label="90% of NUTS")
        axis.plot(times, middle, color="tab:blue", lw=1)
        seen = np.asarray(data["seen"][i])
        measured = np.exp(np.asarray(data["logs"][i])[seen])
        axis.plot(np.asarray(data["ts"][i])[seen], measured, "k.", label="measured")
        doses = np.asarray(data["doses"][i])
        axis.plot(doses[np.isfinite(doses)], 0 * doses[np.isfinite(doses)], "r^", label="dose")
        axis.set(title=f"patient {i + 1}", xlabel="hours", ylim=(0, None))
    axes[0, 0].set_ylabel("concentration, mg/L")
    axes[0, 0].legend()
    estimates, twenty = individual(fitted), draws["logs"].shape[1]
    for i, (axis, name) in enumerate(zip(axes[1], NAMES, strict=False)):
        axis.plot(np.exp(truth[:, i]), np.exp(estimates[:, i]), ".", ms=3, label="descent")
        low, middle, high = np.exp(np.quantile(draws["logs"][..., i], (0.05, 0.5, 0.95), axis=0))
        axis.errorbar(
            np.exp(truth[:twenty, i]), middle, (middle - low, high - middle), fmt="o", ms=3, lw=1,
            label="NUTS, 90%",
        )  # fmt: skip
        axis.axline(2 * (np.exp(TRUTH["median"][i]),), slope=1, color="gray", lw=1)
        axis.set(title=name, xlabel="true", ylabel="estimated")
    axes[1, 0].legend()
    plot.history(losses, ax=axes[1, 3])
    axes[1, 3].set(ylabel="negative evidence bound, nats a patient", title="descent")
    save(figure, path)


def individual(fitted):
    """The logarithms of the parameters of each patient."""
    population = fitted["population"]
    return population["median"] + jnp.exp(population["spread"]) * fitted["mean"]


def table(fitted, draws):
    """The population according to the simulation, the fit, and the posterior."""
    print(f"{'':36}truth     descent    NUTS: mean and sd")
    posterior = {**draws, "median": jnp.exp(draws["median"])}
    for name in ("median", "spread", "half", "error"):
        columns = zip(*(np.atleast_1d(x) for x in (
            np.exp(TRUTH[name]), np.exp(fitted["population"][name]),
            posterior[name].mean(axis=0), posterior[name].std(axis=0),
        )), strict=True)  # fmt: skip
        for i, numbers in enumerate(columns):
            label = f"{name}, {NAMES[i]}" if name in ("median", "spread") else name
            print(f"{label:32}" + " ".join(f"{number:9.2f}" for number in numbers))


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=400)
    known.add_argument("--patients", type=count, default=256, help="at least 20 (default 256)")
    known.add_argument("--warmup", type=count, default=150, help="of NUTS (default 150)")
    known.add_argument("--samples", type=count, default=100, help="of each chain (default 100)")
    options = known.parse_args(arguments)
    if options.patients < 20:
        known.error("--patients must be at least 20")
    if options.samples < 4:
        known.error("--samples must be at least 4, to tell whether the chains agree")

    announce(__doc__)
    data, truth = simulate(options.patients, np.random.default_rng(options.seed))
    keys = jax.random.split(jax.random.key(options.seed))
    begin = time.perf_counter()
    fitted, losses = fit(data, options.steps, keys[0])
    print(f"descent: {options.patients} patients in {time.perf_counter() - begin:.0f} s")
    of_twenty = jax.tree.map(lambda x: x[:20], data)
    print("NUTS ...", flush=True)
    draws, r_hat, seconds = by_nuts(of_twenty, fitted, options.warmup, options.samples, keys[1])
    print(f"NUTS: 20 patients, 2 chains in {seconds:.0f} s, largest r-hat {r_hat:.3f}")
    table(fitted, draws)
    draw(data, truth, fitted, draws, losses, options.out)
    return 0


if __name__ == "__main__":
    run(main)
