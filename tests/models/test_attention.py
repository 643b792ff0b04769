"""Attention: every implementation is the softmax of the definition."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.experimental import pallas, topologies

from pixsigma_jax import sharding
from pixsigma_jax.models import attention, splash

# Chunked as on CPUs and as elsewhere; splash where a core holds the dq of a head, and
# where it does not.
IMPLEMENTATIONS = ["xla", "chunked", "chunked on GPU", "splash", "splash on v4"]


def exact(query, key, value, mask):
  """The definition, in float64 NumPy, one query at a time."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  out = np.zeros_like(query)
  for b, n, k in np.ndindex(*query.shape[:3]):
    scores = key[b, :, k] @ query[b, n, k] / np.sqrt(query.shape[-1])
    weights = np.where(mask[b], np.exp(scores - scores.max()), 0)
    if weights.sum():
      out[b, n, k] = weights @ value[b, :, k] / weights.sum()
  return out


def draw(shape_q, shape_k, dtype, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  query = 3 * jax.random.normal(keys[0], shape_q, dtype)
  return query, *(jax.random.normal(k, shape_k, dtype) for k in keys[1:])


def jitted(implementation):
  return jax.jit(lambda *arrays: attention.attend(*arrays, implementation))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(attention, "_QUERY_CHUNK", 8)
  monkeypatch.setattr(attention, "_KEY_CHUNK", 8)
  monkeypatch.setattr(attention, "_FEW_SCORES", 64)
  on_gpu = attention.IMPLEMENTATIONS["chunked"]  # what `attend` does not say is a CPU
  monkeypatch.setitem(attention.IMPLEMENTATIONS, "chunked on GPU", on_gpu)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """TPU's kernels step by step in XLA, in the smallest blocks that they have."""
  monkeypatch.setattr(splash, "_BLOCK", 128)
  kernel = functools.partial(attention.IMPLEMENTATIONS["splash"], interpret=True)
  monkeypatch.setitem(attention.IMPLEMENTATIONS, "splash", kernel)
  monkeypatch.setitem(splash._CORE_MEMORY, "cpu", 2**30)
  on_v4 = functools.partial(kernel, device_kind="TPU v4")
  monkeypatch.setitem(attention.IMPLEMENTATIONS, "splash on v4", on_v4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("dtype", "tolerance"),
  [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)],  # of values of size 1
  ids=["float32", "bfloat16"],
)
def test_is_the_softmax_of_the_definition_at_odd_lengths(
  implementation, dtype, tolerance
):
  # Kernels have blocks of 128; ours takes queries by two where it can, JAX's keys.
  n, m = (131, 389) if "splash" in implementation else (17, 29)
  query, key, value = draw((2, n, 2, 12), (2, m, 2, 12), dtype)
  mask = np.arange(m) < np.array([m, 5])[:, None]
  mask[1, 7] = True  # not only beginnings of the keys
  ours = jitted(implementation)(query, key, value, jnp.asarray(mask))
  assert ours.dtype == dtype
  expected = exact(query, key, value, mask)
  np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_its_gradient_is_that_of_finite_differences(implementation):
  query, key, value = draw((2, 9, 2, 4), (2, 11, 2, 4), jnp.float32)
  mask = jnp.arange(11)[None] < jnp.array([[10], [7]])

  def loss(*arrays):
    return (attention.attend(*arrays, mask, implementation) ** 2).sum()

  def exact_loss(*arrays):
    return (exact(*arrays, mask) ** 2).sum()

  ours = jax.jit(jax.grad(loss, (0, 1, 2)))(query, key, value)
  arrays = [np.asarray(x, np.float64) for x in (query, key, value)]
  for i, array in enumerate(arrays):
    direction = np.random.default_rng(i).normal(size=array.shape)
    ends = [
      exact_loss(*arrays[:i], array + h * direction, *arrays[i + 1 :])
      for h in (1e-5, -1e-5)
    ]
    np.testing.assert_allclose(
      np.sum(np.asarray(ours[i]) * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
  ("lengths", "dtype", "tolerance"),
  # Sums of float32 in another order; or four roundings to eight bits.
  [
    *(((n, m), jnp.float32, 1e-5) for n, m in [(300, 389), (100, 700), (700, 100)]),
    ((500, 300), jnp.bfloat16, 2**-6),
  ],
  ids=["float32-0", "float32-1", "float32-2", "bfloat16"],
)
@pytest.mark.parametrize("implementation", ["splash", "splash on v4"])
def test_its_gradient_over_several_blocks_is_that_of_the_reference(
  implementation, lengths, dtype, tolerance
):
  n, m = lengths
  arrays = draw((2, n, 2, 12), (2, m, 2, 12), dtype)
  weight = jax.random.normal(jax.random.key(1), arrays[0].shape)
  mask = jnp.arange(m)[None] < jnp.array([[m], [m // 3]])

  def gradients(implementation, arrays):
    def loss(*arrays):
      out = attention.attend(*arrays, mask, implementation)
      return (out.astype(jnp.float32) * weight).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

  exact = gradients("xla", [x.astype(jnp.float32) for x in arrays])
  for ours, theirs in zip(gradients(implementation, arrays), exact, strict=True):
    assert ours.dtype == dtype
    np.testing.assert_allclose(
      ours.astype(jnp.float32), theirs, rtol=0, atol=tolerance * np.abs(theirs).max()
    )


@pytest.mark.parametrize("implementation", ["splash", "splash on v4"])
def test_kernels_of_equal_blocks_know_how_many_each_has_in_one_process(
  implementation, monkeypatch
):
  def unsound(axis):
    raise AssertionError("JAX 0.11 may answer with another kernel's number")

  monkeypatch.setattr(pallas, "num_programs", unsound)
  # As in a stage: all keys, compressed ones, a caption; then all in more queries.
  for n, m in [(256, 256), (256, 128), (256, 384), (384, 256)]:
    query, key, value = draw((1, n, 1, 8), (1, m, 1, 8), jnp.float32)
    mask = jnp.arange(m)[None] < m - 5

    def loss(query, key, value, mask, implementation):
      out = attention.attend(query, key, value, mask, implementation)
      return (out**2).sum()

    ours, theirs = (
      jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=4)(
        query, key, value, mask, name
      )
      for name in (implementation, "xla")
    )
    for have, exact in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      scale = np.abs(exact).max()
      np.testing.assert_allclose(have, exact, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_no_number_stays_so(implementation):
  query, key, value = draw((1, 9, 2, 4), (1, 20, 2, 4), jnp.float32)
  mask = jnp.ones((1, 20), bool)
  out = jitted(implementation)(query.at[0, 3, 1].set(jnp.nan), key, value, mask)
  lost = np.isnan(out)
  assert lost[0, 3, 1].all()
  assert lost.sum() == 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_may_see_no_key_receives_zeros(implementation):
  query, key, value = draw((1, 3, 1, 4), (1, 5, 1, 4), jnp.float32)
  mask = jnp.zeros((1, 5), bool)
  out = jitted(implementation)(query, key, value, mask)
  np.testing.assert_array_equal(out, np.zeros_like(out))

  def loss(*arrays):
    return attention.attend(*arrays, mask, implementation).sum()

  for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(query, key, value):
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
  query, key, value = draw((1, 9, 1, 4), (1, 20, 1, 4), jnp.float32)
  mask = jnp.ones((1, 20), bool)
  out = jitted(implementation)(1e4 * query, key, value, mask)
  best = np.argmax(np.einsum("nf,mf->nm", query[0, :, 0], key[0, :, 0]), axis=-1)
  np.testing.assert_allclose(out[0, :, 0], value[0, best, 0], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_keys_change_nothing(implementation):
  query, key, value = draw((2, 9, 2, 4), (2, 20, 2, 4), jnp.float32)
  mask = jnp.arange(20)[None] < jnp.array([[13], [20]])

  @jax.jit
  def attend(key, value):
    def loss(*arrays):
      return (attention.attend(*arrays, mask, implementation) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)

  clean = attend(key, value)
  seen = mask[..., None, None]
  dirty = attend(jnp.where(seen, key, 50.0), jnp.where(seen, value, 1e4))
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)
  assert not np.any(np.where(seen, 0, clean[1][2]))


def test_memory_of_chunked_attention_grows_linearly(monkeypatch):
  monkeypatch.setattr(attention, "_QUERY_CHUNK", 256)
  monkeypatch.setattr(attention, "_KEY_CHUNK", 256)

  def temporary(n):
    x = jax.ShapeDtypeStruct((1, n, 2, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, n), bool)
    loss = lambda *a: attention.attend(*a, "chunked").sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, mask).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  small, large = temporary(1024), temporary(4096)
  assert large < 5 * small  # 4 times the tokens; scores of all pairs would be 16 times
  assert large < 4096**2 * 2 * 4  # bytes of all scores


# ------------------------------------------------------------------------------ meshes


@pytest.mark.parametrize(
  ("implementation", "shape", "rows", "keys", "heads", "sends"),
  [
    ("chunked", (2, 2, 2), 4, 24, 3, "all_gather"),
    ("xla", (1, 2, 4), 3, 7, 4, None),  # no axis divides any: all have the whole
    ("splash", (2, 1, 4), 2, 24, 2, "all_gather"),
    ("splash", (2, 1, 4), 2, 16, 4, "all_to_all"),
    ("chunked", (1, 1, 8), 3, 24, 16, "all_to_all"),
    ("xla", (1, 1, 8), 3, 8, 8, "all_to_all"),
  ],
)
def test_on_a_mesh_it_is_what_it_is_on_one_device(
  implementation, shape, rows, keys, heads, sends
):
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
  query, key, value = draw((rows, 16, heads, 8), (rows, keys, heads, 8), jnp.float32)
  # Rows of their own lengths, one of them without any key.
  mask = jnp.arange(keys)[None] < jnp.arange(rows)[:, None] * keys // (rows - 1)
  weight = jax.random.normal(jax.random.key(1), query.shape)

  @functools.partial(jax.jit, static_argnames="mesh")
  def measure(query, key, value, mesh):
    def loss(*arrays):
      out = attention.attend(*arrays, mask, implementation, mesh)
      return (out * weight).sum(), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)

  (_, alone), expected = measure(query, key, value, None)
  (_, shared), gradients = measure(query, key, value, mesh)
  program = measure.lower(query, key, value, mesh).as_text()
  sent = {kind for kind in ("all_gather", "all_to_all") if kind in program}
  assert sent == ({sends} if sends else set())
  # Sums of float32 in another order, over devices.
  np.testing.assert_allclose(shared, alone, rtol=0, atol=1e-5)
  for ours, theirs in zip(gradients, expected, strict=True):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


def test_heads_are_traded_where_less_is_sent_so():
  def trades(**changed):
    usual = {"queries": 65_536, "keys": 65_536, "heads": 16, "context": 8}
    return attention.trades_heads(**{**usual, **changed})

  # By hand, over the busiest link of a line, in sequences: keys and values gathered
  # 2 · 7/8; queries, keys, values and output traded, a quarter each.
  assert trades()
  assert trades(context=4)
  assert not trades(context=2)  # 2 · 1/2 and 4 · 1/4
  assert not trades(context=1)
  assert not trades(keys=65_536 // 4)  # 2 · 7/8 / 4 and (2 + 2/4) / 4
  assert trades(keys=65_536 // 2)
  assert not trades(keys=65_536 // 2, context=4)
  assert not trades(context=3)  # which divides no 16 heads


# ------------------------------------------------------------------------------- cuDNN


@pytest.fixture
def cudnn_in_xla(monkeypatch):
  """What cuDNN is asked for, computed by JAX's own definition of the same."""
  asked = []

  def attend(query, key, value, *, implementation, **options):
    asked.append((implementation, query.shape, key.shape))
    with jax.numpy_dtype_promotion("standard"):
      return original(query, key, value, implementation="xla", **options)

  original = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
  return asked


def test_cudnn_is_asked_for_the_softmax_of_the_definition(cudnn_in_xla):
  query, key, value = draw((3, 17, 2, 12), (3, 29, 2, 12), jnp.bfloat16)
  mask = np.arange(29) < np.array([29, 5, 0])[:, None]
  mask[1, 2:9:2] ^= True  # not a beginning of the keys
  ours = jitted("cudnn")(query, key, value, jnp.asarray(mask))
  # It wants a multiple of 8 features and, for a gradient, an even number of tokens.
  assert cudnn_in_xla == [("cudnn", (3, 18, 2, 16), (3, 30, 2, 16))]
  assert ours.dtype == jnp.bfloat16
  expected = exact(query, key, value, mask)
  np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0, atol=0.03)
  np.testing.assert_array_equal(ours[2], np.zeros_like(ours[2]))

  def loss(implementation):
    def of(*arrays):
      out = attention.attend(*arrays, jnp.asarray(mask), implementation)
      return (out.astype(jnp.float32) ** 2).sum()

    with jax.numpy_dtype_promotion("standard"):  # of JAX's definition, transposed
      return jax.jit(jax.grad(of, (0, 1, 2)))(query, key, value)

  for ours, theirs in zip(loss("cudnn"), loss("xla"), strict=True):
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    # A few roundings to bfloat16, each of 0.4 %.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02 * np.abs(theirs).max())


def test_cudnn_refuses_what_it_does_not_compute_in():
  query, key, value = draw((1, 3, 1, 8), (1, 5, 1, 8), jnp.float32)
  message = r"'cudnn' computes in float16 or bfloat16, not in float32: choose"
  with pytest.raises(ValueError, match=message):
    attention.attend(query, key, value, jnp.ones((1, 5), bool), "cudnn")


@pytest.mark.accelerator
@pytest.mark.parametrize("implementation", ["splash", "cudnn"])
def test_the_kernel_of_this_machine_is_the_softmax_of_the_definition(
  implementation, real
):
  platform = {"splash": "tpu", "cudnn": "gpu"}[implementation]
  try:
    device = jax.local_devices(backend=platform)[0]
  except RuntimeError:
    pytest.skip(f"no {platform} here")
  query, key, value = draw((2, 1300, 2, 72), (2, 300, 2, 72), jnp.bfloat16)
  mask = np.arange(300) < np.array([[300], [7]])
  arrays = jax.device_put((query, key, value, jnp.asarray(mask)), device)

  def loss(query, key, value, mask, implementation):
    out = attention.attend(query, key, value, mask, implementation)
    return (out.astype(jnp.float32) ** 2).sum(), out

  def measure(implementation):
    of = functools.partial(loss, implementation=implementation)
    return jax.jit(jax.grad(of, (0, 1, 2), has_aux=True))(*arrays)

  gradients, out = measure(implementation)
  expected = exact(query, key, value, mask)
  np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=0.03)
  for ours, theirs in zip(gradients, measure("xla")[0], strict=True):
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02 * np.abs(theirs).max())


# -------------------------------------------------------------------------------- auto


class Device(types.SimpleNamespace):
  __hash__ = object.__hash__


@pytest.mark.parametrize(
  ("device", "dtype", "lengths", "chosen"),
  [
    ({"platform": "tpu"}, "bfloat16", (4096, 300), "splash"),
    ({"platform": "tpu"}, "float32", (4, 4), "splash"),
    ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16", (4, 4), "cudnn"),
    ({"platform": "gpu", "compute_capability": "9.0"}, "float32", (4, 40), "chunked"),
    ({"platform": "gpu", "compute_capability": "7.5"}, "float16", (40, 4), "chunked"),
    ({"platform": "cpu"}, "bfloat16", (8, 8), "xla"),
    ({"platform": "cpu"}, "bfloat16", (8, 9), "chunked"),
  ],
)
def test_auto_is_the_best_for_the_device(device, dtype, lengths, chosen):
  device = Device(device_kind="a device", **device)
  assert attention._choose(device, dtype, *lengths, 72) == chosen


def test_auto_is_logged_once_and_computes(caplog):
  attention._choose.cache_clear()
  query, key, value = draw((1, 3, 1, 8), (1, 5, 1, 8), jnp.float32)
  mask = jnp.ones((1, 5), bool)
  with caplog.at_level("INFO"):
    twice = [attention.attend(query, key, value, mask, "auto") for _ in range(2)]
  expected = attention.attend(query, key, value, mask, "xla")
  np.testing.assert_array_equal(twice[0], expected)
  message = "Attention of 3 queries to 5 keys of width 8 in float32 on cpu: xla."
  assert [record.getMessage() for record in caplog.records] == [message]


# ----------------------------------------------------------------------------- for TPU

# Queries of one device and keys, as stage_1k and stage_4k have them on v5e:8x8.
REAL = [
  (n, m)
  for n, ms in {4096: (4096, 1024, 300), 32768: (65536, 16384, 300)}.items()
  for m in ms
]


def lowered(n, m, kind, sharding=None, *, dtype=jnp.bfloat16, width=72):
  def loss(query, key, value, mask):
    options = {"residual_name": attention.OUTPUT, "device_kind": kind}
    return splash.attend(query, key, value, mask, **options).astype(jnp.float32).sum()

  def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  query, key = array(1, n, 16, width), array(1, m, 16, width)
  step = jax.jit(jax.grad(loss, (0, 1, 2)))
  traced = step.trace(query, key, key, array(1, m, dtype=jnp.bool_))
  return traced.lower(lowering_platforms=("tpu",))


@pytest.fixture
def real(monkeypatch):
  """Neither interpreted nor in small blocks, at the precision of a command's run."""
  monkeypatch.undo()
  with jax.default_matmul_precision("default"):
    yield


KERNELS = {
  "TPU v4": (
    "splash_mha_fwd_residuals",
    *(f"splash_mha_{d}_no" for d in ("dq", "dkv")),
  ),
  "TPU v5 lite": ("attention_forward", "attention_backward"),
}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize(("n", "m"), REAL)
def test_the_kernels_lower_at_the_sizes_of_the_stages(real, n, m, kind):
  text = lowered(n, m, kind).as_text()
  assert text.count("kernel_name") == len(KERNELS[kind])
  for name in KERNELS[kind]:
    assert text.count(f'kernel_name = "{name}') == 1


@pytest.mark.parametrize("length", [1, 128, 129, 300, 1000, 1024, 1025, 4160, 65536])
def test_blocks_cover_a_length_with_little_to_spare(real, length):
  block = splash.block_size(length)
  blocks = -(-length // block)
  assert block % 128 == 0
  assert block <= 1024
  assert blocks == -(-length // 1024)
  assert blocks * block - length < 128 * blocks


@pytest.mark.parametrize(
  ("topology", "n", "m", "dtype", "width"),
  [
    ("v5e:2x2", 4096, 1024, jnp.bfloat16, 72),
    ("v4:2x2x1", 4096, 1024, jnp.bfloat16, 72),
    ("v5e:2x2", 4096, 1024, jnp.float32, 72),
    ("v6e:2x2", 4096, 1024, jnp.bfloat16, 128),
    ("v5e:2x2", 300, 300, jnp.bfloat16, 16),
    # As many queries as 4096 pixels make; v5p has the least room.
    ("v5p:2x2x1", 65536, 1024, jnp.bfloat16, 128),
  ],
)
def test_the_kernels_compile_for_a_tpu(
  real, libtpu, monkeypatch, topology, n, m, dtype, width
):
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  chip = topologies.get_topology_desc(topology, "tpu").devices[0]
  place = jax.sharding.SingleDeviceSharding(chip)
  step = lowered(n, m, chip.device_kind, place, dtype=dtype, width=width)
  memory = step.compile().memory_analysis()
  scores = n * m * 16 * 4
  assert memory.temp_size_in_bytes < scores / 2


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite"])
def test_what_is_kept_of_attention_is_not_padded(real, capsys, kind):
  def loss(query, key):
    options = {"residual_name": attention.OUTPUT, "device_kind": kind}
    mask = jnp.ones(key.shape[:2], bool)
    return splash.attend(query, key, key, mask, **options).astype(jnp.float32).sum()

  array = jax.ShapeDtypeStruct((1, 1024, 16, 72), jnp.bfloat16)
  policy = jax.checkpoint_policies.save_only_these_names(attention.OUTPUT)
  print_saved_residuals(jax.checkpoint(loss, policy=policy), array, array)
  kept = re.findall(rf"(\S+) named '{attention.OUTPUT}'", capsys.readouterr().out)
  # The output, with tokens in lanes, and each query's sum.
  assert kept == ["bf16[16,72,1024]", "f32[16,1024]"]


def test_without_a_gradient_v4_writes_no_sums(real):
  def draw_only(query):
    options = {"residual_name": attention.OUTPUT, "device_kind": "TPU v4"}
    return splash.attend(query, query, query, jnp.ones((1, 1024), bool), **options)

  array = jax.ShapeDtypeStruct((1, 1024, 16, 72), jnp.bfloat16)
  text = jax.jit(draw_only).trace(array).lower(lowering_platforms=("tpu",)).as_text()
  assert 'kernel_name = "splash_mha_fwd_no_residuals' in text


@pytest.mark.parametrize(
  ("kind", "queries", "width", "fits"),
  [
    *((kind, 65_536, 72, True) for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite")),
    ("TPU v5", 2 * 65_536, 72, False),
    ("TPU v5", 65_536, 128, True),
    ("TPU v5 lite", 3 * 65_536, 72, True),
    ("TPU v5 lite", 3 * 65_536, 128, False),
    ("TPU v5 lite", 1024, 136, False),
    ("TPU v4", 1024, 72, False),
    ("NVIDIA H200", 1024, 72, False),
  ],
)
def test_our_kernels_are_for_cores_that_hold_the_dq_of_a_head(
  kind, queries, width, fits
):
  assert splash.has_room(queries, width, kind) == fits
