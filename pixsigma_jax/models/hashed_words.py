"""A text encoder without weights: every word is a fixed vector made from its hash.

It stands where T5 stands (frozen, features extracted offline, the same interface), so
that the whole system runs on a machine that can download nothing. What it keeps of a
text is which words stand where, and which words are spelt alike; meaning is left to
the network's caption projection. The numbers are made of SHAKE-256 bytes and integer
sums, so they are the same to the bit on every machine and every NumPy.
"""

import dataclasses
import functools
import hashlib
import itertools
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from pixsigma_jax.wording import shortened

# Four integers to one: the word itself counts 2, each character 3-gram 0.5.
WORD_WEIGHT, GRAM_WEIGHT = 4, 1
POSITION_WEIGHT = 0.5


@functools.lru_cache(maxsize=65536)
def _kind(character: str) -> str:
  major = unicodedata.category(character)[0]
  if major in "LMN":
    return "word"
  return "symbol" if major == "S" else "gap"


def split_words(text: str) -> tuple[str, ...]:
  """The lower-cased words of `text`, in any script and without their punctuation.

  Letters, digits and the marks on them make words; a symbol ("+", an emoji) is a word
  of its own; everything else only separates. Composed and decomposed accents agree.
  """
  text = unicodedata.normalize("NFC", text.lower())
  words: list[str] = []
  for group, characters in itertools.groupby(text, _kind):
    if group == "word":
      words.append("".join(characters))
    elif group == "symbol":
      words.extend(characters)
  return tuple(words)


def _hashed_integers(name: str, width: int) -> Int64[np.ndarray, " e"]:
  """Nearly Gaussian integers that only `name` decides.

  Each is the sum of eight bytes less its mean: bell-shaped (Irwin-Hall), mean 0,
  standard deviation 209, and exact whatever the processor.
  """
  digest = hashlib.shake_256(name.encode("utf-8", "surrogatepass")).digest(8 * width)
  rolls = np.frombuffer(digest, np.uint8).reshape(width, 8)
  return rolls.sum(axis=-1, dtype=np.int64) - 8 * 255 // 2


def _unit_rms(values: Int64[np.ndarray, " e"]) -> Float64[np.ndarray, " e"]:
  # Divisions and square roots are rounded the same way everywhere (IEEE 754), and the
  # sum under the root is one of integers, whose order does not matter.
  vector = values / np.sqrt(np.sum(values**2) / values.size)
  vector.setflags(write=False)  # cached, so shared by every caller
  return vector


@functools.lru_cache(maxsize=65536)
def _word_vector(word: str, width: int) -> Float64[np.ndarray, " e"]:
  framed = f"<{word}>"
  values = WORD_WEIGHT * _hashed_integers(f"word {framed}", width)
  for start in range(len(word)):
    gram = framed[start : start + 3]
    values = values + GRAM_WEIGHT * _hashed_integers(f"gram {gram}", width)
  return _unit_rms(values)


@functools.lru_cache(maxsize=4096)
def _fixed_vector(name: str, width: int) -> Float64[np.ndarray, " e"]:
  return _unit_rms(_hashed_integers(f"fixed {name}", width))


@dataclasses.dataclass(frozen=True)
class HashedWordEncoder:
  """Words to vectors of `width` numbers, one token a word and an end token after them.

  A token is its word's vector (root mean square 1) plus half the vector of its
  position. Positions after the end token carry a padding vector: masked, yet not zero,
  as T5's are.
  """

  width: int = 64

  def __post_init__(self):
    if self.width < 1:
      raise ValueError(f"A hashed word needs a width of at least 1, not {self.width}.")

  @property
  def identity(self) -> dict[str, Any]:
    """Identity in checkpoints and records, by which another encoder is refused."""
    return {"name": "hashed-words", "width": self.width, "version": 1}

  def count(self, prompt: str) -> int:
    """Number of tokens of `prompt`, the end token included."""
    return len(split_words(prompt)) + 1

  def read_captions(self, prompts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Embeddings and mask of captions stored as text; no network is needed.

    Returns:
      caption_embeddings float16 `[b t e]`, zero behind the mask, and caption_mask.
    """
    embeddings, mask = self.encode(prompts, length)
    embeddings = np.where(mask[..., None], embeddings, 0).astype(np.float16)
    return {"caption_embeddings": embeddings, "caption_mask": mask}

  def encode(
    self, prompts: Sequence[str], length: int
  ) -> tuple[Float32[np.ndarray, "b t e"], Bool[np.ndarray, "b t"]]:
    """Embeds each prompt in `length` positions.

    Returns:
      caption_embeddings and caption_mask (True up to and with the end token).

    Raises:
      ValueError: a prompt has more than `length` tokens.
    """
    positions = [
      POSITION_WEIGHT * _fixed_vector(f"position {i}", self.width)
      for i in range(length)
    ]
    end, padding = (_fixed_vector(name, self.width) for name in ("end", "padding"))
    embeddings = np.empty((len(prompts), length, self.width), np.float32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
      words = split_words(prompt)
      count = len(words) + 1
      if count > length:
        raise ValueError(
          f"The caption {shortened(prompt)} has {count} tokens (words and an end "
          f"token), and the limit is {length}: shorten it, or raise --caption_length "
          "if you are preparing data."
        )
      tokens = [_word_vector(word, self.width) for word in words]
      tokens += [end] + [padding] * (length - count)
      for i, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        embeddings[row, i] = token + position
      mask[row, :count] = True
    return embeddings, mask
