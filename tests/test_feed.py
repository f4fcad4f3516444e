"""Batches reach the step in order and whole, however busy the device is; none is read in vain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_sae_dist.activations import feed as feeding
from flash_sae_dist.activations.feed import BatchFeed
from flash_sae_dist.parallel.mesh import Mesh

CPU = torch.device("cpu")
ROWS, WIDTH = 12, 5


class Source:
    """Endless batches, the i-th full of numbers from 100 * i on; counts those that were made."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        fails_at: int = -1,
        shape: tuple[int, int] = (ROWS, WIDTH),
    ) -> None:
        self.dtype, self.fails_at, self.shapes, self.made = dtype, fails_at, [shape], 0

    def fill_(self, out: Tensor) -> None:
        if self.made == self.fails_at:
            raise ValueError(f"batch {self.made} is damaged")
        rows = batch(self.made, *self.shapes[0]).to(self.dtype)
        out.copy_(rows.pin_memory() if out.is_cuda else rows, non_blocking=True)
        self.made += 1


def batch(number: int, rows: int = ROWS, width: int = WIDTH) -> Tensor:
    return (torch.arange(rows * width) % 89).view(rows, width) + 100.0 * number


def devices() -> list[object]:
    return [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.fixture(params=devices(), ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    found: torch.device = request.param
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_batches_come_in_order(device: torch.device, dtype: torch.dtype, count: int) -> None:
    source = Source(dtype)
    seen = 0
    with BatchFeed(source, count, Mesh.single(), device) as feed:
        for (x,) in feed:
            assert x.device.type == device.type
            assert x.dtype == dtype
            assert torch.equal(x.cpu(), batch(seen).to(dtype))
            x.fill_(torch.nan)
            seen += 1
    assert seen == source.made == count, "no batch is made that no step will use"


def test_it_may_be_left_at_any_batch(device: torch.device) -> None:
    source = Source()
    with BatchFeed(source, 50, Mesh.single(), device) as feed:
        for number, (x,) in enumerate(feed):
            assert torch.equal(x.cpu(), batch(number))
            if number == 6:
                break
    assert source.made == (7 if device == CPU else 6 + feeding._BUFFERS)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_error_is_that_of_its_batch(device: torch.device, at: int) -> None:
    """The steps before it are made, although the feed reads ahead."""
    seen = 0
    with BatchFeed(Source(fails_at=at), 50, Mesh.single(), device) as feed:
        batches = iter(feed)
        for number in range(at):
            assert torch.equal(next(batches)[0].cpu(), batch(number))
            seen += 1
        with pytest.raises(ValueError, match=f"batch {at} is damaged"):
            next(batches)
    assert seen == at


@pytest.mark.gpu
def test_a_busy_device_reads_whole_batches() -> None:
    """Steps longer than copies, the host far ahead, each batch changed after its use: a copy that
    came too early, or a step that did not wait for its own, would show.
    """
    device, rows, width, count = torch.device("cuda"), 4096, 1024, 50
    want = [batch(i, rows, width).bfloat16() for i in range(count)]
    source = Source(torch.bfloat16, shape=(rows, width))
    large = torch.randn(4096, 4096, device=device)
    early = torch.empty(count, rows, width, dtype=torch.bfloat16, device=device)
    late = torch.empty_like(early)
    with BatchFeed(source, count, Mesh.single(), device) as feed:
        for number, (x,) in enumerate(feed):
            early[number].copy_(x)
            for _ in range(4):
                large = large @ large
                large /= large.norm()
            # The next copy but one into this buffer must not have begun.
            late[number].copy_(x)
            x.fill_(torch.nan)
    for number, rows_ in enumerate(want):
        assert torch.equal(early[number].cpu(), rows_), number
        assert torch.equal(late[number].cpu(), rows_), number


@pytest.mark.gpu
def test_the_host_waits_only_when_it_is_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_COPIES_AHEAD", 4)
    queued: list[int] = []
    ends: list[torch.cuda.Event] = []
    with BatchFeed(Source(), 12, Mesh.single(), torch.device("cuda")) as feed:
        for (x,) in feed:
            x.add_(1)
            torch.cuda._sleep(50_000_000)  # cycles, some 25 ms
            ends.append(torch.cuda.current_stream().record_event())
            queued.append(sum(not end.query() for end in ends))
    assert queued[:3] == [1, 2, 3], "the first steps do not wait"
    # The steps whose copies are awaited, and one for each buffer.
    assert 4 <= max(queued) <= 8


@pytest.mark.gpu
def test_memory_given_back_is_not_written_any_more() -> None:
    """A feed that is left early has a copy under way; whoever gets its memory next keeps his own
    values, and all of it is given back.
    """
    device, shape = torch.device("cuda"), (8192, 4096)
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        with BatchFeed(Source(shape=shape), 2, Mesh.single(), device) as feed:
            next(iter(feed))
        assert torch.cuda.memory_allocated() == before
        mine = [torch.zeros(shape, device=device) for _ in range(2)]
        torch.cuda.synchronize()
        assert not any(bool(t.any()) for t in mine)
        del mine
