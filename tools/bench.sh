#!/bin/sh
# Set up what the benchmarks need and run them: sh tools/bench.sh [ARGUMENT OF thinpool bench...]
#
# Meant for Debian 12, as root; elsewhere it uses what is there, and peers that are missing are
# named and skipped. Debian packages are installed (root only); everything else goes into .venv and
# build in this checkout. It may be run again. With --setup alone nothing is run.
set -eu
cd "$(dirname "$0")/.."
. tools/setup.sh

setup_packages $BUILD_PACKAGES e2fsprogs xfsprogs btrfs-progs fio fuse3 mount util-linux kmod procps \
	fuse-overlayfs unionfs-fuse qemu-utils qemu-system-common thin-provisioning-tools
setup_python '[bench]'
# The C core's own programs, optimized: the suite "core" runs them from here.
THINPOOL_BENCH_PROGRAMS=$PWD/build/release/csrc/tests
export THINPOOL_BENCH_PROGRAMS
[ -e build/release/build.ninja ] || "$VENV/bin/meson" setup --buildtype=release build/release
"$VENV/bin/ninja" -C build/release
[ "${1-}" != --setup ] || exit 0
exec "$VENV/bin/python" -P -m thinpool bench "$@"
