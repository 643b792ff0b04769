"""The accelerator side of preparing: pictures through VAE and T5 into feature records.

Any number of processes work on one dataset, each on shards of its own. A shard is
written whole or not at all and depends on nothing but its pictures, so that killed
processes, more of them or fewer, leave the same files behind.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float16, Float32
from PIL import Image

from pixsigma_jax import command, disk, metadata, sharding
from pixsigma_jax.convert import files, t5, vae
from pixsigma_jax.data import records
from pixsigma_jax.data.crops import identity_hash
from pixsigma_jax.data.records import CaptionStorage, Features, Record, open_dataset
from pixsigma_jax.data.writing import UNFINISHED, Unfinished, begin_dataset
from pixsigma_jax.models.t5 import T5Config, T5TextEncoder
from pixsigma_jax.models.vae import KLAutoencoder
from pixsigma_jax.prepare import contents
from pixsigma_jax.prepare.contents import Contents
from pixsigma_jax.prepare.pictures import Picture, Pictures, Refusal, count_reasons
from pixsigma_jax.sample import pictures as drawing

# A caption that is on its way into a record: text, kind, tokens.
Caption: TypeAlias = tuple[str, str, int]

# What one device encodes at once unless told otherwise: the pixels of one 1024² image,
# and no more than so many images.
_PIXELS_AT_ONCE, _IMAGES_AT_ONCE = 1024**2, 16
# Pictures whose captions are embedded together, at least: T5 takes 16 at a time.
_PICTURES_AT_ONCE = 8
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
_REPORT, _REFUSED = "report.json", "refused.jsonl"

# How long processes of an update wait for the first one, which makes room for it.
_SECONDS_FOR_THE_FIRST, _SECONDS_BETWEEN_LOOKS = 600, 1

_CHECKED = 8  # records that `check` looks at
_SHEET_SIDE = 512  # pixels of a picture on its sheet, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Settings that turn cropped images and captions into features.

  Attributes:
    frozen: folder with vae/, text_encoder/ and tokenizer/ as diffusers saves them. For
      captions as text, text_encoder/ needs only its config.json.
    captions: whether records hold captions' embeddings or only their text.
    caption_length: tokens that a caption may have.
    truncate_captions: whether longer ones are cut, instead of dropped.
    text_dtype: of T5: bfloat16 or float32.
    batch_size: pictures that the VAE encodes at once; None for as many as have the
      pixels of one 1024² image on each device, 16 at most.
    tile_size: side in pixels of the VAE's tiles, for a device without the memory for
      whole images; None for whole ones, which alone equal the reference.
  """

  frozen: str
  captions: CaptionStorage = "embeddings"
  caption_length: int = 300
  truncate_captions: bool = False
  text_dtype: DTypeLike = jnp.bfloat16
  batch_size: int | None = None
  tile_size: int | None = None

  def __post_init__(self):
    if self.caption_length < 1:
      raise ValueError(f"caption_length {self.caption_length} must be at least 1.")
    if self.batch_size is not None and self.batch_size < 1:
      raise ValueError(f"batch_size {self.batch_size} must be at least 1.")


