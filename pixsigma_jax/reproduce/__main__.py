"""The paper's tables and figures, its numbers beside ours.

  python -m pixsigma_jax.reproduce table4 --output=runs/reproduce
  python -m pixsigma_jax.reproduce table3d --output=runs/reproduce
  python -m pixsigma_jax.reproduce table1 --index=INDEX --output=runs/reproduce
  python -m pixsigma_jax.reproduce figure6 --index=INDEX --output=runs/reproduce
  python -m pixsigma_jax.reproduce figure8c --output=runs/reproduce

Prints a page, and writes it as NAME.md, its numbers as NAME.json, and a plot, where it
has one, as NAME.png into one folder. What trains goes on where it was interrupted.
"""

import pathlib
import shlex

import jax
from absl import flags, logging

from pixsigma_jax import command
from pixsigma_jax.reproduce import full_size, registry, result

_BUDGETS = ("laptop", *full_size.BUDGETS, "smoke")

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to.", required=True)
_INDEX = flags.DEFINE_string("index", None, "An index of `curate`, with captions.")
_TAGGER = flags.DEFINE_string(
  "tagger", "rules", "What finds the nouns: rules, nltk or spacy:MODEL."
)
_BEAM = flags.DEFINE_string("beam", "", "Options of Apache Beam, such as --runner=…")
_BUDGET = flags.DEFINE_enum(
  "budget",
  "laptop",
  _BUDGETS,
  "How much is trained: `laptop` a miniature, for about an hour in all; `gpu` and "
  "`pod` print the commands for PixArt-Σ itself; `smoke` sees that all of it runs.",
)


def main(arguments: list[str]) -> None:
  """Entry point; flags are parsed."""
  logging.set_verbosity(logging.INFO)
  (name,) = arguments
  reproduction = registry.find(name)
  if reproduction.trains:
    command.keep_compiled()
  else:
    logging.info("%s takes %s.", name, reproduction.takes)
    # Whatever accelerator is here is not asked: plans are for machines elsewhere.
    jax.config.update("jax_platforms", "cpu")
  options = registry.Options(
    index=_INDEX.value,
    tagger=_TAGGER.value,
    beam=shlex.split(_BEAM.value),
    budget=_BUDGET.value,
    output=_OUTPUT.value,
  )
  found = reproduction.run(options)
  # A result of another budget stands beside the one that is published.
  of_another = reproduction.trains and options.budget != "laptop"
  stem = f"{name}_{options.budget}" if of_another else name
  print(result.page(found.as_dict(stem)))
  for path in result.write(found, stem, pathlib.Path(_OUTPUT.value)):
    print(path)


if __name__ == "__main__":
  command.run(main, positional=("NAME",))
