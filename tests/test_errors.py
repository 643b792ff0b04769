"""Too little memory and a file that may not be read are never called damage."""

import io
import random

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from pixsigma_jax import errors
from pixsigma_jax.convert import files, t5
from pixsigma_jax.convert.loading import loading
from pixsigma_jax.data import image_bytes, ingest, parquet_images, sources
from pixsigma_jax.data import index as indexes
from pixsigma_jax.prepare import contents
from tests.convert.published import write_tokenizer

DENIED = PermissionError(13, "Permission denied", "/somebody/elses")
NO_MEMORY = MemoryError("Unable to allocate 9 GiB")
OF_TORCH = RuntimeError("[enforce fail at alloc_cpu.cpp:1] can't allocate memory: 9")


@pytest.mark.parametrize(
  ("error", "memory", "system"),
  [
    (NO_MEMORY, True, False),
    (OF_TORCH, True, False),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), True, False),
    (pa.ArrowMemoryError("malloc of size 9 failed"), True, False),
    (OSError(12, "Cannot allocate memory"), True, True),
    (DENIED, False, True),
    (FileNotFoundError("as a bucket's client says it"), False, True),
    (TimeoutError(), False, True),
    (OSError("Couldn't deserialize thrift"), False, False),
    (ValueError("no Parquet"), False, False),
    (KeyError("out of memory"), False, False),
  ],
)
def test_an_error_is_about_the_memory_the_system_or_the_content(error, memory, system):
  found = errors.of_memory(error), errors.of_system(error), errors.of_content(error)
  assert found == (memory, system, not memory and not system)


def test_a_module_that_is_there_and_broken_is_not_called_absent():
  absent = ModuleNotFoundError("No module named 'torch'", name="torch")
  assert errors.of_absence(absent, "torch")
  for broken in (
    ImportError("libcudart.so.13: cannot open shared object file"),
    ModuleNotFoundError("No module named 'sympy'", name="sympy"),
  ):
    assert not errors.of_absence(broken, "torch")


def raising(error):
  def fail(*_, **__):
    raise error

  return fail


@pytest.fixture
def parquet(tmp_path):
  path = tmp_path / "list.parquet"
  pq.write_table(pa.table({"path": ["a.jpg"], "image": [b"x"]}), path)
  return path


@pytest.fixture
def index(tmp_path):
  unit = sources.Unit("lines", "list.jsonl", 0, 1)
  index = indexes.create_index(str(tmp_path / "index"), str(tmp_path), [unit])
  scanned = {name: [None] for name in indexes.SCHEMAS["scan"].names}
  index.write("scan", 0, pa.table(scanned, schema=indexes.SCHEMAS["scan"]))
  return index


@pytest.mark.parametrize("error", [DENIED, NO_MEMORY, pa.ArrowMemoryError("malloc")])
def test_parquet_that_could_not_be_read_may_be_sound(
  index, parquet, monkeypatch, error
):
  monkeypatch.setattr(pq, "ParquetFile", raising(error))
  monkeypatch.setattr(pq, "read_table", raising(error))
  source, unit = str(parquet), sources.Unit("parquet", parquet.name, 0, 1)
  fs, path = sources.file_system(source)
  for read in (
    lambda: index.rows(0),
    lambda: sources.list_units(source, per_unit=1),
    lambda: list(sources.entries(source, unit)),
    lambda: parquet_images.cell(fs, path, "image", 0, is_local=True),
    lambda: contents.read(parquet.parent),
  ):
    with pytest.raises(type(error)) as passed:
      read()
    assert passed.value is error


@pytest.mark.parametrize("error", [DENIED, NO_MEMORY, OF_TORCH])
def test_weights_that_could_not_be_read_may_be_sound(tmp_path, monkeypatch, error):
  for name in ("weights.safetensors", "weights.pth"):
    (tmp_path / name).touch()
  write_tokenizer(tmp_path)
  from transformers import AutoTokenizer

  monkeypatch.setattr(files, "safe_open", raising(error))
  monkeypatch.setattr(torch, "load", raising(error))
  monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising(error))
  for read in (
    lambda: files.open_weights(tmp_path / "weights.pth"),
    lambda: t5.load_tokenizer(tmp_path),
    *([] if error is OF_TORCH else [lambda: files.header_of(tmp_path / "weights.s")]),
  ):
    with pytest.raises(type(error)) as passed:
      read()
    assert passed.value is error


