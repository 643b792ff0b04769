"""One compiled program from noise to latents: the solver, guidance and the network.

`sample` takes all steps in one program. `start` and `step` are the same in pieces, for
a loop in Python that sees the latents between two steps.

The branches of guidance, without and with the prompt and perhaps with a weakened
network, go through the network as one batch or one after the other. Arrays of the
network therefore begin with two axes, `[passes rows …]`; laid end to end these are the
branches, the unconditional first.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32

from pixsigma_jax.diffusion.guidance import (
  guide,
  guide_away,
  guide_first_three,
  guide_from_optimal,
  guide_projected,
  rescale,
  scale_within,
)
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.diffusion.solvers import (
  Prediction,
  RememberingDenoiser,
  SolverState,
  SolverTable,
  solve_remembering,
  start_state,
  take_step,
)
from pixsigma_jax.mesh_axes import (
  CONTEXT,
  DATA,
  FSDP,
  GUIDANCE,
  ROWS,
  network_rows,
)
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

# Tokens of one half on a device, up to which both halves go as one batch. One image
# of 512 px has about 1024: below, a pass costs a small chip as much as the batch does,
# since it waits for the parameters. One of 1024 px has 4096: there two passes take as
# long (v5e, v5p) or less (v6e, whose fast memory holds one half), in half the memory.
_TOKENS_OF_ONE_BATCH = 2048


class Weakened(NamedTuple):
  """A weakened network to guide away from: how far, and its layers, bool `[layers]`."""

  scale: Any
  layers: Any


class Weaker(NamedTuple):
  """Another network to guide away from: how far, and its parameters."""

  scale: Any
  params: Any


class Projection(NamedTuple):
  """What `guide_projected` takes beside the scale."""

  momentum: Any
  threshold: Any
  eta: Any


class Guidance(NamedTuple):
  """Guidance settings that join the branches of a prediction; all traced.

  Attributes:
    scale: from the unconditional prediction; None makes none.
    low, high: see `scale_within`; of every kind of guidance.
    rescale: see `rescale`.
    perturbed: whose self-attention is the identity; or None.
    skipped: whose blocks are left out; or None.
    projection: to join predictions by `guide_projected`; or None.
    weaker: a worse network, of the hyper-parameters `weak_config`; or None.
  """

  scale: Any
  low: Any
  high: Any
  rescale: Any
  perturbed: Weakened | None = None
  skipped: Weakened | None = None
  projection: Projection | None = None
  weaker: Weaker | None = None


class _Memory(NamedTuple):
  """What the solver's scan carries beside latents; None for what is not asked for."""

  caching: Any
  average: Any


def compute_here(dtype: str = "bfloat16", attention: str = "auto") -> Compute:
  """The best settings of computation on the devices that JAX has."""
  on_cpu = jax.default_backend() == "cpu"
  return Compute(dtype=jnp.dtype(dtype), attention=attention, unroll=on_cpu)


def passes_by_size(rows: int, length: int, mesh: Mesh | AbstractMesh | None) -> int:
  """Best number of passes for both halves of guidance: 1 or 2.

  Args:
    rows: images of a batch.
    length: tokens of each.
    mesh: devices that share the rows and their tokens.
  """
  devices = 1
  if mesh is not None:
    devices = mesh.shape[DATA] * mesh.shape[FSDP] * mesh.shape[CONTEXT]
  return 1 if rows * length <= devices * _TOKENS_OF_ONE_BATCH else 2


def count_branches(guidance: Guidance | None, captions: int) -> int:
  """Branches of guidance of images with so many captions each; see `_Drawing`."""
  if guidance is None:
    return captions
  weakened = (guidance.perturbed is not None) + (guidance.skipped is not None)
  return (guidance.scale is not None) + captions * (1 + weakened)


_STATIC = ("config", "compute", "passes", "cfg_zero", "weak_config")


