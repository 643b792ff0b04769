"""Reading of rendered text with the networks of rapidocr's wheel."""

import pathlib
import re
import socket
import sys
import types
from importlib import metadata

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from pixsigma_jax.evaluate import metrics
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.scorers import scorer_type
from pixsigma_jax.evaluate.scorers.ocr import OcrScorer, PaddleOcr, RapidOcr

LINES = ["OPEN EVERY DAY", "Fresh coffee and", "warm bread at 7"]
ITEM = Item("sign", "a sign")


def sign(*lines, size=32, width=288, height=224):
  """Lines at the left, from above, in Pillow's own font."""
  image = Image.new("RGB", (width, height), "white")
  font = ImageFont.load_default(size=size)
  for i, line in enumerate(lines):
    ImageDraw.Draw(image).text((20, 20 + 2 * i * size), line, fill="black", font=font)
  return image


rapidocr = pytest.importorskip("rapidocr")


@pytest.fixture(scope="module")
def scorer():
  with pytest.MonkeyPatch.context() as patch:

    def refuse(*_):
      raise AssertionError("something is downloaded")

    patch.setattr(socket.socket, "connect", refuse)
    yield scorer_type("ocr").load({"ocr_engine": "rapidocr"})


def read(scorer, *images):
  return scorer([np.asarray(image) for image in images], [ITEM] * len(images))["text"]


def test_clean_text_is_read_whole_and_blur_costs_words(scorer):
  image, truth = sign(*LINES), " ".join(LINES)
  blurred = [image.filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 4, 6)]
  texts = read(scorer, *blurred)
  clean, dim, gone = (metrics.text_accuracy([(truth, text)]) for text in texts)
  assert texts[0] == truth  # lines from above, joined by spaces
  assert (clean.accuracy, clean.f1, clean.cer) == (100, 100, 0)
  assert 100 >= dim.accuracy >= gone.accuracy < 100  # today 100, 66.7 and 0
  assert 0 <= dim.cer <= gone.cer > 0


def test_lines_side_by_side_are_read_from_the_left(scorer):
  image = sign(width=400, height=300)
  font = ImageFont.load_default(size=32)
  # The right one stands a little higher, and is still the same line.
  ImageDraw.Draw(image).text((230, 36), "SECOND", fill="black", font=font)
  ImageDraw.Draw(image).text((30, 40), "FIRST", fill="black", font=font)
  assert read(scorer, image) == ["FIRST SECOND"]


def test_channels_are_those_of_rgb(scorer, monkeypatch):
  seen = []
  monkeypatch.setattr(
    scorer._reader,
    "_read",
    lambda x: seen.append(x) or types.SimpleNamespace(txts=None),
  )
  assert read(scorer, Image.new("RGB", (4, 4), (1, 2, 3))) == [""]
  assert seen[0][0, 0].tolist() == [3, 2, 1]  # as OpenCV has them


def test_an_image_without_text_is_read_as_nothing(scorer, capfd):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
  assert read(scorer, Image.new("RGB", (64, 64)), noise) == ["", ""]
  assert capfd.readouterr() == ("", "")


def test_its_identity_names_engine_version_and_weights(scorer):
  identity = scorer.identity()
  assert identity["engine"] == f"rapidocr {metadata.version('rapidocr')}"
  # As rapidocr's own table of networks has it.
  table = pathlib.Path(rapidocr.__file__).with_name("default_models.yaml").read_text()
  [published] = set(re.findall(r"PP-OCRv6_rec_small\.onnx\s+SHA256: (\w+)", table))
  assert f"PP-OCRv6_rec_small.onnx {published[:16]}" in identity["weights"]
  assert scorer.schema().names == ["text"]


def test_says_what_to_install(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
  with pytest.raises(ValueError, match=r"OCR needs rapidocr: .*\[eval\]"):
    RapidOcr()
  with pytest.raises(ValueError, match=r"paddleocr paddlepaddle, or take --ocr_engine"):
    PaddleOcr()


def stand_in(monkeypatch, version, texts=()):
  """A module like PaddleOCR's, whose weights cannot be had here."""
  calls = []

  class Engine:
    def __init__(self, **settings):
      calls.append(settings)

    def predict(self, image):
      calls.append(image)
      return [{"rec_texts": list(texts)}]

  module = types.ModuleType("paddleocr")
  module.__spec__ = object()
  module.PaddleOCR = Engine
  monkeypatch.setitem(sys.modules, "paddleocr", module)
  monkeypatch.setattr(metadata, "version", lambda name: {"paddleocr": version}[name])
  return calls


def test_paddleocr_is_asked_as_its_third_version_wants(monkeypatch):
  calls = stand_in(monkeypatch, "3.7.0", [" OPEN ", "", "DAILY"])
  scorer = OcrScorer(PaddleOcr())
  assert scorer([np.zeros((4, 4, 3), np.uint8)], [ITEM]) == {"text": ["OPEN DAILY"]}
  assert scorer.identity()["engine"] == "paddleocr 3.7.0"
  # Of PaddleOCR 3.7.0's own `PaddleOCR.__init__`.
  assert calls[0] == {
    "lang": "en",
    "ocr_version": "PP-OCRv4",
    "use_textline_orientation": True,
    "use_doc_orientation_classify": False,
    "use_doc_unwarping": False,
    "text_rec_score_thresh": 0.5,
  }


def test_paddleocr_of_another_version_is_refused(monkeypatch):
  stand_in(monkeypatch, "2.9.1")
  with pytest.raises(ValueError, match=r"paddleocr 2\.9\.1 .* version 3 is needed"):
    PaddleOcr()
