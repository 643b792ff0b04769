r"""Makes feature records of images and captions, once, for training to read.

  python -m pixsigma_jax.prepare --index=INDEX --resolution=512 --frozen=FOLDER \
    --output=DIR
  python -m pixsigma_jax.prepare --official=DATA_ROOT --resolution=512 \
    --null_caption=FILE --output=DIR
  python -m pixsigma_jax.prepare --dataset=digits --resolution=8 --count=20000 \
    --output=DIR
  python -m pixsigma_jax.prepare --dataset=openmoji --resolution=64 --count=20000 \
    --output=DIR

From an index of `curate` in two parts: `pictures` crops (any machine, Apache Beam) and
`features` encodes (accelerators; any number of processes). Interrupted, the same
command goes on; a finished dataset is left alone.
"""

import pathlib
import shlex

import jax
import jax.numpy as jnp
from absl import flags

from pixsigma_jax import command
from pixsigma_jax.data import buckets
from pixsigma_jax.data.crops import CropRule, filter_at
from pixsigma_jax.data.records import MANIFEST, open_dataset
from pixsigma_jax.prepare import check, cropped_images, features, official, write
from pixsigma_jax.prepare.digits import prepare_digits
from pixsigma_jax.prepare.openmoji import Drawing, prepare_openmoji
from pixsigma_jax.prepare.settings import Settings
from pixsigma_jax.sample.encoders import locate
from pixsigma_jax.wording import listed

_PARTS = ("pictures", "features")

_INDEX = flags.DEFINE_string(
  "index", None, "Where the images come from: an index of `curate`."
)
_OFFICIAL = flags.DEFINE_string(
  "official", None, "Or the data root of PixArt's own code, its features as they are."
)
_DATASET = flags.DEFINE_enum(
  "dataset",
  None,
  ["digits", "openmoji"],
  "Or the handwriting in scikit-learn's wheel, or OpenMoji's drawings.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.", required=True)
_RESOLUTION = flags.DEFINE_integer(
  "resolution",
  None,
  "Side in pixels of the square whose area the images have; of digits: of one.",
  required=True,
)

_PARTS_FLAG = flags.DEFINE_list("parts", list(_PARTS), "What is to be done now.")
_TABLE = flags.DEFINE_string(
  "table",
  None,
  "Sizes to crop to, a file of `curate buckets`; else those published for the "
  "resolution.",
)
_ALLOW_UPSCALING = flags.DEFINE_bool(
  "allow_upscaling", False, "Enlarge images smaller than their size: else left out."
)
_IMAGES_PER_SHARD = flags.DEFINE_integer(
  "images_per_shard", 1024, "Images of one file: the piece that one process works on."
)
_IMAGES = flags.DEFINE_string(
  "pictures", None, "Directory of the cropped images; OUTPUT-pictures by default."
)
_UPDATE = flags.DEFINE_bool(
  "update",
  False,
  "If the dataset is of other images, captions or networks: encode again what has "
  "changed, and take over the rest. Else that is refused.",
)
_BEAM = flags.DEFINE_string("beam", "", "Options of Apache Beam, such as --runner=…")

_FROZEN = flags.DEFINE_string(
  "frozen",
  None,
  "Folder, or hub id, with vae/, text_encoder/ and tokenizer/ as diffusers saves them. "
  "OpenMoji's drawings do without: their pixels are the latents then.",
)
_CAPTIONS = flags.DEFINE_enum(
  "captions",
  "embeddings",
  ["embeddings", "text"],
  "What records hold of captions. Text is embedded by training, and needs only the "
  "tokenizer here.",
)
_CAPTION_LENGTH = flags.DEFINE_integer(
  "caption_length", 300, "Tokens that a caption may have: 300 for Σ, 120 for α."
)
_TRUNCATE_CAPTIONS = flags.DEFINE_bool(
  "truncate_captions", False, "Cut captions that are longer: else left out."
)
_TEXT_DTYPE = flags.DEFINE_enum(
  "text_dtype", "bfloat16", ["bfloat16", "float32"], "Precision of T5."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  None,
  "Images that the VAE encodes at once; by default the pixels of 1024x1024 a device.",
)
_TILE_SIZE = flags.DEFINE_integer(
  "tile_size",
  None,
  "Side of the VAE's tiles, where memory does not suffice for whole images.",
)
_CHECK = flags.DEFINE_string(
  "check", None, "Afterwards decode some records, and show them in this PNG file."
)
_NULL_CAPTION = flags.DEFINE_string(
  "null_caption", None, "Embedding of the empty caption, of --official's features."
)
_PROCESS_INDEX = flags.DEFINE_integer(
  "process_index", None, "Which of several processes this is, from 0."
)
_PROCESS_COUNT = flags.DEFINE_integer(
  "process_count", None, "How many processes share the work."
)

