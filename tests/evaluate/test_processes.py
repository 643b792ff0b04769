"""Two real processes share an evaluation, and one of them is killed as it draws."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from PIL import Image

from pixsigma_jax.evaluate import folder
from tests import commands, compilation
from tests.sample import models

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 600  # of patience with one job, on a machine that does much else
SILENCE = 30  # seconds of a machine; a process that is gone is noticed at once
PER_TASK = 1  # six images
# The command, which notes each image that gets its name; at the image KILLED_AT of
# process 1, it kills itself while the file still has its temporary name.
PROGRAM = """
import os, pathlib, runpy, signal, sys
from pixsigma_jax import disk

publish, notes, mine = disk.publish_new, pathlib.Path(os.environ["NOTES"]), []


def noted(partial, path):
  if os.environ.get("KILLED_AT") == str(len(mine)):
    os.kill(os.getpid(), signal.SIGKILL)
  mine.append(path.name)
  publish(partial, path)
  notes.write_text("\\n".join(mine))


disk.publish_new = noted
sys.argv = ["evaluate", *sys.argv[1:]]
runpy.run_module("pixsigma_jax.evaluate", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def low(tmp_path_factory):
  """A run, untrained."""
  workdir = tmp_path_factory.mktemp("runs") / "low"
  models.save_snapshot(workdir, models.nano(caption_length=12), 10, seed=10)
  return workdir


@pytest.fixture
def prompts(capsys, monkeypatch, low):
  """Writes an evaluation's prompts, and gives the flags that draw them."""

  def prompts(output):
    done = commands.run(
      *(capsys, monkeypatch, "evaluate", "prompts", "digits"),
      *(f"--output={output}", f"--per_task={PER_TASK}"),
    )
    assert done.code == 0, done.err
    return [
      *("sample", "digits", f"--output={output}", f"--checkpoints={low}"),
      *("--num_inference_steps=2", "--dtype=float32", "--batch_size=2"),
    ]

  return prompts


def job(count, arguments, logs, killed_at=None):
  """Exit codes, logs and noted images of the command in `count` processes."""
  logs.mkdir()
  with socket.create_server(("localhost", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"
  flags = [
    f"--coordinator_address={address}",
    f"--num_processes={count}",
    f"--startup_timeout={SECONDS}",
    f"--silence_timeout={SILENCE}",
  ]
  processes = []
  with contextlib.ExitStack() as stack:
    for index in range(count):
      own = [*flags, f"--process_id={index}"] if count > 1 else []
      environment = compilation.environment() | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "NOTES": str(logs / f"{index}.notes"),
      }
      if index == 1 and killed_at is not None:
        environment["KILLED_AT"] = str(killed_at)
      log = stack.enter_context((logs / f"{index}.log").open("w"))
      process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments, *own],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=log,
        stderr=log,
      )
      stack.callback(process.wait)
      stack.callback(process.kill)  # nothing, if it has ended
      processes.append(process)
    codes = [process.wait(SECONDS) for process in processes]
  texts = [(logs / f"{index}.log").read_text() for index in range(count)]
  noted = [
    path.read_text().split("\n") if path.exists() else []
    for path in (logs / f"{index}.notes" for index in range(count))
  ]
  return codes, texts, noted


def images(output):
  """Bytes of whole images by name; each can be read."""
  found = {}
  for path in (output / "models" / "low" / "images").glob("*.png"):
    with Image.open(path) as image:
      image.load()
    found[path.name] = path.read_bytes()
  return found


def test_processes_share_the_drawing_and_draw_what_one_does(prompts, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  codes, texts, _ = job(1, prompts(one), tmp_path / "one_log")
  assert codes == [0], texts
  codes, texts, noted = job(2, prompts(two), tmp_path / "two_log")
  assert codes == [0, 0], "\n".join(texts)
  names = [f"{item.id}.png" for item in folder.open_folder(two).items]
  # Every second prompt each, in whatever order: none twice and none left out.
  assert [sorted(own) for own in noted] == [names[0::2], names[1::2]]
  assert sorted(images(two)) == names
  assert images(two) == images(one)


def test_what_a_killed_process_leaves_is_whole_and_the_job_again_draws_the_rest_alone(
  prompts, tmp_path
):
  output = tmp_path / "evaluation"
  command = prompts(output)
  codes, texts, first = job(2, command, tmp_path / "killed", killed_at=1)
  assert codes[1] == -9
  assert codes[0] == 1, texts[0]
  assert "Process 1 on " in texts[0].splitlines()[-1]
  assert len(first[1]) == 1
  before = images(output)  # what is half written has no image's name
  # Process 0 may be ended between an image and its note.
  assert set(before) >= {*first[0], *first[1]}
  assert len(before) <= len(first[0]) + len(first[1]) + 1
  codes, texts, second = job(2, command, tmp_path / "again")
  assert codes == [0, 0], "\n".join(texts)
  assert set(second[0] + second[1]).isdisjoint(before)
  after = images(output)
  names = [f"{item.id}.png" for item in folder.open_folder(output).items]
  assert sorted(after) == names
  assert before.items() <= after.items()
  # What process 1 had half written is taken away.
  assert sorted(p.name for p in (output / "models/low/images").iterdir()) == names
