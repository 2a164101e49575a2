#!/bin/sh
# Runs a command as Kubernetes would: no root, no capabilities, everything read-only but the folders of the manifests.
#   unshare --user --map-user=UID --map-group=UID --keep-caps --mount --pid --fork confine.sh REPOSITORIES HOME COMMAND…
# The repositories are then at /srv, read-only; HOME, /tmp and /dev/shm are empty and writable.
set -eu
repositories=$1 home=$2
shift 2
mount --make-rprivate /
mount --bind "$repositories" /srv
for folder in "$home" /tmp /dev/shm; do mount -t tmpfs -o size=512m none "$folder"; done
mount -t proc none /proc
cut -d' ' -f5 /proc/self/mountinfo | sort -u | while read -r place; do
  case $place in
    / | /srv) mount -o remount,bind,ro "$place" ;;                       # these must
    "$home" | /tmp | /dev/* | /proc | /proc/* | /sys | /sys/*) ;;
    *) mount -o remount,bind,ro "$place" 2>/dev/null || : ;;             # of others the system may not allow it
  esac
done
cd /
HOME=$home exec setpriv --no-new-privs --inh-caps=-all --ambient-caps=-all --bounding-set=-all "$@"
