"""An HTTP server with OpenAI's interface on one Session: docs/guide/server.md. Needs the extra `serve`."""
