"""A page in the browser that draws prompts with a trained model."""
