"""Run a model on a text and measure activations, agreement with another model, and perplexity."""
