"""How many experts tokens may use now: cap, costs, limits, and the controller between them."""
