r"""The command `judge`, behind an endpoint or on this machine.

  OPENAI_BASE_URL=… OPENAI_API_KEY=… python -m pixsigma_jax.evaluate judge \
    --folder=FOLDER --judge=MODEL --max_requests=1000

It needs the extra `eval`.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Sequence

from absl import logging

from pixsigma_jax import disk
from pixsigma_jax.evaluate.commands import Command
from pixsigma_jax.evaluate.folder import open_folder
from pixsigma_jax.evaluate.options import Option, OptionFlags
from pixsigma_jax.wording import install

_BASE_URL = "https://api.openai.com/v1"


_OPTIONS = (
  Option("folder", None, "What `evaluate sample` filled: its --output. Required."),
  Option("judge", None, "Model to ask, as OPENAI_BASE_URL knows it. Required."),
  Option(
    "local", False, "The judge is a folder of transformers or a hub id, run here.", bool
  ),
  Option("models", [], "Two to eight, separated by commas; by default all.", list),
  Option("prompts", None, "How many of the suite's; by default all.", int),
  Option("max_side", 1024, "Pixels that larger images are reduced to.", int),
  Option(
    "max_requests", None, "Requests of this run, with those that fail; any number.", int
  ),
  Option("max_cost", None, "Of this run, in the currency of --prices.", float),
  Option("prices", [], "Of a million tokens: INPUT,OUTPUT.", list),
  Option("threads", 4, "Questions on their way at once.", int),
  Option("attempts", 6, "Attempts of a question before the command ends.", int),
  Option("timeout", 120.0, "Seconds of silence that end an attempt.", float),
  Option("subject", None, "Model the plot is about; by default the strongest."),
)
# Option → least value that makes sense.
_LEAST = {
  "max_side": 16,
  "max_requests": 1,
  "threads": 1,
  "attempts": 1,
  "timeout": 0.1,
}


def define(name: str, arguments: Sequence[str]) -> Command:
  """Defines the flags of `judge`."""
  del name, arguments
  asked = OptionFlags(_OPTIONS)

  def run(_: list[str]) -> None:
    values = asked.values()
    for required in ("folder", "judge"):
      if values[required] is None:
        raise ValueError(f"--{required} is missing: `judge` needs it.")
    for option, least in _LEAST.items():
      if values[option] is not None and values[option] < least:
        raise ValueError(f"--{option}={values[option]} must be at least {least}.")
    _judge(**values)

  return Command(run)


def _judge(
  folder: str,
  judge: str,
  local: bool,
  models: Sequence[str],
  prompts: int | None,
  max_side: int,
  max_requests: int | None,
  max_cost: float | None,
  prices: Sequence[str],
  threads: int,
  attempts: int,
  timeout: float,
  subject: str | None,
) -> None:
  try:
    from pixsigma_jax.evaluate.judge import asking, cache, client, report
    from pixsigma_jax.evaluate.judge.budget import Budget
    from pixsigma_jax.evaluate.study import presentation
    from pixsigma_jax.evaluate.study.design import chosen_models
  except ModuleNotFoundError as error:
    if error.name not in {"httpx", "sqlalchemy", "matplotlib"}:
      raise
    raise ValueError(f"A judge needs {error.name}: {install('eval')}.") from error

  evaluation = open_folder(folder)
  chosen = chosen_models(evaluation, models)
  if subject is not None and subject not in chosen:
    raise ValueError(
      f"--subject={subject} is not compared: choose one of {', '.join(chosen)}."
    )
  if local and (max_requests is not None or max_cost is not None or prices):
    raise ValueError(
      "--local pays for nothing: leave out --max_requests, --max_cost and --prices."
    )
  budget = Budget(max_requests, max_cost, _prices(prices))
  name = pathlib.Path(judge).name if local else judge
  output = evaluation.path / "judges" / re.sub(r"[^A-Za-z0-9._-]+", "_", name)
  disk.check_writable(output)
  with contextlib.ExitStack() as stack:
    voter: asking.Judge
    if local:
      from pixsigma_jax.evaluate.judge.local import LocalJudge

      voter, threads = LocalJudge(judge), 1
    else:
      voter = stack.enter_context(
        client.Client(
          os.environ.get("OPENAI_BASE_URL") or _BASE_URL,
          os.environ.get("OPENAI_API_KEY") or None,
          judge,
          budget,
          attempts=attempts,
          timeout=timeout,
        )
      )
    asked = asking.questions(
      evaluation, chosen, identity=voter.identity, max_side=max_side, prompts=prompts
    )
    replies = stack.enter_context(cache.Cache(evaluation.path / "judges.db"))
    found = asking.ask_all(
      asked, voter, replies, name=name, max_side=max_side, threads=threads
    )
  content, markdown = report.of_judge(name, chosen, asked, found, budget)
  if found.stopped:
    missing = content["questions"]["not asked"]
    logging.warning("%d questions were not asked: %s", missing, found.stopped)
  subject = subject or str(content["criteria"]["quality"]["models"][0]["name"])
  written = presentation.write(output, content, markdown, subject)
  print("\n".join(markdown))
  for each in written:
    print(each)


def _prices(given: Sequence[str]) -> tuple[float, float] | None:
  if not given:
    return None
  try:
    price_in, price_out = map(float, given)
  except ValueError:
    price_in = price_out = -1.0
  if not (0 <= price_in < float("inf") and 0 <= price_out < float("inf")):
    raise ValueError(
      f"--prices={','.join(given)} must be two numbers: INPUT,OUTPUT of a million "
      "tokens."
    )
  return price_in, price_out
