"""Replay recorded routing under the policies of edge_speq.policies, with a virtual clock and link, without llama.cpp.

- steps: recorded steps, or shorter ones if a draft-length rule chose fewer draft tokens
- replay: run one policy over all steps
- placement, slots: experts in slots, in streamed layers, or on the CPU
- costs: linear cost model of a step, fitted on recorded times
- bounds: Belady's rule, and perfect overlap of transfers with computation
- window_quality: precision and recall of the draft's routing over the next tokens
- estimate: time per token on another machine
- report, plot: results as Markdown, CSV, JSON and figures
"""

from __future__ import annotations

from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay, ReplayOutcome
from edge_speq.simulate.report import simulate

__all__ = ["Replay", "ReplayOutcome", "StepCosts", "simulate"]
