"""What a run leaves, and which processes hold it."""
