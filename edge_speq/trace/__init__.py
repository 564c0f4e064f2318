"""Traces: per step, the target's routing, the draft's routing before it, and the times.

step     one recorded step            writer   writes a file that stays readable after an interruption
reader   reads the steps of a file    gates    reads gate weights during a decode

A trace is an npz file, which numpy.load opens. It has one member per array and chunk of 256 steps (`routing.000000`
and so on), and `meta`, JSON in bytes. Expert ids take one byte each for up to 256 experts.
"""

from __future__ import annotations

from edge_speq.trace.reader import Trace, read
from edge_speq.trace.step import Step
from edge_speq.trace.writer import Writer

__all__ = ["Step", "Trace", "Writer", "read"]
