"""What docs/serving.md tells to type works, and its tables say all that there is."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml
from absl import flags

from pixsigma_jax.convert.model import Options as Source
from pixsigma_jax.serve import building
from pixsigma_jax.serve.option_flags import OptionFlags
from tests.serve.test_served import serving
from tests.serve.worlds import as_image

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs/serving.md").read_text(encoding="utf-8")


def blocks(language):
  return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_pages_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with serving("--warm_up=none") as (address, _):
    here = "http://127.0.0.1:8000/"
    scope = {}
    for code in blocks("python"):
      exec(code.replace(here, address), scope)
    assert capsys.readouterr().out.splitlines() == [
      *["image_generation.partial_image True"] * 3,
      "image_generation.completed True",
    ]
    _, about = as_image((tmp_path / "seven.png").read_bytes())
    assert (about["prompt"], about["num_inference_steps"]) == ("a red seven", 14)
    assert len(scope["edited"].data) == 1
    if shutil.which("curl") is None:
      pytest.skip("There is no curl on the PATH.")
    _, curl, _ = blocks("bash")
    done = subprocess.run(
      ["bash", "-c", curl.replace(here, address)], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["data"][0]["seed"] == 7
    scope["client"].close()


@pytest.fixture
def options():
  """The flags' names; the flags themselves are gone afterwards."""
  before = set(flags.FLAGS)
  OptionFlags()
  yield sorted(set(flags.FLAGS) - before)
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)


def test_the_table_has_every_flag_and_every_option_has_a_flag(options):
  table = TEXT[TEXT.index("| Flag |") : TEXT.index("## More than one machine")]
  cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
  listed = set(re.findall(r"`--(\w+)`", " ".join(cells)))
  listed = {name.replace("nopos_embed", "pos_embed") for name in listed}
  assert listed == {*options, "drain_delay", "traceback"}
  fields, source = (
    {field.name for field in dataclasses.fields(of)}
    for of in (building.Options, Source)
  )
  assert set(options) == (fields - {"source"}) | source


def test_the_manifest_has_flags_probes_and_time_of_the_command(options):
  manifest = yaml.safe_load_all((ROOT / "launch/serve_kubernetes.yaml").read_text())
  deployment, service, inference = manifest
  pods = deployment["spec"]["template"]["spec"], inference["spec"]["predictor"]
  for pod in pods:
    [container] = pod["containers"]
    assert container["command"] == ["python", "-m", "pixsigma_jax.serve"]
    given = dict(argument[2:].split("=") for argument in container["args"])
    assert set(given) <= {*options, "drain_delay"}
    assert pod["terminationGracePeriodSeconds"] > float(given["deadline"])
    assert container["ports"][0]["containerPort"] == int(given["port"])
    for name, path in {
      "startupProbe": "/health/live",
      "livenessProbe": "/health/live",
      "readinessProbe": "/health/ready",
    }.items():
      probe = container[name]["httpGet"]
      assert (probe["path"], probe["port"]) == (path, int(given["port"]))
    mounted = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == mounted
  assert service["spec"]["ports"][0]["targetPort"] == int(given["port"])
