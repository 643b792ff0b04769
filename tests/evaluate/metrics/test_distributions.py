"""FID, KID, CMMD and Inception score: identities, closed forms, peers."""

import numpy as np
import pytest

from pixsigma_jax.evaluate.metrics import (
  Statistics,
  cmmd,
  fid,
  inception_score,
  kid,
)


@pytest.fixture
def random():
  return np.random.default_rng(0)


@pytest.fixture
def features(random):
  """Two sets of different size, mean and spread, in float32 as networks give them."""
  mix = random.normal(size=(24, 24))
  a = random.normal(size=(300, 24)) @ mix
  b = 1.3 * random.normal(size=(200, 24)) @ mix + 0.4
  return a.astype(np.float32), b.astype(np.float32)


def test_a_set_is_at_no_distance_from_itself_in_any_order(features, random):
  a, _ = features
  shuffled = random.permutation(a)
  assert fid(a, shuffled) < 1e-6
  assert abs(cmmd(a, shuffled)) < 1e-9
  # Unbiased: of a set with itself it is the kernels' variance, below zero.
  assert kid(a, shuffled) < 0


def test_a_set_of_fewer_images_than_features_is_at_no_distance_from_itself(random):
  a = 30 * random.normal(size=(20, 64))
  assert fid(a, a[::-1]) < 1e-6


def test_fid_of_few_images_is_that_of_their_covariances(random):
  a, b = random.normal(size=(20, 64)), 2 * random.normal(size=(31, 64)) + 1
  assert fid(a, b) == pytest.approx(fid(Statistics(a), Statistics(b)), rel=1e-9)


def test_fid_of_commuting_gaussians_is_the_closed_form():
  # Columns of a Hadamard matrix are uncorrelated to the bit, so covariances are
  # diagonal: Σ(√s1 - √s2)² + ‖Δμ‖².
  hadamard = np.array([[1.0]])
  for _ in range(4):
    hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
  columns = hadamard[:, 1:5]
  scales = np.array([1.0, 2.0, 3.0, 0.5]), np.array([4.0, 2.0, 0.0, 1.5])
  shift = np.array([3.0, 0.0, -1.0, 0.0])
  a, b = columns * scales[0], columns * scales[1] + shift
  unbiased = 16 / 15
  expected = unbiased * np.sum((scales[0] - scales[1]) ** 2) + shift @ shift
  assert fid(a, b) == pytest.approx(expected, abs=1e-9)


def test_fid_is_torchmetrics_on_the_same_features(features):
  torch = pytest.importorskip("torch")
  from torchmetrics.image.fid import _compute_fid

  a, b = (Statistics(x) for x in features)
  theirs = _compute_fid(
    *(torch.from_numpy(x) for x in (a.mean, a.covariance, b.mean, b.covariance))
  )
  assert fid(a, b) == pytest.approx(float(theirs), rel=1e-6)


def test_fid_is_symmetric_and_the_same_from_statistics(features):
  a, b = features
  assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-9)
  assert fid(Statistics(a), b) == fid(a, b)


def test_statistics_are_those_of_the_whole_set_however_it_comes(features):
  a, _ = features
  streamed, merged = Statistics(), Statistics()
  for part in np.array_split(a, 7):
    streamed.update(part)
  hosts = [Statistics(part) for part in np.array_split(a, 2)]
  for host in hosts:
    merged.merge(host)
  merged.merge(Statistics())
  for statistics in (streamed, merged):
    assert statistics.count == len(a)
    np.testing.assert_allclose(statistics.mean, a.mean(axis=0, dtype=float), atol=1e-9)
    np.testing.assert_allclose(
      statistics.covariance, np.cov(a.T.astype(float)), atol=1e-9
    )
  assert hosts[0].count == 150  # what was merged is as it was


def test_statistics_far_from_zero_lose_no_digits(random):
  a = random.normal(size=(100, 3)) + 1e6
  streamed = Statistics()
  for row in a:
    streamed.update(row[None])
  np.testing.assert_allclose(streamed.covariance, np.cov(a.T), rtol=1e-7)


def test_statistics_come_back_from_a_file(features, tmp_path):
  a, b = features
  path = tmp_path / "a.npz"
  Statistics(a).save(path)
  back = Statistics.load(path)
  assert back.count == len(a)
  assert fid(back, b) == pytest.approx(fid(a, b), rel=1e-9)
  back.update(b)
  assert back.count == len(a) + len(b)


