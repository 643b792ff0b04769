r"""Applies a transform to a snapshot, says what it changed, and writes the result.

  python -m pixsigma_jax.transform interpolate_pe SRC DST --base_size=128
  python -m pixsigma_jax.transform add_kv_compression SRC DST --ratio=4 --layers=14-27
  python -m pixsigma_jax.transform remove_kv_compression SRC DST
  python -m pixsigma_jax.transform grow_depth SRC DST --depth=42
  python -m pixsigma_jax.transform swap_vae SRC DST --scaling_factor=0.13025
  python -m pixsigma_jax.transform alpha_to_sigma SRC DST --fold_size=1024,1024
  python -m pixsigma_jax.transform merge_lora SRC DST --adapter=RUN/adapters/1000
  python -m pixsigma_jax.transform average SRC DST --others=RUN/snapshots/4000
  python -m pixsigma_jax.transform post_hoc_ema SRC DST --others=… --sigma_rel=0.15

SRC is a run's workdir or a snapshot, DST becomes a workdir with `snapshots/0`. With
--dry_run the difference is printed and nothing is written.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from pixsigma_jax import checkpoint, command
from pixsigma_jax.convert.lora import read_lora
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.kv_compression import OPERATORS, WINDOWS
from pixsigma_jax.transform.report import report
from pixsigma_jax.transforms import OF_SEVERAL, Model, apply_transforms, with_defaults
from pixsigma_jax.transforms.chain import OF_ADAPTERS
from pixsigma_jax.transforms.kv_compression import INITIALIZATIONS

_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the difference, write nothing.")

# A flag for each argument that a transform has, under the argument's name.
_ARGUMENTS = (
  # interpolate_pe, extend_pe
  flags.DEFINE_integer("base_size", None, "Token grid side of the new resolution."),
  # add_kv_compression
  flags.DEFINE_integer(
    "ratio", None, f"Tokens per compressed token: {', '.join(map(str, WINDOWS))}."
  ),
  flags.DEFINE_list(
    "layers", None, "Layers that compress, or are copied: 14-27, or 3,7,11."
  ),
  flags.DEFINE_enum("operator", None, OPERATORS, "What makes one token of several."),
  flags.DEFINE_bool("norm", None, "LayerNorm after the convolution."),
  flags.DEFINE_enum(
    "initialization", None, INITIALIZATIONS, "Of the convolution and its norm."
  ),
  flags.DEFINE_integer("seed", None, "Of the random initialization."),
  # grow_depth, with layers
  flags.DEFINE_integer("depth", None, "Number of blocks afterwards."),
  # swap_vae, alpha_to_sigma
  flags.DEFINE_float("scaling_factor", None, "Of the new latents."),
  flags.DEFINE_string(
    "autoencoder", None, "Identity of the new autoencoder, JSON as in a manifest."
  ),
  flags.DEFINE_integer("channels", None, "Of the new latents."),
  flags.DEFINE_float("old_scaling_factor", None, "Of the latents with old_mean."),
  flags.DEFINE_list("old_mean", None, "Of each channel of the old latents."),
  flags.DEFINE_list("old_std", None, "Of each channel of the old latents."),
  flags.DEFINE_list("new_mean", None, "Of each channel of the new latents."),
  flags.DEFINE_list("new_std", None, "Of each channel of the new latents."),
  flags.DEFINE_integer("caption_length", None, "Tokens of a caption: 300 for Σ."),
  flags.DEFINE_float("pe_interpolation", None, "Scale of the positions."),
  flags.DEFINE_list(
    "fold_size", None, "HEIGHT,WIDTH of the images whose size conditions are kept."
  ),
  # merge_lora, unmerge_lora
  flags.DEFINE_string(
    "adapter", None, "A LoRA's folder or file: PEFT's or diffusers'."
  ),
  flags.DEFINE_float("scale", None, "Of the adapter's effect; 1 for the whole of it."),
  # average, post_hoc_ema
  flags.DEFINE_list("others", None, "Workdirs or snapshots to average SRC with."),
  flags.DEFINE_list("weights", None, "Of SRC and of the others, in sum 1."),
  flags.DEFINE_float("sigma_rel", None, "Length of the wanted average."),
  flags.DEFINE_integer("step", None, "Where the wanted average ends."),
)


def main(arguments: list[str]) -> None:
  """Entry point; flags are parsed."""
  name, source, target = arguments[0], arguments[1], pathlib.Path(arguments[2])
  given = with_defaults(name, _given())
  if not _DRY_RUN.value:
    _check_target(target)
  snapshot = checkpoint.read_snapshot(source)
  if name in OF_SEVERAL:
    # As absolute paths of snapshots: a workdir's newest may be another tomorrow.
    given["others"] = [str(checkpoint.find_snapshot(path)) for path in given["others"]]
  if name in OF_ADAPTERS:
    given["adapter"] = str(pathlib.Path(given["adapter"]).absolute())
  before = Model(
    config=snapshot.config,
    params=snapshot.params,
    null_caption=snapshot.null_caption,
    metadata=snapshot.metadata,
  )
  after = apply_transforms(
    before, [{"name": name, **given}], read=_read, read_lora=read_lora
  )
  for line in report(before, after):
    print(line)
  if _DRY_RUN.value:
    return

  entry = {
    "stage": target.name,
    "parent": snapshot.origin,
    "transforms": [{"name": name, **given}],
  }
  metadata = dataclasses.replace(
    after.metadata,
    stage=target.name,
    provenance=(*snapshot.metadata.provenance, entry),
    history=None,  # no run's
  )
  metadata = Metadata.from_json(metadata.to_json())  # as it will be read
  if _is_there(target):
    if checkpoint.read_metadata(target) != metadata:
      raise FileExistsError(f"{target} holds another model, and is left as it is.")
    print(f"{target} has been written already.")
    return
  checkpoint.save_snapshot(
    target,
    0,
    params=after.params,
    null_caption=after.null_caption,
    metadata=metadata,
  )
  print(target)


def _given() -> dict[str, Any]:
  """The arguments on the command line, by name."""
  return {
    flag.name: _READ.get(flag.name, lambda _, value: value)(flag.name, flag.value)
    for flag in _ARGUMENTS
    if flag.present
  }


def _integers(name: str, values: list[str]) -> tuple[int, ...]:
  numbers: list[int] = []
  for value in values:
    first, dash, last = value.partition("-")
    try:
      numbers += range(int(first), int(last if dash else first) + 1)
    except ValueError:
      raise ValueError(
        f"--{name}={','.join(values)}: {value!r} is neither a number nor FIRST-LAST."
      ) from None
  return tuple(numbers)


def _floats(name: str, values: list[str]) -> tuple[float, ...]:
  try:
    return tuple(map(float, values))
  except ValueError as error:
    raise ValueError(f"--{name}={','.join(values)}: {error}.") from None


def _json(name: str, value: str) -> dict[str, Any]:
  try:
    found = json.loads(value)
  except json.JSONDecodeError as error:
    raise ValueError(f"--{name} is not JSON: {error}.") from None
  if not isinstance(found, dict):
    raise ValueError(
      f"--{name}={value} must be an object, as the manifest of a dataset has it: "
      '{"name": …}.'
    )
  return found


_READ: dict[str, Callable[[str, Any], Any]] = {
  "layers": _integers,
  "fold_size": _integers,
  "autoencoder": _json,
  **dict.fromkeys(("old_mean", "old_std", "new_mean", "new_std", "weights"), _floats),
}


def _read(path: str) -> tuple[Metadata, Callable[[], Any]]:
  return checkpoint.read_metadata(path), lambda: checkpoint.read_snapshot(path).params


def _is_there(target: pathlib.Path) -> bool:
  """Whether a whole snapshot is."""
  return (target / checkpoint.SNAPSHOTS / "0").is_dir()


def _check_target(target: pathlib.Path) -> None:
  """Checks the target before any work is done.

  What an interrupted or an earlier run of this command left there is not.
  """
  if target.exists() and (
    not target.is_dir()
    or any(path.name != checkpoint.SNAPSHOTS for path in target.iterdir())
  ):
    raise FileExistsError(f"{target} exists already and is left as it is.")


if __name__ == "__main__":
  command.run(main, positional=("NAME", "SRC", "DST"))
