"""The four steps of an evaluation as commands: prompts, sample, score, report."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pixsigma_jax import checkpoint, command, distributed
from pixsigma_jax.convert.model import Options as Source
from pixsigma_jax.convert.source_flags import SourceFlags
from pixsigma_jax.evaluate import folder as folder_
from pixsigma_jax.evaluate import foreign, options, report, sampling, scoring
from pixsigma_jax.evaluate.commands import Command
from pixsigma_jax.evaluate.folder import EvaluationFolder
from pixsigma_jax.evaluate.options import Option, OptionFlags
from pixsigma_jax.evaluate.scorers import (
  MadeScores,
  Scorer,
  forget_shared,
  scorer_type,
)
from pixsigma_jax.evaluate.suites import SUITES, Suite, suite
from pixsigma_jax.sample import companions
from pixsigma_jax.sample.model_flags import ModelFlags
from pixsigma_jax.sample.setting_flags import SettingFlags
from pixsigma_jax.sample.settings import SETTINGS, Settings
from pixsigma_jax.sample.weights import Located

STEPS = ("prompts", "sample", "score", "report")

_OUTPUT = Option("output", None, "Folder of the evaluation.")
_SAMPLE = (
  Option(
    "checkpoints",
    None,
    "Workdirs or snapshots as [NAME=]DIR, by commas; or folders of diffusers, a .pth, "
    "a .safetensors, ids on the hub, which are converted once.",
    list,
  ),
  Option(
    "frozen",
    None,
    "Folder with vae/, text_encoder/ and tokenizer/, or the id of one on the hub.",
  ),
  Option(
    "batch_size",
    None,
    "Images drawn together by a process; one a device if unset.",
    int,
  ),
  Option(
    "dtype",
    "bfloat16",
    "Precision of the network.",
    choices=("bfloat16", "float32"),
  ),
  Option(
    "redraw",
    "never",
    "What becomes of a model's images that another checkpoint or other settings drew: "
    "`never` refuses to go on, `stale` deletes and draws them anew.",
    choices=("never", "stale"),
  ),
)
_SCORE = (
  Option("images", None, "Folders of images to compare, [NAME=]DIR, by commas.", list),
  Option("any_size", False, "Take images of other sizes than asked for.", bool),
)
_REPORT = (
  Option("resamples", 1000, "Resamples of a bootstrap interval; 0 for none.", int),
  Option(
    "distance_resamples",
    20,
    "The same of distances between sets, such as FID; each takes as long as the "
    "distance itself.",
    int,
  ),
  Option("bootstrap_seed", 0, "Seed of bootstrap intervals.", int),
)
_JOB = (
  Option("coordinator_address", None, "HOST:PORT of process 0, see docs/pods.md."),
  Option("num_processes", None, "Processes of the job.", int),
  Option("process_id", None, "Which of them this is, from 0.", int),
  Option("startup_timeout", 600, "Seconds to wait for all processes.", int),
  Option("silence_timeout", 100, "Seconds until a silent host counts as lost.", int),
)
# Seeds and sizes are the items' own, and so is the number of images.
_SETTINGS = [
  name
  for name, setting in SETTINGS.items()
  if not setting.of_a_prompt and name != "num_images_per_prompt"
]


def define(name: str, arguments: Sequence[str]) -> Command:
  """Defines the flags of one step; see `commands.define`.

  Raises:
    ValueError: no suite follows.
  """
  if not arguments or arguments[0] not in SUITES:
    given = f", not {arguments[0]!r}" if arguments else ""
    raise ValueError(
      f"`evaluate {name}` needs a suite, one of {', '.join(SUITES)}{given}."
    )
  return _define(suite(arguments[0]), (name,), ("SUITE",))


def define_all(name: str) -> Command:
  """Defines the flags of a suite that goes through all four steps."""
  return _define(suite(name), STEPS, ())


def _define(of: Suite, steps: Sequence[str], words: tuple[str, ...]) -> Command:
  groups: list[Iterable[Option]] = [[_OUTPUT]]
  by_step: dict[str, Sequence[Iterable[Option]]] = {
    "prompts": [of.options],
    "sample": [_SAMPLE, _JOB],
    "score": [_SCORE, _JOB, *_score_options(of)],
    "report": [_REPORT],
  }
  for step in steps:
    groups += by_step[step]
  flags = OptionFlags(options.merge(*groups))
  draws = "sample" in steps
  settings = SettingFlags(*_SETTINGS) if draws else None
  source = SourceFlags() if draws else None
  models = ModelFlags() if draws else None

  def run(_: list[str]) -> None:
    asked = settings.values() if settings is not None else {}
    further = models.values() if models is not None else {}
    found = source.values() if source is not None else None
    _run(of, steps, flags.values(), asked, found, further)

  return Command(run, words)


def _score_options(of: Suite) -> list[tuple[Option, ...]]:
  return [of.score_options, *(scorer_type(name).options for name in of.all_scorers)]


def _run(
  of: Suite,
  steps: Sequence[str],
  values: Mapping[str, Any],
  settings: Mapping[str, Any],
  source: Source | None,
  further: Mapping[str, Any],
) -> None:
  """Runs steps in their order, after all that can be refused beforehand is."""
  if values["output"] is None:
    raise ValueError("Give --output=FOLDER, where the evaluation is or is to be.")
  path = pathlib.Path(values["output"])
  checkpoints = sampling.find_checkpoints(values.get("checkpoints") or [], source)
  images = foreign.find_images(values.get("images") or [])
  if both := sorted(set(checkpoints) & set(images)):
    raise ValueError(f"--checkpoints and --images both have a model {both[0]}.")
  if steps == ("sample",) and not checkpoints:
    raise ValueError("Give --checkpoints=[NAME=]DIR,… to draw with.")
  checked = Settings.of(settings)
  companions.check_scale(further.get("autoguidance"), checked.autoguidance_scale)
  if values.get("batch_size") is not None and values["batch_size"] < 1:
    raise ValueError(f"--batch_size={values['batch_size']} must be at least 1.")
  beside: dict[str, companions.Located] = {}
  actions: dict[str, Callable[[EvaluationFolder], None]] = {
    "sample": lambda folder: _sample(folder, checkpoints, beside, checked, values),
    "score": lambda folder: _score(of, folder, images, values),
    "report": lambda folder: _report(of, folder, values),
  }
  with _job(values):
    # In the job, as reading a checkpoint asks JAX which process this is.
    for name, located in checkpoints.items():
      first = checkpoint.read_metadata(located.checkpoint)
      beside[name] = companions.locate(first, options=source or Source(), **further)
    folder = _prompts(of, path, values) if "prompts" in steps else _open(of, path)
    if checkpoints and "score" in steps:
      _check_scoring(of, folder, images, values)
    for step in steps:
      if step != "prompts":
        actions[step](folder)


def _job(values: Mapping[str, Any]) -> Any:
  """The job of several processes, for steps that share work among them."""
  job = {option.name: values.get(option.name, option.default) for option in _JOB}
  process = None
  if "process_id" in values:
    process = distributed.find_process(
      coordinator_address=job["coordinator_address"],
      num_processes=job["num_processes"],
      process_id=job["process_id"],
      timeout=job["startup_timeout"],
    )
  return distributed.initialized(
    process,
    startup_timeout=job["startup_timeout"],
    silence_timeout=job["silence_timeout"],
  )


def _prompts(
  of: Suite, path: pathlib.Path, values: Mapping[str, Any]
) -> EvaluationFolder:
  chosen = {option.name: values[option.name] for option in of.options}
  item_set = of.items(options.resolve(of.options, chosen))
  folder = None
  if distributed.is_first():
    folder = folder_.create(
      path, suite=of.name, version=of.version, options=chosen, item_set=item_set
    )
    print(f"{path / 'prompts.jsonl'}: {len(folder.items)} prompts")
  distributed.wait_for_all()
  return folder or folder_.open_folder(path)


def _open(of: Suite, path: pathlib.Path) -> EvaluationFolder:
  folder = folder_.open_folder(path)
  if (folder.about["suite"], folder.about["version"]) != (of.name, of.version):
    raise ValueError(
      f"{path} is an evaluation of {folder.about['suite']}, version "
      f"{folder.about['version']}, not of {of.name}, version {of.version}."
    )
  return folder


def _sample(
  folder: EvaluationFolder,
  checkpoints: Mapping[str, Located],
  beside: Mapping[str, companions.Located],
  settings: Settings,
  values: Mapping[str, Any],
) -> None:
  command.keep_compiled()
  for name, located in checkpoints.items():
    frozen = values["frozen"]
    sampling.sample(
      folder,
      name,
      located.checkpoint,
      settings=settings,
      dtype=values["dtype"],
      batch_size=values["batch_size"],
      frozen=located.encoders if frozen is None else frozen,
      further=beside[name],
      replace=values["redraw"] == "stale",
    )


def _check_scoring(
  of: Suite,
  folder: EvaluationFolder,
  images: Mapping[str, pathlib.Path],
  values: Mapping[str, Any],
) -> None:
  """Refuses what `_score` would, before hours of drawing."""
  _load_scorers(of, _chosen(of, folder, values))
  forget_shared()  # drawing needs the memory
  for name, directory in images.items():
    foreign.match_images(folder.model(name), directory, any_size=values["any_size"])


def _chosen(
  of: Suite, folder: EvaluationFolder, values: Mapping[str, Any]
) -> dict[str, Any]:
  """Options of the suite and of its scorers."""
  known = options.merge(*_score_options(of))
  return {**folder.about["options"], **{o.name: values[o.name] for o in known}}


def _load_scorers(
  of: Suite, chosen: Mapping[str, Any]
) -> dict[str, Scorer | MadeScores]:
  return {name: scorer_type(name).load(chosen) for name in of.scorers(chosen)}


def _score(
  of: Suite,
  folder: EvaluationFolder,
  images: Mapping[str, pathlib.Path],
  values: Mapping[str, Any],
) -> None:
  command.keep_compiled()
  chosen = _chosen(of, folder, values)
  # Weights that are missing or foreign are told of before images are copied.
  scorers = _load_scorers(of, chosen)
  if distributed.is_first():
    for name, directory in images.items():
      foreign.add_images(folder, name, directory, any_size=values["any_size"])
  distributed.wait_for_all()
  models = folder.models()
  if not models:
    raise ValueError(
      f"{folder.path} has no images to score: run `evaluate sample`, or give "
      "--images=NAME=DIR."
    )
  for model in models:
    scoring.check_whole(model)
  for name, scorer in scorers.items():
    if name in of.reference_scorers(chosen):
      scoring.score(folder, None, name, scorer)
    for model in models:
      scoring.score(folder, model, name, scorer)
  distributed.wait_for_all()


def _report(of: Suite, folder: EvaluationFolder, values: Mapping[str, Any]) -> None:
  if distributed.is_first():
    report.write(
      of,
      folder,
      resamples=values["resamples"],
      distance_resamples=values["distance_resamples"],
      seed=values["bootstrap_seed"],
    )
  distributed.wait_for_all()


__all__ = ["STEPS", "define", "define_all"]
