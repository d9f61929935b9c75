"""Features in, numbers and a picture out: zero-shot, retrieval and the report. Imports neither pipeline nor model."""
