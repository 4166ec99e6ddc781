"""The server of rewards: what it is asked waits in a queue, and workers score it."""
