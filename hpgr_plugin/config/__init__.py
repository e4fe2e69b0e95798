"""Gin: what can be configured (`registry`), and checks of a configuration (`scopes`)."""
