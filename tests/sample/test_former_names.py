"""Names that were changed, for as long as the old ones are kept."""

import importlib

import pytest

from pixsigma_jax.sample import encoders


def test_the_former_name_of_encoders_leads_to_them_and_warns():
  with pytest.warns(DeprecationWarning, match="is called pixsigma_jax.sample.encoders"):
    frozen = importlib.import_module("pixsigma_jax.sample.frozen")
  for name in frozen.__all__:
    assert getattr(frozen, name) is getattr(encoders, name)
