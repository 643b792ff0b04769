"""Weights of words in a prompt: `(a red seven:1.3)`.

A token of weight w is encoded as e + w · (z - e), where z is its embedding in the
prompt without parentheses and e the empty prompt's at its place, as ComfyUI does it.
The network was trained with w = 1 alone.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from pixsigma_jax.sample import captions
from pixsigma_jax.sample.settings import Settings
from pixsigma_jax.wording import shortened

_PLAIN_WEIGHT = 1.1  # of parentheses without a number
_PIECES = re.compile(r"\\[()\\]|\(|:\s*([0-9.+-]+)\s*\)|\)|[^()\\:]+|.", re.DOTALL)


class Weighed(NamedTuple):
  """A prompt without parentheses, and its parts (start, end, weight) in characters."""

  text: str
  parts: tuple[tuple[int, int, float], ...]

  @property
  def prefixes(self) -> list[str]:
    """What lies before the ends of parts that weigh other than 1."""
    ends = [end for *span, weight in self.parts if weight != 1 for end in span]
    return [self.text[:end].rstrip() for end in ends]


def parse(prompt: str) -> Weighed:
  r"""Reads a prompt's weights; those of parentheses in parentheses are multiplied.

  `(…)` without a number weighs 1.1, and `\(` and `\)` are characters of the prompt.

  Raises:
    ValueError: a parenthesis is alone, or a weight is no number.
  """
  text, weights, open_at = "", [], []
  for match in _PIECES.finditer(prompt):
    piece = match[0]
    if piece == "(":
      open_at.append(len(text))
    elif piece.endswith(")") and piece[0] != "\\":
      if not open_at:
        raise _unbalanced(prompt, ")")
      factor = _PLAIN_WEIGHT if piece == ")" else _weight(prompt, match[1])
      start = open_at.pop()
      weights[start:] = [factor * weight for weight in weights[start:]]
    else:
      more = piece[1] if piece[0] == "\\" and len(piece) == 2 else piece
      text += more
      weights += [1.0] * len(more)
  if open_at:
    raise _unbalanced(prompt, "(")
  changes = [i for i in range(1, len(text)) if weights[i] != weights[i - 1]]
  bounds = [0, *changes, len(text)]
  spans = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
  return Weighed(text, tuple((a, b, weights[a]) for a, b in spans))


def texts_of(prompt: str) -> list[str]:
  """All texts that an encoder is asked for by `WeightedEncoder`, but the empty one."""
  weighed = parse(prompt)
  return [weighed.text, *weighed.prefixes]


def encoded_texts(texts: Sequence[str], settings: Settings) -> list[str]:
  """All texts that an encoder is asked for where these are drawn with `settings`.

  Raises:
    ValueError: see `parse`.
  """
  cleaned = [captions.clean_caption(text, settings.caption_cleaning) for text in texts]
  if not settings.prompt_weighting:
    return cleaned
  return [needed for text in (*cleaned, "") for needed in texts_of(text)]


@dataclasses.dataclass(frozen=True)
class WeightedEncoder:
  """A text encoder that takes prompts with weights; see `models/text_encoders.py`."""

  encoder: Any

  def count(self, prompt: str) -> int:
    """Number of tokens, the end token included.

    Raises:
      ValueError: see `parse`.
    """
    return self.encoder.count(parse(prompt).text)

  def encode(
    self, prompts: Sequence[str], length: int
  ) -> tuple[Float32[np.ndarray, "b t e"], Bool[np.ndarray, "b t"]]:
    """Embeddings and mask; those of the encoder itself where all weights are 1.

    Raises:
      ValueError: see `parse`, or a prompt has more than `length` tokens.
    """
    weighed = [parse(prompt) for prompt in prompts]
    texts = [one.text for one in weighed]
    embeddings, mask = map(np.array, self.encoder.encode(texts, length))
    if any(one.prefixes for one in weighed):
      empty = np.asarray(self.encoder.encode([""], length)[0][0])
      for row, one in zip(embeddings, weighed, strict=True):
        for start, end, weight in self._of_tokens(one):
          before = empty[start:end]
          row[start:end] = before + np.float32(weight) * (row[start:end] - before)
    return embeddings, mask

  def _of_tokens(self, weighed: Weighed) -> list[tuple[int, int, float]]:
    """Parts that weigh other than 1, in tokens."""

    def tokens_before(end: int) -> int:
      return self.encoder.count(weighed.text[:end].rstrip()) - 1

    return [
      (tokens_before(start), tokens_before(end), weight)
      for start, end, weight in weighed.parts
      if weight != 1
    ]


def _weight(prompt: str, number: str) -> float:
  try:
    weight = float(number)
  except ValueError:
    weight = math.nan
  if not math.isfinite(weight) or weight < 0:
    raise ValueError(
      f"The prompt {shortened(prompt)} has the weight {number!r}: it must be a number, "
      "0 or more, such as (a red seven:1.3)."
    )
  return weight


def _unbalanced(prompt: str, which: str) -> ValueError:
  return ValueError(
    f"The prompt {shortened(prompt)} has a {which!r} too many: write \\{which} for the "
    "character itself, or leave out prompt_weighting."
  )
