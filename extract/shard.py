"""Which share of the work is this process's, when the same command runs many times at once?

Nobody talks to anybody. A process reads its number and how many there are from its environment, and which blocks are
its own follows from these two alone; so it does not matter who starts when, or dies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from features.console import UserError


@dataclass(frozen=True)
class Shard:
    """One of `n_ranks` shares.

    Attributes:
        rank: from 0.
        n_ranks: how many processes share the work.
        local_rank: number among those on the same machine; it chooses the GPU.
        shared: whether other processes, perhaps on other machines, may be at the same entries.
    """

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0
    shared: bool = False

    def owns(self, unit: int) -> bool:
        """Whether the unit of this number is this rank's: one of every `n_ranks` units in a row.

        Every row of units is dealt out beginning with the next rank. What one of eight ranks left behind is then
        spread over four, or over two; dealt out straight, it would all be one rank's again.
        """
        return (unit + unit // self.n_ranks) % self.n_ranks == self.rank


def find_shard(shard: str | None = None, environment: Mapping[str, str] = os.environ) -> Shard:
    """This process's share: as `--shard` says, else as torchrun's and SLURM's variables say, else everything.

    An array element that runs several ranks (srun, torchrun) deals its own share out among them.

    Args:
        shard: "I/N", I from 0.
        environment: RANK, WORLD_SIZE and LOCAL_RANK; SLURM_ARRAY_TASK_ID, _MIN, _STEP and _COUNT; SLURM_PROCID,
            SLURM_NTASKS and SLURM_LOCALID.

    Raises:
        UserError: if these make no share.
    """
    number = _Numbers(environment)
    local = number("LOCAL_RANK", number("SLURM_LOCALID", 0))
    if shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if match is None or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard {shard!r}: expected I/N, I from 0 to N-1, as in 0/4, 1/4, 2/4 and 3/4.")
        return Shard(int(match[1]), int(match[2]), local, shared=int(match[2]) > 1)
    rank, n_ranks = 0, 1
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, n_ranks = number("RANK"), number("WORLD_SIZE")
    # The batch script itself also has SLURM_PROCID=0 and the job's number of tasks, but it is alone; srun makes steps.
    elif "SLURM_PROCID" in environment and ("SLURM_STEP_ID" in environment or "SLURM_JOB_ID" not in environment):
        rank, n_ranks = number("SLURM_PROCID"), number("SLURM_NTASKS", 1)
    array = "SLURM_ARRAY_TASK_ID" in environment
    if array:
        n_elements = number("SLURM_ARRAY_TASK_COUNT", 1)
        first = number("SLURM_ARRAY_TASK_MIN", 0 if n_elements > 1 else number("SLURM_ARRAY_TASK_ID"))
        element, rest = divmod(number("SLURM_ARRAY_TASK_ID") - first, max(1, number("SLURM_ARRAY_TASK_STEP", 1)))
        if rest or not 0 <= element < n_elements:
            raise UserError(
                f"SLURM array element {environment['SLURM_ARRAY_TASK_ID']} of {n_elements} from {first} on: the array "
                "has gaps, so that its elements do not number the shares. Name them with --shard I/N."
            )
        rank, n_ranks = element * n_ranks + rank, n_elements * n_ranks
    if not 0 <= rank < n_ranks:
        raise UserError(
            f"the environment says rank {rank} of {n_ranks}: expected 0 to {n_ranks - 1}. Give --shard I/N."
        )
    return Shard(rank, n_ranks, local, shared=n_ranks > 1 or array)


@dataclass(frozen=True)
class _Numbers:
    environment: Mapping[str, str]

    def __call__(self, name: str, default: int | None = None) -> int:
        text = self.environment.get(name)
        if text is None and default is not None:
            return default
        try:
            return int(text or "")
        except ValueError:
            raise UserError(
                f"the environment variable {name} is {text!r}, expected a number. Give --shard I/N."
            ) from None
