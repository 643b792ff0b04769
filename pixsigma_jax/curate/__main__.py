r"""From a heap of images to training data, step by step, over a Parquet index.

  python -m pixsigma_jax.curate scan INDEX --images=SOURCE
  python -m pixsigma_jax.curate score INDEX --clip=FOLDER --head=FILE.pth
  python -m pixsigma_jax.curate caption INDEX --import=FILE.jsonl
  python -m pixsigma_jax.curate filter INDEX --min_side=1024 --keep_quantile=0.3
  python -m pixsigma_jax.curate stats INDEX --output=DIR
  python -m pixsigma_jax.curate contact-sheet INDEX --resolution=1024 --output=FILE.png
  python -m pixsigma_jax.curate buckets TABLE.json --resolution=1024

SOURCE is a folder, a .tar or a folder of them (WebDataset), a manifest (.jsonl,
.parquet), or a folder in the official repository's layout. A step that was killed goes
on where it was by the same command; a finished one does nothing.
"""

import itertools
import json
import shlex
from collections.abc import Callable
from typing import Any

from absl import flags

from pixsigma_jax import command
from pixsigma_jax.data import ingest
from pixsigma_jax.data.index import open_index
from pixsigma_jax.data.rows import Reading

_BEAM = flags.DEFINE_string(
  "beam",
  "",
  'Options of Apache Beam, e.g. "--direct_running_mode=multi_processing '
  '--direct_num_workers=8", or those of a cluster.',
)

# scan
_IMAGES = flags.DEFINE_string("images", None, "Where the images are.")
_PER_PART = flags.DEFINE_integer("per_part", 1000, "Images of one part of the index.")
_NEAR_DISTANCE = flags.DEFINE_integer(
  "near_distance", 4, "Bits in which the perceptual hashes of duplicates may differ."
)
_CAPTION_FIELD = flags.DEFINE_list(
  "caption_field",
  [],
  "Fields that hold captions, in place of the usual names; short ones, unless it is "
  "NAME:long.",
)
_IMAGE_FIELD = flags.DEFINE_string(
  "image_field", None, "Field of a manifest that holds the images or their paths."
)
_CAPTION_PER_LINE = flags.DEFINE_bool(
  "caption_per_line", False, "Each line of a text file beside an image is a caption."
)
_PREVIOUS = flags.DEFINE_string(
  "previous",
  None,
  "An earlier index of the same images: take over scores and captions of what has not "
  "changed, and say what has.",
)
# score
_CLIP = flags.DEFINE_string("clip", None, "CLIP ViT-L/14: a folder or hub id.")
_HEAD = flags.DEFINE_string("head", None, "File of the aesthetic head.")
# caption
_IMPORT = flags.DEFINE_list("import", None, "Files of captions, JSON lines.")
_CAPTIONER = flags.DEFINE_string(
  "captioner", None, "A model that writes captions: a folder or hub id."
)
_INSTRUCTION = flags.DEFINE_string(
  "instruction",
  "Analyze the image in a comprehensive and detailed manner.",
  "What the captioner is told.",
)
_KIND = flags.DEFINE_enum(
  "kind", "long", ["long", "short"], "What the captioner's captions are."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 500, "Tokens at which the captioner is cut off."
)
# filter
_MIN_SIDE = flags.DEFINE_integer("min_side", None, "Pixels of the shorter side.")
_MIN_AREA = flags.DEFINE_integer("min_area", None, "Pixels of the whole image.")
_MAX_ASPECT = flags.DEFINE_float("max_aspect", None, "Longer side over the shorter.")
_MIN_AESTHETIC = flags.DEFINE_float("min_aesthetic", None, "The lowest score kept.")
_KEEP_QUANTILE = flags.DEFINE_float(
  "keep_quantile",
  None,
  "Which part to keep of the images that pass all else: the best.",
)
_NEED_CAPTION = flags.DEFINE_enum(
  "need_caption", None, ["any", "long", "short"], "The kind an image must have."
)
_MIN_CAPTION_WORDS = flags.DEFINE_integer(
  "min_caption_words", None, "Words that one of the captions must have."
)
_KEEP_DUPLICATES = flags.DEFINE_bool(
  "keep_duplicates", False, "Keep what scan marked as duplicates."
)
# stats, contact-sheet, buckets
_TAGGER = flags.DEFINE_string(
  "tagger", "rules", "What finds the nouns: rules, nltk or spacy:MODEL."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory of the statistics, or file of the contact sheet."
)
_RESOLUTION = flags.DEFINE_integer(
  "resolution", None, "Of the stage: side of its square image in pixels."
)
_TABLE = flags.DEFINE_string("table", None, "JSON table of sizes instead of our own.")
_COUNT = flags.DEFINE_integer("count", 24, "Images of the contact sheet.")
_STEP = flags.DEFINE_integer("step", None, "Pixels by which the sides of a table go.")


def _scan(index: str) -> None:
  from pixsigma_jax.curate import scan

  reading = Reading(
    tuple(_CAPTION_FIELD.value), _IMAGE_FIELD.value, _CAPTION_PER_LINE.value
  )
  ingest.check(_beam_options())
  found = scan.scan(
    index,
    _needed("scan", _IMAGES),
    per_part=_PER_PART.value,
    near_distance=_NEAR_DISTANCE.value,
    beam_options=_beam_options(),
    reading=reading,
    previous=_PREVIOUS.value,
  )
  _show(found.read_json("scan/report.json") or scan.report(found))