@functools.partial(jax.jit, static_argnames=_STATIC)
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
  cfg_zero: bool = False,
  weak_config: PixArtConfig | None = None,
) -> tuple[Float32[Array, "b n c"], Computed | None]:
  """From noise to latents of any grids, as padded sequences.

  Args:
    batch: a row an image: noise `[b n c]`, seed `[b]`, coordinates `[b n 2]`, grid
      `[b 2]`, image_size `[b 2]`, aspect_ratio `[b]`, caption_embeddings `[b t e]`,
      caption_mask `[b t]`; negative_embeddings, negative_mask for guidance; and to
      keep parts of an image, original `[b n c]`, its scaled latents, original_noise
      `[b n c]`, the noise over them, and redrawn, bool `[b n c]`, what is not kept.
      With k captions for each image, areas `[b k n c]` are the weights of their
      predictions, and region_1_embeddings, region_1_mask … the others than the first.
    threshold: of step caching; None computes every step and remembers nothing.
    passes: 2 takes the branches of guidance one after the other, or as many at a time
      as the mesh has groups of devices for.
    cfg_zero: join predictions by `guide_from_optimal`.
    weak_config: of `guidance.weaker`.

  Returns:
    The latents; with step caching, how many steps were computed.
  """
  _log_compilation("sampler", batch, table, guidance, passes)
  drawing = _Drawing(
    *(params, batch, table, guidance, threshold),
    *(config, compute, passes, cfg_zero, weak_config),
  )
  latents, memory = solve_remembering(
    drawing.denoiser(drawing.conditions()),
    batch["noise"],
    table,
    drawing.fresh_noise,
    drawing.nothing_remembered(),
    drawing.after_step(),
  )
  return latents, None if memory.caching is None else memory.caching.computed


@functools.partial(jax.jit, static_argnames=_STATIC)
def start(
  params: Any,
  batch: Batch,
  table: SolverTable,
  guidance: Guidance | None,
  threshold: Any = None,
  **static: Any,
) -> tuple[Batch, SolverState]:
  """What `sample` works out before its first step; `step` goes on from there.

  Arguments are those of `sample`; `static` are those by name.

  Returns:
    What the network is conditioned on, and the state before the first step.
  """
  drawing = _Drawing(params, batch, table, guidance, threshold, **static)
  memory = drawing.nothing_remembered()
  return drawing.conditions(), drawing.spread(
    start_state(batch["noise"], table, memory)
  )


@functools.partial(jax.jit, static_argnames=_STATIC)
def step(
  params: Any,
  batch: Batch,
  table: SolverTable,
  guidance: Guidance | None,
  threshold: Any,
  conditions: Batch,
  state: SolverState,
  number: Any,
  **static: Any,
) -> tuple[SolverState, Float32[Array, "b n c"]]:
  """One step of `sample`, for a loop that looks at latents in between.

  Compiled once, whatever the number of steps: `number` is traced. Other arguments are
  those of `sample`, and what `start` has returned.

  Returns:
    The next state, and the clean latents as the step has estimated them.
  """
  _log_compilation("sampler's step", batch, table, guidance, static["passes"])
  drawing = _Drawing(params, batch, table, guidance, threshold, **static)
  row = jax.tree.map(lambda column: column[number], table)
  denoise = drawing.denoiser(conditions)
  state, clean = take_step(
    denoise, state, number, row, drawing.fresh_noise, drawing.after_step()
  )
  return drawing.spread(state), clean


def _log_compilation(
  what: str, batch: Batch, table: SolverTable, guidance: Guidance | None, passes: int
) -> None:
  """Runs once a shape, when a program is traced."""
  rows, length, _ = batch["noise"].shape
  logging.info(
    "Compiling the %s: batch %d of %d tokens, %d steps, %s.",
    *(what, rows, length, len(table.timesteps)),
    "without guidance"
    if guidance is None
    else f"with guidance in {('one batch', 'two passes')[passes - 1]}",
  )


def caption_names(count: int) -> list[str]:
  """Names under which a batch has its captions: the prompt's, then of regions."""
  return ["caption", *(f"region_{i}" for i in range(1, count))]


