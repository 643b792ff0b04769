"""The loss of a batch: what is drawn, for whom, and from which key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.diffusion import process
from pixsigma_jax.diffusion.loss import iddpm_loss
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.models import tokens
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArt
from pixsigma_jax.train import loss as module
from pixsigma_jax.train.loss import (
  beta_probabilities,
  check_aspect,
  make_loss,
  timestep_probabilities,
)
from tests.sample import models

SCHEDULE = linear_schedule()
CONFIG = models.nano()
NULL = jnp.full((CONFIG.caption_length, CONFIG.caption_width), -7.0)
MANY = 20_000  # rows, where chances are counted


def batch_of(rows, grid=(2, 2), length=None, moments=False, caption=(8, 16)):
  """The given rows of an endless batch; each row's contents depend on the row alone."""
  n = grid[0] * grid[1]
  length = length or n

  def values(row, *shape):
    return np.random.default_rng([9, row]).normal(size=shape)

  latents = np.stack([values(row, n, 24 if moments else 12) for row in rows])
  latents = np.pad(latents, ((0, 0), (0, length - n), (0, 0)), constant_values=5.0)
  places = np.zeros((len(rows), length, 2), np.int32)
  places[:, :n] = tokens.coordinates(grid, CONFIG.window)
  batch = {
    "latent_moments" if moments else "latents": latents.astype(np.float16),
    "coordinates": places,
    "grid": np.tile(np.array([grid], np.int32), (len(rows), 1)),
    "caption_embeddings": np.stack([values(row, *caption) for row in rows]),
    "caption_mask": np.arange(caption[0])[None] <= np.array(rows)[:, None] % 8,
    "row": np.array(rows, np.int32),
    "original_size": np.stack([values(row, 2) for row in rows]).astype(np.float32),
    "aspect_ratio": np.array(rows, np.float32),
  }
  batch["caption_embeddings"] = batch["caption_embeddings"].astype(np.float16)
  return jax.tree.map(jnp.asarray, batch)


def crowd(latents=0.0):
  """MANY rows, one token and one caption token each."""
  batch = {
    "latents": np.full((MANY, 1, 12), latents, np.float32),
    "coordinates": np.zeros((MANY, 1, 2), np.int32),
    "grid": np.ones((MANY, 2), np.int32),
    "caption_embeddings": np.zeros((MANY, 1, 1), np.float16),
    "caption_mask": np.ones((MANY, 1), bool),
    "row": np.arange(MANY, dtype=np.int32),
  }
  return jax.tree.map(jnp.asarray, batch)


@pytest.fixture
def watch(monkeypatch, key):
  """Runs the loss with a network that predicts 0; returns all that anyone saw."""
  seen = {}

  def network(self, variables, noisy, conditions, *, method, rngs):
    assert method == "on_tokens"
    seen["network"] = vars(conditions) | {"noisy": noisy, "rngs": rngs}
    rows, length, channels = noisy.shape
    return jnp.zeros((rows, length, 2 * channels))

  def compare(schedule, **inputs):
    seen.update(inputs)
    return iddpm_loss(schedule, **inputs)

  monkeypatch.setattr(PixArt, "apply", network)
  monkeypatch.setattr(module, "iddpm_loss", compare)

  def run(batch, key=key, null_caption=NULL, config=CONFIG, **fields):
    settings = {
      "scaling_factor": 1.0,
      "caption_dropout": 0.0,
      "snr_switch": False,
      "min_snr_gamma": None,
      "snr_shift": 1.0,
      "timestep_beta": None,
      "timestep_range": (0, 999),
      "frequency_weight": 0.0,
      "frequency_gamma": 1.0,
      "wavelet_offset": None,
    }
    loss = make_loss(PixArt(config, models.FLOAT32), SCHEDULE, **(settings | fields))
    seen["mean"], seen["per_example"] = loss({}, null_caption, batch, key)
    return dict(seen)

  return run


