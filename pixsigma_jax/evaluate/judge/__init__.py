"""Preferences of a multimodal model behind an OpenAI-compatible endpoint."""
