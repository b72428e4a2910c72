"""`loupe runs`: looking after runs, from their folders."""
