"""Two real processes share an evaluation, and one is killed as it draws or scores."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixsigma_jax.evaluate import folder
from tests import commands, compilation
from tests.evaluate import networks
from tests.sample import models

ROOT = pathlib.Path(__file__).parents[2]
small_inception = networks.small_inception
SECONDS = 600  # of patience with one job, on a machine that does much else
SILENCE = 30  # seconds of a machine; a process that is gone is noticed at once
PER_TASK = 1  # six images
SCORED = 6  # images in three parts
# The command, with parts of two items and a tiny Inception. It notes each file of the
# kind NOTED that gets its name; at file KILLED_AT of process 1, it kills itself while
# the file still has its temporary name.
PROGRAM = """
import os, pathlib, runpy, signal, sys
from pixsigma_jax import disk
from pixsigma_jax.evaluate import scoring
from tests.evaluate import networks

notes, mine = pathlib.Path(os.environ["NOTES"]), []


def noting(publish):
  def noted(partial, path):
    if path.suffix != os.environ["NOTED"]:
      return publish(partial, path)
    if os.environ.get("KILLED_AT") == str(len(mine)):
      os.kill(os.getpid(), signal.SIGKILL)
    mine.append("/".join(path.parts[-2:]) if path.suffix == ".parquet" else path.name)
    publish(partial, path)
    notes.write_text("\\n".join(mine))

  return noted


disk.publish, disk.publish_new = noting(disk.publish), noting(disk.publish_new)
scoring.ITEMS_PER_PART = 2
networks.shrink_inception(setattr)
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


def job(count, arguments, logs, noted=".png", killed_at=None):
  """Exit codes, logs and noted files of the command in `count` processes."""
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
        "NOTED": noted,
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
  found = [
    path.read_text().split("\n") if path.exists() else []
    for path in (logs / f"{index}.notes" for index in range(count))
  ]
  return codes, texts, found


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


@pytest.fixture
def score(tmp_path, small_inception):
  """The flags of an evaluation of others' images, from prompts to report."""
  random = np.random.default_rng(0)
  for name in ("real", "theirs"):
    (tmp_path / name).mkdir()
    for i in range(SCORED):
      pixels = random.integers(0, 256, (300, 310, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(tmp_path / name / f"{i:05d}.png")
  lines = [{"prompt": "a", "reference": f"real/{i:05d}.png"} for i in range(SCORED)]
  (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
  inception = networks.write_inception(tmp_path / "inception.safetensors")
  return [
    *("4k", f"--prompts_file={tmp_path / 'prompts.jsonl'}"),
    *("--height=300", "--width=310", "--seam_period=64"),
    *(f"--images=theirs={tmp_path / 'theirs'}", "--scorers=texture,fid,clip"),
    *(f"--inception={inception}", f"--clip={networks.write_clip(tmp_path / 'clip')}"),
    *("--resamples=20", "--distance_resamples=3"),
  ]


def parts(output):
  """Each part of scores by its path: its rows, and when it was written."""
  return {
    str(path.relative_to(output)): (pq.read_table(path), path.stat().st_mtime_ns)
    for path in output.glob("**/*.parquet")
  }


def figures(output):
  [model] = json.loads((output / "report.json").read_text())["models"]
  return {f["name"]: (f["value"], f["low"], f["high"]) for f in model["figures"]}


def test_processes_share_the_scoring_and_score_as_one_does(score, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  codes, texts, _ = job(
    1, [*score, f"--output={one}"], tmp_path / "one_log", ".parquet"
  )
  assert codes == [0], texts
  codes, texts, noted = job(
    2, [*score, f"--output={two}"], tmp_path / "two_log", ".parquet"
  )
  assert codes == [0, 0], "\n".join(texts)
  # Every second part each, of fid those of the references, too.
  scorers = ["clip", "fid", "fid", "texture"]
  assert [sorted(own) for own in noted] == [
    sorted(f"{scorer}/0000{part}.parquet" for scorer in scorers for part in own)
    for own in ((0, 2), (1,))
  ]
  ours, theirs = parts(two), parts(one)
  assert set(ours) == set(theirs)
  assert all(rows.equals(theirs[path][0]) for path, (rows, _) in ours.items())
  ours, theirs = figures(two), figures(one)
  assert {"fid", "clip", "glcm-score"} < set(theirs)
  assert set(ours) == set(theirs)
  for name, values in ours.items():
    assert values == pytest.approx(theirs[name], rel=1e-9, abs=1e-9), name


def test_a_process_killed_as_it_scores_leaves_whole_parts_and_the_rest_are_made_alone(
  score, tmp_path
):
  output = tmp_path / "evaluation"
  command = [*score, f"--output={output}"]
  codes, texts, first = job(2, command, tmp_path / "killed", ".parquet", killed_at=2)
  assert codes[1] == -9
  assert codes[0] == 1, texts[0]
  assert "Process 1 on " in texts[0].splitlines()[-1]
  assert len(first[1]) == 2
  assert list(output.glob("**/*.partial"))
  before = parts(output)  # each can be read
  assert not (output / "report.json").exists()
  codes, texts, second = job(2, command, tmp_path / "again", ".parquet")
  assert codes == [0, 0], "\n".join(texts)
  after = parts(output)
  assert len(after) == 4 * 3
  assert len(second[0] + second[1]) == len(after) - len(before)
  assert {path: t for path, (_, t) in after.items() if path in before} == {
    path: t for path, (_, t) in before.items()
  }
  assert not list(output.glob("**/*.partial"))
  assert "fid" in figures(output)
