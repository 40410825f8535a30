"""`courier-fast doctor`: what is there, which implementation runs, and whether its numbers are
right."""
