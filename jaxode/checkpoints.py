"""A bounded set of states along a solve, from which any step can be replayed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Checkpoints(NamedTuple):
    """States `y` after the accepted steps numbered `step`; an unused slot has `step == -1`.

    While a solve runs its length is unknown, so every `stride`-th state is kept, and when the slots
    run out the stride doubles: the slots that no longer fit it are the ones to be reused. A quarter
    of the slots is left for the backward pass, which refines the stretch that it replays.
    """

    step: Int[Array, " slots"]
    y: Float[Array, "slots rows n"]
    stride: Int[Array, ""]

    @classmethod
    def start(cls, slots: int, y0: Float[Array, "rows n"]) -> "Checkpoints":
        step = jnp.full(slots, -1, jnp.int32).at[0].set(0)
        y = jnp.zeros((slots, *y0.shape), y0.dtype).at[0].set(y0)
        return cls(step, y, jnp.ones((), jnp.int32))

    def _write(self, slot, step, y, keep: Bool[Array, ""]) -> "Checkpoints":
        old = jax.lax.dynamic_index_in_dim(self.y, slot, 0, keepdims=False)
        new = jax.lax.dynamic_update_index_in_dim(self.y, jnp.where(keep, y, old), slot, 0)
        step = self.step.at[slot].set(jnp.where(keep, step, self.step[slot]))
        return self._replace(step=step, y=new)

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
        """The last checkpoint before `step`: its own step number and its state."""
        earlier = jnp.where(self.step < step, self.step, -1)
        slot = jnp.argmax(earlier)
        return earlier[slot], jax.lax.dynamic_index_in_dim(self.y, slot, 0, keepdims=False)

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


def check_checkpoints(where: str, checkpoints: int) -> None:
    if isinstance(checkpoints, bool) or not isinstance(checkpoints, int) or checkpoints < 2:
        raise ValueError(
            f"{where}(checkpoints=...): must be an integer of at least 2; got {checkpoints!r}. "
            "The default is 64."
        )
