"""The text encoder as a stage of its own: its own batch size, and a memory.

Its program has a fixed number of rows. Those that the batch to be drawn leaves empty
are filled with captions of requests that wait, which cost nothing there.
"""

import collections
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

_REMEMBERED = 64  # captions that no batch needs now; 5 MB each with T5-XXL


class CaptionStage:
  """A text encoder that takes `rows` captions at a time and remembers the last ones."""

  def __init__(self, encoder: Any, rows: int):
    if rows < 1:
      raise ValueError(f"--text_batch_size={rows} must be at least 1.")
    self.encoder, self.rows = encoder, rows
    self.identity, self.width = encoder.identity, encoder.width
    self._known: collections.OrderedDict[str, tuple[np.ndarray, np.ndarray]]
    self._known = collections.OrderedDict()
    self._expected: collections.OrderedDict[str, None] = collections.OrderedDict()
    self._lock = threading.Lock()

  def expect(self, texts: Iterable[str]) -> None:
    """Says which captions will be asked for; it may be called from any thread."""
    with self._lock:
      self._expected.update(dict.fromkeys(texts))
      while len(self._expected) > _REMEMBERED:
        self._expected.popitem(last=False)

  def count(self, prompt: str) -> int:
    """Number of tokens of `prompt`, the end token included."""
    return self.encoder.count(prompt)

  def encode(
    self, prompts: Sequence[str], length: int
  ) -> tuple[Float32[np.ndarray, "b t e"], Bool[np.ndarray, "b t"]]:
    """As the encoder's; for one thread at a time, but for what it refuses.

    Raises:
      ValueError: a prompt has more than `length` tokens.
    """
    for prompt in prompts:
      if self.count(prompt) > length:
        self.encoder.encode([prompt], length)  # refuses it, in its own words
    missing = [text for text in dict.fromkeys(prompts) if text not in self._known]
    while missing:
      turn, missing = missing[: self.rows], missing[self.rows :]
      turn += self._waiting(self.rows - len(turn), {*turn, *missing})
      # Rows nobody asked for keep the program, and with it every rounding, the same.
      rows = turn + turn[-1:] * (self.rows - len(turn))
      embeddings, mask = self.encoder.encode(rows, length)
      for row, text in enumerate(turn):
        self._known[text] = np.array(embeddings[row]), np.array(mask[row])
    found = [self._known[text] for text in prompts]
    for text in prompts:
      self._known.move_to_end(text)
    while len(self._known) > _REMEMBERED:
      self._known.popitem(last=False)
    embeddings, mask = (np.stack(arrays) for arrays in zip(*found, strict=True))
    return embeddings, mask

  def _waiting(self, count: int, but: set[str]) -> list[str]:
    """Up to `count` expected captions, the first first, none of them known."""
    with self._lock:
      for text in [text for text in self._expected if text in self._known]:
        del self._expected[text]
      found = [text for text in self._expected if text not in but][:count]
      for text in found:
        del self._expected[text]
      return found
