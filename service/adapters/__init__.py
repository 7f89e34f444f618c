"""ScaleDown inside other frameworks: one module each, which imports that framework and `service.client` only."""
