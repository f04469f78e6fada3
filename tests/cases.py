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


BOTH = "t0", "t1"
OF_EACH_ROW = "q", "dose", "kept"


class Case(NamedTuple):
    """Which features a solve has."""

    times: str | None = None
    """Outputs at times that rows "share", at times of "each" row, or of the "dense" solution."""
    ends: tuple[str, ...] = ()
    """Which of `t0` and `t1` are of each row."""
    back: str | None = None
    """Whether "all" rows go back in time, or "some" of them."""
    doses: str | None = None
    """Changes of the state at "two" times of each row, or fewer, which are "padded", at both ends
    of the first row, and at one time of the last."""
    kink: bool = False
    """A rate that doubles at a breakpoint."""
    event: str | None = None
    """A level of the first number, times the rate of the row, that "ends" the solve, or that
    "changes" the state the first time, and ends it the second time."""
    level: float = 0.45
    options: Mapping[str, Any] = {}
    """More options of the solve."""

    @property
    def is_joint(self) -> bool:
        return self.options.get("batch") == "joint"

    @property
    def program(self) -> "Case":
        """Equal for cases that differ in numbers alone."""
        back = self.back if self.event else None  # the direction in which it is crossed
        return self._replace(back=back, doses="two" if self.doses else None, level=0.0)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the solve is differentiable in, at the dtype of JAX."""
        t0 = np.array([0.0, 0.1, -0.1, 0.05] if "t0" in self.ends else 0.0)
        t1 = np.array([2.0, 1.9, 2.1, 1.8] if "t1" in self.ends else 2.0)
        ts, at, row = np.array([0.3, 0.6, 1.0, 1.7]), np.array([0.5, 1.5]), np.arange(ROWS)
        ts = ts + 0.02 * row[:, None] if self.times == "each" else ts
        at = at if self.is_joint else at + 0.01 * row[:, None]
        if self.doses == "padded":
            at[0], at[1, 1], at[3, 1] = (0.0, 2.0), np.nan, at[3, 0]
        if self.back:
            back = self.goes_back(row) if self.back == "some" else np.array(True)
            turned = lambda x: np.where(back[..., None], np.flip(x, -1), x)
            t0, t1 = np.where(back, t1, t0), np.where(back, t0, t1)
            ts, at = ts if self.times == "dense" else turned(ts), turned(at)
        y0 = [[0.2, 0.5], [0.3, 0.6], [0.1, 0.4], [0.25, 0.7]]
        all_of = {"y0": y0, "p": 1.3, "q": [1.0, 0.9, 1.1, 0.8], "t0": t0, "t1": t1}
        all_of |= {"ts": ts} if self.times else {}
        if self.doses:
            all_of |= {"at": at, "dose": np.array([0.05, -0.1]) * (1 + row[:, None] / 10)}
        if self.event:
            all_of |= {"level": self.level, "kept": [0.5, 0.55, 0.5, 0.45]}
        return {name: jnp.asarray(np.asarray(x, float)) for name, x in all_of.items()}

    def goes_back(self, row):
        """Whether a row goes back in time."""
        return row % 2 == 1 if self.back == "some" else self.back == "all"

    def solve(self, x, **more) -> jaxode.Solution:
        """The solve of all rows, or of one system without `batch`."""
        options = {"rtol": 1e-10, "atol": 1e-10, "max_steps": 400, "throw": False}
        options |= {"dense": self.times == "dense"}
        if self.times in ("share", "each"):
            options["ts"] = x["ts"]
        if self.doses:
            taken = lambda t, y, args, i: y + args[1]["q"] * args[1]["dose"][i]
            options["jumps"] = jaxode.Jumps(x["at"], taken)
        if self.kink:
            options["breakpoints"] = [KINK]
        if self.event:
            condition = lambda t, y, args: y[0] - args[1]["q"] * x["level"]
            kept = lambda t, y, args, i: args[1]["q"] * args[1]["kept"] * y
            change = kept if self.changes else None
            direction, most = {None: 1, "all": -1, "some": 0}[self.back], 1 if change else None
            options["event"] = jaxode.Event(condition, direction, change, most)
        doubled = KINK if self.kink else np.inf

        def field(t, y, args):
            p, row = args
            return p * row["q"] * jnp.where(t < doubled, 1, 2).astype(y.dtype) * y * (1 - y)

        args, own = x["p"], {name: x[name] for name in OF_EACH_ROW if name in x}
        if x["y0"].ndim == 2:
            options |= {"row_args": own, "batch": "per_sample"}
        else:
            args = args, own
        options |= {**self.options, **more}
        return jaxode.solve(field, x["y0"], x["t0"], x["t1"], args, **options)

    @property
    def changes(self) -> bool:
        return self.event == "changes"

    def seen(self, x, solution: jaxode.Solution) -> dict[str, Any]:
        """What a user reads off the solve: `y1 [rows, 2]`, `ys [rows, times, 2]`, `t1 [rows]`."""
        rows, found = x["y0"].shape[:-1], {"y1": solution.y1}
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
        rows = [self._row(x, i, *plan) for i, plan in enumerate(self.plans)]
        return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}

    @property
    def plans(self) -> list[tuple[list[str], list[int]]]:
        """What happens in each row, and the piece in which each output lies."""
        with jax.ensure_compile_time_eval():
            return [_plan(self, i) for i in range(ROWS)]

    def _row(self, x, i: int, happens: list[str], places: list[int]) -> dict[str, Any]:
        """One row, from what happens in it and the piece in which each output lies."""
        pieces, y, t = self.walk(x, i, happens)
        told = {"y1": y}
        if self.times:
            # Outputs after an event that ends the solve repeat it.
            pieces.append((t, y, jnp.zeros(())))
            times = x["ts"][i] if self.times == "each" else x["ts"]
            t_of, y_of, rate_of = map(jnp.stack, zip(*pieces, strict=True))
            at = np.array(places)
            told["ys"] = advance(y_of[at], (times - t_of[at])[:, None], rate_of[at][:, None])
        if self.event:
            told["t1"] = t
        return told

    def walk(self, x, i: int, happens: list[str]):
        """The start, state and rate of each piece, and the state and time after the last one."""
        of = lambda name: x[name][i] if x[name].ndim else x[name]
        t, y, q, pieces, back = of("t0"), x["y0"][i], x["q"][i], [], self.goes_back(i)
        rate = x["p"] * q * (2 if self.kink and back else 1)
        for what in happens:
            pieces.append((t, y, rate))
            kind, *number = what.split()
            if kind == "event":
                end = t + time_to(q * x["level"], y[0], rate)
            elif kind == "dose":
                end = jnp.broadcast_to(x["at"], (ROWS, 2))[i, int(*number)]
            else:
                end = KINK if kind == "kink" else of("t1")
            y, t = advance(y, end - t, rate), end
            if what == "event 0" and self.changes:
                y = q * x["kept"][i] * y
            elif kind == "kink":
                rate = rate / 2 if back else rate * 2
            elif kind == "dose":
                y = y + q * x["dose"][i, int(*number)]
        return pieces, y, t


def _plan(case: Case, i: int) -> tuple[list[str], list[int]]:
    """What happens in a row, in its order, and in which piece each output lies."""
    x, sign = case.inputs, -1 if case.goes_back(i) else 1
    doses = np.broadcast_to(x["at"], (ROWS, 2))[i] if case.doses else []
    at = {f"dose {k}": t for k, t in enumerate(doses) if t < np.inf}
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


STIFF, JOINT = {"solver": jaxode.Rodas5P()}, {"batch": "joint"}
# (features) A new one is one row; so is a pair of features that go together. Cases that differ in
# numbers alone share a program.
CASES = {
    "outputs": Case("share"),
    "backwards": Case("share", back="all"),
    "outputs of each row": Case("each", BOTH, "some"),
    "the solution between steps": Case("dense", BOTH, "some"),
    "spans of each row": Case(ends=BOTH),
    "doses and outputs": Case("each", BOTH, doses="padded"),
    "doses backwards": Case("each", BOTH, "all", doses="two"),
    "doses in spans of each row": Case("each", BOTH, "some", doses="two"),
    "a breakpoint and outputs": Case("each", ("t1",), kink=True),
    "a breakpoint backwards": Case("each", ("t1",), "all", kink=True),
    "a breakpoint and doses": Case("share", doses="two", kink=True),
    "doses and a breakpoint between steps": Case("dense", doses="two", kink=True),
    "doses, a breakpoint and an event": Case("share", doses="two", kink=True, event="ends"),
    "an event": Case("share", event="ends", level=0.8),  # to which two rows do not come
    "an event and outputs": Case("share", event="ends"),
    "an event in spans of each row": Case("each", BOTH, "some", event="ends", level=0.22),
    "an event that changes the state": Case("share", event="changes"),
    "an event that changes the state, and a breakpoint": Case(kink=True, event="changes"),
    "an event that changes the state, in spans of each row": Case(
        "each", BOTH, "some", event="changes", level=0.22
    ),
    "joint steps": Case("share", options=JOINT),
    "joint steps, doses and a breakpoint": Case("share", doses="two", kink=True, options=JOINT),
    "equal steps": Case("share", doses="two", kink=True, options={"steps": 60}),
    "stiff": Case("each", BOTH, options=STIFF),
    "stiff, doses and a breakpoint": Case("share", doses="two", kink=True, options=STIFF),
    "stiff, an event": Case("share", event="ends", options=STIFF),
    "order 8": Case("share", doses="two", options={"solver": diffrax.Dopri8()}),
}
