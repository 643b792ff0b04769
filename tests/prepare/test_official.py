"""The official repository's features as records, with all the traps they hold."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.prepare import official, write
from tests.prepare import world

WIDTH, LENGTH = 6, 9
LATENTS = "img_sdxl_vae_features_512resolution_ms_new"
SHORT, LONG = "caption_features_new", "sharegpt4v_caption_features_new"


def posterior(seed, height=4, width=6):
  """(8 h w) as the extractor writes it: mean, then standard deviation."""
  generator = np.random.default_rng(seed)
  mean = generator.normal(size=(4, height, width))
  return np.concatenate([mean, generator.uniform(0.1, 2, mean.shape)]).astype(
    np.float16
  )


def caption(seed, tokens, width=WIDTH, length=LENGTH):
  """caption_feature and attention_mask; behind the tokens T5's padding, not zero."""
  generator = np.random.default_rng(seed)
  return {
    "caption_feature": generator.normal(size=(1, length, width)).astype(np.float16),
    "attention_mask": (np.arange(length) < tokens).astype(np.int16)[None],
  }


def entry(path, height=40, width=60, **fields):
  both = {"prompt": "a cat ", "sharegpt4v": "a cat and a dog"}
  ratio = height / width
  return (
    {"path": path, "height": height, "width": width, "ratio": ratio} | both | fields
  )


class Official:
  """A data root in the making."""

  def __init__(self, root):
    self.root = root
    self.intern = root / "InternData"
    for folder in (LATENTS, SHORT, LONG):
      (self.intern / folder).mkdir(parents=True)
    np.save(root / "null.npy", np.zeros((LENGTH, WIDTH), np.float32))
    self.entries = []

  def add(self, path, name=None, latents=None, short=None, long=None, **fields):
    """An image whose features are called `name`; None for one that are not there."""
    seed = len(self.entries)
    self.entries.append(entry(path, **fields))
    name = path.rpartition("/")[2].rpartition(".")[0] if name is None else name
    files = {
      LATENTS: posterior(seed) if latents is None else latents,
      SHORT: caption(seed, 3) if short is None else short,
      LONG: caption(seed + 100, 5) if long is None else long,
    }
    for folder, content in files.items():
      path = self.intern / folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      if isinstance(content, dict):
        np.savez(f"{path}.npz", **content)
      elif content is not False:
        np.save(f"{path}.npy", content)

  def prepare(self, directory=None, **arguments):
    (self.intern / "data_info.json").write_text(json.dumps(self.entries))
    arguments = {
      "null_caption": self.root / "null.npy",
      "images_per_shard": 2,
    } | arguments
    directory = self.root / "records" if directory is None else directory
    official.prepare_official(self.root, directory, resolution=512, **arguments)
    return open_dataset(directory)


@pytest.fixture
def data(tmp_path):
  return Official(tmp_path)


def reasons(dataset, what="image"):
  return write.read_report(dataset.directory).get(what, {})


def test_features_are_taken_as_they_are(data):
  data.add("0001.png")
  dataset = data.prepare()
  (record,) = dataset.read([0])
  stored = posterior(0).astype(np.float32).transpose(1, 2, 0)
  mean, log_variance = np.split(record.latent_moments.astype(np.float32), 2, axis=-1)
  np.testing.assert_array_equal(mean, stored[..., :4])
  # Standard deviations come back to float16's eleven bits of log-variances up to five.
  np.testing.assert_allclose(np.exp(log_variance / 2), stored[..., 4:], rtol=1e-3)
  assert record.captions == ("a cat and a dog", "a cat")
  assert record.caption_kinds == ("long", "short")
  assert record.caption_lengths.tolist() == [5, 3]
  expected = [caption(100, 5)["caption_feature"][0, :5]]
  expected.append(caption(0, 3)["caption_feature"][0, :3])
  np.testing.assert_array_equal(record.caption_embeddings, np.concatenate(expected))
  assert record.id == "0001"
  assert record.original_size.tolist() == [40, 60]
  # The extractor for buckets squashes: the latents show all of the image.
  assert record.crop.tolist() == [0, 0, 40, 60]
  manifest = dataset.manifest
  assert manifest.autoencoder["name"] == "sdxl-vae"
  assert manifest.scaling_factor == 0.13025
  assert manifest.text_encoder == {"name": "t5", "width": WIDTH}
  assert manifest.crop_rule["name"] == "squash"
  assert manifest.caption_length == LENGTH
  assert set(manifest.hashes) == {"crop_rule"}


def test_features_of_squares_show_the_middle_square(data):
  data.add("0001.png")
  (data.intern / LATENTS).rename(data.intern / LATENTS.replace("_ms", ""))
  dataset = data.prepare()
  assert dataset[0].crop.tolist() == [0, 10, 40, 50]
  assert dataset.manifest.crop_rule["name"] == "center-square"


