"""Settings of a pipeline: each one's name, default, meaning and limits.

`Settings` is the one list. The arguments of `Pipeline.stream`, flags of commands, keys
of JSON lines, fields of the demo page and the table in docs/sampling.md come from it,
and values are checked nowhere else: numbers of NumPy and JAX become Python's, so that
files of images can say them.
"""

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

from pixsigma_jax.diffusion.solvers import SAMPLERS, check_time_grid
from pixsigma_jax.sample import captions
from pixsigma_jax.wording import listed, shortened

GUIDANCE_SCALE = 4.5
# What these draw with has learned guidance from its teacher.
UNGUIDED_SAMPLERS = ("lcm", "tcd", "dmd")
GUIDANCE_METHODS = ("cfg", "apg", "cfg-zero")
UNCONDITIONAL_MASKS = ("caption", "own")
_SEEDS = 2**32

# Arguments of diffusers' pipeline that there are none of here, and what to do instead.
NOT_OF_DIFFUSERS: dict[str, str] = {
  "sigmas": "give num_inference_steps, timesteps or use_karras_sigmas",
  "eta": "give a sampler: ddim adds no noise, euler-ancestral and dpm++-sde do",
  "generator": "give seed",
  "return_dict": "calling a pipeline returns an Output",
  "callback": "give callback_on_step_end",
  "callback_steps": "give callback_on_step_end",
  "clean_caption": "give caption_cleaning",
  "max_sequence_length": "it is the model's caption_length",
}


@dataclasses.dataclass(frozen=True)
class Text:
  """A text that can be written in UTF-8."""

  def check(self, name: str, value: Any) -> str:
    """The value as Python's own; see `Setting.check`."""
    if not isinstance(value, str):
      raise ValueError(f"{name} must be a text, not {value!r}.")
    try:
      value.encode()
    except UnicodeEncodeError:
      # Such as Python makes of an argument that is not in UTF-8.
      raise ValueError(
        f"{name} {shortened(value)} holds half a character, which no file can: give "
        "it in UTF-8."
      ) from None
    return str(value)


@dataclasses.dataclass(frozen=True)
class Whole:
  """A whole number, `least` or more; 512.0 is one."""

  least: int | None = None

  def check(self, name: str, value: Any) -> int:
    """The value as Python's own; see `Setting.check`."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
      value = float(value)
      value = int(value) if value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
      raise ValueError(f"{name} must be a whole number, not {value!r}.")
    number = int(value)
    if self.least is not None and number < self.least:
      raise ValueError(f"{name}={number} must be at least {self.least}.")
    return number


@dataclasses.dataclass(frozen=True)
class Number:
  """A finite number, `least` or more, `most` or less."""

  most: float = math.inf
  least: float = 0.0

  def check(self, name: str, value: Any) -> float:
    """The value as Python's own; see `Setting.check`."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
      with contextlib.suppress(OverflowError):  # an integer beyond all floats
        number = float(value)
    if not math.isfinite(number):
      raise ValueError(f"{name} must be a finite number, not {value!r}.")
    if not self.least <= number <= self.most:
      limits = f"lie in {self.least:g} … {self.most:g}"
      if self.most == math.inf:
        limits = f"be {self.least:g} or more"
      raise ValueError(f"{name}={number} must {limits}.")
    return number


@dataclasses.dataclass(frozen=True)
class Interval:
  """Two numbers between 0 and 1, the lower first."""

  def check(self, name: str, value: Any) -> tuple[float, float]:
    """The value as Python's own; see `Setting.check`."""
    if not isinstance(value, list | tuple) or len(value) != 2:
      raise ValueError(f"{name} must be two numbers, low and high, not {value!r}.")
    low, high = (Number(1.0).check(name, plain(end)) for end in value)
    if low > high:
      raise ValueError(f"{name} {low} … {high} must have the lower number first.")
    return low, high


@dataclasses.dataclass(frozen=True)
class WholeList:
  """Whole numbers, 0 or more, none twice."""

  def check(self, name: str, value: Any) -> tuple[int, ...]:
    """The value as Python's own; see `Setting.check`."""
    if not isinstance(value, list | tuple | range) or not value:
      raise ValueError(f"{name} must be a list of whole numbers, not {value!r}.")
    found = tuple(Whole(0).check(name, plain(one)) for one in value)
    if len(set(found)) < len(found):
      raise ValueError(f"{name} {listed(found)} must have no number twice.")
    return found