def test_what_a_row_draws_depends_on_neither_order_nor_size_nor_padding(watch):
  for moments in (False, True):
    settings = {"caption_dropout": 0.5, "scaling_factor": 0.5}
    alone = watch(batch_of([0, 1, 2, 3], moments=moments), **settings)
    other = watch(batch_of([3, 1], length=7, moments=moments), **settings)
    for name in ("noise", "latents", "noisy_latents"):
      np.testing.assert_array_equal(
        other[name][:, :4], alone[name][jnp.array([3, 1])], err_msg=name
      )
    np.testing.assert_array_equal(
      other["timesteps"], alone["timesteps"][jnp.array([3, 1])]
    )
    np.testing.assert_array_equal(
      other["network"]["caption_embeddings"],
      alone["network"]["caption_embeddings"][jnp.array([3, 1])],
    )
    np.testing.assert_allclose(
      other["per_example"]["loss"],
      alone["per_example"]["loss"][jnp.array([3, 1])],
      rtol=1e-6,
    )


def test_every_row_every_token_and_every_key_has_its_own_noise(watch):
  batch = batch_of(range(4), moments=True)
  first = watch(batch)
  second = watch(batch, key=jax.random.key(1))
  for name in ("noise", "latents"):
    drawn = np.concatenate([np.ravel(first[name]), np.ravel(second[name])])
    assert len(np.unique(drawn)) == drawn.size, name
  assert (first["timesteps"] != second["timesteps"]).any()


def test_noise_and_posterior_are_standard_normal_and_drawn_apart(watch):
  batch = crowd()
  batch["latent_moments"] = jnp.zeros((MANY, 1, 24))  # mean 0, log-variance 0
  del batch["latents"]
  seen = watch(batch, caption_dropout=0.5)
  timesteps = np.asarray(seen["timesteps"], np.float64)
  dropped = np.asarray(seen["network"]["caption_embeddings"] == -7).mean(axis=(1, 2))
  draws = {
    "noise": np.asarray(seen["noise"], np.float64)[:, 0],
    "posterior": np.asarray(seen["latents"], np.float64)[:, 0],
  }
  for name, draw in draws.items():
    error = 5 / np.sqrt(draw.size)  # five standard errors
    assert abs(draw.mean()) < error, name
    assert abs(draw.var() - 1) < 1.5 * error, name
  # No draw tells anything of another: a key used twice would.
  columns = [draws["noise"], draws["posterior"], timesteps[:, None], dropped[:, None]]
  correlation = np.corrcoef(np.concatenate(columns, axis=1), rowvar=False)
  assert np.abs(correlation - np.eye(26)).max() < 6 / np.sqrt(MANY)


def test_timesteps_are_uniform_from_0_to_999(watch):
  timesteps = np.asarray(watch(crowd())["timesteps"])
  assert timesteps.dtype == np.int32
  assert (timesteps.min(), timesteps.max()) == (0, 999)
  counts = np.histogram(timesteps, bins=10, range=(0, 1000))[0]
  assert np.abs(counts - MANY / 10).max() < 5 * np.sqrt(MANY * 0.1 * 0.9)


def test_a_shift_of_1_draws_what_is_drawn_without(watch):
  found = watch(batch_of(range(4)))["timesteps"]
  # As issue 2 pinned them: the third of four keys of a row's key, 0 … 999.
  keys = [
    jax.random.split(jax.random.fold_in(jax.random.split(jax.random.key(0))[0], row), 4)
    for row in range(4)
  ]
  expected = [int(jax.random.randint(k[2], (), 0, 1000)) for k in keys]
  assert found.tolist() == expected
  even = timestep_probabilities(SCHEDULE, 1.0)
  np.testing.assert_allclose(even, 1e-3, rtol=1e-9)


@pytest.mark.parametrize("shift", [2.0, 4.0, 0.5])
def test_a_shift_moves_the_density_of_log_snr_and_cuts_what_is_beyond(watch, shift):
  """Against even draws of a continuous time, moved one by one."""
  times = (np.arange(2_000_000) + 0.5) / 2000
  centers = np.arange(1000) + 0.5
  log_snr = np.log(SCHEDULE.snr)
  moved = np.interp(times, centers, log_snr) - 2 * np.log(shift)
  there = np.interp(-moved, -log_snr, centers, left=-1.0, right=-1.0)
  there = there[(there > 0) & (there < 1000)]
  counts = np.histogram(there, bins=20, range=(0, 1000))[0] / len(there)
  probabilities = timestep_probabilities(SCHEDULE, shift).reshape(20, 50).sum(axis=1)
  # np.interp goes on flat for half a timestep at either end: 1e-3 of the draws.
  np.testing.assert_allclose(probabilities, counts, atol=2e-3)

  drawn = np.asarray(watch(crowd(), snr_shift=shift)["timesteps"])
  assert drawn.dtype == np.int32
  shares = np.histogram(drawn, bins=20, range=(0, 1000))[0] / MANY
  error = 5 * np.sqrt(probabilities * (1 - probabilities) / MANY) + 1e-9
  assert (np.abs(shares - probabilities) <= error).all()
  # Towards noise above 1, towards the image below, and no heap at the end.
  assert (drawn.mean() > 500) == (shift > 1)
  assert np.bincount(drawn, minlength=1000)[999] < 0.01 * MANY


