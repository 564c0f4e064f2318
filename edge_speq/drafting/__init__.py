"""What proposes the next tokens."""
