"""What writes answers: one protocol, an engine in this process and one over HTTP."""
