"""Samplers beside those of diffusers, on one toy network."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pixsigma_jax.diffusion.solver_tables import ddim, dmd, dpm_solver_pp, lcm
from pixsigma_jax.diffusion.solvers import solve
from tests.diffusion import denoisers
from tests.diffusion.denoisers import SCHEDULE

GOLDEN = np.load(denoisers.GOLDEN)
DENOISE = jax.jit(denoisers.closed_form(GOLDEN, 4.5))
# What the published weights' schedulers are configured with.
PUBLISHED = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def their_samples(scheduler, **arguments):
  """The loop of diffusers' pipelines, around our network."""
  latents = torch.from_numpy(GOLDEN["z"])
  for timestep in scheduler.timesteps:
    noise, _ = DENOISE(jnp.asarray(latents.numpy()), jnp.float32(int(timestep)))
    latents = scheduler.step(
      torch.from_numpy(np.array(noise)), timestep, latents, **arguments
    ).prev_sample
  return latents.numpy()


def assert_same(table, scheduler, fresh_noise=None, **arguments):
  """Both call the network at the same timesteps and end with the same latents."""
  np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
  ours = solve(DENOISE, jnp.asarray(GOLDEN["z"]), table, fresh_noise)
  theirs = their_samples(scheduler, **arguments)
  # diffusers rounds its schedule to float32: 4e-7 of the length of the batch as a
  # vector was the most seen.
  error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  assert error < 1e-6


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
