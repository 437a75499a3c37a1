"""Several processes on one job, through torch.distributed: who does what, and sums that do not depend on how many."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from resq.errors import InputError
from resq.numerics.moments import Leaves, Node, Tree, subtrees

T = TypeVar("T")
# A process that is gone is noticed by its closed connection; one that works is waited for.
PATIENCE = timedelta(days=7)
# Until all processes have started; one that fails before is not heard of.
MEETING = timedelta(minutes=15)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job: `rank` of `size`. Alone, everything below costs nothing.

    Every method that talks raises InputError in all processes when one of them is gone.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that fits bases and writes."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this is the first process of its machine."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def span(self, leaves: Leaves, rank: int | None = None) -> tuple[int, int]:
        """(first leaf, leaf after the last) that a rank, this one by default, takes: the first rank has one where there
        is any, another none where leaves are fewer than ranks."""
        rank = self.rank if rank is None else rank
        first, stop = (-(-each * leaves.count // self.size) for each in (rank, rank + 1))
        return first, stop

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them."""
        if self.size == 1:
            return make()
        given = [make() if self.first else None]
        with talking(self):
            _dist().broadcast_object_list(given, src=0)
        return given[0]  # type: ignore[return-value]

    def agree(self, mine: bool) -> bool:
        """Whether all processes say yes."""
        if self.size == 1:
            return mine
        votes: list[Any] = [None] * self.size
        with talking(self):
            _dist().all_gather_object(votes, mine)
        return all(votes)

    def gathered(self, mine: T) -> list[T]:
        """What every process has, in their order, in all of them."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        with talking(self):
            _dist().all_gather_object(found, mine)
        return found

    def summed(self, tree: Tree, leaves: Leaves) -> Tree:
        """In the first process, which has a leaf, the tree of all leaves, from every rank's of its own, which are given
        up."""
        if self.size == 1:
            return tree
        if not self.first:
            for node in tree.nodes:
                with talking(self):
                    _dist().send(node.total.contiguous(), dst=0)
            tree.nodes.clear()
            return tree
        for rank in range(1, self.size):
            for first, stop in subtrees(*self.span(leaves, rank)):
                total = torch.empty_like(tree.nodes[0].total)
                with talking(self):
                    _dist().recv(total, src=rank)
                tree.push(Node((stop - first).bit_length() - 1, first, total))
        return tree

    def total(self, tree: Tree, leaves: Leaves, shape: tuple[int, int], device: torch.device) -> Tensor:
        """The sum over all leaves, float64 of this shape on `device` in all processes, from every rank's tree of its
        own."""
        whole = self.summed(tree, leaves)
        if self.size == 1:
            return whole.total()
        given = whole.total().contiguous() if self.first else torch.empty(shape, dtype=torch.float64, device=device)
        with talking(self):
            _dist().broadcast(given, src=0)
        return given

    def same(self, what: str, mine: Mapping[str, str]) -> None:
        """Raises InputError in all processes where one has other values than the first."""
        first, *others = self.gathered(dict(mine))
        for rank, theirs in enumerate(others, start=1):
            for name, want in first.items():
                if (got := theirs.get(name, "missing")) != want:
                    raise InputError(
                        f"{what} of process {rank} are not the first's: {name} is {got[:12]}, not {want[:12]}; all "
                        "processes need the same"
                    )

    def share(self, count: int) -> range:
        """The tasks among 0 … count - 1 that this process takes."""
        return range(self.rank, count, self.size)


ALONE = Ranks()


def _dist() -> Any:
    import torch.distributed

    return torch.distributed


@contextmanager
def talking(ranks: Ranks) -> Iterator[None]:
    """Failures of a connection inside become an InputError that says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # torch raises DistBackendError or a plain RuntimeError
        raise InputError(
            f"process {ranks.rank} of {ranks.size}: another process of the job is gone ({_short(error)}); see its own "
            "message above or in its log"
        ) from error


def _short(error: Exception) -> str:
    """The last words of a message that may hold a C++ stack."""
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    return words.rsplit("] ", 1)[-1].split(". ")[0][:120].rstrip(". ")


def started(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(environment)


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """This process among those that torchrun started, and its own device: of several cards the one of its local rank.

    Alone where it was started as usual. gloo talks between processors, nccl between cards. Raises InputError when the
    others cannot be reached, or a machine has fewer cards than processes.
    """
    if not started() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE, device
        return
    dist, local = _dist(), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if device.index is not None or local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no card of its own: it has {torch.cuda.device_count()} and "
                f"--device is {device}; start at most one process a card, with --device cuda"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        # One group for the life of the process: a second one would meet the addresses of the first, and wait for ever.
        if not dist.is_initialized():
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=MEETING)))
            store.set_timeout(MEETING)
            store.set(f"resq here {rank}", "1")
            store.wait([f"resq here {each}" for each in range(size)])
            store.set_timeout(PATIENCE)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
            atexit.register(_leave)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of the job do not find each other ({_short(error)}); see torchrun") from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
    except BaseException:
        _abandon()  # the others wait for an answer
        raise


def _leave() -> None:
    """What a process does that is done, as all others are: with nccl it waits until what was begun is over."""
    if _dist().is_initialized():
        _dist().destroy_process_group()


def _abandon() -> None:
    """What a process does that failed while others may wait for it. Leaving in order would, with nccl, wait for an
    exchange that never ends, and torchrun would not hear of the failure; aborting ends exchanges where they are. With
    gloo either closes the connections, which the others see. Tested with gloo alone: nccl takes a card for each
    process, and two were never at hand."""
    if _dist().is_initialized():
        _dist().distributed_c10d._abort_process_group()
