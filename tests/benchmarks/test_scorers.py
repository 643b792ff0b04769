"""The benchmark of scorers' networks, at a size of milliseconds."""

import pytest

from benchmarks.scorer_networks import (
  NETWORKS,
  Network,
  clip_config,
  compiled_for,
  inputs_of,
  of_ours,
  rates,
)
from pixsigma_jax.models.clip import abstract_clip_params
from pixsigma_jax.plan import topology
from tests.evaluate.networks import small_inception  # noqa: F401

TINY = clip_config((32, 2, 4), (16, 2, 2), 8, 32)


def count(leaves):
  if isinstance(leaves, dict):
    return sum(map(count, leaves.values()))
  return leaves.size


def test_what_is_timed_has_the_published_sizes():
  # Parameters of both towers by transformers, but for the logit's scale.
  for name, total in (("CLIP-B/32", 151277313), ("CLIP-L/14", 427616513)):
    config = NETWORKS[name].config
    both = [abstract_clip_params(config, tower) for tower in ("image", "text")]
    assert count(both[0]) + count(both[1]) + 1 == total


@pytest.mark.parametrize("tower", ["image", "text"])
def test_clip_runs_on_both_sides(tower):
  network = Network(TINY, tower)
  shapes = [
    tuple((side() if i == 0 else side().pooler_output).shape)
    for i, side in enumerate([of_ours(network, inputs_of(network, 2))])
  ]
  assert shapes == [(2, 16)]
  found = rates(network, 2, rounds=1, runs=2)
  assert [len(side) for side in found] == [2, 2]
  assert min(map(min, found)) > 0


def test_inception_runs(small_inception):  # noqa: F811
  network = NETWORKS["Inception-v3"]
  features, probabilities = of_ours(network, inputs_of(network, 1))()
  assert (features.shape, probabilities.shape) == ((1, 2048), (1, 1000))


def test_a_chip_holds_the_weights_and_takes_no_less_than_its_peaks_allow(libtpu):
  network, batch = Network(TINY), 2
  made = compiled_for(network, batch, topology.parse("v5e:1x1"))
  weights = count(abstract_clip_params(TINY, "image"))
  assert made.parameters == 4 * weights
  assert made.total > made.parameters
  # Each weight of a layer multiplies each of the 17 tokens once; attention's products
  # and elementwise work come on top.
  layers = 2 * (4 * 32**2 + 2 * 32 * 128)
  assert 2 * 17 * layers < made.flops < 3 * 2 * 17 * layers
  assert made.cycles is None or made.cycles > 0
  assert made.roofline > made.parameters / topology.parse("v5e:1x1").chip.bandwidth
