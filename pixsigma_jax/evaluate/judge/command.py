r"""The command `judge`.

  OPENAI_BASE_URL=… OPENAI_API_KEY=… python -m pixsigma_jax.evaluate judge \
    --folder=FOLDER --judge=MODEL --max_requests=1000

It needs the extra `eval`.
"""

import os
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
  Option("models", [], "Two to eight, separated by commas; by default all.", list),
  Option("prompts", None, "How many of the suite's; by default all.", int),
  Option("max_side", 1024, "Pixels that larger pictures are reduced to.", int),
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
  budget = Budget(max_requests, max_cost, _prices(prices))
  output = evaluation.path / "judges" / re.sub(r"[^A-Za-z0-9._-]+", "_", judge)
  disk.check_writable(output)
  asked = asking.questions(
    evaluation, chosen, judge=judge, max_side=max_side, prompts=prompts
  )
  base_url = os.environ.get("OPENAI_BASE_URL") or _BASE_URL
  with (
    cache.Cache(evaluation.path / "judges.db") as replies,
    client.Client(
      base_url,
      os.environ.get("OPENAI_API_KEY") or None,
      judge,
      budget,
      attempts=attempts,
      timeout=timeout,
    ) as endpoint,
  ):
    found = asking.ask_all(
      asked, endpoint, replies, judge=judge, max_side=max_side, threads=threads
    )
  content, markdown = report.of_judge(judge, chosen, asked, found, budget)
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
