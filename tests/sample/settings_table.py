"""Writes the table of settings into docs/sampling.md.

python -m tests.sample.settings_table
"""

import json
import pathlib
import re

from pixsigma_jax.sample.settings import SETTINGS, Choice

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "sampling.md"
_HEAD = "| Argument | Default | Is |\n|---|---|---|\n"
_SECTIONS = {
  "height": "Sizes",
  "guidance_scale": "Guidance and masks",
  "guidance_method": "Guidance and masks",
  "pag_scale": "Guidance and masks",
  "autoguidance_scale": "Guidance and masks",
  "skip_layer_guidance_scale": "Guidance and masks",
  "step_caching": "Step caching",
  "seed": "Seeds",
  "sampler": "Samplers",
  "timesteps": "Samplers",
  "use_karras_sigmas": "Samplers",
  "use_resolution_binning": "Sizes",
  "unconditional_mask": "Guidance and masks",
  "caption_cleaning": "Prompts",
}
_EDITING = {
  "strength": "from-an-image",
  "outpaint": "around-an-image",
  "prompt_weighting": "weights-of-words",
}
_PROMPT = "| `prompt` | required | A text or several. |\n"


def table():
  """Its rows, in Markdown."""
  rows = []
  for name, setting in SETTINGS.items():
    default = setting.default
    shown = json.dumps(default) if isinstance(default, str) else repr(default)
    shown = setting.default_is or f"`{shown}`"
    text = re.sub(r'("[^"]*")', r"`\1`", setting.help)
    if isinstance(setting.kind, Choice):
      text += f" One of {', '.join(f'`{n}`' for n in setting.kind.names)}."
    if setting.of_a_prompt and name != "seed":
      text += " One for all prompts, or a list with one for each."
    if name in _EDITING:
      text += f" See [editing.md](editing.md#{_EDITING[name]})."
    if name in _SECTIONS:
      section = _SECTIONS[name]
      text += f" See [{section}](#{section.lower().replace(' ', '-')})."
    rows.append(f"| `{name}` | {shown} | {text} |\n")
  return _HEAD + _PROMPT + "".join(rows)


def written(page):
  """The page with the table in it."""
  start = page.index(_HEAD)
  end = page.index("\n\n", start) + 1
  return page[:start] + table() + page[end:]


if __name__ == "__main__":
  PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
