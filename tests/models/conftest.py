"""Model code casts by hand: a silent bf16 -> f32 promotion is an error here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
  with jax.numpy_dtype_promotion("strict"):
    yield