_COUNT = flags.DEFINE_integer("count", None, "Images to draw, of a dataset.")
_SEED = flags.DEFINE_integer("seed", 0, "Which images are drawn, of a dataset.")
_SCALING_FACTOR = flags.DEFINE_float(
  "scaling_factor", 1.0, "What training multiplies latents that are pixels with."
)
_OBJECTS = flags.DEFINE_integer(
  "objects", 0, "Different objects of OpenMoji, animals and food first; 0 for all."
)
_PAIRS = flags.DEFINE_float(
  "pairs", 0.75, "Share of OpenMoji's scenes that show two objects."
)


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  sources = {"index": _INDEX, "official": _OFFICIAL, "dataset": _DATASET}
  given = [name for name, flag in sources.items() if flag.value is not None]
  if len(given) != 1:
    raise ValueError(
      "Give one of --index, --official and --dataset, to say where the images come "
      f"from{': not ' + ' and '.join(f'--{name}' for name in given) if given else ''}."
    )
  if _INDEX.value is not None:
    _from_index(_INDEX.value)
  elif _OFFICIAL.value is not None:
    _from_official(_OFFICIAL.value)
  elif _DATASET.value == "digits":
    _digits()
  else:
    _openmoji()


def _from_index(index: str) -> None:
  parts = _PARTS_FLAG.value
  if not parts or not set(parts) <= set(_PARTS):
    raise ValueError(
      f"--parts={','.join(parts)} must be one or more of {','.join(_PARTS)}."
    )
  output = pathlib.Path(_OUTPUT.value)
  where = _IMAGES.value or output.with_name(f"{output.name}-pictures")
  frozen = ""
  if "features" in parts or _CHECK.value is not None:
    if _FROZEN.value is None:
      raise ValueError(
        "Give --frozen=FOLDER, with the VAE and T5 that are to make the features."
      )
    frozen = str(locate(_FROZEN.value))
  if "pictures" in parts:
    cropped = cropped_images.prepare_images(
      index,
      where,
      rule=_crop_rule(),
      resolution=_RESOLUTION.value,
      allow_upscaling=_ALLOW_UPSCALING.value,
      images_per_shard=_IMAGES_PER_SHARD.value,
      beam_options=shlex.split(_BEAM.value),
      update=_UPDATE.value,
    )
    print(
      f"{where} holds the cropped images, {cropped.num_planned} but for what cannot be "
      "decoded. Once the records are finished, only --check still needs them."
    )
  if "features" in parts:
    command.keep_compiled()
    process, count = _process()
    written = features.prepare_features(
      cropped_images.open_images(where),
      output,
      _settings(frozen),
      process_index=process,
      process_count=count,
      update=_UPDATE.value,
    )
    _say_what_is_there(written)
  if _CHECK.value is not None:
    check.check(cropped_images.open_images(where), output, frozen, _CHECK.value)
    print(_CHECK.value)


