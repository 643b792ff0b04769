"""Names that were changed, for as long as the old ones are kept."""

import importlib

import pytest

from pixsigma_jax.sample import encoders, image_files

CHANGED = {"PictureFolder": "ImageFolder", "from_picture": "from_image"}
CHANGED |= {"to_picture": "to_image"}


@pytest.mark.parametrize(
  ("former", "module"), [("frozen", encoders), ("pictures", image_files)]
)
def test_a_former_name_leads_to_the_same_and_warns(former, module):
  with pytest.warns(DeprecationWarning, match=rf"is called {module.__name__} now"):
    old = importlib.import_module(f"pixsigma_jax.sample.{former}")
  for name in old.__all__:
    assert getattr(old, name) is getattr(module, CHANGED.get(name, name))
