"""Experts cut into sub-experts (MoE-Prism)."""
