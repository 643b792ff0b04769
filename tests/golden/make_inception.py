"""Writes inception.npz: what the original Inception-v3 classes make of seeded weights.

  pip install --no-deps --target ORIGINALS torchvision==0.28.0 torch-fidelity==0.4.0
  PYTHONPATH=ORIGINALS python tests/golden/make_inception.py

The weights are 95 MB, so they are drawn again from their names, here and in the test.
"""

import pathlib
import sys
import tempfile
import types
import zlib

import numpy as np


def draw(name, shape):
  """A tensor of the state dict: a function of its name and shape alone."""
  random = np.random.default_rng(zlib.crc32(name.encode()))
  if name.endswith("running_var"):
    return random.uniform(0.5, 1.5, shape).astype(np.float32)
  if name.endswith("bn.weight"):
    return random.uniform(0.5, 1.1, shape).astype(np.float32)
  if len(shape) > 1:  # activations neither grow nor vanish
    scale = np.sqrt(2 / np.prod(shape[1:]))
    return (random.standard_normal(shape, np.float32) * scale).astype(np.float32)
  return random.normal(0, 0.2, shape).astype(np.float32)


def images():
  """Two photographs of different shape, which scikit-image carries."""
  from skimage import data

  return [data.astronaut(), data.coffee()]


def main():
  import torch

  # Its compiled operators do not fit every torch, and no network here has any.
  sys.modules["torchvision._meta_registrations"] = types.ModuleType("none")
  from PIL import Image
  from torch_fidelity import feature_extractor_inceptionv3 as fidelity
  from torchvision import transforms
  from torchvision.models import Inception3

  torch.set_grad_enabled(False)

  def drawn(state):
    return {
      name: tensor
      if "num_batches" in name
      else torch.from_numpy(draw(name, tuple(tensor.shape)))
      for name, tensor in state.items()
    }

  out = {}
  network = Inception3(aux_logits=True, transform_input=True, init_weights=False)
  network.load_state_dict(drawn(network.state_dict()))
  network = network.eval()
  network.fc = torch.nn.Identity()
  pipeline = transforms.Compose(
    [
      transforms.Resize(299),
      transforms.CenterCrop(299),
      transforms.ToTensor(),
      transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
  )
  opened = [Image.fromarray(image) for image in images()]
  batch = torch.stack([pipeline(each) for each in opened])
  out["torchvision_features"] = network(batch).numpy()
  middle = transforms.Compose(pipeline.transforms[:2])
  out["torchvision_pixels"] = np.stack(
    [np.asarray(middle(each))[::23, ::23] for each in opened]
  )

  class Seeded(fidelity.FeatureExtractorInceptionV3):
    def load_state_dict(self, _):  # in place of the file's
      super().load_state_dict(drawn(self.state_dict()))

  with tempfile.NamedTemporaryFile(suffix=".pth") as empty:
    torch.save({}, empty.name)
    network = Seeded("inception", ["2048", "logits_unbiased"], empty.name)
  features, logits, pixels = [], [], []
  for image in images():
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    a, b = network(x)
    features.append(a.numpy()[0])
    logits.append(b.numpy()[0])
    small = fidelity.interpolate_bilinear_2d_like_tensorflow1x(
      x.float(), size=(299, 299), align_corners=False
    )
    pixels.append(small[0].permute(1, 2, 0).numpy()[::23, ::23])
  out["fid_features"], out["fid_logits"] = np.stack(features), np.stack(logits)
  out["fid_pixels"] = np.stack(pixels)
  for name, array in out.items():
    print(name, array.shape, array.dtype, float(np.abs(array).mean()))
  np.savez_compressed(pathlib.Path(__file__).with_name("inception.npz"), **out)


if __name__ == "__main__":
  main()
