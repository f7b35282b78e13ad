# A machine whose services are systemd's, on a disk that outlives it: systemd.sh, in the guest.
#
# $JOB names a script; it is run as a service once those that are enabled have started, and prints
# to this one's output. /etc/systemd/system, /etc/udev/rules.d and /var/lib/thinpool are the disk's.
# systemd is the first process of a namespace: the machine's own first process is tools/kernel-run's.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin
modprobe -a loop fuse dm-thin-pool
mkdir -p /run/disk /var/lib/thinpool /etc/udev/rules.d
blkid "$KR_DISK0" >/dev/null || mkfs.ext4 -q "$KR_DISK0"
mount "$KR_DISK0" /run/disk
for place in /etc/systemd/system /etc/udev/rules.d /var/lib/thinpool; do
	mkdir -p "/run/disk$place"
	mount --bind "/run/disk$place" $place
done
udevadm control --reload

# What would empty /tmp, where what is tested may lie, and what this host has enabled besides.
mkdir -p /run/systemd/system /etc/systemd/system.conf.d
for unit in tmp.mount systemd-tmpfiles-setup.service systemd-tmpfiles-clean.timer; do
	ln -sf /dev/null /run/systemd/system/$unit
done
cat >/etc/systemd/system.conf.d/test.conf <<-END
	[Manager]
	DefaultEnvironment=PYTHONPATH=$PYTHONPATH PYTHONSAFEPATH=1 PYTHON=$PYTHON
END
cat >/run/systemd/system/job.service <<-END
	[Service]
	Type=oneshot
	StandardOutput=file:/run/job.out
	StandardError=file:/run/job.out
	ExecStart=/bin/sh -eu $JOB
	ExecStopPost=/bin/sh -c 'echo job: \$\$SERVICE_RESULT >>/run/job.out'
	ExecStopPost=/bin/systemctl exit --no-block
END
cat >/run/systemd/system/job.target <<-END
	[Unit]
	Requires=basic.target
	Wants=multi-user.target job.service
	After=basic.target
END
# Only what the disk has enabled, and then the job.
mkdir -p /run/systemd/system/job.service.d
printf '[Unit]\nAfter=multi-user.target\n' >/run/systemd/system/job.service.d/after.conf
ln -sf "$(readlink -f /lib/systemd/system/multi-user.target)" /run/systemd/system/multi-user.target
rm -rf /lib/systemd/system/multi-user.target.wants
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
unshare --pid --fork --mount --mount-proc --cgroup --propagation private sh -c '
	umount /sys/fs/cgroup
	mount -t cgroup2 cgroup2 /sys/fs/cgroup
	exec env -i container=kernel-run PATH="$PATH" \
		/lib/systemd/systemd --system --unit=job.target --log-target=console --show-status=no'
cat /run/job.out
umount /var/lib/thinpool # nothing of ours holds it any more
umount /etc/udev/rules.d /etc/systemd/system
umount /run/disk
