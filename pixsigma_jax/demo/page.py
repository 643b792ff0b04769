"""The demo page: its fields, and the gallery of a pipeline's images.

Nothing here talks to any machine but the one that it is served to: Gradio's telemetry,
its look for newer versions and its record of runs are off, and its fonts are files.
"""

import contextlib
import dataclasses
import html
import inspect
import pathlib
import queue
import re
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import gradio as gr
from PIL import Image

from pixsigma_jax.data import buckets
from pixsigma_jax.data.buckets import Bucket
from pixsigma_jax.demo import fields
from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.call_arguments import StopDrawing
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.sample.settings import SETTINGS, Choice, Settings

# What the gallery, the settings, the seed and the previews show next.
Images: TypeAlias = list[tuple[str, str]]
Shown: TypeAlias = tuple[Images, dict[str, Any], int, Images]

WORKER = "demo-drawing"  # name of the thread that draws
IMAGES_OWN = "of the image"  # a size on offer
_SIZE = re.compile(r"\s*(\d+)\s*[×x]\s*(\d+)\s*")
_MOST_GUIDANCE, _MOST_SCALE = 20, 2  # where sliders end
_REMEMBERED = 64  # images in the gallery
_COLUMNS, _GALLERY_HEIGHT, _SETTINGS_HEIGHT = 3, 560, 320  # pixels, but for the first
_PREVIEWS_HEIGHT = 160
_SEEDS = 2**32
_HOUR, _DAY = 3600, 86400  # seconds
# A miniature's images are smaller than their place: enlarge them with square pixels.
_CSS = ".miniature img, #previews img { image-rendering: pixelated; }"


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the page refuses.

  Attributes:
    max_n: images of a request.
    max_steps: steps of an image.
    max_pixels: of an image; None for four times the training's.
    max_upload: bytes of a file.
    max_queue: requests that wait.
  """

  max_n: int = 16
  max_steps: int = 100
  max_pixels: int | None = None
  max_upload: int = 20 << 20
  max_queue: int = 128

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")

  def check(self, pipeline: Pipeline, prompt: str, asked: Mapping[str, Any]) -> None:
    """Refuses what is beyond a limit, and all that the pipeline refuses.

    Raises:
      ValueError: it is, with the flag that sets the limit.
    """
    settings = Settings.of({name: asked[name] for name in SETTINGS if name in asked})
    _at_most("images", settings.num_images_per_prompt, "max_n", self.max_n)
    _at_most("steps", settings.num_inference_steps, "max_steps", self.max_steps)
    most = self.max_pixels or 4 * pipeline.resolution**2
    for image in pipeline.plan(prompt, **asked):
      _at_most("pixels", image.height * image.width, "max_pixels", most)


def _at_most(what: str, number: int, name: str, most: int) -> None:
  if number > most:
    raise ValueError(
      f"{number} {what} are asked for, and this page draws {most} at most: ask for "
      f"fewer, or start it with another --{name}."
    )


def sizes(resolution: int) -> dict[str, Bucket]:
  """The sizes on offer, in pixels, by what they are called: "height × width".

  The training's buckets, from the widest to the highest; for a miniature, of which
  there is no table, a square, twice as wide and twice as high.
  """
  if resolution in buckets.BUCKETS:
    offered = list(buckets.sampling_buckets(resolution).values())
  else:
    double = 2 * resolution
    sides = [(resolution, double), (resolution, resolution), (double, resolution)]
    offered = [Bucket(height, width) for height, width in sides]
  return {size_name(height, width): Bucket(height, width) for height, width in offered}


def size_name(height: int, width: int) -> str:
  """What the page calls a size."""
  return f"{height} × {width}"


def _size_of(name: str) -> dict[str, int]:
  """Settings of a size by its name; none for the image's own."""
  if name == IMAGES_OWN:
    return {}
  sides = _SIZE.fullmatch(name or "")
  if sides is None:
    raise ValueError(f"The size {name!r} must be HEIGHT × WIDTH, in pixels.")
  return {"height": int(sides[1]), "width": int(sides[2])}


