"""From interactions and JPEGs to batches of unique images."""
