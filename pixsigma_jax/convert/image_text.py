"""Models that see and write, any image-text-to-text model of transformers, in torch."""

import functools
from typing import Any

from pixsigma_jax.wording import install


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
  except ImportError:
    raise ValueError(f"--{flag}={model} needs torch: {install('curate')}.") from None
  from transformers import AutoModelForImageTextToText, AutoProcessor

  try:
    processor = AutoProcessor.from_pretrained(model)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
      model, dtype="auto", output_loading_info=True
    )
    network, loading = loaded
  except OSError as error:
    raise FileNotFoundError(
      f"--{flag}={model} is neither a folder with a model nor could it be fetched "
      f"from the hub: {_first_line(error)}."
    ) from error
  except (ValueError, RuntimeError, ImportError) as error:
    raise ValueError(
      f"--{flag}={model} is not a model of transformers that writes about images: "
      f"{_first_line(error)}."
    ) from error
  if missing := sorted(loading["missing_keys"]):
    raise ValueError(
      f"--{flag}={model}: its weights lack {', '.join(missing[:4])}. Fetch it again."
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


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0].rstrip(".")
