"""S3 as a store."""
