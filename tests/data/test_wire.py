"""`tf.train.Example` read in place: what protobuf says, or an error."""

import contextlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pixsigma_jax.data import wire

# A halved surrogate pair cannot be written as UTF-8 at all.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.lists(st.integers(0, 2**62), max_size=4)
FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=4)


@hypothesis.given(
  st.dictionaries(TEXTS, st.lists(TEXTS, max_size=4), min_size=1, max_size=4),
  st.dictionaries(TEXTS, NUMBERS, max_size=4),
  st.dictionaries(TEXTS, FLOATS, max_size=4),
)
def test_what_protobuf_writes_is_read_back(texts, integers, floats):
  integers = {f"i{name}": values for name, values in integers.items()}
  floats = {f"f{name}": values for name, values in floats.items()}
  texts = {f"t{name}": values for name, values in texts.items()}
  coded = {name: [text.encode() for text in values] for name, values in texts.items()}
  read = wire.Features(wire.encode(coded, integers, floats))
  for name, values in texts.items():
    assert read.texts(name) == tuple(values)
  for name, values in integers.items():
    assert read.integers(name) == values
  for name, values in floats.items():
    assert read.floats(name).tolist() == values


def test_arrays_are_views_of_the_bytes_and_cannot_be_written():
  values = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
  data = wire.encode({"x": [values.tobytes()]}, {}, {})
  read = wire.Features(data).array("x", (2, 3, 4))
  np.testing.assert_array_equal(read, values)
  assert not read.flags.owndata
  with pytest.raises(ValueError, match="read-only"):
    read[0] = 0


SOUND = wire.encode({"id": [b"a"], "x": [bytes(300)]}, {"n": [3, 200]}, {"f": [1.5]})


@hypothesis.given(st.integers(0, len(SOUND) - 1), st.integers(1, 255), st.booleans())
def test_damaged_bytes_are_read_as_something_or_refused(place, change, cut):
  damaged = bytearray(SOUND)
  damaged[place] ^= change
  with contextlib.suppress(ValueError):
    read = wire.Features(bytes(damaged[:place] if cut else damaged))
    read.texts("id"), read.integers("n"), read.floats("f"), read.array("x", (150,))


@hypothesis.given(st.binary(max_size=60))
def test_any_bytes_are_read_as_something_or_refused(data):
  with contextlib.suppress(ValueError):
    wire.Features(data)


def test_what_is_missing_or_of_another_type_is_named():
  read = wire.Features(SOUND)
  with pytest.raises(ValueError, match="no feature 'crop'"):
    read.floats("crop")
  with pytest.raises(ValueError, match="feature 'id' is of another type"):
    read.integers("id")
