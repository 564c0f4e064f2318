"""Before the application's own code: a process that was started to be the engine of a session becomes it here."""

from edge_speq.session.subprocess.freeze import freeze_support

freeze_support()
