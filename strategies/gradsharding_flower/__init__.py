"""Flower strategies whose updates never pass through the server."""
