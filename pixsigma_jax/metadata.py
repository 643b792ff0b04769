"""Metadata of a checkpoint: what it may be used for, and where it comes from."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import platform
import subprocess
import uuid
from typing import Any, TypeAlias

import jax

import pixsigma_jax

Json: TypeAlias = Any  # what JSON holds

# 2 adds `history` and `software`, which are None in what format 1 has written.
FORMAT = 2
READABLE = (1, FORMAT)


@dataclasses.dataclass(frozen=True)
class History:
  """The run, and its branch, that made a checkpoint or a snapshot.

  A run that goes back to an earlier checkpoint begins a branch: from there on its steps
  are not those that were made before.

  Attributes:
    run: identity of the run, made at its first start.
    branches: (identity, step that it began after), oldest first.
  """

  run: str
  branches: tuple[tuple[str, int], ...] = ()

  @classmethod
  def new(cls) -> "History":
    """History of a new run."""
    return cls(uuid.uuid4().hex[:12])

  @classmethod
  def from_json(cls, fields: dict[str, Json]) -> "History":
    """The inverse of `dataclasses.asdict`, also after a round trip through JSON."""
    branches = tuple((str(name), int(step)) for name, step in fields["branches"])
    return cls(str(fields["run"]), branches)

  def branch_after(self, step: int) -> "History":
    """History of what is made after going back to a step."""
    return History(self.run, (*self._until(step), (uuid.uuid4().hex[:8], step)))

  def has_made(self, other: "History", step: int) -> bool:
    """Whether what `other` made of a step is what this one made, or would."""
    return self.run == other.run and self._until(step - 1) == other._until(step - 1)

  def _until(self, step: int) -> tuple[tuple[str, int], ...]:
    return tuple(branch for branch in self.branches if branch[1] <= step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
  """Everything about a checkpoint that its arrays do not show.

  Attributes:
    stage: name of the training stage that wrote it.
    model: hyper-parameters, `dataclasses.asdict(PixArtConfig)`.
    autoencoder: identity of what made the latents.
    scaling_factor: what those latents were multiplied with for training.
    text_encoder: identity of what made the caption embeddings.
    resolution: side of the stage's square images, in pixels.
    provenance: how it came to be, oldest first: one entry a stage, with its parent's
      path and step, the transforms applied and its config.
    history: run and branch that made it; None of what no run has made, and of format 1.
    software: what wrote it, see `software`; None of format 1. Does not count when two
      are compared.
  """

  stage: str
  model: dict[str, Json]
  autoencoder: dict[str, Json]
  scaling_factor: float
  text_encoder: dict[str, Json]
  resolution: int
  provenance: tuple[dict[str, Json], ...] = ()
  history: History | None = None
  software: dict[str, Json] | None = dataclasses.field(default=None, compare=False)

  def to_json(self) -> dict[str, Json]:
    """Metadata as JSON, which has no tuples."""
    return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))

  @classmethod
  def from_json(cls, fields: dict[str, Json]) -> "Metadata":
    """The inverse of `to_json`.

    Raises:
      ValueError: another format, or fields that are not this one's.
    """
    fields = dict(fields)
    if (have := fields.pop("format", None)) not in READABLE:
      raise ValueError(
        f"Checkpoint metadata has format {have!r}; this version of pixsigma_jax reads "
        f"format {' and '.join(map(str, READABLE))}."
      )
    expected = {field.name for field in dataclasses.fields(cls)}
    if have == 1:
      expected -= {"history", "software"}
    if set(fields) != expected:
      raise ValueError(
        "Checkpoint metadata does not have the fields of its format: "
        f"missing {sorted(expected - set(fields))}, "
        f"unknown {sorted(set(fields) - expected)}."
      )
    history = fields.pop("history", None)
    return cls(
      **{**fields, "provenance": tuple(fields["provenance"])},
      history=history and History.from_json(history),
    )


@functools.cache
def software() -> dict[str, Json]:
  """Versions of the running software: package, code, commit, JAX and Python.

  `code` is a hash of the package's Python files by name and content, `commit` that of
  the repository which the package lies in, None where there is none.
  """
  package = pathlib.Path(__file__).parent
  digest = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    content = path.read_bytes()
    name = path.relative_to(package).as_posix()
    digest.update(f"{name}\0{len(content)}\0".encode() + content)
  return {
    "version": pixsigma_jax.__version__,
    "code": digest.hexdigest()[:16],
    "commit": _commit(package.parent),
    "jax": jax.__version__,
    "python": platform.python_version(),
  }


def _commit(root: pathlib.Path) -> str | None:
  if not (root / ".git").exists():  # installed, maybe within a repository of others
    return None
  command = ["git", "-C", str(root), "rev-parse", "HEAD"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):  # there is no git, or it hangs
    return None
  return done.stdout.strip() or None if done.returncode == 0 else None


def disagreements(have: Json, want: Json, name: str = "") -> list[str]:
  """Every field in which two JSON values differ, as `name: have → want`."""
  if isinstance(have, dict) and isinstance(want, dict):
    keys = list(have) + [key for key in want if key not in have]
    return [
      line
      for key in keys
      for line in disagreements(
        have.get(key), want.get(key), f"{name}.{key}" if name else key
      )
    ]
  if isinstance(have, tuple | list) and isinstance(want, tuple | list):
    have, want = list(have), list(want)  # JSON knows no tuples
  return [] if have == want else [f"{name}: {have!r} → {want!r}"]
