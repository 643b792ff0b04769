"""From pictures and captions to batches: what is stored, and how it is served."""
