"""The peer's answers, recorded, and what asks for them."""
