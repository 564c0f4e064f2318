"""Split experts into sub-experts, as in MoE-Prism."""
