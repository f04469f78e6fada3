"""Wrong inputs of solves, as `(call, exception): [(input, words), ...]`.

The first argument of the input is the one that the message names; words that begin with `^` are the
whole start of the message. `~` stands for any text.
"""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from problems import RK4

import jaxode
from inputs.calls import KEY, ONE, X
from jaxode import nn

STIFF, LEVEL = jaxode.Rodas5P(), jaxode.Event(lambda t, y, args: y[0])
EACH, JOINT = {"y0": X, "batch": "per_sample"}, {"y0": X, "batch": "joint"}


class OnCircle(diffrax.Tsit5):
    """A solver with a step of its own."""

    def step(self, *args, **options):
        y1, *rest = super().step(*args, **options)
        return y1 / jnp.linalg.norm(y1), *rest


class WithoutOrder(diffrax.Heun):
    """A solver that forgets its order."""

    def order(self, terms):
        return None


def change(apply):
    return {"jumps": jaxode.Jumps([0.5], lambda t, y, args, i: apply(y))}


def jumps(times):
    return {"jumps": jaxode.Jumps(times, lambda t, y, args, i: y)}


def event(condition=lambda t, y, args: y[0], apply=lambda y: y):
    return {"event": jaxode.Event(condition, change=lambda t, y, args, i: apply(y), most=2)}


def jacobian(f):
    return {"solver": jaxode.Rodas5P(f)}


def misfit(error):
    def f(t, y, args):
        raise error

    return f


