"""The mathematics casts by hand: a silent change of dtype is an error here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
  with jax.numpy_dtype_promotion("strict"):
    yield
