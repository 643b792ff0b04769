"""From noise to latents: one scan that follows any sampler's table of coefficients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pixsigma_jax.diffusion.schedule import Schedule
from pixsigma_jax.diffusion.solver_tables import (
  SolverTable,
  ddim,
  dmd,
  dpm_solver_2s,
  dpm_solver_pp,
  dpm_solver_sde,
  euler,
  euler_ancestral,
  heun,
  iddpm,
  lcm,
  sa_solver,
  tcd,
  unipc,
)

# The name of a sampler → its table for a schedule and a number of steps.
SAMPLERS: dict[str, Callable[..., SolverTable]] = {
  "dpm++": functools.partial(dpm_solver_pp, final="diffusers"),
  "dpm++-reference": functools.partial(dpm_solver_pp, final="reference"),
  "dpm++-2s": dpm_solver_2s,
  "dpm++-sde": dpm_solver_sde,
  "unipc": unipc,
  "euler": euler,
  "euler-ancestral": euler_ancestral,
  "heun": heun,
  "ddim": ddim,
  "iddpm": iddpm,
  "sa-solver": functools.partial(sa_solver, eta=1.0),
  "lcm": lcm,
  "tcd": tcd,
  "dmd": dmd,
}

# Samplers whose tables also take `use_karras_sigmas`, and those that take `timesteps`.
KARRAS_SAMPLERS = (
  *("dpm++", "dpm++-2s", "dpm++-sde", "unipc"),
  *("euler", "euler-ancestral", "heun"),
)
TIMESTEPS_SAMPLERS = (*KARRAS_SAMPLERS, "ddim", "lcm", "tcd")


def check_time_grid(
  sampler: str, timesteps: Sequence[int] | None, use_karras_sigmas: bool
) -> None:
  """Refuses a time grid that a sampler does not take, before any work.

  Raises:
    ValueError: if it takes no such grid, or both are asked for.
  """
  if timesteps is not None and use_karras_sigmas:
    raise ValueError(
      "timesteps and use_karras_sigmas each say where the network is called: give one "
      "of them."
    )
  for name, asked, known in (
    ("timesteps", timesteps is not None, TIMESTEPS_SAMPLERS),
    ("use_karras_sigmas", use_karras_sigmas, KARRAS_SAMPLERS),
  ):
    if asked and sampler not in known:
      raise ValueError(
        f"The sampler {sampler} takes no {name}: leave it out, or choose one of "
        f"{', '.join(known)}."
      )


def solver_table(
  sampler: str,
  schedule: Schedule,
  num_steps: int,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> SolverTable:
  """The table of a sampler by its name, on its own time grid or another.

  Args:
    sampler: a key of `SAMPLERS`.
    num_steps: of its own grid, or of Karras'.
    timesteps, use_karras_sigmas: see `time_grids.whole_grid`.

  Raises:
    ValueError: if the sampler takes no such grid or number of steps, or both grids are
      asked for.
  """
  check_time_grid(sampler, timesteps, use_karras_sigmas)
  if timesteps is not None:
    return SAMPLERS[sampler](schedule, num_steps, timesteps=timesteps)
  if use_karras_sigmas:
    return SAMPLERS[sampler](schedule, num_steps, use_karras_sigmas=True)
  return SAMPLERS[sampler](schedule, num_steps)


def later_start(
  sampler: str, table: SolverTable, num_steps: int, kept: int
) -> SolverTable:
  """The last `kept` of a table's `num_steps` steps, as a table that starts there.

  Before its start there is no x_0: weights of earlier ones go to the first that there
  is, which makes the first step one of first order, as any multistep solver's. A step
  of several calls of the network is not cut: with dpm++-2s one step more may be kept.

  Args:
    sampler: the table's.
    num_steps: of the whole table.
    kept: from 1 to `num_steps`.
  """
  dropped = num_steps - kept
  if sampler == "heun":
    dropped *= 2
  elif sampler == "dpm++-2s":
    dropped -= dropped % 2
  if dropped == 0:
    return table
  table = jax.tree.map(lambda column: column[dropped:], table)
  current, previous, earlier = table.current, table.previous, table.earlier
  if previous is None:
    return table
  if earlier is not None:  # what the first two steps have of it
    previous = previous.at[:2].add(earlier[:2])
    earlier = earlier.at[:2].set(0)
  return table._replace(
    current=current.at[0].add(previous[0]),
    previous=previous.at[0].set(0),
    earlier=earlier,
  )


def restarted(
  sampler: str, table: SolverTable, below: float | int
) -> tuple[SolverTable, int]:
  """A table whose steps below a timestep remember nothing of those above.

  For two models that share the schedule: what one has estimated is not averaged with
  the other's estimates. Samplers of first order remember nothing anyway, so their table
  stays as it is. A step of several calls of the network is not cut: it belongs to
  where it begins.

  Args:
    sampler: the table's.
    below: timestep; a step belongs above if it begins there.

  Returns:
    The table, and the number of its first row that belongs below; its length if there
    is none.
  """
  calls = len(table.timesteps)
  stride = 2 if sampler == "heun" else 1
  starts = np.asarray(table.timesteps)[::stride]
  kept = int((starts < below).sum())
  if kept == 0:
    return table, calls
  later = later_start(sampler, table, len(starts), kept)
  first = calls - len(later.timesteps)
  return jax.tree.map(
    lambda whole, end: jnp.concatenate([whole[:first], end]), table, later
  ), first


class Prediction(NamedTuple):
  """A network's prediction for noisy latents.

  The noise ε in them, and where the log-variance of a step lies between the
  posterior's (-1) and beta's (1): only `iddpm` asks for that.
  """

  noise: Array
  variance_logits: Array | None = None


# (noisy latents, timestep: a float32 scalar) → what the network says of them
Denoiser: TypeAlias = Callable[[Array, Array], Prediction]

# The same by the whole row of the table, which has scales too, and with a memory, any
# pytree, that it is given and hands on to the next step.
RememberingDenoiser: TypeAlias = Callable[
  [Array, SolverTable, Any], tuple[Prediction, Any]
]


def solve(
  denoise: Denoiser,
  noisy_latents: Float[Array, "*shape"],
  table: SolverTable,
  fresh_noise: Callable[[Array], Array] | None = None,
) -> Float32[Array, "*shape"]:
  """Takes unit normal `noisy_latents` through every step of `table`.

  Args:
    denoise: the network. Traced once, whatever the number of steps.
    noisy_latents: where to start.
    table: what to do, see `SAMPLERS`.
    fresh_noise: the number of a step, a traced int32 from 0 on → unit normal noise like
      the latents. Left alone by a table without `fresh`.

  Raises:
    ValueError: if the table asks for noise or for a variance that is not given.
  """
  latents, _ = solve_remembering(
    lambda noisy_latents, row, nothing: (
      denoise(noisy_latents, row.timesteps),
      nothing,
    ),
    noisy_latents,
    table,
    fresh_noise,
    memory=(),
  )
  return latents


class SolverState(NamedTuple):
  """Between two steps: latents, clean latents of earlier steps, a network's memory.

  Attributes:
    latents: noisy as the table's next row has them; after the last step the result.
    history: x_0 of earlier steps, the latest first, as many as the table has weights.
    memory: what the network remembers, any pytree.
  """

  latents: Array
  history: tuple[Array, ...]
  memory: Any


def solve_remembering(
  denoise: RememberingDenoiser,
  noisy_latents: Float[Array, "*shape"],
  table: SolverTable,
  fresh_noise: Callable[[Array], Array] | None,
  memory: Any,
  after_step: Callable[[Array, Array], Array] | None = None,
) -> tuple[Float32[Array, "*shape"], Any]:
  """As `solve`, for a network that remembers its earlier steps.

  Args:
    memory: what the network is given in its first step.
    after_step: see `take_step`.

  Returns:
    The latents, and the memory after the last step.
  """

  def step(state: SolverState, numbered: tuple[Array, SolverTable]):
    number, row = numbered
    state, _ = take_step(denoise, state, number, row, fresh_noise, after_step)
    return state, None

  numbers = jnp.arange(len(table.timesteps), dtype=jnp.int32)
  start = start_state(noisy_latents, table, memory)
  state, _ = jax.lax.scan(step, start, (numbers, table))
  return state.latents, state.memory


def start_state(
  noisy_latents: Float[Array, "*shape"], table: SolverTable, memory: Any
) -> SolverState:
  """The state before the first step of `table`."""
  start = noisy_latents.astype(jnp.float32)
  history = tuple(jnp.zeros_like(start) for _ in _weights_of_history(table))
  return SolverState(start, history, memory)


def take_step(
  denoise: RememberingDenoiser,
  state: SolverState,
  number: Array,
  row: SolverTable,
  fresh_noise: Callable[[Array], Array] | None,
  after_step: Callable[[Array, Array], Array] | None = None,
) -> tuple[SolverState, Float32[Array, "*shape"]]:
  """One step of a sampler: the body of `solve`'s scan, and of any loop beside it.

  Args:
    number: of the step, a traced int32 from 0 on.
    row: of the table, its columns scalars.
    fresh_noise: see `solve`.
    after_step: the number of the step, the latents it leads to → other latents.

  Returns:
    The state after the step, and the clean latents that the step has estimated.

  Raises:
    ValueError: if the table asks for noise or for a variance that is not given.
  """
  if row.fresh is not None and fresh_noise is None:
    raise ValueError("This sampler adds noise on its way: give solve() a fresh_noise.")
  noisy_latents, history, memory = state
  prediction, memory = denoise(noisy_latents, row, memory)
  noise = prediction.noise.astype(jnp.float32)
  latents = (noisy_latents - row.noise_scale * noise) / row.signal_scale
  following = row.carry * noisy_latents + row.current * latents
  for weight, before in zip(_weights_of_history(row), history, strict=True):
    following += weight * before
  if row.fresh is not None and fresh_noise is not None:
    scale = row.fresh * _spread(row, prediction)
    following += scale * fresh_noise(number).astype(jnp.float32)
  if after_step is not None:
    following = after_step(number, following)
  history = (latents, *history)[: len(history)]
  return SolverState(following, history, memory), latents


def _weights_of_history(row: SolverTable) -> list[Array]:
  """Weights of the clean latents of earlier steps, the latest first."""
  return [weight for weight in (row.previous, row.earlier) if weight is not None]


def _spread(row: SolverTable, prediction: Prediction) -> Array:
  """Factor of the fresh noise's deviation from the learned variance."""
  if row.spread is None:
    return jnp.float32(1)
  if prediction.variance_logits is None:
    raise ValueError(
      "iddpm takes its variance from the network, and this one has learned none: "
      "use another sampler."
    )
  return jnp.exp(row.spread * (prediction.variance_logits.astype(jnp.float32) + 1) / 2)
