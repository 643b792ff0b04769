"""Taggers of nouns: what the rules get right, and what the plug-ins are asked."""

import sys
import types

import hypothesis
import pytest
from hypothesis import strategies as st

from pixsigma_jax.curate.nouns import load_tagger

# Prompts and captions that the paper prints, and their nouns as a reader marks them:
# common and proper ones, those before other nouns included ("city buildings": both).
# The word lists were written with these before the author's eyes …
SEEN = {
  "A close-up photo of a person. The subject is a woman. She wore a blue coat with "
  "a gray dress underneath. She has blue eyes and blond hair, and wears a pair of "
  "earrings. Behind are blurred city buildings and streets.": (
    "photo person subject woman coat dress eyes hair pair earrings city buildings "
    "streets"
  ),
  "half a solid black background and half a solid white background": (
    "background background"
  ),
  "Pixel art style of a snowboarder in mid-air performs a trick on a black rail, "
  "wearing a blue sweatshirt and black pants, with arms outstretched. The serene "
  "snowy landscape background, dotted with trees, complements the scene.": (
    "pixel art style snowboarder mid-air trick rail sweatshirt pants arms landscape"
    " background trees scene"
  ),
  "a small cactus with a happy face in the Sahara desert": (
    "cactus face sahara desert"
  ),
  "a cherry pick scientist": ("cherry pick scientist"),
  "The image features a large, ornate church with a tall, pointed roof and a large "
  "stained-glass window. The church is situated in a city, and it has a white and "
  "gray color scheme. The style of the church is Gothic, which is evident from the "
  "pointed roof and the intricate details of the stained-glass window.": (
    "image church roof stained-glass window church city color scheme style church "
    "roof details stained-glass window"
  ),
  "The image captures the grandeur of a cathedral, painted in a pristine white, "
  "stands majestically against the backdrop of a clear blue sky. The entrance to "
  "the cathedral is adorned with a large rose window. Flanking the entrance are "
  "statues of saints, standing as silent guardians of the sacred space within.": (
    "image grandeur cathedral backdrop sky entrance cathedral rose window entrance "
    "statues saints guardians space"
  ),
  "The image features a woman and a man sitting on a brick walkway near a body of "
  "water, which could be a river or a lake. They are both wearing head coverings, "
  "and the woman is holding a handbag. The scene is set during the day, with the "
  "sun shining brightly, creating a warm and inviting atmosphere.": (
    "image woman man brick walkway body water river lake head coverings woman "
    "handbag scene day sun atmosphere"
  ),
  "The image captures a serene scene at a harbor. Two individuals are seated on a "
  "bench, their backs to the camera, engrossed in the view of the water. The water,"
  " a deep shade of blue, is dotted with boats of various sizes and colors, "
  "including a white boat with a green stripe and a red boat. The sky above is a "
  "light blue.": (
    "image scene harbor individuals bench backs camera view water water shade blue "
    "boats sizes colors boat stripe boat sky blue"
  ),
}
# … and these were labeled and measured after the rules were written.
UNSEEN = {
  "A stylish woman walks down a Tokyo street filled with warm glowing neon and "
  "animated city signage. She wears a black leather jacket, a long red dress, and "
  "black boots, and carries a black purse. She wears sunglasses and red lipstick. "
  "She walks confidently and casually. The street is damp and reflective, creating "
  "a mirror effect of the colorful lights. Many pedestrians walk about.": (
    "woman tokyo street neon city signage leather jacket dress boots purse "
    "sunglasses lipstick street mirror effect lights pedestrians"
  ),
  "3D animation of a small, round, fluffy creature with big, expressive eyes "
  "explores a vibrant, enchanted forest. The creature, a whimsical blend of a "
  "rabbit and a squirrel, has soft blue fur and a bushy, striped tail. It hops "
  "along a sparkling stream, its eyes wide with wonder. Flowers that glow and "
  "change colors, trees with leaves in shades of purple and silver, and small "
  "floating lights that resemble fireflies. The creature stops to interact "
  "playfully with a group of tiny, fairy-like beings dancing around a mushroom "
  "ring.": (
    "animation creature eyes forest creature blend rabbit squirrel fur tail stream "
    "eyes wonder flowers colors trees leaves shades purple silver lights fireflies "
    "creature group beings mushroom ring"
  ),
  "he is deep in thought pondering the history of the universe as he sits at a cafe"
  " in Paris, his eyes focus on people offscreen as they walk as he sits mostly "
  "motionless, he is dressed in a wool coat suit coat with a button-down shirt, he "
  "wears a brown beret and glasses and has a very professorial appearance.": (
    "thought history universe cafe paris eyes people wool coat suit coat shirt "
    "beret glasses appearance"
  ),
  "A cute orange kitten sliding down an aqua slide. happy excited. 16mm lens in "
  "front. we see his excitement and scared in the eye. vibrant colors. water "
  "splashing on the lens": (
    "kitten aqua slide lens front excitement eye colors water lens"
  ),
  "a Chinese model is sitting on a train, magazine cover, clothes made of plastic, "
  "photorealistic, futuristic style, gray and green light, movie lighting": (
    "model train magazine cover clothes plastic style light movie lighting"
  ),
  "A realistic landscape shot of the Northern Lights dancing over a snowy mountain "
  "range in Iceland, with long exposure to capture the motion and vibrant colors.": (
    "landscape shot lights mountain range iceland exposure motion colors"
  ),
  "An island with different geographical properties and multiple small cities "
  "floating in space": ("island properties cities space"),
  "Da Vinci's Last Supper oil painting in the style of Van Gogh": (
    "da vinci supper oil painting style van gogh"
  ),
  "A deep forest clearing with a mirrored pond reflecting a galaxy-filled night sky": (
    "forest clearing pond night sky"
  ),
}


