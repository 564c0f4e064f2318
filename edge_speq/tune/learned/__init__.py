"""Training of learned foresight, with torch."""