def draw(
  pipeline: Pipeline,
  prompt: str,
  size: str,
  asked: Mapping[str, Any],
  *,
  random_seed: bool = False,
  image: str | None = None,
  mask_image: str | None = None,
  lora_scales: Sequence[float | int | None] = (),
  limits: Limits = Limits(),
  stop: threading.Event | None = None,
  earlier: Sequence[tuple[str, str]] = (),
) -> Iterator[Shown]:
  """Draws, and yields the page's content at each step and with each image.

  Args:
    size: HEIGHT × WIDTH, or `IMAGES_OWN`.
    asked: settings by name, as their fields show them; one that was emptied is None.
    random_seed: takes another seed each time, and does not look at the one asked for.
    image, mask_image: files of an image to edit, and of its mask.
    lora_scales: of the pipeline's LoRAs, one for each.
    stop: ends drawing after the next step, once it is set; images that are ready stay.
    earlier: images that the gallery shows after the new ones.

  Yields:
    The gallery so far, PNG files with a caption each; the settings of its first
    image; the seed; and previews of the images that are being drawn. The files are
    there until the next is asked for.

  Raises:
    gr.Error: what the pipeline or a limit refuses, in their own words, an empty seed,
      and an image that cannot be written.
  """
  stop = threading.Event() if stop is None else stop
  with _folder() as folder:
    gallery: Images = []
    settings: dict[str, Any] = {}
    try:
      values = {name: fields.value_of(name, shown) for name, shown in asked.items()}
      total: int = SETTINGS["num_images_per_prompt"].check(
        values["num_images_per_prompt"]
      )
      if random_seed:
        _at_most("images", total, "max_n", limits.max_n)
        values["seed"] = secrets.randbelow(_SEEDS - total + 1)
      elif values["seed"] is None:
        raise ValueError("There is no seed: give a number, or tick the box beside it.")
      first = values["seed"] = SETTINGS["seed"].check(values["seed"])
      arguments = values | _size_of(size)
      if image is not None:
        arguments["image"] = image
      if mask_image is not None:
        arguments["mask_image"] = mask_image
      limits.check(pipeline, prompt, arguments)
      pipeline = _with_loras(pipeline, lora_scales)
      _tell(0, total)
      for found in _events(pipeline, prompt, arguments, stop):
        previews: Images = []
        if isinstance(found, _Step):
          for number, preview in found.previews:
            path = pathlib.Path(folder, f"preview-{number}-{found.step}.png")
            preview.save(path)
            caption = f"seed {first + number}, step {found.step} of {found.steps}"
            previews.append((str(path), caption))
        else:
          _, drawn, own = found
          path = pathlib.Path(folder, f"seed-{own['seed']}.png")
          image_files.save(path, drawn, own)
          gallery.append((str(path), f"seed {own['seed']}"))
          settings = settings or own
          _tell(len(gallery), total)
        yield [*gallery, *earlier][:_REMEMBERED], settings, first, previews
    except (ValueError, OSError) as error:
      raise _error(str(error)) from error


@contextlib.contextmanager
def _folder() -> Iterator[str]:
  """An empty folder that is gone with its block, also when a generator is collected.

  `tempfile.TemporaryDirectory` warns then that nobody has closed it.
  """
  folder = tempfile.mkdtemp()
  try:
    yield folder
  finally:
    shutil.rmtree(folder)


class _Step(NamedTuple):
  """A step that was taken: its number from 1 on, of how many, and what is seen."""

  step: int
  steps: int
  previews: list[tuple[int, Image.Image]]


def _events(
  pipeline: Pipeline, prompt: str, arguments: Mapping[str, Any], stop: threading.Event
) -> Iterator[Any]:
  """Steps, and images as `Pipeline.stream` has them, drawn by a thread of its own.

  A step that nobody has looked at when the next thing happens is left out.
  """
  found: queue.SimpleQueue[Any] = queue.SimpleQueue()

  def watch(_: Pipeline, step: int, timestep: float, known: dict[str, Any]) -> None:
    if stop.is_set():
      raise StopDrawing
    seen = [
      (number, pipeline.preview(latents))
      for number, latents in zip(known["images"], known["clean_latents"], strict=True)
    ]
    found.put(_Step(step + 1, known["num_steps"], seen))

  def work() -> None:
    try:
      for image in pipeline.stream(prompt, callback_on_step_end=watch, **arguments):
        found.put(image)
        if stop.is_set():
          break
      found.put(None)
    except BaseException as error:  # it is the reader's
      found.put(error)

  worker = threading.Thread(target=work, name=WORKER, daemon=True)
  worker.start()
  try:
    while (event := found.get()) is not None:
      if isinstance(event, BaseException):
        raise event
      if not isinstance(event, _Step) or found.empty():
        yield event
  finally:
    stop.set()
    worker.join()


def _with_loras(pipeline: Pipeline, scales: Sequence[float | int | None]) -> Pipeline:
  """The pipeline with its LoRAs at these scales."""
  names = list(pipeline.loras.loaded)
  if None in scales:
    raise ValueError(
      f"The LoRA {names[scales.index(None)]} has no scale: give 0 to leave it out."
    )
  wanted = {name: float(s) for name, s in zip(names, scales, strict=True) if s}
  acting = {name: s for name, s in pipeline.loras.scales.items() if s}
  if wanted == acting:
    return pipeline
  return pipeline.set_adapters(list(wanted), list(wanted.values()))


