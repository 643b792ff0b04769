"""Takes the image of the demo page that docs/demo.md shows.

python -m tests.demo.screenshot runs/quickstart/compressed docs/images/demo.png
"""

import pathlib
import shutil
import sys
import tempfile

import jax.numpy as jnp

from pixsigma_jax.demo import page
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import Pipeline
from tests.demo.browser import Browser

checkpoint, output = sys.argv[1:]
pipeline = Pipeline.from_checkpoint(checkpoint, compute=Compute(dtype=jnp.float32))
executable = shutil.which("chromium")
assert executable, "There is no chromium on the PATH."
server = page.serve(pipeline, "127.0.0.1", 7860)
with (
  tempfile.TemporaryDirectory() as profile,
  Browser(executable, profile, height=1300) as browser,
):
  browser.do("Page.navigate", url=server.local_url)
  browser.wait("document.querySelector('#draw')?.innerText == 'Draw'")
  browser.type("#prompt textarea", "a green three above a white eight")
  browser.choose("#size", "32 × 16")
  browser.type("#count input[type=number]", "6")
  browser.click("#draw")
  images = "Array.from(document.querySelectorAll('#pictures .thumbnail-lg img'))"
  browser.wait(f"{images}.filter(p => p.complete).length == 6")
  browser.wait("document.querySelector('#settings').innerText.includes('three')")
  browser.rest("#settings")
  browser.screenshot(pathlib.Path(output))
server.close(verbose=False)