def prepare_features(
  pictures: Pictures,
  directory: str | os.PathLike[str],
  settings: Settings,
  *,
  process_index: int = 0,
  process_count: int = 1,
  devices: Sequence[Any] | None = None,
  update: bool = False,
) -> bool:
  """Writes this process's shards of records that are missing, and finishes the dataset.

  Whichever process finds that nothing is missing any more writes the manifest. Reports
  go beside the dataset, see `reports_of`.

  Args:
    pictures: all of them there.
    directory: new, or begun by the same job.
    process_index, process_count: this process takes the shards whose number leaves the
      remainder process_index when divided by process_count.
    devices: that share the work; this process's own if None.
    update: if the directory holds records of other contents, or made by other networks
      or arguments, whether the dataset is made anew: encoded is what has changed, the
      rest is taken over. What was there stays in `contents.previous_of(directory)`
      until it is finished.

  Returns:
    whether anything was missing; False if the very same dataset was there already.

  Raises:
    FileExistsError: the directory holds another dataset, or files of someone else: the
      message names what differs.
    FileNotFoundError: a network's files are missing.
    ValueError: they are not those of a VAE or T5, pictures are missing, no record is
      left, or an argument is out of its range.
    OSError: a file cannot be written.
  """
  directory = pathlib.Path(directory)
  check_process(process_index, process_count)
  if missing := pictures.missing():
    raise ValueError(
      f"{len(missing)} of {pictures.num_shards} shards of pictures are missing in "
      f"{pictures.directory}, the first is {missing[0]}: finish --parts=pictures first."
    )
  folder = pathlib.Path(settings.frozen)
  devices = jax.local_devices() if devices is None else devices
  mesh = _mesh(devices, data=len(devices))
  autoencoder = vae.load_autoencoder(folder / "vae", dtype=jnp.float32, mesh=mesh)
  t5_config = t5.text_encoder_config(folder / "text_encoder")
  features = _features(pictures, settings, autoencoder, t5_config)
  made_of = _made_of(pictures, settings)
  if update:
    _make_room(directory, features, pictures.num_shards, made_of, process_index)
  if is_finished(directory, features, pictures.num_shards, made_of):
    contents.drop_previous(directory)
    return False
  autoencoder = _in_tiles(autoencoder, pictures, settings.tile_size)
  encoder = _text_encoder(folder, settings, t5_config, devices)
  null_caption = None
  if settings.captions == "embeddings":
    # Where padding is, too: as the reference's file of it.
    null_caption = encoder.encode([""], settings.caption_length)[0][0]
  try:
    unfinished = begin_dataset(directory, features, null_caption, pictures.num_shards)
  except FileExistsError:
    # Loading T5 takes minutes, in which others may have written the last shards.
    if is_finished(directory, features, pictures.num_shards, made_of):
      return False
    raise
  if made_of is not None:
    made_of.write(directory)
  previous = _Previous(directory, features, made_of)
  encode = _Encode(pictures, settings, autoencoder, encoder, len(devices), previous)
  sizes = [len(pictures.ids(shard)) for shard in range(pictures.num_shards)]
  write_shards(unfinished, encode, process_index, process_count, sizes)
  if finish_with_report(unfinished, pictures.refusals()):
    contents.drop_previous(directory)
  return True


def _made_of(pictures: Pictures, settings: Settings) -> Contents | None:
  """Contents of the records of cropped images, and how they are made."""
  made_of = pictures.contents()
  if made_of is None:
    return None
  how = {
    "truncate_captions": settings.truncate_captions,
    "text_dtype": jnp.dtype(settings.text_dtype).name,
    "tile_size": settings.tile_size,
  }
  if settings.captions == "text":
    del how["text_dtype"]
  return dataclasses.replace(made_of, settings=how)


def _make_room(
  directory: pathlib.Path,
  features: Features,
  num_shards: int,
  made_of: Contents | None,
  process_index: int,
) -> None:
  """Sets aside what is in a directory, if it differs from what is asked for.

  Of several processes the first one does, and the others wait for it.

  Raises:
    ValueError: the first one does not come.
  """
  waited = time.monotonic()
  while lines := differences(directory, features, num_shards, made_of):
    if process_index == 0:
      logging.info("Updating %s: %s.", directory, "; ".join(lines))
      is_complete = (directory / records.MANIFEST).exists()
      contents.set_aside(directory, is_complete=is_complete)
      return
    if time.monotonic() - waited > _SECONDS_FOR_THE_FIRST:
      raise ValueError(
        f"{directory} is to be updated, and process 0 has not begun to for "
        f"{_SECONDS_FOR_THE_FIRST} seconds: start it with --update too."
      )
    time.sleep(_SECONDS_BETWEEN_LOOKS)


def check_process(index: int, count: int) -> None:
  """Refuses a process number that is none.

  Raises:
    ValueError: it is not among 0 … count - 1.
  """
  if count < 1 or not 0 <= index < count:
    raise ValueError(
      f"Process {index} of {count}: processes are numbered from 0, so give "
      "--process_index below --process_count."
    )


