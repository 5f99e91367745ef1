"""Deployment of the function and its bucket, and its removal."""
