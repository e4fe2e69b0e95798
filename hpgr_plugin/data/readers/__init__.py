"""Readers: files on disk -> EventTable."""
