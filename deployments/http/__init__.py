"""The HTTP border: what every request passes, and the routes."""
