"""Grafana's dashboards as code: `python -m deploy.dashboards` writes deploy/grafana/*.json."""
