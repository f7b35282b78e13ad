#!/bin/sh
# The main job from nothing to nothing, with every command shown: sh tools/demo.sh
#
# A pool, a base device with ext4, a real Debian as an image, three containers of it, a 4 KiB edit of
# a 1 GiB file in each beside overlayfs, the server killed in the middle of a write, both checkers'
# verdicts, and everything taken down. Meant for Debian 12, as root with nothing but git. It may be
# run again, and cleans up after itself when it fails or is interrupted.
#
#   THINPOOL_DEMO_DIR       where it writes; default build/demo in this checkout
#   THINPOOL_DEMO_CACHE     where the Debian root filesystem is kept; default .cache in this checkout
#   THINPOOL_DEMO_FILE_MIB  size of the large file; default 1024
#   THINPOOL_DEMO_HOST_TREE=1  take the image from this host's files instead of debootstrap
set -eu
cd "$(dirname "$0")/.."
. tools/setup.sh

WORK=${THINPOOL_DEMO_DIR:-$PWD/build/demo}
CACHE=${THINPOOL_DEMO_CACHE:-$PWD/.cache}
FILE_MIB=${THINPOOL_DEMO_FILE_MIB:-1024}
PACKAGES="$BUILD_PACKAGES thin-provisioning-tools e2fsprogs debootstrap mount util-linux procps kmod"
NEED_MIB=$((FILE_MIB * 6 + 2560))

# ---- what will happen -----------------------------------------------------------------------
missing=$(setup_missing $PACKAGES 2>/dev/null || true)
cat <<TEXT
thinpool's demonstration. Before anything is done:
  installs   Debian packages: ${missing:-none, all are there}
             Python packages from PyPI, into $VENV
  writes     $WORK (removed at the end)
             $CACHE (a Debian root filesystem, kept for the next run)
             never the default root /var/lib/thinpool
  needs      root, FUSE, loop devices, $NEED_MIB MiB of disk for as long as it runs
  takes      about 2 minutes, and 3 more the first time (packages, debootstrap)
TEXT

# ---- can it go on? --------------------------------------------------------------------------
cannot() {
	echo "the demonstration cannot go on: $1" >&2
	exit 8
}
[ "$(id -u)" = 0 ] || cannot "it mounts filesystems and makes loop devices, and you are not root.
  What needs neither (create, snapshot, delta, check, dump) works without: see README.md"
[ -e /dev/fuse ] || modprobe -q fuse 2>/dev/null || true
(exec 3<>/dev/fuse) 2>/dev/null || cannot "no FUSE here: /dev/fuse cannot be opened"
[ -e /dev/loop-control ] || modprobe -q loop 2>/dev/null || true
(exec 3<>/dev/loop-control) 2>/dev/null ||
	cannot "no loop devices here: /dev/loop-control cannot be opened"
grep -qw ext4 /proc/filesystems || modprobe -q ext4 2>/dev/null ||
	cannot "this kernel has no ext4"
case $WORK in
/*) ;;
*) WORK=$PWD/$WORK ;;
esac
case $WORK in
*[!A-Za-z0-9/._+-]*) cannot "the path $WORK holds blanks or odd characters; set THINPOOL_DEMO_DIR" ;;
esac
# A folder that is there must be an earlier run's.
if [ -e "$WORK" ] && [ ! -e "$WORK/.thinpool-demo" ]; then
	cannot "$WORK exists and is not this program's; set THINPOOL_DEMO_DIR"
fi

# Shorter to read: this shell stands in the checkout.
W=${WORK#"$PWD"/}
IMAGE=${CACHE#"$PWD"/}/debian-minbase.tar

# ---- taking down, at the end, on failure, on interruption, after an earlier run ---------------
THINPOOL_ROOT=$WORK/root
THINPOOL_RUN=$WORK/run
THINPOOL_LINGER=2
THINPOOL_DEMO=$WORK
LC_NUMERIC=C
export THINPOOL_ROOT THINPOOL_RUN THINPOOL_LINGER THINPOOL_DEMO LC_NUMERIC
writer=

our_mounts() { awk -v w="$WORK/" 'index($2 "/", w) == 1 {print $2}' /proc/self/mounts; }
our_loops() { losetup --list --noheadings --output NAME,BACK-FILE | awk -v w="$WORK/" 'index($2, w) == 1 {print $1}'; }
# Processes that were started from here carry THINPOOL_DEMO in their environment; this shell does not,
# and grep must not find itself. One without a command line has ended, its parent has yet to notice.
our_processes() {
	env -u THINPOOL_DEMO grep -lzxF "THINPOOL_DEMO=$WORK" /proc/[0-9]*/environ 2>/dev/null |
		while IFS=/ read -r _ _ process _; do
			[ -z "$({ tr -d '\0' <"/proc/$process/cmdline"; } 2>/dev/null)" ] || echo "$process"
		done
}
count() {
	list=$("$1")
	printf '%s' "$list" | grep -c . || true
}

