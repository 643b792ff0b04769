"""The command that applies a transform to a snapshot and says what it changed."""
