"""A folder of an evaluation with images of several models, for studies and judges."""

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixsigma_jax.evaluate import folder, items

MODELS = ("alpha", "beta", "gamma")
HTML = "a <b>bold</b> cat & <img src=x onerror=\"document.title='broken in'\">"
PROMPTS = (HTML, "two dogs", "a red seven", "the sea\nat night", "an owl")


def grey(model, number):
  """The one value of an image's pixels, by which a test knows whose it is."""
  return 60 * MODELS.index(model) + number


def make(path, models=MODELS, prompts=PROMPTS, size=(12, 16)):
  """Images whose files say in their notes whose they are, as those of `sample` do."""
  made = folder.create(
    path,
    suite="world",
    version="1",
    options={},
    item_set=items.ItemSet(
      tuple(items.Item(f"p{i}", prompt) for i, prompt in enumerate(prompts))
    ),
  )
  for model in models:
    part = made.begin_model(model, path="", origin={"images of": model}, settings={})
    for number, item in enumerate(made.items):
      image = Image.fromarray(np.full((*size, 3), grey(model, number), np.uint8))
      notes = PngInfo()
      notes.add_text("settings", f"checkpoint of {model}")
      file = part.image_path(item)
      file.parent.mkdir(parents=True, exist_ok=True)
      image.save(file, pnginfo=notes)
  return made
