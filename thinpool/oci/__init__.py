"""Image archives: read, unpacked safely, written, compared.

Knows nothing of pools or mounts. A tree is the descriptor of its root directory; where layers go
is the caller's, behind the :class:`~thinpool.oci.importer.LayerTarget` protocol.

====================  ======================================================================
``syscalls``          openat2, which the standard library lacks
``streams``           byte sources: decompression, digests, limits, all in this process
``tar``               a streaming tar parser (ustar, GNU, PAX, sparse) that trusts nothing
``tree``              removing and walking trees by descriptor
``extract``           one layer applied to a root directory
``export``            a tree as a deterministic tar
``diff``              what differs between two trees, and that as a layer
``archive``           docker-save and OCI-layout archives, tars and directories as images of layers
``importer``          an image brought to a target, layer by layer
====================  ======================================================================
"""
