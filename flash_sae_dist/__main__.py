"""`python -m flash_sae_dist` is `flash-sae`."""

from .launch.cli import main

if __name__ == "__main__":
    main()
