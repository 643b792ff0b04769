"""Objects in images, by Mask2Former of transformers: GenEval's detector.

GenEval runs mmdetection's Mask2Former with a Swin-S backbone. Size, padding,
confidences and boxes are made here as there (`mask2former_r50_lsj_8x2_50e_coco.py`,
`MaskFormerFusionHead.instance_postprocess`, `mask2bbox`); the weights on the hub are
the authors' own, where GenEval has those that mmdetection trained.
"""

import os
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from pixsigma_jax import disk, errors
from pixsigma_jax.convert.files import hub_folder, read_json
from pixsigma_jax.evaluate.geneval import CLASSES
from pixsigma_jax.wording import install, listed

PUBLISHED = "facebook/mask2former-swin-small-coco-instance"
_SHORT, _LONG = 800, 1333  # pixels: the shorter side, unless the longer gets too long
_MULTIPLE = 32  # pixels that the padded sides are a multiple of
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_MOST = 100  # detections of an image
LEAST_CONFIDENCE = 0.3  # what is less sure counts in no task


class Found(NamedTuple):
  """An object in an image.

  Attributes:
    name: of `geneval.CLASSES`.
    box: left, top, right, bottom in whole pixels; right and bottom lie outside.
    confidence: of its class, times the mean of its mask.
    mask: its pixels.
  """

  name: str
  box: tuple[int, int, int, int]
  confidence: float
  mask: Bool[np.ndarray, "_ _"]


class Mask2Former:
  """The network, loaded in torch, on a GPU if there is one."""

  def __init__(self, source: str | os.PathLike[str]):
    """Loads it.

    Args:
      source: folder of transformers or hub id.

    Raises:
      FileNotFoundError: it is neither a folder nor can it be fetched; or files lack.
      ValueError: it is another network, it does not know COCO's classes, its files are
        damaged, or torch is not installed.
    """
    try:
      import torch
    except ImportError:
      raise ValueError(f"Mask2Former needs torch: {install('eval')}.") from None
    from safetensors import SafetensorError
    from transformers import Mask2FormerForUniversalSegmentation

    folder = hub_folder(
      source,
      ["*.json", "*.safetensors"],
      f"Give a folder with a Mask2Former of transformers, such as {PUBLISHED}, or "
      "detections in a file: --detections=FILE.",
    )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
      raise FileNotFoundError(f"{folder} has no weights: no *.safetensors.")
    _check(source, read_json(folder / "config.json"))
    try:
      loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
      )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
      if not errors.of_content(error):
        raise
      raise ValueError(
        f"Could not load Mask2Former of {source}: {errors.first_line(error)}"
      ) from error
    network, loading = loaded
    if missing := sorted(loading["missing_keys"]):
      raise ValueError(
        f"The weights of {source} lack {listed(missing, 4)}: fetch them again."
      )
    self._torch = torch
    self._network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    self._identity = {
      "detector": f"Mask2Former, {network.config.backbone_config.model_type}",
      "detector hash": ", ".join(disk.file_hash(file)[:16] for file in files),
      "detector resize": f"bilinear to {_SHORT}, at most {_LONG}",
    }

  def identity(self) -> dict[str, str]:
    """Source, weights and resize."""
    return dict(self._identity)

  def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> list[Found]:
    """Objects of which the network is surer than `LEAST_CONFIDENCE`."""
    torch, device = self._torch, self._network.device

    def resized(x: Any, size: Any) -> Any:
      return torch.nn.functional.interpolate(
        x, size=size, mode="bilinear", align_corners=False
      )

    height, width = image.shape[:2]
    scale = min(_SHORT / min(height, width), _LONG / max(height, width))
    inside = (int(height * scale + 0.5), int(width * scale + 0.5))
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].to(device).float()
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (_MEAN, _STD))
    pixels = (resized(pixels, inside).round() - mean) / std
    below, right = (-side % _MULTIPLE for side in inside)
    pixels = torch.nn.functional.pad(pixels, (0, right, 0, below))

    with torch.inference_mode():
      output = self._network(pixel_values=pixels)
      classes = output.class_queries_logits[0].softmax(dim=-1)[:, :-1]
      scores = classes.flatten()
      scores, order = scores.topk(min(_MOST, len(scores)))
      # A mask's mean is at most 1: what is unsure by its class is unsure in all.
      found = []
      for score, position in zip(scores.tolist(), order.tolist(), strict=True):
        if score <= LEAST_CONFIDENCE:
          break
        query, label = divmod(position, len(CLASSES))
        logits = resized(output.masks_queries_logits[:, [query]], pixels.shape[2:])
        logits = logits[:, :, : inside[0], : inside[1]]
        logits = resized(logits, (height, width))[0, 0]
        mask = logits > 0
        confidence = score * float(
          (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        )
        if confidence > LEAST_CONFIDENCE:
          mask = mask.cpu().numpy()
          found.append(Found(CLASSES[label], _box(mask), confidence, mask))
    return sorted(found, key=lambda each: each.confidence, reverse=True)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
  rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
  return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _check(source: object, content: dict[str, Any]) -> None:
  """Refuses other networks, and classes that are not COCO's in COCO's order."""
  if (kind := content.get("model_type")) != "mask2former":
    raise ValueError(
      f"{source} is a {kind!r}, and GenEval's detector is a Mask2Former: take "
      f"{PUBLISHED}."
    )
  labels = content.get("id2label") or {}
  theirs = {int(number): str(name) for number, name in labels.items()}
  # Other names for a class are usual (tvmonitor, sofa); a known name elsewhere is not.
  known = [number for number, name in theirs.items() if name in CLASSES]
  moved = [theirs[i] for i in known if i >= len(CLASSES) or CLASSES[i] != theirs[i]]
  if len(theirs) != len(CLASSES) or len(known) < len(CLASSES) // 2 or moved:
    raise ValueError(
      f"{source} tells {len(theirs)} classes apart ({listed(theirs.values(), 4)}), and "
      f"GenEval asks for COCO's {len(CLASSES)} in their order"
      + (f", where {listed(moved, 3)} stand elsewhere" if moved else "")
      + f": take an instance model trained on COCO, such as {PUBLISHED}."
    )
