"""Reproductions: the paper's numbers beside ours, and pages of what was found."""

import importlib
import json
import pathlib
import re

import pytest

from pixsigma_jax.chips import CHIPS, PRICES, UTILIZATION
from pixsigma_jax.curate import statistics
from pixsigma_jax.plan import topology
from pixsigma_jax.reproduce import registry, result, stages, table3d, table4
from tests import commands
from tests.prepare import world

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
BY_CONFIG = {row.config: row for row in stages.STAGES}


@pytest.fixture(scope="module")
def cost_table():
  return table4.cost_table()


@pytest.fixture
def reproduce(capsys, monkeypatch):
  return lambda *arguments: commands.run(capsys, monkeypatch, "reproduce", *arguments)


def test_the_papers_gpu_days_imply_their_utilization_by_hand():
  rows = [BY_CONFIG["stage_256_vae"], BY_CONFIG["stage_4k"]]
  data = table4.reproduce(rows, []).data
  # 8,000 steps of 1024 images, 3 x 0.333 TFLOP each, in 5 days of 125 TFLOP/s.
  expected = 3 * 0.333e12 * 1024 * 8000 / (5 * 86400 * 125e12)
  found = data["stage_256_vae"]["paper"]["implied_utilization"]
  assert found == pytest.approx(expected, rel=2e-3)  # 0.333 has three digits
  # A GPU's only row is at the mean of its rows: the paper's days come back.
  for name, gpu, days in (("stage_256_vae", "V100", 5), ("stage_4k", "A800", 12)):
    at_mean = data[name]["days_at_mean_utilization"][gpu]
    assert at_mean["gpu_days"] == pytest.approx(days, rel=1e-12)


def test_plans_expect_the_assumed_share_of_the_peak_and_never_less_than_the_bound():
  row = BY_CONFIG["stage_4k"]
  own = table4.reproduce([row], ["h100:8", "v6e:8x8"]).data["stage_4k"]
  plan = own["machines"]["h100:8"]
  days = own["stage_flops"] / (UTILIZATION * 8 * CHIPS["NVIDIA H100"].flops) / 86400
  assert plan["expected_days"] == pytest.approx(days, rel=1e-9)
  dollars = 24 * days * 8 * PRICES["h100"]
  assert plan["expected_dollars"] == pytest.approx(dollars, rel=1e-9)
  for found in own["machines"].values():
    assert found["least_days"] <= found["expected_days"]
    assert found["least_dollars"] <= found["expected_dollars"]


def test_the_page_of_stages_has_the_costs_that_the_model_computes(cost_table):
  page = (ROOT / "docs" / "stages.md").read_text()
  assert cost_table.markdown() in page
  by_file = {row[0].strip("`"): row for row in cost_table.rows}
  chain = [by_file[stages.file_of(name)] for name in stages.CHAIN]
  hours = sum(float(row[4]) for row in chain)
  # Sums of rounded numbers: each is off by half a unit at most.
  said = re.search(r"chain of six is (\d+) hours and \$(\d+)", page)
  assert abs(hours - int(said[1])) <= 0.5 + 6 * 0.05
  assert abs(sum(int(row[6][1:]) for row in chain) - int(said[2])) <= 6 * 0.5 + 0.5


@pytest.mark.parametrize("name", BY_CONFIG)
def test_a_configs_docstring_has_the_hours_and_the_price_of_its_stage(name, cost_table):
  by_file = {row[0].strip("`"): row for row in cost_table.rows}
  row = by_file[stages.file_of(name)]
  docstring = importlib.import_module(f"configs.{name.partition(':')[0]}").__doc__
  said = " ".join(docstring.split())
  hours, dollars = re.escape(row[4]), re.escape(row[6])
  assert re.search(rf"{hours}( on 8 H100[^$]*)?, {dollars}\b", said), (row, said)
  assert f"${PRICES['h100']:.2f} an H100-hour" in said
  assert f"{UTILIZATION:.0%} of their peak".replace("%", " %") in said