def precision_and_recall(labeled):
  right = found = marked = 0
  for text, nouns in labeled.items():
    expected, got = nouns.split(), load_tagger("rules").nouns(text)
    remaining = list(expected)
    for noun in got:
      if noun in remaining:
        remaining.remove(noun)
        right += 1
    found, marked = found + len(got), marked + len(expected)
  return right / found, right / marked


def test_the_rules_read_the_sentences_that_they_were_written_with():
  precision, recall = precision_and_recall(SEEN)
  assert precision > 0.98
  assert recall > 0.96


def test_the_rules_read_nine_of_ten_nouns_of_sentences_that_they_had_not_seen():
  # 97 of the 102 found are right, and 97 of the 106 marked are found.
  precision, recall = precision_and_recall(UNSEEN)
  assert precision > 0.92
  assert recall > 0.88


def test_a_noun_is_counted_as_often_as_it_is_there_in_lower_case():
  nouns = load_tagger("rules").nouns("A Dog, a dog and the woman\u2019s DOG in Paris.")
  assert nouns == ["dog", "dog", "woman", "dog", "paris"]


@pytest.mark.parametrize(
  ("text", "nouns"),
  [
    ("They view the harbor.", ["harbor"]),
    ("The view of it.", ["view"]),
    ("It is old, view it.", []),
    ("They’re old, she doesn't and they can’t.", []),
    ("Flowers and trees cover the fields.", ["flowers", "trees", "fields"]),
    ("A deep shade, the cover.", ["shade", "cover"]),
    ("The tall building is surrounding a sitting man.", ["building", "man"]),
    (
      "Bees carrying a weathered, colorful family portrait",
      ["bees", "family", "portrait"],
    ),
    ("café crème in a bücherei", ["café", "crème", "bücherei"]),
  ],
)
def test_the_word_before_and_the_ending_decide(text, nouns):
  assert load_tagger("rules").nouns(text) == nouns


