"""The trainer: from a dataset folder to an encoder."""
