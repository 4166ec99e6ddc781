"""What a user brings: a reward that misbehaves when an environment variable says so, and a credit."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.types import StepCredit

HUNG = []  # when a call began to hang
VARIABLE = "SCRIPTED_REWARD"  # "what:n": what to do in the n-th call, counted from 0


def make():
  """Scores brightness in steps of 1 / 1000.

  Steps, so that a pixel which another mesh rounds differently changes no score and no sign of an
  increment.
  """
  what, _, number = os.environ.get(VARIABLE, "").partition(":")
  calls = []

  def reward(images, prompts, metadata):
    del prompts, metadata
    scores = np.round(images.mean(axis=(1, 2, 3)) / 255.0, 3).astype(np.float32)
    calls.append(len(images))
    if not what or len(calls) - 1 != int(number):
      return scores, {}
    if what == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    if what in ("term", "term_and_hang"):
      os.kill(os.getpid(), signal.SIGTERM)
    if what.startswith("interrupt"):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1.0)  # let the main thread see it
    if what == "interrupt_twice":
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(30)
    if what == "term_and_hang":
      HUNG.append(time.monotonic())
      time.sleep(30)
    if what == "hang":
      time.sleep(30)
    if what == "hang_in_first" and jax.process_index() == 0:
      time.sleep(600)
    if what == "raise":
      raise ConnectionError("the reward server is gone")
    if what == "nan":
      scores[1] = np.nan
    if what == "short":
      scores = scores[:-1]
    return scores, {}

  return reward


def make_contrast():
  """Scores the spread of brightness, in steps of 1 / 1000 too."""

  def reward(images, prompts, metadata):
    del prompts, metadata
    scores = np.round(images.std(axis=(1, 2, 3)) / 255.0, 3).astype(np.float32)
    return scores, {}

  return reward


def nan_credit(completion_reward):
  """A credit method with a mistake: one sample's reward is not a number."""
  steps = completion_reward[1:].at[0, 1].set(jnp.nan)
  return StepCredit(steps, jnp.zeros(steps.shape, bool))


def states_credit(completion_reward):
  """Another: a reward for every state instead of every step."""
  return StepCredit(completion_reward, jnp.zeros(completion_reward.shape, bool))


def bare_credit(completion_reward):
  """Another: an array alone."""
  return completion_reward[1:]


def last_step_credit(completion_reward):
  """A user's own credit method: all of the last increment to the last step."""
  increments = completion_reward[1:] - completion_reward[:-1]
  is_last = jnp.arange(len(increments))[:, None] == len(increments) - 1
  return StepCredit(jnp.where(is_last, increments, 0.0), is_last & (increments > 0))
