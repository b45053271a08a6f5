"""Writes the dashboards that compose, or any Grafana, shows: `python -m deploy.dashboards`."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.dashboards.learning import learning
from deploy.dashboards.release import release
from deploy.dashboards.serving import serving

GRAFANA = Path(__file__).resolve().parent.parent / "grafana"


def texts() -> dict[str, str]:
    """File name → the dashboard in it, as Grafana reads it."""
    made = {"learning": learning(), "release": release(), "serving": serving()}
    return {
        f"{name}.json": json.dumps(one.build(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        for name, one in made.items()
    }


if __name__ == "__main__":
    for name, text in texts().items():
        (GRAFANA / name).write_text(text, "utf-8")
