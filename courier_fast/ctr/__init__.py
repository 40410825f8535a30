"""What an embedding is worth to a click-through-rate model: impressions, models, one cell of the
table, the report."""

from .impressions import Impressions, Protocol, make_protocol

__all__ = ["Impressions", "Protocol", "make_protocol"]
