"""Models to sample from: a tiny real one, and stand-ins whose images are known."""

import jax
import jax.numpy as jnp
import numpy as np

from pixsigma_jax import checkpoint
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.hashed_words import HashedWordEncoder
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params
from pixsigma_jax.models.pixels import PixelAutoencoder
from pixsigma_jax.sample import program
from pixsigma_jax.sample.pipeline import Pipeline

FLOAT32 = Compute(dtype=jnp.float32)
SCALING_FACTOR = 2.0
ENCODER = HashedWordEncoder(16)
# All guidance that can act together, and step caching.
EVERYTHING = {
  "pag_scale": 2.0,
  "skip_layer_guidance_scale": 1.0,
  "guidance_method": "apg",
  "guidance_rescale": 0.3,
  "step_caching": 0.1,
}


def nano(**fields):
  """8x8 pixels are 4x4 tokens, in windows of 2x2, so that token order matters."""
  defaults = {
    "base_size": 4,
    "pe_interpolation": 1.0,
    "in_channels": 3,
    "caption_width": ENCODER.width,
    "caption_length": 8,
    "kv_compression": KVCompression(ratio=4, layers=(1,)),
  }
  return PixArtConfig.from_variant("Nano/2", **(defaults | fields))


def random_params(config, seed=0):
  """No leaf zero, as training leaves them: a fresh model predicts nothing at all."""
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0, 0.15, leaf.shape), leaf.dtype),
    abstract_params(config),
  )


class Tracing(PixelAutoencoder):
  """Pixels as latents; keeps what it was given to decode, in full precision."""

  def __init__(self):
    super().__init__(SCALING_FACTOR)
    object.__setattr__(self, "decoded", [])

  def decode(self, latents):
    self.decoded.append(np.asarray(latents[0]))
    return super().decode(latents)


def null_caption(config):
  return ENCODER.encode([""], config.caption_length)[0][0]


def pipeline(config=None, params=None, **fields):
  config = config or nano()
  defaults = {
    "config": config,
    "params": random_params(config) if params is None else params,
    "null_caption": null_caption(config),
    "autoencoder": Tracing(),
    "text_encoder": ENCODER,
    "resolution": 2 * config.base_size,
    "compute": FLOAT32,
  }
  return Pipeline(**(defaults | fields))


def metadata(config, **fields):
  defaults = {
    "stage": "test",
    "model": config.to_dict(),
    "autoencoder": PixelAutoencoder().identity,
    "scaling_factor": SCALING_FACTOR,
    "text_encoder": ENCODER.identity,
    "resolution": 2 * config.base_size,
  }
  return Metadata(**(defaults | fields))


def save_snapshot(workdir, config, step, *, seed=0, **about):
  """Saves an untrained model as a run does; `about` changes its metadata."""
  checkpoint.save_snapshot(
    workdir,
    step,
    params=random_params(config, seed=seed),
    null_caption=null_caption(config),
    metadata=metadata(config, **about),
  )


def exact(clean):
  """A class in PixArt's place, that always sees `clean(inputs)` under the noise.

  `inputs` are the network's by name; `clean` gives x_0, tokens `[b n c]` or what
  broadcasts to them. The variance logits are noise of their own.
  """
  schedule = linear_schedule()

  class Exact:
    def __init__(self, config, _):
      self._config = config

    def apply(self, _variables, noisy, conditions, **_):
      inputs = vars(conditions) | {"noisy": noisy, "mask": conditions.caption_mask}
      inputs["captions"] = conditions.caption_kv  # handed through, see `use_exact`
      index = inputs["timesteps"].astype(jnp.int32)
      alpha, sigma = (
        jnp.asarray(table, jnp.float32)[index][:, None, None]
        for table in (schedule.signal_scale, schedule.noise_scale)
      )
      x0 = jnp.broadcast_to(clean(inputs), noisy.shape)
      noise = (noisy - alpha * x0) / sigma
      parts = noise.reshape(*noise.shape[:2], -1, 1, self._config.in_channels)
      both = jnp.concatenate([parts, jnp.full_like(parts, 7.0)], axis=3)
      return both.reshape(*noise.shape[:2], -1)

  return Exact


def use_exact(monkeypatch, clean):
  """Puts `exact(clean)` in PixArt's place in the sampler."""
  monkeypatch.setattr(program, "PixArt", exact(clean))
  monkeypatch.setattr(
    program,
    "caption_keys_values",
    lambda _params, _config, _compute, embeddings, _mask: embeddings,
  )
