"""From a trained model and prompts to images.

Names and defaults are those of diffusers' `PixArtSigmaPipeline`. These are all the
differences:

- The unconditional half of the default negative prompt sees the null caption under the
  mask of the image's own caption, as the published training and sampling code do
  (`PixArt_blocks.py: CaptionEmbedder.token_drop`), not under a mask of one token:
  `unconditional_mask` chooses.
- Prompts are taken as they are, as Σ was trained: `caption_cleaning` chooses, in place
  of `clean_caption`. One that is too long is refused, not cut at `max_sequence_length`.
- The samplers `lcm`, `tcd` and `dmd` draw without guidance by default; a negative
  `guidance_scale` is refused, not taken for none.
- `seed`, `sampler` and `use_karras_sigmas` stand in place of `generator`, `eta`,
  `sigmas` and an exchanged scheduler. JAX's noise is not torch's: equal seeds give
  other images. `latents` are one array an image, channels last.
- `height`, `width`, `seed` and `negative_prompt` can be each prompt's own. Sides are
  multiples of a token's, where diffusers asks for multiples of 8; sizes far from the
  training's are remarked upon or refused.
- `use_resolution_binning` has no effect where there is no table of sizes, which
  diffusers refuses; 2880 and 4096 have tables too. An image is resized in eight bits,
  by Lanczos' filter, not as floating-point numbers, bilinearly.
- `guidance_rescale`, `guidance_interval`, `guidance_method` with `apg_eta`,
  `apg_threshold` and `apg_momentum`, `skip_layer_guidance_scale` with
  `skip_guidance_layers`, and `step_caching` are more than it has. `pag_scale` and
  `pag_applied_layers` are its `PixArtSigmaPAGPipeline`'s; layers are numbers, none of
  which stands for others too, as its "blocks.1" does for 1 and 10 … 19.
- `refiner` with `switch_at` and `autoguidance` with `autoguidance_scale` are further
  models, of which it has none here.
- `from_pretrained` is `from_checkpoint`: precision is `compute`, and files that are not
  ours are converted. `load_lora_weights` and `set_adapters`, which its PixArt pipelines
  lack and others have, return a pipeline and change none; LoRAs are always fused.
- `image`, `mask_image` and `strength` are those of diffusers' pipelines for other
  models; it has none to edit with Σ. The image's own size is drawn, nothing of it is
  cropped, the mean of its posterior taken, and pixels outside of the mask stay as they
  are. `outpaint`, `regions` and `prompt_weighting` are more than it has.
- `prompt_embeds`, `prompt_attention_mask`, `negative_prompt_embeds` and
  `negative_prompt_attention_mask` may be shorter than the model's captions, not longer.
- `output_type` is "pil", "np" or "latent". Images are always a list, latents have
  channels last, and there is no `return_dict`.
- `callback_on_step_end` is that of diffusers' newer pipelines, in place of `callback`
  and `callback_steps`: see `Pipeline.stream`. `stream` hands over whole images.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32
from PIL import Image

import pixsigma_jax
from pixsigma_jax import checkpoint, sharding
from pixsigma_jax.diffusion.solvers import (
  SolverState,
  SolverTable,
  later_start,
  restarted,
  solver_table,
)
from pixsigma_jax.mesh_axes import DATA, FSDP
from pixsigma_jax.models import int8, tokens
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArtConfig, inference_params
from pixsigma_jax.models.tokens import Grid
from pixsigma_jax.sample import (
  call_arguments,
  companions,
  devices,
  image_files,
  previews,
  program,
  weights,
)
from pixsigma_jax.sample.adapters import Adaptable, Adapters
from pixsigma_jax.sample.call_arguments import (
  CallArguments,
  Embedded,
  StepCallback,
  StopDrawing,
)
from pixsigma_jax.sample.companions import Refiner, WeakModel
from pixsigma_jax.sample.editing import digest
from pixsigma_jax.sample.encoders import load_autoencoder, load_text_encoder
from pixsigma_jax.sample.program import (
  Batch,
  Guidance,
  Projection,
  Weakened,
  Weaker,
)
from pixsigma_jax.sample.requests import Planner, Request
from pixsigma_jax.sample.settings import (
  SETTINGS,
  UNGUIDED_SAMPLERS,
  Settings,
)
from pixsigma_jax.sample.step_caching import Computed
from pixsigma_jax.sample.timing import Timing
from pixsigma_jax.sample.weighting import WeightedEncoder
from pixsigma_jax.wording import shortened

# What is made of a checkpoint's parameters before they draw.
QUANTIZATIONS: dict[str, Callable[[Any], Any]] = {
  "none": lambda params: params,
  "int8": int8.quantize,
}


@dataclasses.dataclass(frozen=True)
class Output:
  """Images, of the `output_type` that was asked for, and settings of each."""

  images: list[Any]
  settings: list[dict[str, Any]]

  def grid(self, columns: int | None = None) -> Image.Image:
    """All images in one, each over its prompt: see `images.grid`."""
    labels = [settings["prompt"] for settings in self.settings]
    return image_files.grid(self.images, columns, labels)


class _Kind(NamedTuple):
  """What images of one batch have in common, each by its own request alone.

  Attributes:
    length: of the padded sequences.
    steps: that are taken.
    captions: of each image.
    edited: whether there is an image to edit.
    noised: whether the steps begin with it, under noise.
    masked: whether parts of it are kept.
  """

  length: int
  steps: int
  captions: int
  edited: bool
  noised: bool
  masked: bool


class _Call(NamedTuple):
  """What a call asks for: its arguments, an image each, and how all are drawn."""

  asked: Settings
  given: CallArguments
  requests: list[Request]
  table: SolverTable
  guidance: Guidance | None


class Planned(NamedTuple):
  """An image that a call would draw; see `Pipeline.plan`.

  Attributes:
    kind: what it has in common with those that it may share a batch with.
    height, width: in pixels.
    num_tokens: of its latents, without padding.
    captions: that are encoded for it.
  """

  kind: _Kind
  height: int
  width: int
  num_tokens: int
  captions: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline(Adaptable):
  """A model ready to draw: `Pipeline.from_checkpoint(path)(prompt).images[0]`.

  An image depends on its prompt, seed, size and settings, and not on what else is
  asked for in the call, to the bit on one machine: every program takes exactly
  `batch_size` rows, filled up if need be, and a row is never longer or shorter than its
  own size asks for. Another `batch_size`, mesh or processor rounds differently.

  Attributes:
    config: the model's hyper-parameters.
    params: the model's parameters; from `from_checkpoint` rounded and apart as it suits
      `compute` (`models.pixart.inference_params`), and not for transforms or saving.
    null_caption: `[t e]`, what a dropped caption was replaced with in training; None
      for what the text encoder makes of "".
    autoencoder: see `models/autoencoders.py`.
    text_encoder: see `models/text_encoders.py`.
    resolution: side in pixels of the square images that the model was trained on.
    compute: precision and implementation of the network.
    batch_size: images that are drawn at once. One large image fills an
      accelerator; for small ones 16 or 64 are faster.
    mesh: devices that share each batch, as `devices.mesh_of` makes it: `batch_size`
      divided over `data` and `fsdp`, branches of guidance over `guidance`, tokens over
      `context`; None for the one where the parameters are. A call whose branches
      `guidance` does not divide, or with autoguidance, gives its devices to `context`.
    guidance_passes: 1 sends the branches of guidance through the network as one batch,
      2 one after the other, in about half the memory; None decides by the tokens that
      a device has, see `program.passes_by_size`. Rounds differently, no more.
    origin: further facts for every image's settings, such as the checkpoint's path.
    loras: what LoRAs are in `params`, see `load_lora_weights`. Other models of the
      pipeline have their own, as each pipeline of diffusers has.
    refiner: a second model of the same hyper-parameters, for the timesteps below its
      `switch_at`. Steps are then taken one by one, as with a callback. A sampler of
      several steps starts anew at the switch, which is first order there; step caching
      computes the refiner's first step.
    weak_model: a worse model to guide away from, see `autoguidance_scale`. It may be
      smaller; step caching does not spare it a step.
    timing: adds up the seconds of `text encoder`, `transformer`, `autoencoder` and
      `compilation` over all calls, those of `replace`d pipelines included.

  Raises:
    ValueError: the parts do not fit each other.
  """

  null_caption: Float[Array, "t e"] | Float[np.ndarray, "t e"] | None
  autoencoder: Any
  text_encoder: Any
  resolution: int
  compute: Compute = dataclasses.field(default_factory=program.compute_here)
  batch_size: int | np.integer[Any] = 1
  mesh: Mesh | None = None
  guidance_passes: int | np.integer[Any] | None = None
  origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  refiner: Refiner | None = None
  weak_model: WeakModel | None = None
  timing: Timing = dataclasses.field(default_factory=Timing)

  def __post_init__(self):
    config = self.config
    pairs: dict[str, tuple[Any, Any, str]] = {
      "latent channels": (config.in_channels, self.autoencoder.channels, "autoencoder"),
      "caption width": (config.caption_width, self.text_encoder.width, "text encoder"),
    }
    if self.null_caption is not None:
      shape = (config.caption_length, config.caption_width)
      pairs["null caption"] = (shape, tuple(self.null_caption.shape), "null caption")
    for name, (ours, theirs, whose) in pairs.items():
      if ours != theirs:
        raise ValueError(
          f"The model has {name} {ours} and the {whose} {theirs}: these are not the "
          "parts that were trained together."
        )
    if self.refiner is not None:
      companions.check_refiner(config, self.refiner.config)
    if self.weak_model is not None:
      companions.check_weak(config, self.weak_model.config)
    for name in ("batch_size", "guidance_passes"):
      # They are written into files, which know no numbers of NumPy.
      if isinstance(getattr(self, name), np.integer):
        object.__setattr__(self, name, int(getattr(self, name)))
    if self.batch_size < 1:
      raise ValueError(f"batch_size {self.batch_size} must be at least 1.")
    if self.guidance_passes not in (None, 1, 2):
      raise ValueError(
        f"guidance_passes {self.guidance_passes} must be 1, 2, or None to decide by "
        "size."
      )
    if self.mesh is not None:
      rows = self.mesh.shape[DATA] * self.mesh.shape[FSDP]
      if self.batch_size % rows:
        raise ValueError(
          f"batch_size {self.batch_size} cannot be shared by {rows} devices: make it a "
          f"multiple of {rows}."
        )

  @classmethod
  def from_checkpoint(
    cls,
    path: str | os.PathLike[str],
    *,
    frozen: str | os.PathLike[str] | None = None,
    text_encoder: Any = None,
    compute: Compute | None = None,
    batch_size: int | np.integer[Any] = 1,
    mesh: Mesh | str | None = None,
    guidance_passes: int | np.integer[Any] | None = None,
    quantize: str = "none",
    timing: Timing | None = None,
    refiner: str | os.PathLike[str] | None = None,
    switch_at: int | None = None,
    autoguidance: str | os.PathLike[str] | None = None,
    lora: Sequence[str] = (),
    refiner_lora: Sequence[str] = (),
    autoguidance_lora: Sequence[str] = (),
    **source: Any,
  ) -> "Pipeline":
    """The model of a checkpoint, of diffusers' folder, of a file, or of the hub.

    Other formats than ours are converted once, into the user's cache.

    Args:
      path: a run's workdir (its newest snapshot), or one of its snapshots; or what
        `weights.locate` finds elsewhere.
      frozen: where VAE, T5 and tokenizer are, if the model needs them: a folder of
        diffusers with `vae/`, `text_encoder/` and `tokenizer/`, or the id of one on the
        hub. None for those beside the weights, or for the ones that PixArt was
        published with.
      text_encoder: to use instead of loading one, such as
        `encoders.RememberedCaptions`.
      mesh: devices to share parameters and batches: see the class, or a text for
        `devices.mesh_of`, as "auto" or "context=4", for images of the model's size with
        guidance.
      compute: see the class; None for `program.compute_here()`.
      batch_size, guidance_passes, timing: see the class.
      quantize: a key of `QUANTIZATIONS`, what is made of the parameters.
      refiner, switch_at: a second model, found as `path` is, that draws below the
        timestep `switch_at`; both or neither.
      autoguidance: a weaker model, found as `path` is, for `autoguidance_scale`.
      lora, refiner_lora, autoguidance_lora: PATH[:SCALE] of LoRAs that act in the first
        model, the refiner and the weaker one; see `load_lora_weights`.
      source: what weights of another format leave open, by the flags of `convert`:
        release, base_size, pe_interpolation, caption_length, scaling_factor, num_heads,
        ema, pos_embed, variant.

    Raises:
      FileNotFoundError: there is none.
      TypeError: `source` has an argument of another name.
      ValueError: it is damaged, leaves open what is not given, or needs an encoder that
        this version does not have; or a further model or a LoRA does not go with it.
    """
    _check_choice("quantize", quantize, QUANTIZATIONS)
    drawn: dict[str, Any] = {
      "batch_size": int(batch_size),
      "branches": Settings().branches,
    }
    if isinstance(mesh, str):  # before anything is converted
      devices.check(mesh, jax.device_count(), **drawn)
    options = weights.options_of(source)
    located = weights.locate(path, options)
    metadata = checkpoint.read_metadata(located.checkpoint)
    if isinstance(mesh, str):
      tokens = PixArtConfig.from_dict(metadata.model).base_size ** 2
      mesh = devices.mesh_of(mesh, tokens=tokens, **drawn)
    further = companions.locate(
      metadata,
      options=options,
      refiner=refiner,
      switch_at=switch_at,
      autoguidance=autoguidance,
      lora=lora,
      refiner_lora=refiner_lora,
      autoguidance_lora=autoguidance_lora,
    )
    frozen = located.encoders if frozen is None else frozen
    snapshot = checkpoint.read_snapshot(os.fspath(located.checkpoint), mesh)
    metadata = snapshot.metadata
    compute = compute or program.compute_here()
    dtype = jnp.dtype(compute.dtype)
    if text_encoder is None:
      text_encoder = load_text_encoder(metadata, frozen, dtype=dtype, mesh=mesh)
    elif text_encoder.identity != metadata.text_encoder:
      raise ValueError(
        f"The model was trained with captions of {metadata.text_encoder}, and these "
        f"are of {text_encoder.identity}."
      )

    def prepare(params: Any) -> Any:
      return inference_params(QUANTIZATIONS[quantize](params), compute)

    pipeline = cls(
      config=snapshot.config,
      params=prepare(snapshot.params),
      null_caption=snapshot.null_caption,
      autoencoder=load_autoencoder(metadata, frozen, dtype=dtype, mesh=mesh),
      text_encoder=text_encoder,
      resolution=metadata.resolution,
      compute=compute,
      batch_size=batch_size,
      mesh=mesh,
      guidance_passes=guidance_passes,
      origin={
        "checkpoint": str(snapshot.path),
        "stage": metadata.stage,
        "step": snapshot.step,
        "quantize": quantize,
        **located.origin,
        **further.origin,
      },
      loras=Adapters(snapshot.path),
      **further.read(snapshot.null_caption, mesh, prepare),
      timing=Timing() if timing is None else timing,
    )
    return pipeline.with_adapters(further.loras)

  # By the name that diffusers' users know.
  from_pretrained = from_checkpoint

  def __call__(self, prompt: Any = None, **arguments: Any) -> Output:
    """Draws the prompts; arguments, their defaults and errors are those of `stream`.

    Images that a callback has stopped are left out.
    """
    drawn = sorted(self.stream(prompt, **arguments), key=lambda item: item[0])
    return Output([item[1] for item in drawn], [item[2] for item in drawn])

  def stream(
    self, prompt: Any = None, **arguments: Any
  ) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    """Draws the prompts and hands over (number, image, settings) as they are ready.

    Images of one size come in the order of their numbers.

    `callback_on_step_end(pipeline, step, timestep, known)` is called after each call of
    the network, one batch after the other, with a dict `known`:

    - latents: of each image of the batch, `[h w c]`, as the next step takes them;
    - clean_latents: the step's estimate of each image, for `preview`;
    - images: the numbers of these images;
    - num_steps: how many steps there are.

    It returns None, or a dict whose latents the next step takes. `StopDrawing`, raised
    in it, leaves these images undrawn and goes on with other batches; any other
    exception ends the call. Steps come back to Python one by one, in a program of their
    own, whose rounding may differ from the whole's.

    Args:
      prompt: one or several.
      arguments: any of `settings.SETTINGS` and `call_arguments.CALL_ARGUMENTS`, which
        say what they are; numbers may be Python's or scalars of NumPy or JAX.

    Raises:
      TypeError: there is no argument of a name.
      ValueError: an argument is out of its range, a size does not go with the model, or
        a caption is too long. All before the first image is begun.
      ValueError: an image is not made of finite numbers, or a callback returns
        something else.
    """
    call = self._checked(prompt, arguments)
    asked = call.asked
    about = asked.of_all() | {
      "dtype": jnp.dtype(self.compute.dtype).name,
      "batch_size": self.batch_size,
      "pixsigma_jax": pixsigma_jax.__version__,
      **self.origin,
      **self._loras_about(),
    }
    threshold = jnp.float32(asked.step_caching) if asked.step_caching else None
    return self._draw(*call, threshold, about)

  def _loras_about(self) -> dict[str, Any]:
    """Facts for images' settings: the acting LoRAs of each model that has any."""
    models: dict[str, Adaptable | None] = {
      "loras": self,
      "refiner_loras": self.refiner,
      "autoguidance_loras": self.weak_model,
    }
    about = {n: model.loras.about() for n, model in models.items() if model is not None}
    return {name: loras for name, loras in about.items() if loras}

  def _checked(self, prompt: Any, arguments: Mapping[str, Any]) -> _Call:
    """What a call asks for, all of it checked; see `stream` for what is raised."""
    asked, given = call_arguments.split(arguments)
    requests = self._planner.requests(given.prompts(prompt, asked), asked, given)
    encoder = self._encoder(asked)
    self._check_captions(
      encoder, [c for r in requests for c in (r.negative, *r.captions)]
    )
    table = solver_table(
      asked.sampler,
      program.SCHEDULE,
      asked.num_inference_steps,
      asked.timesteps,
      asked.use_karras_sigmas,
    )
    if table.spread is not None and not self.config.learn_variance:
      raise ValueError(
        f"The sampler {asked.sampler} needs a model that has learned variances, and "
        f"this one has not: choose another, such as dpm++."
      )
    guidance = self._guidance(asked)
    if asked.guided and asked.sampler in UNGUIDED_SAMPLERS:
      logging.warning(
        "The models that the sampler %s is for have guidance in them: expect "
        "guidance_scale=%g to draw worse than 1, its default.",
        asked.sampler,
        asked.guidance_scale,
      )
    return _Call(asked, given, requests, table, guidance)

  def preview(self, latents: Float32[np.ndarray, "h w c"]) -> Image.Image:
    """A small image of clean latents, one pixel for each, without the decoder.

    By the linear map that comes nearest to the autoencoder, see `previews.fit`; it is
    fitted at the first call.
    """
    return self._previewer(latents)

  @property
  def _planner(self) -> Planner:
    return Planner(self.config, self.autoencoder.downsampling, self.resolution)

  @functools.cached_property
  def _previewer(self) -> previews.Previewer:
    return previews.fit(self.autoencoder)

  def plan(self, prompt: Any = None, **arguments: Any) -> list[Planned]:
    """What `stream` would draw of these arguments, an item for each image.

    Images of one kind, of calls that share all settings that are none of a prompt's
    own, can be drawn as one batch: give them to one call.

    Raises:
      TypeError, ValueError: as those of `stream`, before it begins.
    """
    return [
      Planned(
        self._kind(request),
        request.height,
        request.width,
        request.grid[0] * request.grid[1],
        [c for c in (*request.captions, request.negative) if isinstance(c, str)],
      )
      for request in self._checked(prompt, arguments).requests
    ]

  def _guidance(self, asked: Settings) -> Guidance | None:
    """What joins the branches of a prediction; None for a single branch.

    Raises:
      ValueError: layers are none of the model's.
    """
    perturbed = self._weakened(asked, "pag_scale", "pag_applied_layers")
    skipped = self._weakened(asked, "skip_layer_guidance_scale", "skip_guidance_layers")
    weaker = None
    if asked.autoguidance_scale > 1:
      if self.weak_model is None:
        raise ValueError(
          f"autoguidance_scale={asked.autoguidance_scale:g} needs a weaker model to "
          "guide away from: give one with autoguidance when the pipeline is made, or 1."
        )
      scale = jnp.float32(asked.autoguidance_scale - 1)
      weaker = Weaker(scale, self.weak_model.params)
    if not asked.guided and not any((perturbed, skipped, weaker)):
      return None
    projection = None
    if asked.guided and asked.guidance_method == "apg":
      numbers = asked.apg_momentum, asked.apg_threshold, asked.apg_eta
      projection = Projection(*map(jnp.float32, numbers))
    return Guidance(
      jnp.float32(asked.guidance_scale) if asked.guided else None,
      *map(jnp.float32, (*asked.guidance_interval, asked.guidance_rescale)),
      perturbed=perturbed,
      skipped=skipped,
      projection=projection,
      weaker=weaker,
    )

  def _weakened(self, asked: Settings, scale: str, layers: str) -> Weakened | None:
    """A weakened network by the names of two settings; None for a scale of 0."""
    depth, chosen = self.config.depth, getattr(asked, layers)
    chosen = (depth // 2,) if chosen is None else chosen
    if not getattr(asked, scale):
      return None
    if max(chosen) >= depth:
      raise ValueError(
        f"{layers}={','.join(map(str, chosen))} names layer {max(chosen)}, and the "
        f"model has layers 0 … {depth - 1}."
      )
    which = np.isin(np.arange(depth), chosen)
    return Weakened(jnp.float32(getattr(asked, scale)), which)

  def _encoder(self, asked: Settings) -> Any:
    """The text encoder, by which prompts may have weights."""
    encoder = self.text_encoder
    return WeightedEncoder(encoder) if asked.prompt_weighting else encoder

  def _check_captions(self, encoder: Any, captions: Sequence[str | Embedded]) -> None:
    length = self.config.caption_length
    texts = [caption for caption in captions if isinstance(caption, str)]
    for caption in dict.fromkeys(texts):
      if encoder.count(caption) > length:
        encoder.encode([caption], length)  # refuses it, in its own words

  def _draw(
    self,
    asked: Settings,
    given: CallArguments,
    requests: list[Request],
    table: SolverTable,
    guidance: Guidance | None,
    threshold: Float32[Array, ""] | None,
    settings: dict[str, Any],
  ) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    """Draws requests of one kind together, `batch_size` at a time."""
    whole, steps = table, asked.num_inference_steps
    numbers_by_kind: dict[_Kind, list[int]] = {}
    for number, request in enumerate(requests):
      numbers_by_kind.setdefault(self._kind(request), []).append(number)
    for kind, numbers in numbers_by_kind.items():
      branches = program.count_branches(guidance, kind.captions)
      alike = guidance is None or guidance.weaker is None
      mesh = devices.suited_to(self.mesh, branches, alike=alike)
      passes = 1
      if guidance is not None or branches > 1:
        passes = self._passes(kind.length, mesh)
      if kind.steps:
        table = later_start(asked.sampler, whole, steps, kind.steps)
      switch = None
      if self.refiner is not None:
        table, switch = restarted(asked.sampler, table, self.refiner.switch_at)
      for start in range(0, len(numbers), self.batch_size):
        chosen = numbers[start : start + self.batch_size]
        # Rows nobody asked for keep the program, and with it every rounding, the same.
        rows = [
          requests[number]
          for number in chosen + chosen[-1:] * (self.batch_size - len(chosen))
        ]
        with self.timing.part("text encoder"):
          encoder = self._encoder(asked)
          batch = self._captions(encoder, rows)
          if asked.guided:
            batch |= self._negatives(
              encoder, rows, batch["caption_mask"], asked.unconditional_mask
            )
        batch |= self._images(rows, kind, table)
        watch = None
        if given.callback_on_step_end is not None:
          watch = functools.partial(
            self._call_back, given.callback_on_step_end, table, chosen, rows
          )
        cfg_zero = asked.guided and asked.guidance_method == "cfg-zero"
        try:
          if kind.steps:
            sequences, computed = self._solve(
              *(mesh, batch, table, guidance, threshold),
              *(passes, cfg_zero, watch, switch),
            )
          else:
            sequences, computed = batch["noise"], None
        except StopDrawing:
          logging.info("Stopped by the callback, and not drawn: images %s.", chosen)
          continue
        if computed is not None:
          logging.info(
            "Step caching: a batch of %d computed %d of %d steps.",
            *(len(chosen), computed.batch, len(table.timesteps)),
          )
        for row, number in enumerate(chosen):
          request = requests[number]
          image = self._decode(sequences[row], request, number, given.output_type)
          about = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "height": request.height,
            "width": request.width,
            "drawn_height": request.drawn.height,
            "drawn_width": request.drawn.width,
            "guidance_passes": passes,
          }
          if computed is not None:
            about["computed_steps"] = int(computed.images[row])
          for name, what in (
            ("prompt_embeds", request.captions[0]),
            ("negative_prompt_embeds", request.negative),
          ):
            if isinstance(what, Embedded):
              about[f"{name}_digest"] = what.digest
          if request.noise is not None:
            about["latents_digest"] = digest(request.noise)
          about |= request.about
          yield number, image, about | settings

  def _solve(
    self,
    mesh: Mesh | None,
    batch: Batch,
    table: SolverTable,
    guidance: Guidance | None,
    threshold: Float32[Array, ""] | None,
    passes: int,
    cfg_zero: bool,
    watch: Callable[..., Float32[np.ndarray, "b n c"] | None] | None,
    switch: int | None,
  ) -> tuple[Float32[np.ndarray, "b n c"], Computed | None]:
    """The latents of a batch as sequences, in one program or step by step.

    Args:
      mesh: the pipeline's, as it suits this batch.
      watch: the step's number, latents and clean latents → other latents, or None;
        steps one by one.
      switch: the row of the table from which on the refiner draws; steps one by one.
    """
    compute = self.compute
    if mesh is not None:
      batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
      compute = dataclasses.replace(compute, mesh=mesh)
    arguments = batch, table, guidance, threshold
    static: dict[str, Any] = {
      "config": self.config,
      "compute": compute,
      "passes": passes,
      "cfg_zero": cfg_zero,
      "weak_config": None if self.weak_model is None else self.weak_model.config,
    }
    if watch is None and switch is None:
      with self.timing.part("transformer"):
        sequences, computed = program.sample(self.params, *arguments, **static)
        return np.asarray(sequences), computed
    params, conditions, state = self.params, None, None
    for number in range(len(table.timesteps)):
      with self.timing.part("transformer"):
        if number in (0, switch):
          if number == switch and self.refiner is not None:
            params = self.refiner.params
          conditions, start = program.start(params, *arguments, **static)
          state = start if state is None else _handed_over(state, start)
        state, clean = program.step(
          params, *arguments, conditions, state, np.int32(number), **static
        )
        if watch is None:
          continue
        latents, clean = np.asarray(state.latents), np.asarray(clean)
      changed = watch(number, latents, clean)
      if changed is not None:
        # Where and how they lay, or the step would be compiled anew.
        like = state.latents
        changed = (
          jax.device_put(changed, like.sharding)
          if like.committed
          else jnp.asarray(changed)
        )
        state = state._replace(latents=changed)
    assert state is not None
    caching = state.memory.caching
    with self.timing.part("transformer"):
      sequences = np.asarray(state.latents)
    return sequences, None if caching is None else caching.computed

  def _call_back(
    self,
    callback: StepCallback,
    table: SolverTable,
    numbers: Sequence[int],
    requests: Sequence[Request],
    step: int,
    sequences: Float32[np.ndarray, "b n c"],
    clean: Float32[np.ndarray, "b n c"],
  ) -> Float32[np.ndarray, "b n c"] | None:
    """Calls a step's callback; returns the sequences if it has changed any.

    Args:
      numbers: of the images; the batch may have further rows.
      requests: of all rows.
    """
    known = {
      "latents": self._unpacked(sequences, requests[: len(numbers)]),
      "clean_latents": self._unpacked(clean, requests[: len(numbers)]),
      "images": list(numbers),
      "num_steps": len(table.timesteps),
    }
    shapes = [image.shape for image in known["latents"]]
    returned = callback(self, step, float(table.timesteps[step]), known)
    latents = call_arguments.after_callback(returned, shapes)
    if latents is None:
      return None
    changed = sequences.copy()
    for row, image in enumerate(latents):
      sequence = tokens.to_tokens(image, self.config.patch_size, self.config.window)
      changed[row, : len(sequence)] = sequence
    return None if np.array_equal(changed, sequences) else changed

  def _unpacked(
    self, sequences: Float32[np.ndarray, "b n c"], requests: Sequence[Request]
  ) -> list[np.ndarray]:
    """Latents `[h w c]` of the images of a batch."""
    patch, window = self.config.patch_size, self.config.window
    return [
      tokens.from_tokens(sequence, request.grid, patch, window)
      for sequence, request in zip(sequences, requests, strict=False)
    ]

  def _kind(self, request: Request) -> _Kind:
    source = request.source
    return _Kind(
      length=self._length(request.grid),
      steps=request.steps,
      captions=len(request.captions),
      edited=source is not None,
      noised=request.about.get("strength", 1.0) < 1,
      masked=source is not None and source.mask is not None,
    )

  def _length(self, grid: Grid) -> int:
    """Tokens that an image's sequence is padded to on the mesh."""
    sizes = {} if self.mesh is None else self.mesh.shape
    return devices.padded_length(self.config, grid, sizes)

  def _passes(self, length: int, mesh: Mesh | None) -> int:
    """Number of passes for the halves of guidance."""
    if self.guidance_passes is not None:
      return int(self.guidance_passes)
    return program.passes_by_size(int(self.batch_size), length, mesh)

  def _captions(self, encoder: Any, requests: list[Request]) -> Batch:
    """Captions of the network, a row for each request."""
    batch = {}
    for i, name in enumerate(program.caption_names(len(requests[0].captions))):
      embeddings, mask = self._encoded(encoder, [r.captions[i] for r in requests])
      batch |= {f"{name}_embeddings": embeddings, f"{name}_mask": mask}
    return batch

  def _encoded(
    self, encoder: Any, captions: Sequence[str | Embedded]
  ) -> tuple[Any, Any]:
    """Embeddings and mask of captions, all texts or all given as embeddings."""
    texts = [caption for caption in captions if isinstance(caption, str)]
    if texts:
      return encoder.encode(texts, self.config.caption_length)
    return tuple(map(np.stack, zip(*captions, strict=True)))

  def _images(self, requests: list[Request], kind: _Kind, table: SolverTable) -> Batch:
    """Latents to start from, sizes, masks and areas of the images of a batch.

    Args:
      table: of the steps that are taken.
    """
    config, length = self.config, kind.length
    noise = np.stack([self._packed(self._noise(r), length) for r in requests])
    batch: Batch = {
      "noise": noise,
      "seed": np.array([r.seed for r in requests], np.uint32),
      "coordinates": np.stack(
        [_padded(tokens.coordinates(r.grid, config.window), length) for r in requests]
      ),
      "grid": np.array([r.grid for r in requests], np.int32),
      "image_size": np.array([r.drawn for r in requests], np.float32),
      "aspect_ratio": np.array(
        [r.drawn.height / r.drawn.width for r in requests], np.float32
      ),
    }
    if kind.captions > 1:
      batch["areas"] = np.stack([self._areas(r, length) for r in requests])
    if not kind.edited:
      return batch
    originals: dict[int, np.ndarray] = {}
    for request in requests:  # images of one prompt share one
      if id(request.source) not in originals:
        latents = self._encode(request)
        originals[id(request.source)] = self._packed(latents, length)
    original = np.stack([originals[id(request.source)] for request in requests])
    if kind.steps == 0:
      batch["noise"] = original
    elif kind.noised:
      signal_scale, noise_scale = table.signal_scale[0], table.noise_scale[0]
      batch["noise"] = np.float32(signal_scale) * original
      batch["noise"] += np.float32(noise_scale) * noise
    if kind.masked:
      batch["original"], batch["original_noise"] = original, noise
      batch["redrawn"] = np.stack([self._redrawn(r, length) for r in requests])
    return batch

  def _packed(
    self, latents: Float32[np.ndarray, "h w c1"], length: int
  ) -> Float32[np.ndarray, "n c2"]:
    """Latents of an image as padded tokens."""
    sequence = tokens.to_tokens(latents, self.config.patch_size, self.config.window)
    return _padded(sequence, length)

  def _spread(
    self, values: Float32[np.ndarray, "h w"], length: int
  ) -> Float32[np.ndarray, "n c"]:
    """A number for each latent as padded tokens, the same for all channels."""
    channels = self.config.in_channels
    return self._packed(np.repeat(values[..., None], channels, axis=-1), length)

  def _areas(self, request: Request, length: int) -> Float32[np.ndarray, "k n c"]:
    assert request.weights is not None
    return np.stack([self._spread(weights, length) for weights in request.weights])

  def _redrawn(self, request: Request, length: int) -> Bool[np.ndarray, "n c"]:
    assert request.source is not None
    redrawn = request.source.mask_at(request.drawn, self.autoencoder.downsampling)
    assert redrawn is not None
    return self._spread(redrawn.astype(np.float32), length) > 0

  def _encode(self, request: Request) -> Float32[np.ndarray, "h w c"]:
    """Scaled latents of an image to edit: the mean of the posterior."""
    assert request.source is not None
    with self.timing.part("autoencoder"):
      image = request.source.at(request.drawn)[None]
      latents = np.asarray(self.autoencoder.encode(image)[0], np.float32)
    return latents * np.float32(self.autoencoder.scaling_factor)

  def _negatives(
    self,
    encoder: Any,
    requests: list[Request],
    caption_mask: Any,
    unconditional_mask: str,
  ) -> Batch:
    """Embeddings and mask of guidance's unconditional half."""
    negatives = [r.negative for r in requests]
    embeddings, mask = map(np.array, self._encoded(encoder, negatives))
    for row, text in enumerate(negatives):
      if text == "":
        if self.null_caption is not None:
          embeddings[row] = np.asarray(self.null_caption)
        if unconditional_mask == "caption":
          mask[row] = caption_mask[row]
    return {"negative_embeddings": embeddings, "negative_mask": mask}

  def _noise(self, request: Request) -> Float32[np.ndarray, "h w c"]:
    """Initial noise of the latents' own shape, given or of the seed alone."""
    if request.noise is not None:
      return request.noise
    shape = self._planner.latent_shape(request.grid)
    return np.asarray(jax.random.normal(jax.random.key(request.seed), shape))

  def _decode(
    self,
    sequence: Float32[np.ndarray, "n c"],
    request: Request,
    number: int,
    output_type: str,
  ) -> Any:
    """What `output_type` asks for of an image."""
    latents = tokens.from_tokens(
      sequence, request.grid, self.config.patch_size, self.config.window
    )
    which = f"Image {number}, of {shortened(request.prompt)} (seed {request.seed}),"
    if not np.isfinite(latents).all():
      raise ValueError(
        f"{which} is not made of finite numbers: the parameters have diverged, or the "
        "dtype overflows. Try --dtype=float32, or with "
        "--checkpoint=RUN/snapshots/STEP an earlier step."
      )
    if output_type == "latent":
      return latents
    # One at a time: images may differ in size, and large ones fill the memory.
    with self.timing.part("autoencoder"):
      latents = latents[None] / self.autoencoder.scaling_factor
      pixels = np.asarray(self.autoencoder.decode(latents)[0], np.float32)
    if not np.isfinite(pixels).all():
      raise ValueError(
        f"{which} is not made of finite numbers once it is decoded, though its latents "
        "are: the autoencoder's weights are damaged, or its dtype overflows. Try "
        "float32, or another copy of the autoencoder."
      )
    source, size = request.source, (request.height, request.width)
    resize = image_files.fit if source is None else image_files.stretch
    if output_type == "np":
      array = image_files.resized_array(resize, pixels, *size)
      return array if source is None else source.over_array(array)
    image = resize(image_files.to_image(pixels), *size)
    return image if source is None else source.over(image)


# What help() and notebooks show, in place of **settings.
Pipeline.stream.__signature__ = Pipeline.__call__.__signature__ = inspect.Signature(  # pyright: ignore
  [
    inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
    inspect.Parameter("prompt", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
    *(
      inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
      for name, default in (
        *((setting.name, setting.default) for setting in SETTINGS.values()),
        *((field.name, field.default) for field in dataclasses.fields(CallArguments)),
      )
    ),
  ]
)


def _handed_over(state: SolverState, start: SolverState) -> SolverState:
  """The state before the refiner's first step; what caching knows is the other's."""
  caching, fresh = state.memory.caching, start.memory.caching
  if caching is not None:
    fresh = fresh._replace(computed=caching.computed)
  return state._replace(memory=state.memory._replace(caching=fresh))


def _check_choice(name: str, value: str, known: Any) -> None:
  if value not in known:
    raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(known)}.")


def _padded(sequence: np.ndarray, length: int) -> np.ndarray:
  return np.pad(sequence, ((0, length - len(sequence)), (0, 0)))
