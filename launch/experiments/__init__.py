"""`loupe experiment`: many runs, compared."""