def _score(index: str) -> None:
  from pixsigma_jax.curate import score

  clip, head = _needed("score", _CLIP), _needed("score", _HEAD)
  report = score.score(
    open_index(index), clip=clip, head=head, beam_options=_beam_options()
  )
  _show(report or f"{index} has these scores already.")


def _caption(index: str) -> None:
  from pixsigma_jax.curate import captioner, captions

  if (_IMPORT.value is None) == (_CAPTIONER.value is None):
    raise ValueError(
      "`curate caption` takes captions from --import or from --captioner: give one."
    )
  if _IMPORT.value is not None:
    report = captions.import_captions(
      open_index(index), _IMPORT.value, caption_fields=_CAPTION_FIELD.value
    )
  else:
    report = captioner.write_captions(
      open_index(index),
      model=_needed("caption", _CAPTIONER),
      instruction=_INSTRUCTION.value,
      kind=_KIND.value,
      max_new_tokens=_MAX_NEW_TOKENS.value,
      beam_options=_beam_options(),
    )
  _show(report or f"{index} has these captions already.")


def _filter(index: str) -> None:
  from pixsigma_jax.curate import filter as filter_

  rules = filter_.Rules(
    min_side=_MIN_SIDE.value,
    min_area=_MIN_AREA.value,
    max_aspect=_MAX_ASPECT.value,
    need_caption=_NEED_CAPTION.value,
    min_caption_words=_MIN_CAPTION_WORDS.value,
    min_aesthetic=_MIN_AESTHETIC.value,
    keep_quantile=_KEEP_QUANTILE.value,
    keep_duplicates=_KEEP_DUPLICATES.value,
  )
  report = filter_.filter_images(open_index(index), rules, beam_options=_beam_options())
  _show(report)


def _stats(index: str) -> None:
  from pixsigma_jax.curate import statistics

  statistics.run(
    index, tagger=_TAGGER.value, output=_OUTPUT.value, beam_options=_beam_options()
  )


def _contact_sheet(index: str) -> None:
  from pixsigma_jax.curate import contact_sheet

  contact_sheet.run(
    index,
    resolution=_needed("contact-sheet", _RESOLUTION),
    table=_TABLE.value,
    output=_needed("contact-sheet", _OUTPUT),
    count=_COUNT.value,
  )


def _buckets(table: str) -> None:
  from pixsigma_jax.curate import buckets

  buckets.run(table, resolution=_needed("buckets", _RESOLUTION), step=_STEP.value)


_FILTER_FLAGS = (
  _MIN_SIDE,
  _MIN_AREA,
  _MAX_ASPECT,
  _MIN_AESTHETIC,
  _KEEP_QUANTILE,
  _NEED_CAPTION,
  _MIN_CAPTION_WORDS,
  _KEEP_DUPLICATES,
)
_SCAN_FLAGS = (_IMAGES, _PER_PART, _NEAR_DISTANCE, _CAPTION_FIELD, _IMAGE_FIELD)
_CAPTION_FLAGS = (
  _IMPORT,
  _CAPTION_FIELD,
  _CAPTIONER,
  _INSTRUCTION,
  _KIND,
  _MAX_NEW_TOKENS,
)
# What a step does, and its flags.
_STEPS: dict[str, tuple[Callable[[str], None], tuple[flags.FlagHolder, ...]]] = {
  "scan": (_scan, (_BEAM, *_SCAN_FLAGS, _CAPTION_PER_LINE, _PREVIOUS)),
  "score": (_score, (_BEAM, _CLIP, _HEAD)),
  "caption": (_caption, (_BEAM, *_CAPTION_FLAGS)),
  "filter": (_filter, (_BEAM, *_FILTER_FLAGS)),
  "stats": (_stats, (_BEAM, _TAGGER, _OUTPUT)),
  "contact-sheet": (_contact_sheet, (_RESOLUTION, _TABLE, _OUTPUT, _COUNT)),
  "buckets": (_buckets, (_RESOLUTION, _STEP)),
}


def main(arguments: list[str]) -> None:
  """Entry point; flags are parsed."""
  step, index = arguments
  if step not in _STEPS:
    raise ValueError(f"{step} is no step of curation, only {', '.join(_STEPS)} are.")
  run, its_flags = _STEPS[step]
  names = {flag.name for flag in its_flags}
  for flag in itertools.chain.from_iterable(others for _, others in _STEPS.values()):
    if flag.present and flag.name not in names:
      raise ValueError(
        f"`curate {step}` has no flag --{flag.name}, only "
        f"{', '.join(f'--{name}' for name in sorted(names))}."
      )
  run(index)


def _needed(step: str, flag: flags.FlagHolder) -> Any:
  if flag.value is None:
    raise ValueError(f"`curate {step}` needs --{flag.name}.")
  return flag.value


def _beam_options() -> list[str]:
  try:
    return shlex.split(_BEAM.value)
  except ValueError as error:  # a quotation without an end
    raise ValueError(f"--beam={_BEAM.value} is not understood: {error}.") from error


def _show(report: Any) -> None:
  print(report if isinstance(report, str) else json.dumps(report, indent=2))


if __name__ == "__main__":
  command.run(main, positional=("step", "index"))
