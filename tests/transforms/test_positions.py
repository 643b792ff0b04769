"""From one resolution to the next: two numbers change, no parameter does."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.models import positions, tokens
from pixsigma_jax.transforms import extend_pe, interpolate_pe
from tests.sample import models

# The middle of a chain: its field was made finer before.
CONFIG = models.nano(base_size=8, pe_interpolation=0.5)
PARAMS = {"blocks": {"kernel": np.arange(6.0)}, "out": {"bias": np.ones(2)}}


def field(config, grid):
  """The field of positions of an (h, w) image, as `[h w d]`."""
  places = tokens.coordinates(grid, (1, 1))
  codes = positions.sincos_2d(
    jnp.asarray(places)[None],
    jnp.asarray([grid], jnp.int32),
    config.width,
    base_size=config.base_size,
    pe_interpolation=config.pe_interpolation,
  )
  return np.asarray(codes).reshape(*grid, config.width)


@pytest.mark.parametrize("transform", [interpolate_pe, extend_pe])
def test_every_parameter_is_handed_on_as_it_is(transform):
  before = dataclasses.replace(CONFIG)
  config, params = transform(CONFIG, PARAMS, base_size=16)
  assert params is PARAMS
  assert before == CONFIG
  changed = {"base_size": 16, "pe_interpolation": config.pe_interpolation}
  assert config == dataclasses.replace(CONFIG, **changed)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)], ids=["square", "wide"])
def test_even_positions_of_a_doubled_grid_are_the_old_field_exactly(grid):
  config, _ = interpolate_pe(CONFIG, PARAMS, base_size=16)
  fine = field(config, (2 * grid[0], 2 * grid[1]))
  np.testing.assert_array_equal(fine[::2, ::2], field(CONFIG, grid))
  assert (fine[1::2, 1::2] != fine[::2, ::2]).any(axis=-1).all()


@pytest.mark.parametrize("base_size", [2, 12, 16, 20])
def test_interpolation_keeps_the_span(base_size):
  config, _ = interpolate_pe(CONFIG, PARAMS, base_size=base_size)
  span = config.base_size / config.pe_interpolation
  assert span == pytest.approx(CONFIG.base_size / CONFIG.pe_interpolation, rel=1e-15)


def test_interpolating_twice_is_interpolating_once():
  there, _ = interpolate_pe(*interpolate_pe(CONFIG, PARAMS, base_size=16), base_size=32)
  assert there == interpolate_pe(CONFIG, PARAMS, base_size=32)[0]
  back, _ = interpolate_pe(there, PARAMS, base_size=8)
  assert back == CONFIG


def test_extension_keeps_the_spacing_and_goes_on_beyond_the_old_edge():
  config, _ = extend_pe(CONFIG, PARAMS, base_size=16)
  large = field(config, (16, 16))
  np.testing.assert_array_equal(large[:8, :8], field(CONFIG, (8, 8)))


@pytest.mark.parametrize("transform", [interpolate_pe, extend_pe])
@pytest.mark.parametrize("base_size", [0, -16])
def test_a_grid_without_tokens_is_refused(transform, base_size):
  with pytest.raises(ValueError, match=f"base_size {base_size} must be at least 1"):
    transform(CONFIG, PARAMS, base_size=base_size)
