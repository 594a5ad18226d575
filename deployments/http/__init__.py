"""The HTTP border: what every request passes, the routes, the forms of large answers."""