@pytest.mark.parametrize("name", ["set_0001", "0001"], ids=["loader's", "extractor's"])
def test_both_names_of_a_file_are_known(data, name):
  data.add("set/0001.jpg", name)
  dataset = data.prepare()
  assert (len(dataset), dataset[0].id) == (1, "set/0001")


def test_a_deeper_folder_keeps_its_name_but_for_the_last_separator(data):
  data.add("a/b/0001.webp", "a/b_0001")
  assert data.prepare()[0].id == "a/b/0001"


def test_images_of_one_name_do_not_share_features(data):
  data.add("first/0001.png")
  data.add("second/0001.png")  # has overwritten them
  data.add("third/0001.png", "third_0001")
  data.add("0002.png")
  dataset = data.prepare()
  assert [record.id for record in dataset.read([0, 1])] == ["third/0001", "0002"]
  assert reasons(dataset) == {"features may be another image's of that name": 2}


def test_ratios_are_limited_both_ways(data):
  for i, (height, width) in enumerate([(45, 10), (46, 10), (10, 45), (10, 46)]):
    data.add(f"{i}.png", height=height, width=width)
  dataset = data.prepare()
  assert [record.id for record in dataset.read([0, 1])] == ["0", "2"]
  assert reasons(dataset) == {"has sides beyond 1:4.5": 2}


def test_captions_without_text_or_features_are_left_out_one_by_one(data):
  data.add("0.png", sharegpt4v="")
  data.add("1.png", sharegpt4v=None)
  data.add("2.png", short=False)
  data.add("3.png", prompt=" ", long=False)
  data.add("4.png")
  data.entries[4].pop("prompt")
  dataset = data.prepare()
  found = {record.id: record.caption_kinds for record in dataset.read(range(4))}
  assert found == {"0": ("short",), "1": ("short",), "2": ("long",), "4": ("long",)}
  assert reasons(dataset) == {"has no caption with features": 1}
  assert reasons(dataset, "caption") == {
    f"has no features in {SHORT}": 1,
    f"has no features in {LONG}": 1,
    "is empty": 4,
  }


def wrong_latents():
  negative = posterior(0)
  negative[5] = -1
  infinite = posterior(0)
  infinite[0, 0, 0] = np.inf
  return {
    "channels": posterior(0)[:4],
    "axes": posterior(0)[None],
    "negative deviations": negative,
    "infinite": infinite,
    "integers": posterior(0).astype(np.int32),
    "nothing": posterior(0)[:, :0],
    "objects": np.array([{}, {}], object),
  }


@pytest.mark.parametrize("kind", wrong_latents())
def test_malformed_latents_are_left_out(data, kind):
  data.add("0.png", latents=wrong_latents()[kind])
  data.add("1.png")
  dataset = data.prepare()
  assert [record.id for record in dataset.read([0])] == ["1"]
  assert reasons(dataset) == {"image features are malformed": 1}


def wrong_captions():
  good = caption(0, 3)
  feature, mask = good["caption_feature"], good["attention_mask"]
  return {
    "mask with a hole": good | {"attention_mask": mask[:, ::-1]},
    "empty mask": good | {"attention_mask": 0 * mask},
    "mask of another length": good | {"attention_mask": mask[:, :-1]},
    "no mask": {"caption_feature": feature},
    "another width": caption(0, 3, width=WIDTH + 1),
    "integers": good | {"caption_feature": feature.astype(np.int32)},
    "too many tokens": caption(0, LENGTH + 1, length=LENGTH + 1),
    "not a number": good | {"caption_feature": feature * np.float16("nan")},
    "beyond float16": good | {"caption_feature": feature.astype(np.float32) * 1e6},
  }


@pytest.mark.parametrize("kind", wrong_captions())
def test_malformed_captions_are_left_out(data, kind):
  data.add("0.png", short=wrong_captions()[kind])
  dataset = data.prepare()
  assert dataset[0].caption_kinds == ("long",)
  assert reasons(dataset, "caption") == {"caption features are malformed": 1}


def test_features_of_120_tokens_without_the_leading_axis_are_read(data):
  short = {name: array[0] for name, array in caption(0, 3).items()}
  short["caption_feature"] = short["caption_feature"].astype(np.float32)
  short["attention_mask"] = short["attention_mask"].astype(np.int64)
  data.add("0.png", short=short)
  assert data.prepare()[0].caption_kinds == ("long", "short")