def is_finished(
  directory: pathlib.Path,
  features: Features,
  num_shards: int,
  made_of: Contents | None,
  *,
  can_update: bool = True,
) -> bool:
  """Whether a directory holds the finished dataset of these features and contents.

  Args:
    can_update: whether whoever asks knows --update.

  Raises:
    FileExistsError: it holds another one, or a part of it.
  """
  finished = (directory / records.MANIFEST).exists()
  if lines := differences(directory, features, num_shards, made_of):
    way = "Give --update to encode again what has changed, c" if can_update else "C"
    raise FileExistsError(
      f"{directory} already holds another {'' if finished else 'un'}finished dataset "
      f"than the one asked for (have → want): {'; '.join(lines)}. {way}hoose another "
      "--output, or delete it."
    )
  if finished and made_of is not None and contents.read(directory) is None:
    logging.warning(
      "%s is of an earlier version, which did not note what records were made of: "
      "whether images and captions are still the same cannot be told. Delete it to "
      "make it anew.",
      directory,
    )
  return finished


def differences(
  directory: pathlib.Path,
  features: Features,
  num_shards: int,
  made_of: Contents | None,
) -> list[str]:
  """Differences of a dataset, finished or begun, from the one asked for, in words."""
  if (directory / records.MANIFEST).exists():
    manifest = open_dataset(directory).manifest
    have = {**_as_json(manifest.features), "shards": len(manifest.shards)}
  elif (directory / UNFINISHED).exists():
    job = files.read_json(directory / UNFINISHED)
    have = {**job["features"], "shards": job["num_shards"]}
  else:
    return []
  lines = metadata.disagreements(have, {**_as_json(features), "shards": num_shards})
  before = contents.read(directory)
  if before is not None and made_of is not None:
    lines += before.differences(made_of)
  elif made_of is not None and not (directory / records.MANIFEST).exists():
    names = map(records.SHARD.fullmatch, disk.whole_files(directory))
    if any(names):
      lines.append(
        "its first shards are by an earlier version, which noted no contents"
      )
  return lines


def _as_json(features: Features) -> dict[str, Any]:
  return json.loads(json.dumps(dataclasses.asdict(features)))


def write_shards(
  unfinished: Unfinished,
  make: Callable[[int], Iterable[Record | Refusal]],
  process_index: int,
  process_count: int,
  sizes: Sequence[int],
) -> None:
  """Writes the missing shards of one process, each with a report beside the dataset.

  Args:
    make: of a shard by its number: for each of its images the record, or a refusal of
      the image; and refusals of captions on the way.
    sizes: how many images each shard is made of.
  """
  reports = reports_of(unfinished.directory)
  reports.mkdir(parents=True, exist_ok=True)
  disk.remove_abandoned(reports)
  mine = [n for n in unfinished.missing() if n % process_count == process_index]

  def images() -> Generator[None, None, None]:
    """Encodes the missing shards; yields None for each image."""
    for number in mine:
      refusals = []
      with unfinished.shard(number) as shard:
        for made in make(number):
          if isinstance(made, Refusal):
            refusals.append(made)
            if made.what != "image":
              continue
          elif problem := records.problem(made, unfinished.features):
            reason = "makes no valid record"
            refusals.append(Refusal(id=made.id, reason=reason, detail=problem))
          else:
            shard.write(made)
          yield
        # Before the shard has its name: one that is there has its report.
        _write_text(reports / _shard_report(number), _lines(refusals))

  total = sum(sizes[number] for number in mine)
  with contextlib.closing(images()) as work:
    collections.deque(command.progress(work, total, "Images"), maxlen=0)


