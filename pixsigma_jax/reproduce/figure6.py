"""Figure 6: the histogram of caption lengths."""

import posixpath

from pixsigma_jax.curate import statistics
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table

_SHARES = (0.1, 0.5, 0.9)


def run(options: Options) -> Result:
  """Figure 6 of an index; errors are those of `statistics.count_index`."""
  assert options.index is not None
  found = statistics.count_index(
    options.index, tagger=options.tagger, beam_options=options.beam
  )
  name = posixpath.basename(options.index.rstrip("/"))
  rows = [
    (
      f"{name}, {kind}",
      f"{counts.captions:,}",
      f"{counts.average_length:.1f}",
      *(str(statistics.quantile(counts.lengths, share)) for share in _SHARES),
    )
    for kind, counts in sorted(found.kinds.items())
  ]
  header = ("Captions", "Number", "ACL", "10 %", "median", "90 %")
  # The figure draws a million of each; its averages stand in table 1, too.
  paper = [(f"{row[0]}, {row[2]}", row[1], row[5]) for row in statistics.PAPER]
  return Result(
    title="Figure 6: how long captions are",
    setting={"index": name, "images": f"{found.images:,}"},
    tables=(
      Table("Ours, in words", header, rows),
      Table("The paper's", ("Captions", "Images", "ACL"), paper),
    ),
    remarks=("ACL is the average caption length in words.",),
    data=statistics.as_dict(found),
    plot=statistics.draw_lengths(found),
  )
