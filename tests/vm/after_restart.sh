# The second job of tests/vm/test_restart.py: what is there before anybody asks for it.
tp() { "$PYTHON" -P -m thinpool "$@"; }
systemctl is-active thinpool-pools.service
for engine in user dm; do
	systemctl is-active thinpool@$engine.service
	readlink /run/thinpool/dev/$engine/kept
	test ! -e /run/thinpool/dev/$engine/idle
	mount /run/thinpool/dev/$engine/kept /mnt
	cat /mnt/file
	umount /mnt
	tp check $engine
	grep -q thinpool@$engine.service "/proc/$(systemctl show -P MainPID thinpool@$engine)/cgroup"
done
