"""What a study shows to whom: its images, and the order in which a rater sees them.

Orders are functions of the study's secret, the rater and the prompt, so that a page
that is loaded again shows the same, and nobody can tell a model by its place.
"""

import dataclasses
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from pixsigma_jax import disk
from pixsigma_jax.command import progress
from pixsigma_jax.evaluate.folder import EvaluationFolder
from pixsigma_jax.wording import listed

FEWEST_MODELS, MOST_MODELS = 2, 8
CRITERIA = ("quality", "match")


class ShownImage(NamedTuple):
  """One model's image for a prompt.

  Attributes:
    path: relative to the evaluation's folder.
    sha256: of the file.
  """

  path: str
  sha256: str
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class Subject:
  """A prompt with its image by each model.

  Attributes:
    id: of the suite's item.
  """

  id: str
  prompt: str
  images: dict[str, ShownImage]


class Task(NamedTuple):
  """What a rater sees at once.

  Attributes:
    models: in the order in which their images stand.
    repeated: the rater has seen this prompt before.
  """

  subject: Subject
  models: tuple[str, ...]
  repeated: bool


@dataclasses.dataclass(frozen=True)
class Design:
  """A study, as it was created: it never changes.

  Attributes:
    secret: of orders and of images' addresses, in hexadecimal.
    per_rater: prompts that each rater sees; every prompt comes to as many raters as
      any other, give or take one.
    repeats: prompts of these that come a second time, in another order.
  """

  name: str
  secret: str
  models: tuple[str, ...]
  subjects: tuple[Subject, ...]
  per_rater: int
  repeats: int

  def tasks(self, rater: int) -> list[Task]:
    """All that a rater sees, in order.

    Prompts that are repeated are among the first half, and come again between the
    prompts of the second.

    Args:
      rater: number within the study, from 0.
    """
    dealt = self._sorted(self.subjects, "deal")
    start = rater * self.per_rater
    mine = [dealt[(start + i) % len(dealt)] for i in range(self.per_rater)]
    mine = self._sorted(mine, rater)
    half = (self.per_rater + 1) // 2
    first, second = mine[:half], mine[half:]
    again = self._sorted(first, rater, "again")[: self.repeats]
    later = [(s, False) for s in second] + [(s, True) for s in again]
    later.sort(key=lambda each: self._key(rater, "later", each[0].id, each[1]))
    return [
      Task(subject, self._order(rater, subject, repeated), repeated)
      for subject, repeated in [(s, False) for s in first] + later
    ]

  def address(self, subject: Subject, model: str) -> str:
    """Name of an image on the website, from which nothing else can be told."""
    return self._key("picture", subject.id, model).hex()[:32]

  def to_json(self) -> dict[str, Any]:
    """The study as JSON holds it; `from_json` reads it."""
    content = dataclasses.asdict(self)
    for subject in content["subjects"]:
      subject["pictures"] = subject.pop("images")
    return content

  @classmethod
  def from_json(cls, content: dict[str, Any]) -> "Design":
    subjects = tuple(
      Subject(
        each["id"],
        each["prompt"],
        {name: ShownImage(*fields) for name, fields in each["pictures"].items()},
      )
      for each in content["subjects"]
    )
    models = tuple(content["models"])
    return cls(**content | {"subjects": subjects, "models": models})

  def _order(self, rater: int, subject: Subject, repeated: bool) -> tuple[str, ...]:
    def key(model: str) -> bytes:
      return self._key(rater, subject.id, repeated, model)

    models = tuple(sorted(self.models, key=key))
    if repeated and models == self._order(rater, subject, False):
      return models[1:] + models[:1]
    return models

  def _sorted(self, subjects: Sequence[Subject], *about: object) -> list[Subject]:
    return sorted(subjects, key=lambda s: self._key(*about, "subject", s.id))

  def _key(self, *about: object) -> bytes:
    text = "\0".join(map(str, about))
    return hmac.digest(bytes.fromhex(self.secret), text.encode(), hashlib.sha256)


def draw_up(
  folder: EvaluationFolder,
  *,
  name: str,
  secret: str,
  models: Sequence[str] = (),
  per_rater: int | None = None,
  repeats: int = 0,
) -> Design:
  """A study of the first image that each model has for each prompt.

  Args:
    models: names within the folder; empty for all that are there.
    per_rater: prompts that a rater sees; None for all.

  Raises:
    ValueError: the models are not two to eight of the folder's, images are missing
      or damaged, or a rater cannot see so many prompts, or so many twice.
  """
  models = chosen_models(folder, models)
  count = len(folder.items)
  per_rater = count if per_rater is None else per_rater
  if not 1 <= per_rater <= count:
    raise ValueError(
      f"A rater cannot see {per_rater} prompts of {count}: give --per_rater from 1 to "
      f"{count}, or leave it out for all."
    )
  if not 0 <= repeats <= (most := (per_rater + 1) // 2):
    raise ValueError(
      f"{repeats} prompts cannot come twice: half of a rater's {per_rater} can, so "
      f"give --repeats from 0 to {most}."
    )
  subjects = []
  for item in progress(folder.items, count, "Images read"):
    images = {
      model: _image(folder, folder.model(model).image_path(item)) for model in models
    }
    subjects.append(Subject(item.id, item.prompt, images))
  return Design(name, secret, tuple(models), tuple(subjects), per_rater, repeats)


def chosen_models(folder: EvaluationFolder, models: Sequence[str]) -> list[str]:
  """Models to compare, whose images are all there.

  Args:
    models: names within the folder; empty for all that are there.

  Raises:
    ValueError: they are not two to eight of the folder's, or an image is missing.
  """
  there = [model.name for model in folder.models()]
  chosen = list(models) or there
  if unknown := sorted(set(chosen) - set(there)):
    raise ValueError(
      f"{folder.path} has no images of {listed(unknown)}: it has those of "
      f"{listed(there, 20)}. `evaluate sample` adds a model."
    )
  if len(set(chosen)) < len(chosen):
    raise ValueError(f"--models names one twice: {', '.join(chosen)}.")
  if not FEWEST_MODELS <= len(chosen) <= MOST_MODELS:
    raise ValueError(
      f"{len(chosen)} models ({listed(chosen, 20)}) cannot be compared: choose "
      f"{FEWEST_MODELS} to {MOST_MODELS} with --models."
    )
  for name in chosen:
    if missing := folder.model(name).missing():
      ids = listed([item.id for item, _ in missing])
      raise ValueError(
        f"{name} has no image for {len(missing)} of {len(folder.items)} prompts "
        f"({ids}): run `evaluate sample` again, or leave it out of --models."
      )
  return chosen


def _image(folder: EvaluationFolder, path: Any) -> ShownImage:
  try:
    with Image.open(path) as image:
      width, height = image.size
      if image.format != "PNG":
        raise ValueError(f"{path} is {image.format}, not PNG: save it as PNG.")
  except OSError as error:
    raise ValueError(f"{path} cannot be read as an image: {error}.") from error
  name = str(path.relative_to(folder.path))
  return ShownImage(name, disk.file_hash(path), height, width)
