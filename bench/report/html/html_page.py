"""Puts the page together: template, style, scripts, data and plotting library in one file.

Nothing is fetched from anywhere. A policy in the page lets only the scripts run whose digests it
names, so that text from a CSV file could not run even if it were taken for markup.
"""

import hashlib
import json
from base64 import b64encode
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import StrictUndefined
from plotly.offline import get_plotlyjs

from resfuse.bench.report.data.result import Environment
from resfuse.bench.report.html.payload import payload
from resfuse.bench.report.tables.markdown import listing

# In this order they are one script.
SCRIPTS = (
    "data.js", "dom.js", "state.js", "controls.js", "detail.js", "fastest.js", "rows.js",
    "figure.js", "by_backend.js", "scaling.js", "roofline.js", "served.js", "account.js",
    "main.js",
)  # fmt: skip


def render(environments: Sequence[Environment], source: str) -> str:
    """Returns the whole page.

    Args:
        environments: what select.read_folders found.
        source: the sentence that says which command makes the page again.
    """
    scripts = {
        "theme": _asset("theme.js"),
        "app": '(() => {\n"use strict";\n' + "\n".join(map(_asset, SCRIPTS)) + "\n})();\n",
        "plotly": get_plotlyjs(),
        "plots": "window.dispatchEvent(new Event('plotly-is-here'));",
    }
    data = payload(environments)
    devices = dict.fromkeys(name for e in environments for name in e.device_names)
    templates = Templates(autoescape=True, undefined=StrictUndefined)
    return templates.from_string(_asset("page.html.jinja")).render(
        title=f"resfuse on {listing(list(devices))}" if devices else "resfuse: no results",
        style=_asset("page.css"),
        looks=list(data["looks"].values()),
        data=json_block(data),
        scripts=scripts,
        digests=[_digest(script) for script in scripts.values()],
        source=source,
    )


def json_block(data: Any) -> str:
    """Returns JSON for a <script> element: no sequence in it ends the element or begins a comment.

    NaN and infinities are refused, as a JSON parser would.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: no U+2028
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return (
        resources.files("resfuse.bench.report.html")
        .joinpath("js" if name.endswith(".js") else "", name)
        .read_text(encoding="utf-8")
    )


def _digest(script: str) -> str:
    return b64encode(hashlib.sha256(script.encode()).digest()).decode()
