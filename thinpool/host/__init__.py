"""What thinpool asks of the host: loop devices, mounts, freezing, filesystems, directories.

Nothing here knows pools or volumes: it deals in paths, device numbers and descriptors. System
calls and ioctls are made directly; the only programs started are the filesystems' own tools
(mkfs, resize2fs, xfs_growfs), found in a fixed list of system directories.
"""
