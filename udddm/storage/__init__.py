"""Objects under keys, on a local disk, S3, or any fsspec file system."""