def test_words_of_other_alphabets_are_no_nouns_of_english():
  assert load_tagger("rules").nouns("一只狗 собака كلب שלום 🐶 कुत्ता") == []


@hypothesis.given(st.text())
def test_any_text_has_nouns_that_are_words_of_it(text):
  lowered = text.lower().replace("\u2019", "'")
  for noun in load_tagger("rules").nouns(text):
    assert noun
    assert noun in lowered


@pytest.mark.parametrize("name", ["", "Rules", "spacy", "spacy:", "wordnet"])
def test_an_unknown_tagger_is_refused_and_the_known_are_named(name):
  with pytest.raises(ValueError, match=f"no noun tagger '{name}': give rules, spacy:"):
    load_tagger(name)


class Token:
  def __init__(self, text, pos):
    self.text, self.pos_ = text, pos


def fake_spacy(monkeypatch, tagged):
  def load(model):
    if model == "missing":
      raise OSError("[E050] Can't find model 'missing'.")
    return lambda text: [Token(*pair) for pair in tagged]

  module = types.ModuleType("spacy")
  monkeypatch.setattr(module, "load", load, raising=False)
  monkeypatch.setitem(sys.modules, "spacy", module)


def test_spacy_gives_common_and_proper_nouns_under_its_name(monkeypatch):
  words = [("A", "DET"), ("Dog", "NOUN"), ("ran", "VERB"), ("Paris", "PROPN")]
  fake_spacy(monkeypatch, words)
  tagger = load_tagger("spacy:some_model_sm")
  assert tagger.name == "spacy:some_model_sm"
  assert tagger.nouns("A Dog ran to Paris") == ["dog", "paris"]


def test_a_pipeline_that_tags_nothing_is_refused_instead_of_counting_no_nouns(
  monkeypatch,
):
  fake_spacy(monkeypatch, [("A", ""), ("dog", "")])
  with pytest.raises(ValueError, match="spacy:blank does not tag parts of speech"):
    load_tagger("spacy:blank").nouns("A dog")


def test_what_spacy_lacks_is_named_with_the_command_that_brings_it(monkeypatch):
  fake_spacy(monkeypatch, [])
  with pytest.raises(ValueError, match="python -m spacy download missing"):
    load_tagger("spacy:missing")
  monkeypatch.setitem(sys.modules, "spacy", None)
  with pytest.raises(ValueError, match="needs spaCy: pip install spacy"):
    load_tagger("spacy:absent")


def fake_nltk(monkeypatch, has_data):
  def pos_tag(words):
    if not has_data:
      raise LookupError("Resource averaged_perceptron_tagger_eng not found.")
    tags = {"A": "DT", "dog": "NN", "dogs": "NNS", "Paris": "NNP", ".": "."}
    return [(word, tags.get(word, "VBD")) for word in words]

  module = types.ModuleType("nltk")
  monkeypatch.setattr(module, "pos_tag", pos_tag, raising=False)
  split = str.split
  monkeypatch.setattr(module, "word_tokenize", split, raising=False)
  monkeypatch.setitem(sys.modules, "nltk", module)


def test_nltk_gives_all_kinds_of_nouns(monkeypatch):
  load_tagger.cache_clear()
  fake_nltk(monkeypatch, has_data=True)
  assert load_tagger("nltk").nouns("A dog saw dogs in Paris .") == [
    "dog",
    "dogs",
    "paris",
  ]


def test_what_nltk_lacks_is_named_with_the_command_that_brings_it(monkeypatch):
  load_tagger.cache_clear()
  fake_nltk(monkeypatch, has_data=False)
  with pytest.raises(ValueError, match=r"python -m nltk\.downloader punkt_tab"):
    load_tagger("nltk")
  monkeypatch.setitem(sys.modules, "nltk", None)
  with pytest.raises(ValueError, match="needs NLTK: pip install nltk"):
    load_tagger("nltk")
