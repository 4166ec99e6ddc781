"""The built-in base model for shapes: flow matching on rendered scenes, from scratch.

Command: python -m tpgrpo_jax.pretrain --config configs/tiny_shapes_pretrain.py
Time: 0.3 s of one CPU core for an update, measured over 2,000 of them; 40 minutes for all.
Not finished: the weights in tpgrpo_jax/assets/tiny_shapes are of 2,000 updates with train.logit_mean=0. Their
colours are right and hardly a spot is a shape yet: strict score .010 on 96 held-out prompts, by parts .095, 5
ODE steps (10 steps: the same). RL needs a base of .35 to .65.
"""

from tpgrpo_jax import config as config_lib


def get_config():
  """Returns the recipe."""
  return config_lib.to_config_dict(
    config_lib.PretrainConfig(
      run=config_lib.Run("runs/tiny_shapes_pretrain"),
      output="runs/tiny_shapes_pretrain/model",
      model=config_lib.Model("tiny_shapes"),
      train=config_lib.PretrainTrain(updates=8000, batch=32, logit_mean=1.0),
      optimizer=config_lib.Optimizer(learning_rate=2e-3, warmup_updates=100, weight_decay=0.01),
      ema=config_lib.Ema(decay=0.995, every=1),
      eval=config_lib.Eval(every=400, num_steps=5, prompts=252, rewards=("shapes",)),
    )
  )
