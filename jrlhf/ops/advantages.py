"""From rewards to advantages."""

import jax
import jax.numpy as jnp

from jrlhf.ops.masking import masked_mean, masked_sum
from jrlhf.types import Array


def gae(rewards: Array, values: Array, mask: Array, gamma: float, lam: float) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) along the last axis.

    rewards, values, mask [B, T] -> (advantages, returns) [B, T] float32, both 0 where masked:
    δ_t = r_t + gamma V_{t+1} - V_t,  A_t = δ_t + gamma·lam A_{t+1},  return_t = A_t + V_t.

    The value after a row's last token is 0. "t+1" is the next *unmasked* token: a masked tail changes
    nothing, and neither do masked tokens in between (a tool's output). A reward on a masked token is ignored,
    so put the final reward on the last token that the policy wrote.
    """
    rewards, values = rewards.astype(jnp.float32), values.astype(jnp.float32)
    mask = mask.astype(bool)

    def backwards(carry, step):
        next_advantage, next_value = carry
        reward, value, real = step
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (jnp.where(real, advantage, next_advantage), jnp.where(real, value, next_value))
        return carry, jnp.where(real, advantage, 0.0)

    zeros = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(backwards, (zeros, zeros), (rewards.T, values.T, mask.T), reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask, advantages + values, 0.0)


def group_advantages(rewards: Array, group_size: int, std: bool = True) -> jax.Array:
    """Rewards relative to their group (GRPO, Shao et al. 2024, §4.1.2), [N] -> [N] float32.

    A group is `group_size` consecutive answers to one prompt. `std=True` divides by the group's sample
    standard deviation plus 1e-4, as published: prompts whose rewards spread little weigh more. A KL penalty
    that is added after the division, or in the loss, is not divided with the reward, so that its strength
    drifts as the answers become alike and the policy may collapse (docs/exact-space.md); put -beta·k1 into
    `rewards`, before the division. `std=False` (Liu et al. 2025) only
    subtracts the mean. A group of equal rewards gets zeros; a NaN reward makes its whole group NaN.
    """
    groups = _groups(rewards, group_size)
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    if std:
        centred = centred / (jnp.std(groups, axis=1, ddof=1, keepdims=True) + 1e-4)
    return centred.reshape(-1)


def rloo_advantages(rewards: Array, group_size: int) -> jax.Array:
    """Reward minus the mean of the *other* answers to the same prompt, [N] -> [N] float32.

    REINFORCE leave-one-out (Ahmadian et al. 2024, eq. 8): an unbiased baseline without a critic. Groups are
    `group_size` consecutive answers.
    """
    groups = _groups(rewards, group_size)
    others = (jnp.sum(groups, axis=1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1)


def leave_one_out_advantages(rewards: Array) -> jax.Array:
    """Reward minus the mean of all *other* rewards of the batch, [N] -> [N] float32: REINFORCE with a baseline.

    The baseline does not depend on the answer that it is subtracted from, so the gradient stays unbiased
    (Williams 1992).
    """
    return rloo_advantages(rewards, rewards.shape[0])


def reward_to_go(rewards: Array, mask: Array, gamma: float = 1.0) -> jax.Array:
    """Σ_{s≥t} gamma^(s-t) r_s over unmasked tokens, rewards, mask [B, T] -> [B, T] float32, 0 where masked.

    What a policy gradient multiplies ∇log π(a_t) with when there is no critic.
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)[0]


def process_advantages(rewards: Array, mask: Array, steps: Array, group_size: int) -> jax.Array:
    """GRPO with process supervision (DeepSeekMath, Shao et al. 2024, section 4.1.3), all [N, R] -> [N, R] float32.

    A_t = Σ_{s≥t} (r_s - mean) / std over the steps s of an answer; mean and sample standard deviation (plus 1e-4, as in
    `group_advantages`) are those of all steps of the group. steps: the tokens whose reward is a step's. What other
    tokens earn (a KL penalty) is only divided, with the rest. 0 where masked.

    A mean is taken off *every* step, so an answer is charged for each further step, or paid where the mean is negative:
    where answers differ in their number of steps the optimum is not that of the summed rewards. `advantages_to_go` of
    `group_advantages(..., std=False)` has that optimum.
    """
    steps = steps & mask
    groups = lambda x: x.reshape(-1, group_size * x.shape[1])  # noqa: E731
    members, earned = groups(steps), groups(jnp.where(mask, rewards.astype(jnp.float32), 0.0))
    mean = masked_mean(earned, members, axis=1)[:, None]
    count = jnp.sum(members, axis=1, keepdims=True, dtype=jnp.float32)
    spread = masked_sum(jnp.square(earned - mean), members, axis=1)[:, None] / jnp.maximum(count - 1.0, 1.0)
    normalised = jnp.where(members, earned - mean, earned) / (jnp.sqrt(spread) + 1e-4)
    return reward_to_go(normalised.reshape(rewards.shape), mask)


def advantages_to_go(advantages: Array, rewards: Array, mask: Array) -> jax.Array:
    """Each token's advantage from an answer's, less what was earned before it, [N], [N, R] twice -> [N, R] float32.

    Rewards to go less the baseline that `advantages` of the summed rewards have: Σ_{s≥t} r_s - (Σ_s r_s - A). What was
    earned before a token does not depend on it, so that the expected policy gradient is that of A (Williams 1992).
    """
    earned = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    before = jnp.cumsum(earned, axis=1) - earned
    return jnp.where(mask, advantages[:, None] - before, 0.0)


def overlong_penalty(length: Array, slots: int, buffer: float) -> jax.Array:
    """Soft overlong punishment (DAPO, Yu et al. 2025, eq. 13), lengths [B] -> [B] in [0, 1], to be subtracted.

    0 up to `slots - buffer` tokens, then linear, 1 for an answer that fills all `slots`.
    """
    return jnp.clip((length.astype(jnp.float32) - (slots - buffer)) / buffer, 0.0, 1.0)


def _groups(rewards: Array, group_size: int) -> jax.Array:
    if group_size < 2:
        raise ValueError(f"a group baseline needs at least 2 answers per prompt, got group_size={group_size}")
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards of shape {rewards.shape} are not whole groups of {group_size}")
    return jnp.asarray(rewards, jnp.float32).reshape(-1, group_size)
