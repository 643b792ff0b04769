"""Linear map and layer norm, and the settings by which they are computed.

Parameters are float32. A matrix product takes its operands in the compute dtype and
accumulates in float32, and both layers return float32: the caller casts where its own
precision changes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pixsigma_jax.mesh_axes import CONTEXT, FSDP
from pixsigma_jax.models import attention, int8, products

Initializer: TypeAlias = Callable[..., Array]

REMATS = ("none", "block", "attention", "offload")

HOST_MEMORY = "pinned_host"  # JAX's name for memory of the host that a device can reach

zeros_init = nn.initializers.zeros


def normal_init(fan_in: int, published_fan_in: int) -> Initializer:
  """The reference's N(0, 0.02) at XL/2's sizes, and as large a signal at others.

  0.02 suits sums over 1152 or 4096 inputs. Over a miniature's 64 it would leave
  captions a hundredth of their size, and the network deaf to them for an hour.
  """
  return nn.initializers.normal(0.02 * (published_fan_in / fan_in) ** 0.5)


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
  """Glorot's uniform initialiser with the fans named, whatever the kernel's shape.

  The reference fuses q, k and v (and cross-attention's k and v) in one matrix, whose
  fan-out is that of the fused matrix.
  """
  return uniform_init((6 / (fan_in + fan_out)) ** 0.5)


def uniform_init(limit: float) -> Initializer:
  """Draws from U(-limit, limit)."""

  def init(
    key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
  ) -> Float[Array, "..."]:
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
  """Settings of computation, on which results depend only by rounding.

  Attributes:
    dtype: of matrix products and attention.
    attention: implementation, see `models/attention.py`.
    remat: what the backward pass recomputes: nothing; the whole of each block; each
      block but for what its attentions returned; the same, with that and the blocks'
      inputs in the host's memory meanwhile.
    unroll: for CPUs: write the layers out one by one instead of scanning over them. The
      program grows with the depth, but on CPU a scan's stacked residuals cost more than
      half of a training step. And multiply an input by all its matrices side by side:
      on CPU each would be copied out of their stack, and the input's gradient is then
      one product, where else several are added up.
    merge_rows: matrix products merge batch and tokens in one axis, which halves the
      time of the backward pass on CPU. A merged axis cannot be sharded over both, so
      they do not where `mesh` shards tokens.
    mesh: that parameters and batch lie on; attention needs it, see `attention.attend`,
      and matrices are gathered over it, see `whole`.

  Raises:
    ValueError: an unknown dtype, attention implementation or remat; or `offload` where
      devices reach no memory of the host.
  """

  dtype: DTypeLike = jnp.bfloat16
  attention: str = "xla"
  remat: str = "none"
  unroll: bool = False
  merge_rows: bool = True
  mesh: Mesh | None = dataclasses.field(default=None, repr=False)

  def __post_init__(self):
    choices = {"attention": attention.CHOICES, "remat": REMATS}
    for name, known in choices.items():
      if getattr(self, name) not in known:
        raise ValueError(
          f"Unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}."
        )
    if self.remat == "offload":
      device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
      kinds = [memory.kind for memory in device.addressable_memories()]
      if HOST_MEMORY not in kinds:
        raise ValueError(
          f"remat 'offload' needs {HOST_MEMORY} memory, and {device.device_kind} has "
          f"only {', '.join(kinds)}: choose remat 'block'."
        )
    try:
      jnp.dtype(self.dtype)
    except TypeError:
      raise ValueError(
        f"Unknown dtype {self.dtype!r}; choose float32 or bfloat16."
      ) from None

  def matmul(self, x: Array, kernel: Any) -> Float32[Array, "..."]:
    """x · kernel in `dtype`, or in int8 if it is `quantize`d, added up in float32."""
    rows = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1]) if self._merges() else x
    if int8.is_quantized(kernel):
      return int8.matmul(x, kernel).reshape(*rows, -1)
    out = products.matmul(x.astype(self.dtype), kernel.astype(self.dtype))
    return out.reshape(*rows, -1)

  def _merges(self) -> bool:
    whole = self.mesh is None or self.mesh.shape[CONTEXT] == 1
    return self.merge_rows and whole

  def whole(self, kernel: Any) -> Any:
    """A matrix `[… i o]` in `dtype`, gathered on every device of the mesh's `fsdp`.

    And its gradient scattered to where its parts lie. Left to itself, XLA multiplies by
    a shard at a time, in twice the cycles, or gathers activations in its place. One
    that is `quantize`d stays as it is.
    """
    if int8.is_quantized(kernel):
      return kernel
    kernel = kernel.astype(self.dtype)
    shards = 1 if self.mesh is None else self.mesh.shape.get(FSDP, 1)
    if shards == 1 or kernel.shape[-2] % shards:
      return kernel
    return _gathered(self.mesh, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(mesh: Mesh, kernel: Array) -> Array:
  return jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P()))


def _scattered(mesh: Mesh, _: None, gradient: Array) -> tuple[Array]:
  place = NamedSharding(mesh, P(*[None] * (gradient.ndim - 2), FSDP, None))
  return (jax.lax.with_sharding_constraint(gradient, place),)


_gathered.defvjp(lambda mesh, kernel: (_gathered(mesh, kernel), None), _scattered)


class Linear(nn.Module):
  """x · kernel + bias. `copies` > 1 stacks that many maps of one input in one leaf.

  A stacked kernel `[copies, in, out]` is the reference's fused matrix: one unit for
  initialisation and for factored optimizer statistics, whose parts lie contiguously.
  What such maps return is not stacked: a tuple of `copies` arrays.
  """

  features: int
  compute: Compute
  copies: int = 1
  kernel_init: Initializer | None = None  # Xavier over all copies
  bias_init: Initializer = zeros_init

  @nn.compact
  def __call__(self, x: Float[Array, "*b i"]) -> Any:
    fan_in, stack = x.shape[-1], (self.copies,) if self.copies > 1 else ()
    init = self.kernel_init or xavier_uniform(fan_in, self.copies * self.features)
    kernel = self.param("kernel", init, (*stack, fan_in, self.features))
    bias = self.param("bias", self.bias_init, (*stack, self.features))
    kernel = self.compute.whole(kernel)

    def one(x: Array, kernel: Any, bias: Array) -> Float32[Array, "..."]:
      out = self.compute.matmul(x, kernel)
      return out + bias.reshape((1,) * (x.ndim - 1) + bias.shape)

    if not stack:
      return one(x, kernel, bias)
    if self.compute.unroll and not int8.is_quantized(kernel):
      kernel = einops.rearrange(kernel, "c i o -> i (c o)")
      joined = one(x, kernel, bias.reshape(-1))
      return tuple(jnp.split(joined, self.copies, axis=-1))
    return tuple(one(x, kernel[i], bias[i]) for i in range(self.copies))


def layer_norm(x: Float[Array, "*b d"], epsilon: float) -> Float32[Array, "*b d"]:
  """Normalises the last axis in float32, without parameters."""
  x = x.astype(jnp.float32)
  x = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x).mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + epsilon)


class LayerNorm(nn.Module):
  """Layer norm with learned scale and bias, in float32.

  The epsilon is torch's 1e-5, not Flax's 1e-6: released checkpoints were trained so.
  """

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float32[Array, "*b d"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", zeros_init, x.shape[-1:])
    leading = (1,) * (x.ndim - 1)
    x = layer_norm(x, self.epsilon)
    return x * scale.reshape(*leading, -1) + bias.reshape(*leading, -1)
