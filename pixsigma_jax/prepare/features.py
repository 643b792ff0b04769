"""The accelerator side of preparing: pictures through VAE and T5 into feature records.

Any number of processes work on one dataset, each on shards of its own. A shard is
written whole or not at all and depends on nothing but its pictures, so that killed
processes, more of them or fewer, leave the same files behind.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from pixsigma_jax.data.writing import Unfinished, begin_dataset
from pixsigma_jax.models.t5 import T5Config, T5TextEncoder
from pixsigma_jax.models.vae import KLAutoencoder
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

_CHECKED = 8  # records that `check` looks at
_SHEET_SIDE = 512  # pixels of a picture on its sheet, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How pictures and captions become features.

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

  Returns:
    whether anything was missing; False if the very same dataset was there already.

  Raises:
    FileExistsError: the directory holds another dataset, or files of someone else.
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
  if is_finished(directory, features, pictures.num_shards):
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
    if is_finished(directory, features, pictures.num_shards):
      return False
    raise
  encode = _Encode(pictures, settings, autoencoder, encoder, len(devices))
  write_shards(unfinished, encode, process_index, process_count)
  finish_with_report(unfinished, pictures.refusals())
  return True


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


def is_finished(directory: pathlib.Path, features: Features, num_shards: int) -> bool:
  """Whether a directory holds the finished dataset of these features.

  Raises:
    FileExistsError: it holds another one.
  """
  if not (directory / records.MANIFEST).exists():
    return False
  there = open_dataset(directory).manifest
  lines = metadata.disagreements(
    {**_as_json(there.features), "shards": len(there.shards)},
    {**_as_json(features), "shards": num_shards},
  )
  if lines:
    raise FileExistsError(
      f"{directory} already holds another finished dataset than the one asked for "
      f"(have → want): {'; '.join(lines)}. Choose another --output, or delete it."
    )
  return True


def _as_json(features: Features) -> dict[str, Any]:
  return json.loads(json.dumps(dataclasses.asdict(features)))


def write_shards(
  unfinished: Unfinished,
  make: Callable[[int], Iterable[Record | Refusal]],
  process_index: int,
  process_count: int,
) -> None:
  """Writes the missing shards of one process, each with a report beside the dataset.

  Args:
    make: the records of a shard by its number, and what was refused on the way.
  """
  reports = reports_of(unfinished.directory)
  reports.mkdir(parents=True, exist_ok=True)
  mine = [n for n in unfinished.missing() if n % process_count == process_index]
  for number in command.progress(mine, len(mine), "Shards"):
    refusals = []
    with unfinished.shard(number) as shard:
      for made in make(number):
        if isinstance(made, Refusal):
          refusals.append(made)
        elif problem := records.problem(made, unfinished.features):
          reason = "makes no valid record"
          refusals.append(Refusal(id=made.id, reason=reason, detail=problem))
        else:
          shard.write(made)
      # Before the shard has its name: one that is there has its report.
      _write_text(reports / _shard_report(number), _lines(refusals))


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
  refusals, number = list(earlier), 0
  while (path := reports / _shard_report(number)).exists():
    lines = path.read_text(encoding="utf-8").splitlines()
    refusals += [Refusal(**json.loads(line)) for line in lines]
    number += 1
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
  """What was refused on the way to a finished dataset: what → reason → number."""
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


class _Encode:
  """The records of a shard of pictures, by its number."""

  def __init__(
    self,
    pictures: Pictures,
    settings: Settings,
    autoencoder: KLAutoencoder,
    encoder: T5TextEncoder,
    num_devices: int,
  ):
    self._pictures, self._settings = pictures, settings
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
    moments = self._moments(np.stack([image for _, image in kept]))
    embeddings = self._embeddings(captions)
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
    self, images: Float32[np.ndarray, "b H W 3"]
  ) -> Float16[np.ndarray, "b h w m"]:
    """Mean and log-variance; computed in float32, in batches of one shape."""
    moments = []
    for start in range(0, len(images), self._batch):
      batch = images[start : start + self._batch]
      missing = self._batch - len(batch)
      filled = np.concatenate([batch, batch[:1].repeat(missing, axis=0)])
      both = np.concatenate(self._autoencoder.moments(filled), axis=-1)[: len(batch)]
      with np.errstate(over="ignore"):  # infinity is found where records are checked
        moments.append(both.astype(np.float16))
    return np.concatenate(moments)

  def _embeddings(
    self, captions: Sequence[Sequence[Caption]]
  ) -> list[Float16[np.ndarray, "n e"]] | list[None]:
    """Of the tokens of each picture's captions, one caption after the other."""
    if self._settings.captions == "text":
      return [None] * len(captions)
    texts = [text for caption in captions for text, _, _ in caption]
    embeddings, mask = self._encoder.encode(texts, self._settings.caption_length)
    rows = iter(zip(embeddings, mask, strict=True))
    with np.errstate(over="ignore"):
      return [
        np.concatenate(
          [row[valid] for row, valid in itertools.islice(rows, len(own))]
        ).astype(np.float16)
        for own in captions
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
