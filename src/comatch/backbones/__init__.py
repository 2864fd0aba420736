"""Thin adapters over stock transformers VLMs."""
