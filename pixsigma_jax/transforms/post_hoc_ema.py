"""An average of a new length, from the averages that a run kept.

A run that keeps power-function averages of two lengths, and snapshots of them at
several steps, has kept averages of about every length (Karras et al. 2024, "Analyzing
and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C).
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float64

from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.transforms.average import average

# σ_rel of an average, and the update after which it was read.
Profile: TypeAlias = tuple[float, int]

_WIDEST = 12**-0.5  # σ_rel at γ = 0, where every update weighs the same
_FAR = 0.1  # of the wanted profile, in the root of the square mean


def exponent(sigma_rel: float) -> float:
  """γ of the power-function average whose standard deviation is σ_rel of the run.

  Raises:
    ValueError: there is none.
  """
  if not 0 < sigma_rel < _WIDEST:
    raise ValueError(
      f"σ_rel={sigma_rel} is no length of a power-function average: it must be above 0 "
      f"and below {_WIDEST:.4f}, where all updates weigh the same."
    )
  # Equation 123, σ_rel² = (γ + 1) (γ + 2)⁻² (γ + 3)⁻¹, solved for γ.
  inverse = sigma_rel**-2
  return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def post_hoc_weights(
  stored: Sequence[Profile], wanted: Profile
) -> Float64[np.ndarray, " k"]:
  """Weight of each stored average in the wanted one; they sum to 1.

  The profile of an average read at t, p(τ) = (γ + 1) τ^γ / t^(γ + 1) up to t, says how
  much the parameters of a moment count in it. With the decays of `train/ema.py` this is
  exact, of parameters that stand still between updates. The weights make the sum of
  the stored profiles the nearest to the wanted one in the square mean (appendix C.2).
  Unlike the paper's they are held to sum to 1, so that a parameter that never moved
  stays what it is.

  Raises:
    ValueError: the nearest sum is not near.
  """
  wanted = (float(wanted[0]), int(wanted[1]))
  profiles = [(float(sigma_rel), int(step)) for sigma_rel, step in stored]
  if wanted in profiles:  # nothing has to be solved
    return np.eye(len(profiles))[profiles.index(wanted)]

  powers = np.array([exponent(sigma_rel) for sigma_rel, _ in (*profiles, wanted)])
  ends = np.array([step for _, step in (*profiles, wanted)], np.float64)
  products = _product(powers[:, None], ends[:, None], powers[None], ends[None])
  # In units of each profile's own length, or the shortest in time would lead.
  length = np.sqrt(np.diag(products))
  products = products / length[:, None] / length[None]
  # Least squares with Lagrange's multiplier of the sum.
  inverse = length[-1] / length[:-1]
  system = np.block([[products[:-1, :-1], inverse[:, None]], [inverse[None], 0.0]])
  found, *_ = np.linalg.lstsq(system, np.append(products[:-1, -1], 1.0), rcond=1e-12)
  found = found[:-1]
  error = found @ products[:-1, :-1] @ found - 2 * found @ products[:-1, -1] + 1
  error = math.sqrt(max(error, 0.0))
  if error > _FAR:
    raise ValueError(
      f"The averages {profiles} (σ_rel, step) do not reach σ_rel={wanted[0]} at step "
      f"{wanted[1]}: the nearest sum of them is off by {error:.0%}. Give snapshots of "
      "more steps, and ask for a length between theirs that ends at one of them."
    )
  weights = found * inverse
  return weights / weights.sum()


def _product(power_a: Any, end_a: Any, power_b: Any, end_b: Any) -> Any:
  """∫ p_a p_b over the time that both have seen."""
  both = np.minimum(end_a, end_b)
  height = (power_a + 1) * (power_b + 1) / (power_a + power_b + 1)
  share = (both / end_a) ** (power_a + 1) * (both / end_b) ** (power_b + 1)
  return height * share / both


def post_hoc_ema(
  config: PixArtConfig,
  params: Any,
  *,
  others: Sequence[Any],  # no type of items: a check would read one more
  sigma_rel: float,
  step: int = 0,
  stored: Sequence[Any] = (),
) -> tuple[PixArtConfig, Any]:
  """The power-function average of length `sigma_rel`, of a run's stored averages.

  Args:
    others: further snapshots of the same run's averages, as in `average`.
    sigma_rel: of the wanted average.
    step: the update at which it ends; 0 for the last that is stored.
    stored: (σ_rel, step) of the model itself and of each of the others. In a chain of
      transforms, empty: the snapshots say it themselves.

  Returns:
    The hyper-parameters and the average.

  Raises:
    ValueError: there are no others, the models differ in their hyper-parameters,
      `stored` does not say what each is, or the wanted average ends where none of them
      has come.
  """
  if len(stored) != 1 + len(others):
    raise ValueError(
      f"post_hoc_ema knows σ_rel and step of {len(stored)} models, and has "
      f"{1 + len(others)}."
    )
  if len({tuple(profile) for profile in stored}) < len(stored):
    raise ValueError(f"post_hoc_ema was given the same average twice: {list(stored)}.")
  last = max(int(end) for _, end in stored)
  if min(int(end) for _, end in stored) < 1 or not 0 <= step <= last:
    raise ValueError(
      f"post_hoc_ema cannot end at step {step} with averages read at the steps "
      f"{sorted({int(end) for _, end in stored})}: an average is read at step 1 or "
      "later, and cannot show what comes after it."
    )
  weights = post_hoc_weights(stored, (sigma_rel, step or last))
  return average(config, params, others=others, weights=weights.tolist())
