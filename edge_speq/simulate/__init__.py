"""Replay of recorded routing, with a clock and a link, under the policies of edge_speq.policies. No
llama.cpp needed.

steps    what is replayed: recorded steps, or shorter ones where a governor chose fewer draft tokens
replay   one policy over all steps             places   slots, streamed layers, or the CPU
costs    what a step costs: fitted on recorded times   bounds   Belady's rule, and perfect overlap
windows  how well the draft's routing foresees the next tokens     report   tables, CSV, JSON; plot
"""

from __future__ import annotations

from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay, ReplayOutcome
from edge_speq.simulate.report import simulate

__all__ = ["Replay", "ReplayOutcome", "StepCosts", "simulate"]
