"""T5's tokenizer as it is published: `spiece.model`, whatever protobuf there is."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from pixsigma_jax.convert.spiece import read_vocabulary
from pixsigma_jax.convert.t5 import load_text_encoder, load_tokenizer
from tests.convert.published import write_spiece, write_t5

TEXTS = (
  "the red fox in the snow",
  "A PHOTO of  a\tcat.",
  "ﬁve ½ ＡＢＣ",  # what the table of characters changes
  "  a small house\nleft of a tree ",
  "snow☃",
  "",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """The folder, and sentencepiece's own reader of it."""
  folder = tmp_path_factory.mktemp("tokenizer")
  return folder, write_spiece(folder)


def test_a_published_vocabulary_gives_the_ids_of_sentencepiece(published):
  folder, processor = published
  tokenizer = load_tokenizer(folder)
  for text in TEXTS:
    assert tokenizer(text)["input_ids"] == [*processor.encode(text), 1], text
  # Some character must have been changed, or the table could be missing.
  assert processor.normalize("½") == "▁1⁄2"
  # Sentinels follow the vocabulary downwards, as in every published T5.
  assert len(tokenizer) == processor.vocab_size() + 4
  assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1
  assert tokenizer.model_max_length == 512


def test_every_score_and_piece_is_read(published):
  folder, processor = published
  vocabulary = read_vocabulary(folder / "spiece.model")
  ids = range(processor.vocab_size())
  expected = [(processor.id_to_piece(i), processor.get_score(i)) for i in ids]
  assert vocabulary.pieces == expected


def test_it_tells_where_a_token_stands_and_goes_to_another_process(published):
  folder, _ = published
  tokenizer = load_tokenizer(folder)
  coded = tokenizer("the  cat", return_offsets_mapping=True)
  assert coded["offset_mapping"] == [(0, 3), (5, 8), (0, 0)]
  again = pickle.loads(pickle.dumps(tokenizer))
  assert again("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_were_added_beside_the_vocabulary_are_kept(tmp_path, place):
  processor = write_spiece(tmp_path)
  number = processor.vocab_size() + 4
  if place == "added_tokens.json":  # as transformers wrote it before its version 4.34
    (tmp_path / place).write_text(json.dumps({"<mine>": number}))
  else:
    added = {str(number): {"content": "<mine>", "special": True}}
    fields = json.loads((tmp_path / place).read_text())
    fields["added_tokens_decoder"] = added
    (tmp_path / place).write_text(json.dumps(fields))
  assert number in load_tokenizer(tmp_path)("a <mine> cat")["input_ids"]


def test_a_vocabulary_without_settings_is_t5s(tmp_path):
  processor = write_spiece(tmp_path, settings=False)
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer("a cat")["input_ids"] == [*processor.encode("a cat"), 1]
  assert len(tokenizer) == processor.vocab_size() + 100


@pytest.mark.parametrize("implementation", ["upb", "python"])
def test_it_needs_neither_sentencepiece_nor_a_certain_protobuf(
  published, implementation
):
  folder, processor = published
  program = """
import sys
from google.protobuf import runtime_version
def refuse(*where):
  if "sentencepiece" in where[-1]:
    raise runtime_version.VersionError("gencode is newer than runtime")
runtime_version.ValidateProtobufRuntimeVersion = refuse
sys.modules["sentencepiece"] = sys.modules["tiktoken"] = None
sys.modules["torch"] = None
from pixsigma_jax.convert.spiece import load_fast_tokenizer
import pathlib
print(load_fast_tokenizer(pathlib.Path(sys.argv[1]))(sys.argv[2])["input_ids"])
"""
  done = subprocess.run(
    [sys.executable, "-c", program, str(folder), TEXTS[0]],
    env=os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == [*processor.encode(TEXTS[0]), 1]


def test_a_text_encoder_reads_captions_with_it(published, tmp_path):
  folder, processor = published
  write_t5(tmp_path)
  encoder = load_text_encoder(tmp_path, folder, dtype="float32")
  ids = encoder.read_captions(["a red cat"], 12)["caption_ids"][0]
  expected = [*processor.encode("a red cat"), 1]
  assert ids[: len(expected)].tolist() == expected


@pytest.mark.parametrize(
  ("training", "match"),
  [
    ({"model_type": "bpe"}, r"of type 2 with id 2 for what .* T5's is of type 1"),
    ({"unk_id": 3}, r"of type 1 with id 3 for what it does not know; T5's"),
    ({"pad_id": -1, "unk_id": 0}, r"with id 0 for what it does not know"),
    ({"pad_id": 1, "eos_id": 0}, r"pads with 1 and ends with 0; T5's pads with 0"),
  ],
)
def test_another_models_vocabulary_is_refused(tmp_path, training, match):
  write_spiece(tmp_path, **training)
  with pytest.raises(ValueError, match=match):
    load_tokenizer(tmp_path)


def test_a_damaged_vocabulary_is_refused_by_name(tmp_path):
  write_spiece(tmp_path)
  path = tmp_path / "spiece.model"
  whole = path.read_bytes()
  for content in (whole[: len(whole) // 2], b"version https://git-lfs.github.com/s"):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"spiece\.model is no SentencePiece model"):
      load_tokenizer(tmp_path)
  path.write_bytes(b"")
  with pytest.raises(ValueError, match=r"spiece\.model is .* without a vocabulary"):
    load_tokenizer(tmp_path)


def test_settings_that_are_no_number_are_refused(tmp_path):
  write_spiece(tmp_path, extra_ids=0)
  settings = tmp_path / "tokenizer_config.json"
  fields = json.loads(settings.read_text()) | {"extra_ids": "many"}
  settings.write_text(json.dumps(fields))
  with pytest.raises(ValueError, match="extra_ids='many': a number from 0 on"):
    load_tokenizer(tmp_path)
