"""Nouns of captions: taggers behind one name, and the one that needs no model.

The paper counts nouns (PixArt-Σ, table 1) and does not say with which tagger, nor
whether it joins "dog" with "dogs". Here a noun is a common or proper noun as it is
written, in lower case, and every figure that is made of nouns names its tagger. Figures
of two taggers do not compare.
"""

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from pixsigma_jax import errors

_SPACY = "spacy:"
_NLTK_DATA = "punkt_tab averaged_perceptron_tagger_eng"


@runtime_checkable
class Tagger(Protocol):
  """A tagger, which finds nouns."""

  name: str  # as `load_tagger` takes it, and as every output states it

  def nouns(self, text: str) -> list[str]:
    """The nouns of a text in their order, lower case, repeated as often as they are."""
    ...


@functools.cache
def load_tagger(name: str) -> Tagger:
  """The tagger of that name; the same one again when it is asked for again.

  Args:
    name: "rules"; "spacy:" and an installed pipeline or its folder; or "nltk".

  Raises:
    ValueError: there is no such tagger, or what it needs is not installed.
  """
  if name == "rules":
    return _Rules()
  if name == "nltk":
    return _Nltk()
  if name.startswith(_SPACY) and name != _SPACY:
    return _Spacy(name.removeprefix(_SPACY))
  raise ValueError(
    f"There is no noun tagger {name!r}: give rules, {_SPACY}MODEL (for example "
    f"{_SPACY}en_core_web_sm), or nltk."
  )


class _Spacy:
  """Nouns as a pipeline of spaCy tags them."""

  def __init__(self, model: str):
    self.name = f"{_SPACY}{model}"
    try:
      spacy = importlib.import_module("spacy")
    except ImportError as error:
      if not errors.of_absence(error, "spacy"):
        raise
      raise ValueError(
        f"The tagger {self.name} needs spaCy: pip install spacy, then "
        f"python -m spacy download {model}."
      ) from None
    try:
      self._pipeline: Callable[[str], Any] = spacy.load(model)
    except OSError as error:
      if errors.of_system(error):
        raise
      raise ValueError(
        f"spaCy has no pipeline {model}: python -m spacy download {model}, or give its "
        "folder."
      ) from error

  def nouns(self, text: str) -> list[str]:
    tokens = list(self._pipeline(text))
    # An untrained pipeline would count no nouns at all, and nobody would notice.
    if tokens and not any(token.pos_ for token in tokens):
      raise ValueError(
        f"The pipeline of {self.name} does not tag parts of speech: give one that "
        f"does, for example {_SPACY}en_core_web_sm."
      )
    return [t.text.lower() for t in tokens if t.pos_ in ("NOUN", "PROPN")]


class _Nltk:
  """Nouns as NLTK's averaged perceptron tags them."""

  name = "nltk"

  def __init__(self):
    try:
      nltk = importlib.import_module("nltk")
    except ImportError as error:
      if not errors.of_absence(error, "nltk"):
        raise
      raise ValueError(
        "The tagger nltk needs NLTK: pip install nltk, then "
        f"python -m nltk.downloader {_NLTK_DATA}."
      ) from None
    self._tag: Callable[[Sequence[str]], list[tuple[str, str]]] = nltk.pos_tag
    self._split: Callable[[str], list[str]] = nltk.word_tokenize
    try:
      self.nouns("A dog.")
    except LookupError as error:
      raise ValueError(
        f"NLTK has no data to tag with: python -m nltk.downloader {_NLTK_DATA}."
      ) from error

  def nouns(self, text: str) -> list[str]:
    tagged = self._tag(self._split(text))
    return [word.lower() for word, tag in tagged if tag.startswith("NN")]


class _Rules:
  """English nouns by closed lists of words, endings, and the word before.

  Whatever no rule takes away is a noun, which is right more often than not in captions.
  Words in other alphabets than the Latin one are never counted.
  """

  name = "rules"

  def nouns(self, text: str) -> list[str]:
    text = text.lower().replace("’", "'")
    found, before = [], ""
    for match in _WORD.finditer(text):
      word, _, ending = match[0].partition("'")
      # "the woman's", but "doesn't" and the like
      if ending != "t" and _is_noun(word, before):
        found.append(word)
      # A word says nothing about one beyond a stop or a comma.
      before = "" if text[match.end() : match.end() + 1] in _STOPS else word
    return found


# Letters of the Latin alphabets, joined by hyphens and apostrophes.
_WORD = re.compile(r"[a-zß-öø-ɏḀ-ỿ]+(?:['-][a-zß-öø-ɏḀ-ỿ]+)*")
_STOPS = frozenset(".!?;:,")


