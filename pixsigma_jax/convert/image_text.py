"""Models that see and write, any image-text-to-text model of transformers, in torch."""

import functools
from typing import Any

from pixsigma_jax import errors
from pixsigma_jax.convert.loading import loading
from pixsigma_jax.wording import install, listed


@functools.lru_cache(maxsize=1)
def load_image_text(model: str, flag: str) -> tuple[Any, Any]:
  """Processor and network of a model to chat with about images.

  The last one is kept; it is on a GPU if there is one.

  Args:
    model: a folder of transformers, or a hub id.
    flag: that named it, for messages.

  Raises:
    FileNotFoundError: there is no such model.
    ValueError: it is another kind of model, its files are incomplete, or torch is not
      installed.
  """
  try:
    import torch
  except ImportError as error:
    if not errors.of_absence(error, "torch"):
      raise
    raise ValueError(f"--{flag}={model} needs torch: {install('curate')}.") from None
  from transformers import AutoModelForImageTextToText, AutoProcessor

  with loading(f"--{flag}={model}", "a model that writes about images"):
    processor = AutoProcessor.from_pretrained(model)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
      model, dtype="auto", output_loading_info=True
    )
    network, about = loaded
  if missing := sorted(about["missing_keys"]):
    raise ValueError(
      f"--{flag}={model}: its weights lack {listed(missing, 4)}. Fetch it again."
    )
  if network.config.is_encoder_decoder or not getattr(processor, "chat_template", None):
    raise ValueError(
      f"--{flag}={model} is not a model to chat with: it needs a chat template "
      "(chat_template.jinja) and a network that goes on with the text it is given, "
      "as LLaVA does."
    )
  processor.tokenizer.padding_side = "left"
  network = network.eval().requires_grad_(False)
  return processor, network.to("cuda" if torch.cuda.is_available() else "cpu")
