"""Every operation in plain PyTorch: the truth of the tests, the CPU path, and what the kernels
must equal.

W_enc and W_dec are both [F, D]: a latent is a row. The operations stand in `reference_encode.py`
(selection), `reference_fp8.py` (the same by e4m3 products), `reference_sparse.py` (decoder and
gradients), `reference_dead.py` (dead latents) and `reference_adam.py` (the optimizer); this file is
their index.
"""

from __future__ import annotations

from .reference_adam import AdamOptions as AdamOptions
from .reference_adam import DenseRows as DenseRows
from .reference_adam import Gradients as Gradients
from .reference_adam import HeavySums as HeavySums
from .reference_adam import LatentRows as LatentRows
from .reference_adam import PairGradients as PairGradients
from .reference_adam import adam_decoder_ as adam_decoder_
from .reference_adam import adam_encoder_ as adam_encoder_
from .reference_adam import adam_scalars_ as adam_scalars_
from .reference_adam import adam_vector_ as adam_vector_
from .reference_adam import clip_ as clip_
from .reference_adam import count_fired_ as count_fired_
from .reference_adam import decoder_gradient as decoder_gradient
from .reference_adam import decoder_squares as decoder_squares
from .reference_adam import encoder_gradients as encoder_gradients
from .reference_adam import encoder_squares as encoder_squares
from .reference_adam import heavy_sums as heavy_sums
from .reference_adam import random_bits as random_bits
from .reference_adam import round_stochastic as round_stochastic
from .reference_dead import Limits as Limits
from .reference_dead import aux_rows as aux_rows
from .reference_dead import digit_counts as digit_counts
from .reference_dead import mask_dead_grad_ as mask_dead_grad_
from .reference_dead import pick_digits_ as pick_digits_
from .reference_dead import select_dead as select_dead
from .reference_encode import Codes as Codes
from .reference_encode import Dense as Dense
from .reference_encode import Pairs as Pairs
from .reference_encode import Slots as Slots
from .reference_encode import accumulate_dtype as accumulate_dtype
from .reference_encode import batch_topk_encode as batch_topk_encode
from .reference_encode import pre_activations as pre_activations
from .reference_encode import select_topk as select_topk
from .reference_encode import sort_key as sort_key
from .reference_encode import sort_keys as sort_keys
from .reference_encode import threshold_encode as threshold_encode
from .reference_encode import topk_encode as topk_encode
from .reference_fp8 import fp8_topk_encode as fp8_topk_encode
from .reference_fp8 import num_candidates as num_candidates
from .reference_fp8 import quantise_rows as quantise_rows
from .reference_sparse import Decoded as Decoded
from .reference_sparse import Levels as Levels
from .reference_sparse import Nest as Nest
from .reference_sparse import PairOrder as PairOrder
from .reference_sparse import by_level as by_level
from .reference_sparse import centre as centre
from .reference_sparse import decode_backward as decode_backward
from .reference_sparse import decode_coefs as decode_coefs
from .reference_sparse import gathered_dots as gathered_dots
from .reference_sparse import in_band as in_band
from .reference_sparse import jump_acts as jump_acts
from .reference_sparse import jump_grads as jump_grads
from .reference_sparse import level_masks as level_masks
from .reference_sparse import nested_rows as nested_rows
from .reference_sparse import order_pairs as order_pairs
from .reference_sparse import pair_coefs as pair_coefs
from .reference_sparse import scatter_rows as scatter_rows
from .reference_sparse import sparse_decode as sparse_decode
from .reference_sparse import token_sums as token_sums
