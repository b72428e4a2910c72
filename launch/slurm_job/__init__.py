"""Jobs of SLURM: their scripts, and what runs within them."""
