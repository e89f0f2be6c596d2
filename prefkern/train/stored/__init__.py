"""Stored answers: `prefkern score` puts numbers beside them, `prefkern sample` makes them."""
