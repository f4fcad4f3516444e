"""Every architecture on P shards x R replicas equals itself on one process, in float64: losses,
weights and thresholds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.architecture_worker import run
from tests.dist.ranks import run_ranks

STEPS = 100
# Names, engines and replicas by the number of processes.
CASES = {
    2: [
        *("batch_topk-fused-1", "matryoshka-fused-2", "multi_topk-fused-1", "relu-fused-2"),
        *("jumprelu_target-autograd-2", "jumprelu_quadratic-fused-1", "jumprelu_tanh-fused-2"),
        *("gated-fused-2", "matryoshka-autograd-1", "topk_crosscoder-fused-1"),
        *("relu_crosscoder-autograd-1", "batch_topk_crosscoder-autograd-2"),
        *("jumprelu_target-fused-1-dense", "gated-fused-1-dense"),
        *("transcoder_jumprelu+adamw-fused-1-dense", "topk+adamw-fused-1"),
        "jumprelu_start-fused-1",
        *("topk+muon-autograd-1", "gated+muon-autograd-2", "topk+signum-autograd-1"),
        *("topk+signum-fused-1", "gated+signum-fused-2"),
    ],
    4: [
        *("batch_topk-fused-2", "matryoshka-fused-4", "multi_topk-fused-2"),
        *("jumprelu_target-fused-2", "gated-autograd-2", "batch_topk_crosscoder-fused-2"),
        *("relu-fused-2-dense", "transcoder_topk-fused-2", "topk+muon-autograd-2"),
        "jumprelu_start-fused-2",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_equals_one_process(world: int, tmp_path: Path) -> None:
    single = {}
    for case in CASES[world]:
        name, engine, _, *form = case.split("-")
        alone = "-".join([name, engine, "1", *form])
        single[case] = run(str(STEPS), alone)[alone]
    for rank in run_ranks(
        "tests.dist.architecture_worker", world, tmp_path, str(STEPS), *CASES[world]
    ):
        for case, want in single.items():
            assert rank[case].keys() == want.keys()
            for name, tensor in want.items():
                same = torch.allclose(rank[case][name], tensor, rtol=1e-8, atol=1e-10)
                assert same, f"{name} of {case}"
