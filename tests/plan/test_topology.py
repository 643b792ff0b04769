"""Machines by name, as the installed libtpu knows them."""

import importlib.util
import os
import types

import jax
import pytest

from pixsigma_jax import sharding
from pixsigma_jax.plan import gpus, topology

TPUS = [
  f"{name}:{shape}"
  for name, generation in topology.GENERATIONS.items()
  for shape in generation.known
]


@pytest.mark.parametrize("name", TPUS)
def test_libtpu_knows_every_topology_that_a_message_names(name, libtpu):
  machines = topology.parse(name)
  devices = topology.devices(machines)
  assert len(devices) == machines.count
  assert {device.device_kind for device in devices} == {machines.kind}


def test_slices_multiply_devices_and_libtpu_tells_them_apart(libtpu):
  two = topology.parse("v5e:2x4", slices=2)
  assert (two.count, two.chips, str(two)) == (16, 16, "2 slices of v5e:2x4")
  assert {device.slice_index for device in topology.devices(two)} == {0, 1}


@pytest.mark.parametrize("name", ["v5e:8x8", "v6e:8x8", "v4:4x4x4", "v5p:4x4x4"])
def test_a_mesh_may_split_a_side_of_the_chips(name, libtpu):
  devices = topology.devices(topology.parse(name))
  mesh = sharding.make_mesh(data=4, fsdp=8, context=2, devices=devices)
  assert set(mesh.devices.flat) == set(devices)


def test_a_chip_of_two_devices_is_paid_for_once():
  machines = topology.parse("tpu7x:2x2x1")
  assert (machines.chips, machines.count) == (4, 8)


def test_a_price_of_ones_own_replaces_that_of_the_list():
  assert topology.parse("v5e:2x2").price == topology.GENERATIONS["v5e"].price
  assert topology.parse("v5e:2x2", price=0.25).price == 0.25


@pytest.mark.parametrize(
  "name",
  ["v9:2x2", "v5e", "v5e:", "v5e:0x2", "v5e:2x2x2", "v5p:2x2", "h300:8", "h200:"],
)
def test_an_unknown_name_ends_in_those_that_are_known(name):
  with pytest.raises(ValueError, match=rf"Unknown topology '{name}'.*v5e:{{1x1,2x2"):
    topology.parse(name)


def test_what_libtpu_alone_refuses_ends_the_same_way(libtpu):
  with pytest.raises(ValueError, match=r"Unknown topology 'v5e:3x3' \(.*v6e:"):
    topology.devices(topology.parse("v5e:3x3"))


def test_another_error_of_libtpu_is_not_called_an_unknown_topology(monkeypatch, libtpu):
  def fail(*_, **__):
    raise jax.errors.JaxRuntimeError("ABORTED: The TPU is already in use by process 1")

  monkeypatch.setattr(topology.topologies, "get_topology_desc", fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match="already in use"):
    topology.devices(topology.parse("v5e:2x2"))


def test_more_gpus_than_a_box_has_are_several_boxes():
  assert topology.parse("h200:8", slices=4).count == 32
  with pytest.raises(ValueError, match="Say h200:8, and how many boxes with --slices"):
    topology.parse("h200:16")


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    ValueError,
    match=r'pip install -e "\.\[plan\]"\. Or give --nocompile for the analytic',
  ):
    topology.devices(topology.parse("v5e:2x2"))


def test_without_the_cuda_plugin_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(gpus, "can_compile", lambda: False)
  with pytest.raises(
    ValueError,
    match=r'pip install -e "\.\[gpu\]"\. Or give --nocompile for the analytic',
  ):
    topology.devices(topology.parse("h200:8"))


@pytest.mark.parametrize("name", ["a100:8", "h100:8", "h200:8"])
def test_gpus_are_described_as_they_are(name, cuda_plugin):
  machines = topology.parse(name, slices=2)
  described = topology.devices(machines)
  assert len(described) == 16
  assert {device.platform for device in described} == {"gpu"}
  assert {device.device_kind for device in described} == {machines.kind}
  capability = "8.0" if name == "a100:8" else "9.0"  # of Ampere and of Hopper
  assert described[0].compute_capability == capability


def test_asking_libtpu_leaves_the_environment_as_it_was(libtpu):
  before = dict(os.environ)
  topology.devices(topology.parse("v5e:2x2"))
  # What JAX itself sets when it meets a TPU's library is its own.
  changed = {
    name for name in topology._AWAY if os.environ.get(name) != before.get(name)
  }
  assert changed == set()


@pytest.mark.parametrize("name", TPUS)
def test_machines_are_known_by_their_devices(name, libtpu):
  machines = topology.parse(name)
  assert topology.here(topology.devices(machines)) == machines


def test_part_of_a_slice_has_no_name(libtpu):
  found = topology.devices(topology.parse("v5e:4x4"))
  with pytest.raises(ValueError, match=r"These 15 devices are no whole v5e:4x4"):
    topology.here(found[1:])
  half = [device for device in found if device.coords[1] >= 2]
  assert topology.here(half).name == "v5e:4x2"


@pytest.mark.parametrize("name", ["a100:4", "h100:8", "h200:1"])
def test_gpus_are_known_by_their_devices(name):
  machines = topology.parse(name)
  gpu = types.SimpleNamespace(device_kind=machines.kind)
  assert topology.here([gpu] * machines.count) == machines


def test_a_cpu_is_no_machine_of_a_plan():
  with pytest.raises(ValueError, match=r"cpu is no accelerator that plans know; .*v5e"):
    topology.here(jax.devices())
