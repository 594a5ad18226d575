"""Rendered prompts in, tokens out; no Ray, no HTTP server."""