def test_statistics_of_pytorch_fid_compare_and_do_not_merge(features, tmp_path):
  a, b = features
  path = tmp_path / "reference.npz"
  np.savez(path, mu=a.mean(axis=0), sigma=np.cov(a.T))
  reference = Statistics.load(path)
  assert reference.count is None
  assert fid(reference, b) == pytest.approx(fid(a, b), rel=1e-5)  # a float32 mean
  for add in (lambda: reference.update(b), lambda: Statistics(b).merge(reference)):
    with pytest.raises(ValueError, match="do not say of how many images"):
      add()
  reference.save(tmp_path / "again.npz")
  assert Statistics.load(tmp_path / "again.npz").count is None


def test_cmmd_of_opposite_and_orthogonal_points_is_the_closed_form():
  x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 3.0]])
  assert cmmd(x, y) == pytest.approx(19.9003325, abs=1e-7)
  assert cmmd(x, -2 * x) == pytest.approx(39.6026534, abs=1e-7)


def test_cmmd_counts_an_images_pair_with_itself(random):
  a, b = (random.normal(size=(n, 5)) for n in (4, 3))
  a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

  def mean(x, y):
    return np.mean([np.exp(-((p - q) @ (p - q)) / 200) for p in x for q in y])

  expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
  assert cmmd(a, b) == pytest.approx(expected, abs=1e-9)


def test_kid_is_torchmetrics_on_the_same_features(features):
  torch = pytest.importorskip("torch")
  from torchmetrics.image.kid import poly_mmd

  a, b = (torch.from_numpy(x.astype(np.float64)) for x in features)
  theirs = float(poly_mmd(a[:200], b))
  assert kid(features[0][:200], features[1]) == pytest.approx(theirs, rel=1e-9)


def test_kid_of_subsets_is_that_of_the_whole_on_average(features):
  a, b = features
  draws = [kid(a, b, subsets=1, subset_size=100, seed=i) for i in range(200)]
  error = np.std(draws) / np.sqrt(len(draws))
  assert abs(np.mean(draws) - kid(a, b)) < 4 * error
  assert kid(a, b, subsets=3, subset_size=100) == kid(a, b, subsets=3, subset_size=100)
  assert kid(a, b, subsets=1, subset_size=100) != kid(
    a, b, subsets=1, subset_size=100, seed=1
  )


def test_a_subset_of_all_images_is_the_whole_set(features):
  a, b = (x[:200] for x in features)
  drawn = kid(a, b, subsets=2, subset_size=200)
  assert drawn == pytest.approx(kid(a, b), rel=1e-9)


def test_metrics_do_not_depend_on_the_size_of_chunks(random, monkeypatch):
  from pixsigma_jax.evaluate.metrics import distributions

  a, b = random.normal(size=(50, 6)), random.normal(size=(40, 6))
  before = kid(a, b), cmmd(a, b)
  monkeypatch.setattr(distributions, "_CHUNK", 7)
  assert (kid(a, b), cmmd(a, b)) == pytest.approx(before, abs=1e-10)


def test_inception_score_of_sure_and_even_classes_is_their_number():
  sure = np.tile(np.eye(5), (8, 1))
  mean, deviation = inception_score(sure, splits=4)
  assert mean == pytest.approx(5)
  assert deviation == pytest.approx(0, abs=1e-12)
  assert inception_score(np.full((10, 5), 0.2))[0] == pytest.approx(1)


def test_inception_score_is_of_neighbouring_images():
  # One class in each half: within a split every image is like the marginal.
  halves = np.repeat(np.eye(2), 10, axis=0)
  assert inception_score(halves, splits=2)[0] == pytest.approx(1)
  assert inception_score(halves, splits=1)[0] == pytest.approx(2)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda a: fid(a, a[:1]), "Sets of 300 and 1 images: at least 2"),
    (lambda a: fid(a, a[:, :3]), "widths 24 and 3"),
    (lambda a: fid(a[0], a), r"shape \[24\]"),
    (lambda a: fid(np.where(a == a[3, 5], np.nan, a), a), "image 3 first"),
    (lambda a: kid(a, a, subsets=5), "smaller subset_size"),
    (lambda a: kid(a, a[:, :3]), "widths 24 and 3"),
    (lambda a: cmmd(a, np.zeros((2, 24))), "image 0 has length 0"),
    (lambda a: cmmd(a, a[:0]), "Sets of 300 and 0"),
    (lambda a: inception_score(a), "sum to 1"),
    (lambda a: inception_score(np.ones((3, 1))), "3 images"),
  ],
)
def test_bad_features_are_refused(features, call, message):
  with pytest.raises(ValueError, match=message):
    call(features[0])


def test_a_file_that_holds_no_statistics_is_refused(tmp_path):
  np.savez(tmp_path / "x.npz", features=np.zeros(3))
  with pytest.raises(ValueError, match="holds features: statistics"):
    Statistics.load(tmp_path / "x.npz")
  np.savez(tmp_path / "y.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
  with pytest.raises(ValueError, match="do not fit"):
    Statistics.load(tmp_path / "y.npz")
