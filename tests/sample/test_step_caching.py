"""Step caching: what it spares, and what an image then is."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.diffusion.solvers import SAMPLERS
from pixsigma_jax.models.block import Block
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt, laid_out
from pixsigma_jax.sample import step_caching
from tests.sample import models
from tests.sample.models import ENCODER, SCALING_FACTOR

STEPS = 8
# Float32 through a few calls of a network of three layers.
ROUNDING = 1e-5
PROMPTS = ["a red seven", "a blue two above it", "nothing", "one more"]


def three_layers(compressed):
  compression = KVCompression()
  if compressed:
    compression = KVCompression(ratio=4, layers=compressed)
  return dataclasses.replace(models.nano(), depth=3, kv_compression=compression)


def params_of(config):
  """Small enough that steps are alike, as those of a trained network."""
  return jax.tree.map(lambda leaf: leaf / 2, models.random_params(config))


CONFIG = three_layers((1,))
# Between the changes of these images' steps: some are computed, and not the same.
THRESHOLD = 0.3


def draw(
  prompts=PROMPTS,
  *,
  config=CONFIG,
  compute=None,
  batch_size=2,
  passes=None,
  **arguments,
):
  """Latents of each prompt, and the steps that were computed."""
  subject = models.pipeline(
    config,
    params_of(config),
    compute=compute or models.FLOAT32,
    batch_size=batch_size,
    guidance_passes=passes,
  )
  arguments = {"num_inference_steps": STEPS, "step_caching": THRESHOLD} | arguments
  output = subject(prompts, **arguments)
  steps = [about.get("computed_steps") for about in output.settings]
  return np.stack(subject.autoencoder.decoded) * SCALING_FACTOR, steps


def assert_close(ours, theirs):
  bound = ROUNDING * np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def by_hand(config, params, prompt, seed, threshold, scale=4.5):
  """A plain loop over a network whose blocks are told what to return, from outside."""
  embeddings, mask = ENCODER.encode([prompt], config.caption_length)
  embeddings = jnp.concatenate([models.null_caption(config)[None], embeddings])
  mask = jnp.concatenate([mask, mask])
  kept, now, computed = {}, {}, 0

  def around(call, arguments, keywords, context):
    if not isinstance(context.module, Block):
      return call(*arguments, **keywords)
    layer, x = now["layer"], arguments[0]
    now["layer"] += 1
    if layer == 0:
      out = call(*arguments, **keywords)
      first = np.asarray(out[0] - x)
      change = np.inf
      if kept:
        change = np.abs(first - kept["first"]).sum() / np.abs(kept["first"]).sum()
      now.update(compute=change >= threshold, first=first, x=out[0])
      return out
    if not now["compute"]:
      last = layer == config.depth - 1
      return (x + kept["rest"] if last else x), None
    out = call(*arguments, **keywords)
    if layer == config.depth - 1:
      kept.update(first=now["first"], rest=np.asarray(out[0] - now["x"]))
    return out

  model = PixArt(config, Compute(dtype=jnp.float32, unroll=True))
  params = laid_out(params, model.compute)
  side = config.base_size * config.patch_size
  shape = (side, side, config.in_channels)
  latents, previous = jax.random.normal(jax.random.key(seed), shape)[None], 0.0
  table = SAMPLERS["dpm++"](linear_schedule(), STEPS)
  for row in zip(*table[:6], strict=True):
    timestep, signal, noise_scale, carry, current, before = row
    now["layer"] = 0
    with nn.intercept_methods(around):
      output = model.apply(
        {"params": params},
        jnp.concatenate([latents, latents]),
        jnp.full(2, timestep),
        embeddings,
        mask,
      )
    computed += now["compute"]
    unconditional, conditional = output[:, None, ..., : config.in_channels]
    noise = unconditional + scale * (conditional - unconditional)
    clean = (latents - noise_scale * noise) / signal
    latents = carry * latents + current * clean + before * previous
    previous = clean
  return np.asarray(latents[0]), computed


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("threshold", "computed"), [(0.49, [1, 0]), (0.51, [0, 0])])
def test_the_halves_of_an_image_are_judged_together_and_without_padding(
  passes, threshold, computed
):
  """Of two images the first's conditional half changes by all of itself."""
  before = jnp.ones((2, 2, 3, 4))  # halves, images, tokens, width
  now = before.at[1, 0].add(1.0).at[:, :, 2].set(1e6)  # the last token is padding
  x, rest, fresh = (jnp.full_like(before, number) for number in (10.0, 3.0, 5.0))
  by_pass = lambda array: array.reshape(passes, -1, 3, 4)  # noqa: E731
  none = step_caching.nothing_yet(by_pass(x).shape, 2)
  memory = none._replace(first=by_pass(before), rest=by_pass(rest))
  out, memory = step_caching.add_rest(
    memory,
    by_pass(x),
    by_pass(now),
    lambda: by_pass(fresh),
    jnp.array([[True, True, False]] * 2),
    jnp.float32(threshold),
  )
  assert memory.computed.images.tolist() == computed
  assert memory.computed.batch == max(computed)
  out, first = (array.reshape(2, 2, -1) for array in (out, memory.first))
  for image, is_computed in enumerate(computed):
    assert set(out[:, image].ravel().tolist()) == {15.0 if is_computed else 13.0}
    kept = (now if is_computed else before).reshape(2, 2, -1)[:, image]
    np.testing.assert_array_equal(first[:, image], kept)


