"""Memory that is lent and comes back: never to two at once, never with old values."""

import gc
import pickle

import numpy as np

from pixsigma_jax.data.buffers import Buffers

SHAPE = (3, 5, 2)


def address(rows):
  return rows.array.__array_interface__["data"][0]


def full(value):
  return [np.full((5, 2), value, np.float16)] * 3


def test_memory_is_used_again_when_the_array_has_gone():
  buffers = Buffers()
  first = buffers.rows(SHAPE, np.float16)
  place = address(first)
  del first
  again = buffers.rows(SHAPE, np.float16)
  assert address(again) == place
  assert (again.array.shape, again.array.dtype) == (SHAPE, np.float16)


def test_no_two_share_memory_while_both_are_there():
  buffers = Buffers()
  lent = [buffers.rows(SHAPE, np.float16) for _ in range(3)]
  assert len({address(rows) for rows in lent}) == 3


def test_a_view_keeps_the_memory():
  buffers = Buffers()
  rows = buffers.rows(SHAPE, np.float16)
  rows.put(range(3), full(1))
  view = rows.array[1:].transpose(2, 0, 1)[1:, ::2]
  del rows
  gc.collect()
  buffers.rows(SHAPE, np.float16).put(range(3), full(2))
  assert (view == 1).all()


def test_behind_a_sequence_are_zeros_whatever_was_there():
  buffers, draw = Buffers(), np.random.default_rng(0)
  for _ in range(20):
    rows = buffers.rows(SHAPE, np.float16)
    lengths = draw.integers(0, 6, 3)
    sequences = [draw.normal(size=(n, 2)).astype(np.float16) + 9 for n in lengths]
    rows.put([2, 0, 1], sequences)
    for row, sequence in zip([2, 0, 1], sequences, strict=True):
      np.testing.assert_array_equal(rows.array[row, : len(sequence)], sequence)
      assert not rows.array[row, len(sequence) :].any()
    del rows


def test_another_process_gets_none_of_the_memory():
  buffers = Buffers()
  buffers.rows(SHAPE, np.float16)
  assert any(buffers._free.values())
  assert not any(pickle.loads(pickle.dumps(buffers))._free.values())
