"""Sections and fields of a training config: default, check and description of each.

The defaults are the settings of the paper's stages, but for each stage's own name,
length, data and parent. They are the official code's, unless a comment says otherwise.
docs/training.md shows them as tables, which are generated from here.
"""

import dataclasses
from typing import Any

from pixsigma_jax.train.checks import (
  Check,
  each,
  factor_of_group,
  named,
  none_or,
  number,
  one_of,
  pair,
  span,
  text,
  truth,
  whole,
  zero_or,
)


def _field(default: Any, check: Check, does: str) -> Any:
  """A field of a section.

  Args:
    check: of a value by itself. How fields go together is checked where they meet: in
      `compatibility`, and by what a section is the call of.
    does: what the field does, in Markdown.
  """
  return dataclasses.field(default=default, metadata={"check": check, "does": does})


def _optimizer_name(default: str) -> Any:
  does = "`adamw`, `came`, `adafactor`, `lion` or `muon`"
  return _field(default, text, f"{does}, each with fields of its own besides")


_DECAY = number(least=0, below=1)
_POSITIVE = number(above=0)
_LIMIT = number(above=0, infinite=True)
_PERIOD = whole(0)  # steps between two of something; 0 for never
_AXIS = whole(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCompression:
  """The section `model.kv_compression`: see `models/kv_compression.py`."""

  ratio: int = _field(
    1, whole(1), "tokens per compressed token: 1, 2, 4, 9 or 16; 1 compresses nothing"
  )
  layers: tuple[int, ...] = _field(
    (), each(whole(0)), "layers that compress, counted from 0; `()` with ratio 1"
  )
  operator: str = _field(
    "conv", text, "`conv`, `average`, `discard` or `random_discard`"
  )
  norm: bool = _field(True, truth, "layer norm after the merge, with `conv` only")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """The section `model`: a variant, and the other fields of `PixArtConfig`."""

  variant: str = _field(
    "XL/2", text, "depth, width, heads and patch size: `XL/2`, `Mini/2`, `Nano/2`"
  )
  base_size: int = _field(
    16,
    whole(1),
    "side, in tokens, of the stage's square image; must fit the data",
  )
  pe_interpolation: float = _field(
    0.5, _POSITIVE, "how many times finer the grid of positions is"
  )
  mlp_ratio: float = _field(
    4.0, _POSITIVE, "hidden width of the MLP divided by the width"
  )
  in_channels: int = _field(4, whole(1), "channels of the latents; must fit the data")
  learn_variance: bool = _field(
    True,
    truth,
    "True: the network also predicts variance logits, and the loss has its second term",
  )
  caption_width: int = _field(
    4096, whole(1), "width of the caption embeddings; must fit the data"
  )
  caption_length: int = _field(300, whole(1), "tokens that captions are padded to")
  qk_norm: bool = _field(False, truth, "layer norm on queries and keys")
  size_conditions: bool = _field(
    False, truth, "conditions on image size and aspect ratio, as α-1024"
  )
  kv_compression: KVCompression = KVCompression()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
  """The section `compute`: how the network is computed, see `models.layers.Compute`."""

  # The official code computes in float16 and scales its loss; bfloat16 needs no
  # scaling. Parameters, norms, softmax, residuals and loss are float32 in both.
  dtype: str = _field(
    "bfloat16",
    one_of("float32", "bfloat16", "float16"),
    "of the operands of matrix products and attention",
  )
  attention: str = _field(
    "auto",
    text,
    "`xla`, `chunked`, `splash`, `cudnn`, or `auto` for what suits the devices",
  )
  # To run attention again costs 4 % of a step at 512 pixels and a fifth at 4096, to
  # keep what it returned between 1 and 4 GiB of each of 64 chips.
  remat: str = _field(
    "attention",
    text,
    "what the backward pass recomputes: `none`, `block`, `attention` or `offload`",
  )
  unroll: bool = _field(
    False, truth, "True unrolls the layers, which is faster on a CPU"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hashes:
  """The section `data.hashes`: hashes that the manifest of the data must have."""

  autoencoder: str = _field("", text, "of the autoencoder; `''` accepts any")
  text_encoder: str = _field("", text, "of the text encoder; `''` accepts any")
  crop_rule: str = _field("", text, "of the crop rule; `''` accepts any")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """The section `data`: datasets, and how they are read."""

  path: str = _field(
    "",
    text,
    "the dataset's directory ([data.md](data.md)); several with commas between them "
    "are read as one",
  )
  weights: tuple[float, ...] = _field(
    (),
    each(_POSITIVE),
    "how often examples come from each dataset, e.g. `(3, 1)`; `()` for as often as it "
    "has records",
  )
  holdout: float = _field(
    0.001,
    number(least=0, below=1),
    "share of the images that are never trained on, by their ids: the same images at "
    "every resolution",
  )
  hashes: Hashes = Hashes()
  long_caption_ratio: float = _field(
    0.6, number(least=0, most=1), "how often an example shows a long caption, 0 to 1"
  )
  num_threads: int = _field(
    16, whole(0), "threads that prepare batches ahead; 0 for none"
  )
  num_workers: int = _field(
    0,
    whole(0),
    "processes that prepare batches ahead, each with `num_threads` threads; 0 for the "
    "trainer's own process",
  )
  damaged: str = _field(
    "replace",
    one_of("stop", "replace"),
    "what a record that cannot be read does: `stop` ends the run and names it; "
    "`replace` takes the next sound record of its dataset instead, names it in a "
    "warning, and counts it in `replaced_examples`",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
  """The section `loss`: see `make_loss`."""

  caption_dropout: float = _field(
    0.1,
    number(least=0, most=1),
    "probability that an example's caption becomes the null caption",
  )
  snr_switch: bool = _field(
    False,
    truth,
    "True: up to timestep 249 compare clean latents instead of noise (the reference's "
    "`snr_loss`)",
  )
  min_snr_gamma: float | None = _field(
    None,
    none_or(_POSITIVE),
    "weights `mse` by min(snr, gamma) / snr; `None` for no weights",
  )
  snr_shift: float = _field(
    1.0,
    _POSITIVE,
    "s: timesteps are drawn so that the density of log-SNR is shifted down by 2 log s, "
    "see below; 1.0 for uniform timesteps",
  )
  timestep_beta: tuple[float, float] | None = _field(
    None,
    none_or(pair(_POSITIVE)),
    "timesteps are drawn by this beta distribution over 0 … T, in place of "
    "`snr_shift`; `(2.0, 4.0)` is FAPT's, towards little noise; `None` for no such "
    "draw",
  )
  timestep_range: tuple[int, int] = _field(
    (0, 999),
    pair(whole(0)),
    "lowest and highest timestep that are drawn, both included: for one of two models "
    "that share the schedule, see below; `(0, 999)` for all",
  )
  frequency_weight: float = _field(
    0.0,
    number(least=0),
    "λ of FAPT's weights 1 + λ (e^(γr) - 1) / (e^γ - 1) of the noise error's "
    "frequencies; 0.0 for none",
  )
  frequency_gamma: float = _field(
    1.0, _POSITIVE, "γ of those weights; r goes from 0 to 1 at the highest frequency"
  )
  wavelet_offset: float | None = _field(
    None,
    none_or(number(least=0)),
    "l of LWD's mask: the noise error counts where T (A + l) ≥ t, A being the latents' "
    "Haar detail; `0.3` is LWD's; `None` for no mask",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """What the section `optimizer` has for every optimizer."""

  name: str = _optimizer_name("came")
  learning_rate: float = _field(
    2e-5, number(least=0), "after the warm-up, before `scale_rule`"
  )
  scale_rule: str = _field(
    "none",
    text,
    "`none`; or, if the rate is for a batch of 256, `sqrt` multiplies it by "
    "√(`batch_size` / 256), and `linear` by `batch_size` / 256. The log says which "
    "rate results",
  )
  schedule: str = _field(
    "constant",
    text,
    "`constant`, or `cosine`: half a cosine down to 0 at `total_steps`",
  )
  warmup_steps: int = _field(
    100, whole(0), "linear from 0, below `total_steps`; the first update has rate 0"
  )
  weight_decay: float = _field(
    0.0, number(least=0), "weight decay of all trained parameters"
  )
  clip_norm: float = _field(
    0.01, _LIMIT, "global norm to which gradients are clipped, above 0"
  )
  groups: tuple[Any, ...] = _field(
    (),
    each(factor_of_group),
    "pairs of a regular expression and a factor of the learning rate, see below; `()` "
    "for none",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Came(Optimizer):
  """The section `optimizer` for CAME, with the settings of PixArt-Σ."""

  b1: float = _field(0.9, _DECAY, "decay of the momentum")
  b2: float = _field(0.999, _DECAY, "decay of the squares")
  b3: float = _field(0.9999, _DECAY, "decay of the squared surprises")
  eps: tuple[float, float] = _field(
    (1e-30, 1e-16),
    pair(_POSITIVE),
    "what is added to the squares, and to the squared surprises",
  )
  clip_threshold: float = _field(
    1.0, _LIMIT, "root mean square to which a tensor's update is cut down"
  )
  momentum_dtype: str = _field(
    "float32", text, "`float32`, or `bfloat16` for half the memory"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
  """The section `optimizer` for AdamW, with the defaults of PyTorch."""

  name: str = _optimizer_name("adamw")
  b1: float = _field(0.9, _DECAY, "decay of the momentum")
  b2: float = _field(0.999, _DECAY, "decay of the squares")
  eps: float = _field(1e-8, _POSITIVE, "what is added to the root of the squares")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
  """The section `optimizer` for Adafactor, with the defaults of optax."""

  name: str = _optimizer_name("adafactor")
  b1: float = _field(0.0, _DECAY, "decay of the momentum; 0 for no momentum")
  decay_rate: float = _field(0.8, _POSITIVE, "how fast the decay of the squares grows")
  eps: float = _field(1e-30, _POSITIVE, "what is added to the squares")
  clip_threshold: float = _field(
    1.0, _LIMIT, "root mean square to which a tensor's update is cut down"
  )
  min_size_to_factor: int = _field(
    128, whole(1), "matrices that are smaller keep all squares"
  )
  scale_by_parameter: bool = _field(
    True, truth, "True: the rate is relative to a tensor's own size"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
  """The section `optimizer` for Lion, with the defaults of optax."""

  name: str = _optimizer_name("lion")
  b1: float = _field(
    0.9,
    _DECAY,
    "share of the momentum in an update; rates are a third to a tenth of AdamW's",
  )
  b2: float = _field(0.99, _DECAY, "decay of the momentum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
  """The section `optimizer` for Muon, with the defaults of optax at AdamW's rates."""

  name: str = _optimizer_name("muon")
  beta: float = _field(0.95, _DECAY, "decay of the momentum")
  nesterov: bool = _field(True, truth, "Nesterov's momentum")
  newton_schulz_steps: int = _field(5, whole(1), "iterations that orthogonalize")
  consistent_rms: float | None = _field(
    0.2, none_or(_POSITIVE), "0.2 takes AdamW's rates, `None` Muon's own"
  )
  eps: float = _field(1e-8, _POSITIVE, "what is added to the norms, and Adam's")
  adam_b1: float = _field(0.9, _DECAY, "`b1` of Adam, for what is no block's matrix")
  adam_b2: float = _field(0.999, _DECAY, "`b2` of Adam")


# Name of an optimizer → the section `optimizer` for it.
OPTIMIZERS: dict[str, type[Optimizer]] = {
  "adamw": AdamW,
  "came": Came,
  "adafactor": Adafactor,
  "lion": Lion,
  "muon": Muon,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
  """The section `ema`: averages of the parameters, see `train/ema.py`."""

  kind: str = _field("exponential", text, "`exponential`, or `power`")
  # A stage averages over the last tenth of its steps, or thereabouts.
  values: tuple[float, ...] = _field(
    (0.999,), each(number(least=0)), "one average for each"
  )
  unit: str = _field("updates", text, "of `exponential`: `updates` or `images`")
  offload: bool = _field(
    False,
    truth,
    "True: averages are kept in the host's memory (`pinned_host`), 2.4 GB each for "
    "XL/2; each step fetches them and writes them back. The cost on an accelerator was "
    "not measured",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
  """The section `adapter`: a LoRA or DoRA, see `transforms/lora.py`."""

  rank: int = _field(
    0,
    whole(0),
    "columns of `down` and rows of `up`; 0 for no adapter: every parameter is trained",
  )
  alpha: float = _field(16.0, _POSITIVE, "divided by `rank`, the factor of the product")
  targets: tuple[str, ...] = _field(
    ("attention/", "mlp/"),
    each(text),
    "regular expressions; a kernel in whose name one is found gets an adapter. "
    '`"attention/"` is both attentions, `"attention/qkv"` queries, keys and values of '
    'the self-attention, `"mlp/"` both maps, `"kernel"` everything but the '
    "compressors' filters. An expression that is found in no name is an error that "
    "lists the names",
  )
  dora: bool = _field(
    False, truth, "True: also trains the length of each column of the sum (DoRA)"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
  """The section `init`: what training starts from."""

  parent: str = _field(
    "",
    text,
    "where to start: a run's workdir or one of its snapshots; `''` for fresh "
    "parameters",
  )
  transforms: tuple[Any, ...] = _field(
    (),
    each(named),
    "transforms of the parent, in order: dicts with `name` and arguments",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshAxes:
  """The section `mesh`: devices on each axis, see `make_mesh_of_slices`."""

  # Chosen for the machines that are there: parameters in eighths, rows over all
  # devices, and tokens over what has no row of its own.
  slices: int = _field(
    0, whole(0), "groups of devices with a fast network within each; 0 asks the devices"
  )
  data: int = _field(
    0, _AXIS, "copies of the model; 0 chooses, -1 takes the devices that are left"
  )
  fsdp: int = _field(
    0, _AXIS, "parts of the parameters; 0 chooses, -1 takes the devices that are left"
  )
  context: int = _field(
    0,
    _AXIS,
    "parts of an image's tokens; 0 chooses, -1 takes the devices that are left",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """The section `checkpoint`: when a run is saved, and where."""

  every: int = _field(
    500, _PERIOD, "a checkpoint every so many steps; 0 for one at the end only"
  )
  keep_last: int = _field(
    2,
    whole(
      1,
      way_out="it is how many of the newest checkpoints stay: for all of them give a "
      "number that is never reached, or keep_every=1",
    ),
    "how many of the newest stay, at least 1",
  )
  keep_every: int = _field(
    0, _PERIOD, "steps divisible by this stay for good; 0 for none"
  )
  snapshot_every: int = _field(
    0,
    _PERIOD,
    "a checkpoint and a snapshot every so many steps; 0 for a snapshot at the end only",
  )
  local: str = _field(
    "", text, "a directory on each host's own disk, of this run alone; `''` for none"
  )
  local_every: int = _field(
    0, _PERIOD, "steps between two checkpoints in `local`; 0 for none"
  )
  remote: str = _field(
    "",
    text,
    "a second location, a directory or a bucket (`gs://…`), of this run alone; `''` "
    "for none",
  )
  remote_every: int = _field(
    0, _PERIOD, "steps between two checkpoints in `remote`; 0 for none"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guards:
  """The section `guards`: what becomes of bad steps, see `train/guards.py`."""

  bad_step: str = _field(
    "skip",
    text,
    "what a bad step does: `stop` ends the run; `skip` leaves parameters, EMA and "
    "optimizer as they were and goes on with the next batch; `rollback` goes back to "
    "the newest checkpoint and on with the data after the bad batch",
  )
  spike_factor: float = _field(
    0.0,
    zero_or(number(above=1)),
    "above 1; 0 for no limit. The running mean is over good steps, with decay 0.98, "
    "and is used after 50 of them",
  )
  max_bad_steps: int = _field(
    10,
    whole(1),
    "bad steps in a row, or rollbacks to one checkpoint, after which the run ends",
  )
  hang_factor: float = _field(
    10.0,
    zero_or(number(above=1)),
    "a step that takes so many times the median, and at least a minute, is reported, "
    "and the stacks of all threads are written to `WORKDIR/hangs/`; 0 for never",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
  """The section `validation`: the loss on images that are held out."""

  every: int = _field(1000, _PERIOD, "steps between two validations; 0 for none")
  examples: int = _field(1024, whole(0), "how many, rounded up to whole batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSet:
  """The section `log.sample_set`: images of the data's own captions."""

  every: int = _field(
    0,
    _PERIOD,
    "steps between two sets, in `WORKDIR/sample_sets/STEP/`, for comparison with the "
    "dataset's images, for instance by FID; 0 for none. Captions must be stored as "
    "embeddings; T5 is not needed",
  )
  count: int = _field(
    0, whole(0), "the first so many captions of the data, at their images' sizes"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wandb:
  """The section `log.wandb`: what goes to Weights & Biases too."""

  project: str = _field(
    "",
    text,
    "metrics, sample grids and the config go to this project, as one run for each "
    "workdir; `''` for none. Needs the package's extra `wandb`; WANDB_MODE=offline "
    "writes to `WORKDIR/wandb/` alone",
  )
  entity: str = _field("", text, "whose project it is; `''` for your own")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
  """The section `log`: metrics, samples and profiles."""

  every: int = _field(20, whole(1), "steps between two lines of metrics, at least 1")
  sample_every: int = _field(0, _PERIOD, "steps between two sample grids; 0 for none")
  # Those of the official configs.
  prompts: tuple[str, ...] = _field(
    (
      "dog",
      "portrait photo of a girl, photograph, highly detailed face, depth of field",
      "Self-portrait oil painting, a beautiful cyborg with golden hair, 8k",
      "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k",
      "A photo of beautiful mountain with realistic sunset and blue lake, highly "
      "detailed, masterpiece",
    ),
    each(text),
    "prompts of the grids; `()` for none",
  )
  sample_set: SampleSet = SampleSet()
  profile: tuple[int, ...] = _field(
    (),
    span,
    "`(first, last)`: these steps are profiled for XProf and TensorBoard, in "
    "`WORKDIR/profile/`; `()` for none. A run that goes on from one of these steps, or "
    "is rolled back to one, profiles the rest of them",
  )
  wandb: Wandb = Wandb()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A training config: what has no section, and the sections."""

  stage: str = _field("", text, "name of the stage, stored in its checkpoints")
  seed: int = _field(
    0,
    whole(0, below=2**32),  # more would be drawn from as if they were less
    "decides fresh parameters, the order of examples and captions, timesteps, noise "
    "and dropout",
  )
  total_steps: int = _field(0, whole(1), "updates until the stage ends")
  batch_size: int = _field(
    0,
    whole(1),
    "examples in the global batch, over all devices; a multiple of `accumulation` × "
    "`mesh.data` × `mesh.fsdp`",
  )
  accumulation: int = _field(
    1,
    whole(1),
    "number of microbatches: a batch is computed in so many parts, one after the "
    "other, with one update from the mean of their gradients; 1 for the whole batch",
  )
  model: Model = Model()
  compute: Compute = Compute()
  data: Data = Data()
  frozen: str = _field(
    "weights/frozen",
    text,
    "a folder or hub id with `vae/`, `text_encoder/` and `tokenizer/` in diffusers' "
    "layout, for sample grids and for captions that the dataset stores as text; `''` "
    "for the release's own. A miniature needs none",
  )
  loss: Loss = Loss()
  optimizer: Optimizer = Came()
  ema: Ema = Ema()
  adapter: Adapter = Adapter()
  init: Init = Init()
  mesh: MeshAxes = MeshAxes()
  checkpoint: Checkpoint = Checkpoint()
  guards: Guards = Guards()
  validation: Validation = Validation()
  log: Log = Log()


def section_of(optimizer: str) -> Optimizer:
  """The section `optimizer` with the defaults of the optimizer of that name.

  Raises:
    ValueError: an unknown name.
  """
  if optimizer not in OPTIMIZERS:
    known = ", ".join(map(repr, OPTIMIZERS))
    raise ValueError(f"Unknown optimizer.name {optimizer!r}; choose one of {known}.")
  return OPTIMIZERS[optimizer]()


def sections(config: Config) -> dict[str, Any]:
  """Dotted name of each section, "" for the top level → its dataclass, outer first."""
  found: dict[str, Any] = {"": config}

  def add(section: Any, dotted: str) -> None:
    for field in dataclasses.fields(section):
      value = getattr(section, field.name)
      if dataclasses.is_dataclass(value):
        found[f"{dotted}{field.name}"] = value
        add(value, f"{dotted}{field.name}.")

  add(config, "")
  return found


def fields(config: Config) -> dict[str, dataclasses.Field]:
  """Dotted name of each field that is no section → the field, with its default."""
  return {
    f"{section}.{field.name}" if section else field.name: field
    for section, values in sections(config).items()
    for field in dataclasses.fields(values)
    if field.metadata
  }


def checks(config: Config) -> dict[str, Check]:
  """Dotted name of each field that is no section → the check of its value."""
  return {name: field.metadata["check"] for name, field in fields(config).items()}
