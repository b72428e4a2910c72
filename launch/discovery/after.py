"""After a start: take back what its rank 0 was killed before it could. No torch."""

from pathlib import Path

from trainer.config_text import from_yaml
from trainer.discovery import after_the_ranks
from trainer.errors import UserError
from trainer.run_folder import CONFIG


def take_back(run_dir: str, work_dir: str) -> None:
    """Remove the run's file from its discovery folder, once rank 0 has ended. Says what goes wrong, and raises nothing."""
    try:
        configured = from_yaml(Path(work_dir, CONFIG).read_text(encoding="utf-8"), source=CONFIG).metrics.discovery_dir
    except (OSError, UserError):  # what the ranks said about it is what counts
        configured = None
    if trouble := after_the_ranks(configured, run_dir.rstrip("/")):
        print(f"warning: {trouble}", flush=True)
