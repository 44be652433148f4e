"""Pages that studies write beside REPORT.md, and what it says of those that are there."""

from pathlib import Path

from resfuse.bench.report.tables import markdown

CONTENTION, CONTENTION_PICTURE = "CONTENTION.md", "contention.png"
MODELS = "MODELS.md"


def blocks(folder: Path) -> list[str]:
    """Returns the blocks of REPORT.md about the studies whose pages lie in its folder."""
    found = []
    if (folder / CONTENTION).is_file():
        found.append("## Beside busy neighbours")
        if (folder / CONTENTION_PICTURE).is_file():
            found.append(markdown.image(CONTENTION_PICTURE, "images/s beside other processes"))
        found.append(
            f"[{CONTENTION}]({CONTENTION}) has the times, by `resfuse study contention`: backends "
            "beside other processes, and called by several threads."
        )
    if (folder / MODELS).is_file():
        found += [
            "## Networks of other libraries",
            f"[{MODELS}]({MODELS}), by `resfuse study models`: which of them `fuse` and the engine "
            "take, and whether they answer as eager does.",
        ]
    return found
