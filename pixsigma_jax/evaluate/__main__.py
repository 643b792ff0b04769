r"""Measures how well checkpoints follow their prompts, side by side.

  python -m pixsigma_jax.evaluate --checkpoints=DIR,DIR --task=digits --per_task=100 \
    --output=FILE.json
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags, logging

import pixsigma_jax
from pixsigma_jax import checkpoint, command, disk
from pixsigma_jax.evaluate import accuracy
from pixsigma_jax.evaluate.digits import evaluation_prompts
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.sample.program import compute_here
from pixsigma_jax.sample.setting_flags import SettingFlags
from pixsigma_jax.sample.settings import Settings

_CHECKPOINTS = flags.DEFINE_list(
  "checkpoints", None, "Workdirs or snapshots, separated by commas.", required=True
)
_TASK = flags.DEFINE_enum("task", None, ["digits"], "What to measure.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)
_PER_TASK = flags.DEFINE_integer(
  "per_task", 100, "Prompts of each task, of seen and of unseen scenes each."
)
_SETTINGS = SettingFlags(
  "num_inference_steps", "guidance_scale", num_inference_steps=14
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the prompts, and of the first picture.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures drawn at once.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Precision of the network."
)


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  if _PER_TASK.value < 1:
    raise ValueError(f"--per_task={_PER_TASK.value} must be at least 1.")
  # All of them are looked for before hours are spent on the first.
  paths = [checkpoint.find_snapshot(path) for path in _CHECKPOINTS.value]
  names = _names(paths)
  output = pathlib.Path(_OUTPUT.value)
  if output.is_dir():
    raise IsADirectoryError(f"--output={output} is a directory: give a file.")
  disk.check_writable(output.parent)
  asked = Settings.of(_SETTINGS.values() | {"seed": _SEED.value})
  asked.of_prompts(1)

  prompts = evaluation_prompts(_SEED.value, _PER_TASK.value)
  results, counts_by_name = [], {}
  try:
    for name, path in zip(names, paths, strict=True):
      logging.info("Drawing %d prompts with %s.", len(prompts), name)
      pipeline = Pipeline.from_checkpoint(
        path,
        compute=compute_here(_DTYPE.value),
        batch_size=_BATCH_SIZE.value,
      )
      counts = accuracy.count_right(
        pipeline,
        prompts,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        seed=_SEED.value,
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

  settings = {
    "task": _TASK.value,
    "per_task": _PER_TASK.value,
    "num_inference_steps": asked.num_inference_steps,
    "guidance_scale": asked.guidance_scale,
    "seed": _SEED.value,
    "batch_size": _BATCH_SIZE.value,
    "dtype": _DTYPE.value,
    "pixsigma_jax": pixsigma_jax.__version__,
  }
  text = json.dumps({"settings": settings, "checkpoints": results}, indent=2) + "\n"
  disk.write_whole(output, lambda part: part.write_text(text, encoding="utf-8"))
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


if __name__ == "__main__":
  command.run(main)
