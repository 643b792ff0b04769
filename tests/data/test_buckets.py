"""Tables of sizes, against the peers' and their own promises."""

import json

import pytest
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma
from hypothesis import given
from hypothesis import strategies as st

from pixsigma_jax.data.buckets import (
  BUCKETS,
  Bucket,
  check,
  generate,
  nearest,
  read_table,
  sampling_buckets,
  table_text,
)


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


@pytest.mark.parametrize("resolution", [256, 512, 1024, 2048, 4096])
def test_the_published_tables_are_generated_but_for_one_size(resolution):
  table = generate(resolution)
  assert table.pop(1.91) == (21 * resolution // 16, 11 * resolution // 16)
  assert list(table.items()) == list(BUCKETS[resolution].items())


def test_2880_is_256_scaled_and_rounded_down_but_for_two_sizes():
  units = [(h // 16, w // 16) for h, w in BUCKETS[256].values()]
  scaled = [Bucket(64 * (45 * h // 16), 64 * (45 * w // 16)) for h, w in units]
  other = [
    (ours, size)
    for ours, size in zip(scaled, BUCKETS[2880].values(), strict=True)
    if ours != size
  ]
  assert other == [
    ((33 * 64, 59 * 64), (33 * 64, 60 * 64)),
    ((59 * 64, 33 * 64), (60 * 64, 33 * 64)),
  ]


@given(
  st.integers(2, 40), st.integers(1, 64).map(lambda n: 16 * n), st.floats(1.0, 9.0)
)
def test_a_generated_table_keeps_its_promises(count, step, largest_ratio):
  resolution = count * step
  table = generate(resolution, step, largest_ratio=largest_ratio)
  assert list(table) == sorted(table)
  assert len(set(table.values())) == len(table)
  assert Bucket(resolution, resolution) in table.values()
  for size in table.values():
    assert size.height % step == size.width % step == 0
    assert 0.9 <= size.height * size.width / resolution**2 <= 1
    assert max(size) <= largest_ratio * min(size)
    # An image of that size finds it.
    assert nearest(table, *size) == size
    # High and wide alike.
    assert Bucket(size.width, size.height) in table.values()
  found = check(table, resolution)
  assert (found.unusable, found.doubtful) == ((), ())
  assert found.longest_sequence <= (resolution // 16) ** 2
  assert 0 <= found.padding_share <= 0.1


def test_finer_steps_give_more_sizes_with_ratios_told_apart():
  assert len(generate(1024, 32)) > 3 * len(generate(1024))
  assert 1.0 in generate(1024, 16)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((1000, 64), "1000 pixels cannot be cut in steps of 64"),
    ((8, None), "8 pixels cannot be cut in steps of 0"),
    ((256, -16), "256 pixels cannot be cut in steps of -16"),
  ],
)
def test_a_step_that_does_not_fit_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    generate(*arguments)
  with pytest.raises(ValueError, match=r"largest_ratio 0\.5 must be"):
    generate(256, largest_ratio=0.5)


def test_published_tables_are_usable_and_their_oddities_are_named():
  for resolution in (256, 512, 1024, 2048, 4096):
    found = check(BUCKETS[resolution], resolution)
    assert (found.unusable, found.doubtful) == ((), ())
    assert found.longest_sequence == (resolution // 16) ** 2
  # The sizes' mean area at 256 is 94.9 % of the square's.
  assert 0.04 < check(BUCKETS[256], 256).padding_share < 0.07
  found = check(BUCKETS[2880], 2880)
  assert found.unusable == ()
  assert any("0.28: 1408x5184 has 88% of the area" in line for line in found.doubtful)
  assert (
    "0.26: 1408x5568 has the ratio 0.253: images of this shape go to 1408x5760."
    in found.doubtful
  )


def test_what_cannot_be_cut_into_tokens_is_named():
  table = {1.0: Bucket(256, 256), 0.5: Bucket(176, 360)}
  found = check(table, 256)
  assert found.unusable == (
    "0.5: 176x360: both sides must be multiples of 16 = 8 (pixels to a latent) x 2 "
    "(latents to a token).",
  )
  assert check(table, 256, patch_size=1).unusable == ()


def test_a_table_by_width_over_height_is_noticed():
  found = check({2.0: Bucket(176, 352), 1.0: Bucket(256, 256)}, 256)
  (line,) = found.doubtful
  assert line == "2: 176x352 has the ratio 0.5; ratios are height over width."


@pytest.mark.parametrize("resolution", BUCKETS)
def test_a_table_is_read_as_it_was_written(resolution, tmp_path):
  path = tmp_path / "table.json"
  path.write_text(table_text(BUCKETS[resolution]))
  assert list(read_table(path).items()) == list(BUCKETS[resolution].items())
  assert len(json.loads(path.read_text())) == 40


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "it is no object"),
    ('[["1.0", [16, 16]]]', "it is no object"),
    ("{}", "it is empty"),
    ('{"wide": [16, 32]}', "'wide' is no ratio"),
    ('{"-1": [16, 32]}', "'-1' is no ratio"),
    ('{"nan": [16, 32]}', "'nan' is no ratio"),
    ('{"1": [16]}', r"'1' has \[16\], not \[HEIGHT, WIDTH\]"),
    ('{"1": [16, 0]}', r"'1' has \[16, 0\]"),
    ('{"1": [16, 16.5]}', r"'1' has \[16, 16.5\]"),
    ('{"1": [true, 16]}', r"'1' has \[True, 16\]"),
    ('{"1": {"h": 16}}', "'1' has "),
    ('{"1": [16, 16], "1.0": [32, 32]}', "the ratio 1.0 is there twice"),
  ],
)
def test_what_is_no_table_is_refused(text, message, tmp_path):
  (tmp_path / "table.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    read_table(tmp_path / "table.json")


def test_a_table_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="no table of sizes at"):
    read_table(tmp_path / "table.json")
