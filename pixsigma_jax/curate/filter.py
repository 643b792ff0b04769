"""Choice of the images to train on, with one reason for each of the others."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32

from pixsigma_jax.data import ingest
from pixsigma_jax.data.index import Index, open_index

# In the order in which they are asked.
REASONS = (
  "error",
  "duplicate",
  "side",
  "area",
  "aspect",
  "no caption",
  "captions too short",
  "no score",
  "aesthetic",
)
CAPTION_KINDS = ("any", "long", "short")

# Part → row → score of the duplicates that are kept in place of what they are like.
StandIns: TypeAlias = Mapping[int, Mapping[int, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Rules that an image must pass; None where anything is allowed."""

  min_side: int | None = None  # pixels of the shorter side
  min_area: int | None = None  # pixels in all
  max_aspect: float | None = None  # the longer side over the shorter
  need_caption: str | None = None  # of which kind, or "any"
  min_caption_words: int | None = None  # of at least one caption
  min_aesthetic: float | None = None
  keep_quantile: float | None = None  # which part of those that pass all else
  keep_duplicates: bool = False

  def __post_init__(self):
    if self.min_aesthetic is not None and self.keep_quantile is not None:
      raise ValueError(
        f"--min_aesthetic={self.min_aesthetic} and --keep_quantile="
        f"{self.keep_quantile} both say which scores to keep: give one of them."
      )
    for name in ("min_side", "min_area", "min_caption_words"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"--{name}={value} refuses nothing: leave it out.")
    if self.max_aspect is not None and not self.max_aspect >= 1:
      raise ValueError(
        f"--max_aspect={self.max_aspect} refuses everything: it is the longer side "
        "over the shorter, at least 1."
      )
    if self.keep_quantile is not None and not 0 < self.keep_quantile <= 1:
      raise ValueError(
        f"--keep_quantile={self.keep_quantile} is not above 0 and at most 1: 0.25 "
        "keeps the best quarter."
      )
    if self.need_caption not in (None, *CAPTION_KINDS):
      raise ValueError(
        f"--need_caption={self.need_caption} is not one of {', '.join(CAPTION_KINDS)}."
      )

  @property
  def asks_for_scores(self) -> bool:
    return self.min_aesthetic is not None or self.keep_quantile is not None

  @property
  def asks_for_captions(self) -> bool:
    return self.need_caption is not None or self.min_caption_words is not None


def filter_images(
  index: Index, rules: Rules, *, beam_options: Sequence[str]
) -> dict[str, Any]:
  """Writes which images the rules keep, and why not the others.

  The report, also in kept/report.json, counts them. The rules are kept beside the
  parts, with what the index knew when they were applied: the same again does nothing,
  any other writes all parts anew.

  Raises:
    ValueError: a rule needs a step that has not been there.
  """
  steps = _steps(index, rules)
  settings = {
    "rules": dataclasses.asdict(rules),
    "of": {step: index.settings(step) for step in steps},
    "of_duplicates": "the best that passes",  # earlier versions: the largest alone
  }
  stand_ins = {} if rules.keep_duplicates else _stand_ins(index, rules, steps)
  threshold = rules.min_aesthetic
  if rules.keep_quantile is not None:
    before = index.settings("kept") or {}
    # Without a part it is of a scan before the last, which took all of them away.
    is_begun = len(index.missing("kept")) < index.num_parts
    if is_begun and {key: before.get(key) for key in settings} == settings:
      threshold = before["threshold"]  # of a run that was killed: looking again is long
    else:
      threshold = _threshold(index, rules, steps, stand_ins, rules.keep_quantile)
  missing = index.begin("kept", {**settings, "threshold": threshold})
  ingest.run_parts(
    functools.partial(
      _filter_part, index.directory, rules, steps, stand_ins, threshold
    ),
    missing,
    what="Filtering parts",
    beam_options=beam_options,
  )
  report = _report(index, threshold)
  if missing:
    index.write_json("kept/report.json", report)
  return report


