"""Copy-on-write block devices on the Linux kernel's dm-thin format."""
