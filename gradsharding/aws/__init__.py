"""The edge to AWS: S3 as a store, Lambda as an executor, and their deployment. Only this folder imports boto3."""
