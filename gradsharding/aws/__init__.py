"""The cloud's edge: S3 as a store, Lambda as an executor, and what puts them up. Only here is boto3 imported."""