@pytest.mark.parametrize(("shift", "message"), [(0.0, "must be above 0"), (1e9, "out")])
def test_a_shift_that_leaves_nothing_is_refused(shift, message):
  with pytest.raises(ValueError, match=f"snr_shift={shift}.* {message}"):
    timestep_probabilities(SCHEDULE, shift)


@pytest.mark.parametrize("chance", [0.0, 0.1, 1.0])
def test_captions_drop_with_their_probability(watch, chance):
  null_caption = jnp.full((1, 1), -7.0)
  seen = watch(crowd(), null_caption=null_caption, caption_dropout=chance)
  share = float(jnp.mean(seen["network"]["caption_embeddings"] == -7.0))
  assert abs(share - chance) <= 5 * np.sqrt(chance * (1 - chance) / MANY)


def test_a_dropped_caption_is_the_null_caption_under_the_captions_own_mask(watch):
  batch = batch_of(range(4))
  network = watch(batch, caption_dropout=0.5)["network"]
  np.testing.assert_array_equal(network["caption_mask"], batch["caption_mask"])
  own = batch["caption_embeddings"].astype(jnp.float32)
  kept = (network["caption_embeddings"] == own).all(axis=(1, 2))
  null = (network["caption_embeddings"] == NULL[None]).all(axis=(1, 2))
  np.testing.assert_array_equal(kept, ~null)
  assert 0 < kept.sum() < 4


def test_latents_are_mean_plus_deviation_times_a_draw_pixel_by_pixel(watch):
  batch = batch_of(range(4))
  mean, log_variance = (
    np.random.default_rng(seed).normal(size=(4, 4, 2, 2, 3)) for seed in (1, 2)
  )

  def drawn(mean, log_variance, **fields):
    # Token order (p q 2c): each pixel has its means, then its log-variances.
    moments = np.concatenate([mean, log_variance], axis=-1).reshape(4, 4, 24)
    stored = {**batch, "latent_moments": jnp.asarray(moments, jnp.float32)}
    del stored["latents"]
    return watch(stored, **fields)["latents"]

  zero = np.zeros_like(mean)
  unit = np.asarray(drawn(zero, zero)).reshape(mean.shape)
  expected = 0.25 * (mean + np.exp(log_variance / 2) * unit)
  found = drawn(mean, log_variance, scaling_factor=0.25)
  np.testing.assert_allclose(found, expected.reshape(4, 4, 12), rtol=1e-5, atol=1e-6)


def test_a_log_variance_beyond_the_published_bounds_is_cut_there(watch):
  batch = batch_of(range(4))
  del batch["latents"]

  def drawn(log_variance):
    pixel = np.array([0.0] * 3 + [log_variance] * 3, np.float32)
    stored = {**batch, "latent_moments": jnp.tile(pixel, (4, 4, 4))}
    return watch(stored)["latents"]

  np.testing.assert_array_equal(drawn(60.0), drawn(20.0))
  np.testing.assert_array_equal(drawn(-90.0), drawn(-30.0))


def test_stored_latents_are_scaled_and_noised_as_the_schedule_says(watch):
  batch = batch_of(range(4))
  seen = watch(batch, scaling_factor=0.125)
  np.testing.assert_array_equal(seen["latents"], batch["latents"] / jnp.float16(8))
  expected = process.add_noise(
    SCHEDULE, seen["latents"], seen["noise"], seen["timesteps"]
  )
  np.testing.assert_array_equal(seen["network"]["noisy"], expected)
  np.testing.assert_array_equal(seen["network"]["noisy"], seen["noisy_latents"])
  for name in ("timesteps", "coordinates", "grid"):
    wanted = seen["timesteps"] if name == "timesteps" else batch[name]
    np.testing.assert_array_equal(seen["network"][name], wanted)


