"""Table 4: what every stage takes, on the paper's machines and on today's."""

from collections.abc import Sequence
from typing import Any

from pixsigma_jax.chips import CHIPS, PRICES, UTILIZATION
from pixsigma_jax.plan import topology
from pixsigma_jax.plan.plan import Plan, make_plan
from pixsigma_jax.plan.stage import stage_on
from pixsigma_jax.reproduce import stages
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table
from pixsigma_jax.reproduce.stages import GPUS, STAGES, PaperStage

MACHINES = ("v5e:8x8", "v5p:2x4x4", "v6e:8x8", "h100:8", "h200:8")
PRICED_ON = "h100:8"  # the machine of docs/stages.md and of the configs' docstrings

_DAY = 86_400


def run(options: Options) -> Result:
  """Table 4 of all stages on all machines."""
  del options
  return reproduce(STAGES, MACHINES)


def reproduce(rows: Sequence[PaperStage], machines: Sequence[str]) -> Result:
  """Table 4 of these stages on these machines."""
  data: dict[str, Any] = {}
  for row in rows:
    config = stages.config_of(row.config)
    found = stages.operations(config)
    data[row.config] = {
      "forward_flops": found.forward,
      "step_flops": found.step,
      "stage_flops": found.total,
      "paper": _paper(row, found.total),
      "machines": _plans(config, machines),
    }
  _pool(rows, data)
  return Result(
    title="Table 4: operations, days and price of every stage",
    setting={
      "model": "XL/2 as each config has it, square images, captions of 300 tokens",
      "machines": ", ".join(machines),
      "utilization": f"the planning figure is {UTILIZATION:.0%} of the peak unless a "
      "step was measured; bounds are `plan`'s roofline",
    },
    tables=(_papers_table(rows, data), *_our_tables(rows, machines, data)),
    remarks=(
      "Implied utilization is what the paper's GPU-days leave of the peak in half "
      "precision: 125 TFLOP/s of a V100, 312 of an A800. The columns after it are the "
      "days at the mean utilization of all rows on that GPU: where they differ from "
      "the paper's, its rows differ among themselves.",
      "The paper counts 1K with compression at half the batch of 1K without, so their "
      "days cannot be compared.",
      "Times and prices leave out features, saving, validation and samples.",
    ),
    data=data,
  )


def cost_table(rows: Sequence[PaperStage] = STAGES) -> Table:
  """The table of docs/stages.md: every stage on eight H100."""
  found = []
  for row in rows:
    config = stages.config_of(row.config)
    counted, plan = stages.operations(config), plan_of(config, PRICED_ON)
    hours = plan.expected_seconds * config["total_steps"] / 3600
    found.append(
      (
        f"`{stages.file_of(row.config)}`",
        f"{counted.forward / 1e12:.3f}",
        f"{counted.total / 1e18:.1f}",
        f"{plan.expected_seconds:.2f}",
        f"{hours:.1f}",
        f"{hours * plan.stage.topology.chips:.0f}",
        f"${plan.expected_dollars:.0f}",
        f"${plan.dollars:.0f}",
      )
    )
  header = (
    *("Config", "Forward, TFLOP an image", "Whole stage, 10¹⁸", "Seconds a step"),
    *("Hours", "H100-hours", "Cost", "At least"),
  )
  return Table("Hours and cost on eight H100", header, found)


def plan_of(config: dict[str, Any], machine: str, state: Any = None) -> Plan:
  """The analytic plan of a stage on machines, see `topology.parse`.

  Args:
    state: see `stage_on`.
  """
  return make_plan(stage_on(config, topology.parse(machine), state), compiles=False)


def _paper(row: PaperStage, flops: float) -> dict[str, Any] | None:
  if row.days is None or row.gpu is None:
    return None
  peak = CHIPS[GPUS[row.gpu]].flops
  share = flops / (row.days * _DAY * peak)
  return {"gpu": row.gpu, "gpu_days": row.days, "implied_utilization": share}


