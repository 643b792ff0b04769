"""The same comparisons with PixArt-Σ itself, as commands to run elsewhere.

`gpu` is one device of 80 GB or more: batches of 32 at 512 pixels, of 8 at 1024. `pod`
has the batches of the stages' own configs. Both go on from stages of docs/stages.md,
whose workdirs they name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pixsigma_jax.models.pixart import VARIANTS
from pixsigma_jax.reproduce import stages
from pixsigma_jax.reproduce.miniature import Variant

DEVICES = {
  "gpu": "one of 80 GB or more, small batches",
  "pod": "those of the stages, with their batches",
}
BUDGETS = tuple(DEVICES)

_DEPTH = VARIANTS["XL/2"]["depth"]
_RUNS = "runs/weak_to_strong"
_BATCHES = {512: 32, 1024: 8}  # of `gpu`


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullSize:
  """What stands for a miniature's comparison.

  Attributes:
    stages: pixels of a miniature's cell → the stage whose config is changed.
    continues: whether a run goes on from that stage's own end, and not from its parent.
    steps: of each run, by budget.
    marks: after which steps models are compared.
  """

  stages: Mapping[int, str]
  continues: bool
  steps: Mapping[str, int]
  marks: Sequence[int]

  def commands(
    self, name: str, variants: Sequence[Variant], budget: str, seeds: int
  ) -> list[str]:
    """Lines for bash: training of each variant, then one evaluation of them all.

    Args:
      name: of the table or figure, for folders.
      budget: of `BUDGETS`.
    """
    folder = f"runs/reproduce/{budget}/{name}"
    lines, models = [], []
    for variant in variants:
      name = self._name(variant)
      lines.append(self._training(variant, budget, seeds, f"{folder}/{name}"))
      models += [
        f"{name}_seed{seed}_{step}={folder}/{name}_seed{seed}/snapshots/{step}"
        for seed in range(seeds)
        for step in self._marks(budget)
      ]
    evaluation = [
      *("python", "-m", "pixsigma_jax.evaluate", "paper", "--set=SET"),
      *("--frozen=weights/frozen", f"--checkpoints={','.join(models)}"),
      f"--output={folder}/evaluation",
    ]
    return [*lines, " ".join(evaluation)]

  def _name(self, variant: Variant) -> str:
    """Name of a variant, with the stage's pixels in the place of the miniature's."""
    base_size = stages.config_of(self.stages[variant.pixels])["model"]["base_size"]
    name = variant.name.removesuffix(f"_{variant.pixels}px")
    return f"{name}_{16 * base_size}px"

  def _marks(self, budget: str) -> list[int]:
    return [step for step in self.marks if step <= self.steps[budget]]

  def _training(self, variant: Variant, budget: str, seeds: int, workdir: str) -> str:
    stage = self.stages[variant.pixels]
    before = stages.config_of(stage)
    flags = [
      f"--config.{name}={value}"
      for name, value in self._changes(variant, before, budget).items()
      if value != _field(before, name)
    ]
    command = [
      *("python", "-m", "pixsigma_jax.train"),
      f"--config=configs/{stages.file_of(stage)}",
      f"--workdir={workdir}_seed$seed",
      "--config.seed=$seed",
      *(f'"{flag}"' if "(" in flag else flag for flag in flags),
    ]
    numbers = " ".join(map(str, range(seeds)))
    return f"for seed in {numbers}; do {' '.join(command)}; done"

  def _changes(
    self, variant: Variant, config: Mapping[str, Any], budget: str
  ) -> dict[str, Any]:
    """Fields of the stage's config that a run sets."""
    model, steps = config["model"], self.steps[budget]
    transforms = () if self.continues else tuple(config["init"]["transforms"])
    changes: dict[str, Any] = {"total_steps": steps}
    changes["checkpoint.snapshot_every"] = self._marks(budget)[1]
    changes["optimizer.warmup_steps"] = min(
      config["optimizer"]["warmup_steps"], steps // 10
    )
    if self.continues:
      changes["init.parent"] = f"{_RUNS}/{config['stage']}"
    if variant.positions is not None:
      base_size = model["base_size"]
      transforms = ({"name": variant.positions, "base_size": base_size},)
      if variant.positions == "extend_pe":  # the parent's, whose grid is half as fine
        changes["model.pe_interpolation"] = model["pe_interpolation"] / 2
    if variant.compression is not None:
      fields = variant.compression.fields(_DEPTH)
      changes |= {f"model.kv_compression.{key}": fields[key] for key in fields}
      transforms = (*transforms, variant.compression.transform(_DEPTH))
    changes["init.transforms"] = transforms
    if budget == "gpu":
      changes["batch_size"] = _BATCHES[16 * model["base_size"]]
    return changes


def _field(config: Mapping[str, Any], name: str) -> Any:
  value: Any = config
  for part in name.split("."):
    value = value[part]
  return value
