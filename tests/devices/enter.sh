#!/bin/sh
# A command in a root file system that forgets what is written to it; to be run in mount and PID namespaces of its own,
# with which all of this ends: see userland.py.
#   enter.sh ROOT SCRATCH FACE HOME USER COMMAND...
# ROOT: the file system, only read. SCRATCH: an empty folder. FACE: what the device shows, a folder with files for /proc
# and a folder for /sys. HOME=FOLDER: a folder out here that stands for the home in there, where writing lasts.
set -eu
root=$1 scratch=$2 face=$3 home=$4 user=$5
shift 5
path=$PATH
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay -o "lowerdir=$root,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$scratch/root"
root=$scratch/root
mount -t proc -o hidepid=2 proc "$root/proc"
for file in "$face"/proc/*; do mount --bind "$file" "$root/proc/${file##*/}"; done
mount --bind "$face/sys" "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 "$root/dev/${device%:*}" c 1 "${device#*:}"; done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount --bind "${home#*=}" "$root${home%%=*}"
# Not by `exec`: the kernel forgets whom to kill at unshare's end when a process changes its user, and this one does not.
PATH=$path
/usr/sbin/chroot --userspec="$user" --groups= "$root" "$@"
