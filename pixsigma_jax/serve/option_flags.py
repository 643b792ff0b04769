"""Flags of the commands that serve, without what they need to be installed."""

import sys
from typing import Any

from absl import flags

from pixsigma_jax.convert.source_flags import (
  CHECKPOINT_HELP,
  FROZEN_HELP,
  SourceFlags,
)
from pixsigma_jax.models import attention
from pixsigma_jax.sample import devices
from pixsigma_jax.sample.model_flags import ModelFlags
from pixsigma_jax.sample.pipeline import QUANTIZATIONS


class OptionFlags:
  """The flags of `building.Options`, each of its name, and those of its `source`."""

  def __init__(self):
    """Defines them."""
    of: dict[str, Any] = {"module_name": sys.argv[0]}  # as absl calls the main module
    self._source = SourceFlags()
    self._models = ModelFlags(lora=False)  # here LoRAs have names
    self._holders: list[flags.FlagHolder[Any]] = [
      flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP, **of),
      flags.DEFINE_string(
        "frozen",
        None,
        FROZEN_HELP,
        **of,
      ),
      flags.DEFINE_multi_string(
        "lora",
        [],
        "NAME=PATH of a LoRA that requests may ask for by its name; may be repeated.",
        **of,
      ),
      flags.DEFINE_string(
        "model", "pixart-sigma", "What clients call it; images say it too.", **of
      ),
      flags.DEFINE_enum(
        "dtype",
        "bfloat16",
        ["bfloat16", "float32"],
        "Precision of the networks.",
        **of,
      ),
      flags.DEFINE_enum(
        "attention",
        "auto",
        list(attention.CHOICES),
        "Its implementation; auto takes what suits the devices and the image's size.",
        **of,
      ),
      flags.DEFINE_enum(
        "quantize",
        "none",
        list(QUANTIZATIONS),
        "Weights and activations of the transformer's blocks as 8-bit integers.",
        **of,
      ),
      flags.DEFINE_integer(
        "batch_size",
        4,
        "Images drawn at once; fewer are filled up and cost as much.",
        **of,
      ),
      flags.DEFINE_string("mesh", "auto", devices.MESH_HELP, **of),
      flags.DEFINE_list(
        "smaller_batches",
        [],
        "Also compile programs of fewer rows, such as 1,2, and draw few images with "
        "those that the warm-up has shown to draw the same bits.",
        **of,
      ),
      flags.DEFINE_integer(
        "text_batch_size",
        None,
        "Captions that the text encoder takes at once; as many as --batch_size by "
        "default.",
        **of,
      ),
      flags.DEFINE_list(
        "warm_up",
        ["auto"],
        "Shapes to compile before the server is ready, WIDTHxHEIGHT[@STEPS[@SAMPLER]]; "
        "auto is the training's own, buckets all of its sizes, none compiles nothing.",
        **of,
      ),
      flags.DEFINE_float(
        "max_delay",
        0.01,
        "Seconds that an image waits for others to fill its batch.",
        **of,
      ),
      flags.DEFINE_integer(
        "max_queue",
        128,
        "Images that may wait; what comes after them is told 429.",
        **of,
      ),
      flags.DEFINE_float(
        "deadline",
        600,
        "Seconds after which a request that is not drawn is given up.",
        **of,
      ),
      flags.DEFINE_integer(
        "max_programs",
        128,
        "Kinds and sizes of images whose programs stay in memory.",
        **of,
      ),
      flags.DEFINE_integer("max_n", 10, "Images of a request, at most.", **of),
      flags.DEFINE_integer("max_steps", 100, "Steps of an image, at most.", **of),
      flags.DEFINE_integer(
        "max_pixels",
        None,
        "Pixels of an image, at most; 4 times the training's by default.",
        **of,
      ),
      flags.DEFINE_integer(
        "max_prompt",
        4000,
        "Characters of a prompt, at most; the model has its own limit.",
        **of,
      ),
      flags.DEFINE_integer(
        "max_regions",
        8,
        "Regions of an image with prompts of their own, at most; each is one more call "
        "of the network a step, and 0 allows none.",
        **of,
      ),
      flags.DEFINE_integer(
        "max_body", 1 << 20, "Bytes of a request in JSON, at most.", **of
      ),
      flags.DEFINE_integer(
        "max_upload", 20 << 20, "Bytes of one with images, at most.", **of
      ),
      flags.DEFINE_string(
        "tokens",
        None,
        "File with a token on each line, one of which a client must give.",
        **of,
      ),
      flags.DEFINE_bool(
        "allow_anonymous",
        False,
        "Let everybody in at an address that others can reach.",
        **of,
      ),
      flags.DEFINE_bool("log_prompts", False, "Write prompts into the log.", **of),
      flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.", **of),
      flags.DEFINE_integer(
        "port", 8000, "Port to listen at; 0 takes a free one.", **of
      ),
    ]
    flags.mark_flag_as_required("checkpoint")

  def values(self) -> dict[str, Any]:
    """Values by name; to be read once flags are parsed."""
    values = {holder.name: holder.value for holder in self._holders}
    values |= self._models.values()
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return {**found, "source": self._source.values()}
