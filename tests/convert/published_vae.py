"""The autoencoder in small as diffusers builds and saves it, with random weights."""

import torch
from diffusers import AutoencoderKL

CHANNELS = (16, 32, 32, 32)  # widths change once, as in SDXL's between two levels
NORM_GROUPS = 8


def make_vae(channels=CHANNELS, norm_groups=NORM_GROUPS, **fields):
  """diffusers' own model, in float32 and ready to run.

  Norms and biases are random too: at their initial ones and zeros they could be swapped
  and nobody would see it.
  """
  levels = len(channels)
  model = AutoencoderKL(
    block_out_channels=channels,
    down_block_types=("DownEncoderBlock2D",) * levels,
    up_block_types=("UpDecoderBlock2D",) * levels,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=norm_groups,
    **({"scaling_factor": 0.13025} | fields),
  ).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      if value.ndim > 1:
        value.copy_(noise * value[0].numel() ** -0.5)
      else:
        value.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
  return model


def tensors(model):
  """Its state dict as NumPy arrays."""
  return {name: value.numpy() for name, value in model.state_dict().items()}
