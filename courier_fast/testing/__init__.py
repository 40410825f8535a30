"""What tests, bench and compiled checks share: the error budget."""
