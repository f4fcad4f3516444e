"""Finished SAEs on the Hugging Face hub: `push` and `pull`."""
