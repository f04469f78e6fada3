"""A bounded set of steps of a solve, from which any other step can be replayed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Stages are kept beside as many states as this holds, less one place for what is not kept.
STAGE_BYTES = 8 * 2**20


class Checkpoints(NamedTuple):
    """The states `y` at which the steps numbered `step` start; an unused slot has `step == -1`.

    While a solve runs, its length is unknown, so it keeps every `stride`-th step. When the slots
    are full the stride doubles, and slots that no longer fit it are reused. A quarter of the slots
    is reserved for the backward pass, which refines the stretch that it replays.

    The first slots also keep the stages of a step, which saves evaluating them again.
    """

    step: Int[Array, " slots"]
    y: Float[Array, "slots+1 samples n"]
    """The last place takes steps that are not kept, so writing never reads and copies nothing."""
    k: Float[Array, "first_slots+1 stages samples n"] | None
    stride: Int[Array, ""]
    """A power of two."""

    @classmethod
    def start(cls, slots: int, stages: int, y0: Float[Array, "samples n"]) -> "Checkpoints":
        y = jnp.zeros((slots + 1, *y0.shape), y0.dtype).at[0].set(y0)
        places = STAGE_BYTES // max(stages * y0.size * y0.dtype.itemsize, 1)
        first = min(slots, places - 1)
        k = jnp.zeros((first + 1, stages, *y0.shape), y0.dtype) if first > 0 else None
        return cls(jnp.full(slots, -1, jnp.int32), y, k, jnp.ones((), jnp.int32))

    def _write(self, empty: Bool[Array, " usable"], step, y, k, keep: Bool[Array, ""]):
        """Keep a step in the first free slot if `keep` and there is one.

        Writing beyond a buffer is writing into its last place.
        """
        slots = self.step.shape[0]
        slot = jnp.where(keep, _first(empty, slots), slots)

        def write(buffer, value):
            return jax.lax.dynamic_update_index_in_dim(buffer, value, slot, 0)

        number = jnp.where(jnp.arange(slots, dtype=jnp.int32) == slot, step, self.step)
        buffer = self.k
        if buffer is not None:
            buffer = write(buffer, jnp.concatenate([k, jnp.zeros_like(buffer[0, len(k) :])]))
        return self._replace(step=number, y=write(self.y, y), k=buffer)

    def offer(
        self,
        step: Int[Array, ""],
        y: Float[Array, "samples n"],
        k: Float[Array, "stages samples n"],
        advanced: Bool[Array, ""],
    ) -> "Checkpoints":
        """Keep a step if the stride says so, while the solve runs forward."""
        slots = self.step.shape[0]
        used = self.step[: slots - slots // 4]
        empty = (used < 0) | (used & (self.stride - 1) != 0)
        keep = advanced & (step & (self.stride - 1) == 0)
        last_slot = keep & (jnp.sum(empty, dtype=jnp.int32) == 1)
        stride = jnp.where(last_slot, 2 * self.stride, self.stride)
        return self._write(empty, step, y, k, keep)._replace(stride=stride)

    def latest_before(self, stop: Int[Array, ""]):
        """The last kept step before number `stop`: its number, state and, if kept, stages.

        The last result says whether the stages are kept. If there is no such step, it is step -1
        with the initial state, which needs no evaluation.
        """
        earlier = jnp.where(self.step < stop, self.step, -1)
        start = jnp.max(earlier)
        slot = _first(earlier == start, self.step.shape[0])

        def get(buffer):
            return jax.lax.dynamic_index_in_dim(buffer, slot, 0, keepdims=False)

        if self.k is None:
            return start, get(self.y), None, start < 0
        return start, get(self.y), get(self.k), slot < len(self.k) - 1

    def spacing(self, start: Int[Array, ""], stop: Int[Array, ""]) -> Int[Array, ""]:
        """Choose the distance of kept steps when replaying from `start` to the step before `stop`.

        Slots of steps from `stop` on are free. If they can hold the whole stretch, every step is
        kept. Otherwise half of them split it, and the other half is left for the next level.
        """
        empty = jnp.sum((self.step < 0) | (self.step >= stop), dtype=jnp.int32)
        length = stop - start
        used = jnp.maximum(empty // 2, jnp.minimum(empty, 1))
        return jnp.where(length - 1 <= empty, 1, jax.lax.div(length + used, used + 1))

    def keep_replayed(self, step: Int[Array, ""], y, k, stop: Int[Array, ""], keep):
        """Keep a replayed step in a slot that the steps before `stop` do not need."""
        empty = (self.step < 0) | (self.step >= stop)
        return self._write(empty, step, y, k, keep)


def _first(mask: Bool[Array, " places"], otherwise: int) -> Int[Array, ""]:
    """The index of the first true entry, by a plain reduction instead of `argmax`."""
    index = jnp.arange(mask.shape[0], dtype=jnp.int32)
    return jnp.min(jnp.where(mask, index, jnp.int32(otherwise)))
