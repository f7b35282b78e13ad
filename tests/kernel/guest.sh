# What the scripts for the kernel's side share; sourced, in the guest. Names are those of volumes.
# Starting a program with shared libraries takes 0.3 s there, one of busybox's 0.01 s.
set -eu
mkdir -p /run/bb /run/volumes
busybox --install -s /run/bb
PROGRAMS=$PATH
PATH=/run/bb:$PATH
LC_ALL=C
export LC_ALL
umask 022
POOL=tp-pool
TOP=/run/volumes

# say WORD...: on the console before this returns; the machine's watcher reads it there
say() {
	echo "<2>tp: $*" >/dev/kmsg
}

# pool_on [FEATURE...]
pool_on() {
	dmsetup create "$POOL" --table "0 $(blockdev --getsz "$KR_DISK1") thin-pool \
$KR_DISK0 $KR_DISK1 128 0 $# $*"
}

pool_off() {
	dmsetup remove "$POOL"
}

message() {
	dmsetup message "$POOL" 0 "$*"
}

# thin_on NAME ID SECTORS
thin_on() {
	dmsetup create "$1" --table "0 $3 thin /dev/mapper/$POOL $2"
}

# thins_on "NAME ID SECTORS"...: all in one go
thins_on() {
	all=
	for thin; do
		set -- $thin
		all="$all;$1,,,rw,0 $3 thin /dev/mapper/$POOL $2"
	done
	dmsetup create --concise "${all#;}"
}

# device NAME: the path of a volume's device
device() {
	echo "${DEVICES:-/dev/mapper}/$1"
}

# mount_on NAME FILESYSTEM [OPTIONS]
mount_on() {
	mkdir -p "$TOP/$1"
	case $2 in
	xfs) mount -t xfs -o "nouuid${3:+,$3}" "$(device "$1")" "$TOP/$1" ;;
	*) mount -t "$2" ${3:+-o "$3"} "$(device "$1")" "$TOP/$1" ;;
	esac
}

mount_off() {
	umount "$TOP/$1"
}

# verify_tree NAME: that a mounted volume holds what $LISTS/NAME.{sums,listing} say, and no more.
verify_tree() (
	cd "$TOP/$1"
	{
		find . -type f -exec stat -c '%n f %a %s' {} +
		find . -type d ! -name . ! -name lost+found -exec stat -c '%n d %a' {} +
		find . -type l -exec stat -c '%N l' {} +
	} | sort >/run/found
	cmp /run/found "$LISTS/$1.listing" || { diff /run/found "$LISTS/$1.listing"; exit 1; } >&2
	if [ -s "$LISTS/$1.sums" ]; then
		sha256sum -s -c "$LISTS/$1.sums" || { sha256sum -c "$LISTS/$1.sums"; exit 1; } >&2
	fi
)

# verify_files NAME: the same for regular files alone, by $LISTS/NAME.{sums,names}
verify_files() (
	cd "$TOP/$1"
	find . -type f | sort >/run/found
	cmp /run/found "$LISTS/$1.names" || { diff /run/found "$LISTS/$1.names"; exit 1; } >&2
	if [ -s "$LISTS/$1.sums" ]; then
		sha256sum -s -c "$LISTS/$1.sums" || { sha256sum -c "$LISTS/$1.sums"; exit 1; } >&2
	fi
)

# snapshot FROM-NAME FROM-ID NEW-ID: suspended for the moment, where the origin is active
snapshot() {
	if [ -e "/dev/mapper/$1" ]; then
		dmsetup suspend "$1"
		message create_snap "$3" "$2"
		dmsetup resume "$1"
	else
		message create_snap "$3" "$2"
	fi
}

# store_on DIRECTORY: a program of ours that works on the pools under it, and that "ask" asks
store_on() {
	DEVICES=/run/thinpool/dev/p
	PATH=$PROGRAMS modprobe loop # as udev would
	mkfifo /run/questions /run/answers
	PATH=$PROGRAMS python3 "$HERE/guest_store.py" "$1" </run/questions >/run/answers &
	exec 8>/run/questions 9</run/answers
}

# ask COMMAND WORD...: see guest_store.py; its failure ends the script
ask() {
	echo "$*" >&8
	read -r answer <&9
	case $answer in
	ok*) ;;
	*)
		echo "$*: $answer" >&2
		exit 1
		;;
	esac
}