@pytest.mark.parametrize("threshold", [THRESHOLD, 1e9])
def test_draws_what_a_plain_loop_that_reuses_the_other_blocks_draws(threshold):
  (ours,), (steps,) = draw(PROMPTS[:1], seed=3, step_caching=threshold, batch_size=1)
  theirs, computed = by_hand(CONFIG, params_of(CONFIG), PROMPTS[0], 3, threshold)
  assert steps == computed
  assert computed == 1 if threshold == 1e9 else 1 < computed < STEPS
  assert_close(ours, theirs)


@pytest.mark.parametrize("layers", [(), (1,), (0, 1)])
def test_a_threshold_that_nothing_falls_below_changes_no_image(layers):
  config = three_layers(layers)
  ours, steps = draw(config=config, step_caching=1e-9)
  theirs, without = draw(config=config, step_caching=0)
  assert steps == [STEPS] * len(PROMPTS)
  assert without == [None] * len(PROMPTS)
  assert_close(ours, theirs)


def test_a_higher_threshold_computes_fewer_steps_and_comes_less_close():
  exact, _ = draw(step_caching=0)
  steps, errors = [], []
  for threshold in (0.2, THRESHOLD, 0.4):
    latents, computed = draw(step_caching=threshold)
    steps.append(sum(computed))
    errors.append(np.abs(latents - exact).mean())
  assert steps[0] > steps[1] > steps[2] >= len(PROMPTS)
  assert errors[0] < errors[1] < errors[2]


def test_an_image_is_the_same_alone_and_beside_others_that_compute_other_steps():
  together, steps = draw(batch_size=4, seed=0)
  assert len(set(steps)) > 1
  for i, prompt in enumerate(PROMPTS):
    alone, computed = draw([prompt], batch_size=4, seed=i)
    np.testing.assert_array_equal(alone[0], together[i])
    assert computed == [steps[i]]


@pytest.mark.parametrize("layers", [(), (0,), (1, 2)])
def test_segments_scans_and_unrolled_layers_draw_one_image(layers):
  config = three_layers(layers)
  ours, steps = draw(config=config)
  theirs, computed = draw(
    config=config, compute=Compute(dtype=jnp.float32, unroll=True)
  )
  assert steps == computed
  assert_close(ours, theirs)


def test_two_passes_decide_and_draw_as_one_batch_does():
  ours, steps = draw(passes=2)
  theirs, computed = draw(passes=1)
  assert steps == computed
  assert_close(ours, theirs)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dmd"])
def test_every_sampler_and_no_guidance_can_spare_steps(sampler):
  for scale in (1.0, 3.0):
    latents, (computed,) = draw(PROMPTS[:1], sampler=sampler, guidance_scale=scale)
    assert 1 <= computed <= STEPS
    assert np.isfinite(latents).all()
    _, (computed,) = draw(
      PROMPTS[:1], sampler=sampler, guidance_scale=scale, step_caching=1e9
    )
    assert computed == 1


def test_what_is_not_a_number_is_not_hidden_behind_what_was_computed_before():
  params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params_of(CONFIG))
  subject = models.pipeline(CONFIG, params)
  with pytest.raises(ValueError, match="not made of finite numbers"):
    subject("a", num_inference_steps=STEPS, step_caching=1e9)
