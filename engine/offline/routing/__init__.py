"""Finds which experts a text activates: traces, replays, simulations, estimates."""
