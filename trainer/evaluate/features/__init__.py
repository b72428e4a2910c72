"""Networks whose features images are compared by, each with one pinned preprocessing."""
