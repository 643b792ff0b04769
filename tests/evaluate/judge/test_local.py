"""A judge of transformers on this machine, small and random, beside transformers."""

import io
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pixsigma_jax.convert import image_text
from pixsigma_jax.evaluate.judge import local
from pixsigma_jax.evaluate.judge.client import VERDICTS
from pixsigma_jax.evaluate.study.design import CRITERIA
from tests import commands
from tests.evaluate import preference_world as world
from tests.llava import WORDS, write_llava


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
  return write_llava(tmp_path_factory.mktemp("llava"), words=[*WORDS, "A", "B", "C"])


@pytest.fixture(autouse=True)
def forget():
  """The model that is kept: files of one path change here."""
  image_text.load_image_text.cache_clear()
  yield
  image_text.load_image_text.cache_clear()


def noise(seed):
  random = np.random.default_rng(seed)
  return Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))


def png(image):
  file = io.BytesIO()
  image.save(file, "PNG")
  return file.getvalue()


def test_a_vote_is_the_letter_that_transformers_finds_most_likely(llava):
  judge = local.LocalJudge(llava)
  processor = AutoProcessor.from_pretrained(llava)
  network = AutoModelForImageTextToText.from_pretrained(llava)
  letters = processor.tokenizer.convert_tokens_to_ids(["A", "B", "C"])
  seen = set()
  for seed in range(6):
    images = [noise(seed), noise(100 + seed)]
    reply = judge.ask("a red cat", *map(png, images))
    assert reply.status == "voted"
    for criterion in CRITERIA:
      text = (
        "USER: The prompt:\na red cat\n\nThe first image: <image> The second "
        f"image: <image> {local._QUESTIONS[criterion]} {local._ANSWER} ASSISTANT:"
      )
      inputs = processor(images=[images], text=[text], return_tensors="pt")
      with torch.no_grad():
        logits = network(**inputs).logits[0, -1]
      best = int(logits[letters].argmax())
      assert reply.votes[criterion] == VERDICTS[best]
      seen.add(best)
  assert len(seen) > 1  # what is seen decides


def test_the_command_asks_it_and_what_it_said_is_kept_by_its_weights(
  llava, tmp_path, capsys, monkeypatch
):
  folder = world.make(tmp_path / "folder", prompts=world.PROMPTS[:2]).path
  asked = []
  ask = local.LocalJudge.ask
  monkeypatch.setattr(
    local.LocalJudge, "ask", lambda self, *of: asked.append(of) or ask(self, *of)
  )

  def judge(*flags):
    arguments = [f"--folder={folder}", f"--judge={llava}", "--local", *flags]
    return commands.run(capsys, monkeypatch, "evaluate", "judge", *arguments)

  assert judge().code == 0
  [path] = folder.glob("judges/*/report.json")
  report = json.loads(path.read_text())
  assert (report["questions"]["voted"], report["requests"]) == (12, 0)
  assert len(asked) == 12
  assert judge().code == 0
  assert len(asked) == 12

  weights = f"{llava}/model.safetensors"
  tensors = safetensors.torch.load_file(weights)
  safetensors.torch.save_file(
    {name: tensor + 1 for name, tensor in tensors.items()}, weights, {"format": "pt"}
  )
  image_text.load_image_text.cache_clear()
  assert judge().code == 0
  assert len(asked) == 24
  assert "--local pays for nothing: leave out" in judge("--max_requests=3").err


def test_a_model_without_the_letters_is_refused(tmp_path):
  model = write_llava(tmp_path / "llava")
  with pytest.raises(ValueError, match="has no token for each of A, B, C"):
    local.LocalJudge(model)


def test_a_judge_that_is_not_there_is_named(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"nowhere is neither a folder .* another --judge"
  ):
    local.LocalJudge(str(tmp_path / "nowhere"))
