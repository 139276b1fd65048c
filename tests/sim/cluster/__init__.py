"""A seeded world of many agents; see `simulation`."""
