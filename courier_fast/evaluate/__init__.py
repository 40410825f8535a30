"""Does an embedding know what a user will click? Ranking of held-out clicks by similarity to the
history, beside baselines; and `embed`."""
