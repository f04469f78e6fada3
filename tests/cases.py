"""The features of a solve as one table. Each case knows its solution in closed form.

All solve the logistic equation `y' = p q y (1 - y)` for two numbers in each of four rows, with a
rate `p` that the rows share and a rate `q` of each. Between two changes of the state or the rate
the solution is `advance`. A new feature is one row of `CASES`, and a pair of features is one, too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxode

ROWS, KINK = 4, 1.2  # rows, and the time at which the rate doubles


def advance(y, s, rate):
    """The solution of `y' = rate y (1 - y)` after a time `s`."""
    return 1 / (1 + (1 / y - 1) * jnp.exp(-rate * s))


def time_to(level, y, rate):
    """How long the solution takes to a level."""
    return (jnp.log(level / (1 - level)) - jnp.log(y / (1 - y))) / rate


class Case(NamedTuple):
    """Which features a solve has."""

    times: str | None = None
    """Outputs at times that rows "share", at times of "each" row, or of the "dense" solution."""
    ends: bool = False
    """Whether each row has a span of its own."""
    back: bool = False
    doses: bool = False
    """Two changes of the state at times of each row."""
    kink: bool = False
    """A rate that doubles at a breakpoint."""
    event: str | None = None
    """A level of the first number that "ends" the solve, or that "changes" the state the first
    time, and ends it the second time."""
    options: Mapping[str, Any] = {}
    """More options of the solve."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the solve is differentiable in, at the dtype of JAX."""
        y0 = [[0.2, 0.5], [0.3, 0.6], [0.1, 0.4], [0.25, 0.7]]
        span = [[0.0, 0.1, -0.1, 0.05], [2.0, 1.9, 2.1, 1.8]] if self.ends else [0.0, 2.0]
        rate = [1.0, 0.9, 1.1, 0.8]
        all_of = {"y0": y0, "p": 1.3, "q": rate, "t0": span[0], "t1": span[1]}
        ts = [0.3, 0.6, 1.0, 1.7]
        each = np.array(ts) + 0.02 * np.arange(ROWS)[:, None]
        if self.times:
            all_of["ts"] = each[:, :4] if self.times == "each" else ts
        if self.doses:
            all_of["at"] = np.array([0.5, 1.5]) + 0.01 * np.arange(ROWS)[:, None]
            all_of["dose"] = [0.05, -0.1]
        if self.event:
            all_of["level"] = 0.45
        if self.back:
            all_of["t0"], all_of["t1"] = all_of["t1"], all_of["t0"]
            for name in {"ts", "at"} & all_of.keys():
                all_of[name] = np.flip(all_of[name], -1)
        return {name: jnp.asarray(np.asarray(x, float)) for name, x in all_of.items()}

    def solve(self, x, **more) -> jaxode.Solution:
        """The solve of all rows, or of one system without `batch`."""
        options = {"rtol": 1e-10, "atol": 1e-10, "max_steps": 400, "throw": False}
        options |= {"dense": self.times == "dense"}
        if self.times in ("share", "each"):
            options["ts"] = x["ts"]
        if self.doses:
            options["jumps"] = jaxode.Jumps(x["at"], lambda t, y, args, i: y + x["dose"][i])
        if self.kink:
            options["breakpoints"] = [KINK]
        if self.event:
            condition, direction = lambda t, y, args: y[0] - x["level"], -1 if self.back else 1
            change = (lambda t, y, args, i: 0.5 * y) if self.event == "changes" else None
            most = 1 if change else None
            options["event"] = jaxode.Event(condition, direction, change, most)
        doubled = KINK if self.kink else np.inf

        def field(t, y, args):
            p, q = args
            return p * q * jnp.where(t < doubled, 1, 2).astype(y.dtype) * y * (1 - y)

        if x["y0"].ndim == 2:
            args, options = x["p"], {"row_args": x["q"], "batch": "per_sample"} | options
        else:
            args = x["p"], x["q"]
        options |= {**self.options, **more}
        return jaxode.solve(field, x["y0"], x["t0"], x["t1"], args, **options)

    def seen(self, x, **more) -> dict[str, Any]:
        """What a user reads off the solve: `y1 [rows, 2]`, `ys [rows, times, 2]`, `t1 [rows]`."""
        solution, rows = self.solve(x, **more), x["y0"].shape[:-1]
        found = {"y1": solution.y1}
        if self.times == "dense":
            found["ys"] = solution.evaluate(jnp.broadcast_to(x["ts"], (*rows, len(x["ts"]))))
        elif self.times:
            shared = rows and self.times == "share"
            found["ys"] = solution.ys.swapaxes(0, 1) if shared else solution.ys
        if self.event:
            found["t1"] = solution.t1
        return found

    def exact(self, x) -> dict[str, Any]:
        """The same in closed form."""
        with jax.ensure_compile_time_eval():
            plans = [_plan(self, i) for i in range(ROWS)]
        rows = [self._row(x, i, *plan) for i, plan in enumerate(plans)]
        return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, x, i: int, happens: list[str], places: list[int]) -> dict[str, Any]:
        """One row, from what happens in it and the piece in which each output lies."""
        pieces, y, t = self.walk(x, i, happens)
        told = {"y1": y}
        if self.times:
            pieces.append((t, y, 0.0))  # outputs after an event that ends the solve repeat it
            times = x["ts"][i] if self.times == "each" else x["ts"]
            each = [(*pieces[place], time) for place, time in zip(places, times, strict=True)]
            told["ys"] = jnp.stack([advance(y, time - t, rate) for t, y, rate, time in each])
        if self.event:
            told["t1"] = t
        return told

    def walk(self, x, i: int, happens: list[str]):
        """The start, state and rate of each piece, and the state and time after the last one."""
        of = lambda name: x[name][i] if x[name].ndim else x[name]
        t, y, rate, pieces = of("t0"), x["y0"][i], x["p"] * x["q"][i], []
        rate = rate * (2 if self.kink and self.back else 1)
        for what in happens:
            pieces.append((t, y, rate))
            if what.startswith("event"):
                end = t + time_to(x["level"], y[0], rate)
            else:
                end = {"kink": KINK, "end": of("t1")}.get(what)
                k = int(what[-1]) if end is None else 0
                end = x["at"][i, k] if end is None else end
            y, t = advance(y, end - t, rate), end
            if what == "event 0" and self.event == "changes":
                y = 0.5 * y
            elif what == "kink":
                rate = rate / 2 if self.back else rate * 2
            elif what.startswith("dose"):
                y = y + x["dose"][int(what[-1])]
        return pieces, y, t


