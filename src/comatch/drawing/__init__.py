"""What reports share: one look for figures, one self-contained page."""