def _steps(index: Index, rules: Rules) -> tuple[str, ...]:
  """The steps that the rules look at."""
  steps = ["scan"]
  if not rules.keep_duplicates:
    steps.append("duplicates")
  if rules.asks_for_captions:
    steps.append(index.captions_step)
  if rules.asks_for_scores:
    steps.append("scores")
  for step in steps:
    if not index.has(step):
      index.read(index.missing(step)[0], step)  # says which command is missing
  return tuple(dict.fromkeys(steps))


def _filter_part(
  directory: str,
  rules: Rules,
  steps: Sequence[str],
  stand_ins: StandIns,
  threshold: float | None,
  part: int,
) -> None:
  index = open_index(directory)
  reasons, scores = _judged(index, rules, steps, stand_ins, part)
  if threshold is not None:
    low = (reasons == "") & ~(scores >= np.float32(threshold))
    reasons[low] = "aesthetic"
  kept = reasons == ""
  table = pa.table(
    {"kept": kept, "reason": pa.array(reasons.tolist(), pa.string(), mask=kept)}
  )
  index.write("kept", part, table)


def _judged(
  index: Index,
  rules: Rules,
  steps: Sequence[str],
  stand_ins: StandIns,
  part: int,
) -> tuple[np.ndarray, Float32[np.ndarray, "n"]]:
  """First reason against each image, "" if there is none, and its score.

  Of the reasons all but the last: which score is too low may depend on the others'.
  """
  table = _table(index, rules, steps, part)
  refused, scores = _refused(table, rules), _scores(table)
  for row, score in stand_ins.get(part, {}).items():
    refused["duplicate"][row] = False
    scores[row] = score
  if rules.asks_for_scores:
    refused["no score"] = np.isnan(scores)
  return _first(refused), scores


def _first(refused: Mapping[str, Bool[np.ndarray, "n"]]) -> np.ndarray:
  """The first reason against each image, "" if there is none."""
  reasons = np.full(len(refused["error"]), "", object)
  for reason in REASONS:
    if reason in refused:
      reasons[(reasons == "") & refused[reason]] = reason
  return reasons


def _table(index: Index, rules: Rules, steps: Sequence[str], part: int) -> pa.Table:
  columns = ["id", "error", "height", "width", "duplicate_of", "aesthetic"]
  if rules.asks_for_captions:
    columns.append("captions")
  return index.read(part, *steps, columns=columns)


def _scores(table: pa.Table) -> Float32[np.ndarray, "n"]:
  if "aesthetic" not in table.column_names:
    return np.full(len(table), np.nan, np.float32)
  scores = table["aesthetic"].cast(pa.float64()).fill_null(np.nan).to_numpy()
  return scores.astype(np.float32)


