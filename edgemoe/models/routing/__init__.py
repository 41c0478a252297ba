"""Routers: the rule of each, found by probing, and the choice that it makes."""