KEEP = {"change": lambda t, y, args, i: y}
ROWS = {
    ("solve", TypeError): [
        ({"y0": jnp.array([1, 2])}, "leaves must have a floating dtype; got int64. Write 1.0 for"),
        ({"y0": jnp.array([1j])}, "leaves must have a floating dtype; got complex128. Pass real"),
        ({"y0": {"a": "text"}}, "leaves must be floating arrays; got str. Pass things"),
        ({"y0": [1.0, 2.0]}, "must be an array or a pytree of arrays; got a list of numbers"),
        ({"y0": True}, "leaves must have a floating dtype; got bool."),
        ({"y0": KEY}, "leaves must have a floating dtype; got key<fry>."),
        ({"f": eqx.nn.MLP}, "must be a function f(t, y, args); got the class MLP."),
        ({"f": nn.field, "y0": X, "args": nn.MLP(2, key=KEY)}, "^MLP(event_shape=...)~ got a sampl"
         "e of shape (3, 2). If these are 3 samples, let their axis be that of a batch, by batch="),
        ({"f": lambda t, y, args: "text"}, "f(t, y, args) must return arrays; got str."),
        ({"f": lambda t, y, args: y.astype(float), "y0": ONE.astype("f4")},
         "f(t, y, args) must not return more precision than y has; got float64 where y is float32"),
        ({"t0": False}, "must be a real time; got False."),
        ({"t1": 1j}, "must be a real time; got a complex number."),
        ({"t1": np.datetime64("2021")}, "must be a real time; got ~2021"),
        ({"t1": np.array(["a"] * 3)} | EACH, "must be a vector of real times; got "),
        ({"ts": np.array([False, True])}, "must be a vector of real times; got "),
        ({"breakpoints": jnp.array([0.5j])}, "must be a vector of real times; got a complex numbe"),
        ({"solver": "dopri5"}, "must be an ODE solver, such as ~; got 'dopri5'."),
        ({"solver": jaxode.Rodas5P}, "must be an ODE solver~; got the class Rodas5P. Call it"),
        (jacobian(lambda y, t, args: "a"), "^solve(jacobian=...): ~ got one of (y, t), in another"),
        (jacobian(lambda t, y, args: "a"), "jacobian(t, y, args) must return ~; got str."),
        (jacobian(lambda t, y, args: [[t]]), "jacobian(t, y, args) must return ~; got list."),
        ({**jacobian(lambda t, y, args: args["a"]), "args": None},
         "^jacobian(t, y, args): the Jacobian raised TypeError: ~ It got y=f64[2] and args=None."),
        ({"adjoint": "backsolve"}, "must be a gradient method such as ~; got 'backsolve'."),
        ({"adjoint": jaxode.DiscreteAdjoint}, "must be a gradient method~; got <class 'jaxode"),
        ({"atol": 1j}, "must be a real number; got a complex number."),
        ({"atol": []}, "must be a real number; got []."),
        ({"row_args": ["a"]} | JOINT, "leaves must be arrays of numbers; got str."),
        ({"event": lambda t, y, args: y[0]}, "must be a jaxode.Event"),
        (event(lambda t, y: y[0]),
         "^condition(t, y, args): the condition of the event raised TypeError: ~ It got y=f64[2]"),
        ({"jumps": [1.0]}, "must be a jaxode.Jumps; got [1.0]"),
        (change(lambda y: jnp.array([1, 2])), "change~ must return floating arrays; got int64"),
        (change(lambda y: y["a"]), "^change(t, y, args, i): the change of jumps raised TypeError"),
    ],
    ("solve", ValueError): [
        ({"y0": ()}, "must hold at least one array; got ()."),
        ({"y0": jnp.ones(()), "batch": "joint"}, "leaves must share a leading batch axis; got sha"),
        ({"t0": jnp.ones(2)}, "must be a scalar time; got shape (2,). Rows have their own times"),
        ({"t1": jnp.ones(2)} | EACH, "~, or one for each of 3 rows; got shape (2,)."),
        ({"t0": jnp.ones((3, 1))} | EACH, "~, or one for each of 3 rows; got shape (3, 1)."),
        ({"t1": jnp.ones(3)} | JOINT, "~; got shape (3,). ~ with per-sample steps only."),
        ({"ts": jnp.ones((2, 2))}, "must be a vector of at least one time; got shape (2, 2)."),
        ({"ts": []}, "must be a vector of at least one time; got shape (0,)."),
        ({"ts": jnp.ones(())}, "must be a vector of at least one time; got shape ()."),
        ({"ts": jnp.ones((2, 2))} | EACH, "must be a vector~ of 3 rows; got shape (2, 2)."),
        ({"ts": jnp.ones((3, 0))} | EACH, "must be a vector of at least one time~ (3, 0)."),
        ({"ts": jnp.ones((3, 1))} | JOINT, "must be a vector of at least one time; got shape (3,"),
        ({"ts": np.float32([0.1]), "t1": 0.1},
         "times must increase from t0=0.0 to t1=0.1; got 0.10000000149~ before t1=0.1. Sort them"),
        ({"breakpoints": jnp.ones(())}, "must be a vector of times~; got shape ()."),
        ({"solver": diffrax.Euler()}, "Euler has no error estimate; got steps=None. Pass steps=N"),
        ({"solver": RK4()}, "RK4 has no error estimate; got steps=None. Pass steps=N"),
        (jacobian(lambda t, y, args: -y), "jacobian(t, y, args) ~ the shape (2, 2)~; got (2,)."),
        *(
            ({"axis_name": "i", "solver": STIFF, "batch": batch},
             f"Rodas5P needs the Jacobian of the whole state; got batch={batch!r}. Do not split")
            for batch in (None, "per_sample")
        ),
        ({"rtol": jnp.ones(2)}, "must be a scalar; got shape (2,)."),
        ({"atol": [1e-5, -1e-5]}, "must be a finite tolerance of at least 0; got -1e-05."),
        ({"atol": jnp.ones(3)}, "~ like the state of one row; got shapes (3,) where it has (2,)."),
        ({"atol": [1e-5, [1e-5]]}, "~ like the state of one row; got shapes [(), [()]] where"),
        ({"atol": {"b": ONE}, "y0": {"a": ONE}, "f": lambda t, y, _: y},
         "~ like the state of one row; got shapes {'b': (2,)} where it has {'a': (2,)}."),
        ({"row_args": ONE}, "needs a batch; got batch=None"),
        ({"row_args": ONE} | JOINT, "leaves must have a leading axis of 3~; got shape (2,)."),
        (event(lambda t, y, args: y), "~ must return a floating scalar; got ~ shape (2,)."),
        (event(lambda t, y, args: (y[0],)), "~ must return a floating scalar; got tuple."),
        (event(lambda t, y, args: None), "~ must return a floating scalar; got NoneType."),
        (event(apply=lambda y: y[0]), "change(t, y, args, i) must return the shapes of y"),
        ({"event": LEVEL} | JOINT, "~; got batch='joint'."),
        ({"event": LEVEL, "steps": 9}, "~; got steps=9."),
        ({"event": LEVEL, "axis_name": "i"}, "needs the whole state; got axis_name='i'"),
        ({"dense": True, "adjoint": jaxode.BacksolveAdjoint()}, "^solve(dense=True): needs Discre"),
        (jumps(jnp.ones(0)), "must be a vector of at least one time; got shape (0,)."),
        (jumps(jnp.ones((4, 2))), "must be a vector of at least one time; got shape (4, 2)."),
        ({**jumps(jnp.ones((4, 2))), **EACH}, "must be a vector~ each of 3 rows; got shape (4, 2)"),
        (change(lambda y: (y, y)), "change~ must return the structure of y"),
        ({"f": lambda t, y, args: [y[0], y[1]]},
         "f(t, y, args) must return the structure of y, an array; got list. Return one array: joi"),
        ({"f": lambda t, y, args: None}, "~ the structure of y, an array; got None. End it with r"),
        (change(lambda y: y[0]), "change~ the shapes of y; got () ~ change sees one sample"),
    ],
    ("solve outside", ValueError): [
        ({"rtol": 0, "atol": [0.0, 1e-5]}, "^solve(rtol=0, atol=0): at least one tolerance must b"),
    ],
    ("flow", TypeError): [
        ({"z": [[1.0], [2.0]]}, "must be an array or a pytree of arrays; got a list of numbers"),
        ({"tol": 1}, "^flow: unknown options ['tol']. The solve options are ['adjoint', 'atol', "),
        ({"f": nn.field, "args": nn.MLP(3, key=KEY)},
         "^MLP(event_shape=...): the network was made for samples of 3 numbers; got a sample of s"),
    ],
    ("flow", ValueError): [
        ({"z": jnp.ones(())}, "leaves must share a leading batch axis; got shapes [()]."),
        ({"z": (ONE, X)}, "leaves must share a leading batch axis; got shapes [(2,), (3, 2)]."),
        ({"atol": jnp.ones((3, 2))}, "~ like the state of one row; got shapes (3, 2) where it has"),
        ({"f": lambda t, y, args: X}, "~; got (3, 2) where y has (2,). ~ All samples share args:"),
    ],
    ("odeint", TypeError): [
        ({"t": jnp.array([0, 1])}, "must be an array of floats; got int64."),
        ({"t": None}, "must be an array of floats; got "), ({"t": "ab"}, "must be an array of flo"),
        ({"args": np.array(["a"])}, "arrays must be numeric; got "),
        ({"func": lambda y, t: y}, "^func(y, t, *args): the vector field raised ~ that fit func"),
    ],
    ("odeint", ValueError): [
        ({"t": jnp.array(1.0)}, "must be a vector of times; got shape ()."),
        ({"func": lambda y, t, s: y[0]}, "func(y, t, *args) must return the shapes of y; got ()"),
        ({"func": lambda y, t, s: {"a": y, "b": y}}, "func(y, t, *args) must return the structure"),
        ({"hmax": 0}, "must be a positive number; got 0."),
        ({"mxstep": 0.5}, "must allow at least one step; got 0.5."),
    ],
    ("Event", ValueError): [
        (KEEP, "^Event(most=...): must be a positive integer; got None. It bounds"),
        ({"most": 0, **KEEP}, "must be a positive integer; got 0."),
        ({"most": 2}, "needs a change; got most=2. Pass change"),
    ],
    ("Event", TypeError): [({"change": 2, "most": 2}, "must be a function change")],
    ("evaluate", ValueError): [({}, "^evaluate: needs a solve with dense=True")],
    ("evaluate rows", ValueError): [
        ({"t": jnp.ones(4)}, "must be a scalar, [batch] or [batch, times], with a batch of 3; got "
         "shape (4,). To give all rows these times, pass jnp.tile(t, (3, 1))."),
    ],
}  # fmt: skip
# A solver that does not fit, and a field: what it returns, or raises for its arguments.
EXPLICIT = "must be an explicit Runge-Kutta solver of diffrax, without a step of its own, or ~"
SOLVERS = diffrax.Kvaerno5(), diffrax.SemiImplicitEuler(), OnCircle()
RETURNED = [
    (ValueError, lambda t, y, args: y[0], "the shapes of y; got () where y has (2,). f sees one"),
    (
        ValueError,
        lambda t, y, args: {"a": y},
        "the structure of y, an array; got dict. Return one ar",
    ),
    (TypeError, lambda t, y, args: jnp.ones(2, int), "floating arrays; got int64."),
]
MISFITS = [
    (nn.field, {"w": X}, "TypeError: ~ args={'w': f64[3,2]}"),
    (misfit(ValueError("mine")), ONE, "ValueError: mine"),
    (nn.field, eqx.nn.MLP(2, 2, 4, 1, key=KEY), "TypeError: ~f64[4,2]"),
    (lambda t, y: y, ONE, "TypeError: ~ args="),
    (lambda t, y, p: p["v"] * y, {}, "KeyError: 'v'"),
    (lambda t, y, p: p.rate * y, (ONE,), "AttributeError: ~rate"),
    (lambda t, y, p: p * y, X, ""),
]
NAMED = {"solve": "solve", "flow": "flow", "matching_loss": "matching_loss"}
for call in ("solve", "flow", "nll", "log_prob", "to_base", "sample_and_log_prob", "matching_loss"):
    args = "args" if call in ("solve", "flow") else "params"
    for kind, f, words in RETURNED:
        start = f"^{NAMED.get(call, 'cnf')}(f=...): f(t, y, args) must return {words}"
        ROWS.setdefault((call, kind), []).append(({"f": f}, start))
    for f, value, words in MISFITS if call in ("solve", "nll") else MISFITS[:2]:
        start = f"^f(t, y, args): the vector field raised {words}"
        ROWS.setdefault((call, TypeError), []).append(({"f": f, args: value}, start))
for call in ("solve", "flow", "cnf"):
    ROWS.setdefault((call, ValueError), [])
    ROWS[call, ValueError] += [
        ({"solver": s}, f"{EXPLICIT}solver of jaxode; got {type(s).__name__}. Use") for s in SOLVERS
    ] + [
        (
            {"solver": WithoutOrder()},
            "must know its order, by which steps are chosen; got WithoutOrder",
        ),
    ]