@dataclasses.dataclass(frozen=True)
class Margins:
  """Four whole numbers, 0 or more: of the left, above, of the right, below."""

  def check(self, name: str, value: Any) -> tuple[int, ...]:
    """The value as Python's own; see `Setting.check`."""
    if not isinstance(value, list | tuple) or len(value) != 4:
      raise ValueError(
        f"{name} must be four whole numbers, left, top, right and bottom, not "
        f"{value!r}."
      )
    return tuple(Whole(0).check(name, plain(side)) for side in value)


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of several names."""

  names: tuple[str, ...]

  def check(self, name: str, value: Any) -> str:
    """The value as Python's own; see `Setting.check`."""
    if value not in self.names:
      raise ValueError(
        f"Unknown {name} {value!r}; choose one of {', '.join(self.names)}."
      )
    return str(value)


@dataclasses.dataclass(frozen=True)
class Switch:
  """On or off."""

  def check(self, name: str, value: Any) -> bool:
    """The value as Python's own; see `Setting.check`."""
    if not isinstance(value, bool):
      raise ValueError(f"{name} must be True or False, not {value!r}.")
    return value


Kind: TypeAlias = (
  Text | Whole | Number | Interval | WholeList | Margins | Choice | Switch
)


@dataclasses.dataclass(frozen=True)
class Setting:
  """One thing that can be asked for.

  Attributes:
    name: of the argument, the flag and the key.
    default: in Python.
    kind: what values it takes.
    help: what it is, in a sentence.
    of_a_prompt: each prompt of a call, and each JSON line, can have its own.
    optional: None stands for the default.
    default_is: the default in words, where the value does not say it.
  """

  name: str
  default: Any
  kind: Kind
  help: str
  of_a_prompt: bool = False
  optional: bool = False
  default_is: str = ""

  def check(self, value: Any) -> Any:
    """The value as one of Python's own; a tuple, if each prompt has one.

    Raises:
      ValueError: it is none that the setting takes.
    """
    value = plain(value)
    if self.of_a_prompt and isinstance(value, list | tuple | range):
      return tuple(self.check_one(one) for one in value)
    return self.check_one(value)

  def check_one(self, value: Any) -> Any:
    """As `check`, of one prompt."""
    value = plain(value)
    if value is None and self.optional:
      return self.default
    return self.kind.check(self.name, value)


def plain(value: Any) -> Any:
  """An array or a scalar of NumPy, JAX or torch in Python's own lists and numbers."""
  if hasattr(value, "dtype") and hasattr(value, "tolist"):
    return value.tolist()
  return value


