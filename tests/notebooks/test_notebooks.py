"""The notebooks: what each must be to open in Colab, and all of them run, in small.

What runs is the file itself, in a kernel of Jupyter; only the values of its form fields
are others, so that it reads small weights in the published formats.
"""

import ast
import base64
import importlib
import io
import pathlib
import re
import sys

import jax
import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from pixsigma_jax import checkpoint
from pixsigma_jax.convert import from_diffusers
from pixsigma_jax.convert.files import open_weights, read_json
from pixsigma_jax.convert.lora import write_lora
from pixsigma_jax.diffusion.solvers import SAMPLERS
from pixsigma_jax.models.attention import CHOICES
from pixsigma_jax.models.kv_compression import WINDOWS, KVCompression
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import Pipeline, image_files
from pixsigma_jax.sample.encoders import RememberedCaptions
from pixsigma_jax.sample.settings import SETTINGS, Choice
from pixsigma_jax.transforms import add_kv_compression, interpolate_pe
from tests import compilation
from tests.convert.published import write_t5, write_tokenizer
from tests.convert.published_vae import make_vae
from tests.convert.test_lora import lora, random_adapter
from tests.convert.test_main import write_diffusers, write_official
from tests.test_house import ROOT, pyproject

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)

# A form field of Colab: one line, name, value, and what the form shows.
FIELD = re.compile(r"^(?P<name>[A-Z_]+) = (?P<value>.*?)(?P<form>  # @param .*)$", re.M)
LINE = r"(?:[^\n]|(?<=\\)\n)*"  # with those that a backslash joins to it
ESCAPE = re.compile(rf"^( *)[!%]{LINE}", re.M)  # IPython's, not Python's
COMMAND = re.compile(rf"python -m pixsigma_jax\.(\w+)({LINE})")

# What the package knows of what some forms offer.
KNOWN = {
  "SAMPLER": set(SAMPLERS),
  "ATTENTION": set(CHOICES),
  "RATIO": set(WINDOWS),
}


def read(path):
  return nbformat.read(path, as_version=4)


