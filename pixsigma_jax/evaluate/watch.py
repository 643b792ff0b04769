"""Scores of a running trainer's sample sets, beside its metrics on TensorBoard.

WORKDIR/sample_sets/STEP/scores.json            each set's, see `sample_sets`
WORKDIR/sample_sets/references/SCORER.parquet   features of the references
WORKDIR/tensorboard/evaluate/                   what all scores.json say
"""

import dataclasses
import importlib.util
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from PIL import Image

from pixsigma_jax import checkpoint, command, disk
from pixsigma_jax.evaluate import foreign, options, sample_sets, scoring
from pixsigma_jax.evaluate.commands import Command
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.options import Option, OptionFlags
from pixsigma_jax.evaluate.sample_sets import SampleSet
from pixsigma_jax.evaluate.scorers import MadeScores, Scorer, scorer_type
from pixsigma_jax.evaluate.scoring import Row
from pixsigma_jax.evaluate.suites import (
  Figure,
  ScoredModel,
  chosen_scorers,
  scorers_option,
  suite,
)
from pixsigma_jax.evaluate.suites.ultra import texture_figures
from pixsigma_jax.tensorboard import Board

_DISTANCES = ("fid", "fid-clean", "cmmd")  # of a set from the references
_SCORERS = ("clip", "texture", "aesthetic", *_DISTANCES)
_RESAMPLES = 1000  # of a mean's interval

_OPTIONS = (
  scorers_option(["clip"], _SCORERS),
  Option(
    "references", None, f"Folder of images that {', '.join(_DISTANCES)} compare with."
  ),
  Option("once", False, "Score the sets that are whole, and end.", bool),
  Option("poll_seconds", 30.0, "Seconds between two looks for new sets.", float),
)


def define(name: str, arguments: Sequence[str]) -> Command:
  """Defines the flags of `watch`; see `commands.define`."""
  del name, arguments
  own = (scorer_type(scorer).options for scorer in _SCORERS)
  flags = OptionFlags(options.merge(_OPTIONS, *own))
  return Command(
    lambda words: _run(pathlib.Path(words[0]), flags.values()), ("WORKDIR",)
  )


