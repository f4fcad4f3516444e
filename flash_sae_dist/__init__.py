"""flash_sae_dist: train sparse autoencoders at scale."""

__version__ = "0.1.0"
