"""The training loss, against the reference's numbers and against probability."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixsigma_jax.diffusion.loss import iddpm_loss
from pixsigma_jax.diffusion.process import add_noise
from pixsigma_jax.diffusion.schedule import linear_schedule

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "losses.npz"
SCHEDULE = linear_schedule()
OPTIONS = ({}, {"snr_switch": True}, {"min_snr_gamma": 5.0})
LATER = jnp.arange(1, SCHEDULE.num_timesteps)  # where the bound is a KL divergence
NOISED = jax.jit(functools.partial(add_noise, SCHEDULE))


def normal(seed, shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def example(timesteps, tokens=6, channels=4, seed=0):
  """Arguments of the loss for a batch with one row for each timestep."""
  shape = (len(timesteps), tokens, channels)
  latents, noise, prediction, logits = (normal(seed + i, shape) for i in range(4))
  return {
    "latents": latents,
    "noise": noise,
    "noisy_latents": NOISED(latents, noise, timesteps),
    "timesteps": timesteps,
    "prediction": prediction,
    "variance_logits": logits,
    "mask": jnp.ones(shape[:2], bool),
  }


@functools.partial(jax.jit, static_argnames=("snr_switch", "min_snr_gamma"))
def loss(batch, snr_switch=False, min_snr_gamma=None):
  return iddpm_loss(
    SCHEDULE, **batch, snr_switch=snr_switch, min_snr_gamma=min_snr_gamma
  )


@functools.partial(jax.jit, static_argnames=("term", "snr_switch", "min_snr_gamma"))
def gradients(batch, term="loss", snr_switch=False, min_snr_gamma=None):
  """Of the sum of a term over the batch, with respect to both network outputs."""

  def total(prediction, logits):
    outputs = {"prediction": prediction, "variance_logits": logits}
    return loss(batch | outputs, snr_switch, min_snr_gamma)[term].sum()

  outputs = batch["prediction"], batch["variance_logits"]
  by_prediction, by_logits = jax.grad(total, argnums=(0, 1))(*outputs)
  return {"prediction": by_prediction, "variance_logits": by_logits}


def prefix_mask(lengths, tokens=6):
  """True for the first tokens of each row."""
  return jnp.asarray(np.arange(tokens) < np.array(lengths)[:, None])


def as_tokens(images):
  """[b c h w], as the reference has it → [b n c]."""
  b, c, h, w = images.shape
  return jnp.asarray(images.reshape(b, c, h * w).swapaxes(1, 2))


@functools.cache
def golden():
  return dict(np.load(GOLDEN).items())


def golden_example(model_output):
  """The reference's batch, its network's eight channels given as one array."""
  rows = golden()
  return {
    "latents": as_tokens(rows["x0"]),
    "noise": as_tokens(rows["noise"]),
    "noisy_latents": as_tokens(rows["x_t"]),
    "timesteps": jnp.asarray(rows["t"].astype(np.int32)),
    "prediction": model_output[..., :4],
    "variance_logits": model_output[..., 4:],
    "mask": jnp.ones((5, 48), bool),
  }


@pytest.mark.parametrize("snr_switch", [False, True])
def test_terms_are_those_of_the_reference(snr_switch):
  batch = golden_example(as_tokens(golden()["model_out"]))
  terms = loss(batch, snr_switch=snr_switch)

  expected = {
    name: golden()[f"snr{int(snr_switch)}.{name}"] for name in ("mse", "vb", "loss")
  }
  np.testing.assert_allclose(terms["mse"], expected["mse"], rtol=1e-6)
  # The bound subtracts nearly equal means, here and in the reference: evaluated in
  # float64, its formula differs from its own float32 by 2.3e-6.
  np.testing.assert_allclose(terms["vb"], expected["vb"], rtol=3e-6)
  np.testing.assert_allclose(terms["loss"], terms["mse"] + terms["vb"], rtol=2e-7)
  # At timestep 0 the bound is most of the loss; elsewhere 1e-6 holds.
  np.testing.assert_allclose(terms["loss"][1:], expected["loss"][1:], rtol=1e-6)
  np.testing.assert_allclose(terms["loss"][0], expected["loss"][0], rtol=3e-6)


def test_without_learned_variance_the_noise_error_remains():
  batch = golden_example(as_tokens(golden()["model_out"])) | {"variance_logits": None}
  terms = loss(batch)
  np.testing.assert_allclose(terms["mse"], golden()["nosigma.mse"], rtol=1e-6)
  np.testing.assert_allclose(terms["loss"], golden()["nosigma.loss"], rtol=1e-6)
  assert (terms["vb"] == 0).all()


def test_gradient_is_that_of_the_reference():
  gradient = gradients(golden_example(as_tokens(golden()["model_out"])))
  by_prediction, by_logits = (array / 5 for array in gradient.values())  # a mean
  expected = np.asarray(as_tokens(golden()["grad_model_out"]))

  np.testing.assert_allclose(by_prediction, expected[..., :4], rtol=1e-6, atol=1e-9)
  # As a share of the timestep's largest gradient: what float32 leaves of it in the
  # golden file, by comparison with the same formula in float64. At 0 the bin's
  # probability is a difference of two numbers near 1; at 999 the reference rounds the
  # two log-variances, 8e-7 apart, before it subtracts them. The tests below hold the
  # bound and its minimum to float64.
  for row, share in enumerate([1e-3, 2e-5, 1e-4, 1e-4, 0.4]):
    scale = abs(expected[row, :, 4:]).max()
    np.testing.assert_allclose(
      by_logits[row], expected[row, :, 4:], rtol=0, atol=share * scale
    )


def posterior_variance_and_error(batch):
  """Variance of q(x_{t-1} | x_t, x_0), and how far a wrong ε moves its mean.

  In float64, from beta and alpha_bar alone: DDPM's equations 7 and 11.
  """
  timesteps = np.asarray(batch["timesteps"])
  betas = np.linspace(1e-4, 2e-2, 1000)
  alpha_bar = np.cumprod(1 - betas)
  beta, now, before = betas[timesteps], alpha_bar[timesteps], alpha_bar[timesteps - 1]
  variance = beta * (1 - before) / (1 - now)
  scale = beta / np.sqrt((1 - beta) * (1 - now))
  wrong = np.asarray(batch["noise"], np.float64) - np.asarray(batch["prediction"])
  return variance[:, None, None], scale[:, None, None] * wrong


@pytest.mark.parametrize("logit", [-1.0, 0.0])
def test_a_perfect_mean_costs_what_its_variance_is_wrong_by(logit):
  batch = example(LATER)
  logits = jnp.full_like(batch["noise"], logit)
  terms = loss(batch | {"prediction": batch["noise"], "variance_logits": logits})

  variance, error = posterior_variance_and_error(batch | {"prediction": batch["noise"]})
  betas = np.linspace(1e-4, 2e-2, 1000)[1:]
  # At -1 the model's variance is the posterior's: a perfect network costs nothing.
  excess = (logit + 1) / 2 * np.log(betas / variance[:, 0, 0])
  bits = (excess + np.expm1(-excess)) / 2 / np.log(2)
  assert (error == 0).all()
  assert (terms["mse"] == 0).all()
  # The most that x_0's rounding leaves of a mean that should be exact is 1e-8 bits;
  # 1 - exp in float32 would leave 6e-8.
  np.testing.assert_allclose(terms["vb"], bits, rtol=2e-6, atol=1e-8)


def test_bound_is_the_divergence_of_two_gaussians():
  batch = example(LATER)
  variance, error = posterior_variance_and_error(batch)
  # Log-variance runs from the posterior's, at -1, to beta's, at 1.
  betas = np.linspace(1e-4, 2e-2, 1000)[np.asarray(LATER)][:, None, None]
  share = (np.asarray(batch["variance_logits"], np.float64) + 1) / 2
  model_variance = betas**share * variance ** (1 - share)
  nats = (
    np.log(model_variance / variance) - 1 + (variance + error**2) / model_variance
  ) / 2

  vb = loss(batch)["vb"]
  # 2e-5: near timestep 1 the error in x_0 is 100 times smaller than x_0.
  np.testing.assert_allclose(vb, nats.mean(axis=(1, 2)) / np.log(2), rtol=2e-5)


def test_the_bound_is_lowest_where_the_variance_covers_the_error():
  batch = example(LATER)
  variance, error = posterior_variance_and_error(batch)
  betas = np.linspace(1e-4, 2e-2, 1000)[np.asarray(LATER)][:, None, None]
  # The best Gaussian with a wrong mean has the variance plus the error squared, and
  # is ½ log(1 + error²/variance) away.
  width = np.log(betas / variance)
  best = 2 * np.log1p(error**2 / variance) / width - 1

  batch |= {"variance_logits": jnp.asarray(best, jnp.float32)}
  bits = np.log1p(error**2 / variance).mean(axis=(1, 2)) / 2 / np.log(2)
  np.testing.assert_allclose(loss(batch)["vb"], bits, rtol=2e-5)

  # Beside the minimum a gradient is a fraction of `width`; at it, of float32.
  gradient = gradients(batch, "vb")["variance_logits"]
  per_value = abs(np.asarray(gradient)) * batch["noise"][0].size * np.log(2)
  assert (per_value < 1e-4 * width).all()


@pytest.mark.parametrize(
  ("centre", "logit"), [(0.0, 0.0), (0.4035, -1.0), (-0.99, 8.0), (1.002, 1.0)]
)
def test_probabilities_of_all_bins_sum_to_one(centre, logit):
  # One image for each of the 256 values an 8-bit pixel can take, all with the same
  # noisy version and the same prediction, hence the same Gaussian.
  values = jnp.linspace(-1, 1, 256).reshape(256, 1, 1)
  batch = {
    "latents": values,
    "noise": jnp.zeros_like(values),
    "noisy_latents": jnp.full_like(values, centre * np.sqrt(0.9999)),
    "timesteps": jnp.zeros(256, jnp.int32),
    "prediction": jnp.zeros_like(values),
    "variance_logits": jnp.full_like(values, logit),
    "mask": jnp.ones((256, 1), bool),
  }
  probabilities = np.exp2(-np.asarray(loss(batch)["vb"], np.float64))
  # 256 differences of numbers near 1 in float32, and a floor of 1e-12.
  np.testing.assert_allclose(probabilities.sum(), 1, rtol=0, atol=1e-5)
  if abs(centre) < 0.9:  # no tail is cut off: they lie around the centre
    mean = (probabilities * np.asarray(values)[:, 0, 0]).sum()
    np.testing.assert_allclose(mean, centre, rtol=0, atol=1e-4)


def test_no_latent_costs_more_than_forty_bits():
  # Probabilities end at 1e-12, so that an image the network held for impossible
  # weighs a finite amount.
  batch = example(jnp.array([0, 0]))
  batch["latents"] = jnp.zeros_like(batch["noise"])
  batch["noisy_latents"] = batch["latents"] + 5
  np.testing.assert_allclose(loss(batch)["vb"], 12 * np.log2(10), rtol=1e-6)


def test_the_bound_teaches_the_variance_and_nothing_else():
  batch = example(jnp.array([0, 1, 500, 999]))

  gradient = gradients(batch, "vb")
  assert (gradient["prediction"] == 0).all()
  assert (abs(gradient["variance_logits"]).max(axis=(1, 2)) > 0).all()


def test_the_noise_error_does_not_read_the_variance():
  batch = example(jnp.array([0, 1, 249]))
  terms = loss(batch)
  other = loss(batch | {"variance_logits": batch["noise"]})
  np.testing.assert_array_equal(terms["mse"], other["mse"])
  assert (terms["vb"] != other["vb"]).all()


@pytest.mark.parametrize("logit", [-50.0, 50.0])
def test_logits_far_outside_the_two_bounds_give_finite_gradients(logit):
  batch = example(jnp.array([0, 1, 500, 999]))
  batch["variance_logits"] = jnp.full_like(batch["noise"], logit)
  assert jnp.isfinite(loss(batch)["vb"]).all()
  assert jnp.isfinite(gradients(batch, "vb")["variance_logits"]).all()


@settings(max_examples=25)
@given(
  lengths=st.lists(st.integers(1, 6), min_size=4, max_size=4),
  garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 3.0]),
)
def test_padding_changes_nothing(lengths, garbage):
  batch = example(jnp.array([0, 3, 249, 999])) | {"mask": prefix_mask(lengths)}
  arrays = ("latents", "noise", "noisy_latents", "prediction", "variance_logits")
  soiled = batch | {
    name: jnp.where(batch["mask"][..., None], batch[name], jnp.float32(garbage))
    for name in arrays
  }

  for options in OPTIONS:
    for function in (loss, gradients):
      actual, expected = function(soiled, **options), function(batch, **options)
      jax.tree.map(np.testing.assert_array_equal, actual, expected)  # to the bit
    for gradient in actual.values():
      assert (np.asarray(gradient)[~np.asarray(batch["mask"])] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_padded_example_has_the_loss_it_has_alone(options):
  timesteps = jnp.array([0, 3, 249, 999])
  lengths = [1, 4, 1, 4]  # two lengths: each is a compilation
  batch = example(timesteps) | {"mask": prefix_mask(lengths)}
  together = loss(batch, **options)

  for row, length in enumerate(lengths):
    alone = {
      name: array[row : row + 1, :length] if array.ndim > 1 else array[row : row + 1]
      for name, array in batch.items()
    }
    for name, value in loss(alone, **options).items():
      # Only the order of a sum may differ.
      np.testing.assert_allclose(together[name][row], value[0], rtol=1e-6)


def test_valid_tokens_may_lie_anywhere():
  batch = example(jnp.array([0, 400]))
  scattered = jnp.array([[True, False, True, True, False, True]] * 2)
  terms = loss(batch | {"mask": scattered})
  packed = {
    name: array[:, np.array([0, 2, 3, 5])] if array.ndim > 1 else array
    for name, array in batch.items()
  }
  for name, value in loss(packed).items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-6)


def test_the_references_switch_divides_by_the_snr_up_to_timestep_249():
  timesteps = jnp.arange(1000)
  batch = example(timesteps)
  plain = loss(batch)
  switched = loss(batch, snr_switch=True)

  # x_0's error is ε's error times σ/α.
  alpha_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
  factor = np.where(np.arange(1000) <= 249, (1 - alpha_bar) / alpha_bar, 1.0)
  np.testing.assert_allclose(switched["mse"] / plain["mse"], factor, rtol=1e-6)
  np.testing.assert_array_equal(switched["vb"], plain["vb"])


def test_min_snr_clips_the_weight_where_there_is_little_noise():
  timesteps = jnp.arange(1000)
  batch = example(timesteps)
  plain = loss(batch)
  clipped = loss(batch, min_snr_gamma=5.0)

  alpha_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
  snr = alpha_bar / (1 - alpha_bar)
  noisy = snr < 5
  assert 100 < noisy.sum() < 900  # both sides are there to be seen
  np.testing.assert_array_equal(clipped["mse"][noisy], plain["mse"][noisy])
  np.testing.assert_allclose(
    clipped["mse"][~noisy], 5 / snr[~noisy] * plain["mse"][~noisy], rtol=1e-6
  )
  np.testing.assert_array_equal(clipped["vb"], plain["vb"])
  np.testing.assert_allclose(clipped["loss"], clipped["mse"] + clipped["vb"], rtol=1e-6)


def test_half_precision_is_left_at_the_door():
  batch = example(jnp.array([0, 500]))
  arrays = ("latents", "noise", "noisy_latents", "prediction", "variance_logits")
  half = {name: batch[name].astype(jnp.bfloat16) for name in arrays}
  same = {name: array.astype(jnp.float32) for name, array in half.items()}
  terms = loss(batch | half)
  expected = loss(batch | same)
  for name, value in terms.items():
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, expected[name])


def test_an_image_without_tokens_is_not_passed_over_in_silence():
  batch = example(jnp.array([5, 5]))
  batch["mask"] = batch["mask"].at[0].set(False)
  terms = loss(batch)
  assert jnp.isnan(terms["loss"]).tolist() == [True, False]


def test_refuses_weights_that_contradict():
  batch = example(jnp.array([5]))
  with pytest.raises(ValueError, match=r"min_snr_gamma=5\.0 both re-weigh"):
    iddpm_loss(SCHEDULE, **batch, snr_switch=True, min_snr_gamma=5.0)
  with pytest.raises(ValueError, match=r"min_snr_gamma=0\.0 must be positive"):
    iddpm_loss(SCHEDULE, **batch, min_snr_gamma=0.0)
