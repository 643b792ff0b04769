"""Flags of commands that say of a model in another format what it leaves open."""

import dataclasses
import sys
from typing import Any

from absl import flags

from pixsigma_jax.convert.model import Options
from pixsigma_jax.convert.released import RELEASES

CHECKPOINT_HELP = (
  "A run's workdir, or one of its snapshots; or a folder of diffusers, a .pth, a "
  ".safetensors, or the id of one on the hub, which are converted once."
)
FROZEN_HELP = (
  "Folder with vae/, text_encoder/ and tokenizer/ as diffusers saves them, or the id "
  "of one on the hub. By default those beside the weights, or what the model was "
  "published with, from the hub."
)


class SourceFlags:
  """The flags of `Options`, each of its field's name."""

  def __init__(self):
    """Defines them."""
    of_command: Any = {"module_name": sys.argv[0]}  # as absl calls the main module
    self._holders: dict[str, flags.FlagHolder[Any]] = {
      "release": flags.DEFINE_enum(
        "release",
        None,
        list(RELEASES),
        "Which published model the weights are, or were fine-tuned from: sets the next "
        "four flags.",
        **of_command,
      ),
      "base_size": flags.DEFINE_integer(
        "base_size",
        None,
        "Token grid side of the training resolution: 64 for 1024 pixels.",
        **of_command,
      ),
      "pe_interpolation": flags.DEFINE_float(
        "pe_interpolation",
        None,
        "Scale of the positions: 2 for 1024 pixels.",
        **of_command,
      ),
      "caption_length": flags.DEFINE_integer(
        "caption_length",
        None,
        "Tokens of a caption: 300 for Σ, 120 for α.",
        **of_command,
      ),
      "scaling_factor": flags.DEFINE_float(
        "scaling_factor",
        None,
        "Of the latents: 0.13025 for SDXL's VAE, 0.18215 for SD's.",
        **of_command,
      ),
      "num_heads": flags.DEFINE_integer(
        "num_heads", None, "Attention heads: 16 for XL/2.", **of_command
      ),
      "ema": flags.DEFINE_bool(
        "ema", False, "Take the EMA weights of a .pth that has both.", **of_command
      ),
      "pos_embed": flags.DEFINE_bool(
        "pos_embed",
        True,
        "Read base_size and pe_interpolation off the table of positions in a .pth; "
        "--nopos_embed leaves out one that is not the model's, as tools write it.",
        **of_command,
      ),
      "variant": flags.DEFINE_string(
        "variant",
        None,
        "Which of a folder's weights: fp16 for ….fp16.safetensors. By default those "
        "without a variant in their name, or the only one.",
        **of_command,
      ),
    }
    assert set(self._holders) == {field.name for field in dataclasses.fields(Options)}

  def values(self) -> Options:
    """Values of the flags; to be read once flags are parsed."""
    return Options(**{name: holder.value for name, holder in self._holders.items()})
