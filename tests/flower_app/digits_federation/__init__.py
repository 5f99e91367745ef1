"""Digits, learned by a federation."""
