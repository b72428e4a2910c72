"""`loupe doctor`, and the check of each node before a job's ranks start."""
