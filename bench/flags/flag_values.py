"""What the text behind a flag stands for; argparse adds the flag's name to what is said of it."""

import argparse


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    return [whole(part) for part in names(text)]


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None


def count(text: str) -> int:
    number = whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}; accepted: whole numbers from 0")
    return number


def rounds(text: str) -> int:
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; accepted: whole numbers from 1")
    return number


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: numbers above 0")
    return number


def share(text: str) -> float:
    """5% is 0.05."""
    try:
        number = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: percentages above 0%, such as 5%")
    return number


def pair(text: str) -> list[str]:
    found = names(text)
    if len(found) != 2 or "*" in text:
        raise argparse.ArgumentTypeError(f"'{text}'; accepted: two backends, such as eager,fused")
    return found
