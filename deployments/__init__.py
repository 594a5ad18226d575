"""Everything that knows Ray or HTTP: the tiers, the routes, and the graph that binds them."""
