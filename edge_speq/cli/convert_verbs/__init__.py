"""The verbs of `edge-speq convert`, one a file: `add_parser(verbs)` registers it and sets `verb` to what runs it."""
