"""Models of transformers, from a folder or the hub, and why one cannot be loaded."""

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from pixsigma_jax import errors


@contextlib.contextmanager
def loading(model: str, what: str, advice: str = "") -> Iterator[None]:
  """Names a model that transformers cannot load in the block, and says why.

  Args:
    model: the flag and its value, `--clip=openai/…`.
    what: what it is to be, "a CLIP".
    advice: a sentence for the end, where the model is of another kind.

  Raises:
    FileNotFoundError: it is neither a folder nor can it be fetched from the hub.
    ValueError: it is something else, damaged, or needs a package that is missing.
  """
  try:
    yield
  except OSError as error:
    if error.errno is not None:  # a full disk, a file that may not be read
      raise
    raise FileNotFoundError(
      f"{model} is neither a folder with {what} nor could it be fetched from the hub: "
      f"{_reason(error)}."
    ) from error
  except ImportError as error:
    raise ValueError(
      f"{model} needs a package that is not installed: {_reason(error)}."
    ) from error
  except SafetensorError as error:
    raise ValueError(
      f"{model}: its weights are damaged ({_reason(error)}). Fetch it again."
    ) from error
  except (ValueError, RuntimeError) as error:
    if errors.of_memory(error):
      raise
    raise ValueError(
      f"{model} cannot be used as {what}: {_reason(error)}. {advice}".rstrip()
    ) from error


def _reason(error: Exception) -> str:
  return errors.first_line(error).rstrip(".")
