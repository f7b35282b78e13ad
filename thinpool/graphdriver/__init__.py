"""Docker's graph-driver plugin: layers are thin snapshots in a pool.

A front end: it translates Docker's calls to the API and decides nothing about pools.

====================  ======================================================================
``fields``            requests read field by field; ids, options and sizes checked
``options``           ``--storage-opt``: every option of the devicemapper driver
``state``             what must outlive this process: Get counts, unfinished work, options
``places``            where layers are mounted: a folder that no container's namespace pins
``layers``            the calls on layers: make, mount, remove, fill
``changes``           the calls that compare: Diff, Changes, DiffSize
``app``               the HTTP side: routes, streams, errors as the protocol wants them
``serve``             the process: its socket, its lock, its end
====================  ======================================================================
"""
