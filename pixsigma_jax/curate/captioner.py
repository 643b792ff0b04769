"""Captions from a model that sees: any image-text-to-text model of transformers.

Words are searched for as ShareCaptioner does, with which the paper captions its images
(`share-cap_batch_infer.py` of ShareGPT4V): three beams, a repetition penalty of 1.5, no
sampling. ShareCaptioner itself is code of its author's in the model's folder, which is
not run here; import what it wrote elsewhere.
"""

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from pixsigma_jax.convert.image_text import load_image_text
from pixsigma_jax.curate import captions
from pixsigma_jax.curate.score import decoded, identity
from pixsigma_jax.data import ingest
from pixsigma_jax.data.index import Index, open_index

_NUM_BEAMS = 3
_REPETITION_PENALTY = 1.5
_BATCH = 8  # images that are captioned at once
_SECONDS_BETWEEN_DRAFTS = 20


def write_captions(
  index: Index,
  *,
  model: str,
  instruction: str,
  kind: str,
  max_new_tokens: int,
  beam_options: Sequence[str],
) -> dict[str, Any] | None:
  """Adds a model's captions to every image that can be read.

  Nothing is asked of duplicates, if scan has marked them. What was said of a part that
  is not finished lies beside it as a draft, by the images' hashes: a run that is killed
  loses what it has asked in less than a minute.

  Args:
    model: a folder of transformers, or a hub id.
    instruction: what the model is told beside each image.
    kind: "long" or "short": which its captions are.

  Returns:
    The report that is also written to captions/report.json; None if its captions are
    in already.
  """
  asked = {
    "captioner": model,
    "instruction": instruction,
    "kind": kind,
    "max_new_tokens": max_new_tokens,
  }
  supplier = json.dumps(asked)
  missing = [
    part
    for part in range(index.num_parts)
    if supplier not in captions.suppliers_of(index, part)
  ]
  if not missing:
    return None
  ingest.run_parts(
    functools.partial(_write_part, index.directory, supplier),
    missing,
    what="Captioned images",
    beam_options=beam_options,
    by_image=True,
    images=sum(map(index.rows, missing)),
  )
  return captions.finish(index, [supplier], asked)


def _write_part(directory: str, supplier: str, part: int) -> None:
  index, asked = open_index(directory), json.loads(supplier)
  name = hashlib.sha256(supplier.encode()).hexdigest()[:8]
  draft = f"captions/{part:05d}.{name}.draft.json"
  columns = ["id", "sha256"]
  keys = list(map(identity, index.read(part, "scan", columns=columns).to_pylist()))
  texts: dict[str, str] = index.read_json(draft) or {}
  saved = time.monotonic()
  for rows, images in decoded(index, part, _BATCH, frozenset(texts)):
    said = caption_images(
      images,
      model=asked["captioner"],
      instruction=asked["instruction"],
      max_new_tokens=asked["max_new_tokens"],
    )
    texts |= zip((keys[row] for row in rows), said, strict=True)
    if time.monotonic() - saved > _SECONDS_BETWEEN_DRAFTS:
      index.write_json(draft, texts)
      saved = time.monotonic()
  of_rows = [[(texts[key], asked["kind"])] if key in texts else [] for key in keys]
  captions.add_captions(index, part, [supplier], of_rows)
  index.remove(draft)


def caption_images(
  images: Sequence[Image.Image], *, model: str, instruction: str, max_new_tokens: int
) -> list[str]:
  """A caption of each image, the same whenever it is asked for.

  The model is loaded at the first call and kept, in torch, on a GPU if there is one.

  Args:
    images: as many as fit in memory at once.
    model: folder or hub id of a model that writes text about images in a chat, such as
      LLaVA's.
    instruction: what it is told beside the image.
    max_new_tokens: where a caption is cut off that does not end before.

  Raises:
    FileNotFoundError: there is no such model.
    ValueError: it is another kind of model, its files are incomplete, or torch is not
      installed.
  """
  if not images:
    return []
  processor, network = load_image_text(model, "captioner")
  content = [{"type": "text", "text": instruction}]
  chats = [
    [{"role": "user", "content": [{"type": "image", "image": image}, *content]}]
    for image in images
  ]
  inputs = processor.apply_chat_template(
    chats,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    # Answers begin where the longest question ends.
    processor_kwargs={"padding": True, "return_tensors": "pt"},
  ).to(network.device, network.dtype)
  output = network.generate(
    **inputs,
    max_new_tokens=max_new_tokens,
    num_beams=_NUM_BEAMS,
    repetition_penalty=_REPETITION_PENALTY,
    do_sample=False,
  )
  answers = output[:, inputs["input_ids"].shape[1] :]
  texts = processor.batch_decode(answers, skip_special_tokens=True)
  return [" ".join(text.split()) for text in texts]