def _plan(case: Case, i: int) -> tuple[list[str], list[int]]:
    """What happens in a row, in its order, and in which piece each output lies."""
    x, sign = case.inputs, -1 if case.back else 1
    at = {f"dose {k}": float(x["at"][i, k]) for k in range(2)} if case.doses else {}
    at |= {"kink": KINK} if case.kink else {}
    happens = [*sorted(at, key=lambda what: sign * at[what]), "end"]
    place, events = 0, 0
    while case.event and place < len(happens):
        trial = [*happens[:place], f"event {events}"]
        (*_, (t, *_)), _, crossing = case.walk(x, i, trial)
        _, _, end = case.walk(x, i, happens[: place + 1])
        if sign * float(t) < sign * float(crossing) < sign * float(end):
            events += 1
            if case.event == "ends" or events == 2:
                happens = trial
                break
            happens = trial + happens[place:]
        place += 1
    if not case.times:
        return happens, []
    pieces, _, end = case.walk(x, i, happens)
    starts = np.array([sign * float(t) for t, *_ in pieces] + [sign * float(end)])
    times = sign * np.asarray(x["ts"][i] if case.times == "each" else x["ts"])
    return happens, [int(np.flatnonzero(starts < time)[-1]) for time in times]


# (features) A new one is one row; so is a pair of features that go together.
CASES = {
    "the end": Case(),
    "outputs": Case("share"),
    "outputs of each row": Case("each", ends=True),
    "the solution between steps": Case("dense", ends=True),
    "spans of each row": Case(ends=True),
    "backwards": Case("share", back=True),
    "doses": Case(doses=True),
    "doses and outputs": Case("each", doses=True),
    "doses backwards": Case("share", doses=True, back=True),
    "doses in spans of each row": Case("each", ends=True, doses=True),
    "a breakpoint": Case(kink=True),
    "a breakpoint and outputs": Case("share", ends=True, kink=True),
    "a breakpoint backwards": Case("each", kink=True, back=True),
    "a breakpoint between steps": Case("dense", kink=True),
    "a breakpoint and doses": Case("share", doses=True, kink=True),
    "an event": Case(event="ends"),
    "an event and outputs": Case("share", event="ends"),
    "an event in spans of each row": Case("each", ends=True, event="ends"),
    "an event and a breakpoint": Case("share", kink=True, event="ends"),
    "an event that changes the state": Case("share", event="changes"),
    "an event that changes the state, and a breakpoint": Case(kink=True, event="changes"),
    "joint steps": Case("share", kink=True, options={"batch": "joint"}),
    "equal steps": Case("share", doses=True, options={"steps": 60}),
    "stiff": Case("each", ends=True, options={"solver": jaxode.Rodas5P()}),
    "stiff, doses and a breakpoint": Case(
        "share", doses=True, kink=True, options={"solver": jaxode.Rodas5P()}
    ),
    "stiff, an event": Case("share", event="ends", options={"solver": jaxode.Rodas5P()}),
    "order 8": Case("share", doses=True, options={"solver": diffrax.Dopri8()}),
}
