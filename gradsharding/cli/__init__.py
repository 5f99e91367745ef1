"""The command line: text in, one call of the library, text out."""
