"""The loss on images that are never trained on, by tenth of the timesteps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pixsigma_jax import sharding
from pixsigma_jax.train.batches import Batches
from pixsigma_jax.train.loss import LossFn
from pixsigma_jax.train.step import DECILES, decile_sums

_KEY = 0x5EED  # the draws of every validation of every run: two figures compare


class Validation:
  """Measures parameters on the same examples, noise and timesteps each time."""

  def __init__(
    self,
    loss: LossFn,
    batches: Batches,
    *,
    examples: int,
    batch_size: int,
    num_timesteps: int,
    mesh: Mesh,
  ):
    """Stores what it measures with; nothing is read or compiled yet.

    Args:
      loss: see `make_loss`; without caption dropout, timesteps uniform in their range.
      batches: of the held-out examples.
      examples: how many; rounded up to whole batches.
      batch_size: rows of a batch.
      num_timesteps: of the schedule.
      mesh: where parameters and batches lie; every process gets all results.
    """
    self._batches, self._count = batches, -(-examples // batch_size)

    def measure(params: Any, null_caption: Any, batch: Any, number: Any) -> Any:
      key = jax.random.fold_in(jax.random.key(_KEY), number)
      _, per_example = loss(params, null_caption, batch, key)
      sums, counts = decile_sums(per_example, num_timesteps)
      return {"loss": per_example["loss"].sum(), "sums": sums, "counts": counts}

    self._measure = jax.jit(measure, out_shardings=sharding.replicated(mesh))

  def __call__(self, params: Any, null_caption: Any) -> dict[str, Any]:
    """`validation/loss`, a mean over examples, and `validation/decile_loss`."""
    totals = {"loss": 0.0, "sums": np.zeros(DECILES), "counts": np.zeros(DECILES)}
    self._batches.start(0)
    for number in range(self._count):
      batch = next(self._batches)
      found = jax.device_get(
        self._measure(params, null_caption, batch, jnp.int32(number))
      )
      totals = {name: totals[name] + np.float64(found[name]) for name in totals}
    self._batches.close()
    with np.errstate(invalid="ignore"):
      deciles = totals["sums"] / totals["counts"]
    mean = float(totals["loss"] / totals["counts"].sum())
    return {"validation/loss": mean, "validation/decile_loss": deciles}

  def close(self) -> None:
    """Ends what reads ahead, where a measurement was broken off."""
    self._batches.close()
