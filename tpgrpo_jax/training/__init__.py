"""Where models, rewards, data and the method meet: rollout, update, checkpoints, loop."""
