"""Wrong inputs of flows and networks, in rows as those of `ode.py`."""

from types import SimpleNamespace

import jax.numpy as jnp

import jaxode
from inputs.calls import CONTEXTS, FLOW, KEY, NETWORK, ONE, X, decay
from jaxode import divergence, nn
from jaxode.coupling import Coupling, optimal_transport
from jaxode.flows.bases import DiagonalNormal
from jaxode.regularizers import Regularizer, jacobian_frobenius, kinetic_energy

ALIKE = SimpleNamespace(init=lambda key, z: None, apply=divergence.exact().apply)
OWN = divergence.Divergence(ALIKE.init, ALIKE.apply)
OF_EACH = "must return one number of a sample; got float64 of shape (2,). Sum over the event"
PER_PROBE = divergence.Divergence(ALIKE.init, lambda g, z, probe: (g(z), z))
COST, PER_NUMBER = kinetic_energy(0.1), Regularizer("kinetic", 0.1, lambda dz, norm: dz**2)
MODEL = jaxode.probability_flow(decay, jaxode.VariancePreserving())


class Closed:
    """A field with a divergence that is no scalar."""

    def __call__(self, t, z, args):
        return -z

    def value_and_divergence(self, t, z, args):
        return -z, -z


class Base:
    """Of other shapes than a density of vectors has."""

    def __init__(self, draw, log_prob=FLOW.base.log_prob, **attributes):
        self.event_shape, self.draw, self.log_prob = (2,), draw, log_prob
        vars(self).update(attributes)

    def sample(self, key, sample_shape):
        return jnp.ones(self.draw(sample_shape))


def pairing(rows):
    return {"coupling": Coupling(lambda key, z, x, context: rows)}