def _pool(rows: Sequence[PaperStage], data: dict[str, Any]) -> None:
  """Adds the days at the mean utilization of a GPU's rows, weighed by their days."""
  for gpu, kind in GPUS.items():
    own = [row for row in rows if row.gpu == gpu]
    spent = sum(row.days or 0.0 for row in own) * _DAY * CHIPS[kind].flops
    if not spent:
      continue
    share = sum(data[row.config]["stage_flops"] for row in own) / spent
    for row in rows:
      flops = data[row.config]["stage_flops"]
      at_mean = data[row.config].setdefault("days_at_mean_utilization", {})
      days = flops / (share * CHIPS[kind].flops) / _DAY
      at_mean[gpu] = {"utilization": share, "gpu_days": days}


def _plans(config: dict[str, Any], machines: Sequence[str]) -> dict[str, Any]:
  """By machine: days and price to plan with, and their lower bounds."""
  found, state = {}, None
  for machine in machines:
    try:
      plan = plan_of(config, machine, state)
    except ValueError as error:  # the batch does not divide over it
      found[machine] = {"refused": str(error)}
      continue
    steps, state = config["total_steps"], plan.stage.state
    found[machine] = {
      "dollars_a_chip_hour": PRICES[machine.partition(":")[0]],
      "chips": plan.stage.topology.chips,
      "expected_days": plan.expected_seconds * steps / _DAY,
      "expected_dollars": plan.expected_dollars,
      "least_days": plan.days,
      "least_dollars": plan.dollars,
      "most_utilization": plan.mfu,
      "measured": plan.calibration is not None,
      "fits": plan.fits,
    }
  return found


def _papers_table(rows: Sequence[PaperStage], data: dict[str, Any]) -> Table:
  header = (
    *("Config", "Row of table 4", "Pixels", "Forward, TFLOP an image"),
    *("Whole stage, 10¹⁸", "The paper's GPU-days", "Implied utilization"),
    *("V100-days at the mean", "A800-days at the mean"),
  )
  cells = []
  for row in rows:
    own = data[row.config]
    paper, at_mean = own["paper"], own.get("days_at_mean_utilization", {})
    cells.append(
      (
        f"`{stages.file_of(row.config)}`",
        row.row,
        str(row.pixels),
        f"{own['forward_flops'] / 1e12:.3f}",
        f"{own['stage_flops'] / 1e18:.1f}",
        f"{paper['gpu_days']:g} {paper['gpu']}" if paper else "",
        f"{paper['implied_utilization']:.1%}" if paper else "",
        *(f"{at_mean[gpu]['gpu_days']:.1f}" if gpu in at_mean else "" for gpu in GPUS),
      )
    )
  return Table("The paper's numbers and what they imply", header, cells)


def _our_tables(
  rows: Sequence[PaperStage], machines: Sequence[str], data: dict[str, Any]
) -> list[Table]:
  tables = []
  for machine in machines:
    price = PRICES[machine.partition(":")[0]]
    header = (
      "Config",
      "Days",
      "Price",
      "At least, days",
      "At least",
      "At most of peak",
    )
    cells = []
    for row in rows:
      plan = data[row.config]["machines"][machine]
      name = f"`{stages.file_of(row.config)}`"
      if "refused" in plan:
        cells.append((name, "not planned", "", "", "", ""))
        continue
      does_not = "" if plan["fits"] else " (does not fit as configured)"
      cells.append(
        (
          name + does_not,
          f"{plan['expected_days']:.3g}",
          f"${plan['expected_dollars']:,.0f}",
          f"{plan['least_days']:.3g}",
          f"${plan['least_dollars']:,.0f}",
          f"{plan['most_utilization']:.0%}",
        )
      )
    tables.append(Table(f"{machine}, at ${price:.2f} a chip-hour", header, cells))
  return tables
