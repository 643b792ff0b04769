"""Flags of commands for what draws beside a checkpoint's own model."""

import sys
from typing import Any

from absl import flags


class ModelFlags:
  """The flags of LoRAs, of a refiner and of a weaker model.

  Each has the name of an argument of `Pipeline.from_checkpoint`.
  """

  def __init__(self, *, lora: bool = True):
    """Defines them.

    Args:
      lora: whether --lora is among them.
    """
    of_command: Any = {"module_name": sys.argv[0]}  # as absl calls the main module
    self._holders: list[flags.FlagHolder[Any]] = [
      flags.DEFINE_string(
        "refiner",
        None,
        "A second model, as --checkpoint, that draws below the timestep --switch_at.",
        **of_command,
      ),
      flags.DEFINE_integer(
        "switch_at",
        None,
        "Timestep below which --refiner draws, 1 … 999.",
        **of_command,
      ),
      flags.DEFINE_string(
        "autoguidance",
        None,
        "A weaker model, as --checkpoint, to guide away from by --autoguidance_scale.",
        **of_command,
      ),
      flags.DEFINE_multi_string(
        "refiner_lora",
        [],
        "PATH[:SCALE] of a LoRA that acts in --refiner, as --lora.",
        **of_command,
      ),
      flags.DEFINE_multi_string(
        "autoguidance_lora",
        [],
        "PATH[:SCALE] of a LoRA that acts in --autoguidance, as --lora.",
        **of_command,
      ),
    ]
    if lora:
      self._holders.append(
        flags.DEFINE_multi_string(
          "lora",
          [],
          "PATH[:SCALE] of a LoRA that acts in the model of --checkpoint: a file or "
          "folder of PEFT, diffusers or Kohya's names, or a run that trains one; may "
          "be repeated.",
          **of_command,
        )
      )

  def values(self) -> dict[str, Any]:
    """Values by name; to be read once flags are parsed."""
    return {holder.name: holder.value for holder in self._holders}
