"""A network weakened for guidance: attention that is the identity, blocks left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.models import tokens
from pixsigma_jax.models.conditions import Conditions
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt, laid_out
from tests.sample import models

CONFIG = models.nano()  # its second layer compresses keys and values
GRID = (4, 4)


def output(noisy, unroll=False, **weakened):
  rows = len(noisy)
  place = tokens.coordinates(GRID, CONFIG.window)
  conditions = Conditions(
    coordinates=jnp.tile(place[None], (rows, 1, 1)),
    grid=jnp.tile(jnp.array([GRID]), (rows, 1)),
    timesteps=jnp.full(rows, 300.0),
    caption_mask=jnp.ones((rows, 8), bool),
    caption_embeddings=jnp.ones((rows, 8, CONFIG.caption_width)),
    **{name: jnp.asarray(layers, bool) for name, layers in weakened.items()},
  )
  compute = Compute(dtype=jnp.float32, unroll=unroll)
  params = laid_out(models.random_params(CONFIG), compute)
  model = PixArt(CONFIG, compute)
  return np.asarray(
    model.apply({"params": params}, noisy, conditions, method="on_tokens")
  )


@pytest.fixture(scope="module")
def noisy():
  return jax.random.normal(jax.random.key(0), (2, 16, 12))


@pytest.mark.parametrize("unroll", [False, True])
def test_with_identity_attention_no_token_sees_another(noisy, unroll):
  other = noisy.at[:, 5].add(1.0)
  all_layers = [[True, True], [False, False]]
  before, after = (
    output(x, unroll, identity_attention=all_layers) for x in (noisy, other)
  )
  changed = np.abs(after - before).max(axis=-1) > 1e-6
  assert changed[0].tolist() == [i == 5 for i in range(16)]
  assert changed[1].all()


def test_other_rows_and_layers_stay_as_they_are_to_the_bit(noisy):
  plain = output(noisy)
  none = np.zeros((2, 2), bool)
  np.testing.assert_array_equal(output(noisy, identity_attention=none), plain)
  np.testing.assert_array_equal(output(noisy, skipped=none), plain)
  for name in ("identity_attention", "skipped"):
    one = output(noisy, **{name: [[False, True], [False, False]]})
    np.testing.assert_array_equal(one[1], plain[1])
    assert np.abs(one[0] - plain[0]).max() > 1e-3


def test_in_a_block_that_is_left_out_attention_changes_nothing(noisy):
  def at(value):
    skipped = np.ones((2, 2), bool)
    return output(noisy, skipped=skipped, identity_attention=np.full((2, 2), value))

  np.testing.assert_array_equal(at(False), at(True))
