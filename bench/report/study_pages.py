"""Pages that studies write beside REPORT.md, and what it says of those that are there."""

from pathlib import Path

from resfuse.bench.report.tables import markdown

CONTENTION, CONTENTION_PICTURE = "CONTENTION.md", "contention.png"
MODELS, MODELS_PICTURE = "MODELS.md", "models.png"


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
        found.append("## Networks of other libraries")
        if (folder / MODELS_PICTURE).is_file():
            found.append(
                markdown.image(MODELS_PICTURE, "engine / best peer, a dot for each network")
            )
        found.append(
            f"[{MODELS}]({MODELS}), by `resfuse study models`: which of them `fuse` and the engine "
            "take, whether they answer as eager does, and how fast they are beside other runtimes "
            "where that was measured."
        )
    return found