def _crop_rule() -> CropRule:
  resolution = _RESOLUTION.value
  if _TABLE.value is not None:
    table = buckets.read_table(_TABLE.value)
  elif resolution in buckets.BUCKETS:
    table = buckets.BUCKETS[resolution]
  else:
    raise ValueError(
      f"There is no published table of sizes for {resolution} pixels, only for "
      f"{', '.join(map(str, buckets.BUCKETS))}: make one with `curate buckets` and "
      "give it as --table=FILE.json."
    )
  if unusable := buckets.check(table, resolution).unusable:
    raise ValueError(f"The table cannot be used. {listed(unusable, 4, ' ')}")
  return CropRule(table, filter_at(resolution))


def _settings(frozen: str) -> Settings:
  return Settings(
    frozen=frozen,
    captions="text" if _CAPTIONS.value == "text" else "embeddings",
    caption_length=_CAPTION_LENGTH.value,
    truncate_captions=_TRUNCATE_CAPTIONS.value,
    text_dtype=jnp.dtype(_TEXT_DTYPE.value),
    batch_size=_BATCH_SIZE.value,
    tile_size=_TILE_SIZE.value,
  )


def _process() -> tuple[int, int]:
  """Process index and count, from the flags or else from JAX."""
  index, count = _PROCESS_INDEX.value, _PROCESS_COUNT.value
  if index is not None and count is not None:
    return index, count
  if index is not None or count is not None:
    raise ValueError("Give --process_index and --process_count together.")
  if jax.distributed.is_initialized():
    return jax.process_index(), jax.process_count()
  return 0, 1


def _from_official(data_root: str) -> None:
  if _UPDATE.value:
    raise ValueError(
      "--update is for --index: the official code's features are only copied. Delete "
      f"{_OUTPUT.value}, or choose another --output."
    )
  if _NULL_CAPTION.value is None:
    raise ValueError(
      "Give --null_caption=FILE: the embedding of the empty caption by the T5 that "
      "made the features (.pth of the official code, .safetensors or .npy)."
    )
  index, count = _process()
  written = official.prepare_official(
    data_root,
    _OUTPUT.value,
    resolution=_RESOLUTION.value,
    null_caption=_NULL_CAPTION.value,
    images_per_shard=_IMAGES_PER_SHARD.value,
    process_index=index,
    process_count=count,
  )
  _say_what_is_there(written)


def _say_what_is_there(written: bool) -> None:
  """Prints the number of records, and of refused images and captions by reason."""
  directory = pathlib.Path(_OUTPUT.value)
  if not (directory / MANIFEST).exists():
    print(f"{directory} is unfinished: shards of other processes are missing.")
    return
  count = len(open_dataset(directory))
  print(f"{directory} {'holds' if written else 'already holds these'} {count} records.")
  for what, reasons in write.read_report(directory).items():
    for reason, number in reasons.items():
      print(f"  left out, {what}: {number} {reason}")


def _digits() -> None:
  directory = pathlib.Path(_OUTPUT.value)
  written = prepare_digits(
    directory,
    resolution=_RESOLUTION.value,
    count=_count(),
    seed=_SEED.value,
    scaling_factor=_SCALING_FACTOR.value,
  )
  _say_what_is_drawn(directory, written)


def _openmoji() -> None:
  directory, settings = pathlib.Path(_OUTPUT.value), None
  drawing = Drawing(
    resolution=_RESOLUTION.value,
    count=_count(),
    seed=_SEED.value,
    objects=_OBJECTS.value,
    pairs=_PAIRS.value,
  )
  if _FROZEN.value is not None:
    command.keep_compiled()
    settings = _settings(str(locate(_FROZEN.value)))
  written = prepare_openmoji(
    directory, drawing, scaling_factor=_SCALING_FACTOR.value, settings=settings
  )
  _say_what_is_drawn(directory, written)
  print(open_dataset(directory).manifest.license)


def _count() -> int:
  if _COUNT.value is None:
    raise ValueError(f"Give --count: how many images of {_DATASET.value} to draw.")
  return _COUNT.value


def _say_what_is_drawn(directory: pathlib.Path, written: bool) -> None:
  if written:
    print(f"{directory} holds {_COUNT.value} records.")
  else:
    print(f"{directory} already holds these {_COUNT.value} records.")


if __name__ == "__main__":
  command.run(main)
