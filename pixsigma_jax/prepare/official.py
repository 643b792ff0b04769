"""Features that PixArt's own extractors have written, as records, not encoded again.

Source: `tools/extract_features.py` and `diffusion/data/datasets/InternalData{,_ms}.py`
of PixArt-alpha/PixArt-sigma. Below DATA_ROOT/InternData/:

  data_info.json                                     a list: width, height, path,
                                                     prompt, sharegpt4v
  img_sdxl_vae_features_{res}resolution_ms_new/*.npy (8, h/8, w/8): mean ‖ standard
                                                     deviation, unscaled; or without
                                                     _ms, of square crops
  caption_features_new/*.npz                         of prompt: caption_feature
                                                     (1, t, e), attention_mask (1, t)
  sharegpt4v_caption_features_new/*.npz              of sharegpt4v
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32

from pixsigma_jax.convert import files
from pixsigma_jax.data.crops import identity_hash
from pixsigma_jax.data.records import DAMAGED_ARRAYS, Features, Record
from pixsigma_jax.data.writing import begin_dataset
from pixsigma_jax.models.autoencoders import SDXL_SCALING_FACTOR, vae_identity
from pixsigma_jax.models.vae import LOG_VARIANCE_RANGE
from pixsigma_jax.prepare import compare, contents, write
from pixsigma_jax.prepare.contents import Contents
from pixsigma_jax.prepare.cropped_images import Refusal
from pixsigma_jax.wording import listed

# The reference leaves out what is higher; nothing hinders it to be as wide as it likes.
LARGEST_RATIO = 4.5
_DOWNSAMPLING, _CHANNELS = 8, 4  # of SDXL's autoencoder
# Field of data_info.json → where its features are, and the kind of caption it is.
_CAPTIONS = {
  "sharegpt4v": ("sharegpt4v_caption_features_new", "long"),
  "prompt": ("caption_features_new", "short"),
}
# What the reference's files of the null caption call it, then its checkpoints.
_NULL_NAMES = ("uncond_prompt_embeds", "y_embedder.y_embedding")


@dataclasses.dataclass(frozen=True)
class _Layout:
  """Locations of the features of one resolution."""

  root: pathlib.Path  # InternData
  latents: pathlib.Path
  squashed: bool  # images were resized to a bucket's size, whatever their shape


def prepare_official(
  data_root: str | pathlib.Path,
  directory: str | pathlib.Path,
  *,
  resolution: int,
  null_caption: str | pathlib.Path,
  images_per_shard: int,
  process_index: int = 0,
  process_count: int = 1,
) -> bool:
  """Writes this process's shards of records that are missing, and finishes the dataset.

  Args:
    data_root: with InternData/.
    directory: new, or begun by the same job.
    resolution: which of the features of images to take. If there are some of buckets'
      sizes and some of squares, the former.
    null_caption: file with the embedding of the empty caption: the reference's .pth, a
      .safetensors, or .npy.
    images_per_shard: entries of data_info.json for each shard but the last.
    process_index, process_count: see `features.prepare_features`.

  Returns:
    whether anything was missing; False if the very same dataset was there already.

  Raises:
    FileNotFoundError: data_info.json, the folder of features or the null caption is not
      there.
    FileExistsError: `directory` holds another dataset, or files of someone else.
    ValueError: data_info.json or the null caption is damaged, no record is left, or an
      argument is out of its range.
  """
  write.check_process(process_index, process_count)
  if images_per_shard < 1:
    raise ValueError(f"images_per_shard {images_per_shard} must be at least 1.")
  directory = pathlib.Path(directory)
  layout = _layout(pathlib.Path(data_root), resolution)
  entries = _entries(layout.root / "data_info.json")
  embedding = read_null_caption(null_caption)
  width = embedding.shape[1]
  crop_rule = {"name": "squash" if layout.squashed else "center-square", "version": 1}
  features = Features(
    kind="latent_moments",
    channels=_CHANNELS,
    resolution=resolution,
    autoencoder=vae_identity(SDXL_SCALING_FACTOR, _CHANNELS, _DOWNSAMPLING),
    scaling_factor=SDXL_SCALING_FACTOR,
    text_encoder={"name": "t5", "width": width},
    caption_storage="embeddings",
    caption_length=len(embedding),
    caption_width=width,
    crop_rule=crop_rule,
    # Of what weights the features are nobody has noted down.
    hashes={"crop_rule": identity_hash(crop_rule)},
  )
  num_shards = -(-len(entries) // images_per_shard)
  made_of = Contents(contents.images(map(_made_of, entries)))
  if compare.is_finished(directory, features, num_shards, made_of, can_update=False):
    return False
  stems = collections.Counter(
    pathlib.PurePosixPath(entry["path"]).stem
    for entry in entries
    if isinstance(entry, dict) and isinstance(entry.get("path"), str)
  )
  unfinished = begin_dataset(directory, features, embedding, num_shards)
  made_of.write(directory)

  def make(shard: int) -> Iterator[Record | Refusal]:
    first = shard * images_per_shard
    for number, entry in enumerate(entries[first : first + images_per_shard], first):
      yield from _record(number, entry, layout, stems, features)

  sizes = [
    len(entries[first : first + images_per_shard])
    for first in range(0, len(entries), images_per_shard)
  ]
  write.write_shards(unfinished, make, process_index, process_count, sizes)
  write.finish_with_report(unfinished, [])
  return True


def read_null_caption(path: str | pathlib.Path) -> Float32[np.ndarray, "t e"]:
  """The embedding of the empty caption from a .pth, .safetensors or .npy file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it holds something else.
  """
  path = pathlib.Path(path)
  if path.suffix == ".npy":
    if not path.exists():
      raise FileNotFoundError(f"There is no null caption at {path}.")
    array = _load(path)
    if isinstance(array, str):
      raise ValueError(f"{path} cannot be read: {array}.")
  else:
    weights = files.open_weights(path)
    names = [name for name in _NULL_NAMES if name in weights] or list(weights)
    if len(names) != 1 and names[0] not in _NULL_NAMES:
      raise ValueError(
        f"{path} holds {listed(sorted(names), 4)}: which of them is the null "
        f"caption cannot be told. It should be called {_NULL_NAMES[0]}."
      )
    array = weights[names[0]]
  if array.ndim == 3 and len(array) == 1:
    array = array[0]
  if array.ndim != 2 or not array.size or array.dtype.kind not in "fV":
    raise ValueError(
      f"{path} holds {array.dtype} of shape {list(array.shape)}, and the embedding of "
      "the empty caption is [tokens width]."
    )
  return array.astype(np.float32)


def _layout(data_root: pathlib.Path, resolution: int) -> _Layout:
  root = data_root / "InternData"
  if not (root / "data_info.json").is_file():
    raise FileNotFoundError(
      f"There is no {root / 'data_info.json'}: give --official the folder that has "
      "InternData in it."
    )
  stem = f"img_sdxl_vae_features_{resolution}resolution"
  for name, squashed in ((f"{stem}_ms_new", True), (f"{stem}_new", False)):
    if (root / name).is_dir():
      return _Layout(root, root / name, squashed)
  found = sorted(path.name for path in root.glob("img_*") if path.is_dir())
  raise FileNotFoundError(
    f"{root} has no features of {resolution} pixels, neither {stem}_ms_new nor "
    f"{stem}_new; there {'is' if len(found) == 1 else 'are'} "
    f"{', '.join(found) or 'none at all'}."
  )


def _entries(path: pathlib.Path) -> list[Any]:
  entries = files.read_json(path)
  if not isinstance(entries, list) or not entries:
    raise ValueError(f"{path} is no list of images.")
  return entries


def _made_of(entry: Any) -> dict[str, Any]:
  """Contents of a record, as far as the list shows them."""
  fields = entry if isinstance(entry, dict) else {}
  image = [fields.get(name) for name in ("path", "height", "width")]
  return {
    # A table holds no half of a surrogate pair, which JSON may.
    "id": str(fields.get("path")).encode(errors="backslashreplace").decode(),
    "image": contents.digest(image),
    "captions": [fields.get(name) for name in _CAPTIONS],
    "score": None,
  }


def _record(
  number: int,
  entry: Any,
  layout: _Layout,
  stems: Mapping[str, int],
  features: Features,
) -> Iterator[Record | Refusal]:
  """The record of an entry, and all that is wrong with it."""
  identity = f"data_info.json[{number}]"

  def refusal(reason: str, detail: str = "", what: str = "image") -> Refusal:
    return Refusal(id=identity, reason=reason, detail=detail, what=what)

  if problem := _entry_problem(entry):
    yield refusal("entry is malformed", problem)
    return
  path = pathlib.PurePosixPath(entry["path"])
  identity = str(path.with_suffix(""))
  height, width = entry["height"], entry["width"]
  if max(height, width) > LARGEST_RATIO * min(height, width):
    yield refusal(f"has sides beyond 1:{LARGEST_RATIO:g}", f"{height}x{width}")
    return
  latents = _feature(layout.latents, path, ".npy", stems)
  if isinstance(latents, str):
    yield refusal(latents)
    return
  moments = _moments(latents)
  if isinstance(moments, str):
    yield refusal("image features are malformed", f"{latents}: {moments}")
    return
  captions, embeddings = [], []
  for field, (folder, kind) in _CAPTIONS.items():
    text = (entry.get(field) or "").strip()
    if not text:
      yield refusal("is empty", field, "caption")
      continue
    file = _feature(layout.root / folder, path, ".npz", stems)
    if isinstance(file, str):
      yield refusal(file, field, "caption")
      continue
    embedding = _embedding(file, features)
    if isinstance(embedding, str):
      yield refusal("caption features are malformed", f"{file}: {embedding}", "caption")
      continue
    captions.append((text, kind))
    embeddings.append(embedding)
  if not captions:
    yield refusal("has no caption with features")
    return
  texts, kinds = zip(*captions, strict=True)
  yield Record(
    id=identity,
    captions=texts,
    caption_kinds=kinds,
    caption_lengths=np.array([len(rows) for rows in embeddings], np.int32),
    caption_embeddings=np.concatenate(embeddings),
    original_size=np.array([height, width], np.int32),
    crop=_crop(height, width, layout.squashed),
    latent_moments=moments,
  )


def _entry_problem(entry: Any) -> str | None:
  if not isinstance(entry, dict):
    return "it is no object"
  path = entry.get("path")
  if not isinstance(path, str) or not path:
    return "it has no path"
  parts = pathlib.PurePosixPath(path).parts
  if path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
    return f"the path {path!r} leads outside"
  for side in ("height", "width"):
    if type(entry.get(side)) is not int or not 0 < entry[side] < 1 << 31:
      return f"{side} is {entry.get(side)!r}"
  for field in _CAPTIONS:
    if not isinstance(entry.get(field) or "", str):
      return f"{field} is {entry[field]!r}"
  return None


def _feature(
  folder: pathlib.Path,
  path: pathlib.PurePosixPath,
  suffix: str,
  stems: Mapping[str, int],
) -> pathlib.Path | str:
  """The file of an image's features, or why it cannot be had.

  The reference's loader looks for `folder_name`, its extractor has written `name`: so
  images of one name in two folders have overwritten each other's features.
  """
  # As the loader joins: only the last separator becomes an underscore.
  joined = folder / ("_".join(str(path).rsplit("/", 1)))
  joined = joined.with_name(joined.name.removesuffix(path.suffix) + suffix)
  if joined.is_file():
    ambiguous = len(path.parts) == 1 and stems[path.stem] > 1
    return "features may be another image's of that name" if ambiguous else joined
  by_name = folder / (path.stem + suffix)
  if not by_name.is_file():
    return f"has no features in {folder.name}"
  if stems[path.stem] > 1:
    return "features may be another image's of that name"
  return by_name


# A damaged header may also say a size that nobody has memory for, or no type at all.
_UNREADABLE = (OSError, AttributeError, TypeError, MemoryError, *DAMAGED_ARRAYS)


def _load(path: pathlib.Path) -> np.ndarray | str:
  """An array of a .npy file, or why it cannot be read; never a pickle."""
  try:
    array = np.load(path, allow_pickle=False)
  except _UNREADABLE as error:
    return str(error) or type(error).__name__
  return array if isinstance(array, np.ndarray) else "it is no array"


def _moments(path: pathlib.Path) -> Float16[np.ndarray, "h w m"] | str:
  """Mean and log-variance, channels last, or what is wrong."""
  array = _load(path)
  if isinstance(array, str):
    return array
  if array.ndim != 3 or len(array) != 2 * _CHANNELS or not array.size:
    return f"shape {list(array.shape)}, not [{2 * _CHANNELS} h w]"
  if array.dtype.kind != "f":
    return f"{array.dtype} numbers"
  mean, deviation = np.split(array.astype(np.float32).transpose(1, 2, 0), 2, axis=-1)
  if not np.isfinite(mean).all() or not np.isfinite(deviation).all():
    return "values that are not finite"
  if deviation.min() < 0:
    return f"a standard deviation of {deviation.min():g}: is it the log-variance?"
  with np.errstate(divide="ignore"):  # float16 has deviations that are zero
    log_variance = np.clip(2 * np.log(deviation), *LOG_VARIANCE_RANGE)
  return np.concatenate([mean, log_variance], axis=-1).astype(np.float16)


def _embedding(
  path: pathlib.Path, features: Features
) -> Float16[np.ndarray, "n e"] | str:
  """The embeddings of a caption's valid tokens, or what is wrong."""
  try:
    with np.load(path, allow_pickle=False) as arrays:
      embedding, mask = arrays["caption_feature"], arrays["attention_mask"]
  except _UNREADABLE as error:
    return str(error) or type(error).__name__
  if embedding.ndim == 3 and len(embedding) == 1:
    embedding = embedding[0]
  mask = mask.reshape(-1) if mask.size == max(mask.shape, default=0) else mask
  if embedding.ndim != 2 or mask.shape != embedding.shape[:1]:
    return f"shapes {list(embedding.shape)} and {list(mask.shape)}, not [t e] and [t]"
  if embedding.shape[1] != features.caption_width or embedding.dtype.kind != "f":
    return (
      f"{embedding.dtype} embeddings of width {embedding.shape[1]}, and the null "
      f"caption's is {features.caption_width}"
    )
  valid = mask.astype(bool)
  length = int(valid.sum())
  if not length or not valid[:length].all():
    return "a mask that does not begin with the caption's tokens"
  if length > features.caption_length:
    return f"{length} tokens, and the null caption has {features.caption_length}"
  with np.errstate(over="ignore"):
    embedding = embedding[:length].astype(np.float16)
  return embedding if np.isfinite(embedding).all() else "values that are not finite"


def _crop(height: int, width: int, squashed: bool) -> Float32[np.ndarray, "4"]:
  """Crop that the extractor encoded: the whole image, or the middle square."""
  if squashed:
    return np.array([0, 0, height, width], np.float32)
  side = min(height, width)
  top, left = (height - side) / 2, (width - side) / 2
  return np.array([top, left, top + side, left + side], np.float32)
