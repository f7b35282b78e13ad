#!/bin/sh
# Set up what the tests need and run them all: sh tools/test.sh [PYTEST ARGUMENT...]
#
# Meant for Debian 12, as root with nothing but git; elsewhere it uses what is there. Debian packages
# are installed (root only); everything else goes into .venv and build in this checkout. It may be
# run again. The last line is pytest's summary.
set -eu
cd "$(dirname "$0")/.."
. tools/setup.sh

echo "== packages"
setup_packages $BUILD_PACKAGES git make thin-provisioning-tools e2fsprogs xfsprogs fio mount \
	util-linux procps xz-utils zstd kmod skopeo groff-base busybox-static docker-registry \
	qemu-system-x86 dmsetup systemd udev btrfs-progs
setup_daemon docker.io containerd
if [ "$(id -u)" != 0 ]; then
	echo "not root: what mounts (FUSE, loop devices, filesystems) is skipped and says so; the rest runs"
fi
echo "== kernel"
setup_kernel
echo "== python"
setup_python '[dev]'
echo "== C tests, the same under ASan and UBSan, then pytest (lint is among its tests)"
make --no-print-directory test-c asan VENV="$VENV"
THINPOOL_PROFILE=${THINPOOL_PROFILE:-ci}
export THINPOOL_PROFILE
exec "$VENV/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadgroup --durations 15 "$@"
