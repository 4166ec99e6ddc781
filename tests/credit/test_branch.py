"""Credit of members that left their anchor at one step."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.credit import advantages, branch

W, ANCHORS, MEMBERS = 3, 2, 4
# What the members are rewarded, and each anchor's own image.
MEMBER = hnp.arrays(np.int32, (W, ANCHORS * MEMBERS), elements=st.integers(-64, 64))
ANCHOR = hnp.arrays(np.int32, ANCHORS, elements=st.integers(-64, 64))
properties = settings(max_examples=25, deadline=None)


def completion_reward(member, anchor):
  rows = np.concatenate([np.repeat(anchor, MEMBERS)[None], member])
  return jnp.asarray(rows / 16, jnp.float32)  # differences are exact


@properties
@given(MEMBER, ANCHOR)
def test_a_member_is_paid_its_own_reward_at_the_step_where_it_left(member, anchor):
  paid = branch.member(completion_reward(member, anchor))
  np.testing.assert_array_equal(paid, np.float32(member / 16))


@properties
@given(MEMBER, ANCHOR)
def test_gain_is_counted_from_the_members_own_anchor(member, anchor):
  paid = branch.gain(completion_reward(member, anchor))
  for k in range(W):
    for b in range(ANCHORS * MEMBERS):
      assert float(paid[k, b]) * 16 == member[k, b] - anchor[b // MEMBERS]


def test_the_members_reward_needs_no_anchors_image():
  reward = jnp.ones((W + 1, 4)).at[0].set(jnp.nan)
  np.testing.assert_array_equal(branch.member(reward), np.ones((W, 4)))


@properties
@given(MEMBER, ANCHOR)
def test_the_baseline_cancels_within_the_members_of_one_anchor(member, anchor):
  reward = completion_reward(member, anchor)
  normalized = [
    advantages.normalize_group(f(reward), MEMBERS) for f in (branch.member, branch.gain)
  ]
  # Only the roundings of the means differ, blown up by 1 / eps at most.
  np.testing.assert_allclose(*normalized, rtol=1e-4, atol=1e-4)
