"""One compiled program from noise to latents: the solver, guidance and the network.

The two halves of guidance, without and with the prompt, go through the network as one
batch or one after the other. Arrays of the network therefore begin with two axes,
`[passes rows …]`; laid end to end these are the halves, the unconditional first.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from pixsigma_jax.diffusion.guidance import (
  guide,
  guide_first_three,
  rescale,
  scale_within,
)
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.diffusion.solvers import Prediction, SolverTable, solve_remembering
from pixsigma_jax.mesh_axes import DATA, FSDP
from pixsigma_jax.models import tokens
from pixsigma_jax.models.conditions import Conditions
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import (
  PixArt,
  PixArtConfig,
  caption_keys_values,
  laid_out,
  split_prediction,
)
from pixsigma_jax.sample import step_caching
from pixsigma_jax.sample.step_caching import Computed

Batch: TypeAlias = dict[str, Any]

SCHEDULE = linear_schedule()

# Tokens of one half on a device, up to which both halves go as one batch. One picture
# of 512 px has about 1024: below, a pass costs a small chip as much as the batch does,
# since it waits for the parameters. One of 1024 px has 4096: there two passes take as
# long (v5e, v5p) or less (v6e, whose fast memory holds one half), in half the memory.
_TOKENS_OF_ONE_BATCH = 2048


class Guidance(NamedTuple):
  """Guidance settings that join the halves of a prediction; all traced."""

  scale: Any
  low: Any
  high: Any
  rescale: Any


def compute_here(dtype: str = "bfloat16", attention: str = "auto") -> Compute:
  """The best settings of computation on the devices that JAX has."""
  on_cpu = jax.default_backend() == "cpu"
  return Compute(dtype=jnp.dtype(dtype), attention=attention, unroll=on_cpu)


def passes_by_size(rows: int, length: int, mesh: Mesh | None) -> int:
  """Best number of passes for the halves of guidance: 1 or 2.

  Args:
    rows: pictures of a batch.
    length: tokens of each.
    mesh: devices that share the rows.
  """
  devices = 1 if mesh is None else mesh.shape[DATA] * mesh.shape[FSDP]
  return 1 if rows // devices * length <= _TOKENS_OF_ONE_BATCH else 2


@functools.partial(jax.jit, static_argnames=("config", "compute", "passes"))
def sample(
  params: Any,
  batch: Batch,
  table: SolverTable,
  guidance: Guidance | None,
  threshold: Any = None,
  *,
  config: PixArtConfig,
  compute: Compute,
  passes: int,
) -> tuple[Float32[Array, "b n c"], Computed | None]:
  """From noise to latents of any grids, as padded sequences.

  Args:
    batch: a row a picture: noise `[b n c]`, seed `[b]`, coordinates `[b n 2]`, grid
      `[b 2]`, image_size `[b 2]`, aspect_ratio `[b]`, caption_embeddings `[b t e]`,
      caption_mask `[b t]`; and negative_embeddings, negative_mask for guidance.
    threshold: of step caching; None computes every step and remembers nothing.
    passes: 2 takes the halves of guidance one after the other; 1 without guidance.

  Returns:
    The latents; with step caching, how many steps were computed.
  """
  rows, length, _ = batch["noise"].shape
  # Runs once a shape, when it is traced.
  logging.info(
    "Compiling the sampler: batch %d of %d tokens, %d steps, %s.",
    *(rows, length, len(table.timesteps)),
    "without guidance"
    if guidance is None
    else f"with guidance in {('one batch', 'two passes')[passes - 1]}",
  )
  names = ("coordinates", "grid", "image_size", "aspect_ratio")
  halves = 1 if guidance is None else 2

  def by_pass(*of_halves: Array) -> Array:
    stacked = jnp.stack(of_halves)
    return stacked.reshape(passes, -1, *stacked.shape[2:])

  params = laid_out(params, compute)
  given = {name: by_pass(*[batch[name]] * halves) for name in names}
  captions = ("negative", "caption")[-halves:]
  embeddings, mask = (
    by_pass(*(batch[f"{half}_{what}"] for half in captions))
    for what in ("embeddings", "mask")
  )
  given["caption_mask"] = mask
  given["caption_kv"] = _each_pass(
    lambda *captions: caption_keys_values(params, config, compute, *captions),
    *(embeddings, mask),
  )
  token_mask = tokens.token_mask(batch["grid"], length)
  model = PixArt(config, compute)

  def denoise(
    noisy_latents: Array, timestep: Array, memory: Any
  ) -> tuple[Prediction, Any]:
    def call(method: str, *arguments: Any) -> Any:
      return model.apply(
        {"params": params},
        *arguments,
        # Random token discarding: a new draw at each step, shared by all images.
        rngs={"kv_discard": jax.random.key(timestep.astype(jnp.uint32))},
        method=method,
      )

    def at_step(given: Batch) -> Conditions:
      return Conditions(timesteps=jnp.full(len(given["grid"]), timestep), **given)

    def network(noisy: Array, given: Batch) -> Array:
      return call("on_tokens", noisy, at_step(given))

    def first_block(noisy: Array, given: Batch) -> tuple[Array, Any, Array]:
      conditions = at_step(given)
      before, embedded = call("enter", noisy, conditions)
      x = call("go_through", range(1), before, embedded, conditions)
      return x, embedded, x - before

    def other_blocks(x: Array, embedded: Any, given: Batch) -> Array:
      others = range(1, config.depth)
      return call("go_through", others, x, embedded, at_step(given)) - x

    noisy = by_pass(*[noisy_latents] * halves)
    if threshold is None:
      output = _each_pass(network, noisy, given)
    else:
      x, embedded, first = _each_pass(first_block, noisy, given)
      x, memory = step_caching.add_rest(
        memory,
        x,
        first,
        lambda: _each_pass(other_blocks, x, embedded, given),
        token_mask,
        threshold,
      )
      output = _each_pass(lambda *arguments: call("leave", *arguments), x, embedded)
    output = output.reshape(halves * rows, *output.shape[2:])
    noise, logits = split_prediction(output, config)
    if guidance is None:
      return Prediction(noise, logits), memory
    unconditional, noise = jnp.split(noise, 2)
    logits = None if logits is None else jnp.split(logits, 2)[1]
    scale = scale_within(
      timestep, guidance.scale, guidance.low, guidance.high, SCHEDULE.num_timesteps
    )
    if table.spread is None:
      guided = guide(unconditional, noise, scale)
    else:  # as the reference's `forward_with_cfg`, which only this sampler calls
      guided = guide_first_three(unconditional, noise, scale, config.in_channels)
    noise = rescale(guided, noise, guidance.rescale, token_mask)
    return Prediction(noise, logits), memory

  def fresh_noise(step: Array) -> Array:
    # Of the image's seed and the step alone: the first noise is of the seed itself.
    shape = batch["noise"].shape[1:]
    return jax.vmap(
      lambda seed: jax.random.normal(
        jax.random.fold_in(jax.random.key(seed), step), shape
      )
    )(batch["seed"])

  memory = None
  if threshold is not None:
    shape = (passes, halves * rows // passes, length, config.width)
    memory = step_caching.nothing_yet(shape, rows)
  latents, memory = solve_remembering(
    denoise, batch["noise"], table, fresh_noise, memory
  )
  return latents, None if memory is None else memory.computed


def _each_pass(function: Callable[..., Any], *arguments: Any) -> Any:
  """`function` of every pass's arguments; never two passes at a time in memory."""
  (passes,) = {len(leaf) for leaf in jax.tree.leaves(arguments)}
  if passes == 1:  # a loop of one turn would keep XLA from seeing across it
    first = function(*jax.tree.map(lambda leaf: leaf[0], arguments))
    return jax.tree.map(lambda leaf: leaf[None], first)
  return jax.lax.map(lambda one: function(*one), arguments)
