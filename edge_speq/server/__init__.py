"""An HTTP server with OpenAI's interface on one EdgeLlama: docs/server.md. Needs the extra `serve`."""