def test_the_loss_is_the_mean_over_rows_and_padding_is_left_out(watch):
  batch = batch_of(range(4), length=7)
  seen = watch(batch)
  np.testing.assert_allclose(seen["mean"], seen["per_example"]["loss"].mean(), 1e-6)
  # The network of this test predicts 0: the error is the noise of the 4 real tokens.
  expected = jnp.square(seen["noise"][:, :4]).mean(axis=(1, 2))
  np.testing.assert_allclose(seen["per_example"]["mse"], expected, rtol=1e-5)
  np.testing.assert_array_equal(seen["per_example"]["timesteps"], seen["timesteps"])
  spoilt = {**batch, "latents": batch["latents"].at[:, 4:].set(jnp.nan)}
  np.testing.assert_array_equal(watch(spoilt)["mean"], seen["mean"])


def test_timesteps_by_a_beta_distribution_have_its_shares(watch):
  """Beta(2, 4): the integral of 20 x (1 - x)^3, by hand."""
  edges = np.linspace(0, 1, 21)
  cdf = 10 * edges**2 - 20 * edges**3 + 15 * edges**4 - 4 * edges**5
  probabilities = beta_probabilities(SCHEDULE, (2.0, 4.0))
  np.testing.assert_allclose(
    probabilities.reshape(20, 50).sum(axis=1), np.diff(cdf), atol=1e-12
  )
  drawn = np.asarray(watch(crowd(), timestep_beta=(2.0, 4.0))["timesteps"])
  shares = np.histogram(drawn, bins=20, range=(0, 1000))[0] / MANY
  error = 5 * np.sqrt(np.diff(cdf) * (1 - np.diff(cdf)) / MANY) + 1e-9
  assert (np.abs(shares - np.diff(cdf)) <= error).all()
  np.testing.assert_allclose(beta_probabilities(SCHEDULE, (1.0, 1.0)), 1e-3, rtol=1e-9)


@pytest.mark.parametrize(
  "fields", [{}, {"snr_shift": 2.0}, {"timestep_beta": (2.0, 4.0)}], ids=str
)
def test_a_range_of_timesteps_leaves_the_shares_within_it_and_none_outside(
  watch, fields
):
  whole = np.asarray(watch(crowd(), **fields)["timesteps"])
  drawn = np.asarray(watch(crowd(), timestep_range=(400, 599), **fields)["timesteps"])
  assert (drawn.min(), drawn.max()) == (400, 599)
  within = whole[(whole >= 400) & (whole <= 599)]
  shares, expected = (
    np.histogram(steps, bins=4, range=(400, 600))[0] / len(steps)
    for steps in (drawn, within)
  )
  np.testing.assert_allclose(shares, expected, atol=5 / np.sqrt(len(within)))


def test_a_range_of_timesteps_is_kept_by_a_batch_of_one(watch):
  for row in range(32):
    (timestep,) = watch(batch_of([row]), timestep_range=(996, 999))["timesteps"]
    assert 996 <= timestep <= 999
  (timestep,) = watch(batch_of([0]), timestep_range=(0, 0))["timesteps"]
  assert timestep == 0


def test_the_whole_range_draws_what_was_drawn_without_one(watch, key):
  """By hand, as it was before there was a range."""
  row_keys = [jax.random.fold_in(jax.random.split(key)[0], row) for row in range(8)]
  expected = [
    jax.random.randint(jax.random.split(row_key, 4)[2], (), 0, 1000)
    for row_key in row_keys
  ]
  np.testing.assert_array_equal(watch(batch_of(range(8)))["timesteps"], expected)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"timestep_range": (0, 1000)}, r"range=\(0, 1000\) must lie in 0 … 999"),
    ({"timestep_range": (600, 400)}, "the lower end first"),
    ({"timestep_range": (0, 5), "snr_shift": 4.0}, "no timestep that loss.snr_shift"),
  ],
)
def test_a_range_that_leaves_no_timestep_is_refused(watch, fields, message):
  with pytest.raises(ValueError, match=message):
    watch(batch_of([0]), **fields)


def test_weights_of_one_are_the_plain_loss_to_the_bit(watch):
  plain = watch(batch_of(range(4), length=7))["per_example"]
  for fields in ({"frequency_weight": 0.0}, {"wavelet_offset": 1.0}):
    same = watch(batch_of(range(4), length=7), **fields)["per_example"]
    for name in ("loss", "mse", "vb"):
      np.testing.assert_array_equal(same[name], plain[name], err_msg=name)


