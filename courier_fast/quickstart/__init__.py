"""A shop that never was: drawn products and simulated users, so that everything can be tried
without data of one's own."""
