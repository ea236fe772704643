"""``peftrt demo``: two adapters on a real model, from nothing to served in one batch."""
