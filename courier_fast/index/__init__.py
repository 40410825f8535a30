"""`courier-fast index`: nearest neighbours of items."""
