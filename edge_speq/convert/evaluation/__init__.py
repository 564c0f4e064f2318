"""What a model computes on a text: activations, agreement, perplexity."""
