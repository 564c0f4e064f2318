"""`edge-speq tune`: find the fastest options of a model on this machine.

The method is SpecMoEOff's optimizer (arXiv 2508.21706) for one user. `measure` times the operators and fits linear
costs, `predict` ranks the candidates with them, and `tuner` runs the best ones and the defaults. The options that
measured fastest are stored, not those with the best prediction.

`learned` trains a predictor of experts on traces (`edge-speq tune --learn`), independently of the above.
"""

from __future__ import annotations
