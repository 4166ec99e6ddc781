"""The built-in base model for shapes: flow matching on rendered scenes, from scratch.

Command: python -m tpgrpo_jax.pretrain --config configs/tiny_shapes_pretrain.py
Time: 14 minutes for 3,000 updates, on one CPU core that had other work too.
Measured: strict score .421 on 252 held-out prompts (by the RL recipe's 8 ODE steps, shift 3).
What ships in tpgrpo_jax/assets/tiny_shapes are the weights after 3,000 of the 9,000 updates: the command
writes them every 500, and Ctrl-C ends it. Later ones are better and leave RL less to do.
"""

from tpgrpo_jax import config as config_lib


def get_config():
  """Returns the recipe."""
  return config_lib.to_config_dict(
    config_lib.PretrainConfig(
      run=config_lib.Run("runs/tiny_shapes_pretrain"),
      output="runs/tiny_shapes_pretrain/model",
      model=config_lib.Model("tiny_shapes"),
      train=config_lib.PretrainTrain(
        updates=9000, batch=64, logit_mean=1.0, output_dtype="bfloat16"
      ),
      optimizer=config_lib.Optimizer(
        learning_rate=1.5e-3,
        warmup_updates=100,
        schedule="cosine",
        final_scale=0.02,
        b2=0.99,
        weight_decay=0.01,
      ),
      ema=config_lib.Ema(decay=0.995, every=1),
      eval=config_lib.Eval(every=500, num_steps=5, prompts=252, rewards=("shapes",)),
    )
  )
