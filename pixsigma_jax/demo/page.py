"""The demo page: its fields, and the gallery of a pipeline's images.

Nothing here talks to any machine but the one that it is served to: Gradio's telemetry,
its look for newer versions and its record of runs are off, and its fonts are files.
"""

import functools
import html
import inspect
import pathlib
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

import gradio as gr

from pixsigma_jax.data import buckets
from pixsigma_jax.data.buckets import Bucket
from pixsigma_jax.sample import pictures
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.sample.settings import SETTINGS, Choice, Settings

# What the gallery, the settings and the seed show next.
Shown: TypeAlias = tuple[list[tuple[str, str]], dict[str, Any], int]

_MOST_STEPS, _MOST_GUIDANCE, _MOST_PICTURES = 100, 20, 16  # where the sliders end
_COLUMNS, _GALLERY_HEIGHT, _SETTINGS_HEIGHT = 3, 560, 320  # pixels, but for the first
_SEEDS = 2**32
_HOUR, _DAY = 3600, 86400  # seconds
# A miniature's pictures are smaller than their place: enlarge them with square pixels.
_CSS = ".miniature img { image-rendering: pixelated; }"


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
  return {f"{height} × {width}": Bucket(height, width) for height, width in offered}


def draw(
  pipeline: Pipeline,
  prompt: str,
  negative_prompt: str,
  size: str,
  sampler: str,
  steps: float | int | None,
  guidance: float | int | None,
  seed: float | int | None,
  random_seed: bool,
  count: float | int | None,
) -> Iterator[Shown]:
  """Draws, and yields the page's content whenever another image is ready.

  A field that was emptied is None.

  Args:
    size: a key of `sizes`.
    seed: of the first picture, the next having one more; not looked at with
      `random_seed`, which takes another one each time.

  Yields:
    The gallery so far, PNG files with a caption each; the settings of its first
    picture; and the seed. The files are there until the next is asked for.

  Raises:
    gr.Error: what the pipeline refuses, in its own words, an empty seed, and a picture
      that cannot be written.
  """
  if seed is None and not random_seed:
    raise _error("There is no seed: give a number, or tick the box beside it.")
  bucket = sizes(pipeline.resolution)[size]
  with tempfile.TemporaryDirectory() as folder:
    gallery, shown = [], {}
    try:
      total: int = SETTINGS["num_images_per_prompt"].check(count)
      if random_seed:
        seed = secrets.randbelow(_SEEDS - total + 1)
      first: int = SETTINGS["seed"].check(seed)
      drawn = pipeline.stream(
        prompt,
        negative_prompt=negative_prompt,
        height=bucket.height,
        width=bucket.width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=first,
        sampler=sampler,
        num_images_per_prompt=total,
      )
      _tell(0, total)
      for _, picture, settings in drawn:
        path = pathlib.Path(folder, f"seed-{settings['seed']}.png")
        pictures.save(path, picture, settings)
        gallery.append((str(path), f"seed {settings['seed']}"))
        shown = shown or settings
        yield list(gallery), shown, first
        _tell(len(gallery), total)
    except (ValueError, OSError) as error:
      raise _error(str(error)) from error


def guidance_of(sampler: str) -> float:
  """The guidance that a sampler has unless another is asked for."""
  return Settings(sampler=sampler).guidance_scale


def settings_of(gallery: list[tuple[str, str]], event: gr.SelectData) -> dict[str, Any]:
  """Settings of the image that was clicked on."""
  return pictures.settings_of(pathlib.Path(gallery[event.index][0]))


def build(pipeline: Pipeline) -> gr.Blocks:
  """The page of a pipeline, not yet served."""
  offered = list(sizes(pipeline.resolution))
  defaults: Any = Settings()
  square = f"{pipeline.resolution} × {pipeline.resolution}"
  with gr.Blocks(
    title="PixArt-Σ", analytics_enabled=False, delete_cache=(_HOUR, _DAY)
  ) as page:
    gr.Markdown("# PixArt-Σ")
    with gr.Row():
      with gr.Column(scale=1):
        prompt = gr.Textbox(label="Prompt", autofocus=True, elem_id="prompt")
        negative_prompt = gr.Textbox(
          label="Negative prompt", info=SETTINGS["negative_prompt"].help
        )
        size = gr.Dropdown(
          offered, value=square, label="Size (height × width)", elem_id="size"
        )
        with gr.Row():
          sampler = gr.Dropdown(
            list(_choices("sampler")),
            value=defaults.sampler,
            label="Sampler",
            elem_id="sampler",
          )
          steps = gr.Slider(
            *(1, _MOST_STEPS),
            value=defaults.num_inference_steps,
            step=1,
            precision=0,
            label="Steps",
          )
        guidance = gr.Slider(
          *(1, _MOST_GUIDANCE),
          value=defaults.guidance_scale,
          step=0.1,
          label="Guidance",
          info=SETTINGS["guidance_scale"].help,
          elem_id="guidance",
        )
        with gr.Row():
          seed = gr.Number(
            value=defaults.seed, precision=0, label="Seed", elem_id="seed"
          )
          random_seed = gr.Checkbox(value=False, label="Random seed")
        count = gr.Slider(
          *(1, _MOST_PICTURES),
          value=defaults.num_images_per_prompt,
          step=1,
          precision=0,
          label="Pictures",
          elem_id="count",
        )
        button = gr.Button("Draw", variant="primary", elem_id="draw")
      with gr.Column(scale=2):
        gallery = gr.Gallery(
          label="Pictures",
          interactive=False,
          columns=_COLUMNS,
          fit_columns=False,
          height=_GALLERY_HEIGHT,
          object_fit="contain",
          buttons=["download", "fullscreen"],
          elem_id="pictures",
          elem_classes=[] if pipeline.resolution in buckets.BUCKETS else ["miniature"],
        )
        settings = gr.JSON(
          label="Settings of the picture",
          max_height=_SETTINGS_HEIGHT,
          elem_id="settings",
        )

    inputs = [prompt, negative_prompt, size, sampler, steps, guidance]
    gr.on(
      [button.click, prompt.submit],
      # Unwrapped: Gradio tells a generator by a flag that decorators hide from it.
      functools.partial(inspect.unwrap(draw), pipeline),
      [*inputs, seed, random_seed, count],
      [gallery, settings, seed],
      show_progress_on=settings,
      api_visibility="private",
    )
    sampler.input(guidance_of, sampler, guidance, api_visibility="private")
    gallery.select(settings_of, gallery, settings, api_visibility="private")
  return page


def serve(pipeline: Pipeline, host: str, port: int) -> gr.Blocks:
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
  page = build(pipeline)
  page.launch(
    server_name=host,
    server_port=port,
    css=_CSS,
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
  gr.Progress()((done, count), desc="Drawing", unit="pictures")


def _error(message: str) -> gr.Error:
  # Shown as HTML until it is closed; no news to whoever watches the console.
  return gr.Error(
    html.escape(message, quote=False), duration=None, print_exception=False
  )
