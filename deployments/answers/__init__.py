"""Answers in the shapes of the OpenAI API and of vLLM's token-in/token-out."""
