"""Table 1: how many nouns captions have, and how long they are."""

import posixpath

from pixsigma_jax.curate import statistics
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table


def run(options: Options) -> Result:
  """Table 1 of an index; errors are those of `statistics.count_index`."""
  assert options.index is not None
  found = statistics.count_index(
    options.index, tagger=options.tagger, beam_options=options.beam
  )
  name = posixpath.basename(options.index.rstrip("/"))
  return Result(
    title="Table 1: statistics of captions",
    setting={"index": name, "images": f"{found.images:,}", "tagger": found.tagger},
    tables=(
      Table("Ours", statistics.HEADER, statistics.table_rows(found, name)),
      Table("The paper's table 1", statistics.HEADER, statistics.PAPER),
    ),
    remarks=statistics.remarks(found),
    data=statistics.as_dict(found),
  )
