"""Damages files that are read back: as disks, crashes, other programs and strangers do."""

import random

# What number stands where one stood; and the words that readers take for values of their own
_NUMBERS = (b"0", b"-1", b"1e999", b"-1e999", b"NaN", b"nan", b"inf", b"1e308", b"1e-320", b"true",
            b"null", b'"7"', b"9" * 400, b"99999999999999999999", b"1_0", b"0x1f", b"\xc2\xb2",
            b"", b"[]", b"{}", b"2.5", b"1,5")  # fmt: skip
_TEXTS = (b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"\n", b"\r", b",", b"\\", b"=1+1",
          b"[" * 5000, b'{"a":' * 5000, b"x" * 70_000, b"../../x", b"{}", b"null")  # fmt: skip
_DIGITS = b"0123456789.-"


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One change, or a few."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_CHANGES)(rng, data)
    return data


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _put_in(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_TEXTS) + data[at:]


def _another_number(rng: random.Random, data: bytes) -> bytes:
    digits = [at for at, byte in enumerate(data) if byte in _DIGITS]
    if not digits:
        return data
    start = stop = rng.choice(digits)
    while start and data[start - 1] in _DIGITS:
        start -= 1
    while stop < len(data) and data[stop] in _DIGITS:
        stop += 1
    return data[:start] + rng.choice(_NUMBERS) + data[stop:]


def _lines_moved(rng: random.Random, data: bytes) -> bytes:
    """A line goes, comes twice, or changes places with another."""
    lines = data.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(3)
    if kind == 0:
        del lines[a]
    elif kind == 1:
        lines.insert(b, lines[a])
    else:
        lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _cells_moved(rng: random.Random, data: bytes) -> bytes:
    """A separator goes, or comes twice: whatever is behind it shifts."""
    at = data.find(rng.choice((b",", b":", b'"', b"\n")), rng.randrange(len(data) + 1))
    if at < 0:
        return data
    return data[:at] + data[at : at + 1] * rng.choice((0, 2)) + data[at + 1 :]


def _another_word(rng: random.Random, data: bytes) -> bytes:
    """Of the file's own, in the place of another."""
    words = [word for word in data.replace(b'"', b",").split(b",") if 0 < len(word) < 60]
    return data.replace(rng.choice(words), rng.choice(words), 1) if words else data


_CHANGES = (_cut, _flipped, _put_in, _another_number, _another_number, _lines_moved, _cells_moved,
            _another_word)  # fmt: skip
