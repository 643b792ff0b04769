"""Keeps what the stages take, so that a change that takes more is noticed.

  python -m benchmarks.keep_plans            # writes tests/plan/kept.json
  python -m benchmarks.keep_plans --compare  # compares with it; CI's second step
  python -m benchmarks.keep_plans --memory   # writes tests/plan/compiled.jsonl, hours

Kept of stage_1k and stage_4k: at full size the model's FLOPs, a device's state, and the
estimates of its memory, its transfers and its step; of the train step that libtpu
compiles for 64 chips, temporary memory, bytes sent and cycles; and the same of both as
miniatures for eight chips. The suite compares the first and the last
(`tests/plan/test_kept.py`); --compare compiles at full size, minutes a stage, and fails
where anything has grown by more than 3 %, or compiling takes longer than its budget.
Give the command without it after a change that is meant to cost what it costs, and say
so in the commit.

`compiled.jsonl` has the memory of varied plans, which the suite holds the estimate of
`plan --nocompile` and `--search` to. --memory compiles each of its plans again, minutes
a plan, puts it in the file at once, and prints it beside the estimate. To have another
plan in it, add its line with 0 bytes.
"""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
from absl import flags, logging

from benchmarks.stages import CONFIGS
from configs import stage_1k, stage_4k
from pixsigma_jax import command, disk
from pixsigma_jax.plan import memory, roofline, topology
from pixsigma_jax.plan.compilation import compile_lowered, lower_train_step
from pixsigma_jax.plan.plan import make_plan
from pixsigma_jax.plan.stage import Stage, stage_on

_COMPARE = flags.DEFINE_bool("compare", False, "Compare at full size; write nothing.")
_MEMORY = flags.DEFINE_bool("memory", False, "Compile the plans of compiled.jsonl.")

_TESTS = pathlib.Path(__file__).parents[1] / "tests" / "plan"
KEPT, COMPILED = _TESTS / "kept.json", _TESTS / "compiled.jsonl"
STAGES = {"stage_1k": stage_1k, "stage_4k": stage_4k}
FULL, SMALL = "v5e:8x8", "v5e:2x4"
MORE = 1.03  # what a change may cost unnoticed
_AGAIN = "python -m benchmarks.keep_plans, and say so in the commit."
BUDGET = 900.0  # seconds of compiling a stage at full size; two cores took 70 to 110
_MESHES = {
  "stage_1k": {"data": 2, "fsdp": 4, "context": 1},
  "stage_4k": {"data": 1, "fsdp": 4, "context": 2},
}
# The longer to compile has layers of both kinds.
_COMPRESSED = {"stage_1k": (0, 1), "stage_4k": (1,)}


def analytic(name: str) -> dict[str, float]:
  """Of a stage at full size on 64 chips, without compiling anything."""
  stage = full_size(name)
  held, time = memory.estimate(stage), roofline.step_time(stage)
  return {
    "flops": time.needed,
    "state bytes": float(held.parameters + held.optimizer + held.averages),
    "temporary bytes, estimated": float(held.temporary),
    "bytes received, modelled": sum(t.bytes for t in time.transfers.values()),
    "step seconds, modelled": time.seconds,
  }


def full_size(name: str) -> Stage:
  """A stage as its config has it, on 64 chips."""
  return stage_on(STAGES[name].get_config().to_dict(), topology.parse(FULL))


def miniature(name: str) -> Stage:
  """A stage of two narrow layers, in everything else itself, on eight chips."""
  config = STAGES[name].get_config()
  config.model.variant = "Nano/2"
  config.model.kv_compression.layers = _COMPRESSED[name]
  config.model.base_size = 32
  config.model.caption_width = 64
  config.mesh.update(_MESHES[name])
  config.batch_size = 8
  return stage_on(config.to_dict(), topology.parse(SMALL))


def compiled(stage: Stage) -> tuple[dict[str, float], float]:
  """Of a stage's train step, and the seconds that compiling it took."""
  program, compilation = compile_lowered(lower_train_step(stage), stage.topology)
  held, cycles = memory.of_compiled(stage, program), compilation.cycles
  if cycles is None:
    raise ValueError(f"A kernel of {stage.config['stage']} is not in plan's table.")
  numbers = {
    "temporary bytes": float(held.temporary + held.gradients),
    "bytes sent": sum(compilation.sent.values()),
    "cycles": cycles,
  }
  return numbers, compilation.seconds