@dataclasses.dataclass(frozen=True)
class _Drawing:
  """The parts of `sample`, whose arguments these are."""

  params: Any
  batch: Batch
  table: SolverTable
  guidance: Guidance | None
  threshold: Any
  config: PixArtConfig
  compute: Compute
  passes: int
  cfg_zero: bool = False
  weak_config: PixArtConfig | None = None

  @property
  def guided(self) -> bool:
    """Whether there is an unconditional branch."""
    return self.guidance is not None and self.guidance.scale is not None

  @functools.cached_property
  def weakened(self) -> dict[str, Weakened]:
    """Weakened networks, by the condition that says which layers."""
    if self.guidance is None:
      return {}
    kinds = {
      "identity_attention": self.guidance.perturbed,
      "skipped": self.guidance.skipped,
    }
    return {name: kind for name, kind in kinds.items() if kind is not None}

  @property
  def weaker(self) -> Weaker | None:
    """Another network to guide away from."""
    return None if self.guidance is None else self.guidance.weaker

  @property
  def regions(self) -> int:
    """Number of captions whose predictions are averaged, one for each region."""
    return self.batch["areas"].shape[1] if "areas" in self.batch else 1

  @property
  def captions(self) -> list[str]:
    """The captions of the branches, in their order."""
    own = caption_names(self.regions)
    return ["negative"] * self.guided + own * (1 + len(self.weakened))

  def averaged(self, predictions: Sequence[Array]) -> Array:
    """Predictions of all regions as one, each weighing what its region does there."""
    if len(predictions) == 1:
      return predictions[0]
    areas = self.batch["areas"]
    weighted = [areas[:, i] * one for i, one in enumerate(predictions)]
    return functools.reduce(jnp.add, weighted)

  def by_pass(self, *of_branches: Array) -> Array:
    """Arrays `[rows …]` of the branches as `[passes rows …]`."""
    stacked = jnp.stack(of_branches)
    # All branches everywhere, of which a device takes its own: left to itself, XLA
    # makes each on one group of devices and sends it to the others.
    rest = [P.UNCONSTRAINED] * (stacked.ndim - 2)
    stacked = self.placed(stacked, None, ROWS, *rest)
    return stacked.reshape(self.passes_of(len(of_branches)), -1, *stacked.shape[2:])

  def passes_of(self, branches: int) -> int:
    """Calls of the network for so many branches."""
    mesh = self.compute.mesh
    at_once = 1 if mesh is None else mesh.shape.get(GUIDANCE, 1)
    return branches // at_once if self.passes == 2 else 1

  def placed(self, x: Array, *axes: Any) -> Array:
    """An array whose axes lie over these of the mesh, if devices share the work."""
    mesh = self.compute.mesh
    if mesh is None or mesh.size == 1:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))

  def for_network(self, x: Float32[Array, "p r n c"]) -> Float32[Array, "p r n c"]:
    """Hands every device its own rows and tokens."""
    mesh = self.compute.mesh
    return x if mesh is None else self.placed(x, None, network_rows(mesh), CONTEXT)

  def spread(self, state: SolverState) -> SolverState:
    """The state between two steps, as it lies before each: one program takes all."""
    latents, *history = (
      self.placed(x, ROWS, CONTEXT) for x in (state.latents, *state.history)
    )
    caching, average = state.memory
    if caching is not None:
      first, rest = map(self.for_network, (caching.first, caching.rest))
      caching = caching._replace(first=first, rest=rest)
    if average is not None:
      average = self.placed(average, ROWS, CONTEXT)
    return SolverState(latents, tuple(history), _Memory(caching, average))

  def conditions(self) -> Batch:
    """What the network is conditioned on in every step; a weaker one, by `weaker`."""
    config, branches = self.config, len(self.captions)
    given = self.conditions_of(self.params, config, self.captions)
    if self.weaker is not None:
      own = caption_names(self.regions)
      assert self.weak_config is not None
      given["weaker"] = self.conditions_of(self.weaker.params, self.weak_config, own)
    regions = self.regions
    first = branches - regions * len(self.weakened)
    for name, kind in self.weakened.items():
      whole = jnp.zeros((len(self.batch["noise"]), config.depth), bool)
      weak = jnp.broadcast_to(kind.layers, whole.shape)
      given[name] = self.by_pass(
        *(weak if first <= i < first + regions else whole for i in range(branches))
      )
      first += regions
    return given

  def conditions_of(
    self, params: Any, config: PixArtConfig, captions: Sequence[str]
  ) -> Batch:
    """Sizes and captions of branches, as a network with these parameters takes them."""
    compute, batch = self.compute, self.batch
    params = laid_out(params, compute)
    names = ("coordinates", "grid", "image_size", "aspect_ratio")
    given = {name: self.by_pass(*[batch[name]] * len(captions)) for name in names}
    embeddings, mask = (
      self.by_pass(*(batch[f"{caption}_{what}"] for caption in captions))
      for what in ("embeddings", "mask")
    )
    given["caption_mask"] = mask
    given["caption_kv"] = _each_pass(
      lambda *captions: caption_keys_values(params, config, compute, *captions),
      *(embeddings, mask),
    )
    return given

  def nothing_remembered(self) -> _Memory:
    """The memory before the first step."""
    memory = _Memory(caching=None, average=None)
    rows, length, _ = self.batch["noise"].shape
    if self.threshold is not None:
      branches = len(self.captions)
      passes = self.passes_of(branches)
      shape = (passes, branches * rows // passes, length, self.config.width)
      memory = memory._replace(caching=step_caching.nothing_yet(shape, rows))
    if self.guidance is not None and self.guidance.projection is not None:
      memory = memory._replace(
        average=jnp.zeros(self.batch["noise"].shape, jnp.float32)
      )
    return memory

  def fresh_noise(self, step: Array) -> Float32[Array, "b n c"]:
    """Noise of a step: of the image's seed and the step alone.

    The first noise is of the seed itself.
    """
    shape = self.batch["noise"].shape[1:]
    return jax.vmap(
      lambda seed: jax.random.normal(
        jax.random.fold_in(jax.random.key(seed), step), shape
      )
    )(self.batch["seed"])

  def after_step(self) -> Callable[[Array, Array], Array] | None:
    """Puts back what is kept of an image, under the noise that the next step expects.

    After the last step there is none. With one noise for all steps (RePaint, Lugmayr
    et al. 2022, equation 8, but for that: as diffusers' inpainting has it).
    """
    if "redrawn" not in self.batch:
      return None
    original, noise, redrawn = (
      self.batch[name] for name in ("original", "original_noise", "redrawn")
    )
    signal_scale = jnp.append(self.table.signal_scale[1:], 1.0)
    noise_scale = jnp.append(self.table.noise_scale[1:], 0.0)

    def put_back(number: Array, latents: Array) -> Array:
      kept = signal_scale[number] * original + noise_scale[number] * noise
      return jnp.where(redrawn, latents, kept)

    return put_back

  def denoiser(self, given: Batch) -> RememberingDenoiser:
    """The network with its guidance; `given` is what `conditions` says."""
    config, guidance, threshold = self.config, self.guidance, self.threshold
    rows, length, _ = self.batch["noise"].shape
    branches = len(self.captions)
    params = laid_out(self.params, self.compute)
    token_mask = tokens.token_mask(self.batch["grid"], length)
    model = PixArt(config, self.compute)
    weak_given = given.get("weaker")
    given = {name: what for name, what in given.items() if name != "weaker"}

    def denoise(
      noisy_latents: Array, row: SolverTable, memory: _Memory
    ) -> tuple[Prediction, _Memory]:
      timestep, caching, average = row.timesteps, memory.caching, memory.average

      # Random token discarding: a new draw at each step, shared by all images.
      rngs = {"kv_discard": jax.random.key(timestep.astype(jnp.uint32))}

      def call(method: str, *arguments: Any) -> Any:
        return model.apply({"params": params}, *arguments, rngs=rngs, method=method)

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

      def weaker_noise() -> Array | None:
        if self.weaker is None or self.weak_config is None:
          return None
        weak = PixArt(self.weak_config, self.compute)
        weak_params = laid_out(self.weaker.params, self.compute)

        def network(noisy: Array, given: Batch) -> Any:
          conditions = at_step(given)
          variables = {"params": weak_params}
          return weak.apply(variables, noisy, conditions, rngs=rngs, method="on_tokens")

        noisy = self.by_pass(*[noisy_latents] * self.regions)
        output = _each_pass(network, noisy, weak_given)
        output = output.reshape(self.regions * rows, *output.shape[2:])
        noise, _ = split_prediction(output, self.weak_config)
        return self.averaged(jnp.split(noise, self.regions))

      noisy = self.for_network(self.by_pass(*[noisy_latents] * branches))
      if threshold is None:
        output = _each_pass(network, noisy, given)
      else:
        x, embedded, first = _each_pass(first_block, noisy, given)
        x, caching = step_caching.add_rest(
          caching,
          x,
          first,
          lambda: _each_pass(other_blocks, x, embedded, given),
          token_mask,
          threshold,
        )
        output = _each_pass(lambda *arguments: call("leave", *arguments), x, embedded)
      output = output.reshape(branches * rows, *output.shape[2:])
      noise, logits = split_prediction(output, config)
      # Each device gets what all branches say of its tokens.
      noise = noise.reshape(branches, rows, *noise.shape[1:])
      noise = self.placed(noise, None, ROWS, CONTEXT)
      noise = noise.reshape(branches * rows, *noise.shape[2:])
      if branches == 1 and guidance is None:
        return Prediction(noise, logits), _Memory(caching, average)
      predictions = jnp.split(noise, branches)
      own = slice(self.guided, self.guided + self.regions)
      if logits is not None:
        logits = self.averaged(jnp.split(logits, branches)[own])
      if guidance is None:
        noise = self.averaged(predictions)
        return Prediction(noise, logits), _Memory(caching, average)
      noise, average = self._guide(
        guidance, predictions, weaker_noise(), noisy_latents, row, average, token_mask
      )
      return Prediction(noise, logits), _Memory(caching, average)

    return denoise

  def _guide(
    self,
    guidance: Guidance,
    predictions: list[Array],
    weaker: Array | None,
    noisy_latents: Array,
    row: SolverTable,
    average: Any,
    token_mask: Array,
  ) -> tuple[Array, Any]:
    """The branches' noise joined to one, and the average that `apg` remembers."""
    unconditional, *predictions = predictions if self.guided else (None, *predictions)
    kinds = range(0, len(predictions), self.regions)
    noise, *weak = (self.averaged(predictions[i : i + self.regions]) for i in kinds)

    def scale_now(
      scale: Any, outside: float, low: Any = guidance.low, high: Any = guidance.high
    ) -> Array:
      total = SCHEDULE.num_timesteps
      return scale_within(row.timesteps, scale, low, high, total, outside)

    joined = noise
    if unconditional is not None:
      scale = scale_now(guidance.scale, 1.0)
      if guidance.projection is not None:
        clean, average = guide_projected(
          _clean(row, noisy_latents, unconditional),
          _clean(row, noisy_latents, noise),
          scale,
          token_mask,
          average,
          **guidance.projection._asdict(),
        )
        joined = (noisy_latents - row.signal_scale * clean) / row.noise_scale
      elif self.cfg_zero:
        joined = guide_from_optimal(unconditional, noise, scale, token_mask)
      elif self.table.spread is None:
        joined = guide(unconditional, noise, scale)
      else:  # as the reference's `forward_with_cfg`, which only this sampler calls
        joined = guide_first_three(unconditional, noise, scale, self.config.in_channels)
    for prediction, kind in zip(weak, self.weakened.values(), strict=True):
      joined = guide_away(joined, noise, prediction, scale_now(kind.scale, 0.0))
    if weaker is not None and self.weaker is not None:
      joined = guide_away(joined, noise, weaker, scale_now(self.weaker.scale, 0.0))
    return rescale(joined, noise, guidance.rescale, token_mask), average


def _clean(row: SolverTable, noisy_latents: Array, noise: Array) -> Array:
  """The clean estimate that goes with a prediction of noise."""
  noise = noise.astype(jnp.float32)
  return (noisy_latents - row.noise_scale * noise) / row.signal_scale


def _each_pass(function: Callable[..., Any], *arguments: Any) -> Any:
  """`function` of every pass's arguments; never two passes at a time in memory."""
  (passes,) = {len(leaf) for leaf in jax.tree.leaves(arguments)}
  if passes == 1:  # a loop of one turn would keep XLA from seeing across it
    first = function(*jax.tree.map(lambda leaf: leaf[0], arguments))
    return jax.tree.map(lambda leaf: leaf[None], first)
  return jax.lax.map(lambda one: function(*one), arguments)
