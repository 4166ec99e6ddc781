"""RL fine-tuning of flow-matching image generators, with credit for every denoising step."""
