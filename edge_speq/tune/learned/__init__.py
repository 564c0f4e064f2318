"""Training of the learned predictor of experts, with torch."""
