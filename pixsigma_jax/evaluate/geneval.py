"""GenEval: whether an image shows the objects of its prompt, by what a detector found.

The rules are those of djghosh13/geneval (Ghosh et al. 2023), `evaluate_images.py` and
`summary_scores.py`. Which detector, and which classifier of colors, is no matter here:
detections come from a file or from `scorers/detectors.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

Task: TypeAlias = Literal[
  "single_object", "two_object", "counting", "colors", "position", "color_attr"
]
TASKS: tuple[Task, ...] = get_args(Task)
# Prompts of each task in the published set of 553.
PROMPTS: dict[Task, int] = {
  "single_object": 80,
  "two_object": 99,
  "counting": 80,
  "colors": 94,
  "position": 100,
  "color_attr": 100,
}
# COCO's classes in their order, by GenEval's names (its `object_names.txt`).
CLASSES = (
  *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck"),
  *("boat", "traffic light", "fire hydrant", "stop sign", "parking meter", "bench"),
  *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra"),
  *("giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis"),
  *("snowboard", "sports ball", "kite", "baseball bat", "baseball glove"),
  *("skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork"),
  *("knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli"),
  *("carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant"),
  *("bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
  *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
  *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier"),
  "toothbrush",
)
COLORS = (
  *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black"),
  "white",
)
RELATIONS = ("left of", "right of", "above", "below")

_CONFIDENCE = 0.3
_CONFIDENCE_COUNTING = 0.9
MOST_OF_A_CLASS = 16  # detections that are looked at
_TOLERANCE = 0.1  # of both sizes, by which an offset is shortened
_DIRECTION = 0.5  # of the offset's length, from which it counts as a direction


class Detection(NamedTuple):
  """An object that a detector found.

  Attributes:
    name: class, by GenEval's names of COCO's.
    box: left, top, right, bottom in pixels.
    confidence: from 0 to 1.
    color: one of `COLORS`, as a classifier sees the object; None if nobody looked.
  """

  name: str
  box: tuple[float, float, float, float]
  confidence: float
  color: str | None = None


class Verdict(NamedTuple):
  """Whether an image is right, and why not."""

  correct: bool
  reason: str


def score(
  detections: Iterable[Detection | Mapping[str, Any]], metadata: Mapping[str, Any]
) -> Verdict:
  """Compares the detections in one image with its prompt.

  Detections count above a confidence of 0.3 (0.9 for counting), the 16 surest of each
  class, without suppression of overlaps. Every clause of `include` must hold: the
  `count` surest objects of its class exist, all of them have its `color`, and each
  stands in its `position` to each object of an earlier clause. No clause of `exclude`
  may: so many objects of a class, or more, are too many.

  Args:
    detections: in any order, as `Detection` or as its fields by name.
    metadata: a line of GenEval's `evaluation_metadata.jsonl`: `tag`, `include` and
      optionally `exclude`.

  Raises:
    ValueError: metadata or a detection is not of this form, or a color is asked for
      and a detection says none.
  """
  tag = metadata.get("tag")
  if tag not in TASKS:
    raise ValueError(f"GenEval has no task {tag!r}: one of {', '.join(TASKS)}.")
  if not metadata.get("include"):
    raise ValueError(f"A prompt of {tag} asks for nothing: `include` is empty.")
  objects = _surest(
    detections, _CONFIDENCE_COUNTING if tag == "counting" else _CONFIDENCE
  )
  reasons: list[str] = []
  groups: list[list[Detection] | None] = []  # what each clause found, None if it failed
  for clause in metadata["include"]:
    name, count = clause["class"], clause["count"]
    found = objects.get(name, [])[:count]
    why = None
    if len(found) < count:
      why = f"expected {name}>={count}, found {len(found)}"
    else:
      if color := clause.get("color"):
        why = _wrong_color(found, name, color)
      if why is None and (position := clause.get("position")):
        relation, target = position
        if not 0 <= target < len(groups):
          raise ValueError(
            f"The {name} stands {relation} of clause {target}, and only "
            f"{len(groups)} clauses come before it."
          )
        why = _wrong_position(found, name, relation, groups[target])
    groups.append(found if why is None else None)
    if why is not None:
      reasons.append(why)
  for clause in metadata.get("exclude", ()):
    name, count = clause["class"], clause["count"]
    if (found := len(objects.get(name, []))) >= count:
      reasons.append(f"expected {name}<{count}, found {found}")
  return Verdict(not reasons, "; ".join(reasons))


def _surest(
  detections: Iterable[Detection | Mapping[str, Any]], confidence: float
) -> dict[str, list[Detection]]:
  """The detections that count, by class, the most confident first."""
  objects: dict[str, list[Detection]] = {}
  for detection in detections:
    if not isinstance(detection, Detection):
      detection = _detection(detection)
    if detection.confidence > confidence:
      objects.setdefault(detection.name, []).append(detection)
  return {
    name: sorted(found, key=lambda d: d.confidence, reverse=True)[:MOST_OF_A_CLASS]
    for name, found in objects.items()
  }


def _detection(fields: Mapping[str, Any]) -> Detection:
  try:
    detection = Detection(**fields)
  except TypeError:
    raise ValueError(
      f"A detection has the fields {', '.join(map(str, fields))}: it must have name, "
      "box (left, top, right, bottom) and confidence, and may have color."
    ) from None
  if len(detection.box) != 4:
    raise ValueError(
      f"The box of a {detection.name} has {len(detection.box)} numbers, not left, top, "
      "right and bottom."
    )
  left, top, right, bottom = map(float, detection.box)
  return detection._replace(box=(left, top, right, bottom))


def _wrong_color(found: Sequence[Detection], name: str, color: str) -> str | None:
  colors = [detection.color for detection in found]
  if None in colors:
    raise ValueError(
      f"The prompt asks for a {color} {name}, and a detection of a {name} has no "
      "color: classify colors before scoring."
    )
  if colors.count(color) == len(found):
    return None
  others = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
  return f"expected {color} {name}>={len(found)}, found {others}"


def _wrong_position(
  found: Sequence[Detection],
  name: str,
  relation: str,
  targets: Sequence[Detection] | None,
) -> str | None:
  if relation not in RELATIONS:
    raise ValueError(f"GenEval has no relation {relation!r}: {', '.join(RELATIONS)}.")
  if targets is None:
    return f"no target for {name} to be {relation}"
  for detection in found:
    for target in targets:
      relations = relative_position(detection.box, target.box)
      if relation not in relations:
        seen = " and ".join(sorted(relations)) or "near"
        return f"expected {name} {relation} target, found {seen} target"
  return None


def relative_position(a: Sequence[float], b: Sequence[float]) -> set[str]:
  """Relations of box a to box b: none, one or two of `RELATIONS`.

  The offset of the centres, shortened along each axis by a tenth of both sizes, over
  its whole length; a direction from half of it.
  """
  first, second = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
  offset = first.mean(axis=0) - second.mean(axis=0)
  sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
  shortened = np.maximum(np.abs(offset) - _TOLERANCE * sizes, 0) * np.sign(offset)
  if (np.abs(shortened) < 1e-3).all():
    return set()
  right, down = shortened / np.linalg.norm(offset)
  signs = dict(zip(RELATIONS, (-right, right, -down, down), strict=True))
  return {relation for relation, share in signs.items() if share > _DIRECTION}


def task_scores(verdicts: Iterable[tuple[Task, bool]]) -> dict[str, float]:
  """Share of right images in each task, and `overall`, the mean over tasks.

  Args:
    verdicts: task and verdict of every image.

  Raises:
    ValueError: there is none.
  """
  counts: dict[str, list[bool]] = {}
  for task, correct in verdicts:
    counts.setdefault(task, []).append(correct)
  if not counts:
    raise ValueError("GenEval's scores need at least one image.")
  scores = {task: float(np.mean(counts[task])) for task in TASKS if task in counts}
  return {**scores, "overall": float(np.mean(list(scores.values())))}