take_down() {
	[ -z "$writer" ] || kill "$writer" 2>/dev/null || true
	# FUSE last: the loop devices stand on it.
	for target in $(our_mounts | grep -v "^$THINPOOL_RUN/" | sort -r); do
		umount "$target" 2>/dev/null || umount -l "$target" || true
	done
	for device in $(our_loops); do losetup --detach "$device" || true; done
	for process in $(our_processes); do kill "$process" 2>/dev/null || true; done
	tries=0
	while [ -n "$(our_processes)" ] && [ $tries -lt 50 ]; do
		sleep 0.1
		tries=$((tries + 1))
	done
	for process in $(our_processes); do kill -9 "$process" 2>/dev/null || true; done
	for target in $(our_mounts | sort -r); do umount -l "$target" 2>/dev/null || true; done
	if [ -z "$(our_mounts)" ]; then rm -rf "$WORK"; fi
}
finished=
at_exit() {
	status=$?
	trap '' INT TERM HUP
	if [ -z "$finished" ]; then
		echo "not finished (status $status): taking down what was made" >&2
		[ ! -e "$WORK/log" ] || tail -n 20 "$WORK/log" >&2
		for log in "$THINPOOL_ROOT"/pools/*/server.log; do
			[ ! -s "$log" ] || { echo "-- $log" && tail -n 20 "$log"; } >&2
		done
		take_down
		[ ! -e "$WORK" ] || echo "left: $(our_mounts) $(our_loops) in $WORK" >&2
	fi
	exit "$status"
}
trap at_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

step() { printf '\n# %s\n' "$*"; }
run() {
	printf '$ %s\n' "$*"
	eval "$*"
}
die() {
	echo "FAILED: $*" >&2
	exit 1
}
now_ms() { date +%s%3N; }

# ---- setting up -----------------------------------------------------------------------------
step "what it needs"
setup_packages $PACKAGES
setup_python ''
if [ -e "$WORK" ]; then
	echo "an earlier run left $WORK: taking that down first"
	take_down
	[ ! -e "$WORK" ] || die "could not take down what an earlier run left in $WORK"
fi
mkdir -p "$WORK" "$CACHE"
: >"$WORK/.thinpool-demo"
free_mib=$(df --output=avail -m "$WORK" | tail -n 1 | tr -d ' ')
[ "$free_mib" -ge "$NEED_MIB" ] ||
	cannot "$WORK has $free_mib MiB free of the $NEED_MIB it needs; set THINPOOL_DEMO_FILE_MIB or THINPOOL_DEMO_DIR"
modprobe -q overlay 2>/dev/null || true
overlay=yes
grep -qw overlay /proc/filesystems || overlay=

step "a real root filesystem"
if [ -z "${THINPOOL_DEMO_HOST_TREE:-}" ] && [ ! -s "$IMAGE" ]; then
	rm -rf "$WORK/debian"
	if run "debootstrap --variant=minbase bookworm $W/debian >$W/log 2>&1"; then
		run "tar --create --numeric-owner --xattrs --file $IMAGE.part --directory $W/debian ."
		mv "$IMAGE.part" "$IMAGE"
	else
		tail -n 3 "$WORK/log"
		echo "debootstrap could not fetch Debian"
	fi
	rm -rf "$WORK/debian" "$WORK/log"
fi
if [ -n "${THINPOOL_DEMO_HOST_TREE:-}" ] || [ ! -s "$IMAGE" ]; then
	echo "THE IMAGE IS NOT A DEBIAN MINBASE: it is a tar of this host's own programs and libraries,"
	echo "without files over 8 MiB"
	IMAGE=$W/host.tar
	# Merged /usr: /bin, /sbin, /lib and /lib64 are links, which go in as links.
	run "find /bin /sbin /lib /lib64 /etc/debian_version /etc/passwd /etc/group /usr/bin /usr/sbin \
/usr/lib/\$(gcc -dumpmachine) /usr/lib64 -xdev \\( -type d -o -type l -o -type f -size -8M \\) \
-print0 2>/dev/null | tar --create --numeric-owner --no-recursion --null --files-from=- --file $IMAGE 2>/dev/null"
fi
ls -l "$IMAGE" | awk '{printf "%s, %d MiB\n", $NF, $5 / 1048576}'

# ---- the main job ---------------------------------------------------------------------------
M=$W/mnt
mkdir -p "$M/build" "$M/c1" "$M/c2" "$M/c3"
pool_used() { thinpool --json status demo | python -c 'import json,sys; print(json.load(sys.stdin)["data"]["used"])'; }

step "a pool, with a base device that has ext4 on it"
echo "$ export THINPOOL_ROOT=$THINPOOL_ROOT THINPOOL_RUN=$THINPOOL_RUN"
run "thinpool create-pool demo --size 16G --base-size 4G --base-fs ext4"

step "the image, a snapshot of the base"
run "thinpool import demo/debian $IMAGE"

step "an image made from it, with one file of $FILE_MIB MiB more"
run "thinpool snapshot demo/debian demo/build --mount $M/build"
mkdir -p "$M/build/srv" # there in a Debian, perhaps not in a host's tree
run "dd if=/dev/urandom of=$M/build/srv/model.bin bs=1M count=$FILE_MIB conv=fsync status=none"
model=$(sha256sum <"$M/build/srv/model.bin")
run "thinpool umount demo/build"
run "thinpool commit demo/build demo/app"

step "three containers of that image, each a block device of its own"
for c in c1 c2 c3; do
	run "thinpool snapshot demo/app demo/$c --mount $M/$c"
done
run "findmnt --noheadings --output SOURCE,FSTYPE,SIZE $M/c1"

step "a command inside each"
for c in c1 c2 c3; do
	run "chroot $M/$c /bin/sh -c 'echo I am $c, on Debian \$(cat /etc/debian_version) | tee /srv/who'"
done
run "head -v $M/c1/srv/who $M/c2/srv/who $M/c3/srv/who"

step "4 KiB of the $FILE_MIB MiB file edited in each container, with fsync"
sync
rm -f "$WORK/times"
for c in c1 c2 c3; do
	before=$(pool_used)
	printf '$ python tools/edit4k.py %s 4096000\n' "$M/$c/srv/model.bin"
	t=$(python tools/edit4k.py "$M/$c/srv/model.bin" 4096000)
	echo "$t"
	sync -f "$M/$c"
	echo "$c thinpool ${t% ms} $(($(pool_used) - before))" >>"$WORK/times"
done

if [ -n "$overlay" ]; then
	step "the same edit under overlayfs on ext4, as overlay2 has it, on this machine"
	O=$W/overlay
	mkdir -p "$O"
	run "truncate --size $((FILE_MIB * 4 + 512))M $W/overlay.img"
	run "mkfs.ext4 -q -F $W/overlay.img"
	run "mount \$(losetup --find --show --direct-io=on $W/overlay.img) $O"
	mkdir -p "$O/image/srv"
	run "cp $M/c1/srv/model.bin $O/image/srv/model.bin"
	sync -f "$O"
	for c in c1 c2 c3; do
		mkdir -p "$O/$c/diff" "$O/$c/work" "$O/$c/merged"
		run "mount -t overlay overlay -o lowerdir=$O/image,upperdir=$O/$c/diff,workdir=$O/$c/work $O/$c/merged"
		before=$(df --output=used -B1 "$O" | tail -n 1)
		printf '$ python tools/edit4k.py %s 4096000\n' "$O/$c/merged/srv/model.bin"
		t=$(python tools/edit4k.py "$O/$c/merged/srv/model.bin" 4096000)
		echo "$t"
		sync -f "$O"
		echo "$c overlayfs ${t% ms} $(($(df --output=used -B1 "$O" | tail -n 1) - before))" >>"$WORK/times"
	done
	for c in c1 c2 c3; do umount "$O/$c/merged"; done
	umount "$O"
	for device in $(losetup --associated "$W/overlay.img" | cut -d: -f1); do losetup --detach "$device"; done
	rm "$W/overlay.img"
else
	echo "this kernel has no overlayfs: nothing to put beside it"
fi

step "time and bytes of one 4 KiB edit with fsync in a file of $FILE_MIB MiB"
awk '{ ms[$1 " " $2] = $3; kib[$1 " " $2] = $4 / 1024; n[$1] = 1 }
END {
	printf "%-10s %16s %16s %16s %16s\n", "container", "thinpool", "new KiB", "overlayfs", "new KiB"
	for (i = 1; i <= 3; i++) {
		c = "c" i
		printf "%-10s %13.2f ms %16d", c, ms[c " thinpool"], kib[c " thinpool"]
		if ((c " overlayfs") in ms)
			printf " %13.2f ms %16d", ms[c " overlayfs"], kib[c " overlayfs"]
		print ""
	}
}' "$WORK/times"

step "the tree"
run "thinpool list demo --tree"

step "the server killed in the middle of a write"
head -c 536870912 /dev/urandom >"$WORK/payload"
supervisor=$(cat "$THINPOOL_ROOT/pools/demo/supervisor.pid")
worker() { ps -o pid= --ppid "$supervisor" | awk '{print $1}'; }
printf '$ dd if=%s of=%s bs=1M conv=fsync &\n' "$W/payload" "$M/c1/srv/payload"
dd if="$WORK/payload" of="$M/c1/srv/payload" bs=1M conv=fsync status=none 2>"$WORK/dd.log" &
writer=$!
kills=0
sleep 0.2
while [ $kills -lt 3 ] && kill -0 "$writer" 2>/dev/null; do
	victim=$(worker)
	if [ -n "$victim" ]; then
		run "kill -9 $victim    # the worker; dd is still writing"
		kills=$((kills + 1))
	fi
	sleep 0.4
done
[ $kills -gt 0 ] || die "the write was over before the server could be killed"
wait "$writer" || die "the write failed: $(cat "$WORK/dd.log")"
writer=
echo "dd ended with status 0; killed $kills time(s); the worker is now process $(worker)"
run "thinpool umount demo/c1"
run "thinpool mount demo/c1 $M/c1    # nothing of it is in the page cache now"
same() {
	printf '$ sha256sum %s\n' "$1"
	found=$(sha256sum <"$1")
	[ "$found" = "$2" ] || die "$1 is ${found%% *}, not ${2%% *}"
	echo "${found%% *}, as written"
}
same "$M/c1/srv/payload" "$(sha256sum <"$WORK/payload")"
run "thinpool snapshot demo/app demo/c4 --mount $M/build    # and the image's own file"
same "$M/build/srv/model.bin" "$model"
thinpool umount --quiet demo/c4 >/dev/null
thinpool remove --quiet demo/c4 >/dev/null

step "what two checkers say: ours on the live pool, thin_check once nobody uses it"
run "thinpool check demo"
for c in c1 c2 c3; do
	run "thinpool umount demo/$c"
done
tries=0
while [ -n "$(our_processes)" ] && [ $tries -lt 300 ]; do
	sleep 0.1
	tries=$((tries + 1))
done
run "thin_check $W/root/pools/demo/metadata && echo thin_check found nothing"

step "everything taken down"
run "thinpool remove-pool demo --yes"
tries=0
while [ "$(count our_processes)" != 0 ] && [ $tries -lt 300 ]; do
	sleep 0.1
	tries=$((tries + 1))
done
mounts=$(count our_mounts) loops=$(count our_loops) processes=$(count our_processes)
[ "$mounts" != 0 ] || rm -rf "$WORK"
echo "$mounts mounts, $loops loop devices, $processes processes left"
[ "$mounts$loops$processes" = 000 ] || die "something is left behind"
finished=yes
