"""The demo model: a tiny trained Qwen2.5-VL, and everything that made it."""
