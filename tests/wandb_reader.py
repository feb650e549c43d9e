"""Reads a .wandb file back: LevelDB's log format (32 KiB blocks), each record a protobuf of wandb's.

For the tracker's test only; wandb 0.31 has no reader of its own left in Python. The format:
https://github.com/google/leveldb/blob/main/doc/log_format.md, after a header of seven bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 32 * 1024
CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    """Every `wandb_internal_pb2.Record` of the file, in order."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B", content[:7]
    position, parts = 7, b""
    while position + CHUNK_HEADER.size <= len(content):
        if BLOCK_BYTES - position % BLOCK_BYTES < CHUNK_HEADER.size:  # padding at the block's end
            position += BLOCK_BYTES - position % BLOCK_BYTES
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(content, position)
        position += CHUNK_HEADER.size
        parts = (b"" if kind in (FULL, FIRST) else parts) + content[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