def guidance_of(sampler: str) -> float:
  """The guidance that a sampler has unless another is asked for."""
  return Settings(sampler=sampler).guidance_scale


def settings_of(gallery: list[tuple[str, str]], event: gr.SelectData) -> dict[str, Any]:
  """Settings of the image that was clicked on."""
  return image_files.settings_of(pathlib.Path(gallery[event.index][0]))


def settings_to_fields(pipeline: Pipeline, settings: Mapping[str, Any]) -> Any:
  """What the fields show to draw an image again, by its settings.

  An image to edit is in no file: it stays what it is on the page, and its share of
  the steps is set.

  Returns:
    The prompt, the size, the settings by name, and the scales of the LoRAs.

  Raises:
    gr.Error: there are no settings, or a LoRA is not among the page's.
  """
  if not settings:
    raise _error("There are no settings yet: draw an image, or click on one.")
  values = {
    name: fields.shown(name, settings.get(name, setting.default))
    for name, setting in SETTINGS.items()
    if name not in ("height", "width", "num_images_per_prompt")
  }
  values["num_images_per_prompt"] = 1
  if "image_digest" in settings:
    size = IMAGES_OWN
  else:
    size = size_name(settings["height"], settings["width"])
  known = {one.fingerprint: name for name, one in pipeline.loras.loaded.items()}
  scales = dict.fromkeys(pipeline.loras.loaded, 0.0)
  for lora in settings.get("loras", ()):
    if lora["fingerprint"] not in known:
      raise _error(
        f"The image was drawn with the LoRA {lora['path']}, which this page does not "
        "have: start it with another --lora."
      )
    scales[known[lora["fingerprint"]]] = lora["scale"]
  return settings["prompt"], size, values, list(scales.values())


def build(pipeline: Pipeline, limits: Limits = Limits()) -> gr.Blocks:
  """The page of a pipeline, not yet served."""
  offered = [*sizes(pipeline.resolution), IMAGES_OWN]
  defaults: Any = Settings()
  square = size_name(pipeline.resolution, pipeline.resolution)
  of: dict[str, Any] = {}  # fields by the setting's name
  stops: dict[str | None, threading.Event] = {}  # of what each tab has asked for
  with gr.Blocks(
    title="PixArt-Σ", analytics_enabled=False, delete_cache=(_HOUR, _DAY)
  ) as page:
    gr.Markdown("# PixArt-Σ")
    with gr.Row():
      with gr.Column(scale=1):
        prompt = gr.Textbox(label="Prompt", autofocus=True, elem_id="prompt")
        of["negative_prompt"] = gr.Textbox(
          label="Negative prompt", info=SETTINGS["negative_prompt"].help
        )
        size = gr.Dropdown(
          offered,
          value=square,
          label="Size (height × width)",
          allow_custom_value=True,
          elem_id="size",
        )
        with gr.Row():
          of["sampler"] = gr.Dropdown(
            list(_choices("sampler")),
            value=defaults.sampler,
            label="Sampler",
            elem_id="sampler",
          )
          of["num_inference_steps"] = gr.Slider(
            *(1, limits.max_steps),
            value=min(defaults.num_inference_steps, limits.max_steps),
            step=1,
            precision=0,
            label="Steps",
            elem_id="steps",
          )
        of["guidance_scale"] = gr.Slider(
          *(0, _MOST_GUIDANCE),
          value=defaults.guidance_scale,
          step=0.1,
          label="Guidance",
          info=SETTINGS["guidance_scale"].help,
          elem_id="guidance",
        )
        with gr.Row():
          of["seed"] = gr.Number(
            value=defaults.seed, precision=0, label="Seed", elem_id="seed"
          )
          random_seed = gr.Checkbox(value=False, label="Random seed")
        of["num_images_per_prompt"] = gr.Slider(
          *(1, limits.max_n),
          value=defaults.num_images_per_prompt,
          step=1,
          precision=0,
          label="Images",
          elem_id="count",
        )
        with gr.Row():
          button = gr.Button("Draw", variant="primary", elem_id="draw")
          cancel = gr.Button("Cancel", elem_id="cancel")
        with gr.Accordion("Edit an image", open=False, elem_id="edit"):
          with gr.Row():
            image, mask_image = (
              gr.Image(type="filepath", sources=["upload"], label=label, elem_id=name)
              for label, name in (
                ("Image", "image"),
                ("Mask: white is drawn anew", "mask_image"),
              )
            )
          of |= {name: fields.field(name) for name in fields.ABOUT_IMAGES}
        scales = _lora_fields(pipeline)
        for title, names in fields.GROUPS.items():
          with gr.Accordion(title, open=False):
            of |= {name: fields.field(name) for name in names}
      with gr.Column(scale=2):
        gallery = gr.Gallery(
          label="Images",
          interactive=False,
          columns=_COLUMNS,
          fit_columns=False,
          height=_GALLERY_HEIGHT,
          object_fit="contain",
          buttons=["download", "fullscreen"],
          elem_id="pictures",
          elem_classes=[] if pipeline.resolution in buckets.BUCKETS else ["miniature"],
        )
        previews = gr.Gallery(
          label="Being drawn",
          interactive=False,
          height=_PREVIEWS_HEIGHT,
          object_fit="contain",
          buttons=[],
          elem_id="previews",
        )
        settings = gr.JSON(
          label="Settings of the image",
          max_height=_SETTINGS_HEIGHT,
          elem_id="settings",
        )
        reuse = gr.Button("Reuse these settings", elem_id="reuse")

    def pressed(shown: dict[Any, Any], request: gr.Request) -> Iterator[Shown]:
      stop = stops[request.session_hash] = threading.Event()
      yield from draw(
        pipeline,
        shown[prompt],
        shown[size],
        {name: shown[one] for name, one in of.items()},
        random_seed=shown[random_seed],
        image=shown[image],
        mask_image=shown[mask_image],
        lora_scales=[shown[scale] for scale in scales],
        limits=limits,
        stop=stop,
        earlier=shown[gallery] or (),
      )

    def stopped(request: gr.Request) -> Images:
      if (stop := stops.pop(request.session_hash, None)) is not None:
        stop.set()
      return []

    def again(settings: dict[str, Any] | None) -> dict[Any, Any]:
      text, name, values, scale_values = settings_to_fields(pipeline, settings or {})
      shown = {prompt: text, size: name, random_seed: False}
      shown |= {of[setting]: value for setting, value in values.items()}
      return shown | dict(zip(scales, scale_values, strict=True))

    everything = [prompt, size, random_seed, *of.values(), *scales]
    hidden: Any = {"api_visibility": "private"}
    drawing = gr.on(
      [button.click, prompt.submit],
      # Unwrapped: Gradio tells a generator by a flag that decorators hide from it.
      inspect.unwrap(pressed),
      {*everything, image, mask_image, gallery},
      [gallery, settings, of["seed"], previews],
      show_progress_on=settings,
      **hidden,
    )
    cancel.click(stopped, None, previews, queue=False, cancels=drawing, **hidden)
    page.unload(stopped)
    of["sampler"].input(guidance_of, of["sampler"], of["guidance_scale"], **hidden)
    image.upload(lambda: IMAGES_OWN, None, size, **hidden)
    image.clear(lambda: square, None, size, **hidden)
    gallery.select(settings_of, gallery, settings, **hidden)
    reuse.click(again, settings, everything, **hidden)
  return page.queue(max_size=limits.max_queue)


