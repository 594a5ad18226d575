"""Requests with media in, rendered prompts out; no model forward, no Ray, no HTTP server."""