def _run(workdir: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Watches, after all that can be refused beforehand is."""
  names = chosen_scorers(values["scorers"], _SCORERS)
  if values["poll_seconds"] <= 0:
    raise ValueError(f"--poll_seconds={values['poll_seconds']} must be more than 0.")
  _check_run(workdir)
  images = _references(values["references"], names)
  disk.check_writable(workdir / sample_sets.FOLDER)
  command.keep_compiled()
  # Weights that are missing or foreign are told of before anything is waited for.
  scorers: dict[str, Scorer] = {}
  for name in names:
    scorer = scorer_type(name).load(values)
    assert not isinstance(scorer, MadeScores)
    scorers[name] = scorer
  watch = Watch(workdir, scorers, images)
  try:
    watch.look()
    if values["once"]:
      if not watch.scored:
        raise ValueError(f"No set in {workdir / sample_sets.FOLDER} is whole yet.")
      return
    told = ""
    while True:
      if (waiting := watch.waits_for()) != told:
        logging.info("%s Ctrl-C ends.", waiting)
        told = waiting
      time.sleep(values["poll_seconds"])
      watch.look()
  except KeyboardInterrupt:
    raise command.Interrupted(
      f"{len(watch.scored)} sets of {workdir} are scored. The same command goes on "
      "behind them."
    ) from None
  finally:
    watch.close()


def _check_run(workdir: pathlib.Path) -> None:
  """Refuses what is no run, and a run that draws no sets.

  Raises:
    NotADirectoryError, ValueError: it is one of these.
  """
  if not workdir.is_dir():
    raise NotADirectoryError(f"{workdir} is no directory: give a run's --workdir.")
  if (workdir / sample_sets.FOLDER).is_dir():
    return
  if not (workdir / "run.json").is_file():
    raise ValueError(
      f"{workdir} has neither {sample_sets.FOLDER}/ nor run.json: give a run's "
      "--workdir."
    )
  try:
    metadata = checkpoint.read_metadata(workdir)
  except FileNotFoundError:  # a young run: nothing says yet what it will draw
    return
  config: Any = metadata.provenance[-1].get("config") if metadata.provenance else None
  if config and not config.get("log", {}).get("sample_set", {}).get("every"):
    raise ValueError(
      f"The run in {workdir} draws no sample sets: train it with "
      "config.log.sample_set.every and config.log.sample_set.count."
    )


def _references(folder: str | None, names: Sequence[str]) -> list[pathlib.Path]:
  """The images to compare with; none where no scorer does.

  Raises:
    NotADirectoryError: there is no such folder.
    ValueError: it has too few, or scorers and references do not go together.
  """
  comparing = [name for name in names if name in _DISTANCES]
  if folder is None:
    if comparing:
      raise ValueError(
        f"--scorers={','.join(names)}: {comparing[0]} compares with other images: give "
        "--references=DIR, or leave it out."
      )
    return []
  if not comparing:
    raise ValueError(
      f"--references={folder} is for {', '.join(_DISTANCES)}: add one to "
      f"--scorers={','.join(names)}, or leave it out."
    )
  if not pathlib.Path(folder).is_dir():
    raise NotADirectoryError(f"--references={folder} is no folder.")
  images = foreign.images_below(pathlib.Path(folder))
  if len(images) < 2:
    raise ValueError(f"--references={folder} has 1 image: a distance needs two.")
  return images


class Watch:
  """The sets of one run, scored as they become whole.

  Attributes:
    scored: step → numbers by name, of what has been scored.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    scorers: Mapping[str, Scorer],
    references: Sequence[pathlib.Path],
  ):
    """Takes what `look` needs.

    Args:
      references: images that some of the scorers compare with.
    """
    self._workdir, self._scorers = workdir, scorers
    self._references = [(Item(path.stem, ""), 0, path) for path in references]
    self._fingerprint = sample_sets.fingerprint_of(references)
    self._features: dict[str, pa.Table] = {}
    # Folder of a whole set → its state as it was read, the set, its scores.
    self._seen: dict[pathlib.Path, tuple[Any, SampleSet, dict[str, Any]]] = {}
    self._shown = _Shown(workdir / "tensorboard" / "evaluate")
    self.scored: dict[int, dict[str, float]] = {}

  def look(self) -> None:
    """Scores all sets that are whole and not scored yet.

    Raises:
      ValueError: a set or one of its images is damaged.
    """
    begun = sample_sets.begun(self._workdir)
    found = {path: self._read(path) for path in begun}
    self._seen = {path: self._seen[path] for path in begun if path in self._seen}
    whole = [each for each, _ in found.values() if each is not None]
    entries = {each.step: of for each, of in found.values() if each is not None}
    self.scored = {step: _numbers(of) for step, of in entries.items() if of}
    self._shown.show(self.scored)
    for each in whole:
      if self._score(each, entries[each.step]):
        self.scored[each.step] = _numbers(sample_sets.read_scores(each))
        self._shown.show(self.scored)
        numbers = self.scored[each.step].items()
        shown = (f"{name} {value:.4g}" for name, value in numbers if "/" not in name)
        print(f"step {each.step}: {', '.join(shown)}", flush=True)

  def _read(self, path: pathlib.Path) -> tuple[SampleSet | None, dict[str, Any]]:
    """The set in a folder and its scores, read only if they changed since."""
    state = sample_sets.state_of(path)
    if path in self._seen and self._seen[path][0] == state:
      return self._seen[path][1:]
    whole = sample_sets.read(path)
    entries = {} if whole is None else sample_sets.read_scores(whole)
    if whole is not None:  # files of one that is not come one by one
      self._seen[path] = (state, whole, entries)
    return whole, entries

  def waits_for(self) -> str:
    """What has to come next, in a sentence."""
    begun = sample_sets.begun(self._workdir)
    drawn = [path.name for path in begun if int(path.name) not in self.scored]
    rest = f"{drawn[-1]} to be whole" if drawn else "the next one"
    folder = self._workdir / sample_sets.FOLDER
    return f"{len(self.scored)} sets in {folder} are scored; waiting for {rest}."

  def close(self) -> None:
    """Closes TensorBoard's file."""
    self._shown.close()

  def _score(self, of: SampleSet, known: Mapping[str, Any]) -> bool:
    """Scores a set by all scorers that have not; returns whether it changed."""
    entries, changed = dict(known), False
    for name, scorer in self._scorers.items():
      is_distance = name in _DISTANCES
      basis = {
        "identity": scorer.identity(),
        "pictures": of.fingerprint,
        "references": self._fingerprint if is_distance else None,
      }
      if name in entries:
        if {key: entries[name].get(key) for key in basis} == basis:
          continue
        logging.warning(
          "%s has %s of other weights, settings or references: it is scored anew.",
          of.path,
          name,
        )
      table = _table(of.rows, name, scorer, f"{name} of step {of.step}")
      references = self._reference_features(name, scorer) if is_distance else None
      figures = _figures(of, name, table, references)
      if sample_sets.read(of.path) != of:
        logging.warning(
          "%s changed while it was scored: its run went back. It is scored when it is "
          "whole again.",
          of.path,
        )
        return False
      entries[name] = basis | {"figures": [dataclasses.asdict(f) for f in figures]}
      sample_sets.write_scores(of, entries)
      changed = True
    return changed

  def _reference_features(self, name: str, scorer: Scorer) -> pa.Table:
    """The references' rows: computed once, kept on the disk."""
    if name in self._features:
      return self._features[name]
    folder = self._workdir / sample_sets.FOLDER / "references"
    path = folder / f"{name}.parquet"
    of = {"references": self._fingerprint}
    wanted = _metadata(scorer, of)
    have = scoring.stored_metadata(path)
    if have == wanted:
      table = pq.read_table(path)
    else:
      if have is not None:
        logging.warning(
          "%s is of other references or of another %s: it is written anew.", path, name
        )
      what = f"{name} of the references"
      table = _table(self._references, name, scorer, what, of)
      disk.write_whole(path, lambda partial: pq.write_table(table, partial))
    self._features[name] = table
    return table


