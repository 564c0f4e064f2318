"""The edge-speq command, one file a command."""
