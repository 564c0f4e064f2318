"""Every published measurement of edge_speq: how it is made, what was measured, and the tables made of it.

A new table is an entry in entries.toml, a function of some module here that turns its JSON into Markdown, and a command
that makes the JSON: `edge-speq bench ... > NAME.json` or `python -m benchmarks.MODULE ... -o NAME.json`.
    python -m benchmarks run NAME --out benchmarks/results    # measures it and stores what it measured
    python -m benchmarks render                               # writes it into every page that has its marker
"""