def test_prices_stand_in_one_place():
  for name, generation in topology.GENERATIONS.items():
    assert generation.price is PRICES[name]
  for path in (ROOT / "pixsigma_jax").rglob("*.py"):
    if path.name != "chips.py":
      # `$2.50`, as a price would be written out.
      assert not re.search(r"\$\d+\.\d\d\b", path.read_text()), path


def test_compression_saves_of_the_arithmetic_what_its_operations_are():
  found = table3d.reproduce([table3d.PAIRS[-1]], ["v5e:8x8"]).data["v5e:8x8"]["4096²"]
  full, compressed = found["1"], found["4"]
  flops = [
    stages.operations(stages.config_of(name)).forward for name in table3d.PAIRS[-1][1:]
  ]
  saved = 1 - flops[1] / flops[0]
  assert saved == pytest.approx(1 / 3, abs=0.01)
  for kind in ("step", "image"):
    name = f"{kind}_arithmetic_seconds"
    assert 1 - compressed[name] / full[name] == pytest.approx(saved, rel=1e-9)
    assert full[f"{kind}_seconds"] > full[name]


def test_the_papers_table_3d_saves_what_it_says():
  rows = table3d.reproduce([], []).tables[0].rows
  assert [row[2] for row in rows] == ["56", "37 (-34%)", "191", "125 (-35%)"]
  assert [row[3] for row in rows] == ["58", "38 (-34%)", "91", "60 (-34%)"]


def test_table_1_and_figure_6_are_those_of_an_index(tmp_path, reproduce):
  folder = world.make_folder(tmp_path / "images")
  world.make_index(tmp_path / "index", folder)
  output = tmp_path / "results"
  for name in ("table1", "figure6"):
    done = reproduce(name, f"--index={tmp_path / 'index'}", f"--output={output}")
    assert done.code == 0, done.err
    content = json.loads((output / f"{name}.json").read_text())
    # "a photo of the red house" has six words, "a cat" two.
    kinds = content["data"]["kinds"]
    lengths = {kind: kinds[kind]["average_caption_length"] for kind in kinds}
    assert lengths == {"long": 6.0, "short": 2.0}
    assert (output / f"{name}.md").read_text() == result.page(content)
  assert (output / "figure6.png").exists()
  paper = json.loads((output / "table1.json").read_text())["tables"][1]["rows"]
  assert [tuple(row) for row in paper] == list(statistics.PAPER)


@pytest.mark.parametrize("name", ["table3d", "table4"])
def test_a_published_page_is_what_its_json_says_and_holds_todays_numbers(name):
  content = json.loads((RESULTS / f"{name}.json").read_text())
  assert (RESULTS / f"{name}.md").read_text() == result.page(content)
  # One stage on one machine, as the whole takes minutes.
  if name == "table4":
    now = table4.reproduce([BY_CONFIG["stage_2k"]], ["v5e:8x8"]).data["stage_2k"]
    there = content["data"]["stage_2k"]
    assert there["stage_flops"] == pytest.approx(now["stage_flops"], rel=1e-12)
    machines = there["machines"]["v5e:8x8"], now["machines"]["v5e:8x8"]
  else:
    now = table3d.reproduce([table3d.PAIRS[1]], ["v5e:8x8"]).data["v5e:8x8"]["2K"]
    machines = content["data"]["v5e:8x8"]["2K"]["4"], now["4"]
  assert machines[0] == pytest.approx(machines[1], rel=1e-12)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["table5"], "no reproduction 'table5', only table1"),
    (["table1"], "This needs --index"),
  ],
)
def test_what_cannot_be_reproduced_is_refused(reproduce, tmp_path, arguments, message):
  done = reproduce(*arguments, f"--output={tmp_path / 'out'}")
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert message in done.err
  assert not (tmp_path / "out").exists()


def test_every_name_has_a_module_and_a_row_in_the_docs():
  page = (ROOT / "docs" / "reproduce.md").read_text()
  for name, reproduction in registry.REPRODUCTIONS.items():
    assert f"| `{name}` |" in page
    importlib.import_module(f"pixsigma_jax.reproduce.{reproduction.module}")
