"""What stands in a store: safetensors headers and layouts, dtypes, records. Nothing here reads or writes."""
