"""What batches have come to, appended as they end: a kill loses the batch at work, and nothing else."""

from __future__ import annotations

import fcntl
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

HEAD = struct.Struct("<QI")  # a record's length, and the checksum of what follows

Place = tuple[int, int]  # a stream of batches, and a batch's number in it


class BatchLog:
    """The outputs of a stage's batches, in one file a process.

    What is read is the same on any number of processes, as long as the batches are. A file that another command is
    writing is left to it, and nothing is kept then.

    Args:
        path: the files' common beginning; its name is to stand for all that the batches depend on.
        rank: this process's.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self.own = path.with_name(f"{path.name}-{rank}.batches")
        self._file: BinaryIO | None = None

    def read(self) -> dict[Place, list[Any]]:
        """What is kept, of all processes; ready to be added to."""
        files = sorted(self.path.parent.glob(f"{self.path.name}-*.batches"))
        found = {place: outputs for file in files for place, outputs, _ in _records(file)}
        self.own.parent.mkdir(parents=True, exist_ok=True)
        whole = max([end for _, _, end in _records(self.own)], default=0) if self.own.is_file() else 0
        file = self.own.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return found
        file.truncate(whole)  # what a kill has cut off goes
        self._file = file
        return found

    def append(self, place: Place, outputs: list[Any]) -> None:
        """Keep a batch's outputs: numbers, texts, tensors, and tuples, lists and mappings of them."""
        if self._file is None:
            return
        content = io.BytesIO()
        torch.save((place, outputs), content)
        record = content.getvalue()
        self._file.write(HEAD.pack(len(record), zlib.crc32(record)) + record)
        self._file.flush()

    def close(self) -> None:
        """Nothing more will be kept."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """What was kept is kept elsewhere now."""
        for file in self.path.parent.glob(f"{self.path.name}-*.batches"):
            file.unlink(missing_ok=True)


def _records(file: Path) -> Iterator[tuple[Place, list[Any], int]]:
    """Whole records up to the first that is not, each with where it ends."""
    with file.open("rb") as opened:
        while len(head := opened.read(HEAD.size)) == HEAD.size:
            length, checksum = HEAD.unpack(head)
            record = opened.read(length)
            if len(record) < length or zlib.crc32(record) != checksum:
                return
            place, outputs = torch.load(io.BytesIO(record), weights_only=True)
            yield place, outputs, opened.tell()
