"""Samplers beside those of diffusers, on one toy network."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pixsigma_jax.diffusion.solver_tables import ddim, dmd, dpm_solver_pp, lcm
from pixsigma_jax.diffusion.solvers import SAMPLERS, solve
from tests.diffusion import denoisers
from tests.diffusion.denoisers import SCHEDULE

GOLDEN = np.load(denoisers.GOLDEN)
DENOISE = jax.jit(denoisers.closed_form(GOLDEN, 4.5))
# What the published weights' schedulers are configured with.
PUBLISHED = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def their_samples(scheduler, **arguments):
  """The loop of diffusers' pipelines, around our network."""
  # Schedulers in σ/α keep latents divided by α. Where their first noise is σ/α, ours is
  # √(1 + (σ/α)²), as the network was trained.
  latents = torch.from_numpy(GOLDEN["z"])
  if scheduler.init_noise_sigma != 1:
    latents = latents * (scheduler.init_noise_sigma**2 + 1) ** 0.5
  for timestep in scheduler.timesteps:
    scaled = scheduler.scale_model_input(latents, timestep)
    noise, _ = DENOISE(jnp.asarray(scaled.numpy()), jnp.float32(float(timestep)))
    latents = scheduler.step(
      torch.from_numpy(np.array(noise)), timestep, latents, **arguments
    ).prev_sample
  return latents.numpy()


def assert_same(table, scheduler, fresh_noise=None, tolerance=1e-6, **arguments):
  """Both call the network at the same timesteps and end with the same latents."""
  # Fractions of a timestep are rounded to float32 on both sides.
  np.testing.assert_allclose(
    table.timesteps, scheduler.timesteps.numpy(), rtol=0, atol=1e-3
  )
  ours = solve(DENOISE, jnp.asarray(GOLDEN["z"]), table, fresh_noise)
  theirs = their_samples(scheduler, **arguments)
  # diffusers rounds its schedule to float32: 4e-7 of the length of the batch as a
  # vector was the most seen.
  error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  assert error < tolerance


# NumPy 2 says so of a float32 tensor that diffusers hands to np.array.
@pytest.mark.filterwarnings(
  "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
@pytest.mark.parametrize("num_steps", [5, 14, 20])
def test_dpm_solver_is_the_one_of_the_published_pipelines(num_steps):
  scheduler = diffusers.DPMSolverMultistepScheduler(**PUBLISHED)
  scheduler.set_timesteps(num_steps)
  assert_same(dpm_solver_pp(SCHEDULE, num_steps, "diffusers"), scheduler)


@pytest.mark.parametrize("num_steps", [4, 20, 50])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_is_the_peers_in_both_spacings_that_begin_in_pure_noise(
  num_steps, spacing
):
  scheduler = diffusers.DDIMScheduler(
    **PUBLISHED,
    clip_sample=False,
    timestep_spacing=spacing,
    steps_offset=1000 // num_steps - 1 if spacing == "leading" else 0,
  )
  scheduler.set_timesteps(num_steps)
  assert_same(ddim(SCHEDULE, num_steps), scheduler)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 10])
def test_lcm_is_the_peers_with_the_same_noise(num_steps):
  scheduler = diffusers.LCMScheduler(**PUBLISHED)
  if 50 % num_steps:  # there the peer spaces its timesteps otherwise
    scheduler.set_timesteps(timesteps=[999, 759, 519, 279])
  else:
    scheduler.set_timesteps(num_steps)
  draws = torch.Generator().manual_seed(0)
  shape = GOLDEN["z"].shape
  noise = np.stack([torch.randn(shape, generator=draws).numpy() for _ in range(10)])
  noise = jnp.asarray(noise)
  assert_same(
    lcm(SCHEDULE, num_steps),
    scheduler,
    lambda number: noise[number],
    generator=torch.Generator().manual_seed(0),
  )


def test_dmd_is_the_peers_ddpm_told_to_take_one_step_from_timestep_400():
  scheduler = diffusers.DDPMScheduler(**PUBLISHED, clip_sample=False)
  scheduler.set_timesteps(timesteps=[400])
  assert_same(dmd(SCHEDULE, 1), scheduler)


def _draws():
  """The same noise for both: a generator of torch, and a function of a step."""
  draws = torch.Generator().manual_seed(0)
  shape = GOLDEN["z"].shape
  noise = np.stack([torch.randn(shape, generator=draws).numpy() for _ in range(40)])
  noise = jnp.asarray(noise)
  return torch.Generator().manual_seed(0), lambda number: noise[number]


# A sampler of ours, diffusers' scheduler, what it is configured with, and whether its
# noise is drawn from a generator.
MULTISTEP, SINGLESTEP = (
  getattr(diffusers, f"DPMSolver{kind}Scheduler")
  for kind in ("Multistep", "Singlestep")
)
SDE = {"algorithm_type": "sde-dpmsolver++"}
PEERS = {
  "dpm++": (MULTISTEP, {}, False),
  "dpm++-2s": (SINGLESTEP, {}, False),
  "dpm++-sde": (MULTISTEP, SDE, True),
  "unipc": (diffusers.UniPCMultistepScheduler, {}, False),
  "euler": (diffusers.EulerDiscreteScheduler, {}, False),
  "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, True),
  "heun": (diffusers.HeunDiscreteScheduler, {}, False),
  "tcd": (diffusers.TCDScheduler, {}, True),
}
# diffusers keeps σ/α, 157 to 0.01, in float32, and differences of its logarithms.
CLOSE = 1e-5


def assert_same_as_peer(name, counted, configured=(), **times):
  kind, configuration, draws = PEERS[name]
  scheduler = kind(**PUBLISHED, **configuration, **dict(configured))
  if name != "tcd":
    # diffusers has 1 - alpha_bar in float32, which moves the lowest σ/α by 5e-5 of it.
    # These schedulers make their own σ/α of that table, in its precision.
    scheduler.alphas_cumprod = torch.from_numpy(SCHEDULE.alpha_bar)
  scheduler.set_timesteps(**counted)
  generator, fresh_noise = _draws()
  table = SAMPLERS[name](SCHEDULE, counted.get("num_inference_steps", 0), **times)
  arguments = {"generator": generator} if draws else {}
  assert_same(table, scheduler, fresh_noise, CLOSE, **arguments)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("name", PEERS)
def test_every_scheduler_that_users_name_is_the_peers(name, num_steps):
  assert_same_as_peer(name, {"num_inference_steps": num_steps})


# diffusers' Euler ancestral has no noise levels of Karras, and TCD learns its own.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("name", sorted(set(PEERS) - {"euler-ancestral", "tcd"}))
def test_noise_levels_of_karras_are_the_peers(name, num_steps):
  assert_same_as_peer(
    name,
    {"num_inference_steps": num_steps},
    {"use_karras_sigmas": True},
    use_karras_sigmas=True,
  )


# diffusers' Euler ancestral and UniPC take no timesteps.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(set(PEERS) - {"euler-ancestral", "unipc"}))
def test_timesteps_of_ones_own_are_the_peers(name):
  timesteps = [999, 850, 600, 420, 250, 130, 40]
  assert_same_as_peer(name, {"timesteps": timesteps}, timesteps=timesteps)
