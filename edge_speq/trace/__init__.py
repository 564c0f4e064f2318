"""Traces: what the routers chose, step by step, what the draft had shown before, and how long it took.

step     one recorded step            writer   a file that grows, whole at any interruption
reader   steps back from a file       record   an EdgeLlama that writes its steps down

A trace is an npz file (numpy.load opens it): a member for each array and chunk of 256 steps, `routing.000000` and so
on, and `meta`, JSON in bytes. Expert ids take a byte each up to 256 experts.
"""

from __future__ import annotations

from edge_speq.trace.reader import Trace, read
from edge_speq.trace.step import Step
from edge_speq.trace.writer import Writer

__all__ = ["Step", "Trace", "Writer", "read"]