def _setting(default: Any, kind: Kind, help: str, **more: Any) -> Any:
  return dataclasses.field(
    default=default, metadata={"setting": {"kind": kind, "help": help, **more}}
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Checked settings for drawing prompts.

  The fields are described by `SETTINGS`. Those that can be a prompt's own are one value
  for all prompts or a tuple of one for each.

  Raises:
    ValueError: a value is none that its setting takes.
  """

  # What is given here may be of NumPy still; the suite's checker would refuse it.
  __no_type_check__: ClassVar[bool] = True

  negative_prompt: str | tuple[str, ...] = _setting(
    "",
    Text(),
    'What guidance leads away from; "" is the null caption of the training.',
    of_a_prompt=True,
    optional=True,
  )
  height: int | tuple[int | None, ...] | None = _setting(
    None,
    Whole(),
    "Height in pixels.",
    of_a_prompt=True,
    optional=True,
    default_is="the training's resolution",
  )
  width: int | tuple[int | None, ...] | None = _setting(
    None,
    Whole(),
    "Width in pixels.",
    of_a_prompt=True,
    optional=True,
    default_is="the training's resolution",
  )
  num_inference_steps: int = _setting(
    20,
    Whole(1),
    "Steps; each calls the network once, with heun all but the last twice.",
  )
  timesteps: tuple[int, ...] | None = _setting(
    None,
    WholeList(),
    "Where in the schedule the network is called, from 999 down to 0; their number "
    "stands in place of num_inference_steps.",
    optional=True,
    default_is="the sampler's own",
  )
  use_karras_sigmas: bool = _setting(
    False,
    Switch(),
    "Steps as dense as Karras et al. 2022 have them, which is where noise is low.",
  )
  guidance_scale: float = _setting(
    None,
    Number(),
    "How far guidance goes; up to 1 draws without, in half the time.",
    optional=True,
    default_is=f"{GUIDANCE_SCALE}; 1 with {', '.join(UNGUIDED_SAMPLERS)}",
  )
  guidance_rescale: float = _setting(
    0.0,
    Number(1.0),
    "Share of the contrast added by guidance to take back (Lin et al. 2023).",
  )
  guidance_interval: tuple[float, float] = _setting(
    (0.0, 1.0),
    Interval(),
    "Where guidance acts, low and high, as fractions of the schedule, of which 1 is "
    "pure noise (Kynkäänniemi et al. 2024).",
  )
  guidance_method: str = _setting(
    "cfg",
    Choice(GUIDANCE_METHODS),
    "How guidance goes: straight on, without the part that saturates (Sadat et al. "
    "2024), or from the best multiple of the unconditional prediction (Fan et al. "
    "2025).",
  )
  apg_eta: float = _setting(
    0.0, Number(1.0), "Share of the saturating part that apg leaves."
  )
  apg_threshold: float = _setting(
    15.0, Number(), "Length beyond which apg shortens an image's difference."
  )
  apg_momentum: float = _setting(
    -0.5,
    Number(1.0, least=-1.0),
    "Share of earlier steps' differences that apg adds.",
  )
  pag_scale: float = _setting(
    0.0,
    Number(),
    "Perturbed-attention guidance (Ahn et al. 2024); 0 is none, and any other calls "
    "the network once more a step.",
  )
  pag_applied_layers: tuple[int, ...] | None = _setting(
    None,
    WholeList(),
    "Numbers of the layers, from 0, whose self-attention it makes the identity.",
    optional=True,
    default_is="the middle layer",
  )
  skip_layer_guidance_scale: float = _setting(
    0.0,
    Number(),
    "Skip-layer guidance (Hyung et al. 2024); 0 is none, and any other calls the "
    "network once more a step.",
  )
  skip_guidance_layers: tuple[int, ...] | None = _setting(
    None,
    WholeList(),
    "Numbers of the layers, from 0, that it leaves out.",
    optional=True,
    default_is="the middle layer",
  )
  autoguidance_scale: float = _setting(
    1.0,
    Number(),
    "How far from the weaker model of a pipeline that has one (Karras et al. 2024, "
    "their w); up to 1 does not call it.",
  )
  step_caching: float = _setting(
    0.0,
    Number(),
    "Relative change of the first block below which a step reuses the other blocks' "
    "results of an earlier one; 0 computes every step.",
  )
  seed: int | tuple[int, ...] = _setting(
    0,
    Whole(),
    "Of the first image, the next has one more; or one for each prompt, whose "
    "further images have the next ones.",
    of_a_prompt=True,
  )
  sampler: str = _setting("dpm++", Choice(tuple(SAMPLERS)), "Solver.")
  num_images_per_prompt: int = _setting(
    1, Whole(1), "Images of each prompt, one after the other."
  )
  use_resolution_binning: bool = _setting(
    True,
    Switch(),
    "Draw at the nearest size of the training, then resize and crop; without effect at "
    "resolutions that have no table of sizes.",
  )
  strength: float | tuple[float | None, ...] | None = _setting(
    None,
    Number(1.0),
    "Share of the steps that change the image given: 1 draws it anew, 0 only encodes "
    "and decodes it.",
    of_a_prompt=True,
    optional=True,
    default_is="0.8; 1 with mask_image or outpaint",
  )
  outpaint: tuple[int, ...] | None = _setting(
    None,
    Margins(),
    "Pixels to draw around the image given: left, top, right, bottom.",
    optional=True,
    default_is="none",
  )
  unconditional_mask: str = _setting(
    "caption",
    Choice(UNCONDITIONAL_MASKS),
    'Tokens that an empty negative prompt shows: as many as the "caption" has, as the '
    'official code, or its "own" one, as diffusers.',
  )
  caption_cleaning: str = _setting(
    "raw", Choice(tuple(captions.MODES)), "What is done to prompts."
  )
  prompt_weighting: bool = _setting(
    False, Switch(), "Read (a red seven:1.3) as a weight of these words."
  )

  def __post_init__(self):
    for name, setting in SETTINGS.items():
      object.__setattr__(self, name, setting.check(getattr(self, name)))
    if self.prompt_weighting and self.caption_cleaning == "clean":
      raise ValueError(
        "caption_cleaning=clean takes out the parentheses that prompt_weighting reads: "
        "give raw or lower."
      )
    check_time_grid(self.sampler, self.timesteps, self.use_karras_sigmas)
    if self.timesteps is not None:
      object.__setattr__(self, "num_inference_steps", len(self.timesteps))
    if self.guidance_scale is None:
      scale = 1.0 if self.sampler in UNGUIDED_SAMPLERS else GUIDANCE_SCALE
      object.__setattr__(self, "guidance_scale", scale)

  @classmethod
  def of(cls, values: Mapping[str, Any]) -> "Settings":
    """The settings of these names, and the defaults of all others.

    Raises:
      TypeError: there is none of a name.
      ValueError: a value is none that its setting takes.
    """
    for name in values:
      if name not in SETTINGS:
        way_out = NOT_OF_DIFFUSERS.get(name, f"known are {', '.join(SETTINGS)}")
        raise TypeError(f"There is no setting {name!r}: {way_out}.")
    return cls(**values)

  @property
  def guided(self) -> bool:
    """Whether the network sees an unconditional half as well."""
    return self.guidance_scale > 1

  @property
  def branches(self) -> int:
    """Branches of guidance that the network computes of an image without regions."""
    weakened = (self.pag_scale > 0) + (self.skip_layer_guidance_scale > 0)
    return 1 + self.guided + weakened

  def of_prompts(self, count: int) -> list[dict[str, Any]]:
    """Settings of each of `count` prompts; the seed is its first image's.

    Raises:
      ValueError: there are more or fewer values than prompts, or a seed is too large.
    """
    columns = {}
    for name, setting in SETTINGS.items():
      if setting.of_a_prompt:
        values = getattr(self, name)
        if not isinstance(values, tuple):
          step = self.num_images_per_prompt if name == "seed" else 0
          values = [values + i * step if step else values for i in range(count)]
        if len(values) != count:
          raise ValueError(
            f"{name} has {len(values)} values for {count} prompts: give one for all, "
            "or one for each."
          )
        columns[name] = values
    copies = self.num_images_per_prompt
    for i, first in enumerate(columns["seed"]):
      for copy in (0, copies - 1):
        if not 0 <= first + copy < _SEEDS:
          raise ValueError(
            f"Image {i * copies + copy} has seed {first + copy}: seeds must lie in "
            f"0 … {_SEEDS - 1}."
          )
    return [
      dict(zip(columns, row, strict=True))
      for row in zip(*columns.values(), strict=True)
    ]

  def of_all(self) -> dict[str, Any]:
    """Settings that all images share, as stored in their files."""
    return {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in dataclasses.asdict(self).items()
      if not (SETTINGS[name].of_a_prompt or name == "num_images_per_prompt")
    }


SETTINGS: dict[str, Setting] = {
  field.name: Setting(field.name, field.default, **field.metadata["setting"])
  for field in dataclasses.fields(Settings)
}


def check_prompts(prompt: Any) -> list[str]:
  """One prompt or several as a list.

  Raises:
    ValueError: there is none, or one is no text.
  """
  prompt = plain(prompt)
  prompts = [prompt] if isinstance(prompt, str) else prompt
  if not isinstance(prompts, list | tuple):
    raise ValueError(
      f"prompt must be a text or a list of texts, not {listed([repr(prompt)])}."
    )
  if not prompts:
    raise ValueError("There is no prompt to draw.")
  return [Text().check("prompt", plain(one)) for one in prompts]
