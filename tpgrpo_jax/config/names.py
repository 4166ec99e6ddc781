"""Every name that a field can have; the tables of the other rooms hold what they stand for."""

BUILT_IN_VARIANTS = ("tiny", "tiny_shapes")
MODEL_VARIANTS = (*BUILT_IN_VARIANTS, "sd3", "flux", "flux_kontext", "flux2", "z_image")
TOLD_VARIANTS = ("flux", "flux_kontext")  # are told a guidance scale: no second evaluation
EDITING_VARIANTS = ("flux_kontext",)  # paint from a text and a picture
SCHEDULES = ("linear", "sd3", "sd3_dynamic", "shifted", "flux", "flux2")
OWN_SCHEDULES = {
  "flux": ("flux", "flux_kontext", "z_image"),
  "flux2": ("flux2",),
  "sd3_dynamic": ("sd3",),
}  # variants
USUAL_SCHEDULES = {
  "sd3": "sd3",
  "flux": "flux",
  "flux_kontext": "flux",
  "flux2": "flux2",
  "z_image": "shifted",
}
DYNAMICS = ("sde", "cps", "dance")
SOLVERS = ("euler", "dpmpp_2m", "dpmpp_2m_history")
ROLLOUTS = ("trajectory", "branch", "ode")
WINDOW_DRAWS = ("epoch", "microbatch")
LATENT_DTYPES = ("float32", "bfloat16", "float16")
LEVEL_DRAWS = ("permuted", "stratified")
CREDIT_METHODS = (
    "flow_grpo", "increments", "latent_increments", "aggregation", "tp_grpo", "tp_grpo_consistent", "vgpo",
    "coca", "branch", "branch_gain",
)  # fmt: skip
NORMALIZATIONS = ("group", "group_joint", "global_std", "value")
ADVANTAGE_GROUPS = ("prompt", "state")
OBJECTIVES = ("policy", "nft", "awm")
RATIOS = ("log_prob", "normalized")
TRUST_REGIONS = ("clip", "dppo")
OLD_LOG_PROBS = ("rollout", "update", "auto")
STEP_WEIGHTS = ("none", "std", "inverse_dt", "inverse_sensitivity")
UPDATES_BY = ("samples", "steps")
LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")
DECAYS = ("zero", "start")
REWARD_NAMES = (
    "ocr", "shapes", "geneval", "jpeg_compressibility", "jpeg_incompressibility", "judge", "remote",
    "flow_grpo_server", "unirl", "clipscore", "pickscore", "hpsv2", "image_reward", "aesthetic",
    "demonstrations", "dina_lrm",
)  # fmt: skip
LATENT_REWARDS = {"dina_lrm": ("sd3",)}  # name -> the model variants whose latents it takes
PROMPT_SOURCES = ("words", "shapes", "geneval", "folder")
DTYPES = ("float32", "bfloat16")
TEXT_DEVICES = ("mesh", "cpu")
QUANTIZATIONS = ("", "int8", "nf4")
REMAT_POLICIES = ("none", "full", "dots")
LORA_INITS = ("gaussian", "kaiming")
