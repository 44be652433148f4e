"""Files that may come from anywhere: read only where they are files, and not too large."""

import errno
import os
import stat
from pathlib import Path


class TooLargeError(OSError):
    """A file holds more bytes than its reader takes."""


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file; never waits, as opening a named pipe does.

    Args:
        flags: as os.open takes them.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a device or a socket.
    """
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o644)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe, a device or a socket, not a file", str(path))


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        TooLargeError: it has more than `most_bytes`, of which no more than that was read.
        OSError: see open_regular.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        parts, room = [], most_bytes + 1  # a file may grow meanwhile, or not know its size
        while size <= most_bytes and room > 0 and (part := file.read(min(room, 1 << 20))):
            parts.append(part)
            room -= len(part)
    if size > most_bytes or room <= 0:
        raise TooLargeError(
            errno.EFBIG, f"it has more than {_told(most_bytes)}, the most that is read", str(path)
        )
    return b"".join(parts)


def _told(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size} bytes"
