"""Memory that is lent and comes back: never to two at once."""

import gc
import pickle

import numpy as np

from pixsigma_jax.data.buffers import Buffers

SHAPE = (1024, 1024, 4)  # 8 MB of float16: large enough to be lent again


def address(array):
  return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_the_array_has_gone():
  buffers = Buffers()
  first = buffers.array(SHAPE, np.float16)
  first[:] = 7
  place = address(first)
  del first
  again = buffers.array(SHAPE, np.float16)
  assert address(again) == place
  assert again.shape == SHAPE
  assert again.flags.writeable
  # As many bytes in another shape and type will do.
  del again
  assert address(buffers.array((2 * 1024, 1024), np.float32)) == place


def test_no_two_arrays_share_memory_while_both_are_there():
  buffers = Buffers()
  arrays = [buffers.array(SHAPE, np.float16) for _ in range(3)]
  assert len({address(array) for array in arrays}) == 3


def test_a_view_keeps_the_memory():
  buffers = Buffers()
  array = buffers.array(SHAPE, np.float16)
  view = array[3:9].transpose(2, 0, 1)[1:, ::2]
  array[:] = 1
  del array
  gc.collect()
  other = buffers.array(SHAPE, np.float16)
  other[:] = 2
  assert (view == 1).all()


def test_small_arrays_are_the_allocators_affair():
  buffers = Buffers()
  small = buffers.array((3,), np.int32)
  del small
  assert not any(buffers._free.values())


def test_another_process_gets_none_of_the_memory():
  buffers = Buffers()
  array = buffers.array(SHAPE, np.float16)
  del array
  assert any(buffers._free.values())
  assert not any(pickle.loads(pickle.dumps(buffers))._free.values())
