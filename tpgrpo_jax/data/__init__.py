"""Prompts, the built-in tasks' words and shapes, and the arithmetic of groups."""
