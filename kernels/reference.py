"""Every operation in plain PyTorch: the truth of the tests, the CPU path, and what the kernels
must equal.

W_enc and W_dec are both [F, D]: a latent is a row. The operations stand in `reference_encode.py`
(selection), `reference_fp8.py` (the same by e4m3 products), `reference_sparse.py` (decoder and
gradients), `reference_dead.py` (dead latents) and `reference_adam.py` (the optimizer); this file is
their index.
"""

from __future__ import annotations

from .reference_adam import *  # noqa: F403
from .reference_dead import *  # noqa: F403
from .reference_encode import *  # noqa: F403
from .reference_fp8 import *  # noqa: F403
from .reference_sparse import *  # noqa: F403
