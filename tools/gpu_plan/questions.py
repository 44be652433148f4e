"""probe.json: the open questions about a GPU and their answers, each on the disk at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from resfuse.bench.common import json_file
from resfuse.tools.gpu_plan.means import RunProbe

FILE = "probe.json"
LEAST_S = 5.0  # about what the subprocess needs to import torch


def ask_all(
    folder: Path,
    found: dict[str, Any],
    console: Console,
    resume: bool,
    time_left: Callable[[], float],
    run_probe: RunProbe,
) -> bool:
    """Asks what is not answered yet; a question whose process dies is answered by how it died, and
    the others are asked in the next.

    Args:
        found: the survey of this machine (survey.py).
        resume: keep the answers of this environment and commit.

    Returns:
        whether all are answered.

    Raises:
        RuntimeError: the subprocess dies before it asks anything.
    """
    where = {"env_id": found["env_id"], "commit": found["commit"]}
    answers = _read(folder, where) if resume else {}
    under_way: list[str] = []  # at most one

    def keep(name: str, answer: Any) -> None:
        answers[name] = answer
        _write(folder, {**where, "answers": answers})
        console.print(f"{name}: {json.dumps(answer)}", highlight=False, soft_wrap=True)

    def heard(told: dict[str, Any]) -> None:
        under_way.clear()
        if "began" in told:
            under_way.append(told["began"])
        else:
            keep(told["name"], told["answer"])

    while time_left() >= LEAST_S:
        before = len(answers)
        died = run_probe(found["device"], sorted(answers), time_left(), heard)
        if died is None:
            return True
        if died.status == "timeout":
            return False
        if under_way:
            keep(under_way.pop(), {"status": died.status, "error": died.error})
        elif len(answers) == before:
            raise RuntimeError(f"no question can be asked: {died.error}")
    return False


def _read(folder: Path, where: dict[str, str]) -> dict[str, Any]:
    """Returns nothing where the file is another environment's or other sources', or damaged."""
    try:
        told = json_file.read(folder / FILE)
        answers = told["answers"]
        if {name: told[name] for name in where} == where and isinstance(answers, dict):
            return answers
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def _write(folder: Path, told: dict[str, Any]) -> None:
    temporary = (folder / FILE).with_suffix(".tmp")
    temporary.write_text(json.dumps(told, indent=2) + "\n")
    temporary.replace(folder / FILE)
