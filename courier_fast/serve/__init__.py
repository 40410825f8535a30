"""Trained encoders as files for servers: export, contract, and the way back."""
