"""What is printed of a transform: nothing that is not so, and nothing left out."""

import dataclasses

from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.transform.report import report
from pixsigma_jax.transforms import Model, add_kv_compression
from tests.sample import models

CONFIG = models.nano(kv_compression=KVCompression())
HAVE = Model(
  config=CONFIG,
  params=models.random_params(CONFIG),
  null_caption=models.null_caption(CONFIG),
  metadata=models.metadata(CONFIG),
)


def with_params(**parts):
  return dataclasses.replace(HAVE, params={**HAVE.params, **parts})


def test_of_the_same_model_there_is_nothing_to_say_but_how_much_is_shared():
  assert report(HAVE, HAVE) == [
    "30 leaves: 30 shared, 0 copied as they were, 0 others; "
    "109,416 → 109,416 parameters"
  ]


def test_a_copy_is_not_a_change_and_a_change_is_no_copy():
  table = HAVE.params["scale_shift_table"]
  copied = report(HAVE, with_params(scale_shift_table=table + 0))
  assert copied == [
    "30 leaves: 29 shared, 1 copied as they were, 0 others; "
    "109,416 → 109,416 parameters"
  ]
  line, counts = report(HAVE, with_params(scale_shift_table=table.at[1, 2].add(0.5)))
  assert line.startswith("~ scale_shift_table float32[2, 48], norm ")
  assert line.endswith(" changed by 0.5")
  assert counts.startswith("30 leaves: 29 shared, 0 copied as they were, 1 others")


def test_a_layer_that_changed_while_stacks_were_cut_is_not_passed_over():
  config, params = add_kv_compression(
    CONFIG, HAVE.params, ratio=4, layers=(1,), operator="average"
  )
  stack = params["blocks_01_01"]
  changed = {**stack, "scale_shift_table": stack["scale_shift_table"] + 1}
  want = dataclasses.replace(
    HAVE, config=config, params={**params, "blocks_01_01": changed}
  )
  lines = report(HAVE, want)
  assert [line.split(", norm")[0] for line in lines if line[0] in "=-+~"] == [
    "= blocks_00_01 → blocks_00_00, blocks_01_01: 14 leaves regrouped, "
    "every layer as it was",
    "- blocks_00_01/scale_shift_table float32[2, 6, 48]",
    "+ blocks_00_00/scale_shift_table float32[1, 6, 48]",
    "+ blocks_01_01/scale_shift_table float32[1, 6, 48]",
  ]
