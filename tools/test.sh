#!/bin/sh
# Set up what the tests need and run them all: sh tools/test.sh [PYTEST ARGUMENT...]
#
# Meant for Debian 12, as root with nothing but git; elsewhere it uses what is there. Debian packages
# are installed (root only), everything else goes into .venv and build in this checkout. It may be
# run again: what is there already is kept. The last line is pytest's summary.
set -eu
cd "$(dirname "$0")/.."

PACKAGES="python3 python3-dev python3-venv gcc libc6-dev pkg-config make git liburing-dev
thin-provisioning-tools e2fsprogs xfsprogs fio mount util-linux procps xz-utils zstd kmod"
VENV="$PWD/.venv"

say() { printf '\n== %s\n' "$*"; }

# ---- Debian packages -----------------------------------------------------------------------
missing=
if command -v dpkg-query >/dev/null; then
	for package in $PACKAGES; do
		dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
			missing="$missing $package"
	done
else
	echo "no dpkg here: the packages $(echo $PACKAGES) are yours to install"
fi
if [ -n "$missing" ]; then
	if [ "$(id -u)" = 0 ]; then
		say "installing:$missing"
		export DEBIAN_FRONTEND=noninteractive
		apt-get update -q
		# shellcheck disable=SC2086 # a list
		apt-get install -q -y --no-install-recommends $missing
	else
		echo "not root, so these Debian packages cannot be installed:$missing"
		echo "  as root: apt-get install --no-install-recommends$missing"
	fi
fi
if [ "$(id -u)" != 0 ]; then
	echo "not root: what mounts (FUSE, loop devices, filesystems) is skipped, with its reason; the rest runs"
fi

# ---- a Python of 3.11 or later that has venv and headers -----------------------------------
usable() {
	"$1" -c '
import sys, sysconfig, os, venv, ensurepip
ok = sys.version_info >= (3, 11) and os.path.exists(sysconfig.get_path("include") + "/Python.h")
sys.exit(not ok)' 2>/dev/null
}
python=
for candidate in /usr/bin/python3 "$(command -v python3 || true)" python3.13 python3.12 python3.11; do
	if [ -n "$candidate" ] && usable "$candidate"; then
		python=$candidate
		break
	fi
done
if [ -z "$python" ]; then
	echo "no python3 >= 3.11 with venv and headers was found (Debian: python3 python3-dev python3-venv)" >&2
	exit 1
fi

# ---- virtual environment --------------------------------------------------------------------
say "virtual environment .venv"
"$VENV/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$VENV"
PATH="$VENV/bin:$PATH"
export PATH
# Our own package is installed anew each time; its sources are what is being tested.
wanted=$(cat pyproject.toml tools/test.sh | sha256sum)
if [ "$(cat "$VENV/dependencies" 2>/dev/null)" != "$wanted" ]; then
	pip install -q --disable-pip-version-check "meson-python>=0.16" meson ninja "cffi>=1.16"
	pip install -q --disable-pip-version-check --no-build-isolation '.[dev]'
	echo "$wanted" >"$VENV/dependencies"
fi
say "build and install thinpool"
pip install -q --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .

say "C tests, C tests under ASan and UBSan, then pytest (lint is among its tests)"
exec make ci VENV="$VENV" PYTEST_ARGUMENTS="$*"
