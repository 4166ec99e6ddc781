"""The flow: noise schedules, steps, guidance, trajectories and their completions."""
