"""A judge on this machine: an image-text-to-text model of transformers, in torch.

Such a model need not keep to a schema: it is asked for one letter, and of the three
letters the one counts that it would write most likely.
"""

import hashlib
import io
import json
import pathlib
import threading
from typing import Any

import numpy as np
from PIL import Image
from scipy import special

from pixsigma_jax import disk
from pixsigma_jax.convert.files import hub_folder
from pixsigma_jax.convert.image_text import load_image_text
from pixsigma_jax.evaluate.judge.client import VERDICTS, Reply
from pixsigma_jax.evaluate.study.design import CRITERIA

_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt")
_LETTERS = ("A", "B", "C")  # of VERDICTS
_QUESTIONS = {
  "quality": "Which is the better picture, whatever the prompt says?",
  "match": "Which picture shows more exactly what the prompt asks for?",
}
_ANSWER = (
  "Answer with one letter: A for the first picture, B for the second, C if neither is "
  "better."
)


class LocalJudge:
  """A model that chats about several images.

  Args:
    model: a folder of transformers, or a hub id.

  Attributes:
    identity: what a reply depends on besides prompt and images.
    ended: to be set when nobody waits for answers any more.

  Raises:
    FileNotFoundError: there is no such model.
    ValueError: it is another kind of model, or does not write a letter as a token.
  """

  def __init__(self, model: str):
    folder = hub_folder(model, _FILES, "Give another --judge.")
    self._processor, self._network = load_image_text(str(folder), "judge")
    self._letters = self._tokens_of_letters(model)
    self.identity = json.dumps([_hash_of(folder), _QUESTIONS, _ANSWER])
    self.ended = threading.Event()

  def ask(self, prompt: str, first: bytes, second: bytes) -> Reply:
    """The model's votes on two PNG files; their text has the letters' shares."""
    images = [Image.open(io.BytesIO(each)).convert("RGB") for each in (first, second)]
    votes, said = {}, []
    for criterion in CRITERIA:
      inputs = self._processor.apply_chat_template(
        [_chat(prompt, criterion, [{"image": each} for each in images])],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
      ).to(self._network.device, self._network.dtype)
      logits = self._network(**inputs).logits[0, -1].float().cpu().numpy()
      shares = special.softmax(logits[self._letters].astype(np.float64))
      votes[criterion] = VERDICTS[int(shares.argmax())]
      of_letters = zip(_LETTERS, shares, strict=True)
      said.append(
        f"{criterion} " + " ".join(f"{k} {share:.3f}" for k, share in of_letters)
      )
    return Reply("voted", votes, ", ".join(said), 0, 0)

  def _tokens_of_letters(self, model: str) -> list[int]:
    """The token of each letter where an answer begins."""
    chat = _chat("", CRITERIA[0], [{}, {}])
    text: str = self._processor.apply_chat_template(
      chat, add_generation_prompt=True, tokenize=False
    )
    tokenizer: Any = self._processor.tokenizer
    before = tokenizer(text)["input_ids"]
    with_letters = [tokenizer(text + letter)["input_ids"] for letter in _LETTERS]
    # Some tokenizers end a text with a token of their own.
    common = len(before)
    while common and any(ids[:common] != before[:common] for ids in with_letters):
      common -= 1
    tokens = [ids[common] for ids in with_letters if len(ids) > common]
    if len(set(tokens)) < len(_LETTERS) or tokenizer.unk_token_id in tokens:
      raise ValueError(
        f"--judge={model} has no token for each of {', '.join(_LETTERS)} at the start "
        "of an answer: take another model."
      )
    return tokens


def _chat(
  prompt: str, criterion: str, images: list[dict[str, Any]]
) -> list[dict[str, Any]]:
  first, second = ({"type": "image"} | image for image in images)
  content = [
    {"type": "text", "text": f"The prompt:\n{prompt}\n\nThe first picture:"},
    first,
    {"type": "text", "text": "The second picture:"},
    second,
    {"type": "text", "text": f"{_QUESTIONS[criterion]} {_ANSWER}"},
  ]
  return [{"role": "user", "content": content}]


def _hash_of(folder: pathlib.Path) -> str:
  """Hash of all files of a model."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  hashes = [[str(path.relative_to(folder)), disk.file_hash(path)] for path in files]
  return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
