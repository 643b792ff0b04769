"""The command's earlier form: digits alone, several checkpoints, one JSON file.

  python -m pixsigma_jax.evaluate --checkpoints=DIR,DIR --task=digits --output=FILE.json

Kept for one release: `evaluate digits` takes its place.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

import pixsigma_jax
from pixsigma_jax import checkpoint, command, disk
from pixsigma_jax.evaluate import accuracy
from pixsigma_jax.evaluate.commands import Command
from pixsigma_jax.evaluate.digits import evaluation_prompts
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.sample.program import compute_here
from pixsigma_jax.sample.setting_flags import SettingFlags
from pixsigma_jax.sample.settings import Settings


def define() -> Command:
  """Defines this form's flags; see `commands.define`."""
  of_command: Any = {"module_name": sys.argv[0]}  # as absl calls the main module
  required: Any = {"required": True, **of_command}
  holders = {
    "checkpoints": flags.DEFINE_list(
      "checkpoints", None, "Workdirs or snapshots, separated by commas.", **required
    ),
    "task": flags.DEFINE_enum("task", None, ["digits"], "What to measure.", **required),
    "output": flags.DEFINE_string("output", None, "JSON file to write.", **required),
    "per_task": flags.DEFINE_integer(
      "per_task",
      100,
      "Prompts of each task, of seen and of unseen scenes each.",
      **of_command,
    ),
    "seed": flags.DEFINE_integer(
      "seed", 0, "Of the prompts, and of the first picture.", **of_command
    ),
    "batch_size": flags.DEFINE_integer(
      "batch_size", 64, "Pictures drawn at once.", **of_command
    ),
    "dtype": flags.DEFINE_enum(
      "dtype",
      "bfloat16",
      ["bfloat16", "float32"],
      "Precision of the network.",
      **of_command,
    ),
  }
  settings = SettingFlags(
    "num_inference_steps", "guidance_scale", num_inference_steps=14
  )
  return Command(
    lambda _: _measure(
      settings=settings.values(), **{name: h.value for name, h in holders.items()}
    )
  )


def _measure(
  *,
  checkpoints: Sequence[str],
  task: str,
  output: str,
  per_task: int,
  seed: int,
  batch_size: int,
  dtype: str,
  settings: dict[str, Any],
) -> None:
  if per_task < 1:
    raise ValueError(f"--per_task={per_task} must be at least 1.")
  # All of them are looked for before hours are spent on the first.
  paths = [checkpoint.find_snapshot(path) for path in checkpoints]
  names = _names(paths)
  path_of_report = pathlib.Path(output)
  if path_of_report.is_dir():
    raise IsADirectoryError(f"--output={output} is a directory: give a file.")
  disk.check_writable(path_of_report.parent)
  asked = Settings.of(settings | {"seed": seed})
  asked.of_prompts(1)

  prompts = evaluation_prompts(seed, per_task)
  results, counts_by_name = [], {}
  try:
    for name, path in zip(names, paths, strict=True):
      logging.info("Drawing %d prompts with %s.", len(prompts), name)
      pipeline = Pipeline.from_checkpoint(
        path,
        compute=compute_here(dtype),
        batch_size=batch_size,
      )
      counts = accuracy.count_right(
        pipeline,
        prompts,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        seed=seed,
      )
      counts_by_name[name] = counts
      about = {"name": name, **pipeline.origin, "resolution": pipeline.resolution}
      results.append({**about, "counts": counts, "accuracy": accuracy.totals(counts)})
  except KeyboardInterrupt:
    if results:
      print(accuracy.table(counts_by_name))
    raise command.Interrupted(
      f"{len(results)} of {len(paths)} checkpoints are measured, and {output} is not "
      "written. Give the same command again, or --checkpoints without those above."
    ) from None
  print(accuracy.table(counts_by_name))

  used = {
    "task": task,
    "per_task": per_task,
    "num_inference_steps": asked.num_inference_steps,
    "guidance_scale": asked.guidance_scale,
    "seed": seed,
    "batch_size": batch_size,
    "dtype": dtype,
    "pixsigma_jax": pixsigma_jax.__version__,
  }
  text = json.dumps({"settings": used, "checkpoints": results}, indent=2) + "\n"
  disk.write_text(path_of_report, text)
  print(output)


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
  """The runs' own names, made longer as far as it takes to tell them apart."""
  steps = [(path.parents[1], path.name) for path in paths]  # WORKDIR/snapshots/STEP
  for names in (
    [workdir.name for workdir, _ in steps],
    [f"{workdir.name}@{step}" for workdir, step in steps],
    [f"{workdir}@{step}" for workdir, step in steps],
  ):
    if len(set(names)) == len(names):
      return names
  raise ValueError(f"--checkpoints names {paths[0]} or another snapshot twice.")
