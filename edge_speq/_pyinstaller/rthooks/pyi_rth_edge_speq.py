"""Runs before the application: if this process was started as the engine of a session, run the engine instead."""

from edge_speq.session.subprocess.freeze import freeze_support

freeze_support()