def code_of(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_fields(notebook, **values):
  """The notebook with other values in its form fields.

  A value that no field takes, or that the form does not offer, is a mistake.
  """
  left = dict(values)

  def changed(field):
    name = field["name"]
    return f"{name} = {left.pop(name)!r}{field['form']}" if name in left else field[0]

  for cell in code_of(notebook):
    cell.source = FIELD.sub(changed, cell.source)
  assert left == {}, "there is no such field"
  return notebook


def run(notebook, folder):
  """Runs the notebook in `folder`, in a kernel that knows nothing of this process."""
  folder.mkdir(exist_ok=True)
  with pytest.MonkeyPatch.context() as monkeypatch:
    # As in an activated environment, on a machine without a network.
    python = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(python), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in compilation.environment().items():
      monkeypatch.setenv(name, value)
    # Not in the home of whoever runs the tests.
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
      monkeypatch.setenv(name, str(folder.parent / name.lower()))
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
  return notebook


def printed(notebook):
  """All text that the cells have printed, in order."""
  outputs = [out for cell in code_of(notebook) for out in cell.outputs]
  return "".join(out.text for out in outputs if out.output_type == "stream")


def shown(notebook):
  """All images that the cells have displayed, in order."""
  bundles = [out.get("data", {}) for cell in code_of(notebook) for out in cell.outputs]
  files = [io.BytesIO(base64.b64decode(d["image/png"])) for d in bundles if len(d) > 1]
  return [Image.open(file) for file in files]


def levels(image):
  return np.asarray(image, int)


# What every notebook is.


def test_all_notebooks_are_here_and_in_the_docs():
  names = {path.name for path in NOTEBOOKS}
  assert names == {"sample.ipynb", "convert.ipynb", "transform.ipynb"}
  docs = (ROOT / "docs" / "notebooks.md").read_text()
  assert names == set(re.findall(r"\w+\.ipynb", docs))


@each_notebook
def test_is_a_python_notebook_without_outputs(path):
  notebook = read(path)
  nbformat.validate(notebook)
  assert notebook.metadata.kernelspec["name"] == "python3"
  for cell in code_of(notebook):
    assert (cell.outputs, cell.execution_count) == ([], None)


@each_notebook
def test_opens_with_what_it_is_about_and_one_install_cell(path):
  first, *others = read(path).cells
  assert first.source.startswith("# ")
  assert "**not measured on Colab**" in first.source
  installs = [cell for cell in others if "pip install" in cell.source]
  assert installs == [next(cell for cell in others if cell.cell_type == "code")]


@each_notebook
def test_a_sentence_stands_before_every_cell(path):
  kinds = [cell.cell_type for cell in read(path).cells]
  assert kinds == ["markdown"] + ["markdown", "code"] * (len(kinds) // 2)


@each_notebook
def test_every_field_is_a_form_that_colab_reads_and_is_used(path):
  code = [cell.source for cell in code_of(read(path))]
  lines = [line for source in code for line in source.splitlines() if "@param" in line]
  fields = [FIELD.fullmatch(line) for line in lines]
  assert all(fields), lines
  for field in fields:
    value = ast.literal_eval(field["value"])
    form = field["form"].removeprefix("  # @param ")
    kind = re.search(r'{type:"(\w+)"}', form)
    setting = SETTINGS.get(field["name"].lower())
    if setting is not None and path.stem == "sample":
      assert value == setting.default or setting.name in ("height", "width")
    if form.startswith("["):
      choices = ast.literal_eval(form.partition("]")[0] + "]")
      assert value in choices
      assert set(choices) <= KNOWN.get(field["name"], set(choices))
      assert isinstance(value, str) == (kind is None)  # other choices are taken raw
    else:
      kinds = {"string": str, "integer": int, "number": float, "boolean": bool}
      assert kind[1] == "raw" or type(value) is kinds[kind[1]]
    if setting is not None and path.stem == "sample":
      continue  # all of them are used by one line
    uses = sum(len(re.findall(rf"\b{field['name']}\b", source)) for source in code)
    assert uses > 1, f"{field['name']} changes nothing"


def test_the_first_notebook_has_a_field_for_every_setting_and_all_its_choices():
  code = "\n".join(
    cell.source for cell in code_of(read(ROOT / "notebooks/sample.ipynb"))
  )
  forms = {field["name"].lower(): field["form"] for field in FIELD.finditer(code)}
  assert set(SETTINGS) <= set(forms)
  for name, setting in SETTINGS.items():
    if isinstance(setting.kind, Choice):
      offered = forms[name].removeprefix("  # @param ")
      assert ast.literal_eval(offered) == list(setting.kind.names)


@each_notebook
def test_names_only_what_there_is(path):
  for cell in code_of(read(path)):
    for node in ast.walk(ast.parse(ESCAPE.sub(r"\1pass", cell.source))):
      if isinstance(node, ast.ImportFrom):
        module = importlib.import_module(node.module)
        for alias in node.names:
          if not hasattr(module, alias.name):
            importlib.import_module(f"{node.module}.{alias.name}")
      elif isinstance(node, ast.Import):
        for alias in node.names:
          importlib.import_module(alias.name)


@each_notebook
def test_commands_and_their_flags_are_there(path):
  # The text too: what it says has to be true of the commands.
  found = [m for cell in read(path).cells for m in COMMAND.finditer(cell.source)]
  assert found
  for room, rest in (match.groups() for match in found):
    main = (ROOT / "pixsigma_jax" / room / "__main__.py").read_text()
    known = {"help", *re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', main)}
    assert set(re.findall(r"(?<!\S)--(\w+)", rest.partition("`")[0])) <= known


@pytest.mark.parametrize(
  ("runtime", "wheel"),
  [("v5e-1 TPU", "jax[tpu]"), ("T4 GPU", "jax[cuda12]"), ("CPU", "jax")],
)
def test_the_install_cells_ask_pip_for_the_package_and_its_accelerator(
  tmp_path, runtime, wheel
):
  """All three, in a kernel where nothing is installed and pip only says what it got."""
  bare = nbformat.v4.new_code_cell(
    "import importlib.util\n"
    "importlib.util.find_spec = lambda name: None\n"
    "get_ipython().register_magic_function(print, magic_name='pip')"
  )
  notebook = nbformat.v4.new_notebook(cells=[bare])
  for path in NOTEBOOKS:
    filled = with_fields(read(path), RUNTIME=runtime, REPOSITORY="https://host/it")
    notebook.cells.append(code_of(filled)[0])
  asked = printed(run(notebook, tmp_path)).splitlines()
  extras = {"sample": "", "convert": "[convert]", "transform": ""}
  assert asked == [
    f'install --quiet "pixsigma-jax{extras[path.stem]} @ git+https://host/it" "{wheel}"'
    for path in NOTEBOOKS
  ]
  declared = pyproject()["project"]
  assert declared["name"] == "pixsigma-jax"
  assert set(extras.values()) <= {
    "",
    *(f"[{extra}]" for extra in declared["optional-dependencies"]),
  }


# What each of them does, with small weights in the published formats.

PROMPTS = ("a (red:1.3) fox in the snow", "two birds above a small house")
LENGTH = 20
FLAGS = f"--caption_length={LENGTH} --scaling_factor=0.13025"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """transformer/, vae/, text_encoder/ and tokenizer/; the folder has a blank."""
  root = tmp_path_factory.mktemp("published") / "a folder"
  root.mkdir()
  write_diffusers(root / "transformer")
  make_vae().save_pretrained(root / "vae")
  write_t5(root / "text_encoder")
  write_tokenizer(root / "tokenizer")
  return root


def executed(name, folder, **fields):
  return run(with_fields(read(ROOT / "notebooks" / name), **fields), folder)


@pytest.fixture(scope="module")
def lora_folder(published, tmp_path_factory):
  """A LoRA of the published transformer."""
  config, params = from_diffusers(
    open_weights(published / "transformer"),
    caption_length=LENGTH,
    config_json=read_json(published / "transformer" / "config.json"),
  )
  path, spec = tmp_path_factory.mktemp("loras") / "style", lora(("qkv",))
  write_lora(path, config, random_adapter(spec, params), spec)
  return path


@pytest.fixture(scope="module")
def sampled(published, lora_folder, tmp_path_factory):
  folder = tmp_path_factory.mktemp("sample") / "work"
  notebook = executed(
    "sample.ipynb",
    folder,
    PROMPTS=" | ".join(PROMPTS),
    NEGATIVE_PROMPT="a car",
    HEIGHT=64,
    WIDTH=96,
    NUM_INFERENCE_STEPS=2,
    SEED=5,
    PREVIEWS=True,
    PAG_SCALE=2.0,
    PAG_APPLIED_LAYERS=(1,),
    PROMPT_WEIGHTING=True,
    LORAS=f"{lora_folder}:0.5",
    DTYPE="float32",
    ATTENTION="chunked",
    MODEL=str(published),
    FLAGS=FLAGS,
    FROZEN=str(published),
    FOLDER="my drive",
  )
  return notebook, folder / "my drive"


def test_sample_draws_what_the_package_draws(sampled, published, lora_folder):
  notebook, folder = sampled
  saved = [folder / "pictures" / f"0000{i}.png" for i in range(2)]
  assert sorted((folder / "pictures").iterdir()) == saved
  pipeline = Pipeline.from_checkpoint(
    folder / "checkpoint",
    frozen=published,
    text_encoder=RememberedCaptions.load(folder / "captions.safetensors"),
    compute=Compute(dtype="float32", attention="chunked"),
    lora=[f"{lora_folder}:0.5"],
  )
  draw = {"height": 64, "width": 96, "num_inference_steps": 2, "seed": 5}
  draw |= {"pag_scale": 2.0, "pag_applied_layers": [1], "prompt_weighting": True}
  expected = pipeline(PROMPTS, negative_prompt="a car", **draw)
  for path, image, about in zip(saved, expected.images, expected.settings, strict=True):
    # Another process with another number of devices may round at a level's edge.
    assert np.abs(levels(Image.open(path)) - levels(image)).max() <= 1
    said = image_files.settings_of(path)
    assert {**said, "checkpoint": about["checkpoint"]} == about
  previews, *one_by_one, grid = shown(notebook)
  assert previews.width >= 96 // 8  # the last; one pixel for each latent at least
  for path, image in zip(saved, one_by_one, strict=True):
    np.testing.assert_array_equal(levels(image), levels(Image.open(path)))
  np.testing.assert_array_equal(levels(grid), levels(Image.open(folder / "grid.png")))


def test_sample_lets_go_of_t5_before_the_transformer_comes(sampled):
  sizes = re.findall(r"^(.+): ([\d.,]+) MB on", printed(sampled[0]), re.M)
  assert [what for what, _ in sizes] == [
    "With T5",
    "Without",
    "The transformer and the VAE",
  ]
  before, after, then = (float(size.replace(",", "")) for _, size in sizes)
  assert before > 0
  assert after == 0
  assert then > 0


@pytest.fixture(scope="module", params=["pixart", "diffusers"])
def converted(request, published, tmp_path_factory):
  folder = tmp_path_factory.mktemp("convert") / "work"
  source, flags = published / "transformer", FLAGS
  if request.param == "pixart":
    source, flags = folder.parent / "it.pth", "--num_heads=4 --scaling_factor=0.13025"
    write_official(source, "ms_plain")
  notebook = executed(
    "convert.ipynb",
    folder,
    HUB="",
    SOURCE=str(source),
    FLAGS=flags,
    FROZEN=str(published),
    IMAGES=2,
    STEPS=2,
  )
  return request.param, notebook, folder / "converted"


def test_convert_verifies_both_ways_and_changes_no_weight(converted):
  layout, notebook, folder = converted
  text = printed(notebook)
  assert "fork" not in text  # JAX warns of it, of deadlocks even
  assert text.count("The same network") == 2
  assert text.count("block 1 ") == 2
  assert (folder / ("back.pth" if layout == "pixart" else "back")).exists()
  (changed,) = re.findall(r"not equal to the bit: \[(.*)\]", text)
  assert changed in ("", "'pos_embed'")
  about = checkpoint.read_metadata(folder / "checkpoint")
  assert f'"resolution": {about.resolution}' in text
  assert about.provenance[0]["format"] == layout


def test_convert_draws_from_the_null_caption_where_there_is_one(converted):
  layout, notebook, folder = converted
  if layout == "diffusers":
    assert "There is no null caption in this layout" in printed(notebook)
    assert shown(notebook) == []
    return
  (grid,) = shown(notebook)
  np.testing.assert_array_equal(levels(grid), levels(Image.open(folder / "grid.png")))
  assert grid.width == 64 + 2 + 64
  one, other = levels(grid)[:64, :64], levels(grid)[:64, -64:]
  assert np.abs(one - other).mean() > 1  # two seeds


@pytest.fixture(scope="module")
def transformed(published, sampled, tmp_path_factory):
  # In the folder that the first notebook has left: its checkpoint is not made again.
  folder = tmp_path_factory.mktemp("transform") / "work"
  notebook = executed(
    "transform.ipynb",
    folder,
    PROMPT=PROMPTS[0],
    BASE_SIZE=8,
    RATIO=4,
    FIRST_LAYER=1,
    LAST_LAYER=1,
    STEPS=2,
    DTYPE="float32",
    MODEL=str(published),
    FLAGS=FLAGS,
    FROZEN=str(published),
    FOLDER=str(sampled[1]),
  )
  return notebook, sampled[1]


def test_transform_saves_what_the_transforms_make_of_the_parent(transformed):
  notebook, folder = transformed
  parent = checkpoint.read_snapshot(folder / "checkpoint")
  child = checkpoint.read_snapshot(folder / "transformed-128")
  config, params = interpolate_pe(parent.config, parent.params, base_size=8)
  config, params = add_kv_compression(config, params, ratio=4, layers=(1,))
  assert child.config == config
  assert config.kv_compression == KVCompression(ratio=4, layers=(1,))
  assert (config.base_size, config.pe_interpolation) == (8, 4.0)
  jax.tree.map(np.testing.assert_array_equal, child.params, params)
  about = child.metadata
  assert (about.resolution, about.autoencoder) == (128, parent.metadata.autoencoder)
  assert [entry["name"] for entry in about.provenance[-1]["transforms"]] == [
    "interpolate_pe",
    "add_kv_compression",
  ]
  assert about.provenance[-1]["parent"]["path"] == str(parent.path)
  text = printed(notebook)
  assert "base_size: 4 → 8" in text
  # A window of 2 x 2, a bias and a norm for each of 48 channels.
  assert f"{48 * (4 + 1 + 2)} more parameters" in text


def test_transform_shows_what_each_transform_does(transformed):
  notebook, folder = transformed
  names = ["1 parent", "2 compressed", "3 extended", "4 interpolated", "5 both"]
  files = [folder / "transformed-128" / f"{name}.png" for name in names]
  drawn = [levels(Image.open(file)) for file in files]
  assert [image.shape[0] for image in drawn] == [64, 64, 128, 128, 128]
  # With and without each transform, from the same noise.
  for without, after in ((0, 1), (2, 3), (3, 4)):
    assert np.abs(drawn[without] - drawn[after]).mean() > 0.1
  assert len(shown(notebook)) == len(names) + 1
