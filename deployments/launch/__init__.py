"""`make serve` and its kin: a Serve config file checked, a Ray cluster looked at, an application started."""