def test_padding_and_its_coordinates_change_no_weighted_loss(watch):
  for fields in ({"frequency_weight": 2.0}, {"wavelet_offset": 0.3}):
    alone = watch(batch_of(range(4)), **fields)["per_example"]["mse"]
    batch = batch_of(range(4), length=7)
    batch["latents"] = batch["latents"].at[:, 4:].set(jnp.nan)
    batch["coordinates"] = batch["coordinates"].at[:, 4:].set(1)
    padded = watch(batch, **fields)["per_example"]["mse"]
    # Of frequencies there are more on the larger canvas: the same integral, of which
    # an image of four tokens is a coarse sample.
    rtol = 1e-6 if "wavelet_offset" in fields else 1e-4
    np.testing.assert_allclose(padded, alone, rtol=rtol)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"snr_shift": 2.0, "timestep_beta": (2.0, 4.0)}, "both say how timesteps"),
    ({"frequency_weight": 1.0, "wavelet_offset": 0.3}, "both weigh detail"),
    (
      {"wavelet_offset": 0.3, "config": dataclasses.replace(CONFIG, patch_size=1)},
      "patch size is 1",
    ),
  ],
)
def test_losses_that_do_not_go_together_are_refused(watch, fields, message):
  with pytest.raises(ValueError, match=message):
    watch(batch_of(range(4)), **fields)


def test_an_image_too_long_for_the_spectrum_is_refused_before_any_step():
  check_aspect(0.0, [(8, 64)])
  check_aspect(1.0, [(16, 64), (64, 16)])
  with pytest.raises(ValueError, match=r"up to 4:1, and the data have .* 8x64"):
    check_aspect(1.0, [(16, 64), (8, 64)])


@pytest.mark.parametrize(
  "fields",
  [
    {"snr_switch": True},
    {"min_snr_gamma": 5.0},
    {"frequency_weight": 1.0},
    {"wavelet_offset": 0.0},
  ],
)
def test_a_weighting_reaches_the_loss(watch, fields):
  plain = watch(batch_of(range(4)))
  weighted = watch(batch_of(range(4)), **fields)
  assert (weighted["per_example"]["mse"] != plain["per_example"]["mse"]).any()
  np.testing.assert_array_equal(weighted["noise"], plain["noise"])


def test_a_model_with_size_conditions_is_given_them(watch):
  batch = batch_of(range(4))
  config = models.nano(size_conditions=True)
  network = watch(batch, config=config)["network"]
  np.testing.assert_array_equal(network["image_size"], batch["original_size"])
  np.testing.assert_array_equal(network["aspect_ratio"], batch["aspect_ratio"])
  assert watch(batch)["network"]["image_size"] is None


def test_each_key_discards_other_tokens(watch):
  batch = batch_of(range(4))
  keys = [
    watch(batch, key=jax.random.key(seed))["network"]["rngs"]["kv_discard"]
    for seed in (0, 1)
  ]
  assert keys[0] != keys[1]


def test_gradients_of_a_batch_are_the_mean_over_its_rows():
  """Of the real network, whose rows share everything but parameters."""
  config = models.nano(
    kv_compression=KVCompression(ratio=4, layers=(0, 1), operator="average")
  )
  loss = make_loss(
    PixArt(config, models.FLOAT32),
    SCHEDULE,
    scaling_factor=1.0,
    caption_dropout=0.5,
    snr_switch=False,
    min_snr_gamma=None,
    snr_shift=1.0,
    timestep_beta=None,
    timestep_range=(0, 999),
    frequency_weight=0.0,
    frequency_gamma=1.0,
    wavelet_offset=None,
  )
  gradient = jax.jit(jax.grad(lambda *arguments: loss(*arguments)[0]))
  params, key = models.random_params(config), jax.random.key(0)
  # Pairs of one row twice, so that one program serves all three.
  both, first, second = (
    gradient(params, NULL, batch_of(rows), key) for rows in ((0, 5), (0, 0), (5, 5))
  )
  for whole, one, other in zip(
    *map(jax.tree.leaves, (both, first, second)), strict=True
  ):
    scale = float(jnp.abs(whole).max()) + 1e-6
    np.testing.assert_allclose(whole, (one + other) / 2, rtol=1e-4, atol=1e-5 * scale)
