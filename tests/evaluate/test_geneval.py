"""GenEval's rules on synthetic detections, each held and each broken once."""

import pytest

from pixsigma_jax.evaluate import geneval
from pixsigma_jax.evaluate.geneval import Detection, relative_position, score


def box(x, y, size=20):
  """A square around a centre."""
  return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


def found(name, x=50, y=50, *, confidence=0.95, color=None, size=20):
  return Detection(name, box(x, y, size), confidence, color)


def asks(tag, *include, exclude=()):
  return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def clause(name, count=1, **more):
  return {"class": name, "count": count, **more}


DOG = asks("single_object", clause("dog"))
PAIR = asks("two_object", clause("dog"), clause("cat"))
THREE = asks("counting", clause("dog", 3), exclude=[clause("dog", 4)])
RED = asks("colors", clause("dog", color="red"))
LEFT, RIGHT, ABOVE, BELOW = (
  asks("position", clause("cat"), clause("dog", position=[relation, 0]))
  for relation in ("left of", "right of", "above", "below")
)
ATTRIBUTES = asks("color_attr", clause("dog", color="red"), clause("cat", color="blue"))
RED_PAIR = asks("colors", clause("dog", 2, color="red"))
CAT = found("cat", 100)

CASES = {
  # One object.
  "object there": (DOG, [found("dog")], True),
  "nothing there": (DOG, [], False),
  "another there": (DOG, [found("cat")], False),
  "two are no fault without exclude": (DOG, [found("dog"), found("dog", 90)], True),
  "others are no fault": (DOG, [found("dog"), found("cat")], True),
  "just sure enough": (DOG, [found("dog", confidence=0.301)], True),
  "threshold itself is too unsure": (DOG, [found("dog", confidence=0.3)], False),
  # Two.
  "both there": (PAIR, [found("dog"), CAT], True),
  "one of two missing": (PAIR, [found("dog")], False),
  "other of two missing": (PAIR, [CAT], False),
  "one unsure": (PAIR, [found("dog", confidence=0.2), CAT], False),
  # Counting.
  "three of three": (THREE, [found("dog", x) for x in (0, 50, 99)], True),
  "two of three": (THREE, [found("dog", x) for x in (0, 50)], False),
  "four of three": (THREE, [found("dog", x) for x in range(4)], False),
  "fourth unsure": (
    THREE,
    [*(found("dog", x) for x in (0, 50, 99)), found("dog", 7, confidence=0.89)],
    True,
  ),
  "third unsure": (
    THREE,
    [*(found("dog", x) for x in (0, 50)), found("dog", 7, confidence=0.89)],
    False,
  ),
  "overlaps are not suppressed": (THREE, [found("dog")] * 3, True),
  "counting's threshold itself": (THREE, [found("dog", confidence=0.9)] * 3, False),
  # Colors.
  "right color": (RED, [found("dog", color="red")], True),
  "wrong color": (RED, [found("dog", color="green")], False),
  "surest has the color": (
    RED,
    [found("dog", color="green", confidence=0.5), found("dog", color="red")],
    True,
  ),
  "surest has another color": (
    RED,
    [found("dog", color="red", confidence=0.5), found("dog", color="green")],
    False,
  ),
  "both of the color": (RED_PAIR, [found("dog", color="red")] * 2, True),
  "one of two of the color": (
    RED_PAIR,
    [found("dog", color="red"), found("dog", color="pink")],
    False,
  ),
  # Position.
  "left": (LEFT, [CAT, found("dog", 40)], True),
  "right": (LEFT, [CAT, found("dog", 160)], False),
  "above": (LEFT, [CAT, found("dog", 100, 0)], False),
  "diagonal": (LEFT, [CAT, found("dog", 55, 5)], True),
  "mostly above": (LEFT, [CAT, found("dog", 80, -50)], False),
  "on top": (LEFT, [CAT, found("dog", 100)], False),
  "a little left": (LEFT, [CAT, found("dog", 97)], False),
  "no target": (LEFT, [found("dog", 40)], False),
  "object missing": (LEFT, [CAT], False),
  "surest is left": (
    LEFT,
    [CAT, found("dog", 40), found("dog", 160, confidence=0.5)],
    True,
  ),
  "surest target counts": (
    LEFT,
    [CAT, found("cat", 0, confidence=0.5), found("dog", 40)],
    True,
  ),
  "right, as asked": (RIGHT, [CAT, found("dog", 160)], True),
  "left in place of right": (RIGHT, [CAT, found("dog", 40)], False),
  "above, as asked": (ABOVE, [CAT, found("dog", 100, 0)], True),
  "below in place of above": (ABOVE, [CAT, found("dog", 100, 110)], False),
  "below, as asked": (BELOW, [CAT, found("dog", 100, 110)], True),
  "above in place of below": (BELOW, [CAT, found("dog", 100, 0)], False),
  # Two with colors.
  "each its color": (
    ATTRIBUTES,
    [found("dog", color="red"), found("cat", color="blue")],
    True,
  ),
  "colors swapped": (
    ATTRIBUTES,
    [found("dog", color="blue"), found("cat", color="red")],
    False,
  ),
  "second color wrong": (
    ATTRIBUTES,
    [found("dog", color="red"), found("cat", color="red")],
    False,
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_published_rules_hold(case):
  metadata, detections, correct = CASES[case]
  verdict = score(detections, metadata)
  assert verdict.correct is correct
  assert bool(verdict.reason) is not correct
  # The order in which a detector lists its objects says nothing.
  assert score(detections[::-1], metadata).correct is correct


RELATIONS = {
  "left of": (-60, 0),
  "right of": (60, 0),
  "above": (0, -60),
  "below": (0, 60),
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_turns_around_with_its_objects(relation):
  x, y = RELATIONS[relation]
  there, back = box(100 + x, 100 + y), box(100, 100)
  assert relative_position(there, back) == {relation}
  x, y = -x, -y
  [opposite] = [name for name, offset in RELATIONS.items() if offset == (x, y)]
  assert relative_position(back, there) == {opposite}


def test_offsets_are_shortened_by_a_tenth_of_both_sizes():
  # 20 and 20 wide: 4 of an offset are nothing; 8.1 of 8.1 leave 4.1, more than half.
  assert relative_position(box(96.1, 100), box(100, 100)) == set()
  assert relative_position(box(92.1, 100), box(100, 100)) == set()
  assert relative_position(box(91.9, 100), box(100, 100)) == {"left of"}
  assert relative_position(box(91.9, 100, 40), box(100, 100)) == set()


def test_at_most_sixteen_objects_of_a_class_are_looked_at():
  many = asks("counting", clause("dog", 1), exclude=[clause("dog", 17)])
  assert score([found("dog", x) for x in range(40)], many).correct


def test_a_group_of_wrong_color_is_no_target():
  metadata = asks(
    "position", clause("cat", color="red"), clause("dog", position=["left of", 0])
  )
  verdict = score([found("cat", 100, color="blue"), found("dog", 40)], metadata)
  assert "no target for dog to be left of" in verdict.reason


def test_every_object_must_stand_so_to_every_target():
  metadata = asks("position", clause("cat", 2), clause("dog", position=["left of", 0]))
  cats = [found("cat", 100), found("cat", 0)]
  assert not score([*cats, found("dog", 50)], metadata).correct
  assert score([*cats, found("dog", -50)], metadata).correct


def test_detections_may_be_fields_of_a_file():
  fields = {"name": "dog", "box": [0, 0, 9, 9], "confidence": 0.8, "color": "red"}
  assert score([fields], RED).correct


def test_overall_is_the_mean_of_tasks_not_of_images():
  verdicts = [("single_object", True)] * 9 + [("counting", False)]
  scores = geneval.task_scores(verdicts)
  assert scores == {"single_object": 1, "counting": 0, "overall": 0.5}


def test_the_published_set_has_553_prompts():
  assert sum(geneval.PROMPTS.values()) == 553


@pytest.mark.parametrize(
  ("detections", "metadata", "message"),
  [
    ([], asks("shapes", clause("dog")), "no task 'shapes'"),
    ([], asks("colors"), "`include` is empty"),
    ([{"label": "dog"}], DOG, "has the fields label"),
    ([{"name": "dog", "box": [1, 2], "confidence": 1}], DOG, "2 numbers"),
    ([found("dog")], RED, "classify colors before"),
    ([CAT], asks("position", clause("cat", position=["left of", 0])), "only 0 clauses"),
    (
      [CAT, found("dog")],
      asks("position", clause("cat"), clause("dog", position=["near", 0])),
      "no relation 'near'",
    ),
  ],
)
def test_what_cannot_be_judged_is_refused(detections, metadata, message):
  with pytest.raises(ValueError, match=message):
    score(detections, metadata)


def test_no_image_has_no_scores():
  with pytest.raises(ValueError, match="at least one image"):
    geneval.task_scores([])
