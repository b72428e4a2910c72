"""Being found by Prometheus: targets of runs on object storage, scrape configs, files that are left behind."""
