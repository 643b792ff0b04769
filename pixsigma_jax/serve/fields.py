"""Fields of a request for images: OpenAI's, and the settings of a pipeline.

Whatever is not known, or known and not to be had here, is refused by name.
"""

import dataclasses
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pixsigma_jax.sample import image_files, regions
from pixsigma_jax.sample.settings import SETTINGS, Number, Setting, Switch, Text, Whole
from pixsigma_jax.wording import listed, shortened

MOST_PARTIAL_IMAGES = 3
_SEEDS = 2**32
_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_MOST = 1000.0  # of guidance and the like: beyond it images are no numbers
_MESSAGE = 2000  # characters; what is refused may be as long as a body
_ABOUT_USER = 512  # characters of a name of the client's user

# Settings that have a name of OpenAI's, or none in a request.
_OTHERWISE = {"num_images_per_prompt": "give n"}
# Fields of OpenAI's that have no choice here: what may be said, and the way out.
_SINGLE: dict[str, tuple[tuple[str, ...], str]] = {
  "background": (("auto", "opaque"), "images here have no transparency"),
  "moderation": (("auto", "low"), "nothing is moderated here"),
  "quality": (("auto", "standard"), "give num_inference_steps"),
}
# Fields of OpenAI's that stand for something this server does not do.
_NOT_HERE = {
  "style": "describe it in the prompt",
  "complexity": "give num_inference_steps",
  "svg": "output_format may be png, jpeg or webp",
  "frame_count": "output_format may be png, jpeg or webp",
  "frame_duration_ms": "output_format may be png, jpeg or webp",
}


