"""`edge-speq tune`: the offline parameters for a machine and a model.

SpecMoEOff's optimizer (arXiv 2508.21706) scaled down to one user: linear cost models per operator from short
measurements (`gauge`), predictions from them for each candidate (`search`), and the best one measured against what
a run without a profile does (`tuner`). What is stored is what was faster when it ran, not what was predicted.

learn      trains foresight on traces, which has nothing to do with the above        samples   what it learns from
"""

from __future__ import annotations
