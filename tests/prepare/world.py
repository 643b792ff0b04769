"""A few images in a folder with an index of them, as `curate` would leave it."""

import hashlib

import numpy as np
import pyarrow as pa
from PIL import Image
from skimage import data

from pixsigma_jax.data import sources
from pixsigma_jax.data.buckets import Bucket
from pixsigma_jax.data.crops import CropRule
from pixsigma_jax.data.index import SCHEMAS, create_index
from pixsigma_jax.prepare import cropped_images

TABLE = {0.5: Bucket(32, 64), 1.0: Bucket(32, 32)}
RULE = CropRule(TABLE, "bicubic")
# Height and width; the last is smaller than its size.
SIZES = [(40, 44), (40, 90), (51, 47), (36, 70), (64, 64), (45, 91), (47, 40), (20, 22)]
CAPTIONS = [("a photo of the red house", "long"), ("a cat", "short")]


def photograph(height, width, seed=0):
  """A piece of a real photograph: NASA's portrait of Eileen Collins, public domain."""
  generator = np.random.default_rng(seed)
  image = Image.fromarray(data.astronaut()).resize((200, 200))
  top, left = generator.integers(0, (200 - height, 200 - width), endpoint=True).tolist()
  return image.crop((left, top, left + width, top + height))


def make_folder(root, sizes=SIZES):
  """Images 00.png … in `root`."""
  root.mkdir(parents=True)
  for i, (height, width) in enumerate(sizes):
    photograph(height, width, seed=i).save(root / f"{i:02d}.png")
  return root


def make_index(directory, folder, captions=lambda _: CAPTIONS, per_unit=3, **changed):
  """The index of a folder after `scan`; `changed` replaces columns of some ids."""
  units = sources.list_units(str(folder), per_unit=per_unit)
  index = create_index(str(directory), str(folder), units)
  for part, unit in enumerate(units):
    rows = []
    for entry in sources.entries(str(folder), unit):
      data_ = (folder / entry.location).read_bytes()
      with Image.open(folder / entry.location) as image:
        width, height = image.size
      row = {
        "id": entry.id,
        "location": entry.location,
        "error": None,
        "bytes": len(data_),
        "sha256": hashlib.sha256(data_).hexdigest(),
        "phash": 0,
        "height": height,
        "width": width,
        "format": "PNG",
        "captions": [{"text": t, "kind": k} for t, k in captions(entry.id)],
      }
      rows.append(row | changed.get(f"id_{entry.id}", {}))
    index.write("scan", part, pa.Table.from_pylist(rows, schema=SCHEMAS["scan"]))
  return index


def files_of(directory):
  """Every file of a directory by name."""
  return {
    path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()
  }


def write_frozen(root):
  """vae/, text_encoder/ and tokenizer/ in small; torch's own VAE and T5 to compare."""
  from tests.convert.published import write_t5, write_tokenizer
  from tests.convert.published_vae import make_vae

  their_vae = make_vae()
  their_vae.save_pretrained(root / "vae")
  their_t5 = write_t5(root / "text_encoder")
  write_tokenizer(root / "tokenizer")
  return their_vae, their_t5


write_shard = cropped_images.write_shard


def write_shard_or_die(*arguments):
  """Dies at the second shard. Of a module, as Beam pickles what it calls."""
  if arguments[-1] == 1:
    raise OSError("killed")
  write_shard(*arguments)
