"""Arguments of a call that no flag and no file can say: arrays, images, functions.

They stand beside the settings of `settings.Settings`, have the names that they have in
diffusers, and are checked here, as far as that can be done without the model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32

from pixsigma_jax.sample.editing import digest
from pixsigma_jax.sample.settings import (
  NOT_OF_DIFFUSERS,
  SETTINGS,
  Settings,
  check_prompts,
)

OUTPUT_TYPES = ("pil", "np", "latent")

# What each argument is.
CALL_ARGUMENTS: dict[str, str] = {
  "image": "An image to edit, or one for each prompt: a path, a file's bytes, a PIL "
  "image or a uint8 array.",
  "mask_image": "White where the image is drawn anew, black where it stays.",
  "regions": "Parts of the image that have prompts of their own; or such a list for "
  "each prompt.",
  "latents": "Unit normal noise in place of the seed's: `[h w c]` for each image.",
  "prompt_embeds": "Embeddings `[b t e]` in place of prompts; the prompt is then None.",
  "prompt_attention_mask": "Which of their tokens are there, `[b t]`.",
  "negative_prompt_embeds": "Embeddings `[b t e]` in place of negative_prompt; b may "
  "be 1.",
  "negative_prompt_attention_mask": "Which of their tokens are there, `[b t]`.",
  "output_type": 'What images are: "pil", arrays `[H W 3]` from 0 to 1 ("np"), or '
  'scaled latents `[h w c]` ("latent").',
  "callback_on_step_end": "A function that sees each step, and may change or stop it.",
}

# (pipeline, step from 0 on, timestep, what is known) → what it changes, or None for
# nothing; see `Pipeline.stream`.
StepCallback: TypeAlias = Callable[
  [Any, int, float, dict[str, Any]], Mapping[str, Any] | None
]
_OF_CALLBACKS = ("latents", "clean_latents", "images", "num_steps")


class StopDrawing(Exception):
  """Raised by a `callback_on_step_end` to leave its images undrawn.

  The call goes on with its other images, which are those of other batches.
  """


class Embedded(NamedTuple):
  """A caption given as embeddings `[t e]` and mask `[t]`."""

  embeddings: Float32[np.ndarray, "t e"]
  mask: Bool[np.ndarray, " t"]

  @property
  def digest(self) -> str:
    """A hash by which an image's settings can name it."""
    return digest(self.embeddings, self.mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallArguments:
  """What a call takes beside prompts and settings.

  The fields are described by `CALL_ARGUMENTS`.

  Raises:
    ValueError: a value is none that its argument takes, or two contradict each other.
  """

  # What is given may be of any library; the suite's checker would refuse it.
  __no_type_check__: ClassVar[bool] = True

  image: Any = None
  mask_image: Any = None
  regions: Any = None
  latents: Any = None
  prompt_embeds: Any = None
  prompt_attention_mask: Any = None
  negative_prompt_embeds: Any = None
  negative_prompt_attention_mask: Any = None
  output_type: Any = "pil"
  callback_on_step_end: Any = None

  def __post_init__(self):
    if self.output_type not in OUTPUT_TYPES:
      raise ValueError(
        f"Unknown output_type {self.output_type!r}; choose one of "
        f"{', '.join(OUTPUT_TYPES)}."
      )
    callback = self.callback_on_step_end
    if callback is not None and not callable(callback):
      raise ValueError(f"callback_on_step_end must be a function, not {callback!r}.")
    for embeds, mask in (
      ("prompt_embeds", "prompt_attention_mask"),
      ("negative_prompt_embeds", "negative_prompt_attention_mask"),
    ):
      if (getattr(self, embeds) is None) != (getattr(self, mask) is None):
        raise ValueError(f"{embeds} and {mask} belong together: give both, or neither.")

  def prompts(self, prompt: Any, settings: Settings) -> list[str]:
    """The prompts as a list; an empty text for each caption given as embeddings.

    Raises:
      ValueError: there is none, one is no text, or a text is given beside embeddings.
    """
    if self.negative_prompt_embeds is not None and settings.negative_prompt != "":
      raise ValueError(
        f"negative_prompt={settings.negative_prompt!r} and negative_prompt_embeds say "
        "the same thing: give one of them."
      )
    if self.prompt_embeds is None:
      return check_prompts(prompt)
    if prompt is not None:
      raise ValueError(
        "prompt and prompt_embeds say the same thing: give one of them, and None for "
        "the prompt beside prompt_embeds."
      )
    return [""] * len(np.asarray(self.prompt_embeds))

  def captions(
    self, negative: bool, count: int, length: int, width: int
  ) -> list[Embedded] | None:
    """The given captions, one for each of `count` prompts; None if there are none.

    Args:
      negative: of negative_prompt_embeds, else of prompt_embeds.
      length, width: of the model's captions; shorter ones are padded.

    Raises:
      ValueError: they are of another shape, or no finite numbers.
    """
    of = "negative_" if negative else ""
    name, mask_name = f"{of}prompt_embeds", f"{of}prompt_attention_mask"
    if getattr(self, name) is None:
      return None
    embeddings = _array(name, getattr(self, name))
    mask = np.asarray(getattr(self, mask_name))
    rows = {count, 1} if negative else {count}
    if (
      embeddings.ndim != 3
      or len(embeddings) not in rows
      or not 0 < embeddings.shape[1] <= length
      or embeddings.shape[2] != width
    ):
      raise ValueError(
        f"{name} has shape {embeddings.shape}; this model takes [b t e] with b = "
        f"{' or '.join(map(str, sorted(rows)))}, t up to {length} and e = {width}."
      )
    if mask.shape != embeddings.shape[:2] or not np.isin(mask, (0, 1)).all():
      raise ValueError(
        f"{mask_name} of shape {mask.shape} must have a 0 or 1 for each token of "
        f"{name}, {embeddings.shape[:2]}."
      )
    mask = mask.astype(bool)
    if not mask.any(axis=1).all():
      row = int(np.flatnonzero(~mask.any(axis=1))[0])
      raise ValueError(f"{mask_name} hides all tokens of row {row}: show one at least.")
    missing = length - embeddings.shape[1]
    embeddings = np.pad(embeddings, ((0, 0), (0, missing), (0, 0)))
    mask = np.pad(mask, ((0, 0), (0, missing)))
    given = [Embedded(*row) for row in zip(embeddings, mask, strict=True)]
    return given if len(given) == count else given * count

  def regions_of(self, count: int) -> list[Any]:
    """Regions of each of `count` prompts, not yet read; None for none.

    Raises:
      ValueError: there are more or fewer lists than prompts.
    """
    given = self.regions
    of_each = isinstance(given, list | tuple) and all(
      one is None or isinstance(one, list | tuple) for one in given
    )
    if not given or not of_each:
      return [given] * count
    if len(given) != count:
      raise ValueError(
        f"regions has {len(given)} lists for {count} prompts: give one list for all, "
        "or one for each."
      )
    return list(given)

  def noise(self, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray] | None:
    """The given initial noise `[h w c]` of each image; None if there is none.

    Args:
      shapes: of the images' latents.

    Raises:
      ValueError: there is more or less of it than images, of another shape, or it is
        not made of finite numbers.
    """
    if self.latents is None:
      return None
    given = [_array("latents", image) for image in self.latents]
    found = [image.shape for image in given]
    if found != list(shapes):
      raise ValueError(
        f"latents have the shapes {_shapes(found)}, and the images take "
        f"{_shapes(shapes)}: height, width and channels of each, channels last."
      )
    return given


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
  different = list(dict.fromkeys(shapes))
  shown = ", ".join(map(str, different[:3])) + (" …" if len(different) > 3 else "")
  return f"{shown} ({len(shapes)})"


def _array(name: str, value: Any) -> Float32[np.ndarray, "..."]:
  array = np.asarray(value, np.float32)
  if not np.isfinite(array).all():
    raise ValueError(f"{name} must be finite numbers.")
  return array


def split(arguments: Mapping[str, Any]) -> tuple[Settings, CallArguments]:
  """Keyword arguments of a call, as its settings and the rest, both checked.

  Raises:
    TypeError: there is no argument of a name.
    ValueError: a value is none that its argument takes.
  """
  for name in arguments:
    if name not in SETTINGS and name not in CALL_ARGUMENTS:
      known = ", ".join((*SETTINGS, *CALL_ARGUMENTS))
      way_out = NOT_OF_DIFFUSERS.get(name, f"known are {known}")
      raise TypeError(f"There is no argument {name!r}: {way_out}.")
  of_call = {n: value for n, value in arguments.items() if n in CALL_ARGUMENTS}
  settings = {n: value for n, value in arguments.items() if n in SETTINGS}
  return Settings.of(settings), CallArguments(**of_call)


def after_callback(
  returned: Any, shapes: Sequence[tuple[int, ...]]
) -> list[np.ndarray] | None:
  """Latents `[h w c]` that a callback returned for the next step; None if none changed.

  Args:
    shapes: of the latents that it was given.

  Raises:
    ValueError: it returned something else, or latents of another shape.
  """
  if returned is None:
    return None
  if not isinstance(returned, Mapping) or not set(returned) <= set(_OF_CALLBACKS):
    keys = isinstance(returned, Mapping)
    what = f"the keys {', '.join(map(str, returned))}" if keys else repr(returned)
    raise ValueError(
      f"callback_on_step_end returned {what}: it must return None, or a dict that may "
      "have latents in it, such as the one that it was given."
    )
  if "latents" not in returned:
    return None
  latents = [np.asarray(image, np.float32) for image in returned["latents"]]
  found = [image.shape for image in latents]
  if found != list(shapes):
    raise ValueError(
      f"callback_on_step_end returned latents of the shapes {_shapes(found)} for "
      f"those of {_shapes(shapes)}."
    )
  return latents