def _words(text: str) -> frozenset[str]:
  return frozenset(text.split())


# After these stands a noun or its adjectives, never a verb in a finite form.
_DETERMINERS = _words("""
  a an the this that these those my your his her its our their some any no every each
  either neither another such several many few both all various multiple numerous own
  other one two three four five six seven eight nine ten eleven twelve dozen hundred
  thousand first second third last next
""")
_FUNCTION_WORDS = _DETERMINERS | _words("""
  i me mine myself you yours yourself he him himself she hers herself it itself we us
  ours ourselves they them theirs themselves who whom whose which what whatever
  whoever someone somebody something anyone anybody anything everyone everybody
  everything nobody nothing none there here where when while why how about above
  across after against along alongside amid amidst among amongst around as at atop
  before behind below beneath beside besides between beyond but by despite down during
  except for from in inside into like near of off on onto opposite out outside over
  past per plus since than through throughout to toward towards under underneath until
  up upon versus via vs with within without and or nor so yet if because although
  though unless whether be is am are was were been being do does did done doing have
  has had having will would shall should can could may might must cannot not also
  again ahead almost alone already always apart away back even ever far forward
  further hence however indeed instead just maybe meanwhile more moreover most much
  never now often once only perhaps please quite rather soon still then therefore thus
  today together too twice very well less least enough upward upwards downward
  downwards backward backwards sideways indoors outdoors overhead nearby elsewhere
  everywhere somewhere half etc eg ie
""")

_ADJECTIVES = _words("""
  red orange yellow green blue purple violet pink brown black white gray grey golden
  silver beige teal turquoise cyan magenta maroon navy crimson scarlet blond blonde
  tan big small large little tiny huge giant tall short long wide narrow deep shallow
  high low thick thin broad vast great grand major minor main massive immense full
  empty young old new ancient modern early late recent vintage antique contemporary
  medieval good bad better best worse worst nice fine beautiful pretty lovely cute
  elegant ornate intricate delicate detailed complex simple plain rich poor fresh dry
  wet damp cold warm hot cool mild bright dark light dim pale vivid vibrant soft hard
  rough smooth sharp blunt gentle calm serene quiet loud silent still busy crowded
  open round square flat curved straight steep sheer solid hollow heavy loose tight
  clear clean dirty dusty muddy rusty dull shiny glossy matte transparent translucent
  opaque lush dense sparse bare leafy grassy rocky sandy snowy icy rainy cloudy sunny
  misty foggy windy stormy hazy starry moonlit sunlit wooden woolen metallic happy sad
  angry scared excited playful cozy comfortable casual formal stylish fluffy furry
  hairy bushy curly wavy fuzzy shaggy spiky stripy left right top upper lower inner
  outer central distant close near far middle front rear vertical horizontal diagonal
  parallel same different similar certain particular specific general common rare
  unique special typical usual strange weird odd normal whole entire single double
  triple important significant prominent visible invisible present absent able likely
  possible real true false fake digital electric electronic human male female adult
  elderly royal urban rural local global foreign national international public private
  french english german italian spanish chinese japanese korean american european
  african asian indian russian dutch greek roman gothic victorian baroque british
  pristine majestic imagesque sleek sturdy lone ready aware alive asleep awake
  barefoot upright timeless immaculate complete separate opposite extreme ultra super
  ultimate expressive cinematic photorealistic hyperrealistic futuristic isometric
  realistic surreal minimalist abstract bold crisp subtle stark slight strong weak
  quick slow fast brief sudden precious pure raw ripe sweet sour bitter spicy tropical
  overall additional adjacent abundant distinct evident apparent
""")