def _sides(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
  """Height and width; 1 where they are not known."""
  return tuple(
    table[name].fill_null(1).to_numpy().astype(np.int64) for name in ("height", "width")
  )


def _refused(table: pa.Table, rules: Rules) -> dict[str, Bool[np.ndarray, "n"]]:
  """Masks of the images that each rule refuses; rules about scores separately."""
  height, width = _sides(table)
  long, short = np.maximum(height, width), np.minimum(height, width)
  refused = {"error": table["error"].is_valid().to_numpy()}
  if not rules.keep_duplicates:
    refused["duplicate"] = table["duplicate_of"].is_valid().to_numpy().copy()
  if rules.min_side is not None:
    refused["side"] = short < rules.min_side
  if rules.min_area is not None:
    refused["area"] = height * width < rules.min_area
  if rules.max_aspect is not None:
    refused["aspect"] = long > rules.max_aspect * short
  if rules.asks_for_captions:
    none, brief = _lacking(table["captions"].to_pylist(), rules)
    refused |= {"no caption": none, "captions too short": brief}
  return refused


class _Like(NamedTuple):
  """An image that is like others; the lesser is the better."""

  minus_area: int
  id: str
  part: int
  row: int
  passes: bool  # every rule but those about duplicates and low scores
  score: float


def _stand_ins(index: Index, rules: Rules, steps: Sequence[str]) -> StandIns:
  """Duplicates that are kept, as the images that they are like of do not pass.

  Of a group, which is an image and all that are its duplicates or theirs, the best
  that passes. One without a score of its own has that of the image it is like.
  """
  target: dict[str, str] = {}  # id of a duplicate → what it is like
  for part in range(index.num_parts):
    table = index.read(part, "scan", "duplicates", columns=["id", "duplicate_of"])
    marked = table.filter(table["duplicate_of"].is_valid())
    pairs = (marked["id"].to_pylist(), marked["duplicate_of"].to_pylist())
    target |= {id: of for id, of in zip(*pairs, strict=True) if id != of}
  roots = {_root(id, target) for id in target}
  firsts: dict[str, list[_Like]] = {}
  copies: dict[str, list[_Like]] = {}
  for part in range(index.num_parts if target else 0):
    table = _table(index, rules, steps, part)
    refused, scores = _refused(table, rules), _scores(table)
    marked = refused.pop("duplicate")
    passes, (height, width) = _first(refused) == "", _sides(table)
    for row, id in enumerate(table["id"].to_pylist()):
      root = _root(id, target) if marked[row] else id
      if root not in roots:
        continue
      like = _Like(
        -int(height[row] * width[row]),
        *(id, part, row, bool(passes[row]), float(scores[row])),
      )
      (copies if marked[row] else firsts).setdefault(root, []).append(like)
  found: dict[int, dict[int, float]] = {}
  for root, group in copies.items():
    of_root = [
      like.score for like in firsts.get(root, ()) if not math.isnan(like.score)
    ]
    score = max(of_root, default=math.nan)
    scored = [
      like._replace(score=score) if math.isnan(like.score) else like for like in group
    ]
    if not any(_passes(like, rules) for like in firsts.get(root, ())):
      passing = [like for like in scored if _passes(like, rules)]
      for best in sorted(passing)[:1]:
        found.setdefault(best.part, {})[best.row] = best.score
  return found


def _passes(like: _Like, rules: Rules) -> bool:
  return like.passes and not (rules.asks_for_scores and math.isnan(like.score))


def _root(id: str, target: Mapping[str, str]) -> str:
  """End of the chain of images that each is a duplicate of the next."""
  seen = set()
  while id in target and id not in seen:
    seen.add(id)
    id = target[id]
  return id


def _lacking(
  captions: Sequence[Sequence[dict[str, str]]], rules: Rules
) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
  """Masks: the needed caption is missing; no caption has enough words."""
  kind, words = rules.need_caption or "any", rules.min_caption_words or 0
  counts = [
    [len(c["text"].split()) for c in of_one if kind in ("any", c["kind"])]
    for of_one in captions
  ]
  none = [rules.need_caption is not None and not found for found in counts]
  brief = [max(found, default=0) < words for found in counts]
  return np.array(none, bool), np.array(brief, bool)


def _threshold(
  index: Index,
  rules: Rules,
  steps: Sequence[str],
  stand_ins: StandIns,
  quantile: float,
) -> float | None:
  """The lowest score that is kept; equal scores are kept or refused together."""
  of_parts = []
  for part in range(index.num_parts):
    reasons, scores = _judged(index, rules, steps, stand_ins, part)
    of_parts.append(scores[reasons == ""])
  passing = np.sort(np.concatenate(of_parts))
  if not len(passing):
    return None
  return float(passing[-math.ceil(quantile * len(passing))])


def _report(index: Index, threshold: float | None) -> dict[str, Any]:
  images, refused = 0, collections.Counter[str]()
  for part in range(index.num_parts):
    reasons = index.read(part, "kept")["reason"]
    images += len(reasons)
    refused.update(reasons.drop_null().to_pylist())
  return {
    "images": images,
    "kept": images - refused.total(),
    "refused": {reason: refused[reason] for reason in REASONS if refused[reason]},
    "threshold": threshold,
  }
