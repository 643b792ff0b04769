"""From images and captions to feature records."""