def _lora_fields(pipeline: Pipeline) -> list[gr.Slider]:
  if not pipeline.loras.loaded:
    return []
  most = max(_MOST_SCALE, *map(abs, pipeline.loras.scales.values()))
  with gr.Accordion("LoRAs", open=True, elem_id="loras"):
    return [
      gr.Slider(
        *(-most, most),
        value=pipeline.loras.scales.get(name, 0.0),
        step=0.05,
        label=name,
        info="How much it counts; 0 leaves it out.",
      )
      for name in pipeline.loras.loaded
    ]


def serve(
  pipeline: Pipeline, host: str, port: int, limits: Limits = Limits()
) -> gr.Blocks:
  """Serves a pipeline's page, from threads of its own, until `close()` is called on it.

  Its address is its `local_url`.

  Raises:
    OSError: the port is taken, or the address is another machine's.
  """
  try:
    socket.create_server((host, port)).close()
  except OSError as error:
    raise OSError(
      f"Cannot listen at {host}:{port}: {error}. Give others with --host and --port."
    ) from error
  page = build(pipeline, limits)
  page.launch(
    server_name=host,
    server_port=port,
    css=_CSS,
    max_file_size=limits.max_upload,
    share=False,
    ssr_mode=False,
    run_history=False,
    footer_links=[],
    prevent_thread_lock=True,
    quiet=True,
  )
  return page


def wait(server: gr.Blocks) -> None:
  """Waits until Ctrl-C, which ends a served page and is raised again.

  Gradio's own `block_thread` keeps the interrupt to itself.
  """
  try:
    threading.Event().wait()
  finally:
    server.close(verbose=False)


def _choices(name: str) -> tuple[str, ...]:
  kind = SETTINGS[name].kind
  assert isinstance(kind, Choice)
  return kind.names


def _tell(done: int, count: int) -> None:
  gr.Progress()((done, count), desc="Drawing", unit="images")


def _error(message: str) -> gr.Error:
  # Shown as HTML until it is closed; no news to whoever watches the console.
  return gr.Error(
    html.escape(message, quote=False), duration=None, print_exception=False
  )
