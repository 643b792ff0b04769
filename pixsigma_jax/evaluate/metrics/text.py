"""Accuracy of texts read in images, as TextAtlasEval counts.

Source: CSU-JPG/TextAtlas, `evaluation/cal_ocr.py` and `cal_ocr_cer.py`.
"""

from collections.abc import Iterable
from typing import NamedTuple

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

_ALIKE = 80  # per cent from which two words count as one


class TextAccuracy(NamedTuple):
  """Text accuracy of a set of images.

  Attributes:
    accuracy: words of the truth that were found, in per cent of all; it is the recall.
    precision: words read that are in the truth, in per cent of all read.
    f1: harmonic mean of both, in per cent.
    cer: character error rate, a fraction: mean over images of the edit distance over
      the longer text. Images without a truth are left out.
    images: number of images.
  """

  accuracy: float
  precision: float
  f1: float
  cer: float
  images: int


class TextCounts(NamedTuple):
  """Counts of one image, of which a set's `TextAccuracy` is made.

  Attributes:
    found: words of the truth that were found.
    truth, read: words of the truth, and words that were read.
    cer: character error rate; None without a truth.
  """

  found: int
  truth: int
  read: int
  cer: float | None


def text_accuracy(pairs: Iterable[tuple[str, str]]) -> TextAccuracy:
  """Accuracy, precision, F1 and CER of (truth, read) texts, as TextAtlasEval has them.

  Words are lower-cased and split at white space. Each word that was read takes the
  first word of the truth that is not taken yet and is alike by 80 per cent or more,
  rounded to whole per cents as fuzzywuzzy does (2·matches over both lengths). Counts
  are summed over images before they are divided. The CER knows upper case, and divides
  by the longer text, where jiwer's divides by the truth.

  Raises:
    ValueError: there is no pair.
  """
  return sum_counts(text_counts(truth, read) for truth, read in pairs)


def text_counts(truth: str, read: str) -> TextCounts:
  """Counts of one image; `text_accuracy` says how."""
  wanted, have = truth.lower().split(), read.lower().split()
  cer = None
  if truth:
    cer = Levenshtein.distance(truth, read) / max(len(truth), len(read))
  return TextCounts(_found(wanted, have), len(wanted), len(have), cer)


def sum_counts(counts: Iterable[TextCounts]) -> TextAccuracy:
  """Accuracy of a set from its images' counts.

  Raises:
    ValueError: there is no image.
  """
  found = truths = reads = images = 0
  rates = []
  for each in counts:
    images, found = images + 1, found + each.found
    truths, reads = truths + each.truth, reads + each.read
    if each.cer is not None:
      rates.append(each.cer)
  if not images:
    raise ValueError("Text accuracy needs at least one pair of (truth, read).")
  accuracy = 100 * found / truths if truths else 0.0
  precision = 100 * found / reads if reads else 0.0
  both = accuracy + precision
  return TextAccuracy(
    accuracy=accuracy,
    precision=precision,
    f1=2 * accuracy * precision / both if both else 0.0,
    cer=sum(rates) / len(rates) if rates else 0.0,
    images=images,
  )


def _found(wanted: list[str], have: list[str]) -> int:
  left = list(wanted)
  for word in have:
    for i, other in enumerate(left):
      if round(fuzz.ratio(word, other)) >= _ALIKE:
        del left[i]
        break
  return len(wanted) - len(left)