OF_COORDINATES = Base(lambda shape: (*shape, 2), lambda z: -(z**2))
HUTCHINSON, CLOSED_FORM = divergence.hutchinson(), divergence.closed_form()
PAIRED = "must be left out with a coupling that pairs rows, for which all rows count the same; got "
ROWS_OF = "must return one row number per sample, integers of shape (3,); got "
ROWS = {
    ("cnf", TypeError): [
        ({"f": nn.MLP}, "must be a function f(t, z, params); got the class MLP."),
        ({"base": 2}, "must have event_shape, log_prob and sample; got 2."),
        ({"base": DiagonalNormal}, "must have event_shape, log_prob and sample; got <class"),
        ({"divergence": "exact"}, "must be a Divergence; got 'exact'. Use a function of jaxode.di"),
        ({"divergence": ALIKE}, "must be a Divergence; got namespace(~ Use a function of"),
        ({"regularizers": COST}, "must be a tuple of jaxode.regularizers; got Regularizer("),
        ({"regularizers": ("a",)}, "must be a tuple of jaxode.regularizers; got ('a',)."),
        ({"tolerance": 1}, "^cnf: unknown options ['tolerance']. The solve options are ['adjoint', "
         "'atol', 'axis_name', 'breakpoints', 'first_step', 'max_step', 'max_steps', 'precision', "
         "'rtol', 'solver', 'steps']."),
        ({"axis_name": 3}, "~; got 3."), ({"axis_name": ("x", 3)}, "~; got ('x', 3)."),
    ],
    ("cnf", ValueError): [
        ({"base": Base(tuple, event_shape=(), batch_shape=(3,))}, "~; got a batch of shape (3,)"),
        ({"regularizers": (COST, COST)}, "their names must differ; got ['kinetic_energy', 'kineti"),
        ({"solver": jaxode.Rosenbrock23(decay)},
         "integrates more than the field; got Rosenbrock23(jacobian=...). Leave jacobian out."),
        ({"adjoint": jaxode.BacksolveAdjoint(), "solver": jaxode.Rodas5P()},
         "BacksolveAdjoint needs an explicit Runge-Kutta solver; got Rodas5P. Use jaxode.Discrete"),
        ({"axis_name": "batch", "batch": "per_sample"}, "^cnf(axis_name='batch'): joins the~"
         "a batch that is split over devices; with batch='per_sample' each sample has its own."),
        ({"atol": [1e-5, 1e-5]}, "must be a scalar; got shape (2,)."),
        *(
            ({"f": MODEL, "t0": t0, "t1": t1}, "^cnf(t0=..., t1=...): a probability flow~"
             f"noise, the base, at 1 to its data at 0; got t0={float(t0)} and t1={float(t1)}.")
            for t0, t1 in ((0.0, 1.0), (0.1, 0.9), (1000, 0), (1.0, -0.1))
        ),
    ],
    ("probability_flow", TypeError): [
        ({"model": nn.MLP}, "must be a function model(t, z, args); got the class MLP. Pass an ins"),
        ({"path": 3}, "must have functions of time drift, diffusion, mean_scale and std; got 3 ~"
         "drift, diffusion, mean_scale, std. Use jaxode.VariancePreserving()."),
        ({"path": jaxode.VariancePreserving}, "must be a path; got the class VariancePreserving."),
    ],
    ("VariancePreserving", ValueError): [
        ({"beta_min": least, "beta_max": 1}, "^VariancePreserving(beta_min=..., beta_max=...): ~"
         f"at least 0, finite and in rising order; got {least!r} and 1.")
        for least in (2.0, True, "a", None)
    ],
    ("VarianceExploding", ValueError): [
        ({"sigma_min": 0.0}, "^VarianceExploding(sigma_min=..., sigma_max=...): must be positive, "
         "finite and in rising order; got 0.0 and 50.0."),
    ],
    ("nll", ValueError): [
        ({"divergence": HUTCHINSON}, "^hutchinson: a stochastic divergence needs random numbers;"),
        ({"divergence": divergence.hutchinson(3, "orthogonal"), "key": KEY}, "^hutchinson(~"
         "distribution='orthogonal'): at most one probe per dimension; got 3 for 2 dimensions."),
        ({"divergence": PER_PROBE}, f"^cnf(divergence=...): {OF_EACH}"),
        ({"regularizers": (PER_NUMBER,)}, f"^cnf(regularizers=...): {OF_EACH}"),
        *(
            ({"divergence": given, "regularizers": (jacobian_frobenius(0.1),)}, "^nll: a ~"
             f"needs the norm of the Jacobian, which the divergence ({called}) does not provide")
            for given, called in ((OWN, "a custom divergence"), (CLOSED_FORM, "closed form"))
        ),
        ({"divergence": CLOSED_FORM},
         "^closed_form: the vector field offers no value_and_divergence(t, z, args) for these arg"),
        ({"f": Closed()}, "^value_and_divergence(t, z, args): must return the derivative and a ~"
         "divergence of one sample; got shapes ((2,), (2,))."),
        ({"base": OF_COORDINATES}, "^~ one number per sample, shape (3,); got (3, 2)"),
    ],
    ("log_prob", ValueError): [
        ({"base": OF_COORDINATES}, "^~ one number per sample, shape (3,); got (3, 2)"),
        ({"divergence": PER_PROBE}, f"^cnf(divergence=...): {OF_EACH}"),
        ({"f": nn.field, "params": nn.MLP(2, key=KEY, context_size=3)}, "^MLP(context_size=3): the "
         "context of a sample must be a vector of this size, and None for size 0; got shape None. "
         "Pass context=, with 3 numbers for each sample."),
    ],
    ("log_prob_and_error", ValueError): [
        ({"divergence": HUTCHINSON, "key": KEY}, "^~ needs a divergence with at least two probes"),
    ],
    ("sample", TypeError): [
        ({"key": NETWORK, "params": KEY}, "must be a key of jax.random; got MLP. Pass jax.random"),
    ],
    ("matching_loss", TypeError): [
        ({"coupling": optimal_transport}, "must be a Coupling; got <function optimal_transport at"),
        ({"coupling": Coupling(None)}, "must be a Coupling; got ~. Use a function of jaxode.co"),
        ({"coupling": Coupling(optimal_transport)}, "must be a Coupling; got Coupling(pair=<funct"),
        *(
            (pairing(rows), f"must return an array of row numbers~; got {type(rows).__name__}.")
            for rows in ([0, 1, 2], (0, 1, 2), "012")
        ),
    ],
    ("matching_loss", ValueError): [
        ({"x0": X[:2]}, "must have one start sample for each of the 3 rows of x; got 2."),
        ({"base": Base(lambda shape: (3, 2))}, "^cnf(base=...): sample(key, ()) must have the sha"),
        ({"weights": jnp.ones(3), "coupling": optimal_transport(8)}, f"{PAIRED}weights with _Opti"),
        ({"context": X, "coupling": optimal_transport(8)},
         "^optimal_transport(condition_weight=...): must be given with a context; got None. Pass"),
        (pairing(jnp.arange(2)), f"{ROWS_OF}int64 of shape (2,)."),
        (pairing(jnp.ones(3)), f"{ROWS_OF}float64 of shape (3,)."),
        ({"time_power": ONE}, "must be a scalar; got shape (2,)."),
        ({"t1": 1e8 + 5, "t0": 1e8, "x": X.astype("f4")},
         "^matching_loss(t0=..., t1=...): the span from 100000000.0 to 100000005.0 is lost"),
    ],
    ("optimal_transport of a batch", ValueError): [
        ({"context": None, "condition_weight": 1.0},
         "^matching_loss(context=...): must be given where its distance counts; got None"),
    ],
    ("reverse_kl_loss", ValueError): [
        ({"log_density": lambda x: x}, "must return a floating scalar~; got float64 of shape (2,)"),
        ({"log_density": lambda x: 1}, "must return a floating scalar~; got int"),
        ({"n": 0}, "must have at least one row; got shape (0, 2)"),
    ],
    **{
        (f"log_prob of a {base}", ValueError): [
            ({"z": jnp.ones(shape), "n": event}, "must have shape (..., *event)")
            for event, shape in ((3, (4, 2)), (1, (4, 3)), ((2, 3), (3,)), (1, ()))
        ]
        for base in ("base", "learned base")
    },
    ("MLP of a sample", ValueError): [({"context": ONE}, "^MLP(context_size=0): ~; got shape (2,")],
    ("MLP of a sample", TypeError): [
        ({"context": NETWORK}, "^MLP(t, y, context): the context must be a vector; got a network."),
    ],
    ("Residual of a sample", ValueError): [
        ({"context": ONE}, "^Residual(context_size=3): ~; got shape (2,). Pass context=, with 3"),
    ],
    ("Residual of a sample", TypeError): [
        ({"context": NETWORK}, "^Residual(t, y, context): the context must be a vector; got a net"),
        ({"y": CONTEXTS[0], "context": CONTEXTS[0]}, "^Residual(event_shape=...): ~; got a sample"),
    ],
    ("Particles of a sample", TypeError): [
        ({"y": jnp.ones(4)}, "^Particles(n, dim=...): ~shape (3, 2)"),
        ({"y": jnp.ones((2, 3))}, "^Particles(n, dim=...): ~(2, 3)"),
    ],
    ("Lattice of a sample", TypeError): [({"y": jnp.ones((2, 3))}, "^Lattice(shape=...): ~(2, 3)")],
    ("Mixer of a sample", TypeError): [({"y": jnp.ones((2, 4))}, "^Mixer(event_shape=...): ~(2, ")],
    ("Mixer", ValueError): [
        ({"event_shape": shape}, "must be (height, width) or (height, width, channels); got ")
        for shape in (4, (4, 4, 1, 1))
    ] + [({"patch": 4}, "must divide the height and the width, 4 and 6; got 4. Pass one that")],
    ("MLP", TypeError): [({"widths": 8}, "must be a sequence, one size for each hidden~; got 8.")],
    ("Particles", ValueError): [
        ({"n": 1}, "must be ~ at least 2; got 1."), ({"reach": 0.0}, "~; got 0.0."),
    ],
    ("Lattice", ValueError): [({"shape": (2,) * 4}, "~one to three axes")],
}  # fmt: skip
