"""The features of a flow as one table. Each case knows densities, samples and losses exactly.

The field is `f(t, z) = (1 + t) q R (rate sqrt(1 + y^2))` with `y = R^-1 (z - m)`, for a shear `R`
that is not symmetric. `q` and `m` are the context of a row, or 1 and 0. With `y = sinh(u)`, each
`u` moves by `q rate` times the growth of `t + t^2 / 2`, and for a probe `v`

    integral of v . J v dt = sum over j of (R^T v)_j (R^-1 v)_j [log cosh(u_j)] from t0 to t1.

The trace is the mean over the probes `sqrt(D) e_i`. A new feature is one row of `CASES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from jaxode import divergence
from jaxode.flows.bases import DiagonalNormal

ROWS, D = 4, 3
KEY = jax.random.key(7)
BASE_KEY, PROBE_KEY = jax.random.split(KEY)
COSTS = {"kinetic_energy": 0.3, "jacobian_frobenius": 0.2}
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(24)


def shear(k, dtype=float):
    """`R`."""
    return jnp.eye(D, dtype=dtype) + k * jnp.eye(D, k=1, dtype=dtype)


def unshear(k, dtype=float):
    """Its inverse."""
    return shear(-k, dtype) + k * k * jnp.eye(D, k=2, dtype=dtype)


def _parts(t, z, args):
    params, row = args if isinstance(args, tuple) else (args, {"q": 1.0, "m": 0.0})
    y = unshear(params["shear"], z.dtype) @ (z.reshape(-1) - row["m"])
    return y, (1 + t) * row["q"] * params["rate"], shear(params["shear"], z.dtype)


def field(t, z, args):
    y, speed, R = _parts(t, z, args)
    return (R @ (speed * jnp.sqrt(1 + y**2))).reshape(z.shape)


class WithClosedForm:
    """The field with its divergence."""

    def __call__(self, t, z, args):
        return field(t, z, args)

    def value_and_divergence(self, t, z, args):
        y, speed, _ = _parts(t, z, args)
        return field(t, z, args), jnp.sum(speed * y / jnp.sqrt(1 + y**2))


def logistic(mean, log_scale, event):
    """A base of its own, which closes over its parameters."""

    class Logistic:
        event_shape = event

        @staticmethod
        def log_prob(z):
            standard = (z.reshape(-1, D) - mean[None]) * jnp.exp(-log_scale)[None]
            return jnp.sum(jax.scipy.stats.logistic.logpdf(standard) - log_scale[None], axis=-1)

        @staticmethod
        def sample(key, shape):
            noise = jax.random.logistic(key, (*shape, D), mean.dtype).reshape(-1, D)
            return (mean[None] + jnp.exp(log_scale)[None] * noise).reshape(*shape, *event)

    return Logistic


def target_of(width):
    """An energy that closes over its width, and is that of a row if there is a context."""

    def target(x, row=None):
        shift = 0.3 if row is None else row["m"].reshape(x.shape)
        return -jnp.sum(jnp.log(jnp.cosh((x - shift) / width)))

    return target


def times_of(key, rows=ROWS, dtype=float, **options):
    """The times in [0, 1] that the matching loss draws.

    Read off its gradient by the context `c` for `f = t c`: the mean of `(t c - 1)^2`.
    """
    x = jnp.ones((rows, 1), dtype)
    flow = jaxode.cnf(lambda t, z, args: t * args[1], jaxode.standard_normal(1))
    loss = lambda c: flow.matching_loss(None, x, key=key, x0=0 * x, context=c, **options)
    return -jax.grad(loss)(jnp.zeros_like(x))[:, 0] * rows / 2


def ones(key, z):
    return jnp.ones((1, *z.shape))


class Case(NamedTuple):
    """Which features a flow has."""

    reads: tuple[str, ...]
    """What is read off it: "log_prob", "sample", "nll", "matching", or reverse KL, "plain" or by
    "path"."""
    divergence: Any = divergence.exact()
    f: Callable[..., Any] = field
    context: bool = False
    back: bool = False
    event: tuple[int, ...] = (D,)
    base: Callable[..., Any] | None = None
    starts: bool = False
    """Whether matching has start samples of its own."""
    regularized: bool = False
    chunk: int | None = None
    """Rows at once, of the density that `jaxode.bind` makes."""
    options: Mapping[str, Any] = {}

    @property
    def inputs(self) -> dict[str, Any]:
        """What the flow is differentiable in."""
        draw = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape)
        span = (1.1, 0.2) if self.back else (0.2, 1.1)
        all_of = {
            "x": draw(0, ROWS, *self.event), "weights": [1.0, 2.0, 0.5, 1.5],
            "rate": [0.5, -0.3, 0.4], "shear": 0.6, "t0": span[0], "t1": span[1],
            "mean": [0.1, -0.2, 0.3], "log_scale": [0.1, -0.1, 0.05],
        }  # fmt: skip
        if self.context:
            all_of |= {"q": [1.0, 0.8, 1.2, 0.9], "m": 0.3 * draw(1, ROWS, D)}
        if self.starts:
            all_of["x0"] = draw(2, ROWS, *self.event)
        return {name: jnp.asarray(np.asarray(leaf, float)) for name, leaf in all_of.items()}

    @property
    def errors(self) -> bool:
        """Whether log-densities have standard errors."""
        return bool(self.divergence.standard_error) and self.probes(KEY).shape[1] > 1

    def base_of(self, x):
        if self.base is not None:
            return self.base(x["mean"], x["log_scale"], self.event)
        return DiagonalNormal(x["mean"].reshape(self.event), x["log_scale"].reshape(self.event))

    def flow(self, x, **more):
        options = {"rtol": 1e-10, "atol": 1e-10, "max_steps": 400, "throw": False}
        of = [getattr(jaxode.regularizers, name)(weight) for name, weight in COSTS.items()]
        return jaxode.cnf(
            self.f, self.base_of(x), t0=x["t0"], t1=x["t1"], divergence=self.divergence,
            regularizers=of if self.regularized else (),
            **{**options, **self.options, **more},
        )  # fmt: skip

    def args(self, x):
        """The parameters and the context of the flow."""
        params = {"rate": x["rate"], "shear": x["shear"]}
        return params, {"q": x["q"], "m": x["m"]} if self.context else None

    def seen(self, x, reads=None, **more) -> dict[str, Any]:
        """What a user reads off the flow: `[rows, ...]`, or one number for a loss."""
        (params, context), flow, found = self.args(x), self.flow(x, **more), {}
        draw = (params, KEY, ROWS)
        if self.chunk is not None:
            shapes = {"q": (), "m": (D,)} if self.context else None
            bound = jaxode.bind(flow, params, context_shape=shapes)
            flow, params, draw = bound, (), (KEY, ROWS)
        leading = (params,) if self.chunk is None else ()
        given = {"context": context} | ({"batch_size": self.chunk} if self.chunk else {})
        losses = {"context": context, "key": KEY}
        for read in self.reads if reads is None else reads:
            match read:
                case "log_prob" if self.errors:
                    both = flow.log_prob_and_error(*leading, x["x"], key=KEY, **given)
                    found["log_prob"], found["error"] = both
                case "log_prob":
                    found["log_prob"] = flow.log_prob(*leading, x["x"], key=KEY, **given)
                case "sample":
                    found["sample"], found["log_q"] = flow.sample_and_log_prob(*draw, **given)
                case "nll":
                    loss, stats = flow.nll_and_stats(params, x["x"], weights=x["weights"], **losses)
                    found |= {"nll": loss, "stats": jnp.stack(stats[:2], 1), **stats.running}
                case "matching":
                    found["matching"] = flow.matching_loss(
                        params, x["x"], x0=x.get("x0"), weights=x["weights"], **losses
                    )
                case "plain" | "path":
                    found[read] = flow.reverse_kl_loss(
                        params, target_of(x["shear"]), ROWS, path=read == "path", **losses
                    )
        return found

    def exact(self, x, reads=None) -> dict[str, Any]:
        """The same in closed form."""
        found, base = {}, self.base_of(x)
        weights = x["weights"] / jnp.sum(x["weights"])
        for read in self.reads if reads is None else reads:
            match read:
                case "log_prob":
                    probes = self.probes(KEY)
                    found["log_prob"], _, each = self.density(x, x["x"], probes)
                    if self.errors:
                        count, orthogonal = each.shape[1], "orthogonal" in self.divergence.name
                        left = 1 - count / D if orthogonal else 1
                        found["error"] = jnp.sqrt(jnp.var(each, axis=1, ddof=1) / count * left)
                case "sample":
                    found["sample"], found["log_q"] = self.drawn(x, noisy=self.chunk is None)
                case "nll":
                    probes = self.probes(KEY)
                    log_prob, u, each = self.density(x, x["x"], probes)
                    costs = self.costs(x, u, probes) if self.regularized else {}
                    penalty = sum(COSTS[name] * cost for name, cost in costs.items())
                    found["nll"] = weights @ (penalty - log_prob)
                    costs["stats"] = jnp.stack([log_prob, -each.mean(1)], 1)
                    found |= jax.lax.stop_gradient(costs)
                case "matching":
                    found["matching"] = weights @ self.squared_errors(x, base)
                case "plain" | "path":
                    drawn, log_q = self.drawn(x)
                    if read == "path":
                        still = jax.lax.stop_gradient(x)
                        log_q, *_ = self.density(still, drawn, self.probes(PROBE_KEY))
                    rows = self.args(x)[1]
                    of_rows = (drawn,) if rows is None else (drawn, rows)
                    found[read] = jnp.mean(log_q - jax.vmap(target_of(x["shear"]))(*of_rows))
        return found

    def probes(self, key):
        """Those of each row, `[rows, probes, D]`, or those that give the trace."""
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(ROWS))
        found = jax.vmap(self.divergence.init)(keys, jnp.zeros((ROWS, *self.event)))
        all_of = jnp.broadcast_to(jnp.sqrt(D) * jnp.eye(D), (ROWS, D, D))
        return all_of if found is None else found.reshape(ROWS, -1, D)

    def _rows(self, x):
        of = (x["q"], x["m"]) if self.context else (jnp.ones(ROWS), jnp.zeros((ROWS, D)))
        return of[0][:, None] * x["rate"][None], of[1]

    def carried(self, x, z, start, stop):
        """States at `stop` of those at `start`, and `u` at both."""
        rates, m = self._rows(x)
        before = jnp.arcsinh((z.reshape(ROWS, D) - m) @ unshear(x["shear"]).T)
        after = before + rates * (stop - start + (stop**2 - start**2) / 2)
        return (m + jnp.sinh(after) @ shear(x["shear"]).T).reshape(z.shape), before, after

    def volumes(self, x, u0, u1, probes):
        """The integral of the divergence by each probe, `[rows, probes]`."""
        pairs = (probes @ shear(x["shear"])) * (probes @ unshear(x["shear"]).T)
        return jnp.einsum("rkj,rj->rk", pairs, jnp.log(jnp.cosh(u1)) - jnp.log(jnp.cosh(u0)))

    def density(self, x, data, probes):
        """The log-densities of data, `u` in the base, and the volumes."""
        z, u1, u0 = self.carried(x, data, x["t1"], x["t0"])
        each = self.volumes(x, u0, u1, probes)
        return self.base_of(x).log_prob(z) - each.mean(1), u0, each

    def drawn(self, x, noisy=True):
        """Samples and their log-densities."""
        base, probes = self.base_of(x), self.probes(PROBE_KEY)
        if not noisy:
            probes = self._replace(divergence=divergence.exact()).probes(PROBE_KEY)
        z = base.sample(BASE_KEY, (ROWS,))
        sample, u0, u1 = self.carried(x, z, x["t0"], x["t1"])
        return sample, base.log_prob(z) - self.volumes(x, u0, u1, probes).mean(1)

    def costs(self, x, u0, probes):
        """The running costs of each row, by a quadrature in time."""
        rates, _ = self._rows(x)
        R, S, half = shear(x["shear"]), unshear(x["shear"]), (x["t1"] - x["t0"]) / 2

        def at(node):
            t = x["t0"] + half * (1 + node)
            u = u0 + rates * (t - x["t0"] + (t**2 - x["t0"] ** 2) / 2)
            speeds = (1 + t) * rates
            pushed = (speeds * jnp.tanh(u))[:, None] * (probes @ S.T) @ R.T
            kinetic = jnp.sum(((speeds * jnp.cosh(u)) @ R.T) ** 2, axis=1)
            return kinetic, jnp.sum(pushed**2, axis=2).mean(1)

        nodes = jax.vmap(at)(jnp.asarray(NODES))
        total = lambda values: jnp.abs(half) * jnp.asarray(NODE_WEIGHTS) @ values
        return dict(zip(COSTS, map(total, nodes), strict=True))

    def squared_errors(self, x, base):
        """What the matching loss averages."""
        base_key, *_ = jax.random.split(KEY, 3)
        draw = lambda i: base.sample(jax.random.fold_in(base_key, i), ())
        start = x["x0"] if self.starts else jax.lax.stop_gradient(jax.vmap(draw)(jnp.arange(ROWS)))
        with jax.ensure_compile_time_eval():
            u = times_of(KEY)
        (params, rows), span = self.args(x), x["t1"] - x["t0"]

        def one(u, start, end, row):
            args = params if row is None else (params, row)
            dz = field(x["t0"] + u * span, (1 - u) * start + u * end, args)
            return jnp.mean((dz - (end - start) / span) ** 2)

        return jax.vmap(one)(u, start, x["x"], rows)


EACH = {"batch": "per_sample"}
NOISY = ("log_prob", "nll")

# A new feature is one row, or goes into a row with features that do not depend on it.
CASES = {
    "joint steps, closed form": Case(("sample", "nll"), divergence.auto(), WithClosedForm()),
    "a context, own base, more axes": Case(
        ("nll", "matching"), divergence.exact(chunk=2), base=logistic, event=(1, D, 1),
        context=True, options=EACH,
    ),
    "regularized, backwards": Case(
        ("nll", "path"), divergence.hutchinson(2, "gaussian"), context=True, regularized=True,
        back=True, options=EACH | {"adjoint": jaxode.DiscreteAdjoint(3)},
    ),
    "starts, backwards": Case(("matching",), event=(1, D, 1), starts=True, back=True),
    "orthogonal probes": Case(("log_prob",), divergence.hutchinson(2, "orthogonal"), options=EACH),
    "regularized, backsolve": Case(
        ("nll",), divergence.hutchinson(), context=True, regularized=True,
        options=EACH | {"adjoint": jaxode.BacksolveAdjoint()},
    ),
    "in batches": Case(
        ("log_prob",), divergence.hutchinson(), context=True, chunk=3, options=EACH
    ),
}  # fmt: skip
# Further pairs of features, each of which is in a row above, or a test of the solver: programs of
# many seconds.
PAIRS = {
    "joint steps": Case(("sample", "nll"), divergence.auto()),
    "a context": Case(("nll", "matching"), context=True, options=EACH),
    "backwards": Case(
        ("nll", "path"), divergence.hutchinson(2, "gaussian"), context=True,
        back=True, options=EACH,
    ),
    "closed form": Case(("nll",), divergence.closed_form(), WithClosedForm(), options=EACH),
    "own divergence, order 8 in equal steps": Case(
        ("nll",), divergence.Divergence(ones, divergence.hutchinson().apply),
        options={"solver": diffrax.Dopri8(), "steps": 20},
    ),
    "own base, more axes": Case(
        ("nll", "matching"), divergence.exact(chunk=2), base=logistic, event=(1, D, 1),
        options=EACH,
    ),
    "regularized without a context": Case(
        ("nll",), divergence.hutchinson(2), regularized=True, back=True,
        options=EACH | {"adjoint": jaxode.DiscreteAdjoint(3)},
    ),
    "stiff": Case(("nll",), options=EACH | {"solver": jaxode.Rodas5P()}),
    "joint steps of all losses": Case(("sample", "nll", "matching", "path"), divergence.auto()),
    "backwards with all losses": Case(
        ("nll", "matching", "path"), divergence.hutchinson(2), context=True,
        back=True, options=EACH,
    ),
    "energies of a context": Case(("plain",), context=True, options=EACH),
    "samples in batches": Case(
        ("log_prob", "sample"), divergence.hutchinson(), context=True, chunk=3, options=EACH
    ),
    "gaussian probes": Case(NOISY, divergence.hutchinson(3, "gaussian")),
    "exact in chunks": Case(("sample", "nll"), divergence.exact(chunk=2)),
    "closed form of densities": Case(
        NOISY, divergence.closed_form(), WithClosedForm(), options=EACH
    ),
    "own base": Case(("nll", "matching", "path"), base=logistic, options=EACH),
    "more axes": Case(("log_prob", "nll", "matching"), event=(1, D, 1), starts=True, context=True),
    "regularized": Case(("nll",), regularized=True, options=EACH),
    "regularized in joint steps": Case(
        ("nll",), divergence.hutchinson(2), regularized=True, back=True,
        options={"adjoint": jaxode.DiscreteAdjoint(3)},
    ),
    "backsolve of energies": Case(
        ("nll", "path"), divergence.hutchinson(), context=True, regularized=True,
        options=EACH | {"adjoint": jaxode.BacksolveAdjoint()},
    ),
    "stiff with a context": Case(
        ("nll",), context=True, options=EACH | {"solver": jaxode.Rodas5P()}
    ),
}  # fmt: skip
