"""Measurements of the engine and of the service; `python -m service.benchmark` lists the commands."""
