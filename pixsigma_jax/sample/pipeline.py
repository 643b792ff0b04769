"""From a trained model and prompts to pictures.

Names and defaults are those of diffusers' `PixArtSigmaPipeline`, with one difference:
the unconditional half of the default negative prompt sees the null caption under the
mask of the picture's own caption, as the published training and sampling code do
(`PixArt_blocks.py: CaptionEmbedder.token_drop`), not under a mask of one token.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Float32
from PIL import Image

import pixsigma_jax
from pixsigma_jax import checkpoint
from pixsigma_jax.diffusion.guidance import guide
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.diffusion.solvers import SolverTable, dpm_solver_pp, solve
from pixsigma_jax.models import tokens
from pixsigma_jax.models.autoencoders import autoencoder_from
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt, PixArtConfig, split_prediction
from pixsigma_jax.models.text_encoders import text_encoder_from
from pixsigma_jax.models.tokens import Grid
from pixsigma_jax.sample import pictures

Sides: TypeAlias = int | Sequence[int] | None
Batch: TypeAlias = dict[str, Any]

# Name of a sampler → where DPM-Solver++ ends, see `dpm_solver_pp`.
SAMPLERS = {"dpm++": "diffusers", "dpm++-reference": "reference"}

_SCHEDULE = linear_schedule()
_DEFAULT_COMPUTE = Compute()
# Sequences are padded to a multiple of this share of the training grid's tokens: the
# buckets of a resolution, all near the same area, share two or three programs.
_LENGTHS_PER_GRID = 16
# Areas, relative to the training resolution's, beyond which a size is remarked upon,
# or refused because the positions of its tokens lie too far from any that were learned.
_UNUSUAL_AREA, _IMPOSSIBLE_AREA = 2.0, 4.5


@dataclasses.dataclass(frozen=True)
class Output:
  """Pictures, and for each of them everything that it takes to make it again."""

  images: list[Image.Image]
  settings: list[dict[str, Any]]

  def grid(self, columns: int | None = None) -> Image.Image:
    """All pictures in one, each over its prompt: see `pictures.grid`."""
    labels = [settings["prompt"] for settings in self.settings]
    return pictures.grid(self.images, columns, labels)


class _Request(NamedTuple):
  """One picture to make."""

  prompt: str
  seed: int
  height: int
  width: int
  grid: Grid


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A model ready to draw: `Pipeline.from_checkpoint(path)(prompt).images[0]`.

  A picture depends on its prompt, seed, size and settings, and not on what else is
  asked for in the call, to the bit on one machine: every program takes exactly
  `batch_size` rows, filled up if need be, and a row is never longer or shorter than its
  own size asks for. Another `batch_size`, mesh or processor rounds differently.

  Attributes:
    config: the model's hyper-parameters.
    params: the model's parameters.
    null_caption: `[t e]`, what a dropped caption was replaced with in training.
    autoencoder: see `models/autoencoders.py`.
    text_encoder: see `models/text_encoders.py`.
    resolution: side in pixels of the square pictures that the model was trained on.
    compute: precision and implementation of the network.
    batch_size: pictures that are drawn at once. One large picture fills an
      accelerator; for small ones 16 or 64 are faster.
    origin: further facts for every picture's settings, such as the checkpoint's path.

  Raises:
    ValueError: the parts do not fit each other.
  """

  config: PixArtConfig
  params: Any
  null_caption: Float[Array, "t e"] | Float[np.ndarray, "t e"]
  autoencoder: Any
  text_encoder: Any
  resolution: int
  compute: Compute = _DEFAULT_COMPUTE
  batch_size: int = 1
  origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    config = self.config
    pairs = {
      "latent channels": (config.in_channels, self.autoencoder.channels, "autoencoder"),
      "caption width": (config.caption_width, self.text_encoder.width, "text encoder"),
      "null caption": (
        (config.caption_length, config.caption_width),
        tuple(self.null_caption.shape),
        "null caption",
      ),
    }
    for name, (ours, theirs, whose) in pairs.items():
      if ours != theirs:
        raise ValueError(
          f"The model has {name} {ours} and the {whose} {theirs}: these are not the "
          "parts that were trained together."
        )
    if self.batch_size < 1:
      raise ValueError(f"batch_size {self.batch_size} must be at least 1.")

  @classmethod
  def from_checkpoint(
    cls,
    path: str | os.PathLike[str],
    *,
    compute: Compute = _DEFAULT_COMPUTE,
    batch_size: int = 1,
  ) -> "Pipeline":
    """The model of a snapshot: a run's workdir (its newest), or one of its snapshots.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or needs an encoder that this version does not have.
    """
    snapshot = checkpoint.read_snapshot(os.fspath(path))
    metadata = snapshot.metadata
    return cls(
      config=snapshot.config,
      params=snapshot.params,
      null_caption=snapshot.null_caption,
      autoencoder=autoencoder_from(metadata.autoencoder, metadata.scaling_factor),
      text_encoder=text_encoder_from(metadata.text_encoder),
      resolution=metadata.resolution,
      compute=compute,
      batch_size=batch_size,
      origin={
        "checkpoint": str(snapshot.path),
        "stage": metadata.stage,
        "step": snapshot.step,
      },
    )

  def replace(self, **fields: Any) -> "Pipeline":
    """This pipeline with other `params`, say; compiled programs stay shared.

    Programs belong to hyper-parameters and shapes, so pipelines of several checkpoints
    of one architecture share them too.
    """
    return dataclasses.replace(self, **fields)

  def __call__(
    self,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str = "",
    height: Sides = None,
    width: Sides = None,
    num_inference_steps: int = 20,
    guidance_scale: float | int = 4.5,
    seed: int = 0,
    sampler: str = "dpm++",
    num_images_per_prompt: int = 1,
  ) -> Output:
    """Draws the prompts; arguments and errors are those of `stream`."""
    drawn = self.stream(
      prompt,
      negative_prompt=negative_prompt,
      height=height,
      width=width,
      num_inference_steps=num_inference_steps,
      guidance_scale=guidance_scale,
      seed=seed,
      sampler=sampler,
      num_images_per_prompt=num_images_per_prompt,
    )
    in_order = sorted(drawn, key=lambda item: item[0])
    return Output([item[1] for item in in_order], [item[2] for item in in_order])

  def stream(
    self,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str,
    height: Sides,
    width: Sides,
    num_inference_steps: int,
    guidance_scale: float | int,
    seed: int,
    sampler: str,
    num_images_per_prompt: int,
  ) -> Iterator[tuple[int, Image.Image, dict[str, Any]]]:
    """Draws the prompts and hands over (number, picture, settings) as they are ready.

    Pictures of one size come in the order of their numbers.

    Args:
      prompt: one or several.
      negative_prompt: what guidance leads away from; "" is the null caption of the
        training.
      height, width: in pixels, one for all or one for each prompt; None for the
        resolution of the training.
      num_inference_steps: calls of the network.
      guidance_scale: how far guidance goes; 1 draws without, in half the time.
      seed: of the first picture; picture i has seed + i.
      sampler: a key of `SAMPLERS`.
      num_images_per_prompt: pictures of each prompt, one after the other.

    Raises:
      ValueError: an argument is out of its range, a size does not go with the model, or
        a caption is too long. All before the first picture is begun.
      ValueError: a picture is not made of finite numbers.
    """
    if sampler not in SAMPLERS:
      raise ValueError(
        f"Unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}."
      )
    if not math.isfinite(guidance_scale):
      raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale}.")
    requests = self._requests(prompt, height, width, seed, num_images_per_prompt)
    self._check_captions([negative_prompt, *(r.prompt for r in requests)])
    table = dpm_solver_pp(_SCHEDULE, num_inference_steps, SAMPLERS[sampler])
    settings = {
      "negative_prompt": negative_prompt,
      "num_inference_steps": num_inference_steps,
      "guidance_scale": guidance_scale,
      "sampler": sampler,
      "dtype": jnp.dtype(self.compute.dtype).name,
      "batch_size": self.batch_size,
      "pixsigma_jax": pixsigma_jax.__version__,
      **self.origin,
    }
    return self._draw(requests, table, negative_prompt, float(guidance_scale), settings)

  def _requests(
    self,
    prompt: str | Sequence[str],
    height: Sides,
    width: Sides,
    seed: int,
    num_images_per_prompt: int,
  ) -> list[_Request]:
    """One request a picture, its size checked."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
      raise ValueError("There is no prompt to draw.")
    if num_images_per_prompt < 1:
      raise ValueError(f"{num_images_per_prompt=} must be at least 1.")
    heights = self._sides("height", height, len(prompts))
    widths = self._sides("width", width, len(prompts))
    sizes = list(zip(heights, widths, strict=True))
    grids = {size: self._grid(*size) for size in dict.fromkeys(sizes)}
    count = len(prompts) * num_images_per_prompt
    if seed < 0 or seed + count > 2**32:
      raise ValueError(
        f"{count} pictures from seed {seed} on: seeds must lie in 0 … {2**32 - 1}."
      )
    return [
      _Request(prompts[i], seed + number, *sizes[i], grids[sizes[i]])
      for number in range(count)
      for i in [number // num_images_per_prompt]
    ]

  def _sides(self, name: str, sides: Sides, count: int) -> list[int]:
    if sides is None:
      return [self.resolution] * count
    if isinstance(sides, int):
      return [sides] * count
    if len(sides) != count:
      raise ValueError(
        f"{name} has {len(sides)} values for {count} prompts: give one for all, or one "
        "for each."
      )
    return list(sides)

  def _grid(self, height: int, width: int) -> Grid:
    """The token grid of pictures of this size, if the model can draw them."""
    config = self.config
    unit = self.autoencoder.downsampling * config.patch_size
    if min(height, width) < 1 or height % unit or width % unit:
      near = " x ".join(
        str(max(1, round(side / unit)) * unit) for side in (height, width)
      )
      raise ValueError(
        f"A picture of {height} x {width} pixels (height x width) cannot be cut into "
        f"tokens: both sides must be multiples of {unit}, for example {near}."
      )
    grid = (height // unit, width // unit)
    count, learned = grid[0] * grid[1], config.base_size**2
    if not 1 / _IMPOSSIBLE_AREA <= count / learned <= _IMPOSSIBLE_AREA:
      raise ValueError(
        f"A picture of {height} x {width} pixels (height x width) has {grid[0]} x "
        f"{grid[1]} tokens, but the checkpoint's position embedding is laid out for "
        f"base_size={config.base_size}, {config.base_size} x {config.base_size}: it "
        f"would draw nothing sensible. Ask for --height and --width near "
        f"{config.base_size * unit} x {config.base_size * unit}, or train a stage at "
        "this size after the transform interpolate_pe with "
        f"base_size={round(count**0.5)}."
      )
    area = height * width / self.resolution**2
    if not 1 / _UNUSUAL_AREA <= area <= _UNUSUAL_AREA:
      logging.warning(
        "A picture of %d x %d pixels has %.2g times the area of those that this "
        "checkpoint was trained on (%d x %d): expect it to be worse.",
        height,
        width,
        area,
        self.resolution,
        self.resolution,
      )
    return grid

  def _check_captions(self, captions: Sequence[str]) -> None:
    length = self.config.caption_length
    for caption in dict.fromkeys(captions):
      if self.text_encoder.count(caption) > length:
        self.text_encoder.encode([caption], length)  # refuses it, in its own words

  def _draw(
    self,
    requests: list[_Request],
    table: SolverTable,
    negative_prompt: str,
    guidance_scale: float,
    settings: dict[str, Any],
  ) -> Iterator[tuple[int, Image.Image, dict[str, Any]]]:
    """Draws requests of one sequence length together, `batch_size` at a time."""
    numbers_by_length: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
      numbers_by_length.setdefault(self._length(request.grid), []).append(number)
    for length, numbers in numbers_by_length.items():
      for start in range(0, len(numbers), self.batch_size):
        chosen = numbers[start : start + self.batch_size]
        # Rows nobody asked for keep the program, and with it every rounding, the same.
        rows = chosen + chosen[-1:] * (self.batch_size - len(chosen))
        batch = self._batch(
          [requests[number] for number in rows],
          length,
          None if guidance_scale == 1 else negative_prompt,
        )
        sequences = np.asarray(
          _sample(
            self.params,
            batch,
            table,
            jnp.float32(guidance_scale),
            config=self.config,
            compute=self.compute,
          )
        )
        for row, number in enumerate(chosen):
          request = requests[number]
          picture = self._decode(sequences[row], request)
          about = {
            "prompt": request.prompt,
            "seed": request.seed,
            "height": request.height,
            "width": request.width,
          }
          yield number, picture, about | settings

  def _length(self, grid: Grid) -> int:
    """Tokens that a picture's sequence is padded to: a function of its size alone."""
    multiple = max(1, self.config.base_size**2 // _LENGTHS_PER_GRID)
    return -(-grid[0] * grid[1] // multiple) * multiple

  def _batch(
    self, requests: list[_Request], length: int, negative_prompt: str | None
  ) -> Batch:
    """The program's arrays, a row a request; without a negative half if it is None."""
    config, limit = self.config, self.config.caption_length
    captions, mask = self.text_encoder.encode([r.prompt for r in requests], limit)
    batch = {
      "noise": np.stack([self._noise(r, length) for r in requests]),
      "coordinates": np.stack(
        [_padded(tokens.coordinates(r.grid, config.window), length) for r in requests]
      ),
      "grid": np.array([r.grid for r in requests], np.int32),
      "image_size": np.array([(r.height, r.width) for r in requests], np.float32),
      "aspect_ratio": np.array([r.height / r.width for r in requests], np.float32),
      "caption_embeddings": captions,
      "caption_mask": mask,
    }
    if negative_prompt is None:
      return batch
    if negative_prompt:
      negative, negative_mask = self.text_encoder.encode([negative_prompt], limit)
      negative_mask = np.broadcast_to(negative_mask, mask.shape)
    else:
      negative, negative_mask = np.asarray(self.null_caption)[None], mask
    negative = np.broadcast_to(negative, captions.shape)
    return batch | {"negative_embeddings": negative, "negative_mask": negative_mask}

  def _noise(self, request: _Request, length: int) -> Float32[np.ndarray, "n c"]:
    """Noise of the latents' own shape, from the seed alone, as padded tokens."""
    patch = self.config.patch_size
    shape = (*(side * patch for side in request.grid), self.config.in_channels)
    latents = np.asarray(jax.random.normal(jax.random.key(request.seed), shape))
    return _padded(tokens.to_tokens(latents, patch, self.config.window), length)

  def _decode(
    self, sequence: Float32[np.ndarray, "n c"], request: _Request
  ) -> Image.Image:
    latents = tokens.from_tokens(
      sequence, request.grid, self.config.patch_size, self.config.window
    )
    if not np.isfinite(latents).all():
      raise ValueError(
        f"The picture of {request.prompt!r} (seed {request.seed}) is not made of "
        "finite numbers: the parameters have diverged, or the dtype overflows. Try an "
        "earlier step of the checkpoint, or float32."
      )
    # One at a time: pictures may differ in size, and large ones fill the memory.
    images = self.autoencoder.decode(latents[None] / self.autoencoder.scaling_factor)
    return pictures.to_picture(np.asarray(images[0], np.float32))


def _padded(sequence: np.ndarray, length: int) -> np.ndarray:
  return np.pad(sequence, ((0, length - len(sequence)), (0, 0)))


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _sample(
  params: Any,
  batch: Batch,
  table: SolverTable,
  guidance_scale: Float32[Array, ""],
  *,
  config: PixArtConfig,
  compute: Compute,
) -> Float32[Array, "b n c"]:
  """From noise to latents of any grids, as padded sequences: solver and network in one.

  Args:
    batch: a row a picture: noise `[b n c]`, coordinates `[b n 2]`, grid `[b 2]`,
      image_size `[b 2]`, aspect_ratio `[b]`, caption_embeddings `[b t e]`, caption_mask
      `[b t]`; and negative_embeddings, negative_mask if there is to be guidance.
  """
  guided = "negative_embeddings" in batch
  rows, length, _ = batch["noise"].shape
  # Runs once a shape, when it is traced.
  logging.info(
    "Compiling the sampler: batch %d of %d tokens, %d steps, %s guidance.",
    rows,
    length,
    len(table.timesteps),
    "with" if guided else "without",
  )
  names = ("coordinates", "grid", "image_size", "aspect_ratio")
  images = {name: batch[name] for name in names}
  captions, mask = batch["caption_embeddings"], batch["caption_mask"]
  if guided:  # the unconditional half comes first
    images = {name: jnp.concatenate([x, x]) for name, x in images.items()}
    captions = jnp.concatenate([batch["negative_embeddings"], captions])
    mask = jnp.concatenate([batch["negative_mask"], mask])
  model = PixArt(config, compute)

  def denoise(noisy_latents: Array, timestep: Array) -> Array:
    if guided:
      noisy_latents = jnp.concatenate([noisy_latents, noisy_latents])
    output: Any = model.apply(
      {"params": params},
      noisy_latents,
      images["coordinates"],
      images["grid"],
      jnp.full(len(noisy_latents), timestep),
      captions,
      mask,
      images["image_size"],
      images["aspect_ratio"],
      # Tokens discarded at random: others in every step, the same in every picture.
      rngs={"kv_discard": jax.random.key(timestep.astype(jnp.uint32))},
      method="on_tokens",
    )
    noise, _ = split_prediction(output, config)
    if not guided:
      return noise
    unconditional, conditional = jnp.split(noise, 2)
    return guide(unconditional, conditional, guidance_scale)

  return solve(denoise, batch["noise"], table)
