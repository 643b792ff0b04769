"""Captions from a model that sees: any image-text-to-text model of transformers.

Words are searched for as ShareCaptioner does, with which the paper captions its images
(`share-cap_batch_infer.py` of ShareGPT4V): three beams, a repetition penalty of 1.5, no
sampling. ShareCaptioner itself is code of its author's in the model's folder, which is
not run here; import what it wrote elsewhere.
"""

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image

from pixsigma_jax.wording import install

_NUM_BEAMS = 3
_REPETITION_PENALTY = 1.5


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
  processor, network = _load(model)
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


@functools.lru_cache(maxsize=1)
def _load(model: str) -> tuple[Any, Any]:
  """Processor and network of a model."""
  try:
    import torch
  except ImportError:
    raise ValueError(f"A captioner needs torch: {install('curate')}.") from None
  from transformers import AutoModelForImageTextToText, AutoProcessor

  try:
    processor = AutoProcessor.from_pretrained(model)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
      model, dtype="auto", output_loading_info=True
    )
    network, loading = loaded
  except OSError as error:
    raise FileNotFoundError(
      f"--captioner={model} is neither a folder with a model nor could it be fetched "
      f"from the hub: {_first_line(error)}."
    ) from error
  except (ValueError, RuntimeError, ImportError) as error:
    raise ValueError(
      f"--captioner={model} is not a model that transformers can caption images with: "
      f"{_first_line(error)}."
    ) from error
  if missing := sorted(loading["missing_keys"]):
    raise ValueError(
      f"--captioner={model}: its weights lack {', '.join(missing[:4])}. Fetch it again."
    )
  if network.config.is_encoder_decoder or not getattr(processor, "chat_template", None):
    raise ValueError(
      f"--captioner={model} is not a model to chat with: it needs a chat template "
      "(chat_template.jinja) and a network that goes on with the text it is given, "
      "as LLaVA does."
    )
  processor.tokenizer.padding_side = "left"
  network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
  return processor, network


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0].rstrip(".")