def test_a_full_disk_is_not_a_model_that_the_hub_lacks(monkeypatch):
  import huggingface_hub

  full = OSError(28, "No space left on device")
  monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(full))
  with pytest.raises(OSError, match="No space left") as passed:
    files.hub_folder("somebody/something", ["*"], "")
  assert passed.value is full


def test_why_the_hub_gave_nothing_is_said_in_one_line(monkeypatch):
  import huggingface_hub
  from huggingface_hub.errors import LocalEntryNotFoundError

  said = LocalEntryNotFoundError("Got: ConnectError: no such name\nAn error happened")
  monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(said))
  with pytest.raises(FileNotFoundError) as refused:
    files.hub_folder("somebody/something", ["*"], "Give a folder.")
  assert str(refused.value) == (
    "somebody/something is neither a folder nor could it be fetched from the hub: "
    "Got: ConnectError: no such name. Give a folder."
  )


@pytest.mark.parametrize("error", [DENIED, NO_MEMORY, OF_TORCH])
def test_a_model_of_transformers_that_could_not_be_loaded_may_be_one(error):
  with pytest.raises(type(error)) as passed, loading("--clip=x", "a CLIP"):
    raise error
  assert passed.value is error


@pytest.mark.parametrize(
  ("error", "kind", "message"),
  [
    (OSError("no such repository"), FileNotFoundError, "neither a folder with a CLIP"),
    (ImportError("it needs num2words"), ValueError, "needs a package .*num2words"),
    (SafetensorError("HeaderTooLarge"), ValueError, "damaged .HeaderTooLarge.. Fetch"),
    (RuntimeError("size mismatch"), ValueError, "be used as a CLIP: size .* Give"),
  ],
)
def test_why_a_model_of_transformers_cannot_be_loaded_is_said(error, kind, message):
  with (
    pytest.raises(kind, match=f"--clip=x.*{message}"),
    loading("--clip=x", "a CLIP", "Give another."),
  ):
    raise error


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_whatever_is_damaged_in_a_pickle_it_is_refused_in_words(tmp_path):
  draw, path, refused = random.Random(0), tmp_path / "weights.pth", 0
  for is_zip in (True, False):
    file = io.BytesIO()
    state = {"state_dict": {"a": torch.ones(5, 4), "b": torch.zeros(3)}}
    torch.save(state, file, _use_new_zipfile_serialization=is_zip)
    for _ in range(200):
      data = bytearray(file.getvalue())
      for _ in range(draw.choice([1, 3, 20])):
        data[draw.randrange(len(data))] = draw.randrange(256)
      path.write_bytes(data[: draw.choice([None, draw.randrange(len(data))])])
      try:
        files.open_weights(path)
      except ValueError as error:
        refused += str(path) in str(error)
  assert refused > 200  # a byte of padding or of a tensor says nothing


def test_an_image_that_there_is_no_memory_for_is_not_damaged(monkeypatch):
  file = io.BytesIO()
  Image.new("RGB", (8, 8)).save(file, "PNG")
  with monkeypatch.context() as patch:
    patch.setattr(Image.Image, "load", raising(NO_MEMORY))
    patch.setattr("PIL.PngImagePlugin.PngImageFile.load", raising(NO_MEMORY))
    with pytest.raises(MemoryError):
      image_bytes.open_image(file.getvalue())


def test_an_image_of_floating_point_is_whole_and_refused_for_what_it_is():
  file = io.BytesIO()
  Image.fromarray(np.zeros((8, 8), np.float32)).save(file, "TIFF")
  with pytest.raises(ValueError, match=r"^floating-point pixels"):
    image_bytes.open_image(file.getvalue())


class Unpicklable(ValueError):
  """An error whose constructor takes other arguments than it shows."""

  def __init__(self, one, two):
    super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_be_pickled_is_told_in_words(tmp_path):
  def fail(_):
    raise Unpicklable(1, 2)

  def run():
    with ingest.run("parts", 1, []) as (pipeline, noting):
      noted = noting(fail)
      noted(None)
      assert pipeline is not None

  with pytest.raises(ValueError, match="Unpicklable: 1 and 2"):
    run()
