"""S3 as a store. This folder imports ``aws.client`` and what lies beside it, and nothing of ``functions`` or ``deploy``."""
