"""The table that a user asks for, and what is said of the one that is there."""

import json

import pytest

from pixsigma_jax.curate import buckets
from pixsigma_jax.data.buckets import BUCKETS, read_table


def test_a_table_is_made_once_and_then_checked(tmp_path, capsys):
  path = tmp_path / "new" / "table.json"
  buckets.run(path, resolution=512, step=None)
  first, before = capsys.readouterr().out, path.read_bytes()
  assert first.startswith(f"Wrote {path}.\n")
  assert read_table(path).items() >= BUCKETS[512].items()
  buckets.run(path, resolution=512, step=None)
  assert first == f"Wrote {path}.\n" + capsys.readouterr().out
  assert path.read_bytes() == before
  assert "41 sizes for 512 pixels, ratios 0.25 to 4 (height over width)" in first
  assert "1024 tokens" in first
  assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_doubts_are_printed_and_do_not_stop(tmp_path, capsys):
  path = tmp_path / "table.json"
  path.write_text(json.dumps({"1.0": [256, 256], "2.0": [256, 512]}))
  buckets.run(path, resolution=256, step=None)
  out = capsys.readouterr().out
  assert "Doubtful: 2: 256x512 has 200% of the area of 256x256.\n" in out
  assert "Doubtful: 2: 256x512 has the ratio 0.5; ratios are height over width" in out


def test_sizes_that_cannot_be_used_are_an_error(tmp_path):
  path = tmp_path / "table.json"
  path.write_text(json.dumps({"1.0": [250, 250]}))
  with pytest.raises(
    ValueError, match=r"1 of 1 sizes cannot be used\. 1: 250x250: both"
  ):
    buckets.run(path, resolution=256, step=None)
  with pytest.raises(ValueError, match=r"of 41 sizes cannot be used\..* and \d+ more"):
    buckets.run(tmp_path / "other.json", resolution=320, step=20)
  assert not (tmp_path / "other.json").exists()


def test_a_step_for_a_table_that_is_there_is_refused(tmp_path):
  path = tmp_path / "table.json"
  buckets.run(path, resolution=256, step=16)
  with pytest.raises(ValueError, match=r"exists and is only checked.* --step=16"):
    buckets.run(path, resolution=256, step=16)
