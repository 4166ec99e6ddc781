"""Prompts, the built-in words, and the arithmetic of groups."""
