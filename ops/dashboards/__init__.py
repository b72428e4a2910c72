"""Grafana's dashboards as code: `python -m ops.dashboards` writes the JSON files beside these modules.

A module a dashboard has `build()`; `kit` has what all of them share, `expressions` what several ask Prometheus.
"""
