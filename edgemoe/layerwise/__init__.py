"""Decoder layers one after the other: where they come from, and what runs them."""