def finish_with_report(unfinished: Unfinished, earlier: Iterable[Refusal]) -> bool:
  """Finishes a dataset of which nothing is missing, and sums up what was refused.

  Args:
    earlier: refusals from before the shards.

  Returns:
    whether it is finished now; False if other processes' shards are missing.
  """
  if missing := unfinished.missing():
    logging.info("Done here; %d shards of other processes are missing.", len(missing))
    return False
  reports = reports_of(unfinished.directory)
  refusals = list(earlier)
  for number in range(unfinished.num_shards):  # there may be more, of another dataset
    lines = (reports / _shard_report(number)).read_text(encoding="utf-8").splitlines()
    refusals += [Refusal(**json.loads(line)) for line in lines]
  counts = count_reasons(refusals)
  _write_text(reports / _REFUSED, _lines(refusals))
  _write_text(
    reports / _REPORT, json.dumps(counts, indent=2, ensure_ascii=False) + "\n"
  )
  unfinished.finish()
  return True


def reports_of(directory: pathlib.Path) -> pathlib.Path:
  """The directory beside a dataset where preparing says what it left out.

  `report.json` counts by what and reason, `refused.jsonl` has a line for each.
  """
  return directory.with_name(f"{directory.name}-report")


def read_report(directory: pathlib.Path) -> dict[str, dict[str, int]]:
  """Counts of what was refused for a finished dataset: what → reason → number."""
  return files.read_json(reports_of(directory) / _REPORT)


def _shard_report(number: int) -> str:
  return f"shard-{number:05d}.jsonl"


def _lines(refusals: Iterable[Refusal]) -> str:
  return "".join(json.dumps(dataclasses.asdict(refusal)) + "\n" for refusal in refusals)


def _write_text(path: pathlib.Path, text: str) -> None:
  disk.write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _features(
  pictures: Pictures,
  settings: Settings,
  autoencoder: KLAutoencoder,
  t5_config: T5Config,
) -> Features:
  folder = pathlib.Path(settings.frozen)
  hashes = {
    "autoencoder": weights_hash(folder / "vae"),
    "crop_rule": identity_hash(pictures.crop_rule),
  }
  if settings.captions == "embeddings":
    hashes["text_encoder"] = weights_hash(folder / "text_encoder")
  return Features(
    kind="latent_moments",
    channels=autoencoder.channels,
    resolution=pictures.resolution,
    autoencoder=autoencoder.identity,
    scaling_factor=autoencoder.scaling_factor,
    text_encoder={"name": "t5", "width": t5_config.width},
    caption_storage=settings.captions,
    caption_length=settings.caption_length,
    caption_width=t5_config.width,
    crop_rule=pictures.crop_rule,
    hashes=hashes,
  )


def weights_hash(folder: pathlib.Path) -> str:
  """SHA-256 of a network's files of weights, in the order of their names, in hex.

  Raises:
    FileNotFoundError: there are none.
  """
  found = sorted(folder.iterdir()) if folder.is_dir() else []
  paths = [path for path in found if _WEIGHTS.fullmatch(path.name)]
  if not paths:  # under any other name
    kinds = (".safetensors", *files.PICKLES)
    paths = [path for path in found if path.suffix in kinds]
  if not paths:  # arrays of our own: many small files in folders
    inside = [path for path in found if path.is_dir()]
    paths = sorted(path for top in inside for path in top.rglob("*") if path.is_file())
  if not paths:
    raise FileNotFoundError(f"There are no weights in {folder}.")
  logging.info("Hashing %d file(s) of %s.", len(paths), folder)
  digest = hashlib.sha256()
  for path in paths:
    with open(path, "rb") as file:
      while block := file.read(1 << 22):
        digest.update(block)
  return digest.hexdigest()


def _mesh(devices: Sequence[Any], *, data: int) -> Mesh:
  return sharding.make_mesh(data=data, fsdp=-1, context=1, devices=devices)


