# The first job of tests/vm/test_restart.py: a pool of either engine, a volume of each to persist.
tp() { "$PYTHON" -P -m thinpool "$@"; }
tp install
systemctl daemon-reload
systemctl enable thinpool-pools.service
udevadm control --reload
for engine in user dm; do
	tp create-pool $engine --engine $engine --size 200M --base-size 64M
	tp snapshot $engine/base $engine/kept --activate
	tp activate $engine/kept --persist
	tp snapshot $engine/base $engine/idle
	tp mount $engine/kept /mnt
	echo "written on $engine" >/mnt/file
	tp umount $engine/kept
	systemctl is-active thinpool@$engine.service
done
