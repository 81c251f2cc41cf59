# Turns a directory into a host: runs as PID 1 of new namespaces and becomes systemd. Reads one line from stdin when the
# network is in place.
#   $1 read-only root    $2 directory of this host (upper, work, root, var, srv, boot_id)    $3 host name
set -e
base=$1 own=$2 name=$3 root=$2/root
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$base,upperdir=$own/upper,workdir=$own/work" "$root"
# Real directories, not overlays: FUSE passthrough does not stack on an overlay.
mount --bind "$own/var" "$root/var"
mount --bind "$own/srv" "$root/srv"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
[ -e "$own/no-fuse" ] || mknod -m 666 "$root/dev/fuse" c 10 229
umount "$root/sys/fs/cgroup" 2>/dev/null || true
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
# Each boot has an id of its own, as on a real host.
mount --bind "$own/boot_id" "$root/proc/sys/kernel/random/boot_id"
hostname "$name"
ip link set lo up
read -r _
cd "$root"
mkdir -p .old
pivot_root . .old
umount -l /.old
rmdir /.old
# As systemd has it on a host of its own: services with mounts of their own see those that are made later.
mount --make-rshared /
export container=litefs-fleet
exec /lib/systemd/systemd --system </dev/null