def _in_tiles(
  autoencoder: KLAutoencoder, pictures: Pictures, tile_size: int | None
) -> KLAutoencoder:
  if tile_size is None:
    sizes = {size for i in range(pictures.num_shards) for size in pictures.sizes(i)}
    unit = 2 * autoencoder.downsampling  # the smallest tile that there is
    tile_size = max([max(size) for size in sizes], default=unit)
    tile_size = max(unit, -(-tile_size // unit) * unit)
  return dataclasses.replace(autoencoder, tile_size=tile_size)


def _text_encoder(
  folder: pathlib.Path, settings: Settings, config: T5Config, devices: Sequence[Any]
) -> T5TextEncoder:
  """T5, its layers split over the devices; or only what counts tokens."""
  if settings.captions == "text":
    return T5TextEncoder(
      config=config,
      params={},
      tokenizer=t5.load_tokenizer(folder / "tokenizer"),
      dtype=jnp.float32,
      mesh=_mesh(devices[:1], data=1),
    )
  inner = config.num_heads * config.head_width
  split = math.gcd(len(devices), config.width, inner, config.hidden)
  return t5.load_text_encoder(
    folder / "text_encoder",
    folder / "tokenizer",
    dtype=settings.text_dtype,
    mesh=_mesh(devices, data=len(devices) // split),
  )


class _Previous:
  """Records from before an update, of images that have not changed."""

  def __init__(
    self, directory: pathlib.Path, features: Features, made_of: Contents | None
  ):
    self.moments_hold = self.embeddings_hold = False
    self._numbers: dict[int, int] = {}  # hash of the id → record
    self._unchanged: frozenset[str] = frozenset()
    there = contents.previous_of(directory)
    if made_of is None or not (there / records.MANIFEST).exists():
      return
    self._dataset = open_dataset(there)
    before, was = contents.read(there), self._dataset.manifest.features
    if before is None:
      return
    self.moments_hold = before.settings["tile_size"] == made_of.settings[
      "tile_size"
    ] and _equal(was, features, "autoencoder", "crop_rule", "resolution", "kind")
    self.embeddings_hold = (
      features.caption_storage == was.caption_storage == "embeddings"
      and before.settings["text_dtype"] == made_of.settings["text_dtype"]
      and _equal(was, features, "text_encoder", "caption_width", "caption_length")
    )
    hashes = self._dataset.index["id_hash"].tolist()
    self._numbers = {name: number for number, name in enumerate(hashes)}
    if len(self._numbers) < len(hashes):  # ids that come twice
      self._numbers = {}
    self._unchanged = before.unchanged_images(made_of)

  def record(self, id: str) -> Record | None:
    """The record of an image as it was before."""
    number = self._numbers.get(records.id_hash(id))
    if number is None or not (self.moments_hold or self.embeddings_hold):
      return None
    return self._dataset[number]

  def moments(self, before: Record | None) -> Float16[np.ndarray, "h w m"] | None:
    """Moments of an image's earlier record, if its cropped image is unchanged."""
    if before is None or not self.moments_hold or before.id not in self._unchanged:
      return None
    return before.latent_moments

  def embeddings(self, before: Record | None) -> dict[str, Float16[np.ndarray, "t e"]]:
    """Embeddings of the captions in an earlier record."""
    if before is None or not self.embeddings_hold:
      return {}
    return {text: before.embeddings(i) for i, text in enumerate(before.captions)}


def _equal(one: Features, other: Features, *names: str) -> bool:
  """Whether fields, and hashes of these names, are the same."""
  return all(
    _as_json(one).get(name) == _as_json(other).get(name)
    and one.hashes.get(name) == other.hashes.get(name)
    for name in names
  )


class _Encode:
  """The records of a shard of pictures, by its number."""

  def __init__(
    self,
    pictures: Pictures,
    settings: Settings,
    autoencoder: KLAutoencoder,
    encoder: T5TextEncoder,
    num_devices: int,
    previous: _Previous,
  ):
    self._pictures, self._settings, self._previous = pictures, settings, previous
    self._autoencoder, self._encoder = autoencoder, encoder
    fitting = _PIXELS_AT_ONCE // pictures.resolution**2
    each = min(max(1, fitting), _IMAGES_AT_ONCE)
    self._batch = settings.batch_size or num_devices * each

  def __call__(self, shard: int) -> Iterator[Record | Refusal]:
    # By size, so that a program of one shape is run on full batches; within a size, in
    # the index's order.
    positions: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for position, size in enumerate(self._pictures.sizes(shard)):
      positions[size].append(position)
    at_once = self._batch * -(-_PICTURES_AT_ONCE // self._batch)
    chunks = [
      positions[size][start : start + at_once]
      for size in positions
      for start in range(0, len(positions[size]), at_once)
    ]
    for loaded in _ahead(self._pictures, shard, chunks):
      yield from self._encoded(loaded)

  def _encoded(
    self, loaded: Sequence[tuple[Picture, Float32[np.ndarray, "H W 3"]]]
  ) -> Iterator[Record | Refusal]:
    captions: list[list[Caption]] = []
    kept = []
    for picture, image in loaded:
      fitting, refusals = _fitting(picture, self._encoder, self._settings)
      yield from refusals
      if fitting:
        kept.append((picture, image))
        captions.append(fitting)
      else:
        yield Refusal(id=picture.id, reason="has no caption that fits")
    if not kept:
      return
    before = [self._previous.record(picture.id) for picture, _ in kept]
    moments = self._moments([image for _, image in kept], before)
    embeddings = self._embeddings(captions, before)
    for i, (picture, _) in enumerate(kept):
      texts, kinds, lengths = zip(*captions[i], strict=True)
      yield Record(
        id=picture.id,
        captions=texts,
        caption_kinds=kinds,
        caption_lengths=np.array(lengths, np.int32),
        caption_embeddings=embeddings[i],
        original_size=picture.original_size,
        crop=picture.crop,
        aesthetic_score=picture.aesthetic_score,
        latent_moments=moments[i],
      )

  def _moments(
    self,
    images: Sequence[Float32[np.ndarray, "H W 3"]],
    before: Sequence[Record | None],
  ) -> list[Float16[np.ndarray, "h w m"]]:
    """Mean and log-variance; computed in float32, in batches of one shape."""
    moments = [self._previous.moments(record) for record in before]
    asked = [i for i, there in enumerate(moments) if there is None]
    for start in range(0, len(asked), self._batch):
      numbers = asked[start : start + self._batch]
      batch = np.stack([images[i] for i in numbers])
      missing = self._batch - len(batch)
      filled = np.concatenate([batch, batch[:1].repeat(missing, axis=0)])
      both = np.concatenate(self._autoencoder.moments(filled), axis=-1)
      with np.errstate(over="ignore"):  # infinity is found where records are checked
        for i, row in zip(numbers, both.astype(np.float16), strict=False):
          moments[i] = row
    return [row for row in moments if row is not None]

  def _embeddings(
    self, captions: Sequence[Sequence[Caption]], before: Sequence[Record | None]
  ) -> list[Float16[np.ndarray, "n e"]] | list[None]:
    """Token embeddings of each image's captions, one caption after the other."""
    if self._settings.captions == "text":
      return [None] * len(captions)
    known = [self._previous.embeddings(record) for record in before]
    asked = [
      (i, text)
      for i, own in enumerate(captions)
      for text, _, _ in own
      if text not in known[i]
    ]
    if asked:
      texts = [text for _, text in asked]
      embeddings, mask = self._encoder.encode(texts, self._settings.caption_length)
      with np.errstate(over="ignore"):
        for (i, text), row, valid in zip(asked, embeddings, mask, strict=True):
          known[i][text] = row[valid].astype(np.float16)
    return [
      np.concatenate([known[i][text] for text, _, _ in own])
      for i, own in enumerate(captions)
    ]


def _fitting(
  picture: Picture, encoder: T5TextEncoder, settings: Settings
) -> tuple[list[Caption], list[Refusal]]:
  """The captions of a picture that get into its record, and those that do not."""
  limit, captions, refusals = settings.caption_length, [], []

  def refuse(reason: str, text: str, what: str = "caption") -> None:
    refusals.append(Refusal(id=picture.id, reason=reason, detail=text[:200], what=what))

  for text, kind in picture.captions:
    text = text.strip()  # all that the reference does to captions before it embeds them
    count = encoder.count(text)
    if count > limit and text and settings.truncate_captions:
      text, end = encoder.truncated(text, limit)
      refuse(f"was cut at {limit} tokens", end, "caption end")
      count = encoder.count(text)
    if not text:
      refuse("is empty", text)
    elif count > limit:
      refuse(f"has more than {limit} tokens", f"{count} tokens: {text}")
    else:
      captions.append((text, kind, count))
  return captions, refusals


def _ahead(
  pictures: Pictures, shard: int, chunks: Sequence[Sequence[int]]
) -> Iterator[list[tuple[Picture, Float32[np.ndarray, "H W 3"]]]]:
  """Chunks of pictures with their pixels, the next decoded while one is in use."""

  def decode(picture: Picture) -> tuple[Picture, np.ndarray]:
    return picture, drawing.from_picture(picture.image())

  with concurrent.futures.ThreadPoolExecutor() as pool:
    waiting = collections.deque()
    for chunk in chunks:
      read = pictures.read(shard, chunk)
      waiting.append([pool.submit(decode, picture) for picture in read])
      if len(waiting) > 1:
        yield [future.result() for future in waiting.popleft()]
    for futures in waiting:
      yield [future.result() for future in futures]


def check(
  pictures: Pictures,
  directory: str | os.PathLike[str],
  frozen: str,
  sheet: str | os.PathLike[str],
) -> float:
  """Decodes some records and shows them beside the pictures that they were made of.

  Prints each one's peak signal-to-noise ratio. With SDXL's autoencoder photographs are
  around 30 dB.

  Args:
    pictures: those that the dataset was made of.
    directory: of the finished dataset.
    frozen: folder with the vae/ that made it.
    sheet: PNG file to write, left the picture and right the decoded record.

  Returns:
    the ratio of all pixels together, in dB.

  Raises:
    FileNotFoundError: dataset or autoencoder is not there.
    ValueError: the dataset was made with another autoencoder, or of other pictures.
  """
  dataset = open_dataset(directory)
  vae_folder = pathlib.Path(frozen) / "vae"
  if weights_hash(vae_folder) != dataset.manifest.hashes.get("autoencoder"):
    raise ValueError(
      f"{directory} was not made with the autoencoder of {vae_folder}: give --frozen "
      "as when it was prepared."
    )
  autoencoder = vae.load_autoencoder(vae_folder, dtype=jnp.float32)
  count = min(_CHECKED, len(dataset))
  numbers = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
  shown, labels, errors = [], [], []
  for number, record in zip(numbers, dataset.read(numbers), strict=True):
    shard, _ = dataset.place(number)
    if shard >= pictures.num_shards or record.id not in pictures.ids(shard):
      raise ValueError(
        f"{record.id} of {directory} is not among the pictures of "
        f"{pictures.directory}: give --pictures as when it was prepared."
      )
    [picture] = pictures.read(shard, [pictures.ids(shard).index(record.id)])
    moments = record.latent_moments
    assert moments is not None  # the features say so
    mean = moments[None, ..., : dataset.manifest.channels].astype(np.float32)
    decoded = np.clip(autoencoder.decode(mean)[0], -1, 1)
    original = drawing.from_picture(picture.image())
    error = float(np.square(decoded - original).mean())
    errors.append((error, original.size))
    print(f"{_psnr(error):6.2f} dB  {record.id}")
    shown += [_small(picture.image()), _small(drawing.to_picture(decoded))]
    labels += [record.id, f"{_psnr(error):.2f} dB"]
  values, weights = zip(*errors, strict=True)
  ratio = _psnr(float(np.average(values, weights=weights)))
  print(f"{ratio:6.2f} dB  in all {count} records that were decoded")
  grid = drawing.grid(shown, columns=2, labels=labels)
  disk.write_whole(pathlib.Path(sheet), lambda partial: grid.save(partial, "png"))
  return ratio


def _psnr(error: float) -> float:
  """Peak signal-to-noise ratio in dB from the mean square error in [-1, 1]."""
  return math.inf if error == 0 else 10 * math.log10(4 / error)


def _small(picture: Image.Image) -> Image.Image:
  picture = picture.copy()
  picture.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
  return picture
