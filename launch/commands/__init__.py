"""Commands that need both a run, as the launchers find it, and the trainer: composition roots, which nothing imports."""