def _metadata(scorer: Scorer, of: Mapping[str, str]) -> dict[bytes, bytes]:
  return {
    b"identity": json.dumps(scorer.identity(), sort_keys=True).encode(),
    b"of": json.dumps(of, sort_keys=True).encode(),
  }


def _table(
  rows: Sequence[Row],
  name: str,
  scorer: Scorer,
  what: str,
  of: Mapping[str, str] | None = None,
) -> pa.Table:
  """A scorer's rows; `what` names them in the progress."""
  schema = scoring.schema_of(scorer, _metadata(scorer, of or {}))
  size = scoring.ITEMS_PER_PART
  parts = [rows[start : start + size] for start in range(0, len(rows), size)]
  return pa.concat_tables(
    scoring.score_rows([_sized(row) for row in part], scorer, schema)
    for part in command.progress(parts, len(parts), f"{what}, parts")
  )


def _sized(row: Row) -> Row:
  """A row that says its image's size, so that few of large ones are read together."""
  item, number, path = row
  with Image.open(path) as image:
    width, height = image.size
  return dataclasses.replace(item, height=height, width=width), number, path


def _figures(
  of: SampleSet, name: str, table: pa.Table, references: pa.Table | None
) -> list[Figure]:
  """The figures of one scorer, as a report has them."""
  run = ScoredModel(
    name=of.path.name,
    items=tuple(item for item, _, _ in of.rows),
    images_per_item=1,
    options={},
    read=lambda scorer, of_references: (
      None if scorer != name else references if of_references else table
    ),
    resamples=_RESAMPLES,
    # Each would take as long as the distance, of every set.
    distance_resamples=0,
  )
  return (
    texture_figures(run) if name == "texture" else list(suite("paper").figures(run))
  )


def _numbers(entries: Mapping[str, Any]) -> dict[str, float]:
  """Figures by name, an interval's ends as `NAME/low` and `NAME/high`."""
  numbers: dict[str, float] = {}
  for entry in entries.values():
    for figure in entry["figures"]:
      numbers[figure["name"]] = figure["value"]
      for end in ("low", "high"):
        if figure[end] is not None:
          numbers[f"{figure['name']}/{end}"] = figure[end]
  return numbers


class _Shown:
  """What TensorBoard shows: always what it was last given."""

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self._board: Board | None = None
    self._steps: dict[int, Mapping[str, float]] = {}
    self._can_write = importlib.util.find_spec("tensorboardX") is not None
    if not self._can_write:
      logging.warning("tensorboardX is not installed: scores go to scores.json alone.")

  def show(self, scored: Mapping[int, Mapping[str, float]]) -> None:
    """Shows numbers by step, in place of all that was shown before."""
    if not self._can_write or scored == self._steps:
      return
    new = {step: of for step, of in scored.items() if step not in self._steps}
    last = max(self._steps, default=-1)
    goes_on = all(scored.get(step) == of for step, of in self._steps.items())
    if self._board is None or not goes_on or min(new) <= last:
      # A new file supersedes the numbers of all earlier ones, from step 0 on.
      self.close()
      self._board = Board(self._directory, 0)
      new = dict(scored)
    for step in sorted(new):
      self._board.add_scalars(new[step], step)
    self._steps = {step: dict(of) for step, of in scored.items()}

  def close(self) -> None:
    """Closes the file."""
    board, self._board = self._board, None
    if board is not None:
      board.close()
