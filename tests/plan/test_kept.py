"""What the paper's stages take, against the numbers that `benchmarks.keep_plans` kept.

A change that needs more memory, arithmetic or communication fails here. If it is meant
to: `python -m benchmarks.keep_plans`, and say so in the commit.
"""

import json

import jax
import pytest

from benchmarks import keep_plans

KEPT = json.loads(keep_plans.KEPT.read_text(encoding="utf-8"))
MORE = 1.03  # what a change may cost unnoticed


def grown(have, kept):
  assert set(have) == set(kept)
  return {
    name: (kept[name], have[name]) for name in have if have[name] > MORE * kept[name]
  }


@pytest.mark.parametrize("name", keep_plans.STAGES)
def test_a_stage_of_full_size_takes_no_more_than_it_did(name):
  assert grown(keep_plans.analytic(name), KEPT["stages"][name]["full size"]) == {}


@pytest.mark.parametrize("name", keep_plans.STAGES)
def test_a_stage_compiled_in_miniature_takes_no_more_than_it_did(name, libtpu):
  if libtpu != KEPT["libtpu"]:
    pytest.skip(f"kept of what libtpu {KEPT['libtpu']} makes, and this is {libtpu}")
  with jax.default_matmul_precision(None):  # as it is outside the suite
    have = keep_plans.compiled(name)
  assert grown(have, KEPT["stages"][name]["miniature"]) == {}


def test_growth_beyond_what_is_allowed_is_named():
  assert grown({"bytes": 103.1, "flops": 1.0}, {"bytes": 100.0, "flops": 2.0}) == {
    "bytes": (100.0, 103.1)
  }