class Refusal(Exception):
  """An answer in OpenAI's shape of errors.

  Attributes:
    status: of HTTP.
    param: the field that is to blame.
    code: a word for programs.
    headers: of the answer.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    code: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.param, self.code = status, param, code
    self.headers = dict(headers or {})

  def body(self) -> dict[str, Any]:
    """As JSON says it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
      self.status,
      "server_error" if self.status >= 500 else "invalid_request_error",
    )
    return {
      "error": {
        "message": str(self)[:_MESSAGE],
        "type": kind,
        "param": self.param,
        "code": self.code,
      }
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLimits:
  """The most that one request may ask for.

  Attributes:
    max_n: images.
    max_steps: of `num_inference_steps` and `timesteps`.
    max_pixels: of an image.
    max_prompt: characters of a prompt, of a negative one and of a region's.
    max_regions: regions with prompts of their own; 0 for none.

  Raises:
    ValueError: a limit is less than 1, or `max_regions` less than 0.
  """

  max_n: int = 10
  max_steps: int = 100
  max_pixels: int
  max_prompt: int = 4000
  max_regions: int = 8

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      least = 0 if name == "max_regions" else 1
      if value < least:
        raise ValueError(f"--{name}={value} must be at least {least}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
  """A request for images, as far as it can be understood without the model.

  Attributes:
    settings: of the pipeline, by name; `num_images_per_prompt` among them.
    regions: parts of the image that have prompts of their own, as `Pipeline` takes
      them; None for none.
    loras: scales of the LoRAs that act, by name.
    size: in OpenAI's words, width first.
    output_compression: quality of a lossy format; None for that of `sample`.
    as_url: answer by `data:` addresses in place of base64 alone.
    partial_images: previews of each image that a stream shows.
    safety_identifier: handed back as it came.
  """

  prompt: str
  settings: Mapping[str, Any]
  regions: Sequence[Mapping[str, Any]] | None
  loras: Mapping[str, float]
  size: str
  output_format: str
  output_compression: int | None
  as_url: bool
  stream: bool
  partial_images: int
  safety_identifier: str | None


def read_fields(
  fields: Mapping[str, Any],
  limits: RequestLimits,
  model: str,
  size_by_default: tuple[int, int],
  known_loras: Collection[str] = (),
) -> Wanted:
  """What a request asks for; None is as good as no field.

  Args:
    fields: of the JSON object, or of the form with values as JSON has them.
    model: the name of the only one.
    size_by_default: height and width of the size "auto".
    known_loras: names that the field `loras` may have.

  Raises:
    Refusal: a field is unknown, missing, or none that this server takes.
  """
  left = {name: value for name, value in fields.items() if value is not None}
  prompt = _take(left, "prompt", Text())
  if prompt is None:
    raise Refusal(
      400, "There is no prompt.", code="missing_required_parameter", param="prompt"
    )
  asked_model = _take(left, "model", Text())
  if asked_model not in (None, model):
    raise Refusal(
      404,
      f"There is no model {shortened(asked_model)} here: this server has {model!r}.",
      code="model_not_found",
      param="model",
    )
  for name, (choices, way_out) in _SINGLE.items():
    value = left.pop(name, None)
    if value is not None and value not in choices:
      raise _invalid(name, f"{name} must be {' or '.join(choices)}: {way_out}.")
  form = left.pop("output_format", "png")
  if form not in list(image_files.FORMATS):
    raise _invalid(
      "output_format",
      f"output_format must be one of {', '.join(image_files.FORMATS)}, not "
      f"{listed([repr(form)])}.",
    )
  compression = _take_whole(left, "output_compression", None, 0, 100)
  if compression is not None and form == "png":
    raise _invalid(
      "output_compression",
      "A png loses nothing and has no output_compression: leave it out, or give "
      "output_format jpeg or webp.",
    )
  answer = left.pop("response_format", "b64_json")
  if answer not in ("b64_json", "url"):
    raise _invalid("response_format", "response_format must be b64_json or url.")
  stream = _take(left, "stream", Switch()) or False
  partial = _take_whole(left, "partial_images", 0, 0, MOST_PARTIAL_IMAGES)
  if partial and not stream:
    raise _invalid("partial_images", "partial_images need stream to be true.")
  who = [_take(left, name, Text()) for name in ("safety_identifier", "user")]
  if any(len(name or "") > _ABOUT_USER for name in who):
    raise _invalid(
      "safety_identifier", f"It may have at most {_ABOUT_USER} characters."
    )
  n = _take_whole(left, "n", 1, 1, limits.max_n)
  size = left.pop("size", "auto")
  loras = _loras(left.pop("loras", {}), known_loras)
  parts = left.pop("regions", None)
  settings = _settings(left)
  _apply_size(settings, size)
  height, width = (
    default if settings.get(side) is None else settings[side]
    for side, default in zip(("height", "width"), size_by_default, strict=True)
  )
  before, top, right, bottom = settings.get("outpaint") or (0, 0, 0, 0)
  height, width = height + top + bottom, width + before + right
  _check_amounts(prompt, settings, height, width, form, limits)
  if parts is not None:
    _check_regions(parts, height, width, limits)
  # As an API's users expect: each request another image, unless it says which.
  settings.setdefault("seed", secrets.randbelow(_SEEDS - n + 1))
  return Wanted(
    prompt=prompt,
    settings=settings | {"num_images_per_prompt": n},
    regions=parts or None,
    loras=loras,
    size=f"{width}x{height}",
    output_format=form,
    output_compression=compression,
    as_url=answer == "url",
    stream=stream,
    partial_images=partial or 0,
    safety_identifier=who[0] or who[1],
  )


def _settings(left: Mapping[str, Any]) -> dict[str, Any]:
  """Checked settings; what is none is refused."""
  settings = {}
  for name, value in left.items():
    if name not in SETTINGS or name in _OTHERWISE:
      ours = [name for name in SETTINGS if name not in _OTHERWISE]
      known = f"known are OpenAI's fields, regions, loras and {', '.join(ours)}"
      way_out = _OTHERWISE.get(name) or _NOT_HERE.get(name) or known
      raise Refusal(
        400,
        f"Unknown parameter {shortened(name)}: {way_out}.",
        code="unknown_parameter",
        param=name,
      )
    settings[name] = _check(name, SETTINGS[name], value)
  return settings


def _loras(value: Any, known: Collection[str]) -> dict[str, float]:
  """Scales by name, from an object such as {"watercolor": 0.8}."""
  if not isinstance(value, Mapping):
    raise _invalid("loras", 'loras must be an object of scales, such as {"name": 0.8}.')
  if unknown := sorted(value.keys() - set(known)):
    have = f"there are {listed(known)}" if known else "this server has none"
    raise _invalid("loras", f"There is no LoRA {shortened(unknown[0])}: {have}.")
  try:
    kind = Number(_MOST, least=-_MOST)
    return {name: kind.check(name, scale) for name, scale in value.items()}
  except ValueError as error:
    raise _invalid("loras", f"In loras, {error}") from error


def _apply_size(settings: dict[str, Any], size: Any) -> None:
  if size == "auto":
    return
  found = _SIZE.fullmatch(size) if isinstance(size, str) else None
  if found is None:
    raise _invalid(
      "size", f'size must be "WIDTHxHEIGHT" or "auto", not {listed([repr(size)])}.'
    )
  for side, value in zip(("width", "height"), found.groups(), strict=True):
    if settings.setdefault(side, int(value)) != int(value):
      raise _invalid(
        "size", f"size says {side} {value}, and {side} {settings[side]}: leave one out."
      )


def _check_amounts(
  prompt: str,
  settings: Mapping[str, Any],
  height: int,
  width: int,
  form: str,
  limits: RequestLimits,
) -> None:
  for name, text in (
    ("prompt", prompt),
    ("negative_prompt", settings.get("negative_prompt") or ""),
  ):
    _check_length(name, name, text, limits)
  for name, steps in (
    ("num_inference_steps", settings.get("num_inference_steps") or 0),
    ("timesteps", len(settings.get("timesteps") or ())),
  ):
    if steps > limits.max_steps:
      raise _invalid(
        name,
        f"{name} asks for {steps} steps, and at most {limits.max_steps} are "
        "allowed here.",
      )
  if min(height, width) < 1 or height * width > limits.max_pixels:
    raise _invalid(
      "size",
      f"An image of {width} x {height} pixels (width x height) must have at least one "
      f"and at most {limits.max_pixels:,} here.",
    )
  try:
    image_files.check_sides(form, height, width)
  except ValueError as error:
    raise _invalid("size", str(error)) from error


def _check_regions(given: Any, height: int, width: int, limits: RequestLimits) -> None:
  if isinstance(given, list):
    if len(given) > limits.max_regions:
      raise _invalid(
        "regions",
        f"regions lists {len(given):,}, and at most {limits.max_regions:,} are allowed "
        "here.",
      )
    for i, region in enumerate(given):
      if isinstance(region, Mapping) and "mask" in region:
        raise _invalid(
          "regions",
          f"Region {i}'s mask would be a file of this server, and no field names one: "
          "give a box.",
        )
  try:
    found = regions.read(given, height, width)
  except ValueError as error:
    raise _invalid("regions", str(error)) from error
  for i, region in enumerate(found):
    _check_length("regions", f"Region {i}'s prompt", region.prompt, limits)


def _check_length(name: str, what: str, text: str, limits: RequestLimits) -> None:
  if len(text) > limits.max_prompt:
    raise _invalid(
      name,
      f"{what} has {len(text):,} characters, and at most {limits.max_prompt:,} are "
      "allowed here.",
    )


def _take(left: dict[str, Any], name: str, kind: Any) -> Any:
  value = left.pop(name, None)
  if value is None:
    return None
  try:
    return kind.check(name, value)
  except ValueError as error:
    raise _invalid(name, str(error)) from error


def _take_whole(
  left: dict[str, Any], name: str, default: Any, least: int, most: int
) -> Any:
  value = _take(left, name, Whole())
  if value is None:
    return default
  if not least <= value <= most:
    raise _invalid(name, f"{name}={value} must lie in {least} … {most}.")
  return value


def _check(name: str, setting: Setting, value: Any) -> Any:
  try:
    checked = setting.check_one(value)
  except (ValueError, TypeError) as error:
    raise _invalid(name, str(error)) from error
  if isinstance(setting.kind, Number) and checked is not None and checked > _MOST:
    raise _invalid(name, f"{name}={checked:g} must be at most {_MOST:g} here.")
  return checked


def _invalid(name: str, message: str) -> Refusal:
  return Refusal(400, message, code="invalid_value", param=name)