@pytest.mark.parametrize(
  "bad",
  [
    "no object",
    {},
    {"path": 3},
    {"path": "../../secret.png"},
    {"path": "/etc/secret.png"},
    {"path": "a/../../secret.png"},
    {"path": "a\0b.png"},
    {"path": "0.png", "height": 0},
    {"path": "0.png", "height": "40"},
    {"path": "0.png", "height": True},
    {"path": "0.png", "prompt": ["a"]},
  ],
)
def test_malformed_entries_are_counted_and_lead_nowhere(data, bad):
  data.add("good.png")
  whole = {"height": 40, "width": 60, "prompt": "", "sharegpt4v": ""}
  data.entries.append(whole | bad if isinstance(bad, dict) else bad)
  dataset = data.prepare()
  assert len(dataset) == 1
  assert reasons(dataset) == {"entry is malformed": 1}


@settings(max_examples=30)
@given(bad=st.binary(max_size=200), cut=st.integers(0, 400))
def test_damaged_files_are_left_out_whatever_is_in_them(tmp_path_factory, bad, cut):
  data = Official(tmp_path_factory.mktemp("damaged"))
  data.add("0.png")
  data.add("1.png")
  data.add("2.png")
  (data.intern / LATENTS / "0.npy").write_bytes(bad)
  for folder, name in ((LATENTS, "1.npy"), (SHORT, "1.npz"), (LONG, "1.npz")):
    path = data.intern / folder / name
    path.write_bytes(path.read_bytes()[:cut])
  dataset = data.prepare()
  ids = [record.id for record in dataset.read(range(len(dataset)))]
  assert "2" in ids
  assert "0" not in ids


def test_half_a_character_is_no_text(data):
  data.add("0.png", prompt="\ud800", long=False)
  data.add("1.png")
  dataset = data.prepare()
  assert [record.id for record in dataset.read([0])] == ["1"]
  assert reasons(dataset) == {"makes no valid record": 1}


def test_stopped_and_restarted_it_writes_the_same(data, monkeypatch):
  for i in range(7):
    data.add(f"{i}.png")
  whole = data.prepare().directory
  again = data.root / "again"
  for index in (1, 0):
    assert not (again / "manifest.json").exists()
    arguments = {"process_index": index, "process_count": 2}
    (data.intern / "data_info.json").write_text(json.dumps(data.entries))
    official.prepare_official(
      *(data.root, again),
      resolution=512,
      null_caption=data.root / "null.npy",
      images_per_shard=2,
      **arguments,
    )
  assert world.files_of(again) == world.files_of(whole)
  before = world.files_of(whole)
  monkeypatch.setattr(official, "begin_dataset", None)
  data.prepare()
  assert world.files_of(whole) == before
  with pytest.raises(FileExistsError, match="shards: 4 → 3"):
    data.prepare(images_per_shard=3)
  data.entries[4]["prompt"] = "corrected"
  with pytest.raises(
    FileExistsError, match=r"1 image with other captions \(4\.png\)\. Choose another"
  ):
    data.prepare()


def test_the_null_caption_is_read_from_every_format(tmp_path):
  array = np.random.default_rng(0).normal(size=(1, LENGTH, WIDTH)).astype(np.float32)
  mask = torch.ones(1, LENGTH)
  published = {
    "uncond_prompt_embeds": torch.tensor(array),
    "uncond_prompt_embeds_mask": mask,
  }
  torch.save(published, tmp_path / "null.pth")
  np.save(tmp_path / "null.npy", array[0])
  save_file({"any": array}, tmp_path / "null.safetensors")
  for name in ("null.pth", "null.npy", "null.safetensors"):
    np.testing.assert_array_equal(official.read_null_caption(tmp_path / name), array[0])
  save_file({"one": array, "two": array}, tmp_path / "two.safetensors")
  with pytest.raises(ValueError, match="one, two: which of them is the null caption"):
    official.read_null_caption(tmp_path / "two.safetensors")
  np.save(tmp_path / "flat.npy", array.reshape(-1))
  with pytest.raises(ValueError, match=r"float32 of shape \[54\], and the embedding"):
    official.read_null_caption(tmp_path / "flat.npy")
  (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY")
  with pytest.raises(ValueError, match=r"damaged\.npy cannot be read"):
    official.read_null_caption(tmp_path / "damaged.npy")
  for name in ("none.npy", "none.pth"):
    with pytest.raises(FileNotFoundError, match=name):
      official.read_null_caption(tmp_path / name)


def test_a_root_without_features_is_named(data):
  data.add("0.png")
  with pytest.raises(FileNotFoundError, match=r"data_info\.json: give --official"):
    official.prepare_official(
      *(data.intern, data.root / "none"),
      resolution=512,
      null_caption=data.root / "null.npy",
      images_per_shard=2,
    )
  data.prepare()
  with pytest.raises(
    FileNotFoundError, match=f"no features of 1024 .*there is {LATENTS}"
  ):
    official.prepare_official(
      *(data.root, data.root / "none"),
      resolution=1024,
      null_caption=data.root / "null.npy",
      images_per_shard=2,
    )
  assert not (data.root / "none").exists()
  data.entries = []
  with pytest.raises(ValueError, match="is no list of images"):
    data.prepare(data.root / "none")
