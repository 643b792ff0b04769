"""Tables of sizes, against the peers' and their own promises."""

import pytest
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma
from hypothesis import given
from hypothesis import strategies as st

from pixsigma_jax.data.buckets import BUCKETS, nearest, sampling_buckets


@pytest.mark.parametrize(
  ("resolution", "table"),
  [
    (256, alpha.ASPECT_RATIO_256_BIN),
    (512, alpha.ASPECT_RATIO_512_BIN),
    (1024, alpha.ASPECT_RATIO_1024_BIN),
    (2048, sigma.ASPECT_RATIO_2048_BIN),
  ],
)
def test_sizes_to_draw_are_those_of_diffusers(resolution, table):
  expected = {float(k): tuple(map(int, size)) for k, size in table.items()}
  assert sampling_buckets(resolution) == expected


@pytest.mark.parametrize("resolution", BUCKETS)
def test_a_table_holds_forty_ratios_of_nearly_one_area(resolution):
  table = BUCKETS[resolution]
  assert len(table) == 40
  assert table[1.0] == (resolution, resolution)
  for ratio, (height, width) in table.items():
    assert height % 16 == width % 16 == 0
    # Published ratios are cut to two digits; that of 5760 x 1408 is called 4.0.
    assert abs(height / width - ratio) < 0.023 * max(1, ratio)
    assert 0.87 < height * width / resolution**2 < 1.06


@given(st.sampled_from(list(BUCKETS)), st.integers(64, 9000), st.integers(64, 9000))
def test_no_other_bucket_is_nearer(resolution, height, width):
  table = BUCKETS[resolution]
  chosen = nearest(table, height, width)
  (ratio,) = (known for known, bucket in table.items() if bucket == chosen)
  assert all(abs(ratio - height / width) <= abs(k - height / width) for k in table)


def test_a_resolution_without_a_table_is_refused():
  with pytest.raises(ValueError, match="no table of sizes for 700 pixels, only for"):
    sampling_buckets(700)
