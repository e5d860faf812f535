"""Which part of the work is this process's, when the same command runs many times at once?

Processes do not communicate. Each reads its number and how many there are from its environment, and these two alone
decide which blocks it computes. So it does not matter which process starts when, or whether one dies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from features.console import UserError


@dataclass(frozen=True)
class Shard:
    """One of `n_shards` parts of the work.

    Attributes:
        index: number of the shard, from 0.
        n_shards: into how many parts the work is divided.
        local_rank: number of this process among those on the same machine; it chooses the GPU.
        shared: whether other processes, perhaps on other machines, may be writing the same entries.
    """

    index: int = 0
    n_shards: int = 1
    local_rank: int = 0
    shared: bool = False

    def includes(self, unit: int) -> bool:
        """Whether the unit of work of this number belongs to this shard: one of every `n_shards` consecutive units.

        The order rotates: each group of `n_shards` units begins with the next shard. What one of eight shards left
        undone is then spread over four shards, or over two; without rotation it would all fall to one of them.

        >>> [unit for unit in range(9) if Shard(index=0, n_shards=3).includes(unit)]
        [0, 5, 7]
        """
        return (unit + unit // self.n_shards) % self.n_shards == self.index


def find_shard(shard: str | None = None, environment: Mapping[str, str] = os.environ) -> Shard:
    """Find this process's shard: the one that is named, else the one of torchrun's or SLURM's variables, else all.

    An element of a SLURM array that runs several processes (srun, torchrun) divides its shard among them.

    >>> find_shard("1/4")
    Shard(index=1, n_shards=4, local_rank=0, shared=True)
    >>> find_shard(environment={"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    Shard(index=3, n_shards=8, local_rank=1, shared=True)

    Args:
        shard: "I/N", I from 0.
        environment: RANK, WORLD_SIZE and LOCAL_RANK; SLURM_ARRAY_TASK_ID, _MIN, _STEP and _COUNT; SLURM_PROCID,
            SLURM_NTASKS and SLURM_LOCALID.

    Raises:
        UserError: if these name no shard.
    """

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name)
        if text is None and default is not None:
            return default
        try:
            return int(text or "")
        except ValueError:
            raise UserError(
                f"the environment variable {name} is {text!r}, expected a number. Give `shard='I/N'`."
            ) from None

    local_rank = number("LOCAL_RANK", number("SLURM_LOCALID", 0))
    if shard is not None:
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
        if match is None or int(match[1]) >= int(match[2]):
            raise UserError(f"`shard={shard!r}`: expected I/N, I from 0 to N-1, as in 0/4, 1/4, 2/4 and 3/4.")
        return Shard(int(match[1]), int(match[2]), local_rank, shared=int(match[2]) > 1)
    index, n_shards = 0, 1
    if "RANK" in environment and "WORLD_SIZE" in environment:
        index, n_shards = number("RANK"), number("WORLD_SIZE")
    # The batch script itself also has SLURM_PROCID=0 and the job's number of tasks, but it runs once; srun makes steps.
    elif "SLURM_PROCID" in environment and ("SLURM_STEP_ID" in environment or "SLURM_JOB_ID" not in environment):
        index, n_shards = number("SLURM_PROCID"), number("SLURM_NTASKS", 1)
    is_array = "SLURM_ARRAY_TASK_ID" in environment
    if is_array:
        n_elements = number("SLURM_ARRAY_TASK_COUNT", 1)
        first = number("SLURM_ARRAY_TASK_MIN", 0 if n_elements > 1 else number("SLURM_ARRAY_TASK_ID"))
        element, rest = divmod(number("SLURM_ARRAY_TASK_ID") - first, max(1, number("SLURM_ARRAY_TASK_STEP", 1)))
        if rest or not 0 <= element < n_elements:
            raise UserError(
                f"SLURM array element {environment['SLURM_ARRAY_TASK_ID']} of {n_elements} from {first} on: the array "
                "has gaps, so its elements do not number the shards. Name each one with `shard='I/N'`."
            )
        index, n_shards = element * n_shards + index, n_elements * n_shards
    if not 0 <= index < n_shards:
        raise UserError(
            f"the environment says rank {index} of {n_shards}: expected 0 to {n_shards - 1}. Give `shard='I/N'`."
        )
    return Shard(index, n_shards, local_rank, shared=n_shards > 1 or is_array)
