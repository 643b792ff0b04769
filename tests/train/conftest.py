"""What run-level tests share: images, and one run that nothing happened to."""

import pytest

from tests.train import runs


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  """Images of 8 pixels a digit."""
  return runs.prepare(tmp_path_factory.mktemp("data") / "8px")


@pytest.fixture(scope="session")
def done(data, tmp_path_factory):
  """The workdir of a run that nothing happened to: not to be written to."""
  workdir = tmp_path_factory.mktemp("runs") / "done"
  runs.train(runs.low(data), workdir)
  return workdir
