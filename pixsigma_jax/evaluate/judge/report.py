"""What a judge said: the same tables as of people, and how far it is to be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

from pixsigma_jax.evaluate.judge.asking import Asked, Question, in_pairs
from pixsigma_jax.evaluate.judge.budget import Budget
from pixsigma_jax.evaluate.judge.client import Reply, Verdict
from pixsigma_jax.evaluate.study.design import CRITERIA
from pixsigma_jax.evaluate.study.presentation import (
  preferences_to_json,
  preferences_to_markdown,
)
from pixsigma_jax.evaluate.study.statistics import Comparison, Preferences, summarize

_SCORES: dict[Verdict, float] = {"first": 1.0, "equal": 0.5, "second": 0.0}


def of_judge(
  judge: str,
  models: Sequence[str],
  questions: Sequence[Question],
  asked: Asked,
  budget: Budget,
) -> tuple[dict[str, Any], list[str]]:
  """Report of a judge as JSON holds it, and as lines of Markdown.

  A pair counts if the judge voted in both orders; its score is the mean of the two. One
  that is preferred wherever it stands wins, contradictions come out as ties.

  Raises:
    ValueError: it voted on no pair in both orders.
  """
  voted = [
    (one, [asked.replies[q.key].votes for q in (one, other)])
    for one, other in in_pairs(questions)
    if all(_status(asked.replies, q) == "voted" for q in (one, other))
  ]
  statuses = [_status(asked.replies, question) for question in questions]
  counts = {
    name: statuses.count(name) for name in ("voted", "refused", "garbled", "not asked")
  }
  if not voted:
    why = asked.stopped or "see the model, or its endpoint"
    raise ValueError(
      f"{judge} voted on no pair in both orders: of {len(questions)} questions "
      f"{_counted(counts)}; {why}."
    )
  criteria = {
    criterion: summarize(
      [
        Comparison(
          judge,
          question.item,
          question.first,
          question.second,
          (_SCORES[there[criterion]] + 1 - _SCORES[back[criterion]]) / 2,
        )
        for question, (there, back) in voted
      ],
      models,
    )
    for criterion in CRITERIA
  }
  report = {
    "kind": "judge",
    "name": judge,
    "models": sorted(models),
    "prompts": len({question.item for question in questions}),
    "pairs": len(questions) // 2,
    "pairs_voted": len(voted),
    "questions": counts,
    "stopped": asked.stopped,
    "criteria": {key: preferences_to_json(value) for key, value in criteria.items()},
    "order": {key: _of_order([votes for _, votes in voted], key) for key in CRITERIA},
    "from_cache": asked.from_cache,
    "requests": budget.requests,
    "input_tokens": budget.input_tokens,
    "output_tokens": budget.output_tokens,
    "cost": budget.cost,
  }
  return report, _markdown(report, criteria)


def _status(replies: Mapping[str, Reply], question: Question) -> str:
  reply = replies.get(question.key)
  return "not asked" if reply is None else reply.status


def _of_order(
  votes: Sequence[Sequence[Mapping[str, Verdict]]], criterion: str
) -> dict[str, float | None]:
  """How much the order of the images decides.

  Returns:
    `contradicted`: share of pairs in which the same place is preferred both times;
    `first_preferred`: share of the first place among votes that prefer one, 1/2 for a
    judge to whom the order means nothing.
  """
  both = [(there[criterion], back[criterion]) for there, back in votes]
  contradicted = sum(a == b != "equal" for a, b in both)
  decided = [vote for pair in both for vote in pair if vote != "equal"]
  return {
    "contradicted": contradicted / len(both),
    "first_preferred": decided.count("first") / len(decided) if decided else None,
  }


def _markdown(
  report: Mapping[str, Any], criteria: Mapping[str, Preferences]
) -> list[str]:
  lines = [
    f"# Judge {report['name']}",
    "",
    f"{report['pairs_voted']} of {report['pairs']} pairs of images for "
    f"{report['prompts']} prompts, each in both orders. Of "
    f"{2 * report['pairs']} questions {_counted(report['questions'])}.",
    "",
    "![Win rates](report.png)",
  ]
  if report["stopped"]:
    lines += ["", f"Not all was asked: {report['stopped']}"]
  for criterion, preferences in criteria.items():
    order = report["order"][criterion]
    first = order["first_preferred"]
    lines += ["", f"## By {criterion}", "", *preferences_to_markdown(preferences), ""]
    lines.append(
      f"In {100 * order['contradicted']:.1f} % of pairs it prefers the same place in "
      "both orders"
      + (
        "." if first is None else f"; the first place has {100 * first:.1f} % of votes."
      )
    )
  cost = "" if report["cost"] is None else f", cost {report['cost']:.4g}"
  lines += [
    "",
    f"This time: {report['requests']} requests, {report['input_tokens']} tokens in, "
    f"{report['output_tokens']} out{cost}; {report['from_cache']} replies were known.",
  ]
  return lines


def _counted(counts: Mapping[str, int]) -> str:
  return ", ".join(f"{number} {name}" for name, number in counts.items())
