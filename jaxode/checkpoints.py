"""A bounded set of states along a solve, from which any step can be replayed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Stages are kept beside the states while all slots of them take no more than this.
STAGE_BYTES = 8 * 2**20


class Checkpoints(NamedTuple):
    """States `y` after the accepted steps numbered `step`; an unused slot has `step == -1`.

    While a solve runs its length is unknown, so every `stride`-th state is kept, and when the slots
    run out the stride doubles: the slots that no longer fit it are the ones to be reused. A quarter
    of the slots is left for the backward pass, which refines the stretch that it replays.

    If they are small, the stages of the step that starts at a state are kept with it, which saves
    evaluating them again.
    """

    step: Int[Array, " slots"]
    y: Float[Array, "slots+1 rows n"]
    """The last place takes what is not kept, so that writing never reads, and copies nothing."""
    k: Float[Array, "slots+1 stages rows n"] | None
    has_k: Bool[Array, " slots"]
    stride: Int[Array, ""]

    @classmethod
    def start(cls, slots: int, stages: int, y0: Float[Array, "rows n"]) -> "Checkpoints":
        step = jnp.full(slots, -1, jnp.int32).at[0].set(0)
        y = jnp.zeros((slots + 1, *y0.shape), y0.dtype).at[0].set(y0)
        k = None
        if slots * stages * y0.size * y0.dtype.itemsize <= STAGE_BYTES:
            k = jnp.zeros((slots + 1, stages, *y0.shape), y0.dtype)
        return cls(step, y, k, jnp.zeros(slots, bool), jnp.ones((), jnp.int32))

    def _write(self, slot, step, y, keep: Bool[Array, ""]) -> "Checkpoints":
        step = self.step.at[slot].set(jnp.where(keep, step, self.step[slot]))
        has_k = self.has_k.at[slot].set(self.has_k[slot] & ~keep)
        return self._replace(step=step, y=_set(self.y, slot, y, keep), has_k=has_k)

    def attach(
        self, step: Int[Array, ""], k: Float[Array, "stages rows n"], keep: Bool[Array, ""]
    ) -> "Checkpoints":
        """Keep the stages of the step that starts at the state after `step`, if that is kept."""
        if self.k is None:
            return self
        slot = jnp.argmax(self.step == step)
        keep &= self.step[slot] == step
        has_k = self.has_k.at[slot].set(self.has_k[slot] | keep)
        return self._replace(k=_set(self.k, slot, k, keep), has_k=has_k)

    def offer(
        self, step: Int[Array, ""], y: Float[Array, "rows n"], advanced: Bool[Array, ""]
    ) -> "Checkpoints":
        """Keep the state after `step` if the stride says so, while the solve runs forward."""
        slots = self.step.shape[0]
        usable = slots - slots // 4
        free = (self.step[:usable] < 0) | (self.step[:usable] % self.stride != 0)
        due = advanced & (step % self.stride == 0)
        stride = jnp.where(due & ~free.any(), 2 * self.stride, self.stride)
        free |= self.step[:usable] % stride != 0
        keep = due & (step % stride == 0) & free.any()
        return self._write(jnp.argmax(free), step, y, keep)._replace(stride=stride)

    def latest_before(self, step: Int[Array, ""]):
        """The last checkpoint before `step`: step number, state, stages, whether they are known."""
        earlier = jnp.where(self.step < step, self.step, -1)
        slot = jnp.argmax(earlier)
        get = lambda buffer: jax.lax.dynamic_index_in_dim(buffer, slot, 0, keepdims=False)
        return earlier[slot], get(self.y), None if self.k is None else get(self.k), get(self.has_k)

    def spacing(self, start: Int[Array, ""], stop: Int[Array, ""]) -> Int[Array, ""]:
        """How far apart to keep states when replaying from `start` to the step before `stop`.

        Slots of steps from `stop` on are free. If they hold the whole stretch, every state is kept;
        otherwise half of them split it, and the other half is left for the next level.
        """
        free = jnp.sum((self.step < 0) | (self.step >= stop), dtype=jnp.int32)
        length = stop - start
        used = jnp.maximum(free // 2, jnp.minimum(free, 1))
        return jnp.where(length - 1 <= free, 1, -(-length // (used + 1)))

    def keep_replayed(
        self, step: Int[Array, ""], y: Float[Array, "rows n"], stop: Int[Array, ""], keep
    ) -> "Checkpoints":
        """Keep the replayed state after `step` in a slot that steps before `stop` do not need."""
        free = (self.step < 0) | (self.step >= stop)
        return self._write(jnp.argmax(free), step, y, keep & free.any())


def _set(buffer, slot, value, keep: Bool[Array, ""]):
    place = jnp.where(keep, slot, buffer.shape[0] - 1)
    return jax.lax.dynamic_update_index_in_dim(buffer, value, place, 0)


def check_checkpoints(where: str, checkpoints: int) -> None:
    """Raise unless it is a number of checkpoints."""
    if isinstance(checkpoints, bool) or not isinstance(checkpoints, int) or checkpoints < 2:
        raise ValueError(
            f"{where}(checkpoints=...): must be an integer of at least 2; got {checkpoints!r}. "
            "The default is 64."
        )
