"""Prompts are cleaned as diffusers cleans them, to the letter."""

import warnings

import pytest
from bs4 import (
  MarkupResemblesLocatorWarning,
  ParserRejectedMarkup,
  XMLParsedAsHTMLWarning,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pixsigma_jax.sample.captions import clean_caption

# Without its networks: cleaning needs none of them.
DIFFUSERS = PixArtSigmaPipeline.__new__(PixArtSigmaPipeline)

CAPTIONS = [
  "",
  "   ",
  "A Small Cactus, with a Happy Face in the Sahara Desert.",
  "  A RED fox  \n in\tthe snow ",
  "a photo of <person> and <PERSON>",
  "see https://example.com/a/b?c=d#e for more",
  "HTTP:/broken www:host http://x example.org/path_x/y-z/ end",
  "write to someone@example.com or visit my.site.co.uk/",
  "ftp.files.ru.net/download free",
  "a%20percent+encoded%21 caption%0Awith a line",
  "100% wool + cotton",
  "<b>bold</b> and <i class='x'>slanted</i> &lt;tag&gt; text",
  "<!-- comment --> kept <script>alert(1)</script> after",
  "<div><p>one</p><p>two</p></div>",
  "a < b > c & d &amp; e &amp;amp; f &quot;g&quot; h &quotx",
  "&#65;bc123 &#x41; &eacute; &nbsp;&copy; &Agrave;1a",
  "portrait by @nick_name and @Jörg99!",
  "水墨画 mountain 山 ㇀㇏ ㇰㇿ ㈠㋿ ㌀㏿ 㐀䶿 ䷀䷿ 龯鿿 kanji",
  "ひらがな カタカナ 한국어 stay",
  "dash – em — minus − fullwidth － wave 〜 〰 hyphen‐ ֊ ־ ᐀ ᠆ ⸗ ⸺ ﹣ ゠",
  "«guillemets» “double” ‘single’ `back` ´acute´ ¨dots¨",
  '"""AUSVERKAUFT""" \'\'quoted\'\' "\'mixed\'"',
  "server 192.168.0.1 and 1.2.3.4.5 version 10.0",
  "time 12:30 and article 3:45  ",
  "3:45 ",
  r"line one\nline two \\n three",
  "#1 #123 #1234 #12345 #123456 #tag",
  "number 123456 and 12345 and 1234567890 a1234567",
  "files cat.png my_dog-2.JPEG report.pdf/x .mp4 a.webp.zip",
  "wait... what.. is. this . that  .  other",
  "***SALE*** #®•©™&@·º½¾¿¡§~ )( ][ }{ | \\ / *",
  "this-is-my-cute-cat",
  "this_is_my_cute_cat",
  "only-three-dashes-here and no more",
  "schÃ¶n cafÃ© âœ” â€œbrokenâ€\x9d ﬁne ｆｕｌｌ",
  "jc6640 ab123 abcd1234 jc6640vc 6640vc231 x1y2z3w j2d1a2a 12ab34cd56",
  "worldwide free shipping and free  shipping, shipping",
  "free download free now download",
  "click for details, click on this, click  here",
  "png images jpg image pdf and apk",
  "page 12 of the book, page  7",
  "1920x1080 12.5х3.5 4×4 3 x 4 2.x3. ²x³ ٣x٤",
  "title : subtitle :second a:b",
  "red,blue.green/yellow 1,2.3/4 a ,b",
  "'quoted whole'",
  '"quoted whole"',
  "'a' and 'b'",
  "-_:;,leading",
  "trailing-_,:+",
  ".hidden",
  ".hidden with words",
  "..",
  "İstanbul ẞTRASSE ΣΑΣ ǅ",
  "emoji 🦊🏔️ family 👩‍👩‍👧 flag 🇯🇵",
  "\x00control\x07 and \x1b[31mred\x1b[0m \u200bzero \ufeffwidth \u2028 line",
  "cat.png",
  "http://example.com",
  "/etc/passwd",
  "<?xml version='1.0'?><a>xml</a>",
  "&amp;lt;b&amp;gt;twice&amp;lt;/b&amp;gt;",
  "%253Cb%253Etwice%253C/b%253E",
  # Where there is a "<", ftfy leaves entities to the rules; wide signs bring them in.
  "a < b ＆amp;lt;b＆amp;gt;wide＆amp;lt;/b＆amp;gt;",
  "a" * 300 + " 1" * 50,
]

# Pieces of which the rules' patterns are made, so that random captions hit them.
PIECES = [
  *("http://", "www:", "a.com", "x.co/", "@", "nick", "<person>", "<b>", "</b>", "<"),
  *(">", "&", "amp;", "&quot;", "&#65;", "&lt;", "%41", "%", "+", "\\n", "#", "12"),
  *("345", "6789012", "1.2.3.4", ":", "3:45", ".png", "jpg", ".", "..", "'", '"', "“"),
  *(
    "-",
    "—",
    "_",
    "山",
    "ab",
    "JC",
    "x",
    "×",
    "free ",
    "shipping",
    "download",
    "click",
  ),
  *(" for ", " on ", "page ", " image", "s", ",", "/", "(", "*", "|", "Ã©", " ", "\n"),
]


def theirs(caption, clean):
  with warnings.catch_warnings():
    # diffusers, unlike us, lets these through to whoever gave the prompt.
    warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
    warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
    return DIFFUSERS._text_preprocessing(caption, clean_caption=clean)[0]


def test_the_captions_of_this_test_reach_every_kind_of_rule():
  changed = [text for text in CAPTIONS if clean_caption(text, "clean") != text.lower()]
  assert len(CAPTIONS) >= 40
  assert len(changed) > 40


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_nasty_caption_is_cleaned_as_diffusers_does(caption):
  assert clean_caption(caption, "clean") == theirs(caption, clean=True)
  assert clean_caption(caption, "lower") == theirs(caption, clean=False)


@settings(max_examples=400)
@given(caption=st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text())
@example("<![ x [")  # which Python's parser refuses, at least up to 3.12
def test_any_caption_is_cleaned_as_diffusers_does(caption):
  try:
    expected = theirs(caption, clean=True)
  except ParserRejectedMarkup:
    with pytest.raises(ValueError, match="cannot be cleaned, since it is broken HTML"):
      clean_caption(caption, "clean")
  else:
    assert clean_caption(caption, "clean") == expected


@given(caption=st.text().map(str.strip), blanks=st.text(" \t\n\u00a0"))
def test_raw_captions_lose_only_the_blanks_around_them(caption, blanks):
  assert clean_caption(blanks + caption + blanks, "raw") == caption


@pytest.mark.parametrize("caption", ["cat.png", "<?xml version='1.0'?><a>b</a>"])
def test_a_prompt_that_looks_like_a_file_an_address_or_xml_is_no_warning(caption):
  clean_caption(caption, "clean")


def test_an_unknown_mode_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match="caption mode 'tidy'; choose one of raw, lower"):
    clean_caption("a cat", "tidy")
