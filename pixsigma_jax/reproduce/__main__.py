"""The paper's tables and figures, its numbers beside ours.

  python -m pixsigma_jax.reproduce table4 --output=runs/reproduce
  python -m pixsigma_jax.reproduce table3d --output=runs/reproduce
  python -m pixsigma_jax.reproduce table1 --index=INDEX --output=runs/reproduce
  python -m pixsigma_jax.reproduce figure6 --index=INDEX --output=runs/reproduce

Prints a page, and writes it as NAME.md, its numbers as NAME.json, and a plot, where it
has one, as NAME.png into one folder.
"""

import pathlib
import shlex

import jax
from absl import flags, logging

from pixsigma_jax import command
from pixsigma_jax.reproduce import registry, result

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to.", required=True)
_INDEX = flags.DEFINE_string("index", None, "An index of `curate`, with captions.")
_TAGGER = flags.DEFINE_string(
  "tagger", "rules", "What finds the nouns: rules, nltk or spacy:MODEL."
)
_BEAM = flags.DEFINE_string("beam", "", "Options of Apache Beam, such as --runner=…")


def main(arguments: list[str]) -> None:
  """Entry point; flags are parsed."""
  logging.set_verbosity(logging.INFO)
  (name,) = arguments
  reproduction = registry.find(name)
  logging.info("%s takes %s.", name, reproduction.takes)
  # Whatever accelerator is here is not asked: plans are for machines elsewhere.
  jax.config.update("jax_platforms", "cpu")
  options = registry.Options(
    index=_INDEX.value, tagger=_TAGGER.value, beam=shlex.split(_BEAM.value)
  )
  found = reproduction.run(options)
  print(result.page(found.as_dict(name)))
  for path in result.write(found, name, pathlib.Path(_OUTPUT.value)):
    print(path)


if __name__ == "__main__":
  command.run(main, positional=("NAME",))
