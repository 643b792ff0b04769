"""Text in images, read by OCR.

TextAtlasEval reads with PaddleOCR 2.9.1, which needs NumPy 1. RapidOCR runs the same
family of networks (PP-OCR) through ONNX Runtime, and its wheel carries the weights. Two
readers make different mistakes: their numbers are not to be compared.
"""

import importlib
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from pixsigma_jax import disk
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.scorers import ScorerType
from pixsigma_jax.wording import install, listed

# Files of rapidocr's wheel: where lines are, which way up they are, their letters.
_RAPIDOCR_FILES = {
  "Det": "PP-OCRv6_det_small.onnx",
  "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
  "Rec": "PP-OCRv6_rec_small.onnx",
}
_LEAST_CONFIDENCE = 0.5  # of a line, as PaddleOCR 2.9.1 has it


@runtime_checkable
class Reader(Protocol):
  """An OCR engine."""

  def identity(self) -> dict[str, str]:
    """Engine, version and weights."""
    ...

  def lines(self, image: UInt8[np.ndarray, "_ _ 3"]) -> list[str]:
    """Lines of an RGB image in reading order: from top to bottom, then from left."""
    ...


class RapidOcr:
  """RapidOCR with the PP-OCR networks of its own wheel; nothing is downloaded."""

  def __init__(self):
    """Loads the networks.

    Raises:
      FileNotFoundError: the installed rapidocr has other networks.
      ValueError: rapidocr or onnxruntime is not installed.
    """
    for module in ("rapidocr", "onnxruntime"):
      if importlib.util.find_spec(module) is None:
        raise ValueError(f"OCR needs {module}: {install('eval')}.")
    import rapidocr

    folder = pathlib.Path(rapidocr.__file__).parent / "models"
    self._files = {part: folder / name for part, name in _RAPIDOCR_FILES.items()}
    if missing := [path for path in self._files.values() if not path.is_file()]:
      raise FileNotFoundError(
        f"rapidocr {metadata.version('rapidocr')} comes without {listed(missing)}: "
        f"{install('eval')}, which has the version with these networks."
      )
    paths = {f"{part}.model_path": str(path) for part, path in self._files.items()}
    self._read = rapidocr.RapidOCR(
      params={
        **paths,
        "Global.text_score": _LEAST_CONFIDENCE,
        "Global.log_level": "error",  # an image without text is no news
      }
    )

  def identity(self) -> dict[str, str]:
    weights = [f"{p.name} {disk.file_hash(p)[:16]}" for p in self._files.values()]
    return {
      "engine": f"rapidocr {metadata.version('rapidocr')}",
      "runtime": f"onnxruntime {metadata.version('onnxruntime')}",
      "weights": ", ".join(weights),
    }

  def lines(self, image: UInt8[np.ndarray, "_ _ 3"]) -> list[str]:
    page: Any = self._read(_bgr(image))
    return list(page.txts or ())


class PaddleOcr:
  """PaddleOCR 3 with PP-OCRv4, the family that TextAtlasEval reads with.

  PaddleOCR fetches its weights when it is first used.
  """

  def __init__(self):
    """Loads the networks.

    Raises:
      ValueError: paddleocr is not installed, or it is version 2.
    """
    if importlib.util.find_spec("paddleocr") is None:
      raise ValueError(
        "--ocr_engine=paddleocr needs PaddleOCR: pip install paddleocr paddlepaddle, "
        "or take --ocr_engine=rapidocr."
      )
    paddleocr: Any = importlib.import_module("paddleocr")
    self._version = metadata.version("paddleocr")
    if int(self._version.partition(".")[0]) < 3:
      raise ValueError(
        f"paddleocr {self._version} is installed, and version 3 is needed: pip install "
        "-U paddleocr, or take --ocr_engine=rapidocr."
      )
    self._read = paddleocr.PaddleOCR(
      lang="en",
      ocr_version="PP-OCRv4",
      use_textline_orientation=True,
      use_doc_orientation_classify=False,
      use_doc_unwarping=False,
      text_rec_score_thresh=_LEAST_CONFIDENCE,
    )

  def identity(self) -> dict[str, str]:
    return {"engine": f"paddleocr {self._version}", "weights": "PP-OCRv4 en"}

  def lines(self, image: UInt8[np.ndarray, "_ _ 3"]) -> list[str]:
    [page] = self._read.predict(_bgr(image))
    return list(page["rec_texts"])


def _bgr(image: np.ndarray) -> np.ndarray:
  """The order of channels that OpenCV made a habit of."""
  return np.ascontiguousarray(image[..., ::-1])


class OcrScorer:
  """The text of each image: its lines, joined by spaces, as in TextAtlasEval."""

  batch_size = 8

  def __init__(self, reader: Reader):
    self._reader = reader

  def identity(self) -> dict[str, str]:
    own = {"confidence": f">= {_LEAST_CONFIDENCE}", "resize": "none", "version": "1"}
    return self._reader.identity() | own

  def schema(self) -> pa.Schema:
    return pa.schema([pa.field("text", pa.string(), nullable=False)])

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> dict[str, Any]:
    texts = []
    for image in images:
      lines = map(str.strip, self._reader.lines(image))
      texts.append(" ".join(line for line in lines if line))
    return {"text": texts}


ENGINES: dict[str, type[RapidOcr] | type[PaddleOcr]] = {
  "rapidocr": RapidOcr,
  "paddleocr": PaddleOcr,
}


def _load(options: Mapping[str, Any]) -> OcrScorer:
  return OcrScorer(ENGINES[options["ocr_engine"]]())


SCORERS = {
  "ocr": ScorerType(
    options=(
      Option(
        "ocr_engine",
        "rapidocr",
        "Reads text in images: rapidocr brings its weights, paddleocr fetches them.",
        choices=tuple(ENGINES),
      ),
    ),
    load=_load,
  )
}
