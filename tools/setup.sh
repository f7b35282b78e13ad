# Sourced by tools/test.sh and tools/demo.sh, from the top of the checkout: what both set up.
#
# setup_missing PACKAGE...    prints those that are not installed
# setup_packages PACKAGE...   installs them (root), or says how
# setup_daemon PACKAGE...     the same, but starts no service, removes nothing, and may fail
# setup_python EXTRA          .venv with thinpool in it; EXTRA is "" or "[dev]"
# setup_kernel                a kernel of Debian's in build/kernel, for tools/kernel-run
#
# Everything that is not a Debian package stays inside this checkout (.venv, build). All of it may
# run again: what is there already is kept.
# shellcheck shell=sh

VENV="$PWD/.venv"
# Where mkfs and losetup are; not in everybody's path.
PATH="$PATH:/usr/sbin:/sbin"
export PATH
BUILD_PACKAGES="python3 python3-dev python3-venv gcc libc6-dev pkg-config liburing-dev"

setup_missing() {
	for package in "$@"; do
		dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
			printf '%s ' "$package"
	done
}

setup_packages() {
	if ! command -v dpkg-query >/dev/null; then
		echo "no dpkg on this host: the equivalents of these Debian packages are yours to install: $*"
		return 0
	fi
	missing=$(setup_missing "$@")
	[ -n "$missing" ] || return 0
	if [ "$(id -u)" != 0 ]; then
		echo "not root, so these Debian packages cannot be installed: $missing"
		echo "  as root: apt-get install --no-install-recommends $missing"
		return 0
	fi
	echo "installing: $missing"
	DEBIAN_FRONTEND=noninteractive
	export DEBIAN_FRONTEND
	apt-get update -q || echo "some package lists could not be fetched; going on with what there is"
	# shellcheck disable=SC2086 # a list
	apt-get install -q -y --no-install-recommends ${SETUP_APT-} $missing
}

# Packages that bring services with them: the tests start their own. Somebody's docker-ce stays.
setup_daemon() {
	policy=/usr/sbin/policy-rc.d
	[ "$(id -u)" = 0 ] && [ -d "${policy%/*}" ] && [ ! -e "$policy" ] || policy=
	if [ -n "$policy" ]; then
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
		trap 'rm -f "$policy"' EXIT
	fi
	(SETUP_APT=--no-remove && setup_packages "$@") ||
		echo "could not be installed: $*; tests that need them are skipped"
	if [ -n "$policy" ]; then
		rm -f "$policy"
		trap - EXIT
	fi
}

# A Python of 3.11 or later that has venv, pip and headers: python3-dev serves Debian's own only.
setup_find_python() {
	for candidate in /usr/bin/python3 "$(command -v python3 || true)" python3.14 python3.13 \
		python3.12 python3.11; do
		[ -n "$candidate" ] && "$candidate" -c '
import os, sys, sysconfig
import ensurepip, venv
headers = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(sys.version_info < (3, 11) or not os.path.exists(headers))' 2>/dev/null || continue
		printf '%s\n' "$candidate"
		return 0
	done
	echo "no python3 >= 3.11 with venv and headers here (Debian: python3 python3-dev python3-venv)" >&2
	return 1
}

setup_pip() {
	"$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"
}

setup_python() {
	extra=$1
	if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
		python=$(setup_find_python) || return 1
		echo "virtual environment .venv, with $python"
		"$python" -m venv --clear "$VENV"
	fi
	PATH="$VENV/bin:$PATH"
	# Never the folder one stands in before what is installed.
	PYTHONSAFEPATH=1
	export PATH PYTHONSAFEPATH

	sources=$(find csrc thinpool tools/emit_cffi.py meson.build pyproject.toml -type f \
		! -name '*.pyc' ! -name '*.so' -exec sha256sum {} + | sort | sha256sum)
	state="$extra $(sha256sum <pyproject.toml)"
	if ! grep -qxF -e "$state" -e "[dev] ${state#* }" "$VENV/dependencies" 2>/dev/null; then
		echo "installing from PyPI what thinpool$extra needs, into .venv"
		setup_pip 'meson-python>=0.18' meson ninja 'cffi>=1.16'
		setup_pip --no-build-isolation ".$extra"
		printf '%s\n' "$state" >"$VENV/dependencies"
		printf '%s\n' "$sources" >"$VENV/sources"
	elif [ "$(cat "$VENV/sources" 2>/dev/null)" != "$sources" ]; then
		echo "building thinpool"
		setup_pip --no-build-isolation --no-deps --force-reinstall .
		printf '%s\n' "$sources" >"$VENV/sources"
	fi
}

# The package is unpacked, not installed: 70 MB, 400 MB unpacked. Kept when there is one.
setup_kernel() {
	THINPOOL_KERNEL_DIR=${THINPOOL_KERNEL_DIR:-$PWD/build/kernel}
	export THINPOOL_KERNEL_DIR
	if ! ls "$THINPOOL_KERNEL_DIR"/boot/vmlinuz-* >/dev/null 2>&1; then
		if ! command -v apt-get >/dev/null || [ "$(dpkg --print-architecture)" != amd64 ]; then
			echo "no apt-get of an amd64 Debian here, so no kernel for tools/kernel-run: unpack a" \
				"linux-image package of Debian's into $THINPOOL_KERNEL_DIR"
			return 0
		fi
		package=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: //p' | head -n 1)
		download="$THINPOOL_KERNEL_DIR.download"
		rm -rf "$download" "$THINPOOL_KERNEL_DIR.new"
		mkdir -p "$download"
		if [ -z "$package" ] || ! (cd "$download" && apt-get download -q "$package"); then
			echo "the kernel package ${package:-linux-image-amd64} cannot be fetched; going on without" \
				"a kernel for tools/kernel-run"
			rm -rf "$download"
			return 0
		fi
		dpkg -x "$download"/*.deb "$THINPOOL_KERNEL_DIR.new"
		rm -rf "$download" "$THINPOOL_KERNEL_DIR"
		mv "$THINPOOL_KERNEL_DIR.new" "$THINPOOL_KERNEL_DIR"
	fi
	if [ "$(id -u)" = 0 ] && { [ -e /sys/module/dm_thin_pool ] || modprobe -q dm-thin-pool 2>/dev/null; }; then
		echo "this kernel has device-mapper: tests that need it run directly"
	else
		echo "kernel $(uname -r) has no dm-thin-pool (or this is not root): tests that need it run in" \
			"$(ls "$THINPOOL_KERNEL_DIR"/boot | grep -m 1 vmlinuz) under QEMU"
	fi
}