# Base forms of verbs of captions. A noun of the same form is taken for one only where
# a determiner or an adjective stands before it.
_VERBS = _words("""
  accentuate accompany achieve add adjust adorn allow appear approach arrange ascend
  ask attach await balance bask become begin belong bend blend blur bring build
  capture carry cast catch cause celebrate change chase climb cling close combine come
  complement compose comprise connect consist contain continue contrast contribute
  convey cover create cross curl cut dance decorate depict describe descend dine
  display divide dominate dot draw dress drink drive eat emanate embellish emerge emit
  emphasize encircle enclose engage engross enhance enjoy evoke exhibit explore
  express extend exude face fade fall feature feed feel fill find fit flank float flow
  fly focus follow form frame gather gaze get give glance glisten glow go grace graze
  grow guard hang happen have help highlight hint hold hop hover illuminate imply
  include incorporate indicate infuse interact invite join jump keep kneel know lay
  lead lean leap leave lend let lie line listen live look loom lounge make match
  mingle mirror move nestle occupy offer overlook perch perform peer permeate place
  play point ponder portray pose position possess prepare preserve produce protrude
  provide pull push put radiate reach read receive reflect relax remain represent
  resemble rest reveal ride rise roam roll run rush say scatter see seem send serve
  set shape share shed shimmer shine show showcase shroud sit situate sleep slide
  smile soak soar sparkle speak splash spread sprawl sprinkle stand stare stay step
  stretch strike stroll suggest support surround suspend swim swing symbolize take
  talk tell think throw tilt touch tower transform travel try turn twinkle use utilize
  view visit wait walk wander want wash watch wear weave work wrap write
""")
_IRREGULAR = _words("""
  ate began begun bent blew blown bore bought brought built came caught chose chosen
  clung drawn drew driven drove eaten fallen fed fell felt fled flew flown found gave
  given gone got grew grown held hidden hung kept knew known laid lain lay led left
  lit made met paid put ran rode risen said sang sat saw seen sent shaken shone shown
  slept sold spoke spoken spun stood stuck swam taken taught thought threw thrown told
  took torn went woke wore worn woven wrapped written wrote
""")

# Nouns that the endings below would take away.
_NOUNS = _words("""
  building buildings painting drawing ceiling evening morning clothing wedding
  lighting setting railing awning string spring ring king wing thing sling sibling
  duckling covering clearing being beings opening parking feeling meaning beginning
  icing stocking earring earrings piercing frosting roofing flooring lightning pudding
  viking bed seed shed weed reed speed breed deed feed need steed sled thread bread
  head bead lead hundred family lily butterfly fly belly jelly assembly lady body
  bully ally supply reply dragonfly firefly italy monopoly anomaly archive motive
  perspective detective native alternative olive hive drive dive locomotive executive
  narrative music fabric logic magic traffic picnic clinic graphic mosaic topic comic
  ceramic attic relic critic mechanic arctic atlantic pacific mimic tunic garlic
  plastic animal metal meal festival portal arrival canal cathedral petal hospital
  mural crystal capital coral journal material medal pedal signal terminal trial
  ritual interval goal coal seal deal sandal individual professional carnival bridal
  manual pal opal cereal charcoal proposal survival general admiral corporal table
  cable vegetable stable fable cabbage bible marble pebble bubble rubble dish fish
  radish relish polish finish parish forest harvest chest nest guest west vest quest
  interest test crest priest breast pest feast beast east coast toast circus cactus
  octopus campus bus virus walrus hippopotamus handful mouthful armful chandelier
""")
_ADJECTIVE_ENDING = re.compile(
  r"(?:ous|ful|less|able|ible|ish|ive|ic|ical|al|ial|esque|est|like|ern|ary)$"
)
_COMPOUND_ADJECTIVE = re.compile(
  r"-(?:ed|ing|like|shaped|style|free|based|up|old|out|down|year)$"
)


@functools.lru_cache(maxsize=1 << 17)  # captions repeat themselves
def _is_noun(word: str, before: str) -> bool:
  if len(word) == 1 or word in _FUNCTION_WORDS:
    return False
  singular = word[:-1] if word.endswith("s") and not word.endswith("ss") else word
  if word in _NOUNS or singular in _NOUNS:
    return True
  if word in _ADJECTIVES or word.endswith("ly"):
    return False
  if "-" in word:
    tail = word.rpartition("-")[2]
    return not _COMPOUND_ADJECTIVE.search(word) and _is_noun(tail, "the")
  if _is_verb(word):
    # "the view" and "a deep shade", but "the surrounding trees"
    expected = before in _DETERMINERS or before in _ADJECTIVES
    return expected and not word.endswith(("ing", "ed"))
  if word in _IRREGULAR or word.endswith(("ed", "ing")):
    return False
  return not (len(word) > 4 and _ADJECTIVE_ENDING.search(word))


def _is_verb(word: str) -> bool:
  """Whether a word may be a form of a verb of the list."""
  if word in _VERBS:
    return True
  for ending in ("s", "es", "ed", "ing"):
    if word.endswith(ending):
      stem = word.removesuffix(ending)
      # "shows"; "captured", "capturing"; "carries", "carried"
      forms = {stem, f"{stem}e", re.sub("i$", "y", stem)}
      if ending in ("ed", "ing") and stem[-1:] == stem[-2:-1]:
        forms.add(stem[:-1])  # "sitting"
      if forms & _VERBS:
        return True
  return False