def grown(
  have: Mapping[str, float], kept: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
  """What is more than it may be, by its name: as it was kept, and as it is."""
  if set(have) != set(kept):
    raise ValueError(f"Kept are {', '.join(kept)}, found {', '.join(have)}: {_AGAIN}")
  return {
    name: (kept[name], have[name]) for name in have if have[name] > MORE * kept[name]
  }


def check(kept: Mapping[str, Any]) -> None:
  """Compiles the stages at full size and compares.

  Raises:
    ValueError: something has grown, or compiling took longer than it may.
  """
  installed = metadata.version("libtpu")
  same = installed == kept["libtpu"]
  if not same:
    print(f"Kept of what libtpu {kept['libtpu']} makes, and this is {installed}: only")
    print("how long it compiles is compared.")
  problems = []
  for name in STAGES:
    print(f"{name} at full size, for {FULL} …", flush=True)
    have, seconds = compiled(full_size(name))
    print(f"{name}: {seconds:.0f} s of compiling; {have}", flush=True)
    if seconds > BUDGET:
      problems.append(f"compiling {name} took {seconds:.0f} s of {BUDGET:.0f}")
    more = grown(have, kept["stages"][name]["compiled"]) if same else {}
    for what, (before, now) in more.items():
      problems.append(f"{name} has {now:.4g} {what}, and had {before:.4g}")
  if problems:
    raise ValueError(f"{'; '.join(problems)}. If it is meant to: {_AGAIN}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """A plan that was compiled: a line of `compiled.jsonl`.

  Attributes:
    stage: a name of `benchmarks/stages.py`.
    topology, slices: see `topology.parse`.
    changes: dotted names of the config's fields, and what they are set to.
    bytes: that a device needs at once, the program's own among them; those that the
      compiler asked for in vain if `refused`.
    refused: whether the compiler found none that fits.
    fitted: whether a constant of the estimate was chosen by it.
    jax, libtpu, date: versions that compiled it, and when.
  """

  stage: str
  topology: str
  slices: int
  changes: Mapping[str, Any]
  bytes: int
  refused: bool
  fitted: bool
  jax: str
  libtpu: str
  date: str

  def __str__(self) -> str:
    machines = topology.parse(self.topology, self.slices)
    changes = "".join(f" {name}={value}" for name, value in self.changes.items())
    return f"stage_{self.stage} on {machines}{changes}"

  def planned(self, state: Any = None) -> Stage:
    """The stage on its machines; for the state see `stage_on`."""
    config = CONFIGS[self.stage]()
    config.update_from_flattened_dict(dict(self.changes))
    return stage_on(config.to_dict(), topology.parse(self.topology, self.slices), state)


def read_compiled(path: pathlib.Path = COMPILED) -> list[Compiled]:
  """The plans of a file."""
  lines = path.read_text(encoding="utf-8").splitlines()
  return [Compiled(**json.loads(line)) for line in lines]


def write_compiled(plans: Sequence[Compiled], path: pathlib.Path = COMPILED) -> None:
  """Writes plans into a file."""
  lines = [json.dumps(dataclasses.asdict(plan)) + "\n" for plan in plans]
  disk.write_text(path, "".join(lines))


def compile_again(plans: Sequence[Compiled], path: pathlib.Path = COMPILED) -> None:
  """Compiles plans, and writes each into the file as soon as it is."""
  plans = list(plans)
  print("| plan | GiB a device, compiled | estimated | off by |")
  print("|---|---|---|---|")
  for number, kept in enumerate(plans):
    plan = make_plan(kept.planned(), compiles=True)
    plans[number] = dataclasses.replace(
      kept,
      bytes=plan.memory.total,
      refused=not plan.fits,
      jax=jax.__version__,
      libtpu=metadata.version("libtpu"),
      date=datetime.date.today().isoformat(),
    )
    write_compiled(plans, path)
    print(row(plans[number], memory.estimate(plan.stage).total), flush=True)


def row(kept: Compiled, estimated: int) -> str:
  """A compiled plan beside its estimate in a line of a table."""
  has, refused = kept.bytes / 2**30, ", refused" if kept.refused else ""
  off = estimated / kept.bytes - 1
  return f"| {kept} | {has:.2f}{refused} | {estimated / 2**30:.2f} | {off:+.1%} |"


def main(_: list[str]) -> None:
  """Measures and writes, or compares."""
  jax.config.update("jax_platforms", "cpu")
  logging.set_verbosity(logging.INFO)
  if _MEMORY.value:
    compile_again(read_compiled())
    return
  if _COMPARE.value:
    check(json.loads(KEPT.read_text(encoding="utf-8")))
    return
  stages = {
    name: {
      "full size": analytic(name),
      "compiled": compiled(full_size(name))[0],
      "miniature": compiled(miniature(name))[0],
    }
    for name in STAGES
  }
  kept = {"libtpu": metadata.version("libtpu"), "stages": stages}
  KEPT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
  print(KEPT.read_text(encoding="utf-8"))


if __name__ == "__main__":
  command.run(main)
