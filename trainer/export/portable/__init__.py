"""What runs where this package is not: `trainer.export.bundle` makes one file each of these modules and of what they use."""
