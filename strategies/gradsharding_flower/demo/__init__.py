"""``gradsharding demo``: a real federation on this machine."""
