"""Good arguments of the public functions, some of which a row of the tables changes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from jaxode import coupling, divergence, images, nn, plot, regularizers

S = object()  # stands for a number that a program has traced
KEY, ONE, X = jax.random.key(0), jnp.ones(2), jnp.ones((3, 2))
TABLE = np.random.default_rng(0).normal([5.0, -1.0], [3.0, 0.1], (40, 2))
CONTEXTS = np.random.default_rng(1).normal(10.0, 4.0, (40, 3))


def decay(t, y, args):
    return -y


FIELD = {"f": decay, "base": jaxode.standard_normal(2)}
FLOW, NETWORK = jaxode.cnf(**FIELD), nn.MLP(2, (4,), key=KEY)
CONDITIONAL = nn.Residual(2, 4, 1, key=KEY, context_size=3)


def odeint(func, y0, t, args, **given):
    return jaxode.odeint(func, y0, t, args, **given)


def fit(density=None, params=None, **given):
    of_bind, given = part(given, jaxode.bind)
    params = nn.Residual(2, 8, 1, key=KEY) if params is None else params
    if density is None:
        density = jaxode.bind(jaxode.cnf(nn.field, FLOW.base), params, **of_bind)
    return jaxode.fit(density, **given)


OWN = {
    "odeint": odeint, "fit": fit, "fit in float32": fit,
    "MLP of a sample": lambda t, y, context=None: NETWORK(t, y, context),
    "Residual of a sample": lambda t, y, context=None: CONDITIONAL(t, y, context),
    "Particles of a sample": lambda t, y: nn.Particles(3, 2, key=KEY)(t, y),
    "Mixer of a sample": lambda t, y: nn.Mixer((4, 2), 2, 4, 1, key=KEY)(t, y),
    "Lattice of a sample": lambda t, y: nn.Lattice((3, 2), key=KEY)(t, y),
    "log_prob of a base": lambda z, n: jaxode.standard_normal(n).log_prob(z),
    "log_prob of a learned base": lambda z, n: jaxode.diagonal_normal(n).log_prob(z),
    "optimal_transport of a batch": lambda context, **given: coupling.optimal_transport(
        **given
    ).pair(KEY, X, X, context),
    "evaluate": lambda s: jaxode.solve(decay, ONE, 0.0, 1.0, s).evaluate(1.0),
    "evaluate rows": lambda t: jaxode.solve(
        decay, X, 0.0, 1.0, 1.0, batch="per_sample", dense=True, max_steps=16
    ).evaluate(t),
    "with_flow": lambda flow: jaxode.bind(
        jaxode.cnf(decay, jaxode.standard_normal((3, 2))), None, support=(0.0, 3.0)
    ).with_flow(flow),
}  # fmt: skip
TRAINING = {"x": TABLE, "key": KEY, "steps": 1, "progress": False, "optimizer": optax.adam(1e-2)}
SOLVE = {"f": decay, "y0": ONE, "t0": 0.0, "t1": 1.0, "args": S}
SAMPLES, DRAWS = {"params": S, "x": X}, {"params": S, "key": KEY, "n": 3}
OF_A_NUMBER = {"flow": jaxode.cnf(decay, jaxode.standard_normal(1)), "params": S}
WITH_CONTEXTS = {
    "flow": jaxode.cnf(nn.field, FLOW.base), "params": CONDITIONAL, "standardize_context": CONTEXTS,
}  # fmt: skip
NAMED = {"standardize_context": {"p": CONTEXTS[:, 0], "q": CONTEXTS[:, 1]}}
USUAL = {
    "solve": SOLVE, "solve outside": SOLVE,
    "flow": {"f": decay, "z": X, "s": 0.0, "t": 1.0, "args": S},
    "odeint": {"func": lambda y, t, s: -y, "y0": ONE, "t": jnp.array([0.0, 1.0]), "args": S},
    "nll": SAMPLES, "log_prob": SAMPLES, "log_prob_and_error": SAMPLES, "to_base": SAMPLES,
    "from_base": {"params": S, "z": X}, "sample": DRAWS, "sample_and_log_prob": DRAWS,
    "matching_loss": {**SAMPLES, "key": KEY},
    "reverse_kl_loss": {**DRAWS, "log_density": lambda x: -jnp.sum(x**2)},
    "cnf": FIELD, "probability_flow": {"model": decay, "path": jaxode.VariancePreserving()},
    "bind": {"flow": FLOW, "params": S}, "bind in float32": {"flow": FLOW, "params": None},
    "log_prob of a density": {**SAMPLES, "x": TABLE}, "sample of a density": {"key": KEY},
    "to_flow of a density": {**SAMPLES, "x": TABLE},
    "cdf of a density": {**OF_A_NUMBER, "x": TABLE[:, :1]},
    "quantile of a density": {**OF_A_NUMBER, "q": np.array([0.1, 0.9])},
    "log_prob of a density with names": {**SAMPLES, **NAMED, "x": TABLE},
    "log_prob of a density with contexts": {"x": TABLE[:4], **WITH_CONTEXTS},
    "to_flow of a density with contexts": {"x": TABLE[:4], **WITH_CONTEXTS},
    "sample of a density with contexts": {"key": KEY, "sample_shape": (4,), **WITH_CONTEXTS},
    **{f"{name} of a sample": {"t": S, "y": ONE} for name in ("MLP", "Residual")},
    **{f"{name} of a sample": {"t": S} for name in ("Particles", "Lattice", "Mixer")},
    **{name: {"event_shape": 2, "key": KEY} for name in ("MLP", "Residual", "Concat")},
    "Mixer": {"event_shape": (4, 6), "patch": 2, "key": KEY},
    "Particles": {"n": 2, "dim": 1, "key": KEY}, "Lattice": {"shape": 2, "key": KEY},
    "Event": {"condition": lambda t, y, args: y[0]}, "centered_normal": {"n": 2, "dim": 2},
    "Jumps": {"times": (0.5,), "change": lambda t, y, args, i: y}, "evaluate": {"s": S},
    "evaluate rows": {"t": S},
    "dequantize": {"x": np.zeros((1, 2)), "levels": 256, "key": KEY}, "quantize": {"u": X},
    "logit": {"u": X}, "inverse_logit": {"y": X}, "bits_per_dimension": {"log_prob": X},
    "audit": {"flow": FLOW, "params": 0.3, "x": X, "key": KEY},
    "plot.density": {"log_prob": lambda x: x[:, 0], "extent": (0, 1, 0, 1)},
    "fit": TRAINING, "fit in float32": TRAINING,
}  # fmt: skip
OUTSIDE = ("fit", "audit", "plot")  # of programs


def part(given, function):
    """The arguments that a function takes, and the others."""
    names = inspect.signature(function).parameters
    return tuple({k: v for k, v in given.items() if (k in names) == own} for own in (True, False))


def call(name, s, given):
    """Calls a function, or the method of a flow or density, which takes the other arguments."""
    given = {k: s if v is S else v for k, v in (USUAL.get(name, {}) | given).items()}
    function = name.split()[0]
    if name in OWN:
        return OWN[name](**given)
    if "of a density" in name:
        of_bind, given = part({"flow": FLOW, "params": s} | given, jaxode.bind)
        return getattr(jaxode.bind(**of_bind), function)(**given)
    if hasattr(FLOW, function):
        given, of_flow = part(given, getattr(FLOW, function))
        return getattr(jaxode.cnf(**FIELD | of_flow), function)(**given)
    places = (plot, jaxode, nn, divergence, regularizers, images, coupling)
    function = function.removeprefix("plot.")
    return next(getattr(place, function) for place in places if hasattr(place, function))(**given)
