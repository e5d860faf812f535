"""fm-extract in a process, or a Ray actor, that kills itself in the midst of its work, once.

    python killed_shard.py MARKER RANK BLOCKS [fm-extract's options]

Rank RANK dies by SIGKILL before it writes block number BLOCKS of its own (from 0), unless the file MARKER exists,
which it makes first: started again, it lives. With RANK `actor`, the first Ray actor to get so far dies.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract import cli, ray_actors
from extract.shard import find_shard
from features.writer import Writer


def die_once(marker: Path, n_blocks: int) -> None:
    """Make the next writer of this process die, its unfinished files about."""
    write = Writer.write
    written = 0

    def mortal(writer: Writer, rows: range, embeddings: Mapping[str, Any]) -> None:
        nonlocal written
        if written == n_blocks and not marker.exists():
            marker.touch()
            block = rows.start // writer.entry.rows_per_block
            path = writer.entry.block_path(next(iter(writer.entry.poolings)), block)
            path.with_name(f".{path.name}.0.partial").write_bytes(b"half of a block")
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        write(writer, rows, embeddings)

    Writer.write = mortal  # type: ignore[method-assign]


def main() -> None:
    """Become fm-extract."""
    marker, rank, n_blocks = Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3])
    sys.argv = ["fm-extract", *sys.argv[4:]]
    if rank == "actor":

        class Mortal(ray_actors.EmbeddingActor):
            def prepare(self, spec: ray_actors.ExtractionSpec) -> Any:
                import killed_shard

                killed_shard.die_once(marker, n_blocks)
                return super().prepare(spec)

        ray_actors.EmbeddingActor = Mortal  # type: ignore[misc]
    elif find_shard().index == int(rank):
        die_once(marker, n_blocks)
    cli.main()


if __name__ == "__main__":
    main()
